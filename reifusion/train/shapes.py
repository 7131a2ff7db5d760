"""Eight things in eight colours, drawn by code: the pictures of `reifusion train tiny`, 32×32 pixels.

    python -m reifusion.train.shapes FOLDER     # writes them and their captions, to look at

No drawing is like another: a thing may lie anywhere, larger or smaller, by day or at night, in any of its
colours. A caption says some of this; what it leaves open is what seeds decide. One colour of each thing is
never shown: a model that draws it has understood both words.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import random
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

from .images import Item, Pictures

SIDE = 32  # pixels
COUNT = 4_000
FINER = 4  # drawn so many times as large and then reduced, so that edges come out smooth
RGB = tuple[int, int, int]

COLOURS: dict[str, RGB] = {
    "red": (217, 38, 38),
    "orange": (250, 140, 22),
    "yellow": (250, 214, 40),
    "green": (58, 160, 66),
    "blue": (44, 104, 224),
    "purple": (130, 54, 178),
    "pink": (250, 130, 190),
    "brown": (128, 80, 44),
}
DAY, NIGHT = (255, 255, 255), (24, 26, 60)
PLACES = {"": (0.32, 0.68), " on the left": (0.28, 0.36), " on the right": (0.64, 0.72)}  # of the middle


class Pen:
    """Draws in a thing's own coordinates: its middle is (0, 0), and it reaches from −1 to 1."""

    def __init__(self, picture: Image.Image, x: float, y: float, reach: float, colour: RGB):
        self.draw, self.x, self.y, self.reach = ImageDraw.Draw(picture), x, y, reach
        self.colour = colour
        self.dark: RGB = (colour[0] * 5 // 9, colour[1] * 5 // 9, colour[2] * 5 // 9)

    def polygon(self, points: Sequence[tuple[float, float]], colour: RGB) -> None:
        self.draw.polygon([(self.x + self.reach * a, self.y + self.reach * b) for a, b in points], colour)

    def box(self, left: float, top: float, right: float, bottom: float, colour: RGB) -> None:
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], colour)

    def disc(self, x: float, y: float, width: float, height: float, colour: RGB) -> None:
        """width, height: from the middle (x, y) to the edge."""
        x, y, r = self.x + self.reach * x, self.y + self.reach * y, self.reach
        self.draw.ellipse([x - r * width, y - r * height, x + r * width, y + r * height], colour)


WHITE, BLACK, GOLD, BARK = (255, 255, 255), (20, 20, 20), (255, 220, 60), (110, 72, 40)


def _star(pen: Pen) -> None:
    corners = [(1.0 if k % 2 == 0 else 0.42, math.pi * (k / 5 - 0.5)) for k in range(10)]
    pen.polygon([(r * math.cos(a), r * math.sin(a)) for r, a in corners], pen.colour)


def _heart(pen: Pen) -> None:
    for side in (-0.47, 0.47):
        pen.disc(side, -0.35, 0.53, 0.5, pen.colour)
    pen.polygon([(-0.94, -0.15), (0.94, -0.15), (0, 0.95)], pen.colour)


def _house(pen: Pen) -> None:
    pen.box(-0.75, -0.1, 0.75, 0.95, pen.colour)
    pen.polygon([(-1, -0.1), (0, -1), (1, -0.1)], pen.dark)
    pen.box(-0.2, 0.35, 0.2, 0.95, WHITE)


def _tree(pen: Pen) -> None:
    pen.box(-0.16, 0.2, 0.16, 1, BARK)
    for x, y in ((-0.4, -0.05), (0.4, -0.05), (0, -0.5)):
        pen.disc(x, y, 0.5, 0.48, pen.colour)


def _fish(pen: Pen) -> None:
    pen.polygon([(0.3, 0), (1, -0.6), (1, 0.6)], pen.dark)
    pen.disc(-0.2, 0, 0.8, 0.52, pen.colour)
    pen.disc(-0.55, -0.12, 0.16, 0.16, WHITE)
    pen.disc(-0.58, -0.12, 0.08, 0.08, BLACK)


