"""Facts about a picture that need no network: what stands out, where, how large, how detailed, in which colour.

All of them begin with the rim. The colour of most of the rim is the background, and pixels that differ from
it are the foreground. Colours are compared in Oklab, where equal distances look equal.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from reifusion.train.mini import colours
from reifusion.train.mini.colours import COLOURS, DYES

NAMED = {"white": (255, 255, 255), **COLOURS}  # the names of backgrounds
RIM = 4  # pixels
SMALL = 0.4  # extent: "small" is 0.33 in training, and the next size 0.44
FAINT = 0.1  # the distance in Oklab below which a pixel is still background: more than the VAE's ripples
MARGIN = 0.06  # the margin around the box in a crop, as a share of the box's longer side


def to_images(x: Tensor) -> list[np.ndarray]:
    """(N, 3, H, W) in [-1, 1] -> N pictures (H, W, 3) uint8"""
    return list(((x.permute(0, 2, 3, 1) + 1) * 127.5).round().clamp(0, 255).byte().numpy())


def on_white(sprites: Tensor) -> list[np.ndarray]:
    """Sprites (N, 4, H, W) uint8 -> pictures (H, W, 3): on the default background, white."""
    x = sprites.float() / 255
    return to_images((x[:, :3] * x[:, 3:] + 1 - x[:, 3:]) * 2 - 1)


def resized(image: np.ndarray, side: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (side, side, 3)"""
    if image.shape[:2] == (side, side):
        return image
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS))


def to_oklab(rgb: np.ndarray) -> np.ndarray:
    """(..., 3) uint8 sRGB -> (..., 3) lightness in [0, 1], a (red), b (yellow)."""
    flat = torch.from_numpy(rgb.reshape(-1, 3) / np.float32(255))
    return colours.to_oklab(flat).numpy().reshape(rgb.shape)


def rim(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) -> (P, 3): the outermost pixels."""
    inside = np.zeros(image.shape[:2], bool)
    inside[RIM:-RIM, RIM:-RIM] = True
    return image[~inside]


def foreground(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 -> (H, W) bool: the pixels that differ from the rim's median colour."""
    background = np.median(rim(image), axis=0).astype(np.uint8)
    return np.linalg.norm(to_oklab(image) - to_oklab(background), axis=-1) > FAINT


def box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """(H, W) bool -> left, top, right, bottom of the True pixels, except 1 % of them: specks do not count.

    The box is the whole picture if less than 1 % of it is True.
    """
    height, width = mask.shape
    if mask.mean() < 0.01:
        return 0, 0, width, height
    y, x = np.nonzero(mask)
    left, right = np.quantile(x, (0.005, 0.995), method="nearest")
    top, bottom = np.quantile(y, (0.005, 0.995), method="nearest")
    return int(left), int(top), int(right) + 1, int(bottom) + 1


def crop(image: np.ndarray, side: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (side, side, 3): a square around the foreground, padded with background."""
    left, top, right, bottom = box(foreground(image))
    reach = (0.5 + MARGIN) * max(right - left, bottom - top)
    x, y = (left + right) / 2, (top + bottom) / 2
    colour = tuple(int(level) for level in np.median(rim(image), axis=0))
    height, width = image.shape[:2]
    canvas = Image.new("RGB", (3 * width, 3 * height), colour)
    canvas.paste(Image.fromarray(np.ascontiguousarray(image)), (width, height))
    square = (width + x - reach, height + y - reach, width + x + reach, height + y + reach)
    return np.asarray(canvas.resize((side, side), Image.Resampling.BICUBIC, box=square))


def middle(image: np.ndarray, side: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (side, side, 3): where the subject stands in a picture of a place."""
    height, width = image.shape[:2]
    square = (0.1 * width, 0.15 * height, 0.9 * width, 0.95 * height)
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC, box=square))


