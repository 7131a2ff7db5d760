"""The other ways back from noise to a picture, behind the methods of `DDPMSampler`.

Three families for diffusion, by what they take the latents to be:

- x = √ᾱ x₀ + √(1 - ᾱ) ε, as in training: DDIM.
- x₀ + σ ε with σ = √((1 - ᾱ) / ᾱ), which is x / √ᾱ: Euler, Euler ancestral, Heun. In this scaling
  the ODE is as simple as it gets, dx/dσ = ε (Karras et al. 2022, arXiv:2206.00364, Eq. 1 with σ(t) = t).
- x as in training, but with time measured in λ = log(√ᾱ / √(1 - ᾱ)) = -log σ, in which the ODE has an
  almost exact solution: DPM-Solver++.

Networks trained for rectified flow have another path from noise to a picture, and a sampler in `flow.py`.

Each class is a name, a schedule and one step. `SAMPLERS` has all of them by their names, and those of
`further_samplers.py` too, which build on these.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .ddpm import SAMPLERS, Sampler, broadcast, exact
from .flow import FlowSampler as FlowSampler
from .spacing import linspace, place_of

# The training scaling: x = √ᾱ x₀ + √(1 - ᾱ) ε


class DDIMSampler(Sampler):
    """Song, Meng & Ermon 2021, "Denoising Diffusion Implicit Models", arXiv:2010.02502."""

    name, title = "ddim", "DDIM"
    eta: float | None = 0.0  # η: 0 adds no noise, and 1 is DDPM
    s_noise: float | None = 1.0

    def _alpha_bar_after(self, i: int) -> float:
        """ᾱ at the timestep after the i-th. After the last it is ᾱ₀, not 1: `set_alpha_to_one=False`."""
        if self.timesteps[i] == 0:  # with all timesteps, or some schedules; all that is left is ᾱ = 1
            return 1.0
        later = self.timesteps[i + 1] if i + 1 < len(self.timesteps) else torch.tensor(0)
        return self.alpha_bar(later).item()

    def _step(self, i: int, x: Tensor, model_output: Tensor) -> Tensor:
        x0, eps = self.predict(self.timesteps[i], x, model_output)
        alpha_bar = self._alpha_bar_after(i)
        if self.eta:
            return self._step_with_noise(i, alpha_bar, x0, eps)
        # [ddim] Eq. 12, Song et al. 2021, σₜ = 0: xₜ₋₁ = √ᾱₜ₋₁ x₀ + √(1 - ᾱₜ₋₁) ε
        return math.sqrt(alpha_bar) * x0 + math.sqrt(1 - alpha_bar) * eps

    def _step_with_noise(self, i: int, alpha_bar: float, x0: Tensor, eps: Tensor) -> Tensor:
        before = self.alpha_bar(self.timesteps[i]).item()
        # Eq. 16, Song et al. 2021: σₜ² = η² (1 - ᾱₜ₋₁) / (1 - ᾱₜ) (1 - ᾱₜ / ᾱₜ₋₁)
        variance = (self.eta or 0.0) ** 2 * (1 - alpha_bar) / (1 - before) * (1 - before / alpha_bar)
        # Eq. 12, Song et al. 2021: xₜ₋₁ = √ᾱₜ₋₁ x₀ + √(1 - ᾱₜ₋₁ - σₜ²) ε + σₜ z
        mean = math.sqrt(alpha_bar) * x0 + math.sqrt(max(0.0, 1 - alpha_bar - variance)) * eps
        return mean + math.sqrt(variance) * self._noise(x0)


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
        self.sigmas = _sigmas(self.alpha_bar(timesteps))

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
    eta, s_noise = 1.0, 1.0  # η: 0 is Euler's method

    def _step(self, i: int, x: Tensor, model_output: Tensor) -> Tensor:
        _, d = self.predict(self.timesteps[i], x, model_output)
        sigma, sigma_next = self.sigmas[i], self.sigmas[i + 1]
        # [ancestral] Eq. 16, Song et al. 2021, in this scaling: σ_up² = η² σ'² (σ² - σ'²) / σ²
        sigma_up = (self.eta or 0.0) * sigma_next * math.sqrt(sigma**2 - sigma_next**2) / sigma
        # so that the two noises together are σ'² = σ_down² + σ_up²
        sigma_down = math.sqrt(sigma_next**2 - sigma_up**2)
        x = x + (sigma_down - sigma) * d
        return x + sigma_up * self._noise(x) if sigma_up > 0 else x


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
        if self.schedule.zero_terminal_snr or self.schedule.timestep_spacing == "trailing":
            return super()._spaced(n)
        return linspace(n, self.num_training_steps)

    def _begin(self, timesteps: Tensor) -> None:
        super()._begin(timesteps)
        self.sigmas = _sigmas(self.alpha_bar(timesteps))
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
        sigma_ratio = vp_sigma(self.sigmas[i + 1]) / vp_sigma(self.sigmas[i])
        return sigma_ratio * x - vp_alpha(self.sigmas[i + 1]) * math.expm1(-h) * self._direction(i, h)

    def _direction(self, i: int, h: float) -> Tensor:
        if len(self._x0s) == 1 or i == len(self.timesteps) - 1:
            return self._x0s[-1]
        r = (self._lambda(i) - self._lambda(i - 1)) / h
        # Algorithm 2, Lu et al. 2022: rᵢ = hᵢ₋₁ / hᵢ, Dᵢ = (1 + 1 / 2rᵢ) x₀⁽ⁱ⁻¹⁾ - 1 / 2rᵢ x₀⁽ⁱ⁻²⁾
        return (1 + 1 / (2 * r)) * self._x0s[-1] - 1 / (2 * r) * self._x0s[-2]


def vp_alpha(sigma: float) -> float:
    """αₜ = √ᾱₜ in the training (variance preserving) scaling, from σ = σₜ / αₜ."""
    return 1 / math.sqrt(sigma**2 + 1)


def vp_sigma(sigma: float) -> float:
    """σₜ = √(1 - ᾱₜ) in the training (variance preserving) scaling, from σ = σₜ / αₜ."""
    return sigma / math.sqrt(sigma**2 + 1)


class DPMPP2MKarrasSampler(DPMPP2MSampler):
    """The same, with Karras et al. 2022's choice of σ: many small steps at the end, where details form.

    The network is told the nearest whole timestep, so with many steps `timesteps` repeats some. Up
    to 60 steps, diffusers, in float32, rounds one timestep to the other side of a half for 18, 35, 43 and 52.
    """

    name, title = "dpmpp_2m_karras", "DPM++ 2M Karras"
    own_schedule = True

    def _spaced(self, n: int) -> Tensor:
        table = ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt()
        rho, sigma_min, sigma_max = 7.0, table[0].item(), table[-1].item()
        # [karras-sigmas] Eq. 5, Karras et al. 2022: σᵢ = (σ_max^(1/ρ) + i/(n-1)(σ_min^(1/ρ) - σ_max^(1/ρ)))^ρ
        low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
        self._karras = (high + torch.linspace(0, 1, n, dtype=torch.float64) * (low - high)) ** rho
        return place_of(self._karras, table).round().long()

    def _begin(self, timesteps: Tensor) -> None:
        super()._begin(timesteps)
        self.sigmas = [*self._karras[-len(timesteps) :].tolist(), 0.0]

    def _signal_and_noise(self, t: float | Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        # A step's σ is not quite that of its rounded timestep. Timesteps outside the schedule have their own.
        alpha_bar = [
            vp_alpha(self.sigmas[self._index(u)]) ** 2
            if u in self.timesteps
            else self.alphas_cumprod[u].item()
            for u in torch.as_tensor(t).long().flatten().tolist()
        ]
        a = torch.tensor(alpha_bar[0] if len(alpha_bar) == 1 else alpha_bar, dtype=torch.float64)
        return broadcast(a.sqrt(), x), broadcast((1 - a).sqrt(), x)


def samplers_for(prediction_type: str) -> list[str]:
    """The names of the samplers that fit networks with that output."""
    return [name for name, kind in SAMPLERS.items() if prediction_type in kind.prediction_types]


# The others, which build on these classes.
from .further_samplers import DPMPPSDESampler as DPMPPSDESampler  # noqa: E402
from .further_samplers import LCMSampler as LCMSampler  # noqa: E402
from .further_samplers import LMSSampler as LMSSampler  # noqa: E402
from .further_samplers import PNDMSampler as PNDMSampler  # noqa: E402
from .further_samplers import UniPCSampler as UniPCSampler  # noqa: E402
