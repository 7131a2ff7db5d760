"""Outpainting: a picture is continued beyond its border, as inpainting of a larger one."""

from __future__ import annotations

import re

import numpy as np
from PIL import Image, ImageFilter

from ..model.pictures import Picture, open_picture

SIDES = ("left", "top", "right", "bottom")
MOST = 4096  # pixels on a side
MULTIPLE = 64  # of the sides of what is drawn, which suits every model

Sides = tuple[int, int, int, int]  # pixels on the left, the top, the right and the bottom


def read_sides(text: str) -> Sides:
    """right=128,top=64 -> (0, 64, 128, 0)"""
    found = dict.fromkeys(SIDES, 0)
    for part in text.split(","):
        given = re.fullmatch(rf"\s*({'|'.join(SIDES)})=(\d{{1,6}})\s*", part)
        if given is None:
            raise ValueError(f"outpaint is written like right=128,top=64, not {text!r}")
        found[given[1]] = int(given[2])
    left, top, right, bottom = found.values()
    return left, top, right, bottom


def write_sides(sides: Sides) -> str:
    """Writes what `read_sides` reads."""
    return ",".join(f"{name}={pixels}" for name, pixels in zip(SIDES, sides, strict=True) if pixels)


def check(sides: Sides) -> None:
    """Raises ValueError for sides that cannot grow so."""
    whole = all(isinstance(one, int) and not isinstance(one, bool) for one in sides)
    if len(sides) != 4 or not whole or not any(sides) or not 0 <= min(sides) <= max(sides) <= MOST:
        raise ValueError(f"outpaint adds 1 to {MOST} pixels on some of the four sides, not {sides}")


def larger(picture: Image.Image, sides: Sides, blur: float = 0.0) -> tuple[Image.Image, Image.Image]:
    """RGB -> the larger picture and its mask, which is white where there is nothing yet.

    The new part is filled with the border, blurred, for strengths below 1 to begin with. Sides are multiples
    of 64: what is too much, on the right and at the bottom, `cut` cuts off again. blur: the mask will be
    blurred by that many pixels, so it reaches twice as far into the picture.
    """
    left, top, right, bottom = sides
    inset = [round(2 * blur) * (side > 0) for side in sides]
    right += -(left + picture.width + right) % MULTIPLE
    bottom += -(top + picture.height + bottom) % MULTIPLE
    pixels = np.pad(np.asarray(picture), ((top, bottom), (left, right), (0, 0)), mode="edge")
    spread = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(max(8, max(sides) / 8)))
    spread.paste(picture, (left, top))
    kept = np.zeros((picture.height, picture.width), bool)
    rows = slice(inset[1], picture.height - inset[3])
    columns = slice(inset[0], picture.width - inset[2])
    kept[rows, columns] = True
    mask = np.full((spread.height, spread.width), 255, np.uint8)
    mask[top : top + picture.height, left : left + picture.width][kept] = 0
    return spread, Image.fromarray(mask)


def cut(drawn: Image.Image, picture: Picture, sides: Sides) -> Image.Image:
    """The drawn picture without what only made its sides multiples. picture: what it continues.

    A second pass may have drawn it several times as large.
    """
    width, height = open_picture(picture).size
    left, top, right, bottom = sides
    asked = left + width + right, top + height + bottom
    across, down = (round(side * whole / (side + -side % MULTIPLE)) for side, whole in zip(asked, drawn.size))
    made = drawn.crop((0, 0, across, down))
    made.info.update(drawn.info)
    return made
