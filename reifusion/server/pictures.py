"""Pictures that clients send, and pictures as they are sent back."""

from __future__ import annotations

import base64
import binascii
import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from .. import a1111, album
from ..album import Entry
from ..model.pictures import is_transparent, upright
from .catalog import Catalog
from .errors import Refusal

FORMATS = ("PNG", "JPEG", "WEBP")


def of_bytes(data: bytes, param: str, most: int) -> Image.Image:
    """Reads a PNG, JPEG or WebP of at most so many pixels, upright; its header is looked at first.

    Raises Refusal, with the field's name, for anything else.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            width, height = picture.size
            found = upright(picture) if width * height <= most else None
    except Exception:  # Pillow raises anything from OSError to SyntaxError for broken files
        wrong = f"{param} is no picture that can be read; PNG, JPEG and WebP can"
        raise Refusal(400, wrong, param, "invalid_image_file") from None
    if found is None:
        raise Refusal(400, f"{param} has {width}×{height} pixels; the most are {most:,}", param)
    return found


def of_text(text: Any, param: str, most: int) -> Image.Image:
    """Reads a picture in base64, with or without `data:image/…;base64,` in front. An address is refused."""
    if not isinstance(text, str):
        raise Refusal(400, f"{param} must be a picture in base64", param)
    if re.match(r"\w+://", text):
        raise Refusal(400, f"{param} is an address, and no address is fetched; send the picture", param)
    try:
        packed = "".join(re.sub(r"^data:[\w/+.-]*;base64,", "", text).split())  # it may come in lines
        data = base64.b64decode(packed, validate=True)
    except (binascii.Error, ValueError):
        raise Refusal(400, f"{param} is not valid base64", param) from None
    return of_bytes(data, param, most)


def transparent_parts(picture: Image.Image) -> Image.Image | None:
    """Returns a mask, white where the picture is transparent; None if it is nowhere."""
    if not is_transparent(picture):
        return None
    alpha = picture.convert("RGBA").getchannel("A")
    return alpha.point(lambda level: 255 * (level < 128))


def without_paths(entry: Entry, catalog: Catalog) -> Entry:
    """Returns what a picture says of itself with names where the server's own paths were."""
    settings = entry.settings
    named: dict[str, Any] = {}
    for name in ("vae", "unet", "refiner", "code", "init_image", "mask"):
        if value := getattr(settings, name):
            named[name] = Path(value).name
    return replace(
        entry,
        settings=replace(
            settings,
            model=catalog.name_of(settings.model),
            lora=tuple((catalog.name_of(file), *rest) for file, *rest in settings.lora),
            control=tuple(
                (catalog.name_of(file), Path(hint).name, weight, start, end)
                for file, hint, weight, start, end in settings.control
            ),
            **named,
        ),
    )


def to_bytes(picture: Image.Image, entry: Entry | None, format: str = "png", quality: int = 100) -> bytes:
    """Returns the file: png, with what it says of itself, jpeg or webp."""
    stream = io.BytesIO()
    if format == "png":
        picture.save(stream, "PNG", pnginfo=None if entry is None else album.chunks(entry))
    else:
        picture.save(stream, format.upper(), quality=quality)
    return stream.getvalue()


def to_text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def infotext(entry: Entry) -> str:
    """Returns the text that A1111 writes under a picture."""
    return a1111.write(entry.settings, entry.model_name, entry.hashes["model"], entry.hashes.get("lora", ()))
