"""Samplers that call the network twice in a step: at its beginning, and in the middle as log σ counts.

All from k-diffusion (Crowson 2022), after Karras et al. 2022, arXiv:2206.00364, and Lu et al. 2022,
"DPM-Solver", arXiv:2206.00927. The last step, to σ = 0, is Euler's, with one call.
"""

from __future__ import annotations

import math

from torch import Tensor

from .solver import Solver, ancestral, toward


class DPM2Sampler(Solver):
    """DPM-Solver-2: Euler's step to the middle, then a whole step with the slope that was found there."""

    name, title = "dpm2", "DPM2"

    def _calls(self, sigma: float, later: float) -> tuple[float, ...]:
        down, _ = ancestral(sigma, later, self.eta)
        return (sigma, math.sqrt(sigma * down)) if later > 0 else (sigma,)

    def _go(self, k: int, place: int, x: Tensor, x0: Tensor) -> Tensor:
        sigma, later = self.sigmas[k], self.sigmas[k + 1]
        if later == 0:
            return x0
        down, up = ancestral(sigma, later, self.eta)
        middle = math.sqrt(sigma * down)
        if place == 0:
            return toward(x, x0, sigma, middle)
        return self._renoised(self._whole(x, x0, sigma, middle, down), up)

    def _whole(self, x: Tensor, x0: Tensor, sigma: float, middle: float, down: float) -> Tensor:
        # Algorithm 1, Lu et al. 2022, r₁ = ½, in this scaling: x' = x + (σ' - σ) dₘ, dₘ = (xₘ - x₀) / σₘ
        return self._x + (down - sigma) * (x - x0) / middle


class DPM2AncestralSampler(DPM2Sampler):
    """The same to less noise than planned, and then fresh noise."""

    name, title = "dpm2_a", "DPM2 a"
    eta, s_noise = 1.0, 1.0


class DPMPP2SAncestralSampler(DPM2AncestralSampler):
    """DPM-Solver++(2S), Lu et al. 2022, arXiv:2211.01095, with fresh noise: x₀ is taken from the middle."""

    name, title = "dpmpp_2s_a", "DPM++ 2S a"

    def _whole(self, x: Tensor, x0: Tensor, sigma: float, middle: float, down: float) -> Tensor:
        # Algorithm 1, Lu et al. 2022, r = ½: x' = σ' / σ x - α' (e⁻ʰ - 1) x₀ₘ, with e⁻ʰ = σ' / σ here
        return toward(self._x, x0, sigma, down)


class DPMPP2SSDESampler(Solver):
    """DPM++ SDE of k-diffusion: as DPM++ 2S, and fresh noise on the way to the middle as well.

    The two noises of a step are independent; k-diffusion takes both from one Brownian path, as does
    `steer/brownian.py`.
    """

    name, title = "dpmpp_2s_sde", "DPM++ SDE"
    eta, s_noise = 1.0, 1.0

    def _calls(self, sigma: float, later: float) -> tuple[float, ...]:
        return (sigma, math.sqrt(sigma * later)) if later > 0 else (sigma,)

    def _go(self, k: int, place: int, x: Tensor, x0: Tensor) -> Tensor:
        sigma, later = self.sigmas[k], self.sigmas[k + 1]
        if later == 0:
            return x0
        down, up = ancestral(sigma, math.sqrt(sigma * later) if place == 0 else later, self.eta)
        return self._renoised(toward(self._x, x0, sigma, down), up)
