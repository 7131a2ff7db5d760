"""Samplers that go back up: noise is added between steps, and taken away again with what was wrong in x."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
from torch import Tensor

from ..model.spacing import SCHEDULES
from .schedules import karras_between
from .solver import Solver, toward


class EulerChurnSampler(Solver):
    """Karras et al. 2022, arXiv:2206.00364, Algorithm 2 with Euler's steps: a little up, then further down.

    churn: in how many steps' worth of noise to go back up in all (S_churn there). `between` has the least and
    the largest σ at which it happens. The first step goes down only, and none goes above the largest σ of
    training, where the network has never been; k-diffusion does both.
    """

    name, title = "euler_churn", "Euler churn"
    s_noise = 1.0
    churn = 5.0
    between = (0.0, math.inf)

    def _plan(self, sigmas: list[float]) -> list[tuple[float, float]]:
        # Algorithm 2, line 3 to 5, Karras et al. 2022: γ = min(churn / n, √2 - 1), σ̂ = σ + γ σ
        gamma, (low, high) = min(self.churn / (len(sigmas) - 1), math.sqrt(2) - 1), self.between
        lifted = [max(s, min(sigmas[0], s * (1 + gamma))) if low <= s <= high else s for s in sigmas]
        return [(begin, later) for (begin, _), (_, later) in zip(pairwise(lifted), pairwise(sigmas))]

    def _go(self, k: int, place: int, x: Tensor, x0: Tensor) -> Tensor:
        return toward(x, x0, *self._steps[k])


class RestartSampler(Solver):
    """Xu et al. 2023, "Restart Sampling for Improving Generative Processes", arXiv:2306.14878.

    Heun's steps on Karras's σ. From 20 steps on, x is lifted from σ ≈ 0.1 to 2 and drawn down again, once, or
    twice from 36 steps on; the numbers of steps are those of A1111's web UI, n in all.
    """

    name, title = "restart", "Restart"
    own_schedule, s_noise = True, 1.0
    least, most = 0.1, 2.0  # σ between which it is drawn again
    again: tuple[int, int] | None = None  # steps of each time, and how often; None: by the number of steps

    def _spaced(self, n: int) -> Tensor:
        return self._at(SCHEDULES["karras"](self._training_sigmas(), n))

    def _plan(self, sigmas: list[float]) -> list[tuple[float, float]]:
        n = len(sigmas) - 1
        steps, times = self.again or ((n // 4, 2) if n >= 36 else (9, 1) if n >= 20 else (0, 0))
        if not times or sigmas[0] < self.most:
            return [*pairwise(sigmas)]
        if self.again is None:  # the main pass has as many steps less
            sigmas = [*karras_between(sigmas[0], sigmas[-2], n - steps * times).tolist(), 0.0]
        low, high = (int(np.abs(np.array(sigmas) - end).argmin()) for end in (self.least, self.most))
        round_trip = [*pairwise(karras_between(sigmas[high], sigmas[low], steps + 1).tolist())]
        # Algorithm 1, Xu et al. 2023: x ← x + √(σ_max² - σ_min²) z, and down again
        return [*pairwise(sigmas[: low + 1]), *round_trip * times, *pairwise(sigmas[low:])]

    def _calls(self, sigma: float, later: float) -> tuple[float, ...]:
        return (sigma, later) if later > 0 else (sigma,)

    def _go(self, k: int, place: int, x: Tensor, x0: Tensor) -> Tensor:
        sigma, later = self._steps[k]
        if place == 0:
            self._slopes = [(x - x0) / sigma]
            return toward(x, x0, sigma, later)
        # Algorithm 1, line 8, Karras et al. 2022: the mean of the slopes at both ends
        return self._x + (later - sigma) * (self._slopes[0] + (x - x0) / later) / 2
