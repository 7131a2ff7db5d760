"""Facts about a picture that need no network: what stands out, where, how large, and in which colour.

All of them begin with the rim. The colour of most of the rim is the background, and pixels that differ from
it are the foreground. Colours are compared in Oklab, where equal distances look equal.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from reifusion.train.mini.scenes import COLOURS, DYES, to_oklab

NAMED = {"white": (255, 255, 255), **COLOURS}  # the names of backgrounds
RIM = 4  # pixels
FAINT = 0.1  # the distance in Oklab below which a pixel is still background: more than the VAE's ripples
MARGIN = 0.06  # the margin around the box in a crop, as a share of the box's longer side


def on_white(sprite: np.ndarray) -> np.ndarray:
    """(H, W, 4) uint8 -> (H, W, 3): the picture on the default background, white."""
    image = Image.fromarray(np.ascontiguousarray(sprite))
    return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB"))


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
