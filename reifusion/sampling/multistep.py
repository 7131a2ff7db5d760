"""Samplers that remember: one call of the network in a step, and a curve through what it said before."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor

from ..model.spacing import SCHEDULES
from .solver import Solver


class DPMPP2MSDESampler(Solver):
    """SDE-DPM-Solver++(2M), Lu et al. 2022, arXiv:2211.01095, with as much fresh noise as η says.

    From k-diffusion (Crowson 2022). With η = 1 it is diffusers' "sde-dpmsolver++", and `dpmpp_sde`; with
    η = 0, DPM++ 2M.
    """

    name, title = "dpmpp_2m_sde", "DPM++ 2M SDE"
    eta, s_noise = 1.0, 1.0

    def _spaced(self, n: int) -> Tensor:
        # Even in log σ, as in A1111: on "normal", the last step is so long that the curve overshoots.
        if self.prediction_type == "flow":
            return super()._spaced(n)
        return self._at(SCHEDULES["exponential"](self._training_sigmas(), n))

    def _go(self, k: int, place: int, x: Tensor, x0: Tensor) -> Tensor:
        sigma, later, eta = self.sigmas[k], self.sigmas[k + 1], self.eta or 0.0
        if later == 0:
            return x0
        h = math.log(sigma / later)
        y = h * (1 + eta)
        # Eq. 18, Lu et al. 2022, in this scaling and with η: x' = σ' / σ e⁻ʰᶯ x + (1 - e⁻ʸ) x₀ + … + σ_up z
        mean = later / sigma * math.exp(-eta * h) * x - math.expm1(-y) * x0 + self._curve(k, h, y)
        return self._renoised(mean, later * math.sqrt(-math.expm1(-2 * eta * h)))

    def _curve(self, k: int, h: float, y: float) -> float | Tensor:
        """What the predictions before add to the step: a line through the last two."""
        if len(self._x0s) < 2:
            return 0.0
        r = math.log(self.sigmas[k - 1] / self.sigmas[k]) / h
        return self._share(y) * (self._x0s[-1] - self._x0s[-2]) / r

    def _share(self, y: float) -> float:
        return -0.5 * math.expm1(-y)  # the midpoint rule


class DPMPP2MSDEHeunSampler(DPMPP2MSDESampler):
    """The same, with the line's integral in place of its value in the middle."""

    name, title = "dpmpp_2m_sde_heun", "DPM++ 2M SDE Heun"

    def _share(self, y: float) -> float:
        return 1 + math.expm1(-y) / y


class DPMPP3MSDESampler(DPMPP2MSDEHeunSampler):
    """DPM++ 3M SDE of k-diffusion (Crowson 2023): a parabola through the last three predictions.

    diffusers' "sde-dpmsolver++" of order 3 has a wrong sign in the last term, and is not what this equals.
    """

    name, title = "dpmpp_3m_sde", "DPM++ 3M SDE"

    def _curve(self, k: int, h: float, y: float) -> float | Tensor:
        if len(self._x0s) < 3:
            return super()._curve(k, h, y)
        newest, before, oldest = self._x0s[-1], self._x0s[-2], self._x0s[-3]
        r0 = math.log(self.sigmas[k - 1] / self.sigmas[k]) / h
        r1 = math.log(self.sigmas[k - 2] / self.sigmas[k - 1]) / h
        slope, earlier = (newest - before) / r0, (before - oldest) / r1
        bend = (slope - earlier) / (r0 + r1)
        # φ₂ = (e⁻ʸ - 1) / y + 1, φ₃ = φ₂ / y - ½: φ₂ D' - φ₃ D'', of the parabola in units of h
        phi_2 = 1 + math.expm1(-y) / y
        phi_3 = phi_2 / y - 0.5
        return phi_2 * (slope + r0 * bend) - phi_3 * bend


