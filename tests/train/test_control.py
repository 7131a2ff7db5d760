"""Training a ControlNet: the hint is learned, the model stays as it is, and a run that is killed goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

import reifusion.train.loop
from reifusion.model.config import ScheduleConfig
from reifusion.model.model_loader import state_dict
from reifusion.model.pipeline import StableDiffusion
from reifusion.steer.control_files import load_control
from reifusion.steer.controlnet import Control, ControlNet, controlled
from reifusion.steer.edges import edges
from reifusion.train.control import (
    ControlTraining,
    Hinted,
    TextToControl,
    edges_of,
    fresh,
    train_control,
    with_edges,
)
from reifusion.train.images import open_pictures
from reifusion.train.keys import RecipeError
from reifusion.train.latents import cache_latents
from reifusion.train.loop import LoopConfig
from reifusion.train.text2image import Latents, forward_process
from reifusion.train.watch import measured_loss
from tests.tiny import TINY, WORDS, random_networks

pytest.importorskip("cv2")
SMALL = replace(
    TINY,
    clip=replace(TINY.clip, vocab_size=WORDS.vocab_size, context_length=16),
    schedule=ScheduleConfig(prediction_type="v_prediction"),
    size=32,
    steps=3,
)


@pytest.fixture
def pipe() -> StableDiffusion:
    return StableDiffusion(SMALL, WORDS, random_networks(SMALL))


def training(steps: int, **more) -> ControlTraining:
    loop = LoopConfig(steps=steps, lr=5e-3, warmup=5, ema=0.9, mixed_precision="no", checkpoint_minutes=100)
    return ControlTraining(loop=loop, batch=8, **more)


def latents(count: int = 8) -> Latents:
    """Pictures that nothing but their hints tells apart: all have the same words."""
    torch.manual_seed(1)
    means = torch.randn(count, 4, 1, 1).expand(-1, -1, 4, 4) + 0.2 * torch.randn(count, 4, 4, 4)
    return Latents(means.contiguous(), torch.tensor(WORDS.encode("cat")).expand(count, -1))


class Wrong:
    """The same pictures with the hints of others."""

    def __init__(self, data: Any):
        self.data, self.device, self.beside = data, data.device, data.beside

    def __len__(self) -> int:
        return len(self.data)

    def latent_batch(self, generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
        found, tokens = self.data.latent_batch(generator, count)
        own, hints = found[:, :4], found[:, 4:]
        return torch.cat([own, hints.roll(1, 0)], dim=1), tokens


@pytest.mark.slow
def test_the_right_hint_explains_a_noisy_picture_better_and_the_model_stays(pipe, tmp_path):
    before = {name: x.clone() for name, x in state_dict(pipe.models).items()}
    asked = training(300, edge_low=20.0, edge_high=40.0, caption_dropout=0.0)
    out = train_control(pipe, latents(), {}, asked, tmp_path, tmp_path / "net.safetensors", {})
    after = state_dict(pipe.models)
    assert all(torch.equal(x, after[name]) for name, x in before.items())
    assert all(x.requires_grad for x in pipe.models["diffusion"].parameters())
    data = with_edges(latents(), pipe, tmp_path / "edges", (20, 40))

    def loss(net: ControlNet, data: Any) -> float:
        model = TextToControl(pipe.models["clip"], pipe.models["diffusion"], net, 8)
        return measured_loss(model, data, forward_process(SMALL.schedule), 8, 0)["_high_noise"]

    net: Any = load_control(out, pipe, fast=False)
    assert loss(net, data) < 0.85 * loss(net, Wrong(data))
    assert loss(net, data) < 0.7 * loss(fresh(pipe.models["diffusion"], SMALL), data)
    assert (tmp_path / "sheet-000300.png").exists()


def test_it_draws_with_its_file_and_begins_as_the_model(pipe, tmp_path):
    hint = Image.new("RGB", (32, 32))
    ImageDraw.Draw(hint).line((4, 4, 28, 20), "white", 2)
    settings = {"steps": 3, "seed": 1, "progress": False}
    drawn = controlled(pipe, Control(fresh(pipe.models["diffusion"], SMALL).eval(), hint)).generate(
        "cat", **settings
    )
    assert np.array_equal(np.asarray(drawn), np.asarray(pipe.generate("cat", **settings)))
    out = train_control(pipe, latents(), {}, training(3), tmp_path, tmp_path / "net.safetensors", {})
    trained = controlled(pipe, Control(load_control(out, pipe), hint)).generate("cat", **settings)
    assert not np.array_equal(np.asarray(trained), np.asarray(drawn))


def test_a_run_goes_on_where_it_was_and_its_edges_are_kept(pipe, tmp_path, monkeypatch):
    def run(folder: Path, steps: int) -> dict[str, Tensor]:
        out = train_control(pipe, latents(), {}, training(steps), folder, folder / "net.safetensors", {})
        return load_control(out, pipe, fast=False).state_dict()

    once = run(tmp_path / "once", 6)
    stop = iter([False, False, True])
    monkeypatch.setattr(reifusion.train.loop, "stop_asked", lambda: _Asked(lambda: next(stop, True)))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "twice", 6)
    monkeypatch.undo()
    monkeypatch.setattr("reifusion.train.control.edges", lambda *_: pytest.fail("the edges were kept"))
    twice = run(tmp_path / "twice", 6)
    assert all(torch.equal(x, twice[name]) for name, x in once.items())


class _Asked:
    def __init__(self, answer):
        self.answer = answer

    def __enter__(self):
        return self.answer

    def __exit__(self, *_):
        return None


def test_hints_lie_where_the_latents_have_the_edges(pipe, tmp_path):
    data = latents(3)
    packed = edges_of(data.means, pipe, tmp_path, (50, 100))
    assert packed.shape == (3, 64, 4, 4)
    for z, one in zip(data.means, packed, strict=True):
        (picture,) = pipe.decode(z[None])
        expected = np.asarray(edges(picture, 50, 100).convert("L")) > 0
        assert expected.any() and np.array_equal(
            F.pixel_shuffle(one[None].float(), 8)[0, 0].bool().numpy(), expected
        )


def test_own_pictures_of_several_shapes_have_their_own_hints(pipe, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, size in enumerate([(48, 32), (48, 32), (32, 48), (32, 32)]):
        picture = Image.new("RGB", size, (40 * i, 20, 90))
        ImageDraw.Draw(picture).ellipse((4 + i, 4, 20 + 2 * i, 26), "white")
        picture.save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("cat")
    encoder = pipe.models["encoder"]
    data = cache_latents(encoder, open_pictures(folder), 32, tmp_path / "latents", tokenizer=WORDS)
    hinted = with_edges(data, pipe, tmp_path / "edges", (20, 40))
    assert isinstance(hinted, Hinted) and hinted.beside == 64
    for seed in range(6):
        plain, tokens = data.latent_batch(torch.Generator().manual_seed(seed), 3)
        found, same = hinted.latent_batch(torch.Generator().manual_seed(seed), 3)
        assert torch.equal(found[:, :4], plain) and torch.equal(tokens, same)
        for z, hint in zip(data._choose(torch.Generator().manual_seed(seed), 3), found[:, 4:], strict=True):
            scaled = z[0].mean[z[0].number][None].float() * SMALL.vae.scale_factor
            (picture,) = pipe.decode(scaled)
            expected = np.asarray(edges(picture, 20, 40).convert("L")) > 0
            assert np.array_equal(F.pixel_shuffle(hint[None], 8)[0, 0].bool().numpy(), expected)


def test_models_that_it_cannot_be_trained_for_are_named(pipe):
    with pytest.raises(RecipeError, match="hint_channels must be 4 numbers"):
        fresh(pipe.models["diffusion"], SMALL, (8, 8))
    nine = replace(SMALL, unet=replace(SMALL.unet, in_channels=9))
    with pytest.raises(RecipeError, match="latents alone"):
        fresh(random_networks(nine)["diffusion"], nine)


def test_edges_are_those_of_shapes_and_need_opencv(monkeypatch):
    picture = Image.new("RGB", (40, 30), "black")
    ImageDraw.Draw(picture).rectangle((10, 8, 29, 21), (255, 0, 0))
    found = np.asarray(edges(picture))
    assert found.shape == (30, 40, 3) and set(np.unique(found)) == {0, 255}
    rows, columns = np.nonzero(found[..., 0])
    assert abs(rows.min() - 8) <= 1 and abs(rows.max() - 21) <= 1
    assert abs(columns.min() - 10) <= 1 and abs(columns.max() - 29) <= 1
    assert not found[12:18, 14:26].any()
    with pytest.raises(ValueError, match="lower one first"):
        edges(picture, 200, 100)
    monkeypatch.setitem(__import__("sys").modules, "cv2", None)
    with pytest.raises(ValueError, match="OpenCV"):
        edges(picture)
