"""What the samplers of this package share: x₀ + σ ε for every kind of network, in steps of several calls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..model.ddpm import Sampler, broadcast, exact
from ..model.flow import shifted
from ..model.samplers import EulerSampler
from ..model.spacing import SCHEDULES, place_of, sigma_at

# Where all is noise, σ is ∞. As in diffusers for networks with zero terminal SNR, it is taken for 4096.
LEAST_SIGNAL = 2.0**-12


class Solver(EulerSampler):
    """A sampler in the scaling x₀ + σ ε. Subclasses say where the network is called, and what follows.

    It suits networks for rectified flow too: x = (1 - s) x₀ + s ε, divided by 1 - s, is x₀ + σ ε with
    σ = s / (1 - s). Without a schedule in the request or of a subclass, steps are even in the timesteps, from
    the last to the first of training, as in k-diffusion and ComfyUI's "normal".
    """

    prediction_types = ("epsilon", "v_prediction", "flow")

    def _spaced(self, n: int) -> Tensor:
        return self._at(SCHEDULES["normal"](self._training_sigmas(), n))

    def _calls(self, sigma: float, later: float) -> Sequence[float]:
        """The σ at which the network is called on the way from σ to the later one; σ itself comes first."""
        return (sigma,)

    def _plan(self, sigmas: list[float]) -> list[tuple[float, float]]:
        """The steps, each from one σ to another; where a step begins above the last, noise is added."""
        return [*pairwise(sigmas)]

    def _begin(self, timesteps: Tensor) -> None:
        Sampler._begin(self, timesteps)
        signal, noise = self._signal_and_noise(timesteps, torch.zeros(len(timesteps), dtype=torch.float64))
        self.sigmas = [*(noise / signal).tolist(), 0.0]
        self._steps = self._plan(self.sigmas)
        calls = [(k, call) for k, step in enumerate(self._steps) for call in enumerate(self._calls(*step))]
        self._at_call = [(k, place) for k, (place, _) in calls]
        if [sigma for _, (_, sigma) in calls] != self.sigmas[:-1]:  # not once at each
            known = dict(zip(self.sigmas, timesteps.double().tolist()))
            times = [known[sigma] if sigma in known else self._time(sigma) for _, (_, sigma) in calls]
            self.timesteps = torch.tensor(times, dtype=torch.float64)
        self._x0s: list[Tensor] = []  # the predictions of x₀ in the last steps, newest last
        self._slopes: list[Tensor] = []  # what else a sampler remembers of them, newest last

    def _step(self, i: int, x: Tensor, model_output: Tensor) -> Tensor:
        k, place = self._at_call[i]
        x0, _ = self.predict(self.timesteps[i], x, model_output)
        if place == 0:
            self._x, self._x0s = x, [*self._x0s[-3:], x0]
        x = self._go(k, place, x, x0)
        if i + 1 == len(self._at_call) or self._at_call[i + 1][0] == k:
            return x
        (_, end), (begin, _) = self._steps[k], self._steps[k + 1]
        return self._renoised(x, math.sqrt(begin**2 - end**2)) if begin > end else x

    def _go(self, k: int, place: int, x: Tensor, x0: Tensor) -> Tensor:
        """What follows the call at this place of step k: the latents for the next call.

        x: the latents at the call. x0: what the network sees in them. `_x` is x at the step's first call.
        """
        raise NotImplementedError

    def _renoised(self, x: Tensor, sigma: float) -> Tensor:
        """x with fresh noise of that σ; without any for σ = 0, and the generator stays where it is."""
        return x + sigma * self._noise(x) if sigma > 0 else x

    # Rectified flow

    def _training_sigmas(self) -> Tensor:
        if self.prediction_type != "flow":
            return super()._training_sigmas()
        total = self.num_training_steps
        return shifted(torch.arange(1, total + 1, dtype=torch.float64) / total, self.schedule.shift or 1.0)

    def _at(self, places: Tensor) -> Tensor:
        if self.prediction_type != "flow":
            return super()._at(places)
        return self.num_training_steps * sigma_at(places, self._training_sigmas())

    def _time(self, sigma: float) -> float:
        """The timestep of σ."""
        if self.prediction_type == "flow":
            return self.num_training_steps * sigma / (1 + sigma)
        return place_of(torch.tensor(sigma, dtype=torch.float64), self._training_sigmas()).item()

    def _signal_and_noise(self, t: float | Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.prediction_type != "flow":
            return super()._signal_and_noise(t, x)
        s = torch.as_tensor(t, dtype=torch.float64, device="cpu") / self.num_training_steps
        return broadcast((1 - s).clamp(min=LEAST_SIGNAL), x), broadcast(s, x)

    @property
    def init_noise_sigma(self) -> float:
        """The factor by which standard normal noise is multiplied to begin with."""
        if self.prediction_type != "flow":
            return super().init_noise_sigma
        return 1 / max(1 - self.timesteps[0].item() / self.num_training_steps, LEAST_SIGNAL)

    def velocity(self, x0: Tensor, t: float | Tensor, noise: Tensor) -> Tensor:
        """The target of a v_prediction or flow network, for the arguments of `add_noise`."""
        if self.prediction_type != "flow":
            return super().velocity(x0, t, noise)
        return (noise.to(x0.device) - exact(x0)).to(x0.dtype)

    def predict(self, t: float | Tensor, latents: Tensor, model_output: Tensor) -> tuple[Tensor, Tensor]:
        """(x₀, ε): see `Sampler.predict`."""
        if self.prediction_type != "flow":
            return super().predict(t, latents, model_output)
        signal, s = self._signal_and_noise(t, exact(latents))
        x, v = signal * exact(latents), exact(model_output)
        # x = (1 - s) x₀ + s ε with v = ε - x₀
        return (x - s * v).to(latents.dtype), (x + (1 - s) * v).to(latents.dtype)


def toward(x: Tensor, x0: Tensor, sigma: float, later: float) -> Tensor:
    """Euler's step from σ to the later one: the mix of x and x₀ that has the later σ."""
    # x + (σ' - σ) (x - x₀) / σ, in a form that keeps its digits where σ is large
    return later / sigma * x + (1 - later / sigma) * x0


def ancestral(sigma: float, later: float, eta: float | None) -> tuple[float, float]:
    """(σ_down, σ_up): how far to go without noise, and the noise that then makes it the later σ."""
    # Eq. 16, Song et al. 2021, in this scaling: σ_up² = η² σ'² (σ² - σ'²) / σ²
    up = min(later, (eta or 0.0) * later * math.sqrt(max(0.0, sigma**2 - later**2)) / sigma)
    return math.sqrt(max(0.0, later**2 - up**2)), up
