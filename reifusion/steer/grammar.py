"""The language of prompts in AUTOMATIC1111's web UI: weights, breaks, any length, words that change.

    (word:1.3)  (word)  [word]  \\(  BREAK  [from:to:when]  [a|b]  one AND another :0.5

`parse` cuts a text into pieces with weights, `chunks` into pieces of 75 tokens, `schedule` says which text
counts in which step. What a weight does is another matter: see `emphasis.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..model.sentences import shown

BREAK = "BREAK"
ROUND, SQUARE = 1.1, 1 / 1.1
BACK = 20  # tokens: a chunk ends at a comma that is not farther back than this
LONGEST = 20_000  # letters
DEEPEST = 100  # brackets in brackets, of which every level is read anew

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


def parse_as_comfyui(text: str) -> list[Piece]:
    """The same in ComfyUI's language: round brackets alone, and a number in them is the whole weight.

    `((x))` is 1.21 times as heavy, and in `(a (b:1.5):1.2)` b has 1.5. Raises what `parse` raises.
    """
    if len(text) > LONGEST:
        raise ValueError(f"a prompt of {len(text):,} letters is too long; {LONGEST:,} is the most")
    marked = re.sub("[\0\1]", " ", text).replace("\\)", "\0").replace("\\(", "\1")
    found: list[Piece] = []
    # A part, its weight, how deep in brackets it lies, and if it is to be taken as it is
    waiting = [(marked, 1.0, 0, False)]
    while waiting:
        part, weight, depth, whole = waiting.pop()
        if whole:
            words = part.replace("\0", ")").replace("\1", "(")
            found.append((words, _finite(weight, words)))
            continue
        if depth > DEEPEST:
            raise ValueError(f"brackets in the prompt are nested more than {DEEPEST} deep")
        for group in reversed(_groups(part)):
            if len(group) < 2 or group[0] != "(" or group[-1] != ")":
                waiting.append((group, weight, depth, True))
                continue
            words, _, number = group[1:-1].rpartition(":")
            try:
                told = float(number) if words else None
            except ValueError:
                told = None
            inside = (group[1:-1], weight * ROUND) if told is None else (words, told)
            waiting.append((*inside, depth + 1, False))
    return found or [("", 1.0)]


def _groups(text: str) -> list[str]:
    """'a (b (c)) d' -> 'a ', '(b (c))', ' d'"""
    groups, depth, begun = [], 0, 0
    for at, letter in enumerate(text):
        if letter == "(":
            if depth == 0:
                groups.append(text[begun:at])
                begun = at
            depth += 1
        elif letter == ")":
            depth -= 1
            if depth == 0:
                groups.append(text[begun : at + 1])
                begun = at + 1
    return [group for group in [*groups, text[begun:]] if group]


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
            if len(now) == room and not is_comma and last >= 0 and room - last < BACK:
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


def schedule(text: str, turns: int, drawn: int | None = None, before: int = 0) -> list[str]:
    """The text of each turn. `[a:b:when]` is a until then, and b after; `[a|b]` takes turns.

    when: with a point, a share of the turns; without one, their number. The change comes one turn later than
    one would think, as in AUTOMATIC1111's web UI: `[a:b:5]` draws six turns with a. drawn: how many turns are
    drawn of these, where a picture is begun with; None: all. before: the turns of a first pass; then a number
    counts these too, and shares from 1.0 to 2.0 are of this pass.
    """
    return [_at(text, turn, turns, before) for turn in range(turns if drawn is None else drawn)]


def _at(text: str, turn: int, turns: int, first_pass: int) -> str:
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
        share = float(number[1]) - (first_pass > 0)
        until = int(share * turns) if "." in number[1] else int(number[1]) - first_pass
        before, after = _parted(first)
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


def _parted(text: str) -> tuple[str, str]:
    """ "a:b" -> "a", "b"; without a colon outside round brackets, "" and the text"""
    depth = 0
    for at in range(len(text) - 1, -1, -1):
        depth += (text[at] == ")") - (text[at] == "(")
        if text[at] == ":" and depth <= 0:
            return text[:at], text[at + 1 :]
    return "", text


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


class Language(NamedTuple):
    """How a program reads prompts."""

    parse: Callable[[str], list[Piece]]
    together: Callable[[str], list[Piece]]
    schedule: Callable[..., list[str]]  # as the function of that name


LANGUAGES = {
    "a1111": Language(parse, together, schedule),
    "comfyui": Language(
        parse_as_comfyui,
        lambda text: [(text, 1.0)],
        lambda text, turns, drawn=None, before=0: [text] * (turns if drawn is None else drawn),
    ),
}
