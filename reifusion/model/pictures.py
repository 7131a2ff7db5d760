"""Pictures in and out: anything that holds a picture -> RGB -> a tensor in [-1, 1], and back."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .sentences import cut

# Arrays: uint8 (or bool, for black and white), of shape (H, W) or (H, W, C): grey, grey + alpha, RGB or RGBA.
Picture = Image.Image | np.ndarray | str | os.PathLike

KNOWN = "a picture is a PIL image, an array of uint8, or the path of a file"


def open_picture(picture: Picture, under: str = "white") -> Image.Image:
    """Reads any picture as 8-bit RGB, upright; under: the colour that is seen through transparent parts.

    Raises ValueError, in one sentence, for a file that is no picture, and for arrays that could be anything.
    """
    picture = _as_image(picture)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, under), picture)
    return picture.convert("RGB")


def open_mask(picture: Picture) -> Image.Image:
    """Reads a mask as 8-bit grey: white where the picture is opaque and light, black where nothing is."""
    return open_picture(picture, under="black").convert("L")


def open_both(
    init_image: Picture | None, mask: Picture | None
) -> tuple[Image.Image | None, Image.Image | None]:
    """Opens the picture to begin with and the mask of what is redrawn, fitted to it.

    Warns of parts that are transparent, and of a mask of another shape or without white. Raises ValueError
    for a mask without a picture.
    """
    if init_image is None:
        if mask is not None:
            raise ValueError("a mask needs an input image to keep the rest of")
        return None, None
    opened = open_picture(init_image)
    if mask is None:
        if is_transparent(init_image):
            warnings.warn(
                "the init image is transparent in places, which count as white; "
                "to redraw only these, give a mask that is white there",
                stacklevel=1,
            )
        return opened, None
    grey = open_mask(mask)
    if grey.size != opened.size:
        sizes = [f"{width}×{height}" for width, height in (grey.size, opened.size)]
        warnings.warn(f"the mask of {sizes[0]} was fitted to the init image of {sizes[1]}", stacklevel=1)
        grey = fit(grey, *opened.size)
    lightest = np.asarray(grey).max()
    if lightest < 128:
        warnings.warn(
            f"the mask has no white, only levels up to {lightest} of 255, so next to nothing is redrawn",
            stacklevel=1,
        )
    return opened, grey


def is_transparent(picture: Picture) -> bool:
    """True if something shows through a part of the picture."""
    picture = _as_image(picture)
    alpha = picture.convert("RGBA").getchannel("A") if picture.has_transparency_data else None
    return alpha is not None and alpha.getextrema() != (255, 255)


def read_picture(path: str | os.PathLike) -> Image.Image:
    """Opens a picture and reads it to its end, so that a truncated file is found now."""
    try:
        try:
            with Image.open(path) as picture:
                picture.load()
        except ValueError:  # from Pillow, for a PNG with more text or a larger colour profile than it unpacks
            with Image.open(io.BytesIO(b"".join(_needed(Path(path).read_bytes())))) as picture:
                picture.load()
        return picture
    except FileNotFoundError:
        raise ValueError(f"there is no picture at {path}") from None
    except Exception as error:  # Pillow raises anything from OSError to SyntaxError for broken files
        why = getattr(error, "strerror", None) or error  # without the path once more
        raise ValueError(f"{cut(str(path), 200)} cannot be read as a picture: {why}") from error


OUR_TEXTS = (b"reifusion", b"parameters", b"prompt")  # the texts of a PNG in which settings stand


def _needed(png: bytes) -> Iterator[bytes]:
    """Yields the chunks of a PNG, except the texts and the colour profile that are not used here."""
    yield png[:8]
    at = 8
    while at < len(png):
        kind, end = png[at + 4 : at + 8], at + 12 + int.from_bytes(png[at : at + 4], "big")
        keyword = png[at + 8 : at + 88].partition(b"\0")[0]
        if kind not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP") or keyword in OUR_TEXTS:
            yield png[at:end]
        at = end


def _as_image(picture: Picture) -> Image.Image:
    """Reads a picture, upright, with 8 bits for each channel; with the transparency that it has."""
    if isinstance(picture, np.ndarray):
        picture = _of_array(picture)
    elif isinstance(picture, str | os.PathLike):
        picture = read_picture(picture)
    elif not isinstance(picture, Image.Image):
        raise ValueError(f"{KNOWN}, not {type(picture).__name__}")
    if 0 in picture.size:
        raise ValueError(f"a picture of {picture.width}×{picture.height} has no pixels")
    try:
        picture = upright(picture)
        if picture.mode.startswith("I"):  # 16-bit grey, which Pillow would clip, not scale
            picture = _grey(picture, np.asarray(picture).clip(0, 65535) / 257)
        if picture.mode == "F":  # some programs write 0 to 1, others 0 to 255
            levels = np.nan_to_num(np.asarray(picture), nan=0, posinf=255, neginf=0)
            picture = _grey(picture, (levels * 255 if levels.max() <= 1 else levels).clip(0, 255))
        if picture.mode in ("La", "RGBa"):  # Pillow converts them to few other modes
            picture = picture.convert("LA" if picture.mode == "La" else "RGBA")
        return picture
    except Exception as error:  # of Pillow: a picture that was opened but not read can still be broken
        raise ValueError(f"the picture cannot be read: {error}") from error


def upright(picture: Image.Image) -> Image.Image:
    """The picture as its EXIF turns it, as cameras write sideways; as it lies, where that cannot be read."""
    picture.load()
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # Pillow raises anything from SyntaxError to struct.error for EXIF that is broken
        return picture


def _grey(picture: Image.Image, levels: np.ndarray) -> Image.Image:
    """Makes a grey picture of levels from 0 to 255, transparent where `picture` names a transparent level."""
    grey = Image.fromarray(levels.round().astype(np.uint8))
    if "transparency" in picture.info:
        there = np.asarray(picture) != picture.info["transparency"]
        grey.putalpha(Image.fromarray(there * np.uint8(255)))
    return grey


def _of_array(array: np.ndarray) -> Image.Image:
    shape = "×".join(map(str, array.shape))
    if array.dtype == bool and array.ndim == 2:
        array = array * np.uint8(255)
    if array.dtype != np.uint8:
        raise ValueError(f"a picture's array must hold uint8, 0 to 255, not {array.dtype}")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (2, 3, 4)):
        raise ValueError(f"a picture's array must be height×width, or height×width×(1 to 4), not {shape}")
    if 0 in array.shape:
        raise ValueError(f"a picture's array of {shape} has no pixels")
    return Image.fromarray(np.ascontiguousarray(array))


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
