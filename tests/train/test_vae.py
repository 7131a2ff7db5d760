"""The VAE's training: its pictures, the terms of its loss, and that it learns."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from reifusion.model.config import VAEConfig
from reifusion.train.keys import RecipeError
from reifusion.train.loop import BatchPart, LoopConfig, rng
from reifusion.train.vae import (
    VAE,
    VAETraining,
    differences,
    kl,
    normalise_latents,
    reconstruction_objective,
    side_by_side,
    terms,
    train_vae,
)
from tests.sprites import random_sprites

TINY = VAEConfig(channels=(8, 16), layers=1, groups=4, scale_factor=1.0)


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)
    sprites = torch.randint(0, 256, (6, 4, 4, 4), generator=generator, dtype=torch.uint8)
    sprites = sprites.repeat_interleave(4, 2).repeat_interleave(4, 3)  # (6, 4, 16, 16), blocky
    return partial(random_sprites, sprites)


@pytest.mark.slow
@pytest.mark.parametrize("scale, shift", [(1.0, 0.0), (0.18215, 0.0), (1.5305, 0.0609)])
def test_vae_learns_and_its_scaled_latents_have_unit_variance(draw, tmp_path, scale, shift):
    config = VAEConfig(channels=(8, 16), layers=1, groups=4, scale_factor=scale, shift=shift)
    training = VAETraining(loop=LoopConfig(steps=120, lr=3e-3, warmup=10), batch=8, crop=16)
    vae = train_vae(draw, 16, config, training, tmp_path)
    log = [json.loads(line) for line in (tmp_path / "training.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]
    # These are the pictures that `normalise_latents` measured, so this is exact except for rounding.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        z = torch.cat([vae.encoder(draw(generator, 32, 16)) for _ in range(16)])
    assert z.mean((0, 2, 3)).abs().max() < 1e-3
    assert (z.std((0, 2, 3)) - 1).abs().max() < 1e-3
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(image.step, image.width, image.height) for image in board.Images("samples")] == [(120, 128, 32)]


def test_a_trained_vae_can_be_trained_on(draw, tmp_path):
    torch.manual_seed(3)
    before = VAE(TINY).state_dict()
    training = VAETraining(loop=LoopConfig(steps=1, lr=1e-9), batch=4, crop=8)
    vae = train_vae(draw, 16, TINY, training, tmp_path, start_from=before)
    assert torch.allclose(vae.encoder.conv_in.weight, before["encoder.conv_in.weight"], atol=1e-6)


def test_a_vae_without_quant_convolutions_learns_unless_its_latents_are_to_be_normalised(draw, tmp_path):
    config = replace(TINY, quant=False)
    training = VAETraining(loop=LoopConfig(steps=20, lr=3e-3, warmup=2, log_every=1), batch=8, crop=16)
    with pytest.raises(RecipeError, match="convolutions that this VAE lacks; set normalise=false"):
        train_vae(draw, 16, config, training, tmp_path)
    vae = train_vae(draw, 16, config, replace(training, normalise=False), tmp_path)
    log = [json.loads(line) for line in (tmp_path / "training.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < log[0]["loss"]
    assert vae.encoder.moments(draw(rng(0, 0), 4, 16))[1].mean() < -3  # little noise


@pytest.mark.parametrize("shift", [0.0, 0.0609])
def test_normalising_latents_leaves_the_round_trip_as_it_was(draw, shift):
    torch.manual_seed(0)
    vae = VAE(replace(TINY, shift=shift))
    x = draw(torch.Generator().manual_seed(1), 4, 16)
    with torch.no_grad():
        before = vae.decoder(vae.encoder(x))
        normalise_latents(vae, draw, 16)
        after = vae.decoder(vae.encoder(x))
    assert (before - after).abs().max() < 1e-4 * before.abs().max()


@pytest.mark.parametrize("step", [0, 5, 9])  # crops; with edges; whole pictures
def test_parts_together_have_the_loss_and_gradient_of_the_whole(draw, step):
    training = VAETraining(loop=LoopConfig(steps=10), batch=8, crop=8)
    objective = reconstruction_objective(draw, 16, TINY, training)
    torch.manual_seed(0)
    vae = VAE(TINY)

    def run(parts):
        value = torch.stack([objective(vae, step / 10, rng(0, step), part)[0] for part in parts]).mean()
        return value.item(), torch.autograd.grad(value, list(vae.parameters()))

    whole, parts = run([BatchPart()]), run([BatchPart(0, 2), BatchPart(1, 2)])
    assert whole[0] == pytest.approx(parts[0], rel=1e-5)
    for one, other in zip(whole[1], parts[1], strict=True):
        assert (one - other).norm() <= 1e-4 * one.norm() + 1e-6


def test_forward_decodes_a_sample_of_what_the_encoder_says(draw):
    torch.manual_seed(0)
    vae = VAE(VAEConfig(channels=(8, 16), layers=1, groups=4, scale_factor=0.5))
    x, noise = draw(rng(0, 0), 2, 16), torch.randn(2, 4, 8, 8)
    y, mean, log_variance = vae(x, noise)
    assert torch.equal(y, vae.decoder(vae.encoder(x, noise)))
    assert torch.equal(mean, vae.encoder.moments(x)[0])
    assert torch.equal(log_variance, vae.encoder.moments(x)[1])


def test_terms_of_a_perfect_reconstruction_are_zero_except_for_kl():
    x, mean = torch.randn(2, 3, 8, 8), torch.randn(2, 4, 4, 4)
    found = terms(x, x, mean, torch.zeros_like(mean))
    assert found["l1"] == found["mse"] == found["edges"] == 0
    assert found["kl"] == pytest.approx(0.5 * mean.pow(2).mean().item())
    shifted = terms(x, x + 0.5, mean, torch.zeros_like(mean))
    assert shifted["l1"] == pytest.approx(0.5) and shifted["mse"] == pytest.approx(0.25)
    assert shifted["edges"] < 1e-6


def test_kl_is_that_of_two_normal_distributions():
    mean, log_variance = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    there = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    expected = torch.distributions.kl_divergence(there, torch.distributions.Normal(0.0, 1.0)).mean()
    assert kl(mean, log_variance) == pytest.approx(expected.item(), rel=1e-5)


def test_differences_are_zero_in_a_flat_picture_and_constant_on_a_ramp():
    ramp = torch.arange(5.0).expand(1, 1, 4, 5)
    across, down = differences(ramp)
    assert torch.equal(across, torch.ones(1, 1, 4, 4))
    assert torch.equal(down, torch.zeros(1, 1, 3, 5))


def test_random_pictures_are_in_range_and_decided_by_the_generator(draw):
    one, two = (draw(torch.Generator().manual_seed(3), 5, 8) for _ in range(2))
    assert torch.equal(one, two)
    assert one.shape == (5, 3, 8, 8)
    assert one.min() >= -1 and one.max() <= 1 + 1e-6


def test_side_by_side_shows_each_picture_above_its_reconstruction(draw):
    torch.manual_seed(0)
    x = draw(rng(0, 0), 3, 16)
    image = side_by_side(x, VAE(TINY))
    assert image.size == (48, 32)
    shown = torch.tensor(list(image.crop((16, 0, 32, 16)).tobytes())).reshape(16, 16, 3).permute(2, 0, 1)
    assert (shown / 127.5 - 1 - x[1].clamp(-1, 1)).abs().max() <= 0.5 / 127.5 + 1e-5
