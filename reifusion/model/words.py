"""How a prompt is cut into words before its bytes are merged, by tables of Unicode in `data/unicode.txt`.

Source: `simple_tokenizer.py` of openai/CLIP.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from pathlib import Path
from typing import NamedTuple

DATA = Path(__file__).parents[1] / "data"
START, END = "<|startoftext|>", "<|endoftext|>"


def split_words(text: str) -> list[str]:
    """text -> its words in lower case: runs of letters, single digits, runs of signs, and endings like 's."""
    words: list[str] = []
    for word in _unicode().word.findall(lower(text)):
        # A special token's name in other letters (<|ENDOFTEXT|>) is three words, whatever follows it.
        words += ("<|", word[2:-2], "|>") if word in (START, END) else (word,)
    return words


def lower(text: str) -> str:
    """text -> composed (NFC) and in lower case"""
    classes = _unicode()
    text = classes.together.sub(lambda part: unicodedata.normalize("NFC", part[0]), text)
    # Letter by letter: `str.lower` would turn a Σ at a word's end into ς.
    return text.replace("Σ", "σ").lower().translate(classes.lower)


def normal(text: str) -> str:
    """text -> in lower case, with one space for each run of spaces: added tokens are found in this form"""
    return re.sub(r"\s+", " ", lower(text))


class _Unicode(NamedTuple):
    together: re.Pattern[str]  # a run of characters that normalization may reorder and compose
    lower: dict[int, int]
    word: re.Pattern[str]


@cache
def _unicode() -> _Unicode:
    lines = re.sub(r"\n +", " ", (DATA / "unicode.txt").read_text("utf-8")).splitlines()
    table = dict(line.split(": ") for line in lines if not line.startswith("#"))
    lower = {}
    for first, last, to in re.findall(r"(\w+)-?(\w*)=(\w+)", table["lower"]):
        shift = int(to, 16) - int(first, 16)
        lower.update({code: code + shift for code in range(int(first, 16), int(last or first, 16) + 1)})
    # "41-5A 61-7A" -> "\U00000041-\U0000005A\U00000061-\U0000007A", the inside of a [class]
    letter, number, alone = (
        re.sub(r"\w+", lambda code: rf"\U{code[0]:0>8}", table[name]).replace(" ", "")
        for name in ("letters", "numbers", "alone")
    )
    # White_Space of Unicode: Python's \s has four more.
    space = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
    special = "|".join(map(re.escape, (START, END)))
    return _Unicode(
        together=re.compile(f"[^{alone}]+"),
        lower=lower,
        word=re.compile(f"{special}|'(?:[stmd]|re|ve|ll)|[{letter}]+|[{number}]|[^{space}{letter}{number}]+"),
    )
