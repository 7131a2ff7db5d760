"""Inpainting with soft edges, and of a part at full size ("only masked").

A model draws faces badly when they are 60 pixels large. So the part around the mask is cut out, enlarged to
the size at which the model draws well, drawn, made small again, and put back through the mask.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from ..model.request import Request

Box = tuple[int, int, int, int]  # left, top, right and bottom, in pixels


def check(blur: float, padding: int | None) -> None:
    """Raises ValueError for what cannot be done."""
    if not 0 <= blur <= 256:
        raise ValueError(f"mask_blur must be between 0 and 256 pixels, not {blur:g}")
    if padding is not None and not 0 <= padding <= 4096:
        raise ValueError(f"only_masked must be between 0 and 4096 pixels, not {padding}")


def blurred(mask: Image.Image, blur: float) -> Image.Image:
    """A grey mask under a Gaussian of that standard deviation, in pixels, which is cut off at 2.5 of them.

    As OpenCV does it for A1111's web UI: the picture is mirrored at its border.
    """
    if blur == 0:
        return mask
    reach = int(2.5 * blur + 0.5)
    places = torch.arange(-reach, reach + 1, dtype=torch.float64)
    weights = (-(places**2) / (2 * blur**2)).exp()
    weights /= weights.sum()
    levels = np.asarray(mask, dtype=np.float64)
    for axis in (0, 1):
        pad = [(reach, reach) if axis == one else (0, 0) for one in (0, 1)]
        rows = torch.from_numpy(np.pad(levels, pad, mode="reflect"))[None, None]  # (1, 1, H, W)
        kernel = weights.reshape((1, 1, -1, 1) if axis == 0 else (1, 1, 1, -1))
        levels = F.conv2d(rows, kernel)[0, 0].numpy()
    return Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))


def region(mask: Image.Image, padding: int, size: tuple[int, int]) -> Box:
    """The part of a picture to draw: around all that is not black, with a margin, in the ratio of `size`.

    Moved inwards where it would reach beyond the picture, and beyond it on both sides if it is too large.
    Raises ValueError for a mask that is black everywhere.
    """
    found = mask.getbbox()
    if found is None:
        raise ValueError("the mask is black everywhere, so there is nothing to redraw")
    left, top = max(0, found[0] - padding), max(0, found[1] - padding)
    right, bottom = min(mask.width, found[2] + padding), min(mask.height, found[3] + padding)
    width, height = size
    if (right - left) * height > (bottom - top) * width:  # too wide for the ratio
        top, bottom = _longer(top, bottom, int((right - left) * height / width), mask.height)
    else:
        left, right = _longer(left, right, int((bottom - top) * width / height), mask.width)
    return left, top, right, bottom


def _longer(begin: int, end: int, length: int, most: int) -> tuple[int, int]:
    """A stretch of at least that length around another, inside 0 … most where it fits."""
    more = max(0, length - (end - begin))
    begin, end = begin - more // 2, end + more - more // 2
    if end - begin > most:
        return begin, end
    inwards = min(0, most - end) + max(0, -begin)
    return begin + inwards, end + inwards


def only(request: Request, box: Box) -> Request:
    """The request for that part of the picture alone."""
    picture, mask = cast("Image.Image", request.init_image), cast("Image.Image", request.mask)
    size = cast("tuple[int, int]", request.size)
    parts = [cut(one, box).resize(size, Image.Resampling.LANCZOS) for one in (picture, mask)]
    return replace(request, init_image=parts[0], mask=parts[1])


def cut(picture: Image.Image, box: Box) -> Image.Image:
    """That part of a picture; beyond its border, the border goes on."""
    left, top, right, bottom = box
    rows = np.arange(top, bottom).clip(0, picture.height - 1)
    columns = np.arange(left, right).clip(0, picture.width - 1)
    return Image.fromarray(np.asarray(picture)[rows][:, columns])


def put_back(request: Request, box: Box, drawn: Image.Image) -> Image.Image:
    """The whole picture with the drawn part in its place, seen through the mask."""
    picture, mask = cast("Image.Image", request.init_image), cast("Image.Image", request.mask)
    small = drawn.resize((box[2] - box[0], box[3] - box[1]), Image.Resampling.LANCZOS)
    changed = picture.copy()
    changed.paste(small, box[:2])
    made = Image.composite(changed, picture, mask)
    made.info.update(drawn.info)
    return made
