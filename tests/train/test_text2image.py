"""The training of the U-Net and the text encoder: its loss, its data, and that both learn."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from reifusion.model.config import CLIPConfig, ModelConfig, ScheduleConfig, UNetConfig, VAEConfig
from reifusion.train.checkpoint import TrainingError
from reifusion.train.loop import BatchPart, LoopConfig, rng
from reifusion.train.progress import Seen
from reifusion.train.text2image import (
    Latents,
    TextToImage,
    TextToImageTraining,
    add_offset,
    denoising_loss,
    denoising_objective,
    forward_process,
    loss_weights,
    recomputed,
    spread_timesteps,
    train_text2image,
)

TINY = ModelConfig(
    name="tiny",
    size=16,
    clip=CLIPConfig(vocab_size=20, context_length=6, width=16, layers=1, heads=2),
    vae=VAEConfig(channels=(8, 16), layers=1, groups=4, scale_factor=1.0),
    unet=UNetConfig(channels=(16, 32), attention=(1, 1), layers=1, heads=(2, 2), context_width=16, groups=4),
    schedule=ScheduleConfig(prediction_type="v_prediction"),
)
EMPTY = torch.tensor([18, 19, 19, 19, 19, 19])
PREDICTIONS = ("epsilon", "v_prediction", "flow")


def words(*subjects: int) -> torch.Tensor:
    return torch.tensor([[18, subject, 19, 19, 19, 19] for subject in subjects])


def some_data(count: int = 8) -> Latents:
    generator = torch.Generator().manual_seed(5)
    return Latents(torch.randn(count, 4, 8, 8, generator=generator), words(*range(count)))


def awake(seed: int = 0) -> TextToImage:
    """Returns a model without zeros in its weights, so that every weight matters."""
    torch.manual_seed(seed)
    model = TextToImage(TINY)
    for p in model.parameters():
        nn.init.normal_(p, 0.0 if p.ndim > 1 else 0.5, 0.1)
    return model


# Learning


@pytest.mark.slow
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_after_training_the_right_words_explain_a_noisy_picture_better(tmp_path, prediction):
    schedule = ScheduleConfig(prediction_type=prediction)
    unet = replace(TINY.unet, channels=(16,), attention=(1,), heads=(2,))
    data = Latents(torch.stack([torch.ones(4, 4, 4), -torch.ones(4, 4, 4)]), words(3, 7))
    training = TextToImageTraining(loop=LoopConfig(steps=100, lr=5e-3, warmup=10, ema=0.9), batch=16)
    model = train_text2image(data, EMPTY, replace(TINY, unet=unet, schedule=schedule), training, tmp_path)
    latents = data.means.repeat(32, 1, 1, 1)  # (64, 4, 4, 4)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    t = torch.full((64,), 500)

    def error(tokens):
        with torch.no_grad():
            return denoising_loss(
                model, forward_process(schedule), latents, tokens.repeat(32, 1), t, noise, torch.ones(64)
            )[0]

    assert error(data.tokens) < 0.92 * error(data.tokens.flip(0))


def test_every_parameter_of_both_networks_is_trained(tmp_path):
    torch.manual_seed(0)
    before = TextToImage(TINY).state_dict()
    loop = LoopConfig(steps=12, lr=1e-2, warmup=1, ema=0.5, weight_decay=0.0)
    training = TextToImageTraining(loop=loop, batch=4, caption_dropout=0.0)
    after = train_text2image(some_data(4), EMPTY, TINY, training, tmp_path, start_from=before).state_dict()
    assert [name for name in before if torch.equal(before[name], after[name])] == []


def test_text_encoder_that_is_not_trained_stays_bit_for_bit(tmp_path):
    before = awake().state_dict()
    loop = LoopConfig(steps=4, lr=1e-2, warmup=1, ema=0.5)
    training = TextToImageTraining(loop=loop, batch=4, train_text_encoder=False)
    after = train_text2image(some_data(), EMPTY, TINY, training, tmp_path, start_from=before).state_dict()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if name.startswith("clip.")}
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved["ema"].keys() == saved["model"].keys() == before.keys() - same


@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, {"loop": {"muon": True}}])
def test_resumed_run_ends_in_the_same_weights(tmp_path, options):
    def run(folder, **loop):
        more = {**options, "loop": LoopConfig(steps=4, log_every=1, **options.get("loop", {}), **loop)}
        training = TextToImageTraining(batch=4, offset_noise=0.1, **more)
        return train_text2image(some_data(), EMPTY, TINY, training, folder, every_checkpoint=stop)

    def stop(step, average):
        if not stopped and step < 4:
            stopped.append(step)
            raise KeyboardInterrupt
        return Seen()

    stopped = [0]
    whole = run(tmp_path / "whole").state_dict()
    stopped.clear()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", checkpoint_minutes=0.0)
    assert stopped
    resumed = run(tmp_path / "cut").state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


# The loss


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("count", [2, 4])
def test_parts_together_have_the_loss_and_gradient_of_the_whole(prediction, count):
    schedule = ScheduleConfig(prediction_type=prediction)
    training = TextToImageTraining(batch=8, offset_noise=0.2)
    data = replace(some_data(), stds=torch.full((8, 4, 8, 8), 0.1))
    objective = denoising_objective(data, EMPTY, forward_process(schedule), training)
    model = awake()

    def run(parts):
        value = torch.stack([objective(model, 0.3, rng(0, 3), part)[0] for part in parts]).mean()
        return value.item(), torch.autograd.grad(value, list(model.parameters()))

    whole, parts = run([BatchPart()]), run([BatchPart(i, count) for i in range(count)])
    assert whole[0] == pytest.approx(parts[0], rel=1e-5)
    for one, other in zip(whole[1], parts[1], strict=True):
        assert (one - other).norm() <= 1e-4 * one.norm() + 1e-7


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(PREDICTIONS), st.integers(0, 2**32))
def test_a_network_that_knows_the_answer_has_no_loss(prediction, seed):
    sampler = forward_process(ScheduleConfig(prediction_type=prediction))
    generator = torch.Generator().manual_seed(seed)
    latents, noise = torch.randn(2, 4, 4, 8, 8, generator=generator)
    t = spread_timesteps(4, sampler, generator)
    x_seen = []

    def oracle(x_t, tokens, t):
        x_seen.append(x_t)
        return {"epsilon": noise, "flow": noise - latents}.get(
            prediction, sampler.velocity(latents, t, noise)
        )

    value, figures = denoising_loss(oracle, sampler, latents, words(1, 2, 3, 4), t, noise, torch.ones(4))
    assert value == 0 and figures["samples"] == 4
    # And the network was shown pictures with the right amount of noise.
    if prediction == "flow":
        sigma = (t / 1000).reshape(-1, 1, 1, 1)
        expected = (1 - sigma) * latents + sigma * noise
    else:
        kept = sampler.alphas_cumprod.float()[t].reshape(-1, 1, 1, 1)
        expected = kept.sqrt() * latents + (1 - kept).sqrt() * noise
    assert torch.allclose(x_seen[0], expected, atol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_loss_weights_follow_min_snr(prediction):
    sampler = forward_process(ScheduleConfig(prediction_type=prediction))
    t = torch.tensor([1, 300, 999])
    snr = (sampler.alphas_cumprod / (1 - sampler.alphas_cumprod))[t]
    natural = snr + (prediction == "v_prediction")
    expected = torch.minimum(natural, torch.tensor(5.0)) / natural
    assert torch.allclose(loss_weights(sampler, t, 5.0), expected.float())
    assert torch.equal(loss_weights(sampler, t, None), torch.ones(3))


def test_flow_has_no_min_snr_and_zero_terminal_snr_a_finite_one():
    assert torch.equal(
        loss_weights(
            forward_process(ScheduleConfig(prediction_type="flow")), torch.tensor([0.5, 1000.0]), 5.0
        ),
        torch.ones(2),
    )
    schedule = ScheduleConfig(prediction_type="v_prediction", zero_terminal_snr=True)
    assert loss_weights(forward_process(schedule), torch.tensor([999]), 5.0) == 1.0


def test_zero_terminal_snr_shows_the_network_pure_noise_at_the_last_step():
    schedule = ScheduleConfig(prediction_type="v_prediction", zero_terminal_snr=True)
    latents, noise = torch.randn(2, 1, 4, 8, 8)
    seen = []

    def network(x_t, tokens, t):
        seen.append(x_t)
        return x_t

    denoising_loss(
        network, forward_process(schedule), latents, words(1), torch.tensor([999]), noise, torch.ones(1)
    )
    assert torch.equal(seen[0], noise)


def test_timesteps_cover_all_the_range_evenly():
    diffusion, flow = (forward_process(ScheduleConfig(prediction_type=p)) for p in ("epsilon", "flow"))

    def draw(count, sampler=diffusion, power=1.0, seed=0):
        return spread_timesteps(count, sampler, torch.Generator().manual_seed(seed), power)

    assert [int(t) // 100 for t in draw(10)] == list(range(10))
    every = torch.cat([draw(1, seed=seed) for seed in range(300)])
    assert every.min() >= 0 and every.max() <= 999
    assert sorted(draw(1000).tolist())[0] == 0 and draw(1000).max() == 999
    assert abs((draw(1000, power=0.5) < 500).float().mean() - 0.25) < 0.01  # P(√u < ½) = ¼
    t = draw(1000, flow)
    assert t.is_floating_point() and t.min() > 0 and t.max() <= 1000


def test_offset_noise_adds_the_same_to_all_pixels_of_a_channel():
    noise = torch.randn(500, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    offset = add_offset(noise, 0.3, torch.Generator().manual_seed(2)) - noise
    assert torch.allclose(offset, offset[:, :, :1, :1].expand_as(offset), atol=1e-6)
    assert offset[:, :, 0, 0].std() == pytest.approx(0.3, rel=0.05)
    training = TextToImageTraining(batch=8, offset_noise=0.3, caption_dropout=0.0)

    def spread(training):
        """Returns the standard deviation of the pixels' means over many noisy pictures."""
        means = []

        def network(x_t, tokens, t):
            means.append(x_t.mean((2, 3)))  # at t = T, the mean of the noise alone
            return torch.zeros_like(x_t)

        for step in range(40):
            sampler = forward_process(ScheduleConfig(prediction_type="flow"))
            data = Latents(torch.zeros(8, 4, 8, 8), words(*range(8)))
            denoising_objective(data, EMPTY, sampler, replace(training, timestep_power=1e-6))(
                network, 0.5, rng(0, step), BatchPart()
            )
        return torch.cat(means).std().item()

    assert spread(replace(training, offset_noise=0.0)) == pytest.approx(1 / 8, rel=0.1)
    assert spread(training) == pytest.approx((1 / 64 + 0.09) ** 0.5, rel=0.1)


