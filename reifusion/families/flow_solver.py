"""DPM-Solver++ for networks that were trained for rectified flow, as those of Stable Diffusion 3 are."""

from __future__ import annotations

import math

from torch import Tensor

from ..model.flow import FlowSampler


class FlowDPMPP2MSampler(FlowSampler):
    """Lu et al. 2022, "DPM-Solver++", arXiv:2211.01095, second order multistep, on a straight path.

    The same as `DPMPP2MSampler`, with the signal αₜ = 1 - σ and the noise σ of rectified flow. The timesteps
    are those of Euler's method, which begin at σ = 1, where λ = log(αₜ / σ) is -∞.
    """

    name, title = "flow_dpmpp_2m", "Flow DPM++ 2M"

    def _begin(self, timesteps: Tensor) -> None:
        super()._begin(timesteps)
        self._x0s: list[Tensor] = []  # the last two predictions of x₀, newest last

    def _lambda(self, i: int) -> float:
        signal, noise = 1 - self.sigmas[i], self.sigmas[i]
        return math.log(signal / noise) if signal > 0 < noise else math.copysign(math.inf, signal - noise)

    def _step(self, i: int, x: Tensor, model_output: Tensor) -> Tensor:
        x0, _ = self.predict(self.timesteps[i], x, model_output)
        self._x0s = [*self._x0s[-1:], x0]
        sigma, later, h = self.sigmas[i], self.sigmas[i + 1], self._lambda(i + 1) - self._lambda(i)
        # [flow-dpmpp-2m] Algorithm 2, Lu et al. 2022, with α = 1 - σ: x' = σ' / σ x - (1 - σ') (e⁻ʰ - 1) D
        return later / sigma * x - (1 - later) * math.expm1(-h) * self._direction(i, h)

    def _direction(self, i: int, h: float) -> Tensor:
        if len(self._x0s) == 1 or i == len(self.timesteps) - 1:
            return self._x0s[-1]
        r = (self._lambda(i) - self._lambda(i - 1)) / h
        # Algorithm 2, Lu et al. 2022: rᵢ = hᵢ₋₁ / hᵢ, Dᵢ = (1 + 1 / 2rᵢ) x₀⁽ⁱ⁻¹⁾ - 1 / 2rᵢ x₀⁽ⁱ⁻²⁾
        return (1 + 1 / (2 * r)) * self._x0s[-1] - 1 / (2 * r) * self._x0s[-2]
