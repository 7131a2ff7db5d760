"""Rectified flow: a straight line joins picture and noise, x = (1 - σ) x₀ + σ ε; Euler walks back on it."""

from __future__ import annotations

import torch
from torch import Tensor

from .ddpm import Sampler, broadcast, exact, is_there
from .spacing import sigma_at


class FlowSampler(Sampler):
    """Liu et al. 2022, "Flow Straight and Fast", arXiv:2209.03003; Lipman et al. 2022, arXiv:2210.02747.

    Picture and noise are joined by a straight line, and the network is trained to say its direction.
    Sampling follows that from σ = 1, all noise, to 0 with Euler's method, in n steps, even ones unless the
    schedule has a `shift`. The timesteps, t = Nσ in (0, N], are fractions, in float64; the βs play no part.
    `sigmas` has one more entry than `timesteps`: σ after the last step is 0. These σ are shares of noise, in
    [0, 1]; `sigma(t)` is the noise beside one part of signal, σ / (1 - σ), as for all samplers.
    """

    name, title = "flow", "Flow Euler"
    prediction_types = ("flow",)

    def _spaced(self, n: int) -> Tensor:
        total, s = self.num_training_steps, self.schedule.shift
        if s is None:
            return torch.arange(n, 0, -1, dtype=torch.float64) / n * total
        # The last σ is the least in training, where it is shifted already. It is shifted once more, as in
        # Stability's code and in diffusers.
        least = shifted(torch.tensor(1 / total, dtype=torch.float64), s)
        return total * shifted(torch.linspace(1, least.item(), n, dtype=torch.float64), s)

    def _training_sigmas(self) -> Tensor:
        sigmas = torch.arange(1, self.num_training_steps + 1, dtype=torch.float64) / self.num_training_steps
        return shifted(sigmas, self.schedule.shift or 1.0)

    def _at(self, places: Tensor) -> Tensor:
        return self.num_training_steps * sigma_at(places, self._training_sigmas())

    def set_strength(self, strength: float) -> None:
        """As `Sampler.set_strength`, but the number of steps that are kept is rounded up."""
        super().set_strength(strength)
        n = self.num_inference_steps
        self.skip(min(int(n - n * strength), n - 1))

    def _begin(self, timesteps: Tensor) -> None:
        super()._begin(timesteps)
        self.sigmas = [*(timesteps / self.num_training_steps).tolist(), 0.0]

    def _signal_and_noise(self, t: float | Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        # [flow-path] Eq. 1, Liu et al. 2022, with σ for 1 - t: x_σ = (1 - σ) x₀ + σ ε
        if not is_there(t, x):
            sigma = float(t) / self.num_training_steps
            return x.new_full((), 1 - sigma), x.new_full((), sigma)
        t = (t.cpu() if t.device.type == "mps" else t).double()  # which a Mac's GPU does not have
        sigmas = t.reshape(-1) / self.num_training_steps
        return broadcast(1 - sigmas, x), broadcast(sigmas, x)

    def velocity(self, x0: Tensor, t: float | Tensor, noise: Tensor) -> Tensor:
        """The target of a flow network: dx/dσ, the same at every t."""
        # [flow-velocity] Eq. 1, Liu et al. 2022: v = dx/dσ = ε - x₀
        return (noise.to(x0.device) - exact(x0)).to(x0.dtype)

    def predict(self, t: float | Tensor, latents: Tensor, model_output: Tensor) -> tuple[Tensor, Tensor]:
        """(x₀, ε): the two ends of the line through `latents`. See `Sampler.predict`."""
        x, v = exact(latents), exact(model_output)
        signal, sigma = self._signal_and_noise(t, x)
        # x = (1 - σ) x₀ + σ ε with v = ε - x₀, solved for both: x₀ = x - σ v and ε = x + (1 - σ) v
        return (x - sigma * v).to(latents.dtype), (x + signal * v).to(latents.dtype)

    def _step(self, i: int, x: Tensor, model_output: Tensor) -> Tensor:
        # [flow-euler] Algorithm 1, Liu et al. 2022: dx/dσ = v, in Euler's steps: x' = x + (σ' - σ) v
        return x + (self.sigmas[i + 1] - self.sigmas[i]) * model_output


def shifted(sigma: Tensor, s: float) -> Tensor:
    """σ in [0, 1], nearer to 1 for s > 1: a large picture needs more noise before nothing is seen of it."""
    # [flow-shift] Eq. 23, Esser et al. 2024: σ ← s σ / (1 + (s - 1) σ), with s = √(m / n) for m pixels
    return s * sigma / (1 + (s - 1) * sigma)
