"""Schedules of other programs: which noise levels a sampler visits, by the names that they have there.

Each is a function as `model/spacing.py` says: of the training steps' σ, ascending (N,), and of n. After the
last that it returns, σ is 0. For rectified flow, σ is the share of noise, in (0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..model.spacing import SCHEDULES, Schedule, leading, linspace, place_of, trailing

TITLES: dict[str, str] = {}  # the schedules' names in A1111's web UI, where they have one there


def schedule(name: str, title: str = "") -> Callable[[Schedule], Schedule]:
    """Adds a function to SCHEDULES. title: its name in A1111's web UI."""

    def add(function: Schedule) -> Schedule:
        SCHEDULES[name] = function
        if title:
            TITLES[name] = title
        return function

    return add


# By timesteps


@schedule("leading")
def _leading(sigmas: Tensor, n: int) -> Tensor:
    return leading(n, len(sigmas)).double()


@schedule("linspace")
def _linspace(sigmas: Tensor, n: int) -> Tensor:
    return linspace(n, len(sigmas)).double()


@schedule("trailing")
def _trailing(sigmas: Tensor, n: int) -> Tensor:
    return trailing(n, len(sigmas)).double()


@schedule("normal", "Normal")
def normal(sigmas: Tensor, n: int) -> Tensor:
    """k-diffusion's, and ComfyUI's: n even timesteps from the last to the first."""
    return torch.linspace(len(sigmas) - 1, 0, n, dtype=torch.float64)


@schedule("sgm_uniform", "SGM Uniform")
def sgm_uniform(sigmas: Tensor, n: int) -> Tensor:
    """Stability's code for SDXL: n + 1 even timesteps, without the first."""
    return torch.linspace(len(sigmas) - 1, 0, n + 1, dtype=torch.float64)[:-1]


@schedule("simple", "Simple")
def simple(sigmas: Tensor, n: int) -> Tensor:
    """ComfyUI's: every (N / n)-th from the last, rounded down."""
    return len(sigmas) - 1 - (torch.arange(n) * len(sigmas) // n).double()


@schedule("ddim_uniform", "DDIM")
def ddim_uniform(sigmas: Tensor, n: int) -> Tensor:
    """ComfyUI's: every s-th from 1 on, s = ⌊N / n⌋. Those are n where n divides N, else more: 500 for 334."""
    stride = max(1, len(sigmas) // n)
    return torch.arange(1, len(sigmas), stride).flip(0).double()


@schedule("beta", "Beta")
def beta(sigmas: Tensor, n: int) -> Tensor:
    """Lee et al. 2024, "Beta Sampling is All You Need", arXiv:2407.12173: more steps at both ends.

    Rounded to whole timesteps, of which each is visited once, so large n make fewer steps.
    """
    share = 1 - np.arange(n) / n
    places = np.rint((len(sigmas) - 1) * beta_quantile(share, 0.6))
    return torch.from_numpy(np.unique(places)[::-1].copy())


def beta_quantile(share: np.ndarray, a: float) -> np.ndarray:
    """The quantiles of the distribution Beta(a, a), in [0, 1], for shares in [0, 1]."""
    k = np.arange(1, 80)
    terms = np.cumprod(np.append(1.0, (k - a) / k)) / (a + np.append(0, k))

    def integral(x: np.ndarray) -> np.ndarray:
        # ∫₀ˣ (t (1 - t))^(a - 1) dt, by the binomial series of (1 - t)^(a - 1), for x ≤ ½
        return x**a * (terms * x[..., None] ** np.append(0, k)).sum(-1)

    less = np.minimum(share, 1 - share)  # as the distribution is symmetric
    goal = 2 * integral(np.array(0.5)) * less
    low, high = np.zeros_like(less), np.full_like(less, 0.5)
    for _ in range(60):
        middle = (low + high) / 2
        below = integral(middle) < goal
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    found = np.where(less == 0.5, 0.5, high)
    return np.where(share <= 0.5, found, 1 - found)


# By σ


def karras_between(high: float, low: float, n: int, rho: float = 7.0) -> Tensor:
    """n σ from high to low, float64: Eq. 5, Karras et al. 2022."""
    return torch.linspace(high ** (1 / rho), low ** (1 / rho), n, dtype=torch.float64) ** rho


@schedule("karras", "Karras")
def karras(sigmas: Tensor, n: int) -> Tensor:
    """Karras et al. 2022, arXiv:2206.00364, ρ = 7: many small steps at the end."""
    return place_of(karras_between(sigmas[-1].item(), sigmas[0].item(), n), sigmas)


@schedule("exponential", "Exponential")
def exponential(sigmas: Tensor, n: int) -> Tensor:
    """k-diffusion's: even in log σ."""
    return place_of(torch.linspace(*_logs(sigmas), n, dtype=torch.float64).exp(), sigmas)


@schedule("polyexponential", "Polyexponential")
def polyexponential(sigmas: Tensor, n: int) -> Tensor:
    """k-diffusion's: log σ as a power of the way; here its square, as the power 1 is exponential."""
    high, low = _logs(sigmas)
    way = torch.linspace(1, 0, n, dtype=torch.float64) ** 2
    return place_of((low + way * (high - low)).exp(), sigmas)


def _logs(sigmas: Tensor) -> tuple[float, float]:
    return math.log(sigmas[-1].item()), math.log(sigmas[0].item())


@schedule("kl_optimal", "KL Optimal")
def kl_optimal(sigmas: Tensor, n: int) -> Tensor:
    """Eq. 12, Sabour, Fidler & Kreis 2024, "Align Your Steps", arXiv:2404.14507: even in arctan σ."""
    high, low = sigmas[-1].atan().item(), sigmas[0].atan().item()
    return place_of(torch.linspace(high, low, n, dtype=torch.float64).tan(), sigmas)


# σ that were found by optimisation, for 10 steps, by Sabour, Fidler & Kreis 2024
ALIGN_YOUR_STEPS = {
    "align_your_steps": (
        14.6146412293, 6.4745760956, 3.8636745985, 2.6946151520, 1.8841921177, 1.3943805092, 0.9642583904,
        0.6523686016, 0.3977456272, 0.1515232662, 0.0291671582,
    ),
    "align_your_steps_xl": (
        14.6146412293, 6.3184485287, 3.7681790315, 2.1811480769, 1.3405244945, 0.8620721141, 0.5550693289,
        0.3798540708, 0.2332364134, 0.1114188177, 0.0291671582,
    ),
}  # fmt: skip


@schedule("align_your_steps", "Align Your Steps")
def align_your_steps(sigmas: Tensor, n: int) -> Tensor:
    """Stable Diffusion 1.5's, log σ interpolated for other n; the last is taken for 0, as in ComfyUI."""
    return _aligned("align_your_steps", sigmas, n)


@schedule("align_your_steps_xl")
def align_your_steps_xl(sigmas: Tensor, n: int) -> Tensor:
    """The same for SDXL."""
    return _aligned("align_your_steps_xl", sigmas, n)


def _aligned(name: str, sigmas: Tensor, n: int) -> Tensor:
    table = np.log(ALIGN_YOUR_STEPS[name])
    logs = np.interp(np.linspace(0, 1, n + 1), np.linspace(0, 1, len(table)), table)
    return place_of(torch.from_numpy(np.exp(logs[:-1])), sigmas)
