"""Pictures that no training saw, for judging the VAE: people's skin tones in each style, and flags in 3d.

They are in the packages of the training pictures, but `choose` passes over both: a skin tone is not a
subject of its own, and flags are drawn in one style only.
"""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np

from reifusion.train.mini.sprites import (
    EMOJIBASE,
    STYLES,
    default_cache,
    fetch,
    read_package,
    styles,
    to_sprite,
)

from .pixels import on_white


def unseen_pictures(each: int = 20, cache_dir: Path | None = None) -> list[np.ndarray]:
    """(128, 128, 3) uint8 on white: `each` flags, and as many people of each style. Raises DataError."""
    archives = fetch(cache_dir or default_cache())
    emojis = json.loads(read_package(archives[EMOJIBASE], "en/data.json")["en/data.json"])
    people = [skin["hexcode"] for emoji in emojis for skin in emoji.get("skins", ())]
    flags = [emoji["hexcode"] for emoji in emojis if emoji["hexcode"].startswith(("1F1E", "1F1F"))]
    find = styles(archives)
    rng, pictures = np.random.default_rng(0), []
    for style, codes in [("3d", flags), *((style, people) for style in STYLES)]:
        shuffled = rng.permutation(codes).tolist()
        found = filter(None, (find[style](code.lower()) for code in shuffled))  # not every set has every code
        pictures += [on_white(to_sprite(drawing)) for drawing in islice(found, each)]
    return pictures
