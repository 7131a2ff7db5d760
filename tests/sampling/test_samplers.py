"""The samplers beyond the model's: numbers of the programs that they come from, and what each promises.

The numbers were computed in float64 with k-diffusion 0.1.1, diffusers, ComfyUI's er_sde and A1111's restart
for D(x, σ) = 0.7 cos(x / √(1 + σ²)) + 0.1 σ / (1 + σ), from x = 3, with noise that is +½, -½, +½, …
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import reifusion.sampling  # noqa: F401  # adds the samplers
from reifusion.model.ddpm import Sampler, randn
from reifusion.model.samplers import SAMPLERS
from reifusion.model.spacing import SCHEDULES, place_of
from reifusion.sampling.elsewhere import ELSEWHERE

NEW = [name for name, kind in SAMPLERS.items() if kind.__module__.startswith("reifusion.sampling")]
TWO_CALLS = ("dpm2", "dpm2_a", "dpmpp_2s_a", "dpmpp_2s_sde")
KINDS = [(name, kind) for name in NEW for kind in SAMPLERS[name].prediction_types]
every_sampler = pytest.mark.parametrize("name", NEW)
every_kind = pytest.mark.parametrize(("name", "kind"), KINDS)


def denoised(x: Tensor, sigma: float) -> Tensor:
    return 0.7 * torch.cos(x / math.sqrt(1 + sigma**2)) + 0.1 * sigma / (1 + sigma)


def visiting(sampler: Sampler, sigmas: tuple[float, ...], monkeypatch: pytest.MonkeyPatch) -> Sampler:
    """The sampler, set to these σ and then 0, and to noise that is +½, -½, +½, …"""
    places = place_of(torch.tensor(sigmas, dtype=torch.float64), sampler._training_sigmas())
    monkeypatch.setitem(SCHEDULES, "these", lambda _, n: places)
    sampler.set_inference_timesteps(len(sigmas), "these")
    draws = iter([0.5, -0.5] * 20)
    scale = 1.0 if sampler.s_noise is None else sampler.s_noise
    monkeypatch.setattr(sampler, "_noise", lambda x: torch.full_like(x, scale * next(draws)))
    return sampler


def walked(sampler: Sampler, x: float = 3.0, steps: int | None = None) -> float:
    """Where x, in the scaling x₀ + σ ε, ends."""
    latents = torch.full((1, 1), x, dtype=torch.float64)
    for t in sampler.timesteps[:steps]:
        sigma = sampler.sigma(t)
        scaled = sampler.scale_model_input(latents, t)
        eps = (scaled * math.sqrt(1 + sigma**2) - denoised(scaled * math.sqrt(1 + sigma**2), sigma)) / sigma
        latents = sampler.step(t, latents, eps)
    return latents.item()


SIGMAS = (10.0, 5.0, 2.0, 1.0, 0.4)
PUBLISHED: list[tuple[str, dict[str, Any], float]] = [
    ("euler_a", {}, 0.665652406656),
    ("euler_a", {"eta": 0.5}, 0.606418838661),
    ("dpm2", {}, 0.585199504553),
    ("dpm2_a", {}, 0.677946654915),
    ("dpm2_a", {"eta": 0.0}, 0.585199504553),
    ("dpmpp_2s_a", {}, 0.667866804117),
    ("dpmpp_2s_a", {"eta": 0.0}, 0.580250853443),
    ("dpmpp_2s_sde", {}, 0.694389815331),
    ("dpmpp_2s_sde", {"eta": 0.0}, 0.580250853443),
    ("dpmpp_2m_sde", {}, 0.693498643866),
    ("dpmpp_2m_sde", {"eta": 0.0}, 0.583308591613),
    ("dpmpp_2m_sde_heun", {}, 0.700236204408),
    ("dpmpp_2m_sde_heun", {"eta": 0.0}, 0.584886025450),
    ("dpmpp_3m_sde", {}, 0.724370068552),
    ("dpmpp_3m_sde", {"eta": 0.0}, 0.586309188191),
    ("ipndm", {}, 0.577030925659),
    ("er_sde", {}, 0.604070390989),
    ("er_sde", {"s_noise": 0.0}, 0.585785374167),
    ("heun", {}, 0.589893163144),
    ("lms", {}, 0.574357878601),
    ("euler", {}, 0.571906900519),
]


@pytest.mark.parametrize(("name", "options", "x"), PUBLISHED)
def test_published_programs_end_at_the_same_x(name, options, x, monkeypatch) -> None:
    sampler = SAMPLERS[name]()
    vars(sampler).update(options)
    assert walked(visiting(sampler, SIGMAS, monkeypatch)) == pytest.approx(x, abs=1e-11)


def test_dpmpp_2m_in_the_scaling_of_training_ends_there_too(monkeypatch) -> None:
    sampler = visiting(SAMPLERS["dpmpp_2m"](), SIGMAS, monkeypatch)
    assert walked(sampler, 3 / math.sqrt(101)) == pytest.approx(0.583308591613, abs=1e-11)


def test_churn_is_k_diffusions_apart_from_the_first_step(monkeypatch) -> None:
    sampler: Any = SAMPLERS["euler_churn"]()
    vars(sampler).update(churn=40.0, s_noise=1.1, between=(0.5, 6.0))
    visiting(sampler, SIGMAS, monkeypatch)
    draws = iter([-0.5, 0.5, -0.5])  # as k-diffusion draws in the first step too, and does not use it
    monkeypatch.setattr(sampler, "_noise", lambda x: torch.full_like(x, 1.1 * next(draws)))
    assert walked(sampler) == pytest.approx(0.607090797837, abs=1e-11)
    assert [round(begin, 6) for begin, _ in sampler._steps] == [10, 7.071068, 2.828427, 1.414214, 0.4]


def test_restart_is_a1111s(monkeypatch) -> None:
    sampler: Any = SAMPLERS["restart"]()
    vars(sampler).update(again=(2, 1), least=0.4, most=2.0, own_schedule=False)  # to visit these σ
    assert walked(visiting(sampler, SIGMAS, monkeypatch)) == pytest.approx(0.554591346617, abs=1e-11)


@pytest.mark.parametrize(("n", "ups"), [(19, 0), (20, 1), (35, 1), (36, 2), (50, 2)])
def test_restart_has_n_steps_in_all(n: int, ups: int) -> None:
    sampler: Any = SAMPLERS["restart"]()
    sampler.set_inference_timesteps(n)
    assert len(sampler._steps) == n and len(sampler.timesteps) == 2 * n - 1
    assert sum(later[0] > before[1] for before, later in zip(sampler._steps, sampler._steps[1:])) == ups


@pytest.mark.parametrize("name", ["dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde"])
def test_those_that_draw_curves_keep_the_spread_of_the_data_on_their_own_schedule(name: str) -> None:
    """Where all data are N(0, 1), x_t is as well, and E[ε | x_t] = √(1 - ᾱ) x_t."""
    sampler = SAMPLERS[name](seeded(1))
    sampler.set_inference_timesteps(25)
    x = randn((1, 4, 64, 64), seeded(2)) * sampler.init_noise_sigma
    for t in sampler.timesteps:
        sigma, scaled = sampler.sigma(t), sampler.scale_model_input(x, t)
        x = sampler.step(t, x, scaled * sigma / math.sqrt(1 + sigma**2))
    assert 0.9 < x.std() < 1.1


# What each promises


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def latents(*seeds: int) -> Tensor:
    return randn((len(seeds), 4, 6, 5), seeded(*seeds))


def network(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(x.float() * (0.5 + float(t) / 1000)).to(x.dtype)


def sample(sampler: Sampler, x: Tensor) -> Tensor:
    for t in sampler.timesteps:
        x = sampler.step(t, x, network(sampler.scale_model_input(x, t), t))
    return x


@every_kind
@pytest.mark.parametrize(("n", "strength"), [(1, 1.0), (13, 0.5), (40, 1.0)])
def test_a_network_that_knows_the_picture_leads_to_it(name: str, kind: str, n: int, strength: float) -> None:
    sampler, x0 = SAMPLERS[name](seeded(5), prediction_type=kind), latents(1).double()
    sampler.set_inference_timesteps(n)
    sampler.set_strength(strength)
    x = sampler.add_noise(x0, sampler.timesteps[0], latents(2))
    for t in sampler.timesteps:
        seen = sampler.scale_model_input(x, t)
        signal, sigma = sampler._signal_and_noise(t, seen)
        eps = (seen - signal * x0) / sigma
        x = sampler.step(t, x, {"epsilon": eps, "flow": eps - x0}.get(kind, signal * eps - sigma * x0))
    # TCD ends with the noise of timestep 0, √(1 - ᾱ₀); flow begins at a signal of 2⁻¹² in place of none.
    assert (x - x0).std().item() <= (0.033 if name == "tcd" else 1e-3 if kind == "flow" else 1e-9)


@every_kind
def test_same_seed_gives_same_picture_in_any_batch_position(name: str, kind: str) -> None:
    batch = SAMPLERS[name](seeded(11, 12, 13), prediction_type=kind)
    alone = SAMPLERS[name](seeded(13), prediction_type=kind)
    for sampler in (batch, alone):
        sampler.set_inference_timesteps(6)
    together = sample(batch, latents(1, 2, 3) * batch.init_noise_sigma)
    torch.testing.assert_close(
        together[2:], sample(alone, latents(3) * alone.init_noise_sigma), rtol=1e-5, atol=1e-5
    )


@every_sampler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_latents_are_rounded_only_at_the_end_of_a_step(name: str, dtype: torch.dtype) -> None:
    half, full = SAMPLERS[name](seeded(1)), SAMPLERS[name](seeded(1))
    x = latents(2).to(dtype)
    for sampler in (half, full):
        sampler.set_inference_timesteps(1)
    t = half.timesteps[0]
    output = network(x, t)
    result = half.step(t, x, output)
    assert result.dtype == dtype
    assert torch.equal(result, full.step(t, x.float(), output.float()).to(dtype))
    assert all(prediction.dtype == dtype for prediction in half.predict(t, x, output))


@every_sampler
@pytest.mark.parametrize("reset", ["set_inference_timesteps", "set_strength"])
def test_starting_over_forgets_an_unfinished_loop(name: str, reset: str) -> None:
    sampler, x, results = SAMPLERS[name](), latents(1), []
    for abandoned in (False, True):
        sampler.generator = seeded(1)
        sampler.set_inference_timesteps(8)
        if abandoned:
            for t in sampler.timesteps[:5]:
                sampler.step(t, x + 1, x - 1)
            sampler.generator = seeded(1)
        getattr(sampler, reset)({"set_inference_timesteps": 8, "set_strength": 1.0}[reset])
        results.append(sample(sampler, x))
    assert torch.equal(*results)


@every_sampler
def test_steps_leave_their_arguments_alone(name: str) -> None:
    sampler, x, output = SAMPLERS[name](seeded(1)), latents(2), latents(3)
    sampler.set_inference_timesteps(5)
    before = x.clone(), output.clone()
    for t in sampler.timesteps:
        sampler.step(t, x, output)
    assert torch.equal(x, before[0]) and torch.equal(output, before[1])
    with pytest.raises(ValueError, match=r"is not one of this sampler's"):
        sampler.step(998.5, x, x)


@every_sampler
def test_any_number_of_steps_and_any_strength_make_as_many_calls_as_are_said(name: str) -> None:
    sampler: Any = SAMPLERS[name]()
    for n in (1, 2, 5, 20, 36, 999, 1000):
        sampler.set_inference_timesteps(n)
        for strength in (1.0, 0.5, 1e-9):
            sampler.set_strength(strength)
            kept = max(1, int(n * strength))
            assert len(sampler.timesteps) == kept * ELSEWHERE[name].calls - (ELSEWHERE[name].calls - 1), n
            assert sampler.timesteps.min() >= 0 and sampler.timesteps.max() <= 999
            if name != "restart":
                assert (sampler.timesteps.diff() < 1e-9).all() or name == "euler_churn"


@every_kind
def test_few_steps_of_a_long_loop_are_finite(name: str, kind: str) -> None:
    for n, strength in ((999, 0.0041), (50, 0.08)):
        sampler = SAMPLERS[name](seeded(1), prediction_type=kind)
        sampler.set_inference_timesteps(n)
        sampler.set_strength(strength)
        x = sampler.add_noise(latents(1), sampler.timesteps[0], latents(2))
        assert sample(sampler, x).isfinite().all()


@pytest.mark.parametrize("name", [name for name, kind in KINDS if kind == "v_prediction"])
def test_zero_terminal_snr_begins_at_noise_alone(name: str) -> None:
    sampler = SAMPLERS[name](seeded(1), prediction_type="v_prediction", zero_terminal_snr=True)
    sampler.set_inference_timesteps(9)
    x0, noise = latents(1).double(), latents(2).double()
    x = noise * sampler.init_noise_sigma
    assert sampler.timesteps[0] == 999
    for t in sampler.timesteps:
        seen = sampler.scale_model_input(x, t)
        signal, sigma = sampler._signal_and_noise(t, seen)
        x = sampler.step(t, x, signal * (seen - signal * x0) / sigma - sigma * x0)
    assert (x - x0).std() < (0.033 if name == "tcd" else 1e-3)


# The column "order"


def exactly(start: float, end: float, x: float = 3.0, steps: int = 2000) -> float:
    """Where the ODE leads x, by the classical Runge-Kutta method in log σ: dx/dlog σ = x - D(x, σ)"""

    def slope(u: float, x: float) -> float:
        sigma = math.exp(u)
        return x - 0.7 * math.cos(x / math.sqrt(1 + sigma**2)) - 0.1 * sigma / (1 + sigma)

    u, h = math.log(start), math.log(end / start) / steps
    for _ in range(steps):
        k1 = slope(u, x)
        k2 = slope(u + h / 2, x + h / 2 * k1)
        k3 = slope(u + h / 2, x + h / 2 * k2)
        k4 = slope(u + h, x + h * k3)
        u, x = u + h, x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


@pytest.mark.parametrize(
    "name", ["dpm2", "dpmpp_2s_a", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde", "deis", "ipndm"]
)
def test_twice_the_steps_have_an_error_that_is_smaller_by_the_order(name: str, monkeypatch: Any) -> None:
    """From σ = 10 to 1, without noise; the step to 0, which is Euler's, is not counted."""

    def error(n: int) -> float:
        sampler = SAMPLERS[name]()
        if sampler.eta:
            sampler.eta = 0.0
        sigmas = 10 ** torch.linspace(1, 0, n + 1, dtype=torch.float64)
        if name == "ipndm":  # whose weights are for even steps
            sigmas = torch.linspace(10, 1, n + 1, dtype=torch.float64)
        monkeypatch.setitem(SCHEDULES, "these", lambda table, _: place_of(sigmas, table))
        sampler.set_inference_timesteps(n + 1, "these")
        return abs(walked(sampler, steps=n * ELSEWHERE[name].calls) - exactly(10, 1))

    # Of multistep methods, the first steps are of lower order, which is felt a little.
    assert math.log2(error(24) / error(48)) > ELSEWHERE[name].order - (0.7 if name == "deis" else 0.3)
