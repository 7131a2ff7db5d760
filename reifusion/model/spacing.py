"""Which timesteps a sampler visits: Stable Diffusion's own spacings, and room for any other schedule.

A schedule is a function of the training steps' σ, ascending (N,), and of the number of steps n. It returns
where among the training steps to look, noisiest first: about n numbers in [0, N - 1], float64, that fall.
Fractions are between two training steps. `sampling/schedules.py` has the schedules of other programs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

Schedule: TypeAlias = Callable[[Tensor, int], Tensor]
SCHEDULES: dict[str, Schedule] = {}  # every schedule, by its name


def leading(n: int, total: int) -> Tensor:
    """`leading` spacing with an offset of 1, Stable Diffusion's: 1, 1 + N/n, 1 + 2N/n, … reversed.

    N/n is rounded down, so an n that does not divide N starts below N - 1, in the reference too. When n = N
    the offset would lead to t = N, which was never trained (the reference crashes, CompVis #342): there is
    no room for it, and the timesteps are N - 1 … 0.
    """
    offset = 1 if n < total else 0
    return torch.arange(n).flip(0) * (total // n) + offset


def trailing(n: int, total: int) -> Tensor:
    """`trailing` spacing (Lin et al. 2023, Table 2): N, N - N/n, N - 2N/n, … rounded, and all less 1."""
    back = torch.arange(n, dtype=torch.float64) * total / n
    return (total - back).round().long() - 1


def linspace(n: int, total: int) -> Tensor:
    """`linspace` spacing, DPM-Solver++'s: n + 1 even points on 0 … N - 1, without the 0, and rounded.

    That leaves N - 1 timesteps to choose from. For n = N, where the reference repeats one and divides by
    zero, the 0 is used as well.
    """
    if n == total:
        return leading(n, n)
    return (torch.arange(n, 0, -1, dtype=torch.float64) * ((total - 1) / n)).round().long()


def place_of(sigma: Tensor, sigmas: Tensor) -> Tensor:
    """Where σ (…,) lies among the training steps' (N,): log σ between two of them is taken to be a line."""
    places = np.interp(sigma.log().numpy(), sigmas.log().numpy(), np.arange(len(sigmas)))
    return torch.from_numpy(np.asarray(places))


def sigma_at(place: Tensor, sigmas: Tensor) -> Tensor:
    """The reverse of `place_of`: σ at places (…,) among the training steps, float64."""
    logs = np.interp(place.double().numpy(), np.arange(len(sigmas)), sigmas.log().numpy())
    return torch.from_numpy(np.asarray(logs)).exp()