def _flower(pen: Pen) -> None:
    for k in range(6):
        angle = math.pi * k / 3
        pen.disc(0.58 * math.cos(angle), 0.58 * math.sin(angle), 0.38, 0.38, pen.colour)
    pen.disc(0, 0, 0.34, 0.34, GOLD)


def _boat(pen: Pen) -> None:
    pen.polygon([(-1, 0.4), (1, 0.4), (0.6, 0.95), (-0.6, 0.95)], BARK)
    pen.polygon([(-0.05, -1), (-0.05, 0.3), (-0.75, 0.3)], pen.colour)
    pen.polygon([(0.08, -0.8), (0.08, 0.3), (0.8, 0.3)], pen.colour)


def _cat(pen: Pen) -> None:
    for side in (-1.0, 1.0):
        pen.polygon([(0.85 * side, -0.95), (0.85 * side, 0.1), (0.1 * side, -0.5)], pen.dark)
    pen.disc(0, 0.15, 0.88, 0.78, pen.colour)
    for side in (-0.35, 0.35):
        pen.disc(side, 0, 0.15, 0.2, BLACK)
    pen.polygon([(-0.15, 0.35), (0.15, 0.35), (0, 0.52)], WHITE)


SUBJECTS: dict[str, Callable[[Pen], None]] = {
    "star": _star,
    "heart": _heart,
    "house": _house,
    "tree": _tree,
    "fish": _fish,
    "flower": _flower,
    "boat": _boat,
    "cat": _cat,
}
# A colour for each thing in which it is never shown: a green star, a blue heart, …
UNSEEN = {subject: list(COLOURS)[(i + 3) % len(COLOURS)] for i, subject in enumerate(SUBJECTS)}


class Scene(NamedTuple):
    """What is to be seen, and the words for it."""

    subject: str
    colour: str
    place: str  # a key of PLACES
    night: bool
    caption: str


def scene(subject: str, draw: random.Random, colour: str | None = None) -> Scene:
    """Chooses what a picture of the thing shows and its caption. colour: None for one that is shown."""
    colour = colour or draw.choice([name for name in COLOURS if name != UNSEEN[subject]])
    said = f"{colour} " if draw.random() < 0.75 else ""
    place = draw.choice(("", "", *PLACES))
    night = draw.random() < 0.25
    article = "an" if said == "orange " else "a"
    caption = f"{article} {said}{subject}{place}{' at night' if night else ''}"
    return Scene(subject, colour, place, night, caption)


def picture(shown: Scene, draw: random.Random) -> Image.Image:
    """Draws a scene, at a place and in a size that its words leave open."""
    side = SIDE * FINER
    page = Image.new("RGB", (side, side), NIGHT if shown.night else DAY)
    x, y = draw.uniform(*PLACES[shown.place]), draw.uniform(0.42, 0.58)
    pen = Pen(page, side * x, side * y, side * draw.uniform(0.22, 0.32), COLOURS[shown.colour])
    SUBJECTS[shown.subject](pen)
    return page.resize((SIDE, SIDE), Image.Resampling.BOX)


def drawing(number: int) -> tuple[Image.Image, Scene]:
    """Returns one of endlessly many drawings."""
    draw = random.Random(number)
    shown = scene(draw.choice(list(SUBJECTS)), draw)
    return picture(shown, draw), shown


def shapes() -> Pictures:
    """Returns the pictures that tiny is trained on."""
    return first(COUNT)


@cache
def first(count: int) -> Pictures:
    """Returns the first drawings."""
    files, items = [], []
    for number in range(count):
        image, shown = drawing(number)
        file = io.BytesIO()
        image.save(file, "PNG", compress_level=1)
        files.append(file.getvalue())
        items.append(Item(number, f"shape {number}", SIDE, SIDE, (shown.caption,)))
    return Pictures(files.__getitem__, items)


def main() -> None:
    parser = argparse.ArgumentParser("python -m reifusion.train.shapes", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=COUNT, help="of pictures (%(default)s)")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(given.count):
        image, shown = drawing(number)
        image.save(given.folder / f"{number:05}.png")
        rows.append(json.dumps({"file_name": f"{number:05}.png", "text": shown.caption}))
    (given.folder / "metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
