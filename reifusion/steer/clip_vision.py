"""CLIP's other half: from a picture to vectors that mean what it shows (Radford et al. 2021, §2.4).

A picture is cut into patches, each patch becomes a vector, and a transformer lets the patches look at each
other (Dosovitskiy et al. 2020, "An Image is Worth 16x16 Words", arXiv:2010.11929). IP-Adapters begin here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..model.attention import SelfAttention
from ..model.clip import ACTIVATIONS

# Of CLIP's training pictures, for each of red, green and blue in [0, 1]
MEAN = (0.48145466, 0.4578275, 0.40821073)
SPREAD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of an image encoder; the defaults are those of ViT-H/14, as most IP-Adapters use it."""

    width: int = 1280
    hidden: int = 5120  # numbers inside the feed-forward
    layers: int = 32
    heads: int = 16
    size: int = 224  # pixels of a side
    patch: int = 14
    projection: int = 1024  # numbers of the one vector for the whole picture
    activation: str = "gelu"  # one of `clip.ACTIVATIONS`
    eps: float = 1e-5


class Seen(NamedTuple):
    """What the encoder makes of pictures."""

    patches: Tensor  # (B, 1 + patches, width), before the last layer; the first is of the whole picture
    picture: Tensor  # (B, projection)


class CLIPVision(nn.Module):
    """The image encoder. Its numbers agree with `transformers.CLIPVisionModelWithProjection`."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        width, patches = config.width, (config.size // config.patch) ** 2
        self.patch = nn.Conv2d(3, width, config.patch, stride=config.patch, bias=False)
        self.whole = nn.Parameter(torch.zeros(width))
        self.position = nn.Parameter(torch.zeros(1 + patches, width))
        self.norm_1 = nn.LayerNorm(width, config.eps)
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.layers))
        self.norm_2 = nn.LayerNorm(width, config.eps)
        self.projection = nn.Linear(width, config.projection, bias=False)

    def forward(self, pixels: Tensor) -> Seen:
        """pixels (B, 3, size, size), as `prepared` makes them"""
        x = self.patch(pixels).flatten(2).transpose(1, 2)  # (B, 3, S, S) -> (B, patches, width)
        # Eq. 1, Dosovitskiy et al. 2020: a vector for the whole picture before those of the patches
        x = torch.cat([self.whole.expand(len(x), 1, -1), x], dim=1) + self.position
        x = self.norm_1(x)
        for layer in list(self.layers)[:-1]:
            x = layer(x)
        last = self.layers[-1](x)
        return Seen(x, self.projection(self.norm_2(last[:, 0])))


class VisionLayer(nn.Module):
    """Patches look at each other, then each thinks for itself: the text encoder's block, without order."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.norm_1 = nn.LayerNorm(config.width, config.eps)
        self.attention = SelfAttention(config.heads, config.width)
        self.norm_2 = nn.LayerNorm(config.width, config.eps)
        self.linear_1 = nn.Linear(config.width, config.hidden)
        self.linear_2 = nn.Linear(config.hidden, config.width)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, width) -> (B, L, width)"""
        x = x + self.attention(self.norm_1(x))
        return x + self.linear_2(self.activation(self.linear_1(self.norm_2(x))))


def prepared(picture: Image.Image, size: int = 224) -> Tensor:
    """A picture -> pixels (1, 3, size, size): its short side to that size, and the middle cut out."""
    picture = picture.convert("RGB")
    width, height = picture.size
    short = min(width, height)
    width, height = (int(size * side / short) for side in (width, height))
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    pixels = np.asarray(picture.crop((left, top, left + size, top + size)), np.float32) / 255
    x = (pixels - np.array(MEAN, np.float32)) / np.array(SPREAD, np.float32)
    return torch.from_numpy(x).permute(2, 0, 1)[None]  # (S, S, 3) -> (1, 3, S, S)
