"""More ways back from noise to a picture: multistep methods, and the sampler of distilled networks.

Read `samplers.py` first, on whose classes these build, and which has them by their names too.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .ddpm import Sampler
from .samplers import DDIMSampler, DPMPP2MSampler, EulerSampler, vp_alpha, vp_sigma


class PNDMSampler(DDIMSampler):
    """Liu et al. 2022, "Pseudo Numerical Methods for Diffusion Models on Manifolds", arXiv:2202.09778.

    DDIM's step (their Eq. 9), along a better direction: a mean over the network's last four outputs. No
    Runge-Kutta warm-up, as in Stable Diffusion (PLMS): the first step is taken twice, the second time with
    the mean of its two ends. Its second timestep therefore comes twice.
    """

    name, title = "pndm", "PLMS"
    eta, s_noise = None, None

    def _begin(self, timesteps: Tensor) -> None:
        super()._begin(torch.cat([timesteps[:2], timesteps[1:]]))
        self._outputs: list[Tensor] = []  # the network's last four, newest last
        self._first_x: Tensor | None = None

    def _step(self, i: int, x: Tensor, model_output: Tensor) -> Tensor:
        if i == 1 and self._first_x is not None:  # the first step again
            i, x = 0, self._first_x
            model_output = (self._outputs[-1] + model_output) / 2
            self._first_x = None
        else:
            self._first_x = x if i == 0 else None
            self._outputs = [*self._outputs[-3:], model_output]
            # [plms] Eq. 12, Liu et al. 2022: Adams-Bashforth, of an order that grows to 4. As in the
            # reference, the mean is of the outputs as they are, velocities too.
            weights = _ADAMS_BASHFORTH[len(self._outputs) - 1]
            terms = (w * output for w, output in zip(weights, reversed(self._outputs), strict=True))
            model_output = sum(terms, start=torch.zeros_like(x))
        return super()._step(i, x, model_output)


_ADAMS_BASHFORTH = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


class LCMSampler(Sampler):
    """Luo et al. 2023, "Latent Consistency Models", arXiv:2310.04378. For networks distilled for it.

    Each step guesses the clean latents outright, then adds fresh noise for the next guess.
    """

    name, title = "lcm", "LCM"
    s_noise = 1.0

    def _spaced(self, n: int) -> Tensor:
        # Every (len / n)-th of the timesteps that the LCM was distilled on, mostly 50: 19, 39, …, 999. More
        # steps need a finer grid, which it was not distilled on and which begins below all noise, as in the
        # reference; better than failing, but no use.
        size = max(min(self.schedule.original_inference_steps, self.num_training_steps), n)
        grid = torch.arange(size, 0, -1) * (self.num_training_steps // size) - 1
        return grid[torch.arange(n) * size // n]

    def _step(self, i: int, x: Tensor, model_output: Tensor) -> Tensor:
        t = self.timesteps[i].item()
        x0, _ = self.predict(t, x, model_output)
        # c_skip falls from 1 and c_out rises from 0 at t = 0, where the clean latents are the latents: the
        # boundary condition of consistency models (Song et al. 2023, §3). Both constants are the reference's.
        sigma_data, s = 0.5, 10 * t
        c_skip = sigma_data**2 / (s**2 + sigma_data**2)
        c_out = s / math.sqrt(s**2 + sigma_data**2)
        # Eq. 9, Luo et al. 2023: f(x, t) = c_skip x + c_out x₀
        f = c_skip * x + c_out * x0
        if i == len(self.timesteps) - 1:
            return f
        # Algorithm 3, Luo et al. 2023: xₜ₋₁ ~ N(√ᾱₜ₋₁ f, (1 - ᾱₜ₋₁) I)
        alpha_bar = self.alpha_bar(self.timesteps[i + 1]).item()
        return math.sqrt(alpha_bar) * f + math.sqrt(1 - alpha_bar) * self._noise(x)


class LMSSampler(EulerSampler):
    """A linear multistep (Adams-Bashforth) method, for uneven steps. From k-diffusion (Crowson 2022).

    A polynomial through the last four slopes is integrated from σᵢ to σᵢ₊₁.
    """

    name, title = "lms", "LMS"

    def _begin(self, timesteps: Tensor) -> None:
        super()._begin(timesteps)
        self._slopes: list[Tensor] = []  # the last four, newest first

    def _step(self, i: int, x: Tensor, model_output: Tensor) -> Tensor:
        _, d = self.predict(self.timesteps[i], x, model_output)
        self._slopes = [d, *self._slopes[:3]]
        knots = self.sigmas[i - len(self._slopes) + 1 : i + 1][::-1]
        # [lms] Crowson 2022: xᵢ₊₁ = xᵢ + Σⱼ dᵢ₋ⱼ ∫ ℓⱼ(σ) dσ; ℓⱼ, a cubic, is 1 at its knot, 0 at the others
        for j, slope in enumerate(self._slopes):
            x = x + _integral_of_lagrange(j, knots, self.sigmas[i], self.sigmas[i + 1]) * slope
        return x


def _integral_of_lagrange(j: int, knots: list[float], start: float, end: float) -> float:
    """∫ of the j-th Lagrange polynomial: Gauss's rule with two points, which is exact up to cubics."""
    middle, half = (start + end) / 2, (end - start) / 2
    points = (middle - half / math.sqrt(3), middle + half / math.sqrt(3))
    others = [knot for k, knot in enumerate(knots) if k != j]
    return half * sum(math.prod((p - knot) / (knots[j] - knot) for knot in others) for p in points)


