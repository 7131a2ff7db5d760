"""Colours as people name them, and how a subject is dyed in one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Backgrounds use all of them, dyes all except black.
COLOURS = {
    "red": (222, 40, 44),
    "orange": (247, 138, 30),
    "yellow": (252, 214, 48),
    "green": (58, 164, 72),
    "blue": (48, 112, 228),
    "purple": (140, 72, 200),
    "pink": (250, 130, 180),
    "black": (28, 28, 32),
}
NAMES = tuple(COLOURS)
DYES = tuple(name for name in COLOURS if name != "black")

# In Oklab, equal distances look equal, so a hue can be turned without changing how light the colour looks.
# Source: Björn Ottosson, "A perceptual color space for image processing", 2020.
_LMS = torch.tensor([[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
                     [0.0883024619, 0.2817188376, 0.6299787005]])  # fmt: skip
_LAB = torch.tensor([[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
                     [0.0259040371, 0.7827717662, -0.8086757660]])  # fmt: skip
_LMS_INVERSE, _LAB_INVERSE = torch.linalg.inv(_LMS), torch.linalg.inv(_LAB)


def _mix(matrix: Tensor, x: Tensor) -> Tensor:
    """Multiplies the three channels of x (N, 3, …) by a matrix."""
    return torch.einsum("ij,nj...->ni...", matrix.to(x), x)


def to_oklab(rgb: Tensor) -> Tensor:
    """(N, 3, …) sRGB in [0, 1] -> (N, 3, …) lightness in [0, 1], a (red), b (yellow)."""
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return _mix(_LAB, _mix(_LMS, linear).clamp(min=0) ** (1 / 3))


def from_oklab(lab: Tensor) -> Tensor:
    """(N, 3, …) Oklab -> (N, 3, …) sRGB in [0, 1]; colours that no screen shows are cut off."""
    linear = _mix(_LMS_INVERSE, _mix(_LAB_INVERSE, lab) ** 3).clamp(0, 1)
    return torch.where(
        linear <= 0.0031308, 12.92 * linear, 1.055 * linear.clamp(min=1e-8) ** (1 / 2.4) - 0.055
    )


PALETTE = to_oklab(torch.tensor([COLOURS[name] for name in NAMES]) / 255)  # (8, 3): COLOURS in Oklab


def ramp(x: Tensor, low: float, high: float) -> Tensor:
    """Rises from 0 at `low` to 1 at `high`."""
    return ((x - low) / (high - low)).clamp(0, 1)


def dye(sprites: Tensor, colours: Tensor) -> Tensor:
    """Turns each sprite's main colour into the given one; shading, outlines, eyes and small parts remain.

    sprites: (N, 4, H, W) in [0, 1]. colours: (N,) indices into NAMES.
    """
    lab, alpha = to_oklab(sprites[:, :3]), sprites[:, 3]
    lightness, a, b = lab.unbind(1)  # (N, H, W) each
    chroma, hue = torch.hypot(a, b), torch.atan2(b, a)

    def total(x: Tensor) -> Tensor:
        return x.sum((1, 2), keepdim=True)

    def mean(x: Tensor, weights: Tensor) -> Tensor:
        return total(x * (weights + 1e-6)) / total(weights + 1e-6)

    coloured = ramp(chroma, 0.03, 0.07)
    # The main hue is the one with the most chroma within 60°; of those alike but for rounding, the first.
    bins = torch.zeros(len(sprites), 36, device=sprites.device)
    which = ((hue / math.pi + 1) * 18).long() % 36
    bins.scatter_add_(1, which.flatten(1), (chroma * coloured * alpha).flatten(1))
    within = torch.stack([bins.roll(k, 1) for k in range(-6, 7)]).sum(0)  # (N, 36)
    main = (within >= 0.9999 * within.amax(1, keepdim=True)).byte().argmax(1)
    turn = hue - ((main + 0.5) / 18 * math.pi - math.pi)[:, None, None]
    turn = torch.remainder(turn + math.pi, 2 * math.pi) - math.pi
    near = coloured * ramp(-turn.abs(), -1.9, -1.2)
    change = torch.where(total(near * alpha) > 0.5 * total(coloured * alpha), near, coloured)
    strength = (chroma / mean(chroma, change * alpha).clamp(min=1e-4)).clamp(0, 1.5) ** 0.5
    # A grey or white subject (many greys are slightly blue) is dyed everywhere except in its blacks.
    grey = total(ramp(chroma, 0.05, 0.1) * alpha) < 0.4 * total(alpha)
    change = torch.where(grey, ramp(lightness, 0.15, 0.35), change)
    strength = torch.where(grey, 1.0, strength)
    turn = torch.where(grey, 0.0, turn)

    light, new_a, new_b = PALETTE.to(sprites)[colours][:, :, None, None].unbind(1)  # (N, 1, 1) each
    new_hue = torch.atan2(new_b, new_a) + 0.15 * turn.clamp(-1, 1)
    new_chroma = torch.hypot(new_a, new_b) * strength
    new_lightness = lightness + 0.9 * (light - mean(lightness, change * alpha))
    new = torch.stack([new_lightness, new_chroma * new_hue.cos(), new_chroma * new_hue.sin()], 1)
    return torch.cat([from_oklab(lab + change[:, None] * (new - lab)), sprites[:, 3:]], 1)


def stands_out(sprite: Tensor) -> tuple[str, ...]:
    """Returns the colours of a background on which a sprite (4, H, W) in [0, 1] can be seen."""
    sample = sprite[:, ::16, ::16].flatten(1)
    lab = to_oklab(sample[None, :3, sample[3] > 0.5])[0]  # (3, P)
    away = (lab[:, :, None] - PALETTE.T[:, None]).norm(dim=0) > 0.15  # (P, 8)
    share = away.float().mean(0) if len(away) else torch.ones(len(NAMES))
    return tuple(name for name, far in zip(NAMES, share.tolist(), strict=True) if far > 0.6)
