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
from ..model.sentences import cut

FILE = Path(__file__).with_name("known.json")
EXAMPLES = (
    "a red apple", "a purple cat", "a cat next to a dog", "a small bird on the left", "a sad face",
    "a pixel art of a mushroom", "a pink octopus", "a green car on a yellow background",
    "a cartoon drawing of a fish", "a silhouette of a horse", "a 3d rocket", "a sticker of a panda",
    "a pencil drawing of a car", "a snowman in the snow",
)  # fmt: skip
# Words of the first captions that no picture showed, so that they do no harm
NOT_SHOWN = (
    "sitting standing sleeping stretching running waiting resting looking around playing floating shining"
    " dreaming smiling dancing lying alone hiding travelling on the floor on a table in a garden in the sun"
    " in the rain on the street under the sky"
    " highly detailed ultra sharp beautiful cinematic 4k 8k 100mm lens masterpiece best quality soft light"
    " sharp focus trending professional artistic cute"
)


def collect() -> dict[str, Any]:
    """Returns the subjects with their other names, and the words for colours, styles, sizes and where."""
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
        "styles": [*MEDIA, *STYLED],
        "positions": [names[0] for _, names in POSITIONS.values()],
        "places": [names[0] for _, names, _ in PLACES.values()],
    }
    said = [NOT_SHOWN, *PAIRINGS, *(name for names in (*MEDIA.values(), *STYLED.values()) for name in names)]
    said += [name for _, names in POSITIONS.values() for name in names]
    said += [name for _, names, _ in PLACES.values() for name in names]
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
