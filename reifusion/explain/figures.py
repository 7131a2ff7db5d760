"""How the pictures of this package look: one typeface, exact pixels, and a text that describes each."""

from __future__ import annotations

import json
import os
import textwrap
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, cast

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ..files import whole

DPI = 100  # so that a point of type is 1.39 pixels, and an inch is a round number of pixels
INK, GREY, RULE, PAPER = "#1b1b1f", "#63636e", "#d8d8de", "#ffffff"
PALETTE = ("#2f5bd0", "#dd5327", "#118a7e", "#a3248f", "#c98a00", "#5b5b66", "#7a9b12", "#8257d6")
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, and has the Greek
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.prop_cycle": cycler(color=PALETTE),
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}
MARGIN, GAP, LINE = 28, 10, 18  # pixels: around everything, between pictures, a line of text


@dataclass(frozen=True)
class Exhibit:
    """A picture with its texts and numbers."""

    figure: Figure
    title: str
    alt: str  # a description for readers who cannot see the picture
    guide: str = ""  # what to look for
    numbers: dict[str, Any] = field(default_factory=dict)  # what was measured; can be written as JSON
    table: str = ""  # the numbers as text for a terminal, where they are worth reading

    @property
    def image(self) -> Image.Image:
        return render(self.figure)

    def save(self, path: str | os.PathLike) -> None:
        """Writes a PNG that carries the title, alt text and guide, and the numbers as JSON."""
        chunks = PngInfo()
        texts = {"Title": self.title, "Description": self.alt, "Comment": self.guide, "Software": "reifusion"}
        texts["reifusion-explain"] = json.dumps(self.numbers)
        for keyword, text in texts.items():
            chunks.add_text(keyword, text.encode("utf-8", "replace").decode("utf-8"))
        with whole(path) as temporary:
            self.image.save(temporary, "PNG", pnginfo=chunks)


def styled() -> AbstractContextManager[None]:
    """Applies `STYLE` to the figures that are made inside the `with`."""
    return matplotlib.rc_context(cast(Any, STYLE))


def render(figure: Figure) -> Image.Image:
    canvas = FigureCanvasAgg(figure)
    with styled(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the typeface has no emoji: a box stands for them
        canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def plain(text: str, most: int = 10_000) -> str:
    """Makes a user's text fit for a figure: one line of at most `most` characters, in which $ is no maths."""
    text = "".join(letter if letter.isprintable() else "�" for letter in " ".join(text.split()))
    return (text if len(text) <= most else text[: most - 1] + "…").replace("$", r"\$")


def typeface(size: int) -> ImageFont.FreeTypeFont:
    """Returns the same typeface, for Pillow."""
    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size)


# Placing things by pixels, from the top left


def sheet(width: int, height: int, title: str, subtitle: str = "") -> tuple[Figure, int]:
    """Returns an empty figure with a heading, and where the room below the heading begins."""
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor=PAPER)
    characters = (width - 2 * MARGIN) // 9
    write(figure, MARGIN, MARGIN + 10, plain(title, characters), size=14, weight="bold")
    lines = textwrap.wrap(plain(subtitle), int(characters * 1.2))[:3]
    for i, line in enumerate(lines):
        write(figure, MARGIN, MARGIN + 10 + 26 + i * LINE, line, color=GREY)
    return figure, MARGIN + 34 + len(lines) * LINE


def write(figure: Figure, x: float, y: float, text: str, *, size: float = 10, **style: Any) -> None:
    """Writes a text whose middle is at y; x is its left end unless `ha` says otherwise."""
    width, height = figure.get_size_inches() * DPI
    with styled():
        figure.text(x / width, 1 - y / height, text, size=size, **{"va": "center_baseline", **style})


def axes_at(figure: Figure, x: float, y: float, width: float, height: float) -> Axes:
    total_width, total_height = figure.get_size_inches() * DPI
    with styled():
        return figure.add_axes(
            (x / total_width, 1 - (y + height) / total_height, width / total_width, height / total_height)
        )


def place(figure: Figure, picture: Image.Image, x: int, y: int) -> None:
    """Places a picture without resampling, with a hairline around it that shows where a white one ends."""
    axes = axes_at(figure, x, y, *picture.size)
    axes.imshow(picture, interpolation="nearest", aspect="auto")
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set(visible=True, color=RULE, linewidth=0.8)


