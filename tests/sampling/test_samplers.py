"""The samplers beyond the model's: numbers of the programs that they come from, and what each promises.

The numbers were computed in float64 with k-diffusion 0.1.1, diffusers, ComfyUI's er_sde and A1111's restart
for D(x, σ) = 0.7 cos(x / √(1 + σ²)) + 0.1 σ / (1 + σ), from x = 3, with noise that is +½, -½, +½, …
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import reifusion.sampling  # noqa: F401  # adds the samplers
from reifusion.model.ddpm import Sampler, randn
from reifusion.model.samplers import SAMPLERS
from reifusion.model.spacing import SCHEDULES, place_of

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
    vars(sampler).update(again=(2, 1), least=0.4, most=2.0)
    assert walked(visiting(sampler, SIGMAS, monkeypatch)) == pytest.approx(0.554591346617, abs=1e-11)


@pytest.mark.parametrize(("n", "ups"), [(19, 0), (20, 1), (35, 1), (36, 2), (50, 2)])
def test_restart_has_n_steps_in_all(n: int, ups: int) -> None:
    sampler: Any = SAMPLERS["restart"]()
    sampler.set_inference_timesteps(n)
    assert len(sampler._steps) == n and len(sampler.timesteps) == 2 * n - 1
    assert sum(later[0] > before[1] for before, later in zip(sampler._steps, sampler._steps[1:])) == ups
