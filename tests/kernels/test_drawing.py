"""Whole pictures, drawn by what was recorded: the same to the bit as by the networks as they are written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from reifusion import families, kernels
from reifusion.explain.bugs import BUGS
from reifusion.kernels import graphs
from reifusion.model.config import ModelConfig, ScheduleConfig
from reifusion.model.pipeline import StableDiffusion
from reifusion.model.samplers import SAMPLERS
from reifusion.shortcuts.deepcache import deepcached
from reifusion.swap import swap
from tests.kernels.card import Card
from tests.marks import often
from tests.tiny import TINY, Bytes, random_networks


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    card = Card()
    monkeypatch.setattr(graphs, "recorder", graphs.Recorder(card.record))
    monkeypatch.setattr(graphs, "suits", lambda x: torch.is_inference_mode_enabled())
    yield card


def model(config: ModelConfig) -> StableDiffusion:
    """A model whose U-Net and decoder are played back, and whose layers are the textbook's."""
    models = random_networks(config)
    for name in ("diffusion", "decoder"):
        swap(models[name], kernels.FAST[type(models[name])])
    return families.adapted(StableDiffusion(config, Bytes(), models))


def draw(pipe: StableDiffusion, **settings: Any) -> tuple[list[Tensor], np.ndarray]:
    """Every step's latents, and the pictures."""
    asked: dict[str, Any] = {"seed": 1, "steps": 6, "sampler": "ddim", "progress": False, **settings}
    latents: list[Tensor] = []
    pictures = pipe.generate("a cat", callback=lambda step: latents.append(step.latents), **asked)
    return latents, np.stack(
        [np.asarray(x) for x in (pictures if isinstance(pictures, list) else [pictures])]
    )


def assert_same(pipe: StableDiffusion, times: int = 2, **settings: Any) -> None:
    with graphs.recorder.eager():
        latents, pictures = draw(pipe, **settings)
    for _ in range(times):
        its, again = draw(pipe, **settings)
        assert len(its) == len(latents) and all(map(torch.equal, its, latents))
        assert np.array_equal(again, pictures)


PICTURE = Image.fromarray((np.arange(64 * 64 * 3) % 251).reshape(64, 64, 3).astype(np.uint8))
MASK = Image.new("L", (64, 64))
MASK.paste(255, (16, 16, 48, 48))
CASES: dict[str, dict[str, Any]] = {
    "no guidance": {"cfg": 1.0},
    "in an interval": {"guidance_interval": (0.3, 5)},
    "a picture": {"init_image": PICTURE, "strength": 0.7},
    "inpainting": {"init_image": PICTURE, "mask": MASK, "strength": 0.7},
    "a batch": {"num": 3},
    "another shape": {"size": (96, 32)},
}


@pytest.mark.parametrize("sampler", often(SAMPLERS))
def test_every_sampler_draws_the_same(card, sampler):
    kind = SAMPLERS[sampler].prediction_types[0]
    assert_same(model(replace(TINY, schedule=ScheduleConfig(prediction_type=kind))), sampler=sampler)
    assert len(card.outputs) == 2 and len(card.played) > 6  # the U-Net and the decoder


@pytest.mark.parametrize("case", CASES)
def test_every_way_of_drawing_draws_the_same(card, case):
    assert_same(model(TINY), **CASES[case])
    assert len(card.played) > 6


def test_many_kinds_of_pictures_in_turn_draw_the_same(card):
    pipe = model(TINY)
    for _ in range(2):
        for settings in CASES.values():
            assert_same(pipe, times=1, **settings)


@pytest.mark.parametrize("every", [2, 3])
@pytest.mark.parametrize(
    "settings", [{}, {"guidance_interval": (0.3, 5)}, {"num": 2}], ids=["", "interval", "two"]
)
def test_deepcache_draws_the_same_and_is_played(card, every, settings):
    pipe = deepcached(model(TINY), every)
    assert_same(pipe, **settings)
    names = {cast(tuple, kind)[0] for kind in graphs.recorder._networks[pipe.models["diffusion"]].recordings}
    assert names == {"DeepCache._whole", "DeepCache._shallow"}
    assert len(card.played) > 6


def test_latent_consistency_models_draw_the_same_and_are_played(card):
    pipe = model(replace(TINY, unet=replace(TINY.unet, guidance_width=32)))
    assert type(pipe.models["diffusion"]) is graphs.LCMUNet
    assert_same(pipe, sampler="lcm", cfg=2.0)
    assert_same(pipe, sampler="lcm", cfg=7.0)  # the scale is read anew
    assert len(card.played) > 10
    assert_same(deepcached(pipe, 2), sampler="lcm", cfg=7.0)


def test_models_that_edit_pictures_draw_the_same(card):
    config = replace(TINY, unet=replace(TINY.unet, in_channels=8))
    assert_same(model(config), init_image=PICTURE)
    assert len(card.played) > 6


def test_a_callback_that_changes_the_network_in_the_midst_is_obeyed(card):
    pipe = model(TINY)
    weight = pipe.models["diffusion"].get_parameter("conv_out.weight")

    def drawn() -> list[Tensor]:
        before, latents = weight.data, []

        def change(step: Any) -> None:
            latents.append(step.latents)
            if step.index == 3:
                weight.data = before * 1.1

        try:
            pipe.generate("a cat", callback=change, seed=1, steps=6, sampler="ddim", progress=False)
        finally:
            weight.data = before
        return latents

    with graphs.recorder.eager():
        expected = drawn()
    for _ in range(2):
        assert all(map(torch.equal, drawn(), expected))


def test_gradients_are_as_ever(card):
    pipe = model(TINY)
    draw(pipe)
    before = len(card.played)
    x = torch.randn(1, 4, 8, 8, requires_grad=True)
    pipe.models["diffusion"](x, torch.randn(1, 8, 16), torch.tensor([5.0])).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0 and len(card.played) == before


@pytest.mark.parametrize("name", ["sines-first", "guidance-swapped"])
def test_a_bug_that_is_switched_on_shows(card, name):
    pipe = model(TINY)
    with graphs.recorder.eager():
        expected = BUGS[name].draw(pipe, "a cat", steps=6)
    draw(pipe)
    for one, other in zip(BUGS[name].draw(pipe, "a cat", steps=6), expected):
        assert np.array_equal(np.asarray(one), np.asarray(other))
    assert not np.array_equal(np.asarray(expected[0]), np.asarray(expected[1]))
