"""What is asked for: from the fields of the page to a request, and to code that repeats the picture."""

from __future__ import annotations

import hashlib
import io
import shlex
from pathlib import Path
from typing import Any

from PIL import Image

from ..cli import _parse_size
from ..files import whole
from ..model.pictures import open_picture
from ..model.request import Request


def ask(
    prompt: str,
    negative: str,
    sampler: str,
    steps: float,
    cfg: float,
    seed: float | None,
    size: str,
    start: dict[str, Any] | None,
    strength: float,
) -> Request:
    """The request that the fields stand for.

    seed: None for a new one. size: "512x768", or "" for the model's. start: what the editor holds, its
    `background` and `layers`, RGBA; what is painted there is redrawn, and all of it if nothing is.
    Raises ValueError, in one sentence, for what cannot be drawn.
    """
    width, height = _parse_size(size.strip()) if size and size.strip() else (None, None)
    picture, mask = _start(start)
    return Request(
        prompt,
        negative,
        picture,
        strength,
        cfg_scale=cfg,
        sampler_name=sampler,
        n_inference_steps=steps,  # type: ignore[arg-type]
        seed=None if seed is None else int(seed),
        width=width,
        height=height,
        mask=mask,
    )


def _start(editor: dict[str, Any] | None) -> tuple[Image.Image | None, Image.Image | None]:
    """What the editor holds -> the picture, RGB, and the mask, L and white where something was painted."""
    background: Any = (editor or {}).get("background")
    layers = [layer.getchannel("A") for layer in (editor or {}).get("layers") or () if layer is not None]
    painted = [alpha for alpha in layers if alpha.getextrema() != (0, 0)]
    empty = background is None or (
        background.mode == "RGBA" and background.getchannel("A").getextrema()[1] == 0
    )
    if empty:
        if painted:
            raise ValueError("a mask was painted, but there is no picture below it: open one first")
        return None, None
    picture = open_picture(background)
    mask = Image.new("L", picture.size)
    for alpha in painted:
        mask.paste(255, mask=alpha.resize(picture.size).point(lambda level: 255 * (level > 127)))
    return picture, mask if painted else None


def keep(picture: Image.Image, folder: Path) -> str:
    """Writes an input picture, named by what is in it, once; so that it can be referred to. -> its path"""
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    path = folder / f"input-{hashlib.sha256(stream.getvalue()).hexdigest()[:10]}.png"
    if not path.exists():
        with whole(path) as temporary:
            temporary.write_bytes(stream.getvalue())
    return str(path)


def as_command(settings: dict[str, Any]) -> str:
    """The line for a shell that draws the picture of these settings, those in its metadata, again."""
    flags = ["negative", "model", "sampler", "steps", "cfg", "seed", "size", "init_image", "mask", "strength"]
    words = ["reifusion", "generate"]
    for name in [*flags, "dtype"]:
        value = settings.get(name)
        if value in (None, "") or (name == "strength" and not settings.get("init_image")):
            continue
        text = "x".join(map(str, value)) if name == "size" else str(value)
        words.append(f"--{name.replace('_', '-')}={text}")
    return shlex.join([*words, "--", settings["prompt"]])


def as_python(settings: dict[str, Any]) -> str:
    """The same as Python."""
    arguments = {
        "uncond_prompt": settings["negative"],
        "sampler_name": settings["sampler"],
        "n_inference_steps": settings["steps"],
        "cfg_scale": settings["cfg"],
        "seed": settings["seed"],
        "width": settings["size"][0],
        "height": settings["size"][1],
    }
    if settings.get("init_image"):
        arguments |= {"input_image": settings["init_image"], "strength": settings["strength"]}
        arguments |= {"mask": settings["mask"]} if settings.get("mask") else {}
    lines = [f"    {name}={value!r}," for name, value in arguments.items()]
    load = f"reifusion.load({settings['model']!r}, dtype={settings['dtype']!r})"
    call = ["picture = pipe.generate(", f"    {settings['prompt']!r},", *lines, ")"]
    return "\n".join(["import reifusion", "", f"pipe = {load}", *call, 'picture.save("picture.png")'])
