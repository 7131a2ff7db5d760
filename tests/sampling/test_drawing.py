"""Samplers, schedules and options from a request, the command line, a grid and a picture's metadata."""

from __future__ import annotations

import importlib
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from reifusion import album
from reifusion.cli import main
from reifusion.model.config import ScheduleConfig
from reifusion.model.request import Request
from reifusion.model.samplers import SAMPLERS
from reifusion.model.spacing import SCHEDULES
from reifusion.sampling.elsewhere import ELSEWHERE
from reifusion.settings import sampler_names, schedule_names
from reifusion.weights import save
from tests.model.test_pipeline import latents, photo, tiny, trained_for
from tests.tiny import SMALL, WORDS, random_networks


@pytest.fixture(scope="module")
def pipe():
    return tiny()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("models") / "small.safetensors"
    save(SMALL, random_networks(SMALL), path, tokenizer=WORDS)
    return str(path)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_every_schedule_draws(pipe, schedule, kind):
    if kind == "flow" and schedule.startswith("align"):
        pytest.skip("refused, see below")
    pipe = replace(pipe, config=trained_for(kind))
    sampler = "flow" if kind == "flow" else "euler"
    asked: dict[str, Any] = {"seed": 1, "steps": 5, "sampler": sampler}
    drawn = latents(pipe, "a cat", schedule=schedule, **asked)
    assert drawn.isfinite().all()
    own = {"flow": ("trailing", "simple")}.get(kind, ("leading", "ddim_uniform"))
    if schedule not in own:  # which are the sampler's own where n divides the training's
        assert not torch.equal(drawn, latents(pipe, "a cat", **asked))


def test_a_schedule_goes_with_strength_a_mask_and_a_start(pipe):
    asked: dict[str, Any] = {"seed": 1, "steps": 6, "sampler": "dpm2_a", "schedule": "karras"}
    mask = Image.new("L", (64, 64), 255)
    assert latents(pipe, "a", init_image=photo(), mask=mask, strength=0.5, **asked).isfinite().all()
    whole = list(pipe.denoise("a", **(asked | {"sampler": "euler"})))
    rest = list(pipe.denoise("a", latents=whole[2].x_t, start=2, **(asked | {"sampler": "euler"})))
    assert torch.equal(rest[-1].latents, whole[-1].latents)


def test_options_reach_the_sampler(pipe):
    asked: dict[str, Any] = {"seed": 1, "steps": 4}
    drawn = {
        options: latents(pipe, "a cat", sampler=name, **asked, **dict(options))
        for name, options in (
            ("euler_a", ()),
            ("euler_a", (("eta", 0.5),)),
            ("euler_a", (("s_noise", 1.1),)),
            ("euler_churn", (("churn", 2.0),)),
        )
    }
    every = list(drawn.values())
    assert all(not torch.equal(one, other) for k, one in enumerate(every) for other in every[:k])
    calm = latents(pipe, "a cat", sampler="euler_a", eta=0.0, **asked)
    assert (calm - latents(pipe, "a cat", sampler="euler", **asked)).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"schedule": "magic"}, "there is no schedule 'magic'; there are leading, "),
        ({"schedule": "karras", "sampler": "restart"}, "the sampler restart has a schedule of its own"),
        ({"schedule": "karras", "sampler": "dpmpp_2m_karras"}, "those that take any are ddpm, "),
        ({"eta": 2.0}, "eta must be between 0 and 1, not 2.0"),
        ({"s_noise": -1.0}, "s_noise must be between 0 and 10, not -1.0"),
        ({"churn": float("nan")}, "churn must be between 0 and 1000, not nan"),
        ({"eta": "x"}, "eta must be a number, not 'x'"),
        ({"eta": 0.5, "sampler": "euler"}, "the sampler euler has no eta; these have: ddim, euler_a"),
        ({"churn": 1.0, "sampler": "euler"}, "has no churn; these have: euler_churn"),
        ({"s_noise": 1.1, "sampler": "dpmpp_2m"}, "the sampler dpmpp_2m has no s_noise"),
    ],
)
def test_what_does_not_go_together_is_refused_in_a_sentence(asked, says):
    with pytest.raises(ValueError) as told:
        Request("a cat", **asked).for_model(trained_for("epsilon"))
    assert says in str(told.value)


def test_what_does_not_fit_the_model_is_refused_before_it_draws():
    with pytest.raises(
        ValueError, match=r"align_your_steps is for models like SD 1\.5 and SDXL, not for flow"
    ):
        Request("a", schedule="align_your_steps").for_model(trained_for("flow"))
    config = replace(trained_for("epsilon"), sampler="dpmpp_2m_karras")
    assert Request("a", schedule="beta").for_model(config).sampler == "dpmpp_2m"
    assert Request("a").for_model(config).sampler == "dpmpp_2m_karras"
    with pytest.raises(ValueError, match="the sampler euler has no eta"):
        Request("a", eta=0.5).for_model(replace(config, sampler="euler"))