class DEISSampler(Solver):
    """Zhang & Chen 2023, "Fast Sampling of Diffusion Models with Exponential Integrator", arXiv:2204.13902.

    The slope, ε, is a parabola in log σ through the last three, which is integrated over σ ("ρAB" in log ρ,
    as in diffusers' class, there of order 2 by default). The last step, to σ = 0, is Euler's.
    """

    name, title = "deis", "DEIS"

    def _go(self, k: int, place: int, x: Tensor, x0: Tensor) -> Tensor:
        sigma, later = self.sigmas[k], self.sigmas[k + 1]
        self._slopes = [*self._slopes[-2:], (x - x0) / sigma]
        if later == 0:
            return x0
        knots = [math.log(self.sigmas[k - j]) for j in range(len(self._slopes))]
        # Eq. 15, Zhang & Chen 2023, in this scaling: x' = x + Σⱼ Cⱼ εᵢ₋ⱼ, Cⱼ = ∫ ℓⱼ(log σ) dσ
        for j, slope in enumerate(reversed(self._slopes)):
            others = [knot for place, knot in enumerate(knots) if place != j]
            line = np.poly1d(others, r=True) / math.prod(knots[j] - knot for knot in others)
            x = x + integral_in_log(line, sigma, later) * slope
        return x


def integral_in_log(p: np.poly1d, start: float, end: float) -> float:
    """∫ p(log σ) dσ from start to end: [σ (p - p' + p'' - …)(log σ)], by parts."""
    whole, derivative = np.poly1d([0.0]), p
    for k in range(p.order + 1):
        whole, derivative = whole + (-1) ** k * derivative, derivative.deriv()
    return float(end * whole(math.log(end)) - start * whole(math.log(start)))


class IPNDMSampler(Solver):
    """Liu et al. 2022, arXiv:2202.09778, as Zhang & Chen 2023 improved it: no first steps of another kind.

    Adams-Bashforth's weights for even steps, on the slope in σ, of an order that grows to 4. As in ComfyUI,
    the last step, to σ = 0, is Euler's.
    """

    name, title = "ipndm", "IPNDM"

    def _go(self, k: int, place: int, x: Tensor, x0: Tensor) -> Tensor:
        sigma, later = self.sigmas[k], self.sigmas[k + 1]
        self._slopes = [*self._slopes[-3:], (x - x0) / sigma]
        if later == 0:
            return x0
        # Eq. 12, Liu et al. 2022: Adams-Bashforth
        weights = _ADAMS_BASHFORTH[len(self._slopes) - 1]
        for weight, slope in zip(weights, reversed(self._slopes), strict=True):
            x = x + (later - sigma) * weight * slope
        return x


_ADAMS_BASHFORTH = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


class ERSDESampler(Solver):
    """Cui et al. 2023, "Elucidating the Solution Space of Extended Reverse-Time SDE", arXiv:2309.06169.

    Order 3, in the noise scale that the authors found best. Its integrals are sums over 200 points, as in
    their code.
    """

    name, title = "er_sde", "ER SDE"
    s_noise = 1.0
    _points = 200

    def _go(self, k: int, place: int, x: Tensor, x0: Tensor) -> Tensor:
        sigma, later = self.sigmas[k], self.sigmas[k + 1]
        if later == 0:
            return x0
        ratio = _scale(later) / _scale(sigma)
        # Eq. 20 and 21, Cui et al. 2023, in this scaling: r = ξ(σ') / ξ(σ), x' = r x + (1 - r) x₀ + …
        mean = ratio * x + (1 - ratio) * x0
        width = (sigma - later) / self._points
        points = later + width * np.arange(self._points)
        if len(self._x0s) > 1:
            slope = (self._x0s[-1] - self._x0s[-2]) / (sigma - self.sigmas[k - 1])
            integral = float((width / _scale(points)).sum())
            mean = mean + (later - sigma + _scale(later) * integral) * slope
            if self._slopes:
                bend = 2 * (slope - self._slopes[0]) / (sigma - self.sigmas[k - 2])
                moment = float((width * (points - sigma) / _scale(points)).sum())
                mean = mean + ((later - sigma) ** 2 / 2 + _scale(later) * moment) * bend
            self._slopes = [slope]
        return self._renoised(mean, math.sqrt(max(0.0, later**2 - (sigma * ratio) ** 2)))


def _scale(sigma: Any) -> Any:
    """ξ(σ) of a number, or of an array"""
    # §4, Cui et al. 2023: ξ(σ) = σ (exp(σ^0.3) + 10)
    return sigma * (np.exp(sigma**0.3) + 10)
