"""Why two pictures differ: each difference is found in their files, and tried alone."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from reifusion import album
from reifusion.cli.main import main
from reifusion.explain import why
from reifusion.settings import ABOUT, Settings
from reifusion.steer.manners import Manner
from reifusion.weights import save
from tests.test_comfyui import GRAPH
from tests.tiny import SMALL, WORDS, networks


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("why") / "small.safetensors"
    save(SMALL, networks(SMALL, noise=0.02), path, tokenizer=WORDS)
    return str(path)


def entry(**settings) -> album.Entry:
    usual = Settings("a cat", seed=1, sampler="euler_a", steps=4, cfg=2.0, size=(32, 32))
    return album.Entry(replace(usual, **settings), {})


def test_every_setting_and_everything_that_programs_do_has_its_place():
    tried = {*why.ALONE, *why.SAMPLING, *why.SECOND_PASS, *why.VARIATION}
    assert tried | {*why.FILES} | {"manner", "rng", "emphasis"} == ABOUT.keys()
    # These take effect in a setting: the sampler's schedule, the size, and the steps of img2img.
    elsewhere = {"title", "schedule", "automatic", "sides", "img2img", "whole", "from_two"}
    assert {one.name for one in fields(Manner)} - elsewhere == why.MANNERS.keys()


def test_each_difference_is_worth_what_it_is_when_it_is_alone(model):
    first, second = entry(), entry(seed=2, cfg=4.0, sampler="dpmpp_2m", schedule="karras", dtype="float16")
    found = {one.name: one for one in why.differences(first, second, model, steps=4)}
    assert found.keys() == {"seed", "cfg", "sampler", "dtype"}
    assert found["dtype"].levels is None
    assert (found["sampler"].first, found["sampler"].second) == ("euler_a", "dpmpp_2m, schedule karras")
    pipe = Settings(model=model).pipe()

    def drawn(settings: Settings) -> np.ndarray:
        one = replace(settings, model=model, dtype=None)
        return np.asarray(one.draw(pipe, one.request().for_model(pipe.config))).astype(float)

    plain = drawn(first.settings)
    alone: dict[str, dict[str, Any]] = {
        "seed": {"seed": 2}, "cfg": {"cfg": 4.0}, "sampler": {"sampler": "dpmpp_2m", "schedule": "karras"},
    }  # fmt: skip
    for name, changes in alone.items():
        expected = np.abs(drawn(replace(first.settings, **changes)) - plain).mean()
        assert found[name].levels == pytest.approx(expected) and expected > 0
    tried = [one.levels for one in why.differences(first, second, model, steps=4) if one.levels is not None]
    assert tried == sorted(tried, reverse=True)


def test_what_does_not_count_is_no_difference(model):
    assert why.differences(entry(), entry(), model) == []
    assert why.differences(entry(), entry(variation_seed=4, hires_strength=0.3), model) == []
    assert why.differences(entry(), entry(strength=0.3), model) == []


def test_sizes_and_steps_are_tried_in_the_measure_of_the_model_that_stands_in(model):
    first = entry(size=(512, 512), steps=20)
    second = entry(size=(768, 512), steps=10)
    found = {one.name: one for one in why.differences(first, second, model, steps=4)}
    assert found["size"].second == "768x512" and (found["size"].levels or 0) > 0
    pipe = Settings(model=model).pipe()
    usual = why._tried(first.settings, pipe, model, 4)
    assert why._scaled(usual, first.settings, {"size": (768, 512)}, pipe, 4).size == (48, 32)
    assert why._scaled(usual, first.settings, {"steps": 10}, pipe, 4).steps == 2


@pytest.mark.slow
def test_programs_differ_in_what_no_setting_says(model, tmp_path, capsys):
    texts = PngInfo()
    texts.add_text("prompt", json.dumps(GRAPH))
    Image.new("RGB", (8, 8)).save(tmp_path / "comfyui.png", pnginfo=texts)
    texts = PngInfo()
    said = "Steps: 20, Sampler: DPM++ SDE, Schedule type: Karras, CFG scale: 8, Seed: 156680208700286"
    texts.add_text(
        "parameters",
        f"a (cat:1.2)\nNegative prompt: text, watermark\n{said}, Size: 512x768, Version: v1.10.1",
    )
    Image.new("RGB", (8, 8)).save(tmp_path / "a1111.png", pnginfo=texts)
    paths = [str(tmp_path / f"{name}.png") for name in ("a1111", "comfyui")]
    found = {one.name: one for one in why.why(*paths, model=model, steps=3)}
    assert found.keys() == {
        "where noise comes from",
        "how words are weighted",
        "whose brackets a prompt has",
        "the first noise times",
        "the noise of SDE samplers",
        "model",
        "lora",
    }
    assert (found["where noise comes from"].levels or 0) > (found["the first noise times"].levels or 0) > 0
    assert (found["the first noise times"].first, found["the first noise times"].second) == ("σ", "√(σ² + 1)")
    assert main(["why", *paths, "--model", model, "--steps", "3"]) == 0
    out = capsys.readouterr().out
    assert "The pictures are 0.00 levels of 255 apart." in out and "not tried" in out
    assert main(["why", paths[0], str(tmp_path / "none.png")]) == 2
    assert main(["why", *paths, "--steps", "0"]) == 2


def test_pictures_of_the_same_settings_have_nothing_to_say(model, tmp_path, capsys):
    asked = ["generate", "a cat", "--model", model, "--steps", "2", "--seed", "1", "--quiet", "--out"]
    paths = [str(tmp_path / f"{name}.png") for name in "ab"]
    for path in paths:
        assert main([*asked, path]) == 0
    assert main(["why", *paths, "--model", model]) == 0
    assert capsys.readouterr().out.endswith("0.00 levels of 255 apart.\n\nTheir files say the same.\n")
    assert {one.name for one in fields(why.Difference)} == {"name", "first", "second", "levels"}
