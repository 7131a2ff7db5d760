"""What the mini knows is what its captions say."""

from __future__ import annotations

import pytest

from reifusion.cli.main import main
from reifusion.studio.known import EXAMPLES, collect, known, unknown_words
from reifusion.train.mini.captions import MEDIA, POSITIONS, SIZES, STYLED
from reifusion.train.mini.colours import NAMES
from reifusion.train.mini.library import default_cache, library_path
from reifusion.train.mini.places import PLACES


def test_the_subjects_are_those_of_the_mini_that_ships():
    subjects = known()["subjects"]
    assert len(subjects) == 934  # as its model card says
    assert {"cat", "apple", "guitar", "octopus"} <= subjects.keys()


def test_every_word_of_a_caption_is_known():
    said = [*NAMES, *MEDIA, *STYLED, *(name for names in SIZES.values() for name in names), *EXAMPLES]
    said += [name for _, names in POSITIONS.values() for name in names]
    said += [name for _, names, _ in PLACES.values() for name in names]
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


def test_the_command_says_what_the_mini_never_read(tmp_path, capsys):
    line = ["generate", "a photo of a cat", "--steps=2", "--seed=1", "--quiet", f"--out={tmp_path}"]
    assert main(line) == 0
    assert "reifusion: the mini has never read this word: photo" in capsys.readouterr().err
    assert main(["generate", "a red cat", *line[2:]]) == 0
    assert capsys.readouterr().err == ""
