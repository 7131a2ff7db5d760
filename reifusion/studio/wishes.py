"""From the fields of the page to a request."""

from __future__ import annotations

from typing import Any

from PIL import Image

from ..model.pictures import open_picture
from ..model.request import Request
from ..spelling import read_size


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
    schedule: str | None = None,
) -> Request:
    """Returns the request that the fields stand for.

    seed: None for a new one. size: "512x768", or "" for the model's. start: the editor's content,
    `background` and `layers`, RGBA; the painted part is redrawn, or everything if nothing is painted.
    schedule: "" for the sampler's own. Raises ValueError, in one sentence, for what cannot be drawn.
    """
    picture, mask = _start(start)
    return Request(
        prompt,
        negative,
        init_image=picture,
        mask=mask,
        strength=strength,
        cfg=cfg,
        sampler=sampler,
        schedule=schedule or None,
        steps=steps,  # type: ignore[arg-type]
        seed=None if seed is None else int(seed),
        size=read_size(size.strip()) if size and size.strip() else None,
    )


def _start(editor: dict[str, Any] | None) -> tuple[Image.Image | None, Image.Image | None]:
    """The editor's content -> the picture, RGB, and the mask, L and white where something was painted."""
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