def test_dropped_captions_are_the_empty_one_and_their_share_is_right():
    seen = []
    training = TextToImageTraining(batch=16, caption_dropout=0.25)
    objective = denoising_objective(some_data(), EMPTY, forward_process(TINY.schedule), training)

    def network(x_t, tokens, t):
        seen.append(tokens)
        return x_t

    for step in range(60):
        objective(network, 0.5, rng(0, step), BatchPart())
    dropped = (torch.cat(seen) == EMPTY).all(1)
    assert dropped.float().mean() == pytest.approx(0.25, abs=0.04)
    assert ((torch.cat(seen)[~dropped][:, 1]) < 8).all()


def test_latents_with_a_spread_are_another_sample_each_time():
    means, stds = torch.randn(3, 4, 8, 8), torch.rand(3, 4, 8, 8)
    fixed, sampled = Latents(means, words(1, 2, 3)), Latents(means, words(1, 2, 3), stds)
    latents, tokens = fixed.latent_batch(rng(0, 0), 500)
    which = tokens[:, 1] - 1
    assert torch.equal(latents, means[which])
    latents, tokens = sampled.latent_batch(rng(0, 0), 500)
    deviations = (latents - means[which]) / stds[which]
    assert deviations.mean().abs() < 0.01 and deviations.std() == pytest.approx(1, abs=0.01)
    assert sampled.describe(rng(0, 0), 500) == f"samples {which.tolist()}"


