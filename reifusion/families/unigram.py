"""From text to the tokens of T5: SentencePiece's unigram model.

Each piece of text has a probability, and a text is cut into the pieces whose product is largest. Before that,
characters are made alike (½ to 1⁄2, full-width letters to plain ones) by a table that comes with the pieces.
Source: Kudo 2018, "Subword Regularization", arXiv:1804.10959, §3.2; Kudo & Richardson 2018, arXiv:1808.06226.
"""

from __future__ import annotations

import base64
import json
import math
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

SPACE = "▁"  # stands for the space before a word
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
_WHITE = re.compile(r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")  # Unicode's


class Unigram:
    """A tokenizer: pieces of text, and the logarithm of each one's probability."""

    def __init__(
        self,
        pieces: list[tuple[str, float]],
        length: int = 256,
        table: bytes = b"",
        special: Mapping[str, int] | None = None,
    ):
        """pieces: in the order of their numbers. length: texts are padded, and cut, to as many tokens.

        table: what makes characters alike, as SentencePiece stores it; b"" for nothing. special: pieces that
        are found as they are, wherever they stand; None: those in <> that T5 has. Raises ValueError for
        pieces without an end or an unknown.
        """
        self.pieces, self.length, self.table = pieces, length, table
        self._ids = {piece: i for i, (piece, _) in enumerate(pieces)}
        if special is None:
            special = {x: i for x, i in self._ids.items() if re.fullmatch(r"</?(pad|s|unk|extra_id_\d+)>", x)}
        self.special = dict(special)
        if not {END, UNKNOWN} <= self._ids.keys():
            raise ValueError(f"the pieces of a text must include {END} and {UNKNOWN}")
        self.end, self.unknown = self._ids[END], self._ids[UNKNOWN]
        self.pad = self._ids.get(PAD, self.end)
        self._alike = Alike(table)
        self._longest = max(map(len, self._ids))
        # SentencePiece's penalty: an unknown character is 10 below the least probable piece
        self._unknown_score = min(score for _, score in pieces) - 10
        marks = sorted(self.special, key=len, reverse=True)
        self._marks = re.compile(f"({'|'.join(map(re.escape, marks))})") if marks else re.compile("(?!)")

    @property
    def vocab_size(self) -> int:
        """The number of tokens."""
        return max([len(self.pieces) - 1, *self.special.values()]) + 1

    def encode(self, text: str) -> list[int]:
        """text -> its tokens and the end, cut or padded to `length`"""
        ids = [*self.tokenize(text)[: self.length - 1], self.end]
        return ids + [self.pad] * (self.length - len(ids))

    def tokenize(self, text: str) -> list[int]:
        """text -> its tokens: no end, no padding, not cut"""
        ids: list[int] = []
        for part in self._marks.split(text):
            ids += [self.special[part]] if part in self.special else self._plain(part)
        return ids

    def _plain(self, text: str) -> Iterator[int]:
        for word in filter(None, _WHITE.split(self._alike(text))):
            yield from self._word(SPACE + word)

    def _word(self, word: str) -> list[int]:
        """Viterbi's algorithm: the best way to a place is the best to one before it, and one piece."""
        # of the best way to each place: its score, its last piece, and where that begins
        best: list[tuple[float, int, int]] = [(0.0, 0, 0)]
        best += [(-math.inf, 0, 0)] * len(word)
        for start in range(len(word)):
            reached = best[start][0]
            for end in range(start + 1, min(len(word), start + self._longest) + 1):
                piece = self._ids.get(word[start:end])
                if piece is not None:
                    score = reached + self.pieces[piece][1]
                elif end == start + 1:
                    piece, score = self.unknown, reached + self._unknown_score
                else:
                    continue
                # [unigram] §3.2, Kudo 2018: x* = argmax over all cuts x of Σ log p(xᵢ)
                if score > best[end][0]:
                    best[end] = score, piece, start
        ids: list[int] = []
        place = len(word)
        while place > 0:
            _, piece, place = best[place]
            if not (ids and piece == self.unknown == ids[-1]):  # unknown neighbours are one token
                ids.append(piece)
        return ids[::-1]


class Alike:
    """Characters made alike: a table from strings to strings, the longest of which is replaced first.

    SentencePiece stores it as a tree in an array of 32-bit numbers (a double array, Aoe 1989): from node n,
    the byte c leads to node n ^ c, if the label there is c. Where characters combine, transformers replaces
    less at times; this is what T5 was trained with.
    """

    def __init__(self, table: bytes):
        size = struct.unpack("<I", table[:4])[0] if table else 0
        self._tree = struct.unpack(f"<{size // 4}I", table[4 : 4 + size]) if table else ()
        self._strings = table[4 + size :]

    def __call__(self, text: str) -> str:
        """text -> the same, with its characters made alike"""
        if not self._tree:
            return text
        utf8, made, i = text.encode("utf-8", "replace"), bytearray(), 0
        while i < len(utf8):
            end, string = self._longest(utf8, i)
            made += string
            i = end
        return made.decode("utf-8", "replace")

    def _longest(self, utf8: bytes, start: int) -> tuple[int, bytes]:
        """Finds the longest string of the table that begins there: where it ends, and what replaces it."""
        first = utf8[start]
        end = start + 1 + (first >= 0xC0) + (first >= 0xE0) + (first >= 0xF0)  # of a character in UTF-8
        found, node = utf8[start:end], _offset(self._tree[0])
        for i in range(start, len(utf8)):
            node ^= utf8[i]
            if utf8[i] == 0 or node >= len(self._tree) or self._tree[node] & 0x8000_00FF != utf8[i]:
                break
            unit = self._tree[node]
            node ^= _offset(unit)
            if unit & 0x100:  # a string ends here
                place = self._tree[node] & 0x7FFF_FFFF
                end, found = i + 1, self._strings[place : self._strings.index(b"\0", place)]
        return end, found


def _offset(unit: int) -> int:
    """How far the branches of a node are from it: 21 bits, or the upper 21 of 29."""
    return unit >> 10 << (8 if unit & 0x200 else 0)


# Files


def read_unigram(folder: Path, length: int = 256) -> Unigram:
    """Reads a folder with `tokenizer.json`, as transformers writes it, or with `spiece.model`.

    Raises FileNotFoundError if it has neither, ValueError for content that is not understood.
    """
    whole, model = folder / "tokenizer.json", folder / "spiece.model"
    if whole.is_file():
        return from_json(json.loads(whole.read_text("utf-8")), length)
    if model.is_file():
        return from_spiece(model.read_bytes(), length)
    raise FileNotFoundError(f"{folder} has neither tokenizer.json nor spiece.model")


def from_json(content: Mapping[str, Any], length: int = 256) -> Unigram:
    """Makes a tokenizer of the content of `tokenizer.json`."""
    model, before = content["model"], content.get("normalizer") or {}
    if model.get("type", "Unigram") != "Unigram" or not isinstance(model.get("vocab"), list):
        raise ValueError(f"its model is {model.get('type')}, and not Unigram")
    tables = [before, *before.get("normalizers", ())]  # one, or a sequence of them
    charsmap = next((one["precompiled_charsmap"] for one in tables if "precompiled_charsmap" in one), "")
    pieces = [(str(piece), float(score)) for piece, score in model["vocab"]]
    special = {token["content"]: int(token["id"]) for token in content.get("added_tokens", ())}
    return Unigram(pieces, length, base64.b64decode(charsmap or ""), special)


def from_spiece(content: bytes, length: int = 256) -> Unigram:
    """Makes a tokenizer of the content of `spiece.model`, to which T5 adds 100 special pieces."""
    pieces: list[tuple[str, float]] = []
    table = b""
    for field, value in _fields(content):
        if field == 1:  # a piece
            inner = dict(_fields(value))
            pieces.append((inner[1].decode("utf-8"), struct.unpack("<f", inner[2])[0] if 2 in inner else 0.0))
        elif field == 3:  # how characters are made alike
            table = dict(_fields(value)).get(2, b"")
    return Unigram([*pieces, *((f"<extra_id_{i}>", 0.0) for i in reversed(range(100)))], length, table)


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Yields the fields of a message of Protocol Buffers: their numbers, and their values as bytes."""
    i = 0

    def varint() -> int:
        nonlocal i
        value = shift = 0
        while True:
            byte = message[i]
            i, value, shift = i + 1, value | (byte & 0x7F) << shift, shift + 7
            if byte < 0x80:
                return value

    try:
        while i < len(message):
            field, kind = divmod(varint(), 8)
            if kind == 0:
                value, size = varint().to_bytes(10, "little"), 0
            else:
                size = {1: 8, 2: 0, 5: 4}[kind] or varint()
                value = message[i : i + size]
            i += size
            yield field, value
    except (IndexError, KeyError, OverflowError):
        raise ValueError("it is no file of SentencePiece") from None


def to_json(tokenizer: Unigram) -> dict[str, Any]:
    """The content of `tokenizer.json`, which `from_json` and transformers read."""
    end = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": END, "type_id": 0}}]
    space = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "always", "split": True}
    table = base64.b64encode(tokenizer.table).decode()
    as_it_is = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    special = sorted(tokenizer.special.items(), key=lambda one: one[1])
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": content, **as_it_is} for content, i in special],
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": table} if table else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, space]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": end,
            "pair": end,
            "special_tokens": {END: {"id": END, "ids": [tokenizer.end], "tokens": [END]}},
        },
        "decoder": space,
        "model": {"type": "Unigram", "unk_id": tokenizer.unknown, "vocab": tokenizer.pieces},
    }


def write_unigram(tokenizer: Unigram, folder: Path) -> None:
    """Writes the folder that `read_unigram` and `transformers.T5TokenizerFast.from_pretrained` read."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(to_json(tokenizer), ensure_ascii=False), "utf-8")
    config = {
        "tokenizer_class": "T5TokenizerFast",
        "model_max_length": tokenizer.length,
        "eos_token": END,
        "unk_token": UNKNOWN,
        "pad_token": tokenizer.pieces[tokenizer.pad][0],
        "extra_ids": sum(piece.startswith("<extra_id_") for piece in tokenizer.special),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), "utf-8")
