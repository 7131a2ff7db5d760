"""The exhibit of the tokenizer shows the merges that the tokenizer makes."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from reifusion.explain.tokens import merges, tokens
from reifusion.model.tokenizer import Tokenizer, as_bytes

from .conftest import TOKENIZER


@settings(max_examples=100, deadline=None)
@given(st.text("catdogrk éß😀", min_size=1, max_size=12))
def test_merging_ends_with_the_tokens_and_goes_one_pair_at_a_time(text):
    for piece in TOKENIZER.pieces(text):
        history = merges(TOKENIZER, piece.word)
        ids = [p.id for p in TOKENIZER.pieces(piece.word)]
        assert history[0] == as_bytes(piece.word)
        assert [TOKENIZER.vocabulary[part] for part in history[-1]] == ids
        assert all("".join(state) == "".join(history[0]) for state in history)
        assert all(len(after) < len(before) for before, after in pairwise(history))


def test_a_word_of_clips_own_vocabulary():
    assert merges(Tokenizer(), "cats")[-1] == ["cats</w>"]
    assert merges(TOKENIZER, "cat") == [["c", "a", "t</w>"], ["ca", "t</w>"], ["cat</w>"]]


def test_every_token_is_shown_with_its_number():
    exhibit = tokens(TOKENIZER, "a cat on a rocket")
    ids = TOKENIZER.encode("a cat on a rocket")
    assert exhibit.numbers["ids"] == ids[: ids.index(TOKENIZER.end) + 2]
    assert exhibit.numbers["pieces"][1:-2] == [piece.text for piece in TOKENIZER.pieces("a cat on a rocket")]
    assert exhibit.numbers["pieces"][-1].startswith("padding × ")
    assert exhibit.image.width == 1100


def test_a_cut_off_tail_is_reported():
    exhibit = tokens(TOKENIZER, "dog " * 60)
    assert "The last 22 of them are cut off" in exhibit.alt and len(exhibit.numbers["ids"]) == 40


def test_an_empty_prompt_is_start_end_and_padding():
    assert [piece.split(" ")[0] for piece in tokens(TOKENIZER, "").numbers["pieces"]] == [
        "start",
        "end",
        "padding",
    ]
