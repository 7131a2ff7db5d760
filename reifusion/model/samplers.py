"""The other ways back from noise to a picture, behind the methods of `DDPMSampler`.

Three families for diffusion, by what they take the latents to be:

- x = √ᾱ x₀ + √(1 - ᾱ) ε, as in training: DDIM, PNDM, LCM.
- x₀ + σ ε with σ = √((1 - ᾱ) / ᾱ), which is x / √ᾱ: Euler, Euler ancestral, Heun, LMS. In this scaling
  the ODE is as simple as it gets, dx/dσ = ε (Karras et al. 2022, arXiv:2206.00364, Eq. 1 with σ(t) = t).
- x as in training, but with time measured in λ = log(√ᾱ / √(1 - ᾱ)) = -log σ, in which the ODE has an
  almost exact solution: DPM-Solver++, UniPC.

Networks trained for rectified flow have another path from noise to a picture, and a sampler in `flow.py`.

Each class is a name, a schedule and one step. `SAMPLERS` has all of them by their names.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .ddpm import SAMPLERS, Sampler, exact, leading, trailing
from .flow import FlowSampler as FlowSampler

# The training scaling: x = √ᾱ x₀ + √(1 - ᾱ) ε


class DDIMSampler(Sampler):
    """Song, Meng & Ermon 2021, "Denoising Diffusion Implicit Models", arXiv:2010.02502, with η = 0."""

    name, title = "ddim", "DDIM"

    def _alpha_bar_after(self, i: int) -> float:
        """ᾱ at the timestep after the i-th. After the last it is ᾱ₀, not 1: `set_alpha_to_one=False`."""
        if self.timesteps[i] == 0:  # only when all timesteps are used; all that is left is ᾱ = 1
            return 1.0
        return self.alphas_cumprod[self.timesteps[i + 1] if i + 1 < len(self.timesteps) else 0].item()

    def _step(self, i: int, x: Tensor, model_output: Tensor) -> Tensor:
        x0, eps = self.predict(self.timesteps[i], x, model_output)
        alpha_bar = self._alpha_bar_after(i)
        # [ddim] Eq. 12, Song et al. 2021, σₜ = 0: xₜ₋₁ = √ᾱₜ₋₁ x₀ + √(1 - ᾱₜ₋₁) ε
        return math.sqrt(alpha_bar) * x0 + math.sqrt(1 - alpha_bar) * eps


class PNDMSampler(DDIMSampler):
    """Liu et al. 2022, "Pseudo Numerical Methods for Diffusion Models on Manifolds", arXiv:2202.09778.

    DDIM's step (their Eq. 9), along a better direction: a mean over the network's last four outputs. No
    Runge-Kutta warm-up, as in Stable Diffusion (PLMS): the first step is taken twice, the second time with
    the mean of its two ends. Its second timestep therefore comes twice.
    """

    name, title = "pndm", "PLMS"

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

    def _spaced(self, n: int) -> Tensor:
        # Every (len / n)-th of the timesteps that the LCM was distilled on, mostly 50: 19, 39, …, 999. More
        # steps need a finer grid, which it was not distilled on; better than failing, but no use.
        size = max(min(self.schedule.original_inference_steps, self.num_training_steps), n)
        grid = torch.arange(size, 0, -1) * (self.num_training_steps // size) - 1
        return grid[torch.arange(n) * size // n]

    def _step(self, i: int, x: Tensor, model_output: Tensor) -> Tensor:
        t = int(self.timesteps[i])
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
        alpha_bar = self.alphas_cumprod[self.timesteps[i + 1]].item()
        return math.sqrt(alpha_bar) * f + math.sqrt(1 - alpha_bar) * self._noise(x)


# The scaling x₀ + σ ε

# With zero terminal SNR, σ = √((1 - ᾱ) / ᾱ) would begin at ∞. The reference has it begin at 4096.
_LEAST_ALPHA_BAR = 2.0**-24


class EulerSampler(Sampler):
    """Karras et al. 2022, arXiv:2206.00364, Algorithm 1's Euler step, without churn.

    `sigmas` has one more entry than `timesteps`: σ after the last step is 0.
    """

    name, title = "euler", "Euler"
    _least_alpha_bar = _LEAST_ALPHA_BAR

    def _begin(self, timesteps: Tensor) -> None:
        super()._begin(timesteps)
        self.sigmas = _sigmas(self.alphas_cumprod[timesteps])

    # x₀ + σ ε is the training scaling's x over √ᾱ. The next three methods are all that this changes.

    @property
    def init_noise_sigma(self) -> float:
        """The factor by which standard normal noise is multiplied to begin with: 1 / √ᾱ = √(σ² + 1)."""
        return math.sqrt(self.sigmas[0] ** 2 + 1)

    def scale_model_input(self, x: Tensor, t: float | Tensor) -> Tensor:
        """The latents as the network wants to see them at timestep t: √ᾱ x = x / √(σ² + 1)."""
        signal, _ = self._signal_and_noise(t, exact(x))
        return (signal * exact(x)).to(x.dtype)

    def add_noise(self, x0: Tensor, t: float | Tensor, noise: Tensor | None = None) -> Tensor:
        """x₀ + σₜ ε: `Sampler.add_noise` in this scaling."""
        signal, _ = self._signal_and_noise(t, exact(x0))
        return (super().add_noise(exact(x0), t, noise) / signal).to(x0.dtype)

    def _step(self, i: int, x: Tensor, model_output: Tensor) -> Tensor:
        # [score] Eq. 1 and 3, Karras et al. 2022: dx/dσ = -σ ∇ log p(x) = (x - x₀) / σ, which is ε
        _, d = self.predict(self.timesteps[i], x, model_output)
        # [euler] Algorithm 1, line 5, Karras et al. 2022: xᵢ₊₁ = xᵢ + (tᵢ₊₁ - tᵢ) dᵢ
        return x + (self.sigmas[i + 1] - self.sigmas[i]) * d


def _sigmas(alpha_bar: Tensor) -> list[float]:
    # [sigma] §4.3, Song et al. 2021: σ = √(1 - ᾱ) / √ᾱ
    return [*((1 - alpha_bar) / alpha_bar).sqrt().tolist(), 0.0]


class EulerAncestralSampler(EulerSampler):
    """Euler's step to less noise than planned, then fresh noise on top. From k-diffusion (Crowson 2022)."""

    name, title = "euler_a", "Euler a"

    def _step(self, i: int, x: Tensor, model_output: Tensor) -> Tensor:
        _, d = self.predict(self.timesteps[i], x, model_output)
        sigma, sigma_next = self.sigmas[i], self.sigmas[i + 1]
        # [ancestral] Eq. 16, Song et al. 2021, η = 1, in this scaling: σ_up² = σ'² (σ² - σ'²) / σ²
        sigma_up = sigma_next * math.sqrt(sigma**2 - sigma_next**2) / sigma
        # so that the two noises together are σ'² = σ_down² + σ_up²
        sigma_down = math.sqrt(sigma_next**2 - sigma_up**2)
        x = x + (sigma_down - sigma) * d
        return x + sigma_up * self._noise(x) if sigma_next > 0 else x


