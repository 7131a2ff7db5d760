"""Styles by arithmetic: any sprite as pixel art, a silhouette, a line drawing, a sticker, a pencil drawing.

The model sees a style on most subjects and never on some: it has to understand the word, as it cannot
remember the picture. Sprites are (N, 4, S, S) in [0, 1], and lengths are shares of S.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .colours import ramp

INK = 0.1  # how dark a line is


def premultiply(sprites: Tensor) -> Tensor:
    """Multiplies colour by alpha, so that averages over soft edges get no dark rim."""
    return torch.cat([sprites[:, :3] * sprites[:, 3:], sprites[:, 3:]], 1)


def pixel_art(sprites: Tensor) -> Tensor:
    """32 × 32 squares, each in one of a few colours."""
    cell = sprites.shape[-1] // 32
    small = F.avg_pool2d(premultiply(sprites), cell)
    alpha = small[:, 3:]
    colour = (small[:, :3] / alpha.clamp(min=1e-3)).clamp(0, 1)
    colour = ((colour - 0.5) * 1.1 + 0.5).clamp(0, 1).mul(7).round() / 7
    return (
        torch.cat([colour, (alpha > 0.45).to(alpha)], 1).repeat_interleave(cell, 2).repeat_interleave(cell, 3)
    )


def silhouette(sprites: Tensor) -> Tensor:
    return torch.cat([torch.full_like(sprites[:, :3], INK), sprites[:, 3:]], 1)


def line_drawing(sprites: Tensor) -> Tensor:
    """Dark lines of one width around all parts, on white paper."""
    ink, inside = _lines(sprites)
    return torch.cat([(1 - (1 - INK) * ink).expand(-1, 3, -1, -1), inside], 1)


def sticker(sprites: Tensor) -> Tensor:
    """The sprite with a white rim and a soft shadow, as if cut out of paper."""
    rim = _spread(sprites[:, 3:], _length(sprites, 9))
    shadow = _blur(rim, _length(sprites, 5)).roll(_length(sprites, 3), 2)
    alpha = sprites[:, 3:]
    paper = sprites[:, :3] * alpha + (1 - alpha)
    grey = 0.35 * torch.ones_like(paper)
    cover = rim + 0.5 * shadow * (1 - rim)
    colour = (paper * rim + grey * 0.5 * shadow * (1 - rim)) / cover.clamp(min=1e-3)
    return torch.cat([colour, cover], 1)


def pencil_drawing(sprites: Tensor) -> Tensor:
    """Soft grey lines, and strokes from corner to corner where the sprite is dark."""
    side = sprites.shape[-1]
    ink, inside = _lines(sprites)
    red, green, blue = _on_white(sprites).split(1, 1)
    tone = 1 - (0.3 * red + 0.59 * green + 0.11 * blue)
    step = torch.arange(side, device=sprites.device) * (256 / side)
    wave = ((step[:, None] + step[None, :]) * (2 * torch.pi / 11.3)).cos() * 0.5 + 0.5
    strokes = ramp(_blur(tone, _length(sprites, 3)) * 1.25 - 0.55 * wave, 0.0, 0.5)
    grey = 1 - (0.72 * ink).maximum(0.62 * strokes * inside)
    return torch.cat([grey.expand(-1, 3, -1, -1), inside], 1)


STYLES = {
    "pixel art": pixel_art,
    "silhouette": silhouette,
    "line drawing": line_drawing,
    "sticker": sticker,
    "pencil drawing": pencil_drawing,
}


def _length(sprites: Tensor, pixels: int) -> int:
    """Returns a length that is given for sprites of 256 pixels."""
    return max(1, sprites.shape[-1] * pixels // 256)


def _on_white(sprites: Tensor) -> Tensor:
    return sprites[:, :3] * sprites[:, 3:] + 1 - sprites[:, 3:]


def _lines(sprites: Tensor) -> tuple[Tensor, Tensor]:
    """Returns how much of each pixel is a line, and what the outermost lines enclose: (N, 1, S, S) each."""
    one, two = _length(sprites, 1), _length(sprites, 2)
    inner = ramp(_contrast(_blur(_on_white(sprites), one), two).amax(1, keepdim=True), 0.12, 0.3)
    outer = ramp(_contrast(_blur(sprites[:, 3:], one), two), 0.25, 0.6)
    inside = _blur(_spread(sprites[:, 3:], two), one)
    return inner.maximum(outer), inside.maximum(outer)


def _contrast(x: Tensor, reach: int) -> Tensor:
    """The highest minus the lowest value around each place."""
    return _highest(x, reach) + _highest(-x, reach)


def _highest(x: Tensor, reach: int) -> Tensor:
    x = F.max_pool2d(x, (2 * reach + 1, 1), 1, (reach, 0))
    return F.max_pool2d(x, (1, 2 * reach + 1), 1, (0, reach))


def _blur(x: Tensor, reach: int) -> Tensor:
    """Two box filters, which look like one round one."""
    for _ in range(2):
        x = F.avg_pool2d(x, (2 * reach + 1, 1), 1, (reach, 0))
        x = F.avg_pool2d(x, (1, 2 * reach + 1), 1, (0, reach))
    return x


def _spread(alpha: Tensor, reach: int) -> Tensor:
    """Grows a shape by about `reach` pixels, with round corners."""
    return ramp(_blur(_highest(alpha, reach // 2), reach), 0.15, 0.25)