def parts(image: np.ndarray, side: int, count: int = 4) -> list[np.ndarray]:
    """(H, W, 3) uint8 -> the `count` parts of the foreground with most small details: (side, side, 3).

    A part is a square with 0.4 of the foreground's longer side; their middles are at least a fifth apart.
    """
    left, top, right, bottom = box(foreground(image))
    longer = max(right - left, bottom - top)
    reach, apart, small = max(2, round(0.2 * longer)), max(1, longer // 5), max(1, longer // 40)
    width = 2 * reach + 1
    padded = _padded(image, reach)
    lab = to_oklab(padded)
    # A detail differs from the mean of its surroundings, by no more than black differs from grey.
    detail = (lab - _mean_around(_padded(lab, small), 2 * small + 1)).clip(-0.2, 0.2)
    score = _mean_around(detail**2, width).sum(-1)  # (H, W), of the square around each pixel
    inside = np.zeros(score.shape, bool)
    inside[top:bottom, left:right] = True
    score[~inside] = -1
    found = []
    for _ in range(count):
        y, x = divmod(int(score.argmax()), score.shape[1])
        found.append(resized(padded[y : y + width, x : x + width], side))
        score[max(0, y - apart) : y + apart + 1, max(0, x - apart) : x + apart + 1] = -2
    return found


def _padded(x: np.ndarray, reach: int) -> np.ndarray:
    return np.pad(x, ((reach, reach), (reach, reach), (0, 0)), mode="edge")


def _mean_around(x: np.ndarray, width: int) -> np.ndarray:
    """(H, W, C) -> (H − width + 1, W − width + 1, C): the means of all squares."""
    sums = np.pad(x.astype(np.float64).cumsum(0).cumsum(1), ((1, 0), (1, 0), (0, 0)))
    total = sums[width:, width:] - sums[:-width, width:] - sums[width:, :-width] + sums[:-width, :-width]
    return total / width**2


def halves(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the left and the right half."""
    middle = image.shape[1] // 2
    return image[:, :middle], image[:, middle:]


# ---- what a prompt can ask for ----------------------------------------------------------------------------


def background_name(image: np.ndarray) -> str:
    """Returns the named colour that is nearest to more than half of the rim, or "" if there is none."""
    names = list(NAMED)
    palette = to_oklab(np.array([NAMED[name] for name in names], np.uint8))  # (C, 3)
    away = np.linalg.norm(to_oklab(rim(image))[:, None] - palette, axis=-1)  # (P, C)
    votes = np.bincount(away.argmin(1), minlength=len(names)) / len(away)
    return names[votes.argmax()] if votes.max() > 0.5 else ""


def dye_name(image: np.ndarray) -> str:
    """Returns the dye nearest to most of the foreground's colour, or "" if there is hardly any colour.

    Pixels vote with their chroma, so outlines and the whites of eyes have no vote. Lightness counts half,
    because a dyed thing keeps its shading.
    """
    lab = to_oklab(image[foreground(image)]) * (0.5, 1, 1)  # (P, 3)
    chroma = np.hypot(lab[:, 1], lab[:, 2])
    if chroma.size == 0 or chroma.mean() < 0.03:
        return ""
    palette = to_oklab(np.array([COLOURS[name] for name in DYES], np.uint8)) * (0.5, 1, 1)  # (C, 3)
    away = np.linalg.norm(lab[:, None] - palette, axis=-1)  # (P, C)
    return DYES[np.bincount(away.argmin(1), chroma, minlength=len(DYES)).argmax()]


def side_name(image: np.ndarray) -> str:
    """Returns "left" or "right" if the foreground lies over a sixteenth of the width off "middle"."""
    mask = foreground(image)
    x = np.nonzero(mask)[1]
    if x.size == 0:
        return "middle"
    away = (x.mean() + 0.5) / mask.shape[1] - 0.5
    return "middle" if abs(away) <= 1 / 16 else "left" if away < 0 else "right"


def extent(image: np.ndarray) -> float:
    """Returns the longer side of the foreground's box, as a share of the picture's side; usually 0.875."""
    left, top, right, bottom = box(foreground(image))
    return max((right - left) / image.shape[1], (bottom - top) / image.shape[0])
