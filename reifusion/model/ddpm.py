"""The forward process (adding noise), and DDPM's way back from noise to a picture.

Ho, Jain & Abbeel 2020, "Denoising Diffusion Probabilistic Models", arXiv:2006.11239. In its symbols:
βₜ is the variance of the noise added at step t, αₜ = 1 - βₜ the part that is kept, ᾱₜ the product
of all α up to t, and ε the noise that the network learns to see in xₜ.

`Sampler` holds what all samplers share: the schedule, the choice of timesteps, `add_noise`. `DDPMSampler`
below it adds its one step; the other samplers, in `samplers.py`, do the same.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar, TypeGuard

import torch
from torch import Tensor

from . import other_betas
from .config import ScheduleConfig
from .noise import Generators as Generators
from .noise import bring
from .noise import randn as randn
from .spacing import SCHEDULES, leading, sigma_at, trailing


def betas(schedule: ScheduleConfig) -> Tensor:
    """The variances βₜ of the noise that each training step adds: (num_training_steps,), float64."""
    if schedule.beta_schedule != "scaled_linear" or schedule.trained_betas is not None:
        return other_betas.other_betas(schedule)
    start, end, count = schedule.beta_start, schedule.beta_end, schedule.num_training_steps
    # [betas] Rombach et al. 2022's code: linear in √β
    return torch.linspace(start**0.5, end**0.5, count, dtype=torch.float64) ** 2


SAMPLERS: dict[str, type[Sampler]] = {}  # every sampler, by its name


class Sampler:
    """The noise schedule, and the methods that every sampler has. Subclasses add `name` and `_step`.

    generator: see `randn`. schedule: the forward process that the network was trained on; None for Stable
    Diffusion 1.5's, a number for the same with that many training steps. fields: fields of `ScheduleConfig`
    that differ from it, as in `beta_end=0.02`. Raises ValueError for a schedule that does not exist or that
    the sampler cannot undo.

    A new sampler has all num_training_steps timesteps; `set_inference_timesteps` picks fewer.
    Steps are computed in float32, or float64 for float64 latents, and returned in the latents' dtype.
    """

    name: ClassVar[str]  # how a request names it; a subclass that has its own is listed in SAMPLERS
    title: ClassVar[str]  # the name that people know from other programs; if there is none, the same
    prediction_types: ClassVar[tuple[str, ...]] = ("epsilon", "v_prediction")  # the networks that it fits
    own_schedule: ClassVar[bool] = False  # True if its schedule is a part of it, and it takes no other
    eta: float | None = None  # the share of fresh noise in a step, in [0, 1]; None: it cannot be chosen
    s_noise: float | None = None  # the factor of that noise; None: there is none
    _least_alpha_bar: ClassVar[float] = 0.0

    def __init_subclass__(cls) -> None:
        if "name" in vars(cls):
            cls.title = vars(cls).get("title", cls.name)
            SAMPLERS[cls.name] = cls

    def __init__(
        self, generator: Generators = None, schedule: ScheduleConfig | int | None = None, **fields: Any
    ) -> None:
        if not isinstance(schedule, ScheduleConfig):
            steps = ScheduleConfig.num_training_steps if schedule is None else schedule
            schedule = ScheduleConfig(steps, prediction_type=self.prediction_types[0])
        schedule = replace(schedule, **fields)
        other_betas.check(schedule, self.prediction_types)
        self.generator = generator
        self.schedule = schedule
        self._roots_beside: dict[Any, tuple[Tensor, ...]] = {}
        self.betas = betas(schedule)
        self.alphas = 1.0 - self.betas
        # [alphas-cumprod] §2, Ho et al. 2020: ᾱₜ = α₁ α₂ … αₜ; there t counts from 1, in code from 0
        self.alphas_cumprod = torch.cumprod(self.alphas, dim=0)
        if schedule.zero_terminal_snr:
            # [zero-snr] Algorithm 1, Lin et al. 2023: √ᾱₜ ← (√ᾱₜ - √ᾱ_T) √ᾱ₁ / (√ᾱ₁ - √ᾱ_T), as it was at 1
            root = self.alphas_cumprod.sqrt()
            self.alphas_cumprod = ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()
            self.alphas[1:] = self.alphas_cumprod[1:] / self.alphas_cumprod[:-1]
            self.betas = 1.0 - self.alphas
            self.alphas_cumprod.clamp_(min=self._least_alpha_bar)
        self.set_inference_timesteps(schedule.num_training_steps)

    @property
    def num_training_steps(self) -> int:
        return self.schedule.num_training_steps

    @property
    def prediction_type(self) -> str:
        return self.schedule.prediction_type

    # Which timesteps

    def set_inference_timesteps(self, n: int, schedule: str | None = None) -> None:
        """Spreads n steps over the training timesteps; `.timesteps` is then a tensor, noisiest first.

        n: from 1 to num_training_steps, else ValueError. (n,), but longer for samplers that call the network
        more than once in a step (heun: 2n - 1, pndm: n + 1, but 1 for n = 1). schedule: one of SCHEDULES, of
        which some make more or fewer steps than n; None for the sampler's own. Timesteps are int64, or
        float64 where some lie between the training's. Forgets any `set_strength`. ValueError for an unknown
        schedule, and for any if the sampler has a schedule of its own.
        """
        if not 1 <= n <= self.num_training_steps:
            raise ValueError(f"the number of steps must be between 1 and {self.num_training_steps}, not {n}")
        if schedule is None:
            self._every = self._spaced(n)
        elif self.own_schedule:
            raise ValueError(f"the sampler {self.name} has a schedule of its own")
        elif schedule not in SCHEDULES:
            raise ValueError(f"there is no schedule {schedule!r}; there are {', '.join(SCHEDULES)}")
        else:
            self._every = self._at(SCHEDULES[schedule](self._training_sigmas(), n))
        self.num_inference_steps, self.skipped = len(self._every), 0
        self._begin(self._every)

    def set_strength(self, strength: float) -> None:
        """For image-to-image: keeps only the last strength·n of the n steps, rounded down, but at least one.

        strength in (0, 1], else ValueError; 1 keeps all. Then `add_noise(latents, timesteps[0])` is where
        sampling starts. Always counts from the full n steps, so calling it twice is not half of half.
        """
        if not 0 < strength <= 1:
            raise ValueError(f"strength must be above 0 and at most 1, not {strength}")
        self.skip(self.num_inference_steps - max(1, int(self.num_inference_steps * strength)))

    def skip(self, steps: int) -> None:
        """Leaves out the first of the n steps. Always counts from all of them. ValueError if none is left."""
        if not 0 <= steps < self.num_inference_steps:
            raise ValueError(f"of {self.num_inference_steps} steps, {steps} cannot be left out")
        self.skipped = steps
        self._begin(self._every[steps:])

    def _spaced(self, n: int) -> Tensor:
        """n timesteps, noisiest first, as this sampler spreads them."""
        schedule = self.schedule
        if schedule.zero_terminal_snr or schedule.timestep_spacing == "trailing":
            return trailing(n, schedule.num_training_steps)
        return leading(n, schedule.num_training_steps)

    def _training_sigmas(self) -> Tensor:
        """σ of all training steps, (N,), float64, ascending. Where all is noise, it is 4096 and not ∞."""
        alpha_bar = self.alphas_cumprod.clamp(min=2.0**-24)
        return ((1 - alpha_bar) / alpha_bar).sqrt()

    def _at(self, places: Tensor) -> Tensor:
        """The timesteps at places among the training's, which may lie between two: (n,) -> (n,)"""
        whole = places.round()
        places = torch.where((places - whole).abs() < 1e-9, whole, places)  # a power and its root leave 1e-15
        return places.long() if torch.equal(places, whole) else places

    def alpha_bar(self, t: Tensor) -> Tensor:
        """ᾱ at timesteps t (…,), float64. Between two whole timesteps, log σ is taken to be a line."""
        if not t.is_floating_point():
            return self.alphas_cumprod[t]
        return 1 / (1 + sigma_at(t, self._training_sigmas()).square())

    def _begin(self, timesteps: Tensor) -> None:
        """Begins anew with these timesteps. Samplers that remember earlier steps forget them here."""
        self.timesteps = timesteps
        self._next = 0  # the index of the step that comes next

    def _index(self, t: float | Tensor) -> int:
        """The index of t in `timesteps`; where a sampler visits t twice, the index of the next visit."""
        t = float(t)
        at = (self.timesteps - t).abs() <= 1e-6 * t  # not ==, as a fraction may have been through float32
        if self._next < len(at) and at[self._next]:
            return self._next
        found = at.nonzero()
        if len(found) == 0:
            raise ValueError(f"timestep {t:g} is not one of this sampler's .timesteps")
        return int(found[0])

    @property
    def next_timestep(self) -> Tensor | None:
        """The timestep of the step that comes next, shape (); None after the last step."""
        return self.timesteps[self._next] if self._next < len(self.timesteps) else None

    # The forward process

    def _signal_and_noise(self, t: float | Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """√ᾱₜ and √(1 - ᾱₜ), shaped to broadcast over x (B, …), in x's dtype and on its device."""
        if self.timesteps.is_floating_point():
            alpha_bar = self.alpha_bar(torch.as_tensor(t, dtype=torch.float64, device="cpu"))
            return broadcast(alpha_bar.sqrt(), x), broadcast((1 - alpha_bar).sqrt(), x)
        signal, noise = self._roots(x)
        at = t.to(x.device).long().reshape(-1, *[1] * (x.ndim - 1)) if is_there(t, x) else int(t)
        if isinstance(at, int) and not 0 <= at < self.num_training_steps:
            raise ValueError(f"timestep {at} is not between 0 and {self.num_training_steps - 1}")
        return signal[at], noise[at]

    def _roots(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """√ᾱ and √(1 - ᾱ) of all timesteps, beside x: brought there once, as each way to a GPU is a wait."""
        found = self._roots_beside.get((x.dtype, x.device))
        if found is None or found[0] is not self.alphas_cumprod:
            a = self.alphas_cumprod
            with torch.inference_mode(False):  # so that training may use them later
                roots = [table.to(x.dtype).to(x.device) for table in (a.sqrt(), (1 - a).sqrt())]
            found = self._roots_beside[x.dtype, x.device] = a, *roots
        return found[1], found[2]

    def add_noise(self, x0: Tensor, t: float | Tensor, noise: Tensor | None = None) -> Tensor:
        """Draws xₜ ~ q(xₜ | x₀): the clean latents x0 (B, …) as they would be at timestep t.

        t: a number, or a tensor of shape () or (B,), on any device and of any dtype; whole numbers in
        [0, num_training_steps), but for `FlowSampler` any in [0, num_training_steps]. noise: ε, like x0;
        drawn with the sampler's generator if None.
        Returns a new tensor of x0's shape and dtype. Raises ValueError for a number outside the range.
        """
        noise = randn(x0.shape, self.generator) if noise is None else noise
        x, eps = exact(x0), noise.to(x0.device)
        signal, sigma = self._signal_and_noise(t, x)
        # [forward] Eq. 4, Ho et al. 2020: q(xₜ | x₀) = N(xₜ; √ᾱₜ x₀, (1 - ᾱₜ) I)
        return (signal * x + sigma * eps).to(x0.dtype)

    def sigma(self, t: float | Tensor) -> float:
        """σ = √(1 - ᾱₜ) / √ᾱₜ: the noise at timestep t beside one part of signal; ∞ where all is noise."""
        signal, noise = self._signal_and_noise(t, torch.zeros(1, dtype=torch.float64))
        return (noise / signal).item()

    def velocity(self, x0: Tensor, t: float | Tensor, noise: Tensor) -> Tensor:
        """The target of a v_prediction network, for the arguments of `add_noise`."""
        x, eps = exact(x0), noise.to(x0.device)
        signal, sigma = self._signal_and_noise(t, x)
        # [velocity] §4, Salimans & Ho 2022: v = αₜ ε - σₜ x₀, with αₜ = √ᾱₜ and σₜ = √(1 - ᾱₜ)
        return (signal * eps - sigma * x).to(x0.dtype)

    def target(self, x0: Tensor, t: float | Tensor, noise: Tensor) -> Tensor:
        """The output that the network is trained for, by the arguments of `add_noise`: noise or velocity."""
        if self.prediction_type == "epsilon":
            return noise.to(x0.device, x0.dtype)
        return self.velocity(x0, t, noise)

    # The way back

    @property
    def init_noise_sigma(self) -> float:
        """The factor by which standard normal noise is multiplied to begin with."""
        return 1.0

    def scale_model_input(self, x: Tensor, t: float | Tensor) -> Tensor:
        """The latents as the network was trained to see them at timestep t: of variance 1."""
        return x

    def predict(self, t: float | Tensor, latents: Tensor, model_output: Tensor) -> tuple[Tensor, Tensor]:
        """(x₀, ε): the clean latents and the noise that, by the network's output, `latents` are made of.

        Both have the latents' shape and dtype. latents are in the sampler's own scaling, as in `step`.
        """
        x, output = exact(self.scale_model_input(exact(latents), t)), exact(model_output)
        signal, sigma = self._signal_and_noise(t, x)
        if self.prediction_type == "epsilon":
            # [x0-from-eps] Eq. 15, Ho et al. 2020: x₀ ≈ (xₜ - √(1 - ᾱₜ) ε(xₜ)) / √ᾱₜ
            x0, eps = (x - sigma * output) / signal, output
        else:
            # [x0-from-v] App. D, Salimans & Ho 2022: x₀ = αₜ xₜ - σₜ v and ε = αₜ v + σₜ xₜ
            x0, eps = signal * x - sigma * output, signal * output + sigma * x
        return x0.to(latents.dtype), eps.to(latents.dtype)

    def step(self, t: float | Tensor, latents: Tensor, model_output: Tensor) -> Tensor:
        """One step towards the picture: the latents at the timestep that follows t.

        t: one of `.timesteps`, in order. latents and model_output: (B, …), the network's output after any
        guidance. Returns a new tensor like latents. Raises ValueError if t is not in `.timesteps`.
        """
        i = self._index(t)
        x = self._step(i, exact(latents), exact(model_output))
        self._next = i + 1
        return x.to(latents.dtype)

    def _step(self, i: int, x: Tensor, model_output: Tensor) -> Tensor:
        raise NotImplementedError

    def _noise(self, x: Tensor) -> Tensor:
        noise = bring(randn(x.shape, self.generator).to(x.dtype), x.device)
        return noise if self.s_noise in (None, 1) else self.s_noise * noise


class DDPMSampler(Sampler):
    """Ancestral sampling (Ho et al. 2020, Algorithm 2), on any subset of the timesteps."""

    name, title = "ddpm", "DDPM"
    s_noise = 1.0

    def _step(self, i: int, x: Tensor, model_output: Tensor) -> Tensor:
        last = i == len(self.timesteps) - 1
        alpha_bar = self.alpha_bar(self.timesteps[i]).item()
        alpha_bar_prev = 1.0 if last else self.alpha_bar(self.timesteps[i + 1]).item()
        # All timesteps between t and the next one are crossed in one step, so α here is their product.
        alpha = alpha_bar / alpha_bar_prev
        beta = 1 - alpha
        x0, _ = self.predict(self.timesteps[i], x, model_output)
        # [posterior-mean] Eq. 7, Ho et al. 2020: μ̃ₜ = √ᾱₜ₋₁ βₜ / (1 - ᾱₜ) x₀ + √αₜ (1 - ᾱₜ₋₁) / (1 - ᾱₜ) xₜ
        # With Eq. 15 for x₀ this is Eq. 11: μ = (xₜ - βₜ / √(1 - ᾱₜ) ε) / √αₜ, the form most often quoted.
        mean = (
            math.sqrt(alpha_bar_prev) * beta / (1 - alpha_bar) * x0
            + math.sqrt(alpha) * (1 - alpha_bar_prev) / (1 - alpha_bar) * x
        )
        if last:
            return mean  # Algorithm 2: no noise after the last step
        # [posterior-variance] Eq. 7, Ho et al. 2020: β̃ₜ = (1 - ᾱₜ₋₁) / (1 - ᾱₜ) βₜ
        variance = (1 - alpha_bar_prev) / (1 - alpha_bar) * beta
        # [reverse-step] Algorithm 2, line 4, Ho et al. 2020: xₜ₋₁ = μ + √β̃ₜ z
        return mean + math.sqrt(variance) * self._noise(x)


def is_there(t: float | Tensor, x: Tensor) -> TypeGuard[Tensor]:
    """True if t is a batch, or lies where x does. Any other t is a number, which is known without a GPU."""
    return isinstance(t, Tensor) and (t.ndim > 0 or t.device == x.device)


def broadcast(values: Tensor, x: Tensor) -> Tensor:
    """values (B,) or (), float64, shaped to broadcast over x (B, …), in x's dtype and on its device."""
    if values.ndim == 0:
        return x.new_full((), values.item())  # for which a GPU need not wait
    return values.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype).to(x.device)


def exact(x: Tensor) -> Tensor:
    """x in float32, or float64 if it is float64: half precision is too coarse for many small steps."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
