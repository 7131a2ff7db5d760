"""One turn of the denoising loop: what is known before its step, and after it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .ddpm import Sampler, exact
from .guidance import Denoiser


@dataclass(frozen=True)
class Turn:
    """One turn of the denoising loop, before its step. Latents are (B, 4, H/8, W/8), float32 or float64."""

    index: int  # 0 … total - 1: of the calls of the network, of which heun and others need two for a step
    total: int
    t: float  # the timestep: how noisy x_t is, from 999 down; an int, except for rectified flow
    x_t: Tensor  # the latents before the step, as the sampler scales them
    sampler: Sampler = field(repr=False)  # as it was before the step
    words: Tensor = field(repr=False)  # the prompts' vectors, (B, 77, 768)
    network: Denoiser = field(repr=False)

    @property
    def sigma(self) -> float:
        """The noise in x_t, beside one part of signal."""
        return self.sampler.sigma(self.t)

    @property
    def scaled(self) -> Tensor:
        """x_t as the network was trained to see it."""
        return self.sampler.scale_model_input(self.x_t, self.t)

    @property
    def time(self) -> Tensor:
        """The timestep as the network takes it, (1,)."""
        return torch.full((1,), self.t, dtype=self.x_t.dtype, device=self.x_t.device)

    def predict(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """(x₀, ε): the clean latents and the noise that the network, by its output, sees in x_t."""
        return self.sampler.predict(self.t, self.x_t, output)

    def look(self, words: Tensor | None = None, x: Tensor | None = None) -> Tensor:
        """The network's output for other words (B, 77, 768), or other latents: (B, 4, H/8, W/8).

        It has derivatives if gradients are on.
        """
        turn = self if x is None else replace(self, x_t=x)
        return exact(self.network(turn.scaled, self.words if words is None else words, turn.time))


@dataclass(frozen=True)
class Step(Turn):
    """One turn of the denoising loop, after its step."""

    latents: Tensor  # the latents after the step; after the last, the picture's
    output: Tensor = field(repr=False)  # the network's output after guidance
    cond: Tensor = field(repr=False)  # … with the prompt
    uncond: Tensor | None = field(repr=False)  # … with the negative prompt

    @property
    def x0(self) -> Tensor:
        """The clean latents that the network sees in x_t; `decode` shows them."""
        return self.predict(self.output)[0]

    @property
    def eps(self) -> Tensor:
        """The noise that the network sees in x_t, after guidance."""
        return self.predict(self.output)[1]

    @property
    def eps_cond(self) -> Tensor:
        """The noise that the network sees with the prompt."""
        return self.predict(self.cond)[1]

    @property
    def eps_uncond(self) -> Tensor | None:
        """The noise that the network sees with the negative prompt; None in a step without guidance."""
        return None if self.uncond is None else self.predict(self.uncond)[1]
