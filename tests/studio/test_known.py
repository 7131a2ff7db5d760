"""What the mini knows is what its captions say."""

from __future__ import annotations

import pytest

from reifusion.studio.known import EXAMPLES, collect, known, unknown_words
from reifusion.train.mini.captions import SIZES, STYLED
from reifusion.train.mini.colours import NAMES
from reifusion.train.mini.library import default_cache, library_path
from reifusion.train.mini.places import PLACES
from reifusion.train.mini.subjects import CHOSEN, parse_choice


def test_every_subject_with_a_name_of_its_own_is_known():
    subjects = known()["subjects"]
    names = [names[0] for text in CHOSEN.values() for names in parse_choice(text)[2].values() if names]
    assert len(names) > 100 and [name for name in names if name not in subjects] == []


def test_every_word_of_a_caption_is_known():
    said = [*NAMES, *STYLED, *(name for names in SIZES.values() for name in names)]
    said += [name for _, names, _ in PLACES.values() for name in names] + list(EXAMPLES)
    assert [text for text in said if unknown_words(text)] == []


@pytest.mark.skipif(not library_path(default_cache()).exists(), reason="the mini's drawings are not here")
def test_the_list_is_that_of_the_drawings():
    assert collect() == known()


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("a photo of an Astronaut riding a horse", ["photo", "riding"]),
        ("un chat rouge", ["un", "chat", "rouge"]),
        ("two red apples, 3d", []),
        ("a 🦊", ["🦊"]),
        ("", []),
    ],
)
def test_words_that_no_caption_had_are_found(prompt, unknown):
    assert unknown_words(prompt) == unknown
