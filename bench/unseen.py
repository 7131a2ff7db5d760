"""Pictures that no training saw, to judge the VAE by: people's skin tones in each style, and flags in 3d.

They are in the packages of the training pictures, and `choose` passes over both: for it, a tone is not a
subject, and flags are drawn in one style only.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from reifusion.train import data
from reifusion.train.data import EMOJI_3D, EMOJIBASE, FLAT, STYLES, to_sprite

from .pixels import on_white


def unseen_pictures(each: int = 20, cache_dir: Path | None = None) -> list[np.ndarray]:
    """(128, 128, 3) uint8 on white: `each` flags, and as many people of each style. Raises DataError."""
    archives = data.fetch(cache_dir or data.default_cache())
    emojis = json.loads(data._read(archives[EMOJIBASE], "en/data.json")["en/data.json"])
    people = [skin["hexcode"] for emoji in emojis for skin in emoji.get("skins", ())]
    flags = [emoji["hexcode"] for emoji in emojis if emoji["hexcode"].startswith(("1F1E", "1F1F"))]
    find = {style: _drawings(style, archives) for style in STYLES}
    rng, pictures = np.random.default_rng(0), []
    for style, codes in [("3d", flags), *((style, people) for style in STYLES)]:
        shuffled = rng.permutation(codes).tolist()
        found = filter(None, (find[style](code.lower()) for code in shuffled))  # not every set has them all
        pictures += [on_white(to_sprite(drawing)) for drawing in islice(found, each)]
    return pictures


def _drawings(style: str, archives: dict[str, Path]) -> Callable[[str], Image.Image | None]:
    """code -> its drawing in this style, if there is one."""
    archive = archives[STYLES[style][0]]
    if STYLES[style][0] == EMOJI_3D:
        renders = data._read(archive, "assets/")

        def render(code: str) -> Image.Image | None:
            content = renders.get(f"assets/{code}.webp")
            return None if content is None else Image.open(io.BytesIO(content))

        return render

    import resvg_py

    icons = json.loads(data._read(archive, "icons.json")["icons.json"])
    named = archives[FLAT] if style == "glossy" else archive  # the same drawings under the same names
    names = json.loads(data._read(named, "chars.json")["chars.json"])

    def vector(code: str) -> Image.Image | None:
        svg = data._svg(icons, names.get(code, ""))
        if svg is None:
            return None
        png = resvg_py.svg_to_bytes(svg_string=svg, width=256, skip_system_fonts=True)
        return Image.open(io.BytesIO(bytes(png)))

    return vector
