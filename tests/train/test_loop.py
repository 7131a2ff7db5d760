"""The training loop's promises, on models small enough to train in a second."""

import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from torch import nn

from reifusion.model.config import CLIPConfig, ModelConfig, ScheduleConfig, UNetConfig, VAEConfig
from reifusion.model.ddpm import DDPMSampler
from reifusion.train.loop import LoopConfig, TrainingError, learning_rate, train
from reifusion.train.text2image import (
    TextToImage,
    TextToImageTraining,
    loss_weights,
    spread_timesteps,
    train_text2image,
)
from reifusion.train.vae import VAE, VAETraining, gradients, kl, normalise_latents, random_pictures, train_vae

TINY = ModelConfig(
    name="tiny",
    size=16,
    clip=CLIPConfig(vocab_size=20, context_length=6, width=16, layers=1, heads=2),
    vae=VAEConfig(channels=(8, 16), layers=1, groups=4, scale_factor=1.0),
    unet=UNetConfig(channels=(16, 32), attention=(True, True), layers=1, heads=2, context_width=16, groups=4),
    schedule=ScheduleConfig(prediction_type="v_prediction"),
)


@pytest.fixture
def sprites() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (6, 4, 4, 4), generator=generator, dtype=torch.uint8)
    return pictures.repeat_interleave(4, 2).repeat_interleave(4, 3)  # (6, 4, 16, 16), blocky


def test_killed_and_resumed_run_ends_in_the_same_weights(tmp_path):
    def run(folder, die_at=None):
        torch.manual_seed(1)
        model = nn.Linear(3, 2)

        def loss(step, generator):
            if step == die_at:
                raise KeyboardInterrupt
            x = torch.randn(8, 3, generator=generator)
            return (model(x) - x[:, :2]).pow(2).mean(), {}

        return train(model, loss, LoopConfig(steps=9, checkpoint_minutes=0.0), folder)

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", die_at=5)
    resumed = run(tmp_path / "cut")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_being_asked_to_stop_finishes_the_step_and_saves_it(tmp_path, number):
    model = nn.Linear(2, 1)

    def loss(step, generator):
        if step == 4:
            os.kill(os.getpid(), number)
        return model(torch.ones(1, 2)).sum(), {}

    handler = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        train(model, loss, LoopConfig(steps=9), tmp_path)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 5
    assert signal.getsignal(number) == handler


def test_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    model = nn.Linear(2, 1)

    def loss(step, generator):
        value = model(torch.ones(1, 2)).sum()
        return value * (float("nan") if step == 3 else 1.0), {}

    with pytest.raises(TrainingError, match="step 3"):
        train(model, loss, LoopConfig(steps=9, checkpoint_minutes=0.0), tmp_path)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 3
    assert not list(tmp_path.glob(".checkpoint*"))


def test_learning_rate_rises_stays_and_falls():
    config = LoopConfig(steps=1000, lr=1.0, warmup=100, decay=0.2)
    assert learning_rate(0, config) == pytest.approx(0.01)
    assert learning_rate(99, config) == learning_rate(500, config) == learning_rate(799, config) == 1.0
    assert learning_rate(900, config) == pytest.approx(0.5)
    assert 0 < learning_rate(999, config) < 0.01


