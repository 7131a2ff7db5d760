"""What can be told of a picture without a network: what stands out, where, how large, in which colour.

All of it begins with the rim. The colour that most of the rim has is the background, and what differs from it
is the foreground. Colours are compared in Oklab, where equal distances look equal.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from reifusion.train.mini.scenes import COLOURS, DYES, to_oklab

NAMED = {"white": (255, 255, 255), **COLOURS}  # what a background can be called
RIM = 4  # pixels
FAINT = 0.1  # distance in Oklab below which a pixel is still background: more than the VAE's ripples
MARGIN = 0.06  # of the box's longer side, around what is cropped


def on_white(sprite: np.ndarray) -> np.ndarray:
    """(H, W, 4) uint8 -> (H, W, 3): as it is shown when nothing else is said."""
    image = Image.fromarray(np.ascontiguousarray(sprite))
    return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB"))


def rim(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) -> its outermost pixels (P, 3)."""
    inside = np.zeros(image.shape[:2], bool)
    inside[RIM:-RIM, RIM:-RIM] = True
    return image[~inside]


def foreground(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 -> (H, W) bool: the pixels that differ from the rim's median colour."""
    background = np.median(rim(image), axis=0).astype(np.uint8)
    return np.linalg.norm(to_oklab(image) - to_oklab(background), axis=-1) > FAINT


def box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """(H, W) bool -> left, top, right, bottom of what is True, but for 1 % of it: specks do not count.

    All of the picture where less than 1 % of it is True.
    """
    height, width = mask.shape
    if mask.mean() < 0.01:
        return 0, 0, width, height
    y, x = np.nonzero(mask)
    left, right = np.quantile(x, (0.005, 0.995), method="nearest")
    top, bottom = np.quantile(y, (0.005, 0.995), method="nearest")
    return int(left), int(top), int(right) + 1, int(bottom) + 1


def crop(image: np.ndarray, side: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (side, side, 3): a square around the foreground, filled up with background."""
    left, top, right, bottom = box(foreground(image))
    reach = (0.5 + MARGIN) * max(right - left, bottom - top)
    x, y = (left + right) / 2, (top + bottom) / 2
    colour = tuple(int(level) for level in np.median(rim(image), axis=0))
    height, width = image.shape[:2]
    canvas = Image.new("RGB", (3 * width, 3 * height), colour)
    canvas.paste(Image.fromarray(np.ascontiguousarray(image)), (width, height))
    square = (width + x - reach, height + y - reach, width + x + reach, height + y + reach)
    return np.asarray(canvas.resize((side, side), Image.Resampling.BICUBIC, box=square))


def halves(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The left and the right half."""
    middle = image.shape[1] // 2
    return image[:, :middle], image[:, middle:]


# ---- what a prompt can ask for ----------------------------------------------------------------------------


def background_name(image: np.ndarray) -> str:
    """The named colour that most of the rim is nearest to, or "" where none has more than half of it."""
    names = list(NAMED)
    palette = to_oklab(np.array([NAMED[name] for name in names], np.uint8))  # (C, 3)
    away = np.linalg.norm(to_oklab(rim(image))[:, None] - palette, axis=-1)  # (P, C)
    votes = np.bincount(away.argmin(1), minlength=len(names)) / len(away)
    return names[votes.argmax()] if votes.max() > 0.5 else ""


def dye_name(image: np.ndarray) -> str:
    """The dye that most of the foreground's colour is nearest to, or "" where there is next to no colour.

    Pixels vote with their chroma, so outlines and the whites of eyes have no say. Lightness counts half:
    a dyed thing keeps its shading.
    """
    lab = to_oklab(image[foreground(image)]) * (0.5, 1, 1)  # (P, 3)
    chroma = np.hypot(lab[:, 1], lab[:, 2])
    if chroma.size == 0 or chroma.mean() < 0.03:
        return ""
    palette = to_oklab(np.array([COLOURS[name] for name in DYES], np.uint8)) * (0.5, 1, 1)  # (C, 3)
    away = np.linalg.norm(lab[:, None] - palette, axis=-1)  # (P, C)
    return DYES[np.bincount(away.argmin(1), chroma, minlength=len(DYES)).argmax()]


def side_name(image: np.ndarray) -> str:
    """ "left" or "right" of the middle by more than a sixteenth of the width, or "middle"."""
    mask = foreground(image)
    x = np.nonzero(mask)[1]
    if x.size == 0:
        return "middle"
    away = (x.mean() + 0.5) / mask.shape[1] - 0.5
    return "middle" if abs(away) <= 1 / 16 else "left" if away < 0 else "right"


def extent(image: np.ndarray) -> float:
    """The longer side of the foreground's box, as a share of the picture's. Unasked, it is 0.875."""
    left, top, right, bottom = box(foreground(image))
    return max((right - left) / image.shape[1], (bottom - top) / image.shape[0])
