"""What the mini knows: the words of the captions that it learned from, as the page offers them.

`python -m reifusion.studio.known` writes known.json anew, from the mini's drawings and their names.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

from ..files import write_json

FILE = Path(__file__).with_name("known.json")
EXAMPLES = (
    "a red apple", "a purple cat", "a cat next to a dog", "a house in the snow", "a fish under water",
    "a small bird on the left", "a sad face", "pixel art of a mushroom", "a rocket at night",
    "a green car on a yellow background",
)  # fmt: skip
# Words that join others: a map of one of them says little
LITTLE = {"a", "an", "the", "of", "on", "in", "at", "to", "and", "with", "by", "as", "from", "under", "is"}


def collect() -> dict[str, Any]:
    """Returns the subjects with their other names, and the words for colours, styles, sizes and places."""
    from ..train.mini.captions import MEDIA, PAIRINGS, POSITIONS, SIZES, STYLED
    from ..train.mini.colours import NAMES
    from ..train.mini.library import read_library
    from ..train.mini.places import PLACES
    from ..train.mini.subjects import COLOUR_WORDS

    subjects: dict[str, set[str]] = {}
    words = {"pair", *COLOUR_WORDS}
    for sprite in read_library(pixels=False).sprites:
        subjects.setdefault(sprite.subject, set()).update(sprite.synonyms)
        words.update(*map(split, (sprite.caption, sprite.subject, *sprite.synonyms)))
    phrases = {
        "colours": list(NAMES),
        "sizes": [name for names in SIZES.values() for name in names],
        "styles": [name for name in (*MEDIA, *STYLED)],
        "places": [names[0] for _, names, _ in PLACES.values()],
        "positions": [names[0] for _, names in POSITIONS.values()],
    }
    said = [*PAIRINGS, *(name for names in (*MEDIA.values(), *STYLED.values()) for name in names)]
    said += [name for _, names, _ in PLACES.values() for name in names]
    said += [name for _, names in POSITIONS.values() for name in names]
    said += [name for names in phrases.values() for name in names]
    said += ["a picture of", "an image of", "an icon of", "a background", "style"]
    words.update(*map(split, said))
    return {
        "subjects": {name: sorted(others - {name}) for name, others in sorted(subjects.items())},
        **phrases,
        "words": sorted(words),
    }


def split(text: str) -> set[str]:
    return set(re.findall(r"[\w'-]+", text.lower()))


@functools.cache
def known() -> dict[str, Any]:
    """Returns what `collect` found when the mini was made."""
    return json.loads(FILE.read_text("utf-8"))


def unknown_words(prompt: str) -> list[str]:
    """Returns the words of a prompt that no caption of the mini had, in their order; numbers are let pass."""
    words = set(known()["words"])
    found = (word for word in re.findall(r"[\w'-]+", prompt.lower()) if not word.isdigit())
    missing = [word for word in found if word not in words and word.rstrip("s") not in words]
    signs = re.findall(r"[^\x00-\u024f\u2000-\u206f]", re.sub(r"\w", "", prompt))  # such as emoji
    return list(dict.fromkeys([*missing, *signs]))


if __name__ == "__main__":
    write_json(FILE, collect())
