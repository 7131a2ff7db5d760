"""From a prompt to numbers: CLIP's tokenizer (Radford et al. 2021, §2.4).

Byte-pair encoding: a word is bytes, and merges that were learned from text glue the bytes together. `clip.py`
turns the ids into vectors.
"""

from __future__ import annotations

import gzip
import math
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache, lru_cache
from itertools import chain, count, pairwise, takewhile
from pathlib import Path
from typing import NamedTuple

from .words import DATA, END, START, normal, split_words

END_OF_WORD = "</w>"
CLIP_MERGES = 48_894


class Piece(NamedTuple):
    """One token of a prompt, and where it comes from."""

    id: int
    text: str  # what it stands for; � where a token ends within a character
    word: str  # the word that it is a part of, as `split_words` cuts them
    word_index: int  # the number of that word in the prompt, from 0


class Tokenizer:
    """Byte-pair encoding: a word is bytes, and the merges learned from text glue them together, best first.

    merges: None for CLIP's own, the text of a merges file, or its pairs. context_length: what `encode` pads
    and cuts to. vocabulary: token -> id, where a model's order is its own. pad: the token that fills up.
    `.vocabulary` has the id of each token, all less than `.vocab_size`; `.start`, `.end` and `.pad` are ids.

    A token that no merge makes was added later, as a word that textual inversion has learned: it is found in
    a prompt before anything is merged. exact: those of them whose letters must be written exactly so; the
    others may be written in capitals. A word of several tokens has the others as word_1, word_2, …

    Source: Sennrich et al. 2016, Algorithm 1; on bytes, Radford et al. 2019, §2.2. The ids are those of
    `transformers.CLIPTokenizer`, for any text. Raises ValueError for merges that are no pairs, or for a
    vocabulary that lacks their tokens.
    """

    def __init__(
        self,
        merges: str | Sequence[tuple[str, str]] | None = None,
        context_length: int = 77,
        *,
        vocabulary: Mapping[str, int] | None = None,
        pad: str = END,
        exact: Collection[str] = (),
    ):
        if context_length < 2:
            raise ValueError(f"context_length must be 2 or more (start and end), not {context_length}")
        if merges is None:
            pairs = clip_merges()
        elif isinstance(merges, str):
            pairs = parse_merges(merges)
        else:
            pairs = [(left, right) for left, right in merges]
        letters = list(byte_letters().values())
        tokens = [*letters, *(x + END_OF_WORD for x in letters), *(a + b for a, b in pairs), START, END]
        standard = {token: i for i, token in enumerate(tokens)}
        self.context_length = context_length
        self.vocabulary = standard if vocabulary is None else dict(vocabulary)
        if missing := [token for token in (*standard, pad) if token not in self.vocabulary]:
            raise ValueError(f"{len(missing)} tokens are not in the vocabulary, such as {missing[0]!r}")
        self._ranks = {pair: rank for rank, pair in enumerate(pairs)}
        self.start, self.end, self.pad = self.vocabulary[START], self.vocabulary[END], self.vocabulary[pad]
        if bad := [i for i in self.vocabulary.values() if not isinstance(i, int) or i < 0]:
            raise ValueError(f"{bad[0]!r} is not the id of a token")
        added = self.vocabulary.keys() - standard.keys() - {pad, ""}
        # As they are shown: an added token like a word.
        self._tokens = {i: "".join(as_bytes(x)) if x in added else x for x, i in self.vocabulary.items()}
        self.exact = sorted(added.intersection(exact))
        # A padding token of its own becomes special, in prompts too: SD 2.x pads with "!".
        self._special = _any_of((START, END, pad, *self.exact))
        self._added = {normal(token): self._all_of(token) for token in added if token not in self.exact}
        self._find_added = _any_of(self._added)
        # Whoever brings other merges need not wait for CLIP's to be read.
        clips = merges is None or (len(pairs) == CLIP_MERGES and pairs == clip_merges())
        self.is_standard = clips and self.pad == self.end and self.vocabulary == standard

    @classmethod
    def from_file(cls, path: str | Path, context_length: int = 77) -> Tokenizer:
        """From a file of merges, plain or gzipped: a pair a line, after an optional `#version`."""
        content = Path(path).read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
        return cls(content.decode("utf-8"), context_length)

    def _all_of(self, token: str) -> tuple[int, ...]:
        """The ids of an added word: the token's own, and those of its word_1, word_2, …"""
        names = chain([token], (f"{token}_{k}" for k in count(1)))
        return tuple(self.vocabulary[name] for name in takewhile(self.vocabulary.__contains__, names))

    @property
    def vocab_size(self) -> int:
        return 1 + max(self._tokens)

    @property
    def merges_text(self) -> str:
        """The merges as text, one pair a line, as the constructor takes them."""
        return "\n".join(" ".join(pair) for pair in self._ranks)

    def encode(self, text: str) -> list[int]:
        """text -> `context_length` ids: start, the text's, end, padding.

        Warns, naming what was cut, if the text is too long. The end token always stays.
        """
        ids = self.tokenize(text)
        room = self.context_length - 2
        if len(ids) > room:
            message = f"the prompt has {len(ids)} tokens and there is room for {room}, so this is cut off: "
            warnings.warn(message + self.decode(ids[room:]), stacklevel=2)
        ids = [self.start, *ids[:room], self.end]
        return ids + [self.pad] * (self.context_length - len(ids))

    def decode(self, ids: Iterable[int]) -> str:
        """ids -> text, in lower case, a space between words, without start, end and padding.

        Raises ValueError for an id that is not in the vocabulary.
        """
        ids = [int(i) for i in ids]
        if unknown := [i for i in ids if i not in self._tokens]:
            raise ValueError(f"{unknown[0]} is not the id of a token")
        tokens = (self._tokens[i] for i in ids if i not in (self.start, self.end, self.pad))
        return _text("".join(tokens)).replace(END_OF_WORD, " ").strip()

    def tokenize(self, text: str) -> list[int]:
        """text -> its ids: no start, no end, no padding, not cut."""
        return [i for _, ids in self._words(text) for i in ids]

    def pieces(self, text: str) -> list[Piece]:
        """`tokenize`, with each token's text and word. Piece k stands at position k + 1 in `encode`."""
        return [
            Piece(i, _text(self._tokens[i].removesuffix(END_OF_WORD)), word, index)
            for index, (word, ids) in enumerate(self._words(text))
            for i in ids
        ]

    def _words(self, text: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        for special, part in _cut(text, self._special):
            if special:
                yield part, self._all_of(part)
                continue
            for added, piece in _cut(normal(part), self._find_added) if self._added else [(False, part)]:
                if added:
                    yield piece, self._added[piece]
                else:
                    yield from ((word, self._merge(word)) for word in split_words(piece))

    @lru_cache(maxsize=2**15)  # noqa: B019 (on the class, so that a tokenizer can be pickled)
    def _merge(self, word: str) -> tuple[int, ...]:
        # §3.2, Sennrich et al. 2016: of a word's pairs, merge the one learned first, until none is known.
        parts = as_bytes(word)
        while len(parts) > 1:
            best = min(pairwise(parts), key=lambda pair: self._ranks.get(pair, math.inf))
            if best not in self._ranks:
                break
            parts = merge_pair(parts, best)
        return tuple(self.vocabulary[part] for part in parts)


def as_bytes(word: str) -> list[str]:
    """A word as what merging starts from: one letter per byte, the last one marked as the word's end."""
    *rest, last = (byte_letters()[byte] for byte in word.encode("utf-8", errors="replace"))
    return [*rest, last + END_OF_WORD]


def merge_pair(parts: list[str], pair: tuple[str, str]) -> list[str]:
    """`parts` with each occurrence of `pair`, from the left, made one."""
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """A pattern for any of the tokens, the longest that fits."""
    return re.compile("|".join(map(re.escape, sorted(dict.fromkeys(tokens), key=len, reverse=True))))


def _cut(text: str, pattern: re.Pattern[str]) -> Iterator[tuple[bool, str]]:
    """text -> its parts in order: (True, a match of the pattern) and (False, the text between two)"""
    end = 0
    for found in pattern.finditer(text):
        yield False, text[end : found.start()]
        yield True, found[0]
        end = found.end()
    yield False, text[end:]


def _text(token: str) -> str:
    letters = {letter: byte for byte, letter in byte_letters().items()}
    return bytes(letters[letter] for letter in token).decode("utf-8", errors="replace")


@cache
def byte_letters() -> dict[int, str]:
    """A visible letter for each byte, so that merges can stand in a text file. Source: GPT-2's encoder.py."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


@cache
def clip_merges() -> list[tuple[str, str]]:
    """The merges of CLIP's vocabulary."""
    return parse_merges(gzip.decompress((DATA / "clip_merges.txt.gz").read_bytes()).decode("utf-8"))


def parse_merges(text: str) -> list[tuple[str, str]]:
    """The text of a merges file -> its pairs. Raises ValueError, naming the line, for one that is no pair."""
    pairs = []
    for number, line in enumerate(text.split("\n"), 1):
        parts = line.split()
        if len(parts) == 2 and not (number == 1 and "#version" in line):
            pairs.append((parts[0], parts[1]))
        elif parts and number > 1:
            raise ValueError(f"line {number} of the merges is not a pair: {line!r}")
    return pairs
