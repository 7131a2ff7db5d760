"""Sharpening's promises: only the decoder changes, and a killed or divided run ends like a whole one."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from reifusion.model.config import VAEConfig
from reifusion.train.loop import BatchPart, LoopConfig
from reifusion.train.sharpen import Sharpening, WithCritic, sharpen_decoder, sharpening_objective
from reifusion.train.vae import VAE, PixelBatch
from tests.sprites import random_sprites

TINY = VAEConfig(channels=(8, 16), layers=1, groups=4, scale_factor=1.0)
FEW = Sharpening(
    LoopConfig(steps=6, lr=2e-3, warmup=2, ema=0.9, mixed_precision="no", checkpoint_minutes=0.0), batch=4
)


@pytest.fixture
def draw() -> PixelBatch:
    generator = torch.Generator().manual_seed(0)
    sprites = torch.randint(0, 256, (6, 4, 4, 4), generator=generator, dtype=torch.uint8)
    return partial(random_sprites, sprites.repeat_interleave(4, 2).repeat_interleave(4, 3))  # blocks, 16×16


def sharpened(draw, training, folder) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    return sharpen_decoder(VAE(TINY), draw, 16, training, folder).state_dict()


def test_only_the_decoder_changes_and_all_of_it(draw, tmp_path):
    torch.manual_seed(7)
    before = VAE(TINY).state_dict()
    after = sharpened(draw, FEW, tmp_path)
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert still == {name for name in before if name.startswith("encoder.")}


def test_killed_and_resumed_run_ends_in_the_same_weights(draw, tmp_path):
    whole = sharpened(draw, FEW, tmp_path / "whole")
    steps = []

    def dies(*request):
        steps.append(request)
        if len(steps) == 4:  # the first batch was for the sheet
            raise RuntimeError("killed")
        return draw(*request)

    with pytest.raises(RuntimeError, match="killed"):
        sharpened(dies, FEW, tmp_path / "cut")
    assert (tmp_path / "cut" / "checkpoint.pt").exists()
    resumed = sharpened(draw, FEW, tmp_path / "cut")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_batch_in_two_parts_trains_as_the_whole_does(draw, tmp_path):
    whole = sharpened(draw, FEW, tmp_path / "whole")
    parts = sharpened(draw, replace(FEW, loop=replace(FEW.loop, accumulate=2)), tmp_path / "parts")
    assert all(torch.allclose(whole[name], parts[name], atol=2e-4) for name in whole)
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "training.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_critic_learns_from_the_first_step_and_is_listened_to_later(draw):
    torch.manual_seed(7)
    model = WithCritic(VAE(TINY))
    training = replace(FEW, loop=replace(FEW.loop, steps=100), critic=0.5, matching=0.25, critic_by=0.2)
    objective = sharpening_objective(draw, 16, TINY, training)

    def at(step: int) -> tuple[float, dict[str, float], bool]:
        model.zero_grad()
        total, figures = objective(model, step / 100, torch.Generator().manual_seed(1), BatchPart())
        total.backward()
        return (
            total.item(),
            {name: float(value) for name, value in figures.items()},
            _has_gradient(model.critic.score),
        )

    first, figures, learns = at(0)
    assert learns
    assert first == pytest.approx(
        figures["l1"] + figures["mse"] + figures["edges"] + figures["critic"], rel=1e-5
    )
    added = 0.5 * figures["opinion"] + 0.25 * figures["matching"]
    for step, heard in ((10, 0.5), (20, 1.0), (99, 1.0)):
        assert at(step)[0] - first == pytest.approx(heard * added, rel=1e-3)


def _has_gradient(layer: torch.nn.Conv2d) -> bool:
    return layer.weight.grad is not None and bool(layer.weight.grad.abs().sum() > 0)
