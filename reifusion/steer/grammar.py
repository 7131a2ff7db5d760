"""The language of prompts in AUTOMATIC1111's web UI: weights, breaks, any length, words that change.

    (word:1.3)  (word)  [word]  \\(  BREAK  [from:to:when]  [a|b]  one AND another :0.5

`parse` cuts a text into pieces with weights, `chunks` into pieces of 75 tokens, `schedule` says which text
counts in which step. What a weight does is another matter: see `emphasis.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from ..model.sentences import shown

BREAK = "BREAK"
ROUND, SQUARE = 1.1, 1 / 1.1
BACK = 20  # tokens: a chunk ends at a comma that is not farther back than this
LONGEST = 20_000  # letters

Piece = tuple[str, float]

TOKEN = re.compile(
    r"(?P<escaped>\\[()\[\]\\])|(?P<lone>\\)|(?P<open>[(\[])|:\s*(?P<weight>[+-]?[.\d]+)\s*\)|(?P<close>[)\]])"
    r"|(?P<text>[^\\()\[\]:]+|:)"
)


# From a text to pieces with weights


def parse(text: str) -> list[Piece]:
    """text -> pieces with their weights; a break is the piece (BREAK, −1).

    `(x)` is 1.1 times as heavy, `[x]` 1.1 times as light, `(x:w)` w times, and brackets multiply. One that is
    never closed counts to the end of the text; one that was never opened is text. Raises ValueError for a
    weight that is no number, or too large for one.
    """
    if len(text) > LONGEST:
        raise ValueError(f"a prompt of {len(text):,} letters is too long; {LONGEST:,} is the most")
    pieces: list[list[Any]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def multiply(first: int, by: float) -> None:
        for piece in pieces[first:]:
            if piece[0] is not None:  # a break has no weight, whatever stands around it
                piece[1] *= by

    for found in TOKEN.finditer(text):
        kind, part = found.lastgroup, found[0]
        bracket = "[" if part == "]" else "("
        if kind == "escaped":
            pieces.append([part[1:], 1.0])
        elif kind == "open":
            opened[part].append(len(pieces))
        elif kind == "weight" and opened["("]:
            try:
                multiply(opened["("].pop(), float(found["weight"]))
            except ValueError:
                raise ValueError(f"{shown(part)} in the prompt is no weight") from None
        elif kind == "close" and opened[bracket]:
            multiply(opened[bracket].pop(), ROUND if bracket == "(" else SQUARE)
        elif kind != "lone":
            for k, words in enumerate(re.split(rf"\s*\b{BREAK}\b\s*", part)):
                pieces += [[None, -1.0]] if k else []
                pieces.append([words, 1.0])
    for bracket, by in ("(", ROUND), ("[", SQUARE):
        for first in opened[bracket]:
            multiply(first, by)
    joined: list[list[Any]] = []
    for words, weight in pieces:
        if words is None:
            joined.append([BREAK, -1.0])
        elif joined and joined[-1][0] != BREAK and joined[-1][1] == weight:
            joined[-1][0] += words
        elif words:
            joined.append([words, _finite(weight, words)])
    return [(words, weight) for words, weight in joined] or [("", 1.0)]


def _finite(weight: float, words: str) -> float:
    if not math.isfinite(weight):
        raise ValueError(f"the weight of {shown(words)} in the prompt is too large")
    return weight


def chunks(pieces: Sequence[Piece], tokenizer: Any) -> list[tuple[list[int], list[float]]]:
    """Pieces -> chunks of 77 ids and their weights: start, 75 tokens, end.

    A chunk that is full ends at its last comma, if that is not far back, so that no phrase is torn apart. A
    break ends it at once. What is left of a chunk is filled up with the end token, or with the model's own.
    """
    room = tokenizer.context_length - 2
    comma = tokenizer.tokenize(",")[-1:]
    done: list[list[tuple[int, float]]] = []
    now: list[tuple[int, float]] = []
    last = -1  # the place behind the last comma
    for words, weight in pieces:
        if words == BREAK and weight == -1:
            done, now, last = [*done, now], [], -1
            continue
        for token in tokenizer.tokenize(words):
            is_comma = [token] == comma
            if len(now) == room and not is_comma and last >= 0 and room - last <= BACK:
                done, now, last = [*done, now[:last]], now[last:], -1
            elif len(now) == room:
                done, now, last = [*done, now], [], -1
            now.append((token, weight))
            last = len(now) if is_comma else last
    if now or not done:
        done.append(now)
    found = []
    for chunk in done:
        ids = [tokenizer.start, *(token for token, _ in chunk), tokenizer.end]
        weights = [1.0, *(weight for _, weight in chunk), 1.0]
        missing = tokenizer.context_length - len(ids)
        found.append((ids + [tokenizer.pad] * missing, weights + [1.0] * missing))
    return found


# Words that change on the way

INNER = re.compile(r"\[([^\[\]]*)\]")


def schedule(text: str, turns: int) -> list[str]:
    """The text of each turn. `[a:b:when]` is a until then, and b after; `[a|b]` takes turns.

    when: with a point, a share of the turns; without one, their number. The change comes one turn later than
    one would think, as in AUTOMATIC1111's web UI: `[a:b:5]` draws six turns with a.
    """
    return [_at(text, turn, turns) for turn in range(turns)]


def _at(text: str, turn: int, turns: int) -> str:
    """The text as it is in one turn: what stands in the innermost brackets first."""
    kept: list[str] = []  # brackets that mean less weight, and stay

    def one(found: re.Match[str]) -> str:
        inside = found[1]
        if "|" in inside:
            members = inside.split("|")
            return members[max(0, turn - 1) % len(members)]
        first, colon, when = inside.rpartition(":")
        number = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*", when)
        if not (colon and number):
            kept.append(found[0])
            return f"\0{len(kept) - 1}\0"
        until = int(float(number[1]) * turns) if "." in number[1] else int(number[1])
        before, between, after = first.rpartition(":")
        if not between:
            before, after = "", first
        return before if turn <= until and until > 0 else after

    # The letters that are marks here mean nothing in a prompt.
    escaped = re.sub("[\0-\2]", " ", text).replace("\\[", "\1").replace("\\]", "\2")
    while True:
        changed = INNER.sub(one, escaped)
        if changed == escaped:
            break
        escaped = changed
    while "\0" in escaped:
        escaped = re.sub("\0(\\d+)\0", lambda found: kept[int(found[1])], escaped)
    return escaped.replace("\1", "\\[").replace("\2", "\\]")


def together(text: str) -> list[Piece]:
    """`one AND another :0.5` -> each text with its weight."""
    found = []
    for part in re.split(r"\s*\bAND\b\s*", text):
        weighted = re.fullmatch(r"(.*?)\s*:\s*([+-]?\d*\.?\d+)\s*", part, re.S)
        alone = weighted is not None and weighted[1].count("(") == weighted[1].count(")")
        if weighted and alone:
            found.append((weighted[1], _finite(float(weighted[2]), weighted[1])))
        else:
            found.append((part, 1.0))
    return found if len(found) > 1 else [(text, 1.0)]
