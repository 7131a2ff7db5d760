"""Inpainting: one part of a picture is drawn anew, the rest stays. Two ways to tell the loop so.

Any model can be made to: after each step, `keep_known` puts the known part back, as noisy as the rest. A
U-Net with nine input channels was trained for it: `beside` shows it the mask and the known part.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .ddpm import Sampler
from .guidance import Denoiser


def latent_mask(redraw: Tensor, factor: int) -> Tensor:
    """(1, 1, H, W), 1 where pixels are redrawn -> (1, 1, H/8, W/8)"""
    # A latent stands for 8×8 pixels, and is redrawn as soon as one of them is.
    return F.max_pool2d(redraw, factor)


def keep_known(
    sampler: Sampler, original: Tensor, mask: Tensor, noise: Tensor
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The sampler's `step`, followed by the known part in place of whatever was drawn there.

    original: the picture's latents (1, 4, h, w). mask (1, 1, h, w): 1 is redrawn. noise (B, 4, h, w).
    """

    def step(t: Tensor, latents: Tensor, model_output: Tensor) -> Tensor:
        latents = sampler.step(t, latents, model_output)
        later = sampler.next_timestep
        # Eq. 8, Lugmayr et al. 2022: the known part is only as noisy as the part that is being drawn
        known = original if later is None else sampler.add_noise(original, later, noise)
        return mask * latents + (1 - mask) * known

    return step


def beside(denoiser: Denoiser, extra: Tensor | None) -> Denoiser:
    """A denoiser that sees `extra` (1, 5, h, w), mask and known latents, beside x (B, 4, h, w)."""
    if extra is None:
        return denoiser

    def denoise(x: Tensor, context: Tensor, t: Tensor) -> Tensor:
        return denoiser(torch.cat([x, extra.to(x.dtype).expand(len(x), -1, -1, -1)], dim=1), context, t)

    return denoise
