"""The U-Net of Stable Diffusion XL: that of 1.x, told the whole text and sizes.

Podell et al. 2023, "SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis",
arXiv:2307.01952, §2.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..model.config import UNetConfig
from ..model.diffusion import Given, Layer, TimeEmbedding, UNet, plan, sinusoids


@dataclass(frozen=True)
class SDXLUNetConfig(UNetConfig):
    """A U-Net of this family. The defaults are the base's.

    `middle_attention` may be 0: the middle is then one residual block, as in SSD-1B and Segmind Vega (Gupta
    et al. 2024, arXiv:2401.02677), which are SDXL without some of its layers.
    """

    channels: tuple[int, ...] = (320, 640, 1280)
    attention: tuple[int, ...] = (0, 2, 10)  # on the way up too, unless `up` says otherwise
    middle_attention: int = 10
    heads: tuple[int, ...] = (5, 10, 20)
    context_width: int = 2048
    linear_projection: bool = True
    up: tuple[int, ...] = ()  # transformer layers in each row of the way up, where they are uneven


@plan.register
def _(config: SDXLUNetConfig) -> tuple[list[list[Layer]], list[Layer], list[list[Layer]]]:
    """The U as data, as `diffusion.plan` says."""
    down, middle, up = plan.dispatch(UNetConfig)(config)
    if config.up:
        for row, depth in zip(up, config.up, strict=True):
            row[:] = [one._replace(depth=depth) if one.kind == "attention" else one for one in row]
    return down, middle if config.middle_attention else middle[:1], up


class ToldTimeEmbedding(TimeEmbedding):
    """Timestep, whole text and sizes -> the vector that every residual block adds."""

    def __init__(self, width: int, told: int):
        super().__init__(width)
        self.label_1 = nn.Linear(told, 4 * width)
        self.label_2 = nn.Linear(4 * width, 4 * width)

    def forward(self, t: Tensor, told: Tensor) -> Tensor:  # type: ignore[override]
        """t (B,) or (1,), told (B, 2816) -> (B, 4·width)"""
        # [told] §2.2, Podell et al. 2023: what is told is added to the time: MLP(time) + MLP(text and sizes)
        return super().forward(t) + self.label_2(F.silu(self.label_1(told.to(self.label_1.weight.dtype))))


class SDXLUNet(UNet):
    """A U-Net that is told the whole text in one vector, and sizes."""

    def __init__(self, config: UNetConfig, told: int):
        super().__init__(config)
        self.time_embedding = ToldTimeEmbedding(config.channels[0], told)

    def forward(self, latents: Tensor, context: Tensor, t: Tensor, told: Tensor) -> Tensor:  # type: ignore[override]
        """latents (B, 4, h, w), context (B, 77, 2048), t (B,) or (1,), told (B, 2816) -> (B, 4, h, w)"""
        return self.walk(latents, Given(self.time_embedding(t, told), context))


def tell(pooled: Tensor, numbers: Tensor, waves: int) -> Tensor:
    """The vector that the U-Net is told: pooled (B, 1280), numbers (B, n) -> (B, 1280 + n·waves)"""
    # [size-waves] §2.2, Podell et al. 2023: each number as waves, like the time, and all of them end to end
    told = (
        sinusoids(numbers.flatten(), waves).unflatten(0, numbers.shape).flatten(1)
    )  # (B, n) -> (B, n·waves)
    return torch.cat([pooled.to(told.dtype), told], dim=-1)