def test_the_command_line_draws_with_them_and_the_picture_knows(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    asked = ["generate", "cat", "--model", model, "--steps=3", "--seed=1", "--quiet"]
    more = ["--sampler=dpmpp_3m_sde", "--schedule=kl_optimal", "--eta=0.5", "--s-noise=1.1"]
    assert main([*asked, *more, "--out=one.png"]) == 0
    kept = album.read("one.png").settings
    assert (kept.sampler, kept.schedule, kept.eta, kept.s_noise) == ("dpmpp_3m_sde", "kl_optimal", 0.5, 1.1)
    text = Image.open("one.png").text["parameters"]  # type: ignore[attr-defined]
    assert "Sampler: DPM++ 3M SDE, Schedule type: KL Optimal" in text and "Eta: 0.5" in text
    assert main(["generate", "--like=one.png", "--quiet", "--out=two.png"]) == 0
    assert Image.open("one.png").tobytes() == Image.open("two.png").tobytes()
    scope: dict[str, Any] = {}
    exec(kept.as_python().replace("picture.save", "picture.copy() #"), scope)
    assert scope["picture"].tobytes() == Image.open("one.png").tobytes()
    capsys.readouterr()
    assert main([*asked, "--schedule=magic"]) == 2
    assert "there is no schedule 'magic'" in capsys.readouterr().err
    assert (
        main(["grid", *asked[1:-1], "--sampler=euler", "--x", "schedule=karras,beta,simple", "--out=t.png"])
        == 0
    )
    capsys.readouterr()
    assert (
        main(["grid", *asked[1:-1], "--sampler=restart", "--x", "schedule=karras,beta", "--out=u.png"]) == 2
    )
    assert "with schedule='karras': the sampler restart has a schedule of its own" in capsys.readouterr().err


def test_samplers_lists_all_of_them_with_their_names_elsewhere(capsys):
    assert main(["samplers"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = {line.split()[0] for line in lines if line}
    assert listed == {"sampler", "schedule", *SAMPLERS, *SCHEDULES}
    heun = next(line for line in lines if line.startswith("heun "))
    assert re.split(r"  +", heun) == [
        "heun", "2", "2", "-", "epsilon, v", "Heun", "heun", "heun", "HeunDiscrete"
    ]  # fmt: skip
    assert sorted(sampler_names()) == sorted(SAMPLERS) and sorted(schedule_names()) == sorted(SCHEDULES)


def test_every_sampler_has_a_row_whose_diffusers_class_exists():
    diffusers = pytest.importorskip("diffusers")
    assert set(ELSEWHERE) == set(SAMPLERS)
    for name, row in ELSEWHERE.items():
        found = re.match(r"(\w+)(?:\((.*)\))?", row.diffusers)
        if found is None:
            assert row.diffusers == "", name
            continue
        try:
            kind = getattr(diffusers, f"{found[1]}Scheduler")
            options = eval(f"dict({found[2] or ''})")
            kind(**options)
        except ImportError:
            assert name in ("lms", "dpmpp_2s_sde")  # which need more packages


@pytest.mark.parametrize("name", ELSEWHERE)
def test_the_columns_calls_and_noise_are_true(name):
    kind = SAMPLERS[name]
    sampler = kind(generator := torch.Generator().manual_seed(0))
    sampler.set_inference_timesteps(10)
    calls = ELSEWHERE[name].calls
    assert len(sampler.timesteps) == 10 * calls - (calls - 1) + (name == "pndm")
    x, before = torch.ones(1, 4, 3, 5), generator.get_state()
    for t in sampler.timesteps:
        x = sampler.step(t, x, torch.tanh(sampler.scale_model_input(x, t)))
    drew = not torch.equal(before, generator.get_state())
    assert drew == (kind.s_noise is not None and kind.eta != 0) or name == "restart"  # from 20 steps on


def test_a_file_of_ones_own_may_add_a_schedule(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(
        "from reifusion.model.spacing import SCHEDULES\n"
        "import torch\n\n"
        "def squares(sigmas, n):\n"
        "    return (len(sigmas) - 1) * (1 - torch.arange(n, dtype=torch.float64) / n) ** 2\n\n"
        "SCHEDULES['squares'] = squares\n"
    )
    asked = ["generate", "cat", "--model", model, "--steps=3", "--seed=1", "--quiet", "--sampler=euler"]
    try:
        assert main([*asked, "--code=own.py", "--schedule=squares", "--out=one.png"]) == 0
        assert album.read("one.png").settings.schedule == "squares"
    finally:
        SCHEDULES.pop("squares", None)
    assert main(["generate", "--like=one.png", "--quiet"]) == 2  # its file is not run unasked
    assert importlib.import_module("reifusion.sampling.schedules").TITLES.get("squares") is None


def test_schedules_of_folders_stay_as_they_are():
    with pytest.raises(ValueError, match="timestep_spacing must be 'trailing' or None, not 'karras'"):
        SAMPLERS["ddim"](schedule=ScheduleConfig(timestep_spacing="karras"))


def test_the_commands_and_the_code_of_the_guide_run(model, tmp_path, monkeypatch, capsys):
    guide = (Path(__file__).parents[2] / "docs/guides/samplers.md").read_text("utf-8")
    monkeypatch.chdir(tmp_path)
    [commands] = re.findall(r"```console\n(.*?)```", guide, re.DOTALL)
    for line in commands.strip().splitlines():
        _, verb, *words = shlex.split(line)
        if verb != "samplers":
            words += ["--model", model, "--size=16x16", *(["--steps=2"] if verb == "generate" else [])]
        assert main([verb, *words]) == 0, line
    [code] = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    (tmp_path / "mine.py").write_text(code)
    asked = ["generate", "cat", "--model", model, "--steps=2", "--size=16x16", "--sampler=dpm2", "--quiet"]
    try:
        assert main([*asked, "--code=mine.py", "--schedule=squares"]) == 0
    finally:
        SCHEDULES.pop("squares", None)