def picture_grid(
    pictures: Sequence[Sequence[Image.Image | None]],
    title: str,
    subtitle: str = "",
    *,
    columns: Sequence[str] = (),
    rows: Sequence[str] = (),
    captions: Sequence[Sequence[str]] = (),
    below: int = 0,
) -> Figure:
    """Returns rows of pictures of one shape, with labels above columns, before rows, and under pictures.

    Labels may hold line breaks, and maths between $; users' text goes through `plain`. below: pixels to
    leave free at the bottom.
    """
    first = next(picture for row in pictures for picture in row if picture is not None)
    across = max(map(len, pictures))
    width, height = fitting_size(*first.size, max(across, len(pictures)))
    label = max((10 * max(map(len, row.split("\n"))) for row in rows), default=0) + (GAP if rows else 0)
    head = LINE * max((text.count("\n") + 1 for text in columns), default=0) + (4 if columns else 0)
    foot = [LINE * max((t.count("\n") + 1 for t in texts if t), default=0) for texts in captions]
    foot = foot or [0] * len(pictures)
    total = max(2 * MARGIN + label + across * (width + GAP) - GAP, 480)
    _, top = sheet(total, 100, title, subtitle)  # the heading's height depends on the width only
    bottom = top + head + sum(height + GAP + one for one in foot) + MARGIN - GAP + below
    figure, y = sheet(total, bottom, title, subtitle)
    for j, text in enumerate(columns):
        x = MARGIN + label + j * (width + GAP)
        write(figure, x + width / 2, y + head / 2 - 2, text, ha="center", linespacing=1.3)
    y += head
    for i, row in enumerate(pictures):
        if rows:
            write(figure, MARGIN, y + height / 2, rows[i], linespacing=1.3)
        for j, picture in enumerate(row):
            if picture is None:
                continue
            x = MARGIN + label + j * (width + GAP)
            place(figure, resized(picture, (width, height)), x, y)
            if captions and j < len(captions[i]):
                middle = y + height + foot[i] / 2 + 1
                write(figure, x + width / 2, middle, captions[i][j], size=9, ha="center", color=GREY)
        y += height + GAP + foot[i]
    return figure


def fitting_size(width: int, height: int, many: int) -> tuple[int, int]:
    """Returns the size to show pictures at: a whole multiple for small ones, and less for many."""
    room = min(256, max(96, 1600 // many))
    scale = room / max(width, height)
    if scale > 1:
        scale = int(scale)
    return round(width * scale), round(height * scale)


def resized(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resizes a picture: larger, with each pixel as a square that can be seen; smaller, smoothly."""
    larger = size[0] >= picture.width
    return picture.resize(size, Image.Resampling.NEAREST if larger else Image.Resampling.LANCZOS)


# Numbers as colours


def heat_picture(values: Tensor | np.ndarray, low: float = 0.0, high: float = 1.0) -> Image.Image:
    """(H, W) -> dark where low, bright where high."""
    return _coloured(values, low, high, "magma")


def signed_picture(values: Tensor | np.ndarray, most: float) -> Image.Image:
    """(H, W) -> blue below zero, white at zero, red above; full colour at ±most."""
    return _coloured(values, -most, most, "RdBu_r")


def overlay(picture: Image.Image, heat: Tensor | np.ndarray) -> Image.Image:
    """Returns the picture, faded and grey, under heat (H, W) in [0, 1]: yellow, orange, dark red at 1."""
    grey = np.asarray(picture.convert("L"), dtype=float)[..., None] / 255
    colours = np.asarray(_coloured(heat, 0, 1, "YlOrRd"), dtype=float)
    tint = np.asarray(heat, dtype=float)[..., None].clip(0, 1)  # where there is no heat, there is no tint
    faded = 0.35 + 0.65 * grey
    return Image.fromarray((faded * (255 * (1 - tint) + colours * tint)).round().astype(np.uint8))


BAR = 30  # pixels that `heat_bar` takes at the bottom of a figure


def heat_bar(figure: Figure, highest: str) -> None:
    """Writes what the colours of a figure's `overlay`s mean into the `BAR` pixels left free below them."""
    height = round(figure.get_size_inches()[1] * DPI)
    ramp = np.tile(np.linspace(0, 1, 200), (12, 1))
    y = height - MARGIN - 12
    write(figure, MARGIN, y + 6, "0", size=9, color=GREY)
    place(figure, overlay(Image.new("L", (200, 12), 255), ramp), MARGIN + 12, y)
    write(figure, MARGIN + 220, y + 6, highest, size=9, color=GREY)


def two_heats(picture: Image.Image, one: Tensor, other: Tensor) -> Image.Image:
    """Returns the picture, faded and grey; red where one heat (H, W) leads, blue where the other does."""
    lead = np.asarray(one / one.max().clamp(min=1e-12) - other / other.max().clamp(min=1e-12))
    grey = 0.35 + 0.65 * np.asarray(picture.convert("L"), dtype=float)[..., None] / 255
    colours = np.asarray(signed_picture(lead, 1), dtype=float)
    return Image.fromarray((grey * colours).round().astype(np.uint8))


def _coloured(values: Tensor | np.ndarray, low: float, high: float, colours: str) -> Image.Image:
    scaled = (np.asarray(values, dtype=float) - low) / max(high - low, 1e-12)
    return Image.fromarray(matplotlib.colormaps[colours](scaled.clip(0, 1), bytes=True)[..., :3])
