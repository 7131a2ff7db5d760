"""Compares T5's tokenizer with SentencePiece's and transformers's, on pieces of our own book."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reifusion.families.unigram import (
    END,
    PAD,
    UNKNOWN,
    Unigram,
    from_json,
    from_spiece,
    read_unigram,
    to_json,
    write_unigram,
)

sentencepiece = pytest.importorskip("sentencepiece")
transformers = pytest.importorskip("transformers")

BOOK = Path(__file__).parents[2] / "docs" / "book"
TEXTS = [
    "a cat on the moon, painted by van Gogh",
    "",
    "  many   spaces\t\n here ",
    "½ ﬁne ＡＢＣ ｶﾞ é ① ™ … ㍿ ﷺ",
    "Ünïcödé 漢字 日本 안녕 नमस्ते 😀😀",
    "the noise of the network; x = (1 - σ) x₀ + σ ε",
    "soft\u00adhyphen zero\u200bwidth\ufeff no\u00a0break\u3000wide",
]


@pytest.fixture(scope="module")
def model() -> bytes:
    """`spiece.model` of T5's kind, with 400 pieces from the book's chapters."""
    file = io.BytesIO()
    lines = [line for path in sorted(BOOK.glob("*.md")) for line in path.read_text("utf-8").splitlines()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=file, vocab_size=400, model_type="unigram",
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, character_coverage=0.99, minloglevel=2,
    )  # fmt: skip
    return file.getvalue()


@pytest.fixture(scope="module")
def ours(model: bytes) -> Unigram:
    return from_spiece(model, length=64)


@pytest.fixture(scope="module")
def theirs(model: bytes):
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def padded(ids: list[int], length: int = 64) -> list[int]:
    ids = [*ids[: length - 1], 1]
    return ids + [0] * (length - len(ids))


@pytest.mark.parametrize("text", TEXTS)
def test_texts_are_cut_as_by_sentencepiece_and_transformers(text, ours, theirs, tmp_path):
    assert ours.encode(text) == padded(theirs.encode(text))
    write_unigram(ours, tmp_path)
    fast = transformers.T5TokenizerFast.from_pretrained(tmp_path)
    asked = {"padding": "max_length", "max_length": 64, "truncation": True}
    assert ours.encode(text) == fast(text, **asked).input_ids


@given(st.text(st.characters(exclude_categories=("Cc", "Cs", "Cn"))))
def test_any_text_is_cut_as_by_sentencepiece(ours, theirs, text):
    assert ours.encode(text) == padded(theirs.encode(text))


def test_a_long_text_is_cut_off_before_the_end(ours, theirs):
    text = "noise " * 100
    assert ours.encode(text) == padded(theirs.encode(text)) and ours.encode(text)[-1] == ours.end


def test_special_pieces_are_found_as_they_are(ours, tmp_path):
    write_unigram(ours, tmp_path)
    fast = transformers.T5TokenizerFast.from_pretrained(tmp_path)
    for text in "a</s>b", "<extra_id_0> noise <extra_id_99>", "<pad><unk>":
        ids = fast(text).input_ids
        assert ours.encode(text)[: len(ids)] == ids
    assert ours.vocab_size == len(fast) == 500


def test_a_folder_is_read_as_it_was_written_from_either_file(ours, model, tmp_path):
    write_unigram(ours, tmp_path / "json")
    (tmp_path / "spiece").mkdir()
    (tmp_path / "spiece" / "spiece.model").write_bytes(model)
    for kind in "json", "spiece":
        again = read_unigram(tmp_path / kind, 64)
        assert (again.pieces, again.special, again.table) == (ours.pieces, ours.special, ours.table)
    assert from_json(json.loads(json.dumps(to_json(ours)))).pieces == ours.pieces


@pytest.mark.parametrize("content", [b"", b"\x0a", b"\xff" * 40, b"no model at all", b"\x0a\x03\x0a\x01a"])
def test_what_is_no_model_gets_one_sentence(content):
    with pytest.raises(ValueError, match=r"SentencePiece|pieces"):
        from_spiece(content)


def test_what_is_no_unigram_gets_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="not Unigram"):
        from_json({"model": {"type": "BPE", "vocab": {}}})
    with pytest.raises(ValueError, match=f"{END} and {UNKNOWN}"):
        Unigram([(PAD, 0.0)])
    with pytest.raises(FileNotFoundError, match="neither"):
        read_unigram(tmp_path)
