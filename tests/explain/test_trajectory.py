"""Every step is kept as it was, and the written files can be read."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from reifusion.explain.trajectory import Trajectory, describe, record
from reifusion.model.request import Request


def ask(prompt: str = "a cat", **settings: Any) -> Request:
    defaults: dict[str, Any] = {"sampler": "euler_a", "steps": 4, "seed": 1, "cfg": 3}
    return Request(prompt, **defaults | settings)


@pytest.fixture(scope="module")
def trajectory(pipe) -> Trajectory:
    return record(pipe, ask())


def test_the_picture_is_the_one_that_generate_draws(pipe, trajectory):
    assert trajectory.picture.tobytes() == pipe.generate(ask(), progress=False).tobytes()


def test_steps_are_those_of_denoise(pipe, trajectory):
    steps = list(pipe.denoise(ask()))
    assert trajectory.t == [step.t for step in steps]
    for name in ("x_t", "x0", "eps", "eps_cond", "eps_uncond"):
        assert torch.equal(getattr(trajectory, name), torch.cat([getattr(step, name) for step in steps]))
    assert torch.equal(trajectory.x_t[1], steps[0].latents[0])
    assert torch.equal(trajectory.latents, steps[-1].latents)


def test_guidance_is_what_the_prompt_adds(trajectory):
    # Eq. 6, Ho & Salimans 2022
    expected = trajectory.eps_uncond + 3 * trajectory.guidance
    assert torch.allclose(trajectory.eps, expected, atol=1e-5)
    for i, row in enumerate(trajectory.norms()):
        g = trajectory.guidance[i].double().numpy()
        assert row["guidance"] == pytest.approx(np.sqrt((g**2).mean()))
        assert row["x0_to_end"] == pytest.approx(
            np.sqrt(((trajectory.x0[i] - trajectory.latents[0]).double().numpy() ** 2).mean())
        )


def test_without_guidance_there_is_none(pipe):
    trajectory = record(pipe, ask(cfg=1))
    assert trajectory.guidance is None and "guidance" not in trajectory.norms()[0]
    assert trajectory.strip().image.height < record(pipe, ask()).strip().image.height  # a row less
    assert trajectory.curves().image.size == (1000, 400)


@pytest.mark.parametrize("between", [(1.0, 100.0), (0.0, 1.0)])
def test_where_only_some_steps_are_guided_the_others_push_nowhere(pipe, between):
    request = ask(guidance_interval=between)
    trajectory = record(pipe, request)
    guided = [step.eps_uncond is not None for step in pipe.denoise(request.for_model(pipe.config))]
    assert 0 < sum(guided) < len(guided) and trajectory.guidance is not None
    assert [bool(push.any()) for push in trajectory.guidance] == guided
    assert trajectory.strip().image.size and trajectory.curves().image.size


def test_saved_files_can_be_read(trajectory, tmp_path):
    trajectory.save(tmp_path)
    tensors = load_file(tmp_path / "trajectory.safetensors")
    facts = json.loads((tmp_path / "trajectory.json").read_text())
    assert torch.equal(tensors["guidance"], trajectory.guidance) and tensors["t"].tolist() == trajectory.t
    assert np.array_equal(tensors["shown_x0"][-1].numpy(), np.asarray(trajectory.shown_x0[-1]))
    assert facts["steps"] == trajectory.norms() and facts["settings"]["prompt"] == "a cat"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trajectory.json", "trajectory.safetensors"]


def test_of_many_steps_a_few_are_decoded_the_first_and_the_last_among_them(pipe):
    trajectory = record(pipe, ask(steps=9), show=4)
    assert trajectory.shown == [0, 3, 5, 8] and len(trajectory.shown_x_t) == len(trajectory.shown_x0) == 4
    assert len(trajectory.x0) == 9
    assert trajectory.shown_x0[1].tobytes() == pipe.decode(trajectory.x0[3:4])[0].tobytes()


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_the_animation_has_a_frame_for_each_step_and_rests_at_the_end(trajectory, tmp_path, suffix):
    trajectory.animate(tmp_path / f"a.{suffix}")
    with Image.open(tmp_path / f"a.{suffix}") as film:
        assert getattr(film, "n_frames", 1) == 4
        durations = []
        for frame in range(4):
            film.seek(frame)
            film.load()
            durations.append(film.info["duration"])
        assert durations == [160, 160, 160, 2000] and film.info["loop"] == 0


def test_one_picture_at_a_time(pipe):
    with pytest.raises(ValueError, match="one picture at a time can be explained, not 2"):
        record(pipe, ask(num=2))


def test_settings_in_words():
    line = "“a cat”, not “a dog” · seed 1 · euler_a · 4 steps · guidance 3"
    assert describe(ask(negative="a dog")) == line
    assert describe(ask("8 steps"), "steps", "cfg") == "“8 steps” · seed 1 · euler_a"
