"""Beginning with a picture: image-to-image, editing, and inpainting in two ways.

Image-to-image begins with the picture under noise. Inpainting draws one part anew, and the rest stays. Any
model can inpaint: after each step, `keep_known` puts the known part back, as noisy as the rest. A U-Net with
nine input channels was trained for it: `beside` shows it the mask and the known part. A U-Net with eight was
trained to edit: it sees the picture.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import cast

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from .config import ModelConfig
from .ddpm import Sampler
from .encoder import unscale_latents
from .guidance import Denoiser
from .pictures import fit, to_tensor
from .request import Request

StepForward = Callable[[Tensor, Tensor, Tensor], Tensor]  # of t, latents and model output


def begin(
    config: ModelConfig,
    request: Request,
    sampler: Sampler,
    noise: Tensor,
    encode_image: Callable[[Tensor], Tensor],
) -> tuple[Tensor, StepForward, Tensor | None]:
    """The latents to begin with, the step, and the channels that the U-Net sees beside the latents.

    noise (B, 4, h, w). encode_image: pixels (1, 3, H, W) -> latents (1, 4, h, w).
    """
    vae, (height, width) = config.vae, (side * config.vae.factor for side in noise.shape[-2:])
    latents, step = noise * sampler.init_noise_sigma, cast(StepForward, sampler.step)
    pixels, redraw = torch.zeros(1, 3, height, width), torch.ones(1, 1, height, width)
    original = torch.zeros_like(noise[:1])
    masked = isinstance(request.mask, Image.Image)
    if isinstance(request.init_image, Image.Image):
        pixels = to_tensor(fit(request.init_image, width, height))
        original = encode_image(pixels)
        # The first timestep has a little signal left. So that nothing of the part to redraw shows through at
        # a strength of 1, inpainting then begins with noise alone.
        if request.strength < 1 or not (masked or config.edits):
            latents = sampler.add_noise(original.expand_as(noise), sampler.timesteps[0], noise)
    if request.latents is not None:
        latents = as_large(request.latents, noise, "latents")
    if isinstance(request.mask, Image.Image):
        redraw = (to_tensor(fit(request.mask, width, height)) + 1) / 2  # (1, 1, H, W)
        if not config.inpaints:
            mask = latent_mask(redraw, vae.factor).to(noise.device)
            step = keep_known(sampler, original, mask, noise)
    if config.edits:
        if request.init_image is None:
            warnings.warn(f"{config.name} edits pictures, but there is no init image", stacklevel=1)
        return latents, step, unscale_latents(original, vae)  # Brooks et al. 2023 show it unscaled
    if not config.inpaints:
        return latents, step, None
    redraw = (redraw >= 0.5).float()
    known, mask = encode_image(pixels * (1 - redraw)), latent_mask(redraw, vae.factor)
    return latents, step, torch.cat([mask.to(noise.device), known], dim=1)


def as_large(given: Tensor, noise: Tensor, name: str) -> Tensor:
    """Brings what was given to the dtype and device of noise. Raises ValueError unless it has its shape."""
    if not isinstance(given, Tensor) or given.shape != noise.shape:
        kind = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise ValueError(f"{name} must be {tuple(noise.shape)}, not {kind}")
    return given.to(noise)


def latent_mask(redraw: Tensor, factor: int) -> Tensor:
    """(1, 1, H, W), 1 where pixels are redrawn -> (1, 1, H/8, W/8)"""
    # A latent stands for 8×8 pixels, and is redrawn as soon as one of them is.
    return F.max_pool2d(redraw, factor)


def keep_known(sampler: Sampler, original: Tensor, mask: Tensor, noise: Tensor) -> StepForward:
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
