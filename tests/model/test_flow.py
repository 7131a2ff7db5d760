"""Rectified flow and zero terminal SNR: the sampler, the pipeline over it, and what files say of them.

What all samplers promise is in test_samplers.py; that they equal diffusers', in parity/test_samplers.py.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from reifusion.api import generate
from reifusion.model.config import CLIPConfig, ModelConfig, ScheduleConfig, UNetConfig, VAEConfig
from reifusion.model.ddpm import DDPMSampler, randn
from reifusion.model.diffusers_folder import config_from_diffusers, config_to_diffusers
from reifusion.model.pictures import to_tensor
from reifusion.model.pipeline import StableDiffusion, Step
from reifusion.model.request import Request
from reifusion.model.samplers import SAMPLERS, FlowSampler, samplers_for
from reifusion.model.tensors import ModelError
from reifusion.model.tokenizer import Tokenizer
from reifusion.weights import info, save
from tests.marks import often
from tests.tiny import Bytes, networks

TINY = ModelConfig(
    name="tiny",
    size=64,
    clip=CLIPConfig(vocab_size=49408, context_length=8, width=8, layers=1, heads=2),
    vae=VAEConfig(channels=(8, 8, 8, 8), layers=1, groups=4),
    unet=UNetConfig(channels=(16, 32), attention=(1, 0), layers=1, heads=(2, 2), context_width=8, groups=8),
    schedule=ScheduleConfig(prediction_type="flow"),
)
ZERO_SNR = ScheduleConfig(prediction_type="v_prediction", zero_terminal_snr=True)


def latents(*seeds: int) -> Tensor:
    return randn((len(seeds), 4, 8, 8), [torch.Generator().manual_seed(seed) for seed in seeds])


# What the network is trained for


@settings(deadline=None)
@given(t=st.floats(0, 1000), seed=st.integers(0, 1000))
def test_noisy_latents_lie_on_the_line_from_picture_to_noise(t: float, seed: int) -> None:
    sampler, x0, eps = FlowSampler(), latents(seed).double(), latents(seed + 1).double()
    x_t = sampler.add_noise(x0, t, eps)
    torch.testing.assert_close(x_t, x0 + t / 1000 * (eps - x0))
    # from any point of it the target leads to both ends
    velocity = sampler.target(x0, t, eps)
    torch.testing.assert_close(x_t - t / 1000 * velocity, x0)
    torch.testing.assert_close(x_t + (1 - t / 1000) * velocity, eps)


def test_the_target_is_the_slope_of_add_noise() -> None:
    sampler, x0, eps = FlowSampler(), latents(1, 2).double(), latents(3, 4).double()
    t = torch.tensor([250.5, 730.25], dtype=torch.float64)  # of each image, and no whole number
    slope = (sampler.add_noise(x0, t + 0.5, eps) - sampler.add_noise(x0, t - 0.5, eps)) * 1000
    torch.testing.assert_close(sampler.target(x0, t, eps), slope)


def test_the_target_is_noise_or_velocity_by_prediction_type() -> None:
    x0, eps, t = latents(1), latents(2), torch.tensor([400])
    assert torch.equal(DDPMSampler(prediction_type="epsilon").target(x0, t, eps), eps)
    velocity = DDPMSampler(prediction_type="v_prediction")
    alpha_bar = velocity.alphas_cumprod[400].float()
    torch.testing.assert_close(
        velocity.target(x0, t, eps), alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x0
    )
    assert torch.equal(FlowSampler().target(x0, t, eps), eps - x0)
    for kind in ("epsilon", "v_prediction"):
        assert DDPMSampler(prediction_type=kind).target(x0.half(), t, eps).dtype == torch.float16
    assert FlowSampler().target(x0.half(), t, eps).dtype == torch.float16


# The way back


@settings(deadline=None)
@given(n=st.integers(1, 1000))
def test_flow_steps_are_even_and_go_from_all_noise_to_no_noise(n: int) -> None:
    sampler = FlowSampler()
    sampler.set_inference_timesteps(n)
    sigmas = np.array(sampler.sigmas)
    np.testing.assert_allclose(sigmas, np.linspace(1, 0, n + 1), atol=1e-12)
    assert sigmas[0] == 1
    assert sigmas[-1] == 0
    np.testing.assert_allclose(sampler.timesteps, 1000 * sigmas[:-1])


def test_a_straight_flow_needs_one_step() -> None:
    sampler, x0, eps = FlowSampler(), latents(1), latents(2)
    sampler.set_inference_timesteps(1)
    torch.testing.assert_close(sampler.step(1000, eps, eps - x0), x0)


def test_twice_the_steps_halve_the_error_on_a_curved_flow() -> None:
    # dx/dσ = x σ has the solution x = C exp(σ² / 2): from σ = 1 to 0, x shrinks by √e.
    errors = []
    for n in (20, 40, 80):
        sampler, x = FlowSampler(), torch.ones(1, 1, dtype=torch.float64)
        sampler.set_inference_timesteps(n)
        for t in sampler.timesteps:
            x = sampler.step(t, x, x * t / 1000)
        errors.append(abs(x.item() - np.exp(-0.5)))
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.05)


def test_a_timestep_that_went_through_float32_is_still_known() -> None:
    sampler, x = FlowSampler(), latents(1)
    sampler.set_inference_timesteps(7)  # sevenths of 1000, which no float holds
    for t in sampler.timesteps:
        assert torch.equal(sampler.step(t.float(), x, x), sampler.step(t, x, x))


# Samplers and what a model was trained for


def test_each_model_has_its_samplers() -> None:
    assert samplers_for("flow")[0] == "flow" and {"flow_dpmpp_2m", "dpm2"} < set(samplers_for("flow"))
    assert not {"ddim", "euler", "lcm", "tcd"} & set(samplers_for("flow"))
    others = [name for name in SAMPLERS if not name.startswith("flow")]
    assert samplers_for("epsilon") == samplers_for("v_prediction") == others
    with pytest.raises(ValueError, match="prediction_type must be 'flow', not 'epsilon'"):
        FlowSampler(prediction_type="epsilon")


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion:
    return StableDiffusion(TINY, Bytes(), networks(TINY))


def draw(pipe: StableDiffusion, **asked: Any) -> np.ndarray:
    settings: dict[str, Any] = {"steps": 4, "seed": 0, "progress": False}
    return np.array(pipe.generate("a cat", **settings | asked)).astype(int)


def steps(pipe: StableDiffusion, **asked: Any) -> list[Step]:
    settings: dict[str, Any] = {"steps": 4, "seed": 0}
    return list(pipe.denoise("a cat", **settings | asked))


def photo() -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((64, 64))


def test_no_sampler_named_means_the_one_that_fits(pipe: StableDiffusion) -> None:
    assert Request("a cat").for_model(TINY).sampler == "flow"
    assert Request("a cat").for_model(ModelConfig()).sampler == "dpmpp_2m_karras"
    assert np.array_equal(draw(pipe), draw(pipe, sampler="flow"))
    seeds_call = generate("a cat", steps=4, seed=0, models=pipe, progress=False)
    assert np.array_equal(np.array(seeds_call), draw(pipe))


def test_a_sampler_that_does_not_fit_is_refused_before_any_work(pipe: StableDiffusion) -> None:
    says = "the sampler ddim does not fit tiny, trained for 'flow'; what fits: flow, "
    idle = replace(pipe, models={})  # nothing to work with
    with pytest.raises(ValueError, match=f"^{says}"):
        draw(idle, sampler="ddim")


def test_a_step_of_flow_is_a_point_between_picture_and_noise(pipe: StableDiffusion) -> None:
    found = steps(pipe, steps=3)
    assert [step.t for step in found] == pytest.approx([1000, 2000 / 3, 1000 / 3])
    for step in found:
        sigma = step.t / 1000
        torch.testing.assert_close((1 - sigma) * step.x0 + sigma * step.eps, step.x_t, atol=1e-5, rtol=1e-5)
        assert step.eps_uncond is not None
        torch.testing.assert_close(
            step.eps, step.eps_uncond + 7.5 * (step.eps_cond - step.eps_uncond), atol=1e-4, rtol=1e-4
        )
    torch.testing.assert_close(found[-1].latents, found[-1].x0)


def test_the_network_is_told_the_fraction(pipe: StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    unet = pipe.models["diffusion"]
    forward = unet.forward

    def spy(x: Tensor, context: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return forward(x, context, t)

    monkeypatch.setattr(unet, "forward", spy)
    steps(pipe, steps=3)
    assert all((t == t[0]).all() for t in seen)  # one time for all of the batch
    torch.testing.assert_close(torch.stack([t[0] for t in seen]), torch.tensor([1000, 2000 / 3, 1000 / 3]))


def test_more_strength_changes_more(pipe: StableDiffusion) -> None:
    original = pipe.encode_image(to_tensor(photo()))
    distances = [
        (steps(pipe, init_image=photo(), strength=s, steps=20)[-1].latents - original).square().mean()
        for s in (0.05, 0.2, 0.5, 0.8, 1.0)
    ]
    assert distances == sorted(distances)


@pytest.mark.parametrize(("strength", "start"), [(0.5, 500), (1.0, 1000), (0.01, 100)])
def test_strength_is_the_share_of_noise_at_the_start(
    pipe: StableDiffusion, strength: float, start: int
) -> None:
    original = pipe.encode_image(to_tensor(photo()))
    noise = latents(0)
    first = steps(pipe, init_image=photo(), strength=strength, steps=10)[0]
    assert first.t == pytest.approx(start)
    torch.testing.assert_close(first.x_t, (1 - start / 1000) * original + start / 1000 * noise)


def test_black_parts_of_the_mask_are_kept_and_white_parts_are_redrawn(pipe: StableDiffusion) -> None:
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    drawn = draw(pipe, init_image=photo(), mask=mask, strength=1)
    original = np.array(photo()).astype(int)
    assert np.array_equal(drawn[:, 32:], original[:, 32:])
    assert np.abs(drawn[:, :32] - original[:, :32]).mean() > 5
    known = pipe.encode_image(to_tensor(photo()))
    found = steps(pipe, init_image=photo(), mask=mask, strength=1)
    noise = latents(0)
    for step in found:  # what is known is as noisy as the rest, at every step
        expected = (1 - step.t / 1000) * known + step.t / 1000 * noise
        torch.testing.assert_close(step.x_t[..., 4:], expected[..., 4:])
    torch.testing.assert_close(found[-1].latents[..., 4:], known[..., 4:])


# Zero terminal SNR


def test_zero_terminal_snr_moves_the_end_to_noise_alone_and_leaves_the_start() -> None:
    before, after = DDPMSampler(), DDPMSampler(prediction_type="v_prediction", zero_terminal_snr=True)
    assert after.alphas_cumprod[-1] == 0
    torch.testing.assert_close(after.alphas_cumprod[0], before.alphas_cumprod[0])
    root, old = after.alphas_cumprod.sqrt(), before.alphas_cumprod.sqrt()
    torch.testing.assert_close(root.diff() / root.diff()[0], old.diff() / old.diff()[0])  # shifted and scaled
    torch.testing.assert_close(after.alphas.cumprod(0), after.alphas_cumprod)
    torch.testing.assert_close(after.betas, 1 - after.alphas)
    x0, eps = latents(1), latents(2)
    assert torch.equal(after.add_noise(x0, 999, eps), eps)
    torch.testing.assert_close(after.target(x0, 999, eps), -x0)  # so the network has to know the picture


@pytest.mark.parametrize("name", samplers_for("v_prediction"))
@pytest.mark.parametrize("n", often([1, 3, 1000], [1, 3]))
def test_every_sampler_begins_in_noise_alone_and_ends_in_the_picture(name: str, n: int) -> None:
    sampler = SAMPLERS[name](torch.Generator().manual_seed(3), **asdict(ZERO_SNR))
    sampler.set_inference_timesteps(n)
    assert sampler.timesteps[0] == 999
    x0, eps = latents(1).double(), latents(2).double()
    x = eps * sampler.init_noise_sigma
    torch.testing.assert_close(sampler.scale_model_input(x, 999), eps, atol=1e-7, rtol=1e-7)
    for t in sampler.timesteps:
        seen = sampler.scale_model_input(x, t)
        signal, sigma = sampler._signal_and_noise(t, seen)
        x = sampler.step(t, x, signal * (seen - signal * x0) / sigma - sigma * x0)
    # What is left: see test_a_network_that_knows_the_picture_leads_to_it.
    assert (x - x0).std() < {"ddim": 0.035, "tcd": 0.035, "pndm": 0.3, "lcm": 0.06}.get(name, 1e-3)


@pytest.mark.parametrize("kind", [DDPMSampler, FlowSampler])
def test_zero_terminal_snr_is_for_velocities_alone(kind: type) -> None:
    with pytest.raises(ValueError, match="zero_terminal_snr is for prediction_type 'v_prediction'"):
        kind(zero_terminal_snr=True)


def test_trailing_begins_at_the_last_timestep() -> None:
    sampler = SAMPLERS["euler"](timestep_spacing="trailing")
    sampler.set_inference_timesteps(4)
    assert sampler.timesteps.tolist() == [999, 749, 499, 249]
    with pytest.raises(ValueError, match="timestep_spacing must be 'trailing' or None, not 'linspace'"):
        DDPMSampler(timestep_spacing="linspace")


def test_a_model_with_zero_terminal_snr_draws_with_every_sampler(pipe: StableDiffusion) -> None:
    pipe = replace(pipe, config=replace(TINY, schedule=ZERO_SNR))
    for name in samplers_for("v_prediction"):
        found = steps(pipe, sampler=name, steps=2, guidance_rescale=0.7)
        assert found[0].t == 999
        assert found[-1].latents.isfinite().all()


# Files

SCHEDULES = [
    TINY.schedule,
    ZERO_SNR,
    ScheduleConfig(timestep_spacing="trailing"),
    ScheduleConfig(beta_schedule="squaredcos_cap_v2"),
    ScheduleConfig(num_training_steps=3, trained_betas=(0.1, 0.2, 0.2)),
    ScheduleConfig(num_training_steps=2, trained_betas=(0.1, 0.1)),
]


@pytest.mark.parametrize("format", ["native", "compvis", "diffusers"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_schedule_is_read_as_it_was_written(tmp_path: Any, format: str, schedule: ScheduleConfig) -> None:
    config = replace(TINY, schedule=schedule)
    path = tmp_path / ("model" if format == "diffusers" else "model.safetensors")
    save(config, networks(config), path, format, Tokenizer(context_length=8))
    assert info(path).config.schedule == schedule


@pytest.mark.parametrize(
    ("schedule", "name", "says"),
    [
        (TINY.schedule, "FlowMatchEulerDiscreteScheduler", {"shift": 1.0, "num_train_timesteps": 1000}),
        (ZERO_SNR, "DDIMScheduler", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}),
        (ScheduleConfig(), "PNDMScheduler", {"rescale_betas_zero_snr": False}),
    ],
)
def test_diffusers_opens_the_schedule_that_is_written(
    tmp_path: Any, schedule: ScheduleConfig, name: str, says: dict[str, Any]
) -> None:
    diffusers = pytest.importorskip("diffusers")
    config = replace(TINY, schedule=schedule)
    save(config, networks(config), tmp_path / "model", "diffusers", Tokenizer(context_length=8))
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", name]
    theirs = getattr(diffusers, name).from_pretrained(tmp_path / "model", subfolder="scheduler")
    assert {key: theirs.config[key] for key in says} == says
    # and what it writes is read back, with all that it adds
    theirs.save_pretrained(tmp_path / "model" / "scheduler")
    read = info(tmp_path / "model").config.schedule
    assert (read.prediction_type, read.zero_terminal_snr) == (
        schedule.prediction_type,
        schedule.zero_terminal_snr,
    )
    if name != "FlowMatchEulerDiscreteScheduler":
        sampler = SAMPLERS["ddim"](**asdict(read))
        torch.testing.assert_close(
            sampler.alphas_cumprod.float(), theirs.alphas_cumprod, atol=1e-6, rtol=1e-4
        )


@pytest.mark.parametrize(
    ("key", "value"),
    [("shift", 3.0), ("use_dynamic_shifting", True), ("invert_sigmas", True), ("shift_terminal", 0.1)],
)
def test_a_flow_that_is_bent_is_refused(key: str, value: Any) -> None:
    jsons = config_to_diffusers(TINY)
    jsons["scheduler"][key] = value
    with pytest.raises(ModelError, match=f"its scheduler has {key} = .*, which is not built in"):
        config_from_diffusers(jsons)
