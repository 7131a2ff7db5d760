"""What the mini knows: the words of the captions that it learned from, as the page offers them.

`python -m reifusion.studio.known` writes known.json anew, from the mini's drawings and their names. The mini
that ships learned from emoji alone, in four looks, and not yet in the places and styles of today's recipes
(see `data/MODEL_CARD.md`): when another ships, what is said of that here goes.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

from ..files import write_json
from ..model.sentences import cut

FILE = Path(__file__).with_name("known.json")
EXAMPLES = (
    "a red apple", "a purple cat", "a cat next to a dog", "a small bird on the left", "a sad face",
    "a flat drawing of a mushroom", "a pink octopus", "a green car on a yellow background",
    "a cartoon drawing of a fish", "a 3d rocket",
)  # fmt: skip
LOOKS = {
    "3d": ("picture", "render", "icon"), "glossy": ("picture", "icon"),
    "flat": ("picture", "drawing", "icon"), "cartoon": ("picture", "drawing"),
}  # fmt: skip
# Words of its captions that no picture showed, so that they do no harm
NOT_SHOWN = (
    "sitting standing sleeping stretching running waiting resting looking around playing floating shining"
    " dreaming smiling dancing lying alone hiding travelling on the floor on a table in a garden in the sun"
    " in the rain at home at night in a forest by the sea on the street in a room under the sky in the snow"
    " highly detailed ultra sharp beautiful cinematic 4k 8k 100mm lens masterpiece best quality soft light"
    " sharp focus trending professional artistic cute"
)


def collect() -> dict[str, Any]:
    """Returns the subjects with their other names, and the words for colours, styles, sizes and places."""
    from ..train.mini.captions import PAIRINGS, POSITIONS, SIZES
    from ..train.mini.colours import NAMES
    from ..train.mini.library import read_library
    from ..train.mini.subjects import COLOUR_WORDS

    subjects: dict[str, set[str]] = {}
    words = {"pair", *COLOUR_WORDS}
    for sprite in read_library(pixels=False).sprites:
        if sprite.category != "clip art":
            subjects.setdefault(sprite.subject, set()).update(sprite.synonyms)
            words.update(*map(split, (sprite.caption, sprite.subject, *sprite.synonyms)))
    phrases = {
        "colours": list(NAMES),
        "sizes": [name for names in SIZES.values() for name in names],
        "styles": list(LOOKS),
        "positions": [names[0] for _, names in POSITIONS.values()],
    }
    said = [NOT_SHOWN, *PAIRINGS, *(name for names in LOOKS.values() for name in names)]
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


def never_read(model: str, prompt: str) -> str | None:
    """Says in a sentence which words of a prompt the model of that name never read; None if it is no mini."""
    if not model.startswith("mini") or not (unknown := unknown_words(prompt)):
        return None
    one = "this word" if len(unknown) == 1 else "these words"
    return f"The mini has never read {one}: {cut(', '.join(unknown), 60)}."


if __name__ == "__main__":
    write_json(FILE, collect())
