"""A table of pictures: one setting changes from left to right, another from top to bottom."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from . import album
from .in_memory import Models, of_model
from .model.sentences import shown
from .settings import ABOUT, Settings, named_here

WRITING = 13  # height of the letters, in pixels
EDGE = 8
MOST = 400  # pictures


@dataclass(frozen=True)
class Axis:
    """A setting and its values."""

    name: str
    values: tuple[Any, ...]
    texts: tuple[str, ...]  # as they are written at the table's edge

    @classmethod
    def read(cls, text: str) -> Axis:
        """cfg=3,5,7 or "prompt=a cat|a dog": commas between values, or | where a value has commas itself.

        Raises ValueError, in one sentence.
        """
        name, found, rest = text.partition("=")
        name = name.strip().replace("-", "_")
        if not found:
            raise ValueError(f"an axis is a setting and its values, like cfg=3,5,7, not {shown(text)}")
        if name not in ABOUT:
            raise ValueError(f"the axis {shown(name)} is no setting; there are {', '.join(ABOUT)}")
        if name == "code":
            raise ValueError("code is run once, before anything is drawn, and cannot change in a table")
        about = ABOUT[name]
        texts = [part.strip() for part in rest.split("|" if "|" in rest else ",")]
        values = []
        for one in texts:
            try:
                if about.kind is bool:
                    values.append({"true": True, "false": False}[one.lower()])
                elif about.kind is list:
                    values.append(about.parse([part.strip() for part in one.split(";") if part.strip()]))
                else:
                    values.append(about.parse(about.kind(one)))
            except KeyError:
                raise ValueError(f"{name} is true or false, not {shown(one)}") from None
            except ValueError as error:
                plain = "literal" not in str(error) and "convert" not in str(error)
                raise ValueError(str(error) if plain else f"{name} cannot be {shown(one)}") from None
        return cls(name, tuple(values), tuple(texts))


NOTHING = Axis("", (None,), ("",))


def cells(usual: Settings, x: Axis, y: Axis) -> list[list[Settings]]:
    """Returns the settings of each picture, row by row. Raises ValueError for what cannot be drawn.

    A seed that is left open is 0 for all, so that nothing differs but what the axes say.
    """
    if x.name and x.name == y.name:
        raise ValueError(f"both axes are {x.name}")
    if (count := len(x.values) * len(y.values)) > MOST:
        raise ValueError(f"a table of {count} pictures is too large; {MOST} is the most")
    if usual.seed is None and "seed" not in (x.name, y.name):
        usual = replace(usual, seed=0)
    rows = []
    for down in y.values:
        row = []
        for right in x.values:
            changed = {axis.name: value for axis, value in ((x, right), (y, down)) if axis.name}
            try:
                # The name of a sampler is that of the program in whose manner is drawn.
                names = {"sampler": usual.sampler, "schedule": usual.schedule} if "manner" in changed else {}
                named = named_here({**names, **changed}, usual.manner)
                settings = replace(usual, **named)
                settings.request().for_model(settings.config())
            except ValueError as error:
                said = ", ".join(f"{name}={shown(value)}" for name, value in changed.items())
                raise ValueError(f"with {said}: {error}") from None
            row.append(settings)
        rows.append(row)
    return rows


def draw(
    rows: Sequence[Sequence[Settings]], device: str | None = None
) -> Iterator[tuple[int, int, Image.Image, album.Entry]]:
    """Yields row, column and picture of each cell, and what its file says. Those of one model follow one
    another.
    """
    places = [(y, x) for y, row in enumerate(rows) for x in range(len(row))]
    models = Models(device)
    for y, x in sorted(places, key=lambda place: (of_model(rows[place[0]][place[1]]), place)):
        settings = rows[y][x]
        pipe, request = models.pipe(settings), settings.request()
        entry = album.entry(settings, request, pipe)
        yield y, x, settings.draw(pipe, request), entry


def table(pictures: Sequence[Sequence[Image.Image]], x: Axis, y: Axis) -> Image.Image:
    """Puts the pictures into a table, with the values at its edges."""
    font = ImageFont.load_default(WRITING)
    width = max(picture.width for row in pictures for picture in row)
    heights = [max(picture.height for picture in row) for row in pictures]
    letters = max(8, width // 7)
    across = [_written(x.name, text, letters) for text in x.texts]
    beside = [_written(y.name, text, 18) for text in y.texts]
    line = WRITING + 4
    top = EDGE + line * max(text.count("\n") + 1 for text in across) if x.name else EDGE
    left = EDGE + int(max(font.getlength(part) for text in beside for part in text.split("\n"))) + EDGE
    left = left if y.name else EDGE
    size = (left + len(across) * (width + EDGE), top + sum(heights) + EDGE * len(heights))
    sheet = Image.new("RGB", size, "white")
    write = ImageDraw.Draw(sheet)
    for column, text in enumerate(across):
        write.multiline_text((left + column * (width + EDGE), 2), text, "black", font, spacing=4)
    down = top
    for text, row, height in zip(beside, pictures, heights, strict=True):
        write.multiline_text((EDGE, down), text, "black", font, spacing=4)
        for column, picture in enumerate(row):
            sheet.paste(picture, (left + column * (width + EDGE), down))
        down += height + EDGE
    return sheet


def _written(name: str, text: str, letters: int) -> str:
    said = text if name == "prompt" else f"{name.replace('_', ' ')} {text}".strip()
    return "\n".join(textwrap.wrap(said, letters)) or " "
