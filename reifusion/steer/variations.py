"""Variations of a picture: its noise on the way to another's, along a circle.

A straight mix of two noises is too quiet: halfway, its variance is a half, and the picture is blurred. On the
circle through both, the variance stays. Only the noise to begin with is mixed; what a sampler adds in its
steps remains the first seed's. So all of the way is not the other picture, unless the sampler adds none.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..model.noise import Source
from .noises import First, Torch

Mix = Callable[[float, Tensor, Tensor], Tensor]


def slerp(share: float, one: Tensor, other: Tensor) -> Tensor:
    """The noise that is that share of the way from one to another, both (C, H, W): one angle for the picture.

    Shoemake 1985, "Animating rotation with quaternion curves", §3.3.
    """
    cosine = (one * other).sum() / (one.norm() * other.norm())
    if cosine > 1 - 1e-6:  # the same, or nearly: there is no circle
        return torch.lerp(one, other, share)
    angle = cosine.clamp(-1, 1).acos()
    return (((1 - share) * angle).sin() * one + (share * angle).sin() * other) / angle.sin()


def slerp_of_columns(share: float, one: Tensor, other: Tensor) -> Tensor:
    """The same as A1111's web UI does it: an angle for each channel and column, and one more difference.

    Where the two are almost the same, it mixes them the other way round. That is kept, as it is theirs.
    """
    cosine = (one * other).sum(1) / (one.norm(dim=1) * other.norm(dim=1))  # (C, W)
    if cosine.mean() > 0.9995:
        return share * one + (1 - share) * other
    angle = cosine.acos()
    first, second = (((way * angle).sin() / angle.sin())[:, None] for way in (1 - share, share))  # (C, 1, W)
    return first * one + second * other


def varied(
    seed: int, share: float, source: Callable[[int], Source] = Torch, mix: Mix = slerp
) -> Callable[[int], Source]:
    """For `Request.source`: noise that is a share of the way from a picture's seed to this one.

    share: in [0, 1], else ValueError.
    """
    check(share)

    def make(own: int) -> Source:
        other = source(seed)
        return First(source(own), lambda noise: mix(share, noise, other.randn(noise.shape)))

    return make


def check(share: float) -> None:
    """Raises ValueError for what is no share."""
    if not 0 <= share <= 1:
        raise ValueError(f"variation must be between 0 and 1, not {share:g}")
