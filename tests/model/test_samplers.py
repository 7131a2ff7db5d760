"""What every sampler promises. That they are right as well is in tests/parity/test_samplers.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reifusion.model.ddpm import DDPMSampler, Sampler, randn
from reifusion.model.samplers import SAMPLERS
from reifusion.model.spacing import SCHEDULES

NAMES = [  # the others have tests/sampling
    name for name, kind in SAMPLERS.items() if not kind.__module__.startswith("reifusion.sampling")
]
FLOW = [name for name in NAMES if SAMPLERS[name].prediction_types == ("flow",)]
every_sampler = pytest.mark.parametrize("name", NAMES)
every_prediction = pytest.mark.parametrize(
    ("name", "prediction_type"), [(name, kind) for name in NAMES for kind in SAMPLERS[name].prediction_types]
)


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def noise_like_latents(*seeds: int) -> Tensor:
    return randn((len(seeds), 4, 8, 8), seeded(*seeds))


def network(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(x.float() * (0.5 + float(t) / 1000)).to(x.dtype)


def sample(sampler: Sampler, x: Tensor) -> Tensor:
    for t in sampler.timesteps:
        x = sampler.step(t, x, network(sampler.scale_model_input(x, t), t))
    return x


# The schedule


def test_schedule_is_stable_diffusions() -> None:
    sampler = DDPMSampler()
    assert sampler.betas[0].item() == pytest.approx(0.00085)
    assert sampler.betas[-1].item() == pytest.approx(0.0120)
    assert sampler.alphas_cumprod[-1].item() == pytest.approx(0.004660, abs=1e-6)
    middle = ((math.sqrt(0.00085) + math.sqrt(0.0120)) / 2) ** 2  # linear in √β
    assert DDPMSampler(num_training_steps=3).betas[1].item() == pytest.approx(middle)
    linear = DDPMSampler(num_training_steps=3, beta_schedule="linear")
    assert linear.betas.tolist() == pytest.approx([0.00085, (0.00085 + 0.0120) / 2, 0.0120])


def test_schedule_is_float64_and_consistent() -> None:
    sampler = DDPMSampler()
    for table in (sampler.betas, sampler.alphas, sampler.alphas_cumprod):
        assert table.dtype == torch.float64
        assert table.shape == (1000,)
    torch.testing.assert_close(sampler.alphas, 1 - sampler.betas, rtol=0, atol=0)
    torch.testing.assert_close(sampler.alphas_cumprod[10], sampler.alphas[:11].prod())


@pytest.mark.parametrize("fields", [{"beta_schedule": "squaredcos_cap_v2"}, {"trained_betas": "linear"}])
def test_other_schedules_are_diffusers(fields: dict[str, Any]) -> None:
    diffusers = pytest.importorskip("diffusers")
    if "trained_betas" in fields:  # βs that fall
        fields = {"trained_betas": tuple(torch.linspace(0.02, 0.001, 1000, dtype=torch.float64).tolist())}
    sampler, theirs = DDPMSampler(**fields), diffusers.DDIMScheduler(**fields)
    torch.testing.assert_close(sampler.betas.float(), theirs.betas, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(sampler.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=1e-3, atol=1e-6)


def test_betas_that_cannot_be_are_refused() -> None:
    for betas in ((0.1, 0.2), (0.1, 0.2, 1.0), (0.0, 0.1, 0.2)):
        with pytest.raises(ValueError, match="trained_betas must be 3 numbers between 0 and 1"):
            DDPMSampler(num_training_steps=3, trained_betas=betas)


def test_unknown_names_are_refused_in_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"beta_schedule must be 'scaled_linear', .* not 'cosine'"):
        DDPMSampler(beta_schedule="cosine")
    with pytest.raises(ValueError, match="prediction_type must be 'epsilon' or 'v_prediction', not 'x0'"):
        DDPMSampler(prediction_type="x0")


# Noise


def test_noise_of_an_image_depends_on_its_own_seed_alone() -> None:
    together = noise_like_latents(1, 2, 3)
    torch.testing.assert_close(together[2:], noise_like_latents(3), rtol=0, atol=0)
    assert together.dtype == torch.float32
    assert together.device.type == "cpu"


@pytest.mark.parametrize("name", ["ddpm", "euler_a"])
def test_each_step_draws_noise_of_its_own(name: str) -> None:
    sampler, x = SAMPLERS[name](seeded(1)), noise_like_latents(2)
    steps = torch.stack([sampler._noise(x).flatten() for _ in range(2)])
    assert torch.corrcoef(steps)[0, 1].abs() < 0.2


def test_a_single_generator_serves_the_images_in_turn() -> None:
    generator = torch.Generator().manual_seed(5)
    one_by_one = torch.stack([torch.randn(4, 7, 5, generator=generator) for _ in range(3)])
    noise = randn((3, 4, 7, 5), torch.Generator().manual_seed(5))
    torch.testing.assert_close(noise, one_by_one, rtol=0, atol=0)


def test_noise_without_a_generator_is_torchs_own() -> None:
    torch.manual_seed(3)
    first = randn((2, 4, 8, 8))
    torch.manual_seed(3)
    torch.testing.assert_close(first, randn((2, 4, 8, 8)), rtol=0, atol=0)


def test_noise_is_float32_whatever_the_default_dtype() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        noise = noise_like_latents(1)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(noise, noise_like_latents(1), rtol=0, atol=0)


def test_as_many_generators_as_images() -> None:
    with pytest.raises(ValueError, match="3 images need 3 generators, one for each, not 2"):
        randn((3, 4, 8, 8), seeded(1, 2))


@every_prediction
def test_same_seed_gives_same_picture_in_any_batch_position(name: str, prediction_type: str) -> None:
    batch = SAMPLERS[name](seeded(11, 12, 13), prediction_type=prediction_type)
    alone = SAMPLERS[name](seeded(13), prediction_type=prediction_type)
    for sampler in (batch, alone):
        sampler.set_inference_timesteps(6)
    together = sample(batch, noise_like_latents(1, 2, 3) * batch.init_noise_sigma)
    torch.testing.assert_close(
        together[2:], sample(alone, noise_like_latents(3) * alone.init_noise_sigma), rtol=1e-5, atol=1e-5
    )


# add_noise, Eq. 4


@pytest.mark.parametrize("t", [0, 500, 999])
def test_add_noise_is_the_formula(t: int) -> None:
    sampler, x0, eps = DDPMSampler(), noise_like_latents(1, 2), noise_like_latents(3, 4)
    alpha_bar = math.prod(sampler.alphas[: t + 1].tolist())
    expected = math.sqrt(alpha_bar) * x0 + math.sqrt(1 - alpha_bar) * eps
    torch.testing.assert_close(sampler.add_noise(x0, t, eps), expected)


@pytest.mark.parametrize("t", [0, 500, 999])
def test_add_noise_has_the_mean_and_variance_of_the_forward_process(t: int) -> None:
    sampler = DDPMSampler(torch.Generator().manual_seed(0))
    x = sampler.add_noise(torch.full((1, 1, 400, 400), 3.0), t)
    alpha_bar = sampler.alphas_cumprod[t].item()
    assert x.mean().item() == pytest.approx(3 * math.sqrt(alpha_bar), abs=0.01)
    assert x.var().item() == pytest.approx(1 - alpha_bar, rel=0.02, abs=1e-6)


def test_forward_process_one_step_at_a_time_is_the_closed_form() -> None:
    # Eq. 2, Ho et al. 2020, step by step: xₜ = √(1 - βₜ) xₜ₋₁ + √βₜ ε. The variances add up to 1 - ᾱ.
    sampler, mean, variance = DDPMSampler(), 1.0, 0.0
    for beta in sampler.betas.tolist():
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
    assert mean**2 == pytest.approx(sampler.alphas_cumprod[-1].item())
    assert variance == pytest.approx(1 - sampler.alphas_cumprod[-1].item())


@every_sampler
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.uint8])
def test_add_noise_takes_a_timestep_per_image_of_any_dtype(name: str, dtype: torch.dtype) -> None:
    sampler, x0, eps = SAMPLERS[name](), noise_like_latents(1, 2, 3), noise_like_latents(4, 5, 6)
    t = torch.tensor([1, 250, 77]).to(dtype)
    together = sampler.add_noise(x0, t, eps)
    for k in range(3):
        alone = sampler.add_noise(x0[k : k + 1], int(t[k]), eps[k : k + 1])
        torch.testing.assert_close(together[k : k + 1], alone)


@every_sampler
def test_add_noise_draws_with_the_samplers_generators(name: str) -> None:
    x0 = noise_like_latents(1, 2)
    noisy = SAMPLERS[name](seeded(7, 8)).add_noise(x0, 300)
    torch.testing.assert_close(noisy, SAMPLERS[name]().add_noise(x0, 300, noise_like_latents(7, 8)))


def test_add_noise_keeps_half_precision_exact_until_the_end() -> None:
    sampler, x0, eps = DDPMSampler(), noise_like_latents(1), noise_like_latents(2)
    for dtype in (torch.bfloat16, torch.float16):
        half = sampler.add_noise(x0.to(dtype), 3, eps)
        assert half.dtype == dtype
        torch.testing.assert_close(
            half, sampler.add_noise(x0.to(dtype).float(), 3, eps).to(dtype), rtol=0, atol=0
        )


def test_add_noise_passes_gradients_to_x0() -> None:
    x0 = noise_like_latents(1).requires_grad_()
    DDPMSampler().add_noise(x0, torch.tensor([10]), noise_like_latents(2)).sum().backward()
    assert x0.grad is not None
    assert x0.grad.unique().item() == pytest.approx(DDPMSampler().alphas_cumprod[10].sqrt().item())


# Timesteps


@every_sampler
def test_any_number_of_steps_gives_decreasing_timesteps_in_range(name: str) -> None:
    sampler = SAMPLERS[name]()
    for n in range(1, 1001):
        sampler.set_inference_timesteps(n)
        timesteps = sampler.timesteps
        assert timesteps.dtype == (torch.float64 if name in FLOW else torch.int64)
        assert 0 <= timesteps.min() <= timesteps.max() <= (1000 if name in FLOW else 999)
        if name == "dpmpp_2m_karras":  # rounded, so some come twice; what decreases is σ
            assert (timesteps.diff() <= 0).all()
            assert (torch.as_tensor(vars(sampler)["sigmas"]).diff() < 0).all()
            assert len(timesteps) == n
        else:
            steps = timesteps.unique_consecutive()
            assert (steps.diff() < 0).all()
            assert len(steps) == n
        assert len(timesteps) == {"heun": 2 * n - 1, "pndm": n + (n > 1)}.get(name, n)


def test_leading_timesteps_have_stable_diffusions_offset() -> None:
    sampler = DDPMSampler()
    sampler.set_inference_timesteps(50)
    assert sampler.timesteps[:3].tolist() == [981, 961, 941]
    assert sampler.timesteps[-3:].tolist() == [41, 21, 1]


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("dpmpp_2m_karras", *FLOW)])
def test_a_thousand_steps_are_all_timesteps(name: str) -> None:
    sampler = SAMPLERS[name]()
    sampler.set_inference_timesteps(1000)
    assert sampler.timesteps.unique_consecutive().tolist() == list(range(999, -1, -1))


@every_sampler
@pytest.mark.parametrize("n", [0, -1, 1001])
def test_impossible_numbers_of_steps_are_refused(name: str, n: int) -> None:
    with pytest.raises(ValueError, match=f"the number of steps must be between 1 and 1000, not {n}"):
        SAMPLERS[name]().set_inference_timesteps(n)


def test_schedules_that_do_not_exist_or_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="there is no schedule 'nope'; there are "):
        SAMPLERS["euler"]().set_inference_timesteps(10, "nope")
    with pytest.raises(ValueError, match="dpmpp_2m_karras has a schedule of its own"):
        SAMPLERS["dpmpp_2m_karras"]().set_inference_timesteps(10, "karras")


@pytest.mark.parametrize("name", ["ddim", "pndm"])
@pytest.mark.parametrize("n", [2, 6, 25])
def test_every_step_moves_on_every_schedule(name: str, n: int) -> None:
    for schedule in SCHEDULES:
        sampler, x = SAMPLERS[name](seeded(1)), noise_like_latents(2)
        sampler.set_inference_timesteps(n, schedule)
        for t in sampler.timesteps:
            before, x = x, sampler.step(t, x, network(x, t))
            assert (x - before).abs().max() > 1e-4, (schedule, t)


@pytest.mark.parametrize("t", [-1, 1000])
def test_timesteps_that_do_not_exist_are_refused(t: int) -> None:
    with pytest.raises(ValueError, match=f"timestep {t} is not between 0 and 999"):
        DDPMSampler(seeded(1)).add_noise(noise_like_latents(1), t)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("heun", "pndm", "lcm", "tcd")])
def test_latents_that_the_caller_changes_count(name: str) -> None:
    """Samplers that remember steps before go on from where x is now."""
    fields: dict[str, Any] = {"prediction_type": "flow"} if name in FLOW else {}
    one, other = (SAMPLERS[name](seeded(1), **fields) for _ in range(2))
    x = noise_like_latents(2) * one.init_noise_sigma
    for sampler in one, other:
        sampler.set_inference_timesteps(12)
    same = x
    for i, t in enumerate(one.timesteps):
        moved = one.step(t, x + 0.5 * (i == 5), network(noise_like_latents(i), t))
        same = other.step(t, same, network(noise_like_latents(i), t))
        if i >= 5:
            assert (moved - same).mean() > 0.3, i
        x = moved


@every_sampler
@pytest.mark.parametrize("num_training_steps", [2, 10, 75, 1234])
def test_works_for_any_number_of_training_steps(name: str, num_training_steps: int) -> None:
    sampler = SAMPLERS[name](seeded(1), num_training_steps)
    for n in (1, 2, num_training_steps // 2, num_training_steps - 1, num_training_steps):
        sampler.set_inference_timesteps(n)
        last = num_training_steps - (name not in FLOW)
        assert 0 <= sampler.timesteps.min() <= sampler.timesteps.max() <= last
        assert sample(sampler, noise_like_latents(2)).isfinite().all()


@every_sampler
def test_a_timestep_that_is_not_in_the_schedule_is_refused(name: str) -> None:
    sampler, x = SAMPLERS[name](seeded(1)), noise_like_latents(1)
    sampler.set_inference_timesteps(10)
    with pytest.raises(ValueError, match="timestep 998 is not one of this sampler's"):
        sampler.step(998, x, x)


# Strength


@every_sampler
@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 1000), strength=st.floats(0, 1, exclude_min=True))
def test_any_strength_keeps_the_end_of_the_schedule_and_never_nothing(
    name: str, n: int, strength: float
) -> None:
    sampler = SAMPLERS[name]()
    sampler.set_inference_timesteps(n)
    every = sampler.timesteps
    sampler.set_strength(strength)
    kept, keep = sampler.timesteps, max(1, int(n * strength))
    if name in FLOW:
        keep = n - min(int(n - n * strength), n - 1)
    assert len(kept) == {"heun": 2 * keep - 1, "pndm": keep + (keep > 1)}.get(name, keep)
    if name in ("heun", "pndm"):  # which visit some twice
        kept, every = kept.unique_consecutive(), every.unique_consecutive()
    assert kept.tolist() == every[-keep:].tolist()
    assert len(getattr(sampler, "sigmas", range(keep + 1))) == keep + 1


@every_sampler
@pytest.mark.parametrize("n", [1, 20, 999, 1000])
def test_the_smallest_strength_still_does_something(name: str, n: int) -> None:
    if name == "lcm" and n > 500:
        pytest.skip("its last timestep is then 0, where a consistency model is the identity by definition")
    sampler = SAMPLERS[name](seeded(1))
    sampler.set_inference_timesteps(n)
    sampler.set_strength(1e-9)
    x = sampler.add_noise(noise_like_latents(2), sampler.timesteps[0])
    assert not torch.equal(sample(sampler, x), x)


@every_sampler
@pytest.mark.parametrize("strength", [0, -0.1, 1.01, float("nan"), float("inf")])
def test_impossible_strengths_are_refused(name: str, strength: float) -> None:
    sampler = SAMPLERS[name]()
    with pytest.raises(ValueError, match="strength must be above 0 and at most 1, not"):
        sampler.set_strength(strength)


@every_sampler
def test_strength_counts_from_all_steps_however_often_it_is_set(name: str) -> None:
    sampler = SAMPLERS[name]()
    sampler.set_inference_timesteps(20)
    every = sampler.timesteps
    sampler.set_strength(0.5)
    half = sampler.timesteps
    sampler.set_strength(0.5)
    assert sampler.timesteps.tolist() == half.tolist()
    sampler.set_strength(1)
    assert sampler.timesteps.tolist() == every.tolist()
    sampler.set_strength(0.5)
    sampler.set_inference_timesteps(20)
    assert sampler.timesteps.tolist() == every.tolist()


# Predictions


@every_prediction
def test_predict_takes_noisy_latents_apart_again(name: str, prediction_type: str) -> None:
    sampler = SAMPLERS[name](prediction_type=prediction_type)
    sampler.set_inference_timesteps(9)
    x0, eps = noise_like_latents(1, 2).double(), noise_like_latents(3, 4).double()
    for t in sampler.timesteps.unique():
        output = sampler.target(x0, t, eps)
        if name == "dpmpp_2m_karras" and prediction_type == "v_prediction":
            signal, sigma = sampler._signal_and_noise(t, x0)  # of the schedule's σ, where velocity is also
            output = signal * eps - sigma * x0
        found_x0, found_eps = sampler.predict(t, sampler.add_noise(x0, t, eps), output)
        torch.testing.assert_close(found_x0, x0, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found_eps, eps, rtol=1e-9, atol=1e-9)


def test_predict_takes_a_timestep_per_image() -> None:
    sampler, x0, eps = DDPMSampler(), noise_like_latents(1, 2), noise_like_latents(3, 4)
    t = torch.tensor([3, 700])
    found_x0, _ = sampler.predict(t, sampler.add_noise(x0, t, eps), eps)
    torch.testing.assert_close(found_x0, x0, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in FLOW])
def test_the_network_always_sees_latents_of_variance_one(name: str) -> None:
    sampler = SAMPLERS[name](seeded(0))
    sampler.set_inference_timesteps(10)
    unit = randn((1, 4, 64, 64), seeded(1))  # stands in for latents, which have unit variance too
    start = randn((1, 4, 64, 64), seeded(2)) * sampler.init_noise_sigma
    assert sampler.scale_model_input(start, sampler.timesteps[0]).std().item() == pytest.approx(1, abs=0.02)
    for t in sampler.timesteps:
        seen = sampler.scale_model_input(sampler.add_noise(unit, t), t)
        assert seen.std().item() == pytest.approx(1, abs=0.03)


@every_prediction
@pytest.mark.parametrize(
    ("n", "strength"), [(1, 1.0), (2, 1.0), (13, 1.0), (13, 0.5), (13, 0.1), (1000, 1.0)]
)
def test_a_network_that_knows_the_picture_leads_to_it(
    name: str, prediction_type: str, n: int, strength: float
) -> None:
    sampler, x0 = SAMPLERS[name](seeded(5), prediction_type=prediction_type), noise_like_latents(1).double()
    sampler.set_inference_timesteps(n)
    sampler.set_strength(strength)
    x = sampler.add_noise(x0, sampler.timesteps[0], noise_like_latents(2))
    for t in sampler.timesteps:
        seen = sampler.scale_model_input(x, t)
        signal, sigma = sampler._signal_and_noise(t, seen)
        eps = (seen - signal * x0) / sigma
        velocity = eps - x0 if prediction_type == "flow" else signal * eps - sigma * x0
        x = sampler.step(t, x, eps if prediction_type == "epsilon" else velocity)
    # DDIM and PNDM end with the noise of timestep 0, √(1 - ᾱ₀) = 0.03, and LCM with a hundredth of its input.
    leftover = {"ddim": 0.03, "pndm": 0.03, "lcm": 0.05}.get(name, 1e-9)
    if (name, prediction_type, n) == ("pndm", "v_prediction", 2):  # takes the mean of two distant velocities
        leftover = 0.25
    assert (x - x0).std().item() <= leftover * 1.1


# Steps


@every_sampler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_latents_are_rounded_only_at_the_end_of_a_step(name: str, dtype: torch.dtype) -> None:
    half, full = SAMPLERS[name](seeded(1)), SAMPLERS[name](seeded(1))
    x = noise_like_latents(2).to(dtype)
    for sampler in (half, full):
        sampler.set_inference_timesteps(1)  # every step is then a first one, so no earlier rounding can show
    t = half.timesteps[0]
    output = network(x, t)
    result = half.step(t, x, output)
    assert result.dtype == dtype
    torch.testing.assert_close(result, full.step(t, x.float(), output.float()).to(dtype), rtol=0, atol=0)
    assert all(prediction.dtype == dtype for prediction in half.predict(t, x, output))
    assert half.scale_model_input(x, t).dtype == dtype


@every_sampler
def test_a_loop_in_bfloat16_stays_close_to_one_in_float32(name: str) -> None:
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        sampler = SAMPLERS[name](seeded(1), prediction_type=SAMPLERS[name].prediction_types[-1])
        sampler.set_inference_timesteps(20)
        results.append(sample(sampler, (noise_like_latents(2) * sampler.init_noise_sigma).to(dtype)).float())
    assert (results[0] - results[1]).abs().max() < 0.1


@every_sampler
def test_steps_leave_their_arguments_alone(name: str) -> None:
    sampler = SAMPLERS[name](seeded(1))
    sampler.set_inference_timesteps(5)
    x, output = noise_like_latents(2), noise_like_latents(3)
    before = x.clone(), output.clone()
    for t in sampler.timesteps:
        sampler.scale_model_input(x, t)
        sampler.add_noise(x, t)
        sampler.predict(t, x, output)
        sampler.step(t, x, output)
    assert torch.equal(x, before[0])
    assert torch.equal(output, before[1])


@every_sampler
@pytest.mark.parametrize("reset", ["set_inference_timesteps", "set_strength"])
def test_starting_over_forgets_an_unfinished_loop(name: str, reset: str) -> None:
    sampler, x = SAMPLERS[name](), noise_like_latents(1)
    results = []
    for abandoned in (False, True):
        sampler.generator = seeded(1)
        sampler.set_inference_timesteps(8)
        if abandoned:
            for t in sampler.timesteps[:4]:
                sampler.step(t, x + 1, x - 1)
            sampler.generator = seeded(1)
        getattr(sampler, reset)({"set_inference_timesteps": 8, "set_strength": 1.0}[reset])
        results.append(sample(sampler, x))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


@every_sampler
def test_timesteps_may_be_ints_or_tensors(name: str) -> None:
    x = noise_like_latents(1)
    results = []
    for convert in (int, torch.Tensor.float, lambda t: t.reshape(1)):
        sampler = SAMPLERS[name](seeded(1))
        sampler.set_inference_timesteps(4)  # which are whole numbers for flow too
        y = x
        for t in map(convert, sampler.timesteps):
            y = sampler.step(t, y, network(sampler.scale_model_input(y, t), torch.tensor(float(t))))
        results.append(y)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("n", [1000, 50])
def test_ddpm_step_is_the_formula_of_the_paper(n: int) -> None:
    """Eq. 11 and Algorithm 2, Ho et al. 2020, which `step` reaches by way of x₀ (Eq. 7 and 15)."""
    sampler = DDPMSampler(seeded(3))
    sampler.set_inference_timesteps(n)
    x, eps, z = noise_like_latents(1).double(), noise_like_latents(2).double(), noise_like_latents(3).double()
    t, previous = sampler.timesteps[n // 2 : n // 2 + 2].tolist()
    alpha_bar, alpha_bar_prev = sampler.alphas_cumprod[t], sampler.alphas_cumprod[previous]
    alpha = sampler.alphas[t] if n == 1000 else alpha_bar / alpha_bar_prev  # with a stride, their product
    sigma = ((1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha)).sqrt()
    # xₜ₋₁ = (xₜ - (1 - αₜ) / √(1 - ᾱₜ) ε) / √αₜ + σₜ z
    expected = (x - (1 - alpha) / (1 - alpha_bar).sqrt() * eps) / alpha.sqrt() + sigma * z
    torch.testing.assert_close(sampler.step(t, x, eps), expected, rtol=1e-10, atol=1e-10)


def test_ancestral_euler_adds_ddpms_noise() -> None:
    """Two derivations, in two scalings of the latents, of the same noise; only the means differ a little."""
    x0, eps, t = noise_like_latents(1).double(), noise_like_latents(2).double(), 500
    added = []
    for name in ("ddpm", "euler_a"):
        sampler = SAMPLERS[name](torch.Generator().manual_seed(4))
        x = sampler.add_noise(x0, t, eps)
        difference = sampler.step(t, x, eps) - sampler.step(t, x, eps)  # the means cancel
        added.append(sampler.scale_model_input(difference, t - 1))
    torch.testing.assert_close(added[0], added[1])


def test_second_order_samplers_call_the_network_twice() -> None:
    pndm, heun = SAMPLERS["pndm"](), SAMPLERS["heun"]()
    for sampler in (pndm, heun):
        sampler.set_inference_timesteps(4)
    assert pndm.timesteps.tolist() == [751, 501, 501, 251, 1]
    assert heun.timesteps.tolist() == [751, 501, 501, 251, 251, 1, 1]


@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_2m_karras", "unipc"])
def test_four_times_the_steps_are_much_nearer_to_the_truth(name: str) -> None:
    def run(n: int) -> Tensor:
        sampler = SAMPLERS[name](prediction_type="v_prediction")
        sampler.set_inference_timesteps(n)
        return sample(sampler, noise_like_latents(1).double())

    truth = run(400)
    error = {n: (run(n) - truth).abs().mean().item() for n in (6, 24)}
    assert error[24] < error[6] / 7  # of first order, it would be a fourth


def test_samplers_have_the_names_that_users_type() -> None:
    names = "ddpm ddim pndm lms euler euler_a heun dpmpp_2m dpmpp_2m_karras dpmpp_sde unipc lcm"
    assert sorted(NAMES) == sorted([*names.split(), "flow", "flow_dpmpp_2m"])
    assert all(SAMPLERS[name].name == name and SAMPLERS[name].title for name in NAMES)


def test_a_sampler_of_ones_own_is_a_class_with_a_name_and_a_step(monkeypatch) -> None:
    monkeypatch.setattr("reifusion.model.ddpm.SAMPLERS", registered := dict(SAMPLERS))

    class Nothing(Sampler):
        name, title = "nothing", "Nothing at all"

        def _step(self, i: int, x: torch.Tensor, model_output: torch.Tensor) -> torch.Tensor:
            return x

    class Still(Nothing):  # has no name of its own, so that it is not listed
        pass

    assert [kind for name, kind in registered.items() if name not in SAMPLERS] == [Nothing]
    latents = noise_like_latents(1)
    assert torch.equal(sample(Nothing(), latents), latents)
