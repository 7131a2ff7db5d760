"""Pictures in and out: anything that holds a picture -> RGB -> a tensor in [-1, 1], and back."""

from __future__ import annotations

import os

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

Picture = Image.Image | np.ndarray | str | os.PathLike  # arrays: uint8, (H, W), (H, W, 3) or (H, W, 4)


def open_picture(picture: Picture) -> Image.Image:
    """Any picture -> 8-bit RGB, upright; transparent parts become white."""
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8:
            raise ValueError(f"a picture's array must hold uint8, not {picture.dtype}")
        picture = Image.fromarray(picture)
    elif not isinstance(picture, Image.Image):
        picture = Image.open(picture)
    picture = ImageOps.exif_transpose(picture)  # cameras write sideways and say so
    if picture.mode.startswith("I"):  # 16-bit grey, which Pillow would clip, not scale
        levels = np.asarray(picture).clip(0, 65535) / 257
        picture = Image.fromarray(levels.round().astype(np.uint8))
    if picture.mode == "La":  # the one mode that does not convert by itself
        picture = picture.convert("LA")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def fit(picture: Image.Image, width: int, height: int) -> Image.Image:
    """Scales a picture to cover width × height, and cuts off the rest evenly at two sides."""
    return ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)


def to_tensor(picture: Image.Image) -> Tensor:
    """RGB or grey -> (1, 3 or 1, H, W), float32 in [-1, 1]"""
    pixels = torch.from_numpy(np.array(picture, dtype=np.float32)).reshape(*picture.size[::-1], -1)
    return pixels.permute(2, 0, 1)[None] / 127.5 - 1


def to_picture(pixels: Tensor) -> Image.Image:
    """(3, H, W), about [-1, 1] -> RGB, rounded: cutting off would darken everything by half a level."""
    levels = ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())