class HeunSampler(EulerSampler):
    """Karras et al. 2022, Algorithm 1: Euler's step, then again with the mean of the slopes at its two ends.

    Two calls of the network for a step, but one for the last: all timesteps but the first come twice.
    """

    name, title = "heun", "Heun"

    def _begin(self, timesteps: Tensor) -> None:
        super()._begin(timesteps)
        self.timesteps = torch.cat([timesteps[:1], timesteps[1:].repeat_interleave(2)])

    def _step(self, i: int, x: Tensor, model_output: Tensor) -> Tensor:
        _, d = self.predict(self.timesteps[i], x, model_output)
        delta = self.sigmas[i // 2 + 1] - self.sigmas[i // 2]
        if i % 2 == 0:
            # Algorithm 1, line 5: xᵢ₊₁ = xᵢ + (tᵢ₊₁ - tᵢ) dᵢ
            self._x, self._d = x, d
            return x + delta * d
        # [heun] Algorithm 1, line 8, Karras et al. 2022: xᵢ₊₁ = xᵢ + (tᵢ₊₁ - tᵢ) (½ dᵢ + ½ dᵢ')
        return self._x + delta * (self._d + d) / 2


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


# The training scaling again, with time measured in λ = log(αₜ / σₜ) = -log σ


class DPMPP2MSampler(Sampler):
    """Lu et al. 2022, "DPM-Solver++", arXiv:2211.01095, second order multistep (Algorithm 2).

    In λ, the equation's linear part is solved exactly, and x₀ as a function of λ is a line through the
    last two predictions. First and last steps are of first order, with the newest prediction alone.
    `sigmas` has one more entry than `timesteps`: σ after the last step is 0.
    """

    name, title = "dpmpp_2m", "DPM++ 2M"
    _least_alpha_bar = _LEAST_ALPHA_BAR

    def _spaced(self, n: int) -> Tensor:
        # `linspace`: n + 1 even points on 0 … N - 1, without the 0. That leaves N - 1 timesteps to choose
        # from; for n = N, where the reference repeats one and divides by zero, the 0 is used as well.
        if self.schedule.zero_terminal_snr or self.schedule.timestep_spacing == "trailing":
            return trailing(n, self.num_training_steps)
        if n == self.num_training_steps:
            return leading(n, n)
        spacing = (self.num_training_steps - 1) / n
        return (torch.arange(n, 0, -1, dtype=torch.float64) * spacing).round().long()

    def _begin(self, timesteps: Tensor) -> None:
        super()._begin(timesteps)
        self.sigmas = _sigmas(self.alphas_cumprod[timesteps])
        self._x0s: list[Tensor] = []  # the last two predictions of x₀, newest last

    def _lambda(self, i: int) -> float:
        return -math.log(self.sigmas[i]) if self.sigmas[i] > 0 else math.inf

    def _step(self, i: int, x: Tensor, model_output: Tensor) -> Tensor:
        x0, _ = self.predict(self.timesteps[i], x, model_output)
        self._x0s = [*self._x0s[-1:], x0]
        return self._advance(i, x)

    def _advance(self, i: int, x: Tensor) -> Tensor:
        h = self._lambda(i + 1) - self._lambda(i)
        # [dpmpp-2m] Algorithm 2, Lu et al. 2022: xᵢ = σᵢ / σᵢ₋₁ xᵢ₋₁ - αᵢ (e⁻ʰ - 1) Dᵢ
        sigma_ratio = _vp_sigma(self.sigmas[i + 1]) / _vp_sigma(self.sigmas[i])
        return sigma_ratio * x - _vp_alpha(self.sigmas[i + 1]) * math.expm1(-h) * self._direction(i, h)

    def _direction(self, i: int, h: float) -> Tensor:
        if len(self._x0s) == 1 or i == len(self.timesteps) - 1:
            return self._x0s[-1]
        r = (self._lambda(i) - self._lambda(i - 1)) / h
        # Algorithm 2, Lu et al. 2022: rᵢ = hᵢ₋₁ / hᵢ, Dᵢ = (1 + 1 / 2rᵢ) x₀⁽ⁱ⁻¹⁾ - 1 / 2rᵢ x₀⁽ⁱ⁻²⁾
        return (1 + 1 / (2 * r)) * self._x0s[-1] - 1 / (2 * r) * self._x0s[-2]


def _vp_alpha(sigma: float) -> float:
    """αₜ = √ᾱₜ in the training (variance preserving) scaling, from σ = σₜ / αₜ."""
    return 1 / math.sqrt(sigma**2 + 1)


def _vp_sigma(sigma: float) -> float:
    """σₜ = √(1 - ᾱₜ) in the training (variance preserving) scaling, from σ = σₜ / αₜ."""
    return sigma / math.sqrt(sigma**2 + 1)


class DPMPP2MKarrasSampler(DPMPP2MSampler):
    """The same, with Karras et al. 2022's choice of σ: many small steps at the end, where details form.

    The network is told the nearest whole timestep, so with many steps `timesteps` repeats some. Up
    to 60 steps, diffusers, in float32, rounds one timestep to the other side of a half for 18, 35, 43 and 52.
    """

    name, title = "dpmpp_2m_karras", "DPM++ 2M Karras"

    def _spaced(self, n: int) -> Tensor:
        table = ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt()
        rho, sigma_min, sigma_max = 7.0, table[0].item(), table[-1].item()
        # [karras-sigmas] Eq. 5, Karras et al. 2022: σᵢ = (σ_max^(1/ρ) + i/(n-1)(σ_min^(1/ρ) - σ_max^(1/ρ)))^ρ
        low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
        self._karras = (high + torch.linspace(0, 1, n, dtype=torch.float64) * (low - high)) ** rho
        # and back to timesteps: log σ between two neighbours is taken to be a line
        t = np.interp(self._karras.log().numpy(), table.log().numpy(), np.arange(len(table)))
        return torch.from_numpy(t).round().long()

    def _begin(self, timesteps: Tensor) -> None:
        super()._begin(timesteps)
        self.sigmas = [*self._karras[-len(timesteps) :].tolist(), 0.0]

    def _signal_and_noise(self, t: float | Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        # A step's σ is not quite that of its rounded timestep. Timesteps outside the schedule have their own.
        alpha_bar = [
            _vp_alpha(self.sigmas[self._index(u)]) ** 2
            if u in self.timesteps
            else self.alphas_cumprod[u].item()
            for u in torch.as_tensor(t).long().flatten().tolist()
        ]
        if len(alpha_bar) == 1:
            return x.new_full((), math.sqrt(alpha_bar[0])), x.new_full((), math.sqrt(1 - alpha_bar[0]))
        a = torch.tensor(alpha_bar, dtype=torch.float64).reshape(-1, *[1] * (x.ndim - 1))
        return a.sqrt().to(x.dtype).to(x.device), (1 - a).sqrt().to(x.dtype).to(x.device)


class DPMPPSDESampler(DPMPP2MSampler):
    """SDE-DPM-Solver++(2M) of Lu et al. 2022: DPM-Solver++ with fresh noise at every step.

    diffusers' `algorithm_type="sde-dpmsolver++"`. k-diffusion's "DPM++ SDE" is another, of two calls a step.
    """

    name, title = "dpmpp_sde", "DPM++ 2M SDE"

    def _advance(self, i: int, x: Tensor) -> Tensor:
        h = self._lambda(i + 1) - self._lambda(i)
        alpha, sigma = _vp_alpha(self.sigmas[i + 1]), _vp_sigma(self.sigmas[i + 1])
        # [dpmpp-sde] SDE-DPM-Solver++(2M), Lu et al. 2022:
        # xᵢ = σᵢ / σᵢ₋₁ e⁻ʰ xᵢ₋₁ + αᵢ (1 - e⁻²ʰ) Dᵢ + σᵢ √(1 - e⁻²ʰ) z
        mean = sigma / _vp_sigma(self.sigmas[i]) * math.exp(-h) * x
        mean = mean - alpha * math.expm1(-2 * h) * self._direction(i, h)
        return mean + sigma * math.sqrt(-math.expm1(-2 * h)) * self._noise(x) if sigma > 0 else mean


class UniPCSampler(DPMPP2MSampler):
    """Zhao et al. 2023, "UniPC", arXiv:2302.04867: order 2, x₀ prediction, B(h) = eʰ - 1 ("bh2").

    Its predictor (UniP-2) is DPM-Solver++'s step. Its corrector (UniC) then uses what the network says at
    the point reached, which the next step needs anyway, to take the step before once more, better.
    """

    name, title = "unipc", "UniPC"

    def _step(self, i: int, x: Tensor, model_output: Tensor) -> Tensor:
        x0, _ = self.predict(self.timesteps[i], x, model_output)
        if self._x0s:
            x = self._correct(i, x0)
        self._x0s = [*self._x0s[-1:], x0]
        self._last_x = x
        return self._advance(i, x)

    def _correct(self, i: int, x0: Tensor) -> Tensor:
        """The step from i - 1 to i again, knowing x0 at i."""
        h = self._lambda(i) - self._lambda(i - 1)
        alpha, newest = _vp_alpha(self.sigmas[i]), self._x0s[-1]
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
        sigma_ratio = _vp_sigma(self.sigmas[i]) / _vp_sigma(self.sigmas[i - 1])
        return sigma_ratio * self._last_x - alpha * b * newest - alpha * b * correction


def samplers_for(prediction_type: str) -> list[str]:
    """The names of the samplers that fit networks with that output."""
    return [name for name, kind in SAMPLERS.items() if prediction_type in kind.prediction_types]
