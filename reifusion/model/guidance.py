"""Classifier-free guidance: where the prediction with the prompt and the one without it meet.

Source: Ho & Salimans 2022, "Classifier-Free Diffusion Guidance", arXiv:2207.12598.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .ddpm import exact

# A U-Net, or anything that is called like one: x (B, C, h, w), context (B, S, width), t (1,) -> (B, 4, h, w)
Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass
class Guidance:
    """A denoiser that follows the prompt more closely than the network alone does."""

    denoiser: Denoiser
    positive: Tensor  # the prompts' words, (B, S, width)
    negative: Tensor | None  # the negative prompts' words, (B, S, width); None: no guidance
    scale: float  # s in Eq. 6
    rescale: float = 0.0  # φ in Lin et al. 2023, 0 … 1
    interval: tuple[float, float] = (-math.inf, math.inf)  # the σ between which there is guidance

    def __call__(self, x: Tensor, t: Tensor, sigma: float) -> tuple[Tensor, Tensor, Tensor | None]:
        """x (B, C, h, w), t (1,), σ -> the guided output, the conditional, the unconditional: (B, 4, h, w)"""
        low, high = self.interval
        # §3, Kynkäänniemi et al. 2024: the scale is s for σ in (σ_lo, σ_hi], and 1 outside
        if self.negative is None or not low < sigma <= high:
            output = exact(self.denoiser(x, self.positive, t))
            return output, output, None
        words = torch.cat([self.positive, self.negative])  # (2B, S, width)
        cond, uncond = exact(self.denoiser(torch.cat([x, x]), words, t)).chunk(2)
        # [guidance] Eq. 6, Ho & Salimans 2022, s = 1 + w: ε = ε_uncond + s (ε_cond - ε_uncond)
        output = uncond + self.scale * (cond - uncond)
        return rescaled(output, cond, self.rescale), cond, uncond


def rescaled(guided: Tensor, cond: Tensor, phi: float) -> Tensor:
    """The guided output (B, …) with its contrast brought nearer to that of cond, by φ in [0, 1]."""
    if phi == 0:
        return guided
    axes = tuple(range(1, guided.ndim))
    # Eq. 15, Lin et al. 2023: x_rescaled = x_cfg σ_pos / σ_cfg, with each image's own σ
    matched = guided * cond.std(axes, keepdim=True) / guided.std(axes, keepdim=True)
    # Eq. 16: x_final = φ x_rescaled + (1 - φ) x_cfg
    return phi * matched + (1 - phi) * guided
