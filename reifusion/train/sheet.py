"""A contact sheet: many prompts, the first seeds, and no picture left out. It tells more than a loss.

`python -m reifusion.train.sheet --out images/contact-sheet.png` redraws the sheet in the README.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ..api import load
from ..model.pipeline import StableDiffusion

PROMPTS = (
    "a red apple", "a cat", "a rocket", "an octopus", "a house", "a dog", "a tree", "a car",
    "a pizza", "a banana", "a sunflower", "an elephant", "a guitar", "a castle", "a fish", "a smiling face",
    "a flat drawing of a penguin", "a cartoon sailboat", "a purple cat", "a strawberry on a blue background",
    "a small bird", "a butterfly on the left", "a dog next to a tree", "a cat stretching on the floor",
)  # fmt: skip
LABEL = 30  # height in pixels of the text below each prompt's pictures
NARROWEST = 96  # pixels of a picture that has words below it


def contact_sheet(
    pipe: StableDiffusion,
    prompts: Sequence[str] = PROMPTS,
    seeds: int = 2,
    columns: int = 8,
    **settings: Any,
) -> Image.Image:
    """Draws `seeds` pictures of each prompt above one another, and the prompt below; `columns` prompts a row.

    settings: those of `pipe.generate`; the model's own where they are left open. Small pictures are shown
    twice or more as large, so that there is room for the words.
    """
    tiles = [
        pipe.generate(
            list(prompts),
            seed=k * len(prompts),  # seeds 0, 1, 2, …: picture i of a list has seed + i
            progress=False,
            **settings,
        )
        for k in range(seeds)
    ]
    return arranged(tiles, prompts, columns)


def arranged(
    tiles: Sequence[Sequence[Image.Image]], captions: Sequence[str], columns: int = 8
) -> Image.Image:
    """Puts rows of pictures of one size above one another, and a caption below each column of them.

    columns: how many of these stand side by side before the next begin below.
    """
    columns = min(columns, len(captions))
    width, height = tiles[0][0].size
    times = max(1, -(-NARROWEST // width))
    width, height = times * width, times * height
    cell = len(tiles) * height + LABEL
    sheet = Image.new("RGB", (columns * width, -(-len(captions) // columns) * cell), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for i, caption in enumerate(captions):
        x, y = i % columns * width, i // columns * cell
        for k, row in enumerate(tiles):
            sheet.paste(row[i].resize((width, height), Image.Resampling.NEAREST), (x, y + k * height))
        text = "\n".join(textwrap.wrap(caption, width // 6)[:2])
        draw.multiline_text((x + 4, y + len(tiles) * height), text, fill="black", font=font, spacing=1)
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser("python -m reifusion.train.sheet", description=__doc__)
    parser.add_argument("--model", default="mini", help="as in reifusion generate (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="the PNG to write")
    parser.add_argument("--seeds", type=int, default=2, help="pictures of each prompt (%(default)s)")
    given = parser.parse_args()
    contact_sheet(load(given.model), seeds=given.seeds).save(given.out)


if __name__ == "__main__":
    main()
