"""From a prompt to numbers: CLIP's tokenizer (Radford et al. 2021, §2.4).

Byte-pair encoding: a word is bytes, and merges that were learned from text glue the bytes together. `clip.py`
turns the ids into vectors.
"""

from __future__ import annotations

import gzip
import json
import math
import re
import unicodedata
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

DATA = Path(__file__).parents[1] / "data"
START, END = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"


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
    `.start`, `.end` and `.pad` are the ids of those tokens; all ids are less than `.vocab_size`.

    A token that no merge makes was added later, as a word that textual inversion has learned: it is found in
    a prompt before anything is merged. exact: those of them whose letters must be written exactly so; the
    others may be written in capitals.

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
        self._ids = standard if vocabulary is None else dict(vocabulary)
        if missing := [token for token in (*standard, pad) if token not in self._ids]:
            raise ValueError(f"{len(missing)} tokens are not in the vocabulary, such as {missing[0]!r}")
        self._ranks = {pair: rank for rank, pair in enumerate(pairs)}
        self.start, self.end, self.pad = self._ids[START], self._ids[END], self._ids[pad]
        if bad := [i for i in self._ids.values() if not isinstance(i, int) or i < 0]:
            raise ValueError(f"{bad[0]!r} is not the id of a token")
        added = self._ids.keys() - standard.keys() - {pad, ""}
        # As they are shown: an added token like a word.
        self._tokens = {i: "".join(as_bytes(x)) if x in added else x for x, i in self._ids.items()}
        self.exact = sorted(added.intersection(exact))
        # A padding token of its own becomes special, in prompts too: SD 2.x pads with "!".
        self._special = _any_of((START, END, pad, *self.exact))
        self._added = {_normal(token): self._ids[token] for token in added if token not in self.exact}
        self._find_added = _any_of(self._added)
        self.is_standard = self.pad == self.end and pairs == clip_merges() and self._ids == standard

    @classmethod
    def from_file(cls, path: str | Path, context_length: int = 77) -> Tokenizer:
        """From a file of merges, plain or gzipped: a pair a line, after an optional `#version`."""
        content = Path(path).read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
        return cls(content.decode("utf-8"), context_length)

    @classmethod
    def from_folder(cls, path: str | Path, context_length: int = 77) -> Tokenizer:
        """From the `tokenizer` folder of a diffusers model: vocab.json and merges.txt, or tokenizer.json.

        Raises FileNotFoundError if it has neither, ValueError as the constructor does.
        """
        folder = Path(path)

        def content(name: str) -> dict[str, Any]:
            file = folder / name
            return json.loads(file.read_text("utf-8")) if file.is_file() else {}

        merges: str | list[tuple[str, str]]
        whole, config = content("tokenizer.json"), content("tokenizer_config.json")
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            vocabulary = content("vocab.json")
            merges = (folder / "merges.txt").read_text("utf-8")
        elif whole:
            vocabulary = whole["model"]["vocab"]
            merges = [tuple(x.split() if isinstance(x, str) else x) for x in whole["model"]["merges"]]
        else:
            raise FileNotFoundError(f"{folder} has neither vocab.json and merges.txt nor tokenizer.json")
        # Added tokens stand in one or more of three places, by the version of transformers.
        added: dict[str, Any] = {token: {"id": i} for token, i in content("added_tokens.json").items()}
        for i, token in config.get("added_tokens_decoder", {}).items():
            added[token["content"]] = {**token, "id": int(i)}
        added |= {token["content"]: token for token in whole.get("added_tokens", ())}
        special = content("special_tokens_map.json")
        written = {_content(token) for token in special.get("additional_special_tokens", ())}
        written |= {token for token, facts in added.items() if not facts.get("normalized", True)}
        pad = END
        for entry in config, special:  # the second has the last word
            pad = _content(entry.get("pad_token") or pad)
        vocabulary = vocabulary | {token: facts["id"] for token, facts in added.items()}
        return cls(merges, context_length, vocabulary=vocabulary, pad=pad, exact=written)

    def save_folder(self, path: str | Path) -> None:
        """Writes the folder that `from_folder` and `transformers.CLIPTokenizer.from_pretrained` read."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        merged = Tokenizer(self.merges_text)._ids.keys()
        added = {token: i for token, i in self._ids.items() if token not in merged}
        vocabulary = {token: i for token, i in self._ids.items() if token in merged}
        (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), "utf-8")
        (folder / "merges.txt").write_text(f"#version: 0.2\n{self.merges_text}\n", "utf-8")
        pad = self._tokens[self.pad]
        special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
        (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2))
        config: dict[str, Any] = {"tokenizer_class": "CLIPTokenizer", "model_max_length": self.context_length}
        if added:
            (folder / "added_tokens.json").write_text(json.dumps(added, ensure_ascii=False), "utf-8")
            config["added_tokens_decoder"] = {
                str(self._ids[token]): {
                    "content": token,
                    "lstrip": False,
                    "normalized": token in self._ids.keys() - merged - {pad, *self.exact},
                    "rstrip": False,
                    "single_word": False,
                    "special": token in (START, END, pad),
                }
                for token in (START, END, *added)
            }
        text = json.dumps({**config, **special}, indent=2, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(text, "utf-8")

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
                yield part, (self._ids[part],)
                continue
            for added, piece in _cut(_normal(part), self._find_added) if self._added else [(False, part)]:
                if added:
                    yield piece, (self._added[piece],)
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
        return tuple(self._ids[part] for part in parts)


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


def split_words(text: str) -> list[str]:
    """text -> its words in lower case: runs of letters, single digits, runs of signs, and endings like 's.

    Source: `simple_tokenizer.py` of openai/CLIP, by the tables in `data/unicode.txt`.
    """
    words: list[str] = []
    for word in _unicode().word.findall(_lower(text)):
        # A special token's name in other letters (<|ENDOFTEXT|>) is three words, whatever follows it.
        words += ("<|", word[2:-2], "|>") if word in (START, END) else (word,)
    return words


def _lower(text: str) -> str:
    """text -> composed (NFC) and in lower case"""
    classes = _unicode()
    text = classes.together.sub(lambda part: unicodedata.normalize("NFC", part[0]), text)
    # Letter by letter: `str.lower` would turn a Σ at a word's end into ς.
    return text.replace("Σ", "σ").lower().translate(classes.lower)


def _normal(text: str) -> str:
    """text -> in lower case, with one space for each run of spaces: added tokens are found in this form"""
    return re.sub(r"\s+", " ", _lower(text))


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


def _content(token: Any) -> str:
    """A token in a JSON file of transformers, which is its text, or an object with its text."""
    return token["content"] if isinstance(token, dict) else token


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
    """The 48,894 merges of CLIP's vocabulary."""
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
