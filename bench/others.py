"""The same subjects, drawn by other artists. Only the judge learns from these drawings, and none tests it.

Three of the mini's four styles come from one artist, so a judge that learns from them may learn how Fluent
Emoji draws a fox instead of what a fox is. Drawings by three more artists tell the fox from the style.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from reifusion.train.mini.sprites import (
    EMOJIBASE,
    SpriteRecord,
    choose,
    default_cache,
    drawings,
    fetch,
    read_package,
    spellings,
    to_sprite,
)
from reifusion.train.mini.sprites import PACKAGES as TRAINING_PACKAGES

# package@version -> the archive's SHA-256
PACKAGES = {
    "@iconify-json/twemoji@1.2.5": "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
    "@iconify-json/openmoji@1.2.29": "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5",
    "@iconify-json/emojione@1.2.3": "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
}
TWEMOJI, OPENMOJI, EMOJIONE = PACKAGES
LICENCES = dict(zip(PACKAGES, ("CC-BY-4.0", "CC-BY-SA-4.0", "CC-BY-4.0"), strict=True))


def other_pictures(
    subjects: list[str], cache_dir: Path | None = None
) -> tuple[np.ndarray, list[SpriteRecord]]:
    """Sprites (N, 128, 128, 4) uint8 and what each shows, its package as the style.

    Raises DataError, or ValueError if there is no drawing of any subject.
    """
    wanted = {EMOJIBASE: TRAINING_PACKAGES[EMOJIBASE]} | PACKAGES
    archives = fetch(cache_dir or default_cache(), wanted)
    base = read_package(archives[EMOJIBASE], "en/data.json", "meta/groups.json")
    subgroups = json.loads(base["meta/groups.json"])["subgroups"]
    chosen = [
        (spellings(code), picture)
        for code, picture in choose(json.loads(base["en/data.json"]), subgroups)
        if picture.subject in subjects
    ]
    sprites, records = [], []
    for package, licence in LICENCES.items():
        # Emoji One has no codes, but it has Twemoji's names.
        find = drawings(archives[package], archives[TWEMOJI] if package == EMOJIONE else None)
        for codes, picture in chosen:
            drawing = next(filter(None, map(find, codes)), None)
            if drawing is not None:
                sprites.append(to_sprite(drawing))
                records.append(replace(picture, style=package, licence=licence))
    if not sprites:
        raise ValueError(f"there is no drawing by another hand of: {', '.join(subjects)}")
    return np.stack(sprites), records