def test_rows_computed_again_give_the_same_gradients_and_keep_less():
    model = awake()
    x, tokens, t = torch.randn(2, 4, 8, 8), words(1, 2), torch.tensor([10, 900])

    def run():
        kept = []

        def keep(x):
            kept.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            y = model(x, tokens, t).pow(2).sum()
        return torch.autograd.grad(y, list(model.parameters())), sum(kept)

    usual, much = run()
    with recomputed(model.diffusion):
        again, little = run()
    after, _ = run()
    assert all(map(torch.equal, usual, again)) and all(map(torch.equal, usual, after))
    assert little < 0.3 * much


def test_nan_names_the_samples_and_the_network(tmp_path):
    data = some_data()
    data.means[3] = float("nan")
    training = TextToImageTraining(loop=LoopConfig(steps=20), batch=4)
    with pytest.raises(
        TrainingError, match=r"loss is nan at step \d+ \(samples \[.*3.*\]\); .*: clip .*, diff"
    ):
        train_text2image(data, EMPTY, TINY, training, tmp_path)


def test_logged_losses_tell_low_noise_from_high(tmp_path):
    loop = LoopConfig(steps=3, log_every=1)
    train_text2image(some_data(), EMPTY, TINY, TextToImageTraining(loop=loop, batch=8), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "training.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and all(row["low_noise"] > 0 and row["high_noise"] > 0 for row in rows)
