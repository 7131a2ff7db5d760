"""Latent consistency models: a U-Net that was distilled with guidance, and is told the guidance scale.

Luo et al. 2023, "Latent Consistency Models", arXiv:2310.04378. `model/samplers.py` has the sampler for them.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..model.config import UNetConfig
from ..model.diffusion import Given, TimeEmbedding, UNet, sinusoids
from ..model.guidance import Denoiser
from ..model.pipeline import StableDiffusion
from ..model.request import Request


def guidance_sinusoids(scale: Tensor, width: int) -> Tensor:
    """The guidance scale as waves: scale (B,) -> (B, width), float32. Sines first, as LCMs have it.

    Source: Meng et al. 2023, "On Distillation of Guided Diffusion Models", arXiv:2210.03142, §3.1.
    """
    half = width // 2
    # Luo et al. 2023's code: ω_i = 10000^(−i / (half − 1)), of 1000 w with w = s − 1
    frequencies = torch.exp(torch.arange(half, device=scale.device) * (-math.log(10_000) / (half - 1)))
    angles = 1000 * (scale.float()[:, None] - 1) * frequencies  # (B,) -> (B, half)
    return torch.cat([torch.sin(angles), torch.cos(angles)], dim=-1)


class GuidedTimeEmbedding(TimeEmbedding):
    """Timestep and guidance scale -> the vector that every residual block adds."""

    def __init__(self, width: int, guidance_width: int):
        super().__init__(width)
        self.guidance = nn.Linear(guidance_width, width, bias=False)

    def forward(self, t: Tensor, guidance: Tensor | None = None) -> Tensor:
        """t (B,), guidance (B,) or (1,): the scale s; None leaves it out -> (B, 4·width)"""
        waves = sinusoids(t, self.width).to(self.linear_1.weight.dtype)
        if guidance is not None:
            scale = guidance_sinusoids(guidance, self.guidance.in_features)
            waves = waves + self.guidance(scale.to(waves.dtype))
        return self.linear_2(F.silu(self.linear_1(waves)))


class LCMUNet(UNet):
    """A U-Net whose output is guided already."""

    def __init__(self, config: UNetConfig):
        super().__init__(config)
        if config.guidance_width is None:
            raise ValueError("the U-Net of an LCM needs the width of its guidance embedding")
        self.time_embedding = GuidedTimeEmbedding(config.channels[0], config.guidance_width)

    def forward(self, latents: Tensor, context: Tensor, t: Tensor, guidance: Tensor | None = None) -> Tensor:
        """latents (B, 4, h, w), context (B, S, width), t and guidance (B,) or (1,) -> (B, 4, h, w)"""
        return self.walk(latents, Given(self.time_embedding(t, guidance), context))


class LatentConsistency(StableDiffusion):
    """A model that needs no second half of guidance: the U-Net is told the scale instead."""

    def denoiser(self, unet: nn.Module, request: Request) -> Denoiser:
        scale, dtype = torch.tensor([request.cfg], device=self.device), self.dtype
        return lambda x, context, t: unet(x.to(dtype), context, t, guidance=scale)

    def encode_words(self, request: Request) -> tuple[Tensor, Tensor | None]:
        if any(request.negatives):
            warnings.warn("the model has guidance built in, and reads no negative prompt", stacklevel=2)
        return self.encode_text(request.prompts, request.clip_skip), None