class DPMPPSDESampler(DPMPP2MSampler):
    """SDE-DPM-Solver++(2M) of Lu et al. 2022: DPM-Solver++ with fresh noise at every step.

    diffusers' `algorithm_type="sde-dpmsolver++"`. k-diffusion's "DPM++ SDE" is another, of two calls a step.
    """

    name, title = "dpmpp_sde", "DPM++ 2M SDE diffusers"
    s_noise = 1.0

    def _advance(self, i: int, x: Tensor) -> Tensor:
        h = self._lambda(i + 1) - self._lambda(i)
        alpha, sigma = vp_alpha(self.sigmas[i + 1]), vp_sigma(self.sigmas[i + 1])
        # [dpmpp-sde] SDE-DPM-Solver++(2M), Lu et al. 2022:
        # xᵢ = σᵢ / σᵢ₋₁ e⁻ʰ xᵢ₋₁ + αᵢ (1 - e⁻²ʰ) Dᵢ + σᵢ √(1 - e⁻²ʰ) z
        mean = sigma / vp_sigma(self.sigmas[i]) * math.exp(-h) * x
        mean = mean - alpha * math.expm1(-2 * h) * self._direction(i, h)
        return mean + sigma * math.sqrt(-math.expm1(-2 * h)) * self._noise(x) if sigma > 0 else mean


class UniPCSampler(DPMPP2MSampler):
    """Zhao et al. 2023, "UniPC", arXiv:2302.04867: order 2, x₀ prediction, B(h) = eʰ - 1 ("bh2").

    Its predictor (UniP-2) is DPM-Solver++'s step. Its corrector (UniC) then uses what the network says at
    the point reached, which the next step needs anyway, to take the step before once more, better.
    """

    name, title = "unipc", "UniPC"
    _reached: Tensor  # by the last step

    def _step(self, i: int, x: Tensor, model_output: Tensor) -> Tensor:
        x0, _ = self.predict(self.timesteps[i], x, model_output)
        if self._x0s:
            x = self._correct(i, x0) + (x - self._reached)  # and what the caller has changed since
        self._x0s = [*self._x0s[-1:], x0]
        self._last_x = x
        self._reached = self._advance(i, x)
        return self._reached

    def _correct(self, i: int, x0: Tensor) -> Tensor:
        """The step from i - 1 to i again, knowing x0 at i."""
        h = self._lambda(i) - self._lambda(i - 1)
        alpha, newest = vp_alpha(self.sigmas[i]), self._x0s[-1]
        b = math.expm1(-h)  # B, and φ₁
        # UniC-p, Zhao et al. 2023: xᵢ = σᵢ / σᵢ₋₁ xᵢ₋₁ - αᵢ (e⁻ʰ - 1) x₀⁽ⁱ⁻¹⁾ - αᵢ B Σₘ ρₘ Dₘ / rₘ
        if len(self._x0s) == 1:
            correction = 0.5 * (x0 - newest)
        else:
            # The weights ρ solve ρ₁ + ρ₂ = φ₂ / B and r₁ ρ₁ + ρ₂ = 2 φ₃ / B, so that the step is exact
            # when x₀ is a parabola in λ. φₖ₊₁ = φₖ / (-h) - 1 / k!
            r = (self._lambda(i - 2) - self._lambda(i - 1)) / h
            phi2 = b / -h - 1
            phi3 = phi2 / -h - 1 / 2
            rho1 = (phi2 / b - 2 * phi3 / b) / (1 - r)
            rho2 = phi2 / b - rho1
            correction = rho1 * (self._x0s[-2] - newest) / r + rho2 * (x0 - newest)
        sigma_ratio = vp_sigma(self.sigmas[i]) / vp_sigma(self.sigmas[i - 1])
        return sigma_ratio * self._last_x - alpha * b * newest - alpha * b * correction