def test_vae_learns_and_its_latents_have_unit_variance(sprites, tmp_path):
    training = VAETraining(loop=LoopConfig(steps=120, lr=3e-3, warmup=10), batch=8, crop=16)
    vae = train_vae(sprites, TINY.vae, training, tmp_path)
    log = [json.loads(line) for line in (tmp_path / "training.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]
    # The same pictures that `normalise_latents` measured, so this is exact but for rounding.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        z = torch.cat(
            [vae.encoder.moments(random_pictures(sprites, 32, 16, generator))[0] for _ in range(16)]
        )
    assert z.mean((0, 2, 3)).abs().max() < 1e-3
    assert (z.std((0, 2, 3)) - 1).abs().max() < 1e-3


def test_normalising_latents_leaves_the_round_trip_as_it_was(sprites):
    torch.manual_seed(0)
    vae = VAE(TINY.vae)
    x = random_pictures(sprites, 4, 16, torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = vae.decoder(vae.encoder.moments(x)[0])
        normalise_latents(vae, sprites)
        after = vae.decoder(vae.encoder.moments(x)[0])
    assert (before - after).abs().max() < 1e-4 * before.abs().max()


def test_kl_is_that_of_two_normal_distributions():
    mean, log_variance = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    there = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    expected = torch.distributions.kl_divergence(there, torch.distributions.Normal(0.0, 1.0)).mean()
    assert kl(mean, log_variance) == pytest.approx(expected.item(), rel=1e-5)


def test_gradients_of_a_flat_picture_are_zero_and_of_a_ramp_constant():
    ramp = torch.arange(5.0).expand(1, 1, 4, 5)
    across, down = gradients(ramp)
    assert torch.equal(across, torch.ones(1, 1, 4, 4))
    assert torch.equal(down, torch.zeros(1, 1, 3, 5))


def test_random_pictures_are_in_range_and_decided_by_the_generator(sprites):
    one, two = (random_pictures(sprites, 5, 8, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two)
    assert one.shape == (5, 3, 8, 8)
    assert one.min() >= -1 and one.max() <= 1 + 1e-6


def test_timesteps_cover_all_the_range_evenly():
    t = spread_timesteps(10, 1000, torch.Generator().manual_seed(0))
    assert [int(x) // 100 for x in t] == list(range(10))
    assert spread_timesteps(1, 1000, torch.Generator().manual_seed(0)).max() < 1000
    noisy = spread_timesteps(1000, 1000, torch.Generator().manual_seed(0), power=0.5)
    assert abs((noisy < 500).float().mean() - 0.25) < 0.01  # P(√u < ½) = ¼


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_loss_weights_follow_min_snr(prediction):
    sampler = DDPMSampler(prediction_type=prediction)
    t = torch.tensor([1, 300, 999])
    snr = (sampler.alphas_cumprod / (1 - sampler.alphas_cumprod))[t]
    natural = snr + (prediction == "v_prediction")
    expected = torch.minimum(natural, torch.tensor(5.0)) / natural
    assert torch.allclose(loss_weights(sampler, t, 5.0), expected.float())
    assert torch.equal(loss_weights(sampler, t, None), torch.ones(3))


def test_text_decides_what_the_trained_model_predicts(tmp_path):
    """Two words, two latents: after training the word alone tells them apart at the noisiest timestep."""
    latents = torch.stack([torch.ones(4, 8, 8), -torch.ones(4, 8, 8)])
    tokens = torch.tensor([[18, 3, 19, 19, 19, 19], [18, 7, 19, 19, 19, 19]])
    empty = torch.tensor([18, 19, 19, 19, 19, 19])
    training = TextToImageTraining(loop=LoopConfig(steps=250, lr=2e-3, warmup=20, ema=0.9), batch=16)
    model = train_text2image(latents, tokens, empty, TINY, training, tmp_path).eval()
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([999, 999])
    with torch.no_grad():
        x0, _ = DDPMSampler(prediction_type="v_prediction").predict(
            999, noise, model.diffusion(noise, model.clip(tokens), t)
        )
    assert x0[0].mean() > 0.5 and x0[1].mean() < -0.5


def test_every_parameter_of_both_networks_is_trained(tmp_path):
    torch.manual_seed(0)
    before = TextToImage(TINY).state_dict()
    latents, tokens = torch.randn(4, 4, 8, 8), torch.randint(0, 18, (4, 6))
    training = TextToImageTraining(
        loop=LoopConfig(steps=12, lr=1e-2, warmup=1, ema=0.5, weight_decay=0.0), batch=4
    )
    training = replace(training, caption_dropout=0.0)
    after = train_text2image(
        latents, tokens, tokens[0], TINY, training, tmp_path, start_from=before
    ).state_dict()
    frozen = [name for name in before if torch.equal(before[name], after[name])]
    assert frozen == []
