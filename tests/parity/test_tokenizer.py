"""Compares the tokenizer with transformers's: exactly the same ids for any text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from reifusion.model.tokenizer import END, START, Tokenizer, byte_letters, clip_merges, split_words
from reifusion.model.tokenizer_folder import read_tokenizer, write_tokenizer

transformers = pytest.importorskip("transformers")

# Parts of prompts, and texts that have broken tokenizers before.
FRAGMENTS = [
    *(
        "a photo of a cat",
        "Trending on ArtStation, 8k",
        "it's",
        "we'LL",
        "'ve",
        "''s",
        "!'s",
        "rock'n'roll",
        "O'Reilly",
    ),
    *(
        "1girl",
        "2024",
        "½⅓",
        "٣",
        "Ⅻ",
        "x²",
        "(masterpiece:1.2)",
        "[a|b]",
        "a_b",
        "--ar 16:9",
        "...",
        "#%^&*",
        "\\",
    ),
    *(
        "naïve café",
        "e\u0301",
        "A\u030a",
        "q\u0323\u0307",
        "q\u0307\u0323",
        "한글",
        "\u1112\u1161\u11ab",
        "が",
        "か\u3099",
    ),
    *("ΑΣ", "Σ", "ΟΔΟΣ!", "İstanbul", "ıI", "ẞß", "ǅ", "ﬁ", "K", "Å", "≯", ">\u0338", "ſ", "Ω"),
    *("日本の桜", "一只猫", "ภาษาไทย", "हिन्दी", "עִבְרִית", "العربية", "ქართული", "Ა", "ᏣᎳᎩ"),
    *("👩\u200d🚀", "🇺🇳", "👍🏽", "❤\ufe0f", "\U0001fae8", "\ufffd", "\ue000", "\U0010ffff", "\u0378"),
    *(
        " ",
        "   ",
        "\t",
        "\n",
        "\r\n",
        "\x0b",
        "\x1c",
        "\x1f",
        "\x85",
        "\xa0",
        "\u1680",
        "\u180e",
        "\u200b",
        "\u2028",
    ),
    *(
        "\u3000",
        "\ufeff",
        "\xad",
        "\x00",
        "\x7f",
        "&amp;",
        "&lt;b&gt;",
        "<b>",
        "</w>",
        "a</w>",
        "<|",
        "|>",
        "<||>",
    ),
    *(
        START,
        END,
        END.upper(),
        "<|StartOfText|>",
        f"!{END}!",
        f"x{START}'s",
        END[:-1],
        "<|endoftext|",
        "endoftext|>",
    ),
    # Newer than some Python's Unicode, or than the reference's own.
    *(
        "\ua7cb",
        "\ua7dc",
        "\U00010570",
        "\U00016ea0",
        "\U00031350",
        "\U0001e4f0",
        "\U00011935\U00011930",
        "\U00016d67" * 2,
    ),
    *("q\u0301\u0898", "\u1715\u0334", "\U00010d24\u0323", "\U00010d69\u0323"),
]
TEXTS = st.one_of(
    st.text(max_size=40),
    st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join),
    st.lists(st.sampled_from(FRAGMENTS), max_size=12).map(" ".join),
    st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=3)), max_size=12).map("".join),
)


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return Tokenizer()


@pytest.fixture(scope="module")
def theirs(ours: Tokenizer, tmp_path_factory: pytest.TempPathFactory):
    # The published files have one fact in them that ours have not: which id each token has. It is that of
    # openai/CLIP's simple_tokenizer.py, and test_ids_are_the_published_ones holds it.
    folder = tmp_path_factory.mktemp("clip")
    write_tokenizer(ours, folder)
    vocabulary = json.loads((folder / "vocab.json").read_text("utf-8"))
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=clip_merges())


def test_ids_are_the_published_ones(ours: Tokenizer):
    """The ids are from the documentation and the tests of openai/CLIP and transformers."""
    assert ours.vocab_size == 49408 and (ours.start, ours.end, ours.pad) == (49406, 49407, 49407)
    assert ours.tokenize("a photo of a cat") == [320, 1125, 539, 320, 2368]
    assert ours.tokenize("a photo of a dog") == [320, 1125, 539, 320, 1929]
    assert ours.tokenize("Hello world!") == [3306, 1002, 256]
    assert ours.tokenize("a diagram") == [320, 22697]


@settings(max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(TEXTS)
@example("")
@example(" \n ")
@example("".join(FRAGMENTS))
@example(" ".join(FRAGMENTS))
def test_ids_and_text_are_the_reference_s_for_any_text(ours: Tokenizer, theirs, text: str):
    ids = theirs(text)["input_ids"]
    assert [ours.start, *ours.tokenize(text), ours.end] == ids
    assert [piece.id for piece in ours.pieces(text)] == ids[1:-1]
    assert ours.decode(ids) == theirs.decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 49407), max_size=12))
def test_decoding_any_ids_is_the_reference_s(ours: Tokenizer, theirs, ids: list[int]):
    assert ours.decode(ids) == theirs.decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


@pytest.mark.filterwarnings("ignore:the prompt has")
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(st.lists(TEXTS, min_size=1, max_size=6).map(" ".join))
def test_padding_and_cutting_are_the_reference_s(ours: Tokenizer, theirs, text: str):
    expected = theirs(text, padding="max_length", truncation=True, max_length=77)["input_ids"]
    assert ours.encode(text) == expected


@pytest.mark.slow
def test_words_are_the_reference_s_for_every_code_point(theirs):
    """Each between letters, digits, signs and accents; of planes 4 to 16, which have no letters, a sample."""
    normalizer, splitter = theirs.backend_tokenizer.normalizer, theirs.backend_tokenizer.pre_tokenizer
    for first in [
        *range(0, 0xD800, 0x800),
        *range(0xE000, 0x40000, 0x800),
        *range(0x40000, 0x110000, 0x8000),
    ]:
        text = "".join(f"a{x}b 1{x}! q\u0301{x} q{x}\u0334" for x in map(chr, range(first, first + 0x800)))
        expected = [word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))]
        words = ["".join(byte_letters()[byte] for byte in word.encode()) for word in split_words(text)]
        assert words == expected, f"near U+{first:04X}"


def _save_reference(folder: Path, pad: str, *, legacy: bool) -> None:
    tokenizer = Tokenizer()
    write_tokenizer(tokenizer, folder)
    if legacy:  # as Stable Diffusion 2.x is published: the two files disagree, and the map is right
        (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": pad}))
    else:
        vocabulary = json.loads((folder / "vocab.json").read_text("utf-8"))
        for file in folder.iterdir():
            file.unlink()
        transformers.CLIPTokenizer(vocab=vocabulary, merges=clip_merges(), pad_token=pad).save_pretrained(
            folder
        )
        assert not (folder / "vocab.json").exists() and (folder / "tokenizer.json").exists()


@pytest.mark.parametrize("legacy", [True, False], ids=["vocab.json and merges.txt", "tokenizer.json"])
@pytest.mark.parametrize("pad", [END, "!"])
def test_a_folder_reads_as_in_the_reference(tmp_path: Path, pad: str, legacy: bool):
    _save_reference(tmp_path, pad, legacy=legacy)
    theirs, ours = transformers.CLIPTokenizer.from_pretrained(tmp_path), read_tokenizer(tmp_path)
    assert ours.pad == theirs.pad_token_id and ours.is_standard == (pad == END)
    for text in ("", "hi! a cat, !!", f"a !{END}! b", "wow!now"):
        assert ours.encode(text) == theirs(text, padding="max_length", max_length=77)["input_ids"], text


def test_the_reference_reads_what_we_save(tmp_path: Path):
    tokenizer = Tokenizer("c a\nca t</w>\nd o\ndo g</w>\n", context_length=12)
    write_tokenizer(tokenizer, tmp_path)
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    text = "A cat, a dog 2"
    assert theirs(text, padding="max_length", truncation=True)["input_ids"] == tokenizer.encode(text)
    again = read_tokenizer(tmp_path, context_length=12)
    assert again.encode(text) == tokenizer.encode(text) and again.merges_text == tokenizer.merges_text
