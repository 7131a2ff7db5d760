"""Drawing for several pages: the right steps are kept, the picture is the same, and it stops when told to."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
import torch

from reifusion.model.request import Request
from reifusion.studio import drawing as drawing_module
from reifusion.studio.drawing import Drawing, draw


def request(**more) -> Request:
    return Request("a cat on a dog", **{"seed": 3, "sampler": "ddim", "steps": 4, **more})


def same(one, other) -> bool:
    return np.array_equal(np.asarray(one), np.asarray(other))


def test_watching_changes_nothing_and_every_step_is_kept(pipe, finish):
    drawing = finish(request())
    assert same(drawing.frames[-1].picture, pipe.generate(request(), progress=False))
    noise, *steps, end = drawing.frames
    assert (noise.step, end.step) == (None, None) and [frame.step for frame in steps] == [0, 1, 2, 3]
    for frame, step in zip(steps, pipe.denoise(request())):
        assert frame.t == step.t and same(frame.picture, pipe.decode(step.x0)[0])
        assert frame.push == pytest.approx((step.eps_cond - step.eps_uncond).square().mean().sqrt().item())
    assert [word.text for word in drawing.attention.words] == ["a", "cat", "on", "a", "dog"]


def test_of_many_steps_some_are_decoded_the_first_and_the_last_among_them(finish):
    drawing = finish(request(steps=60))
    steps = [frame.step for frame in drawing.frames[1:-1]]
    assert len(steps) == drawing_module.MOST and steps[0] == 0 and steps[-1] == 59 == drawing.total - 1


def test_without_guidance_the_prompt_does_not_push(finish):
    assert finish(request(cfg=1)).frames[1].push is None


def test_the_drawing_grows_while_it_is_watched(model, tmp_path):
    seen = [
        (len(drawing.frames), drawing.done)
        for drawing in draw(request(steps=20), model, tmp_path, threading.Event())
    ]
    assert seen == sorted(seen) and seen[-1] == (22, True) and len({frames for frames, _ in seen}) > 3


def test_stopping_keeps_what_is_there_and_writes_nothing(model, tmp_path):
    stop = threading.Event()
    for drawing in draw(request(steps=1000), model, tmp_path / "out", stop):
        if len(drawing.frames) > 2:
            stop.set()
    assert drawing.note.startswith("Stopped after step ") and drawing.note.endswith(" of 1000.")
    assert drawing.path is None and not (tmp_path / "out").exists() and len(drawing.frames) > 3


def test_who_leaves_does_not_keep_the_model(model, tmp_path, finish):
    watching: Any = draw(request(steps=1000), model, tmp_path, threading.Event())
    next(watching)
    watching.close()
    started = time.monotonic()
    finish(request())
    assert time.monotonic() - started < 5


def test_a_failure_is_one_sentence_and_the_next_picture_is_drawn(model, tmp_path, finish):
    def told(source: str) -> Drawing:
        *_, drawing = drawing_module.draw(request(), source, tmp_path, threading.Event())
        return drawing

    failed = told(str(tmp_path / "nothing.safetensors"))
    assert failed.failed and "nothing.safetensors" in failed.note and "\n" not in failed.note
    assert finish(request()).path is not None


def test_two_pages_at_once_do_not_mix(pipe, model, tmp_path):
    prompts = ["a cat", "a dog", "a rocket"]
    drawn: dict[str, Any] = {}

    def watch(prompt: str) -> None:
        wanted = Request(prompt, seed=3, steps=6, sampler="ddpm")
        *_, drawn[prompt] = draw(wanted, model, tmp_path, threading.Event())

    pages = [threading.Thread(target=watch, args=[prompt]) for prompt in prompts]
    for page in pages:
        page.start()
    for page in pages:
        page.join()
    for prompt in prompts:
        wanted = Request(prompt, seed=3, steps=6, sampler="ddpm")
        assert same(drawn[prompt].frames[-1].picture, pipe.generate(wanted, progress=False))
        assert [word.text for word in drawn[prompt].attention.words] == prompt.split()
        assert all(len(maps) == 6 for maps in drawn[prompt].attention.maps.values())
    hooks = [
        layer.hook
        for layer in drawing_module.model(model).models["diffusion"].modules()
        if hasattr(layer, "hook")
    ]
    assert hooks and not any(hooks)


@pytest.mark.parametrize("name", ["ddim", "euler_a"])  # one in ᾱ, one in σ
def test_the_curves_are_those_of_the_schedule(finish, name):
    drawing = finish(request(sampler=name))
    signal, noise = torch.tensor(drawing.signal), torch.tensor(drawing.noise)
    assert len(signal) == 1000 and torch.allclose(signal**2 + noise**2, torch.ones(1000))
    assert [frame.t for frame in drawing.frames[1:-1]] == drawing.sampler.timesteps.tolist()


def test_a_tiny_vae_shows_the_steps_and_the_picture_is_the_model_s_own(pipe, model, finish, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderTiny().eval()
    theirs.save_pretrained(tmp_path / "tiny")
    *_, drawing = draw(request(), model, tmp_path / "out", threading.Event(), str(tmp_path / "tiny"))
    assert same(drawing.frames[-1].picture, pipe.generate(request(), progress=False))
    for frame, step in zip(drawing.frames[1:-1], pipe.denoise(request())):
        with torch.inference_mode():
            expected = theirs.decode(step.x0.float()).sample[0].clamp(-1, 1).permute(1, 2, 0)
        shown = torch.tensor(np.asarray(frame.picture)) / 127.5 - 1
        assert (shown - expected).abs().max() < 3 / 127.5  # the model may work in bfloat16
        assert not same(frame.picture, pipe.decode(step.x0)[0])
    diffusers.AutoencoderTiny(latent_channels=16).save_pretrained(tmp_path / "other")
    *_, again = draw(request(), model, tmp_path / "out", threading.Event(), str(tmp_path / "other"))
    assert same(again.frames[2].picture, finish(request()).frames[2].picture)  # does not fit: the model's own
