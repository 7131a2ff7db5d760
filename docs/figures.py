"""Pictures and plots that chapters make while the book is built, as HTML with the picture inside."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import Any, cast

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from reifusion.explain.figures import STYLE

matplotlib.rcParams.update(
    cast(Any, STYLE)
)  # plots that are made in a chapter look like those of `reifusion explain`


def strip(pictures: Sequence[Image.Image], labels: Sequence[str] = (), side: int = 128) -> Image.Image:
    """Returns the pictures side by side, each above its label."""
    below = 22 if labels else 0
    page = Image.new("RGB", (len(pictures) * (side + 4) - 4, side + below), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    for i, picture in enumerate(pictures):
        page.paste(picture.resize((side, side), Image.Resampling.NEAREST), (i * (side + 4), 0))
        if labels:
            draw.text((i * (side + 4) + side / 2, side + 3), labels[i], "black", font, anchor="ma")
    return page


def sketch() -> Image.Image:
    """Draws a smiling face in four strokes."""
    page = Image.new("RGB", (512, 512), "white")  # drawn large, so that edges come out smooth
    pen = ImageDraw.Draw(page)
    pen.ellipse((28, 28, 484, 484), fill="#ffc83d")
    for x in (176, 336):
        pen.ellipse((x - 32, 150, x + 32, 240), fill="#402a20")
    pen.arc((140, 200, 372, 400), 20, 160, fill="#402a20", width=22)
    return page.resize((256, 256), Image.Resampling.LANCZOS)


class Figure(str):
    """HTML that a block prints between its text."""


def show(picture: Any, alt: str, caption: str = "") -> Figure:
    """Returns a PIL picture or a matplotlib figure as HTML, to print. alt describes the picture.

    A plot with nothing but lines and letters has no paper of its own, so that it can be shown on a dark page.
    """
    file, kind, look = io.BytesIO(), "png", ""
    if isinstance(picture, Image.Image):
        picture.save(file, "PNG")
    else:
        kind = "svg+xml"
        lines = not any(axis.images for axis in picture.axes)
        picture.savefig(file, format="svg", bbox_inches="tight", transparent=lines, metadata={"Date": None})
        look = ' class="plot"' if lines else ""
    data = base64.b64encode(file.getvalue()).decode()
    text = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return Figure(
        f'<figure><img{look} alt="{html.escape(alt)}" src="data:image/{kind};base64,{data}">{text}</figure>'
    )
