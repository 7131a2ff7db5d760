"""Prompts in the language of AUTOMATIC1111's web UI: weights, breaks, any length, words that change.

    (word:1.3)  (word)  [word]  \\(  BREAK  [from:to:when]  [a|b]  one AND another :0.5

`parse` cuts a text into pieces with weights, `chunks` into pieces of 75 tokens, `schedule` says which text
counts in which step, and `request` puts vectors in the place of a request's texts. A weight is not a fact
about text encoders but a rule about their output. There are several (`RULES`), and programs with another rule
draw another picture.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..model.finite import finite
from ..model.pipeline import StableDiffusion, as_gradients_are
from ..model.request import Request
from ..model.sentences import shown

if TYPE_CHECKING:
    from ..model.step import Turn

RULES = {
    "a1111": "w·z, and then the mean of before: AUTOMATIC1111's",
    "plain": "w·z: AUTOMATIC1111's without the mean",
    "comfyui": "e + w(z − e), e being the empty text's vector at the same place: ComfyUI's and compel's",
}
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
    weight that is no number.
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
            joined.append([words, weight])
    return [(words, weight) for words, weight in joined] or [("", 1.0)]


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

    escaped = text.replace("\\[", "\1").replace("\\]", "\2")
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
        found.append((weighted[1], float(weighted[2])) if weighted and alone else (part, 1.0))
    return found if len(found) > 1 else [(text, 1.0)]


# From pieces to vectors


def weighted(z: Tensor, weights: Tensor, rule: str, empty: Tensor | None = None) -> Tensor:
    """The vectors z (77, C) of a chunk, of weights (77,); empty (77, C): those of the empty text."""
    w = weights[:, None].to(z)
    if rule == "comfyui":
        assert empty is not None
        return torch.where(w == 1, z, empty + w * (z - empty))
    heavy = w * z
    mean, now = z.mean(), heavy.mean()
    if rule == "plain" or abs(now) < 1e-12:  # where there is no mean to be kept
        return heavy
    return heavy * (mean / now)


def encode(pipe: StableDiffusion, text: str, rule: str, clip_skip: int = 0) -> Tensor:
    """text -> (1, 77·k, C), in the dtype of the U-Net: k chunks side by side."""
    parts = chunks(parse(text), pipe.tokenizer)
    tokens = torch.tensor([ids for ids, _ in parts])  # (k, 77)
    weights = torch.tensor([weights for _, weights in parts])
    nothing = torch.tensor([pipe.tokenizer.encode("")])
    if clip_skip >= pipe.config.clip.layers:
        raise ValueError(f"clip_skip must be less than {pipe.config.clip.layers}, not {clip_skip}")
    with pipe.borrow("clip") as clip, torch.no_grad():
        run = as_gradients_are(partial(clip, skip=clip_skip))
        z = finite(run(torch.cat([tokens, nothing]).to(pipe.device)), "the text encoder", clip).float()
    each = [weighted(one, by, rule, z[-1]) for one, by in zip(z[:-1], weights.to(z.device))]
    return torch.cat(each)[None].to(pipe.dtype)


def check(rule: str, *texts: str | None) -> None:
    """Raises ValueError for a rule that does not exist, and for a weight that is no number."""
    if rule not in RULES:
        raise ValueError(f"emphasis must be {', '.join(RULES)}, not {shown(rule)}")
    for text in texts:
        for part, _ in together(text or ""):
            parse(part)


def suits(pipe: StableDiffusion) -> bool:
    """True if the model has one text encoder, whose vectors are the U-Net's words."""
    return type(pipe).vectors is StableDiffusion.vectors


def request(pipe: StableDiffusion, asked: Request, rule: str) -> Request:
    """A request for one picture, with vectors in the place of its texts.

    Both sides get the same length: the shorter one is filled up with the chunk of an empty text. Raises
    ValueError for a rule that does not exist, a weight that is no number, and models of other families.
    """
    check(rule)
    if not suits(pipe):
        which = "only for Stable Diffusion 1.x and 2.x"
        raise ValueError(f"emphasis is {which}, and {pipe.config.name} reads prompts otherwise")
    asked = asked.for_model(pipe.config)
    turns = len(pipe.sampler(asked).timesteps)
    known: dict[str, Tensor] = {}

    def vectors(text: str) -> list[Tensor]:
        """The vectors of each turn, (1, 77·k, C)"""
        texts = schedule(text, turns)
        for one in texts:
            if one not in known:
                known[one] = encode(pipe, one, rule, asked.clip_skip)
        return [known[one] for one in texts]

    parts = together(asked.prompts[0])
    sides = [*(vectors(text) for text, _ in parts), vectors(asked.negatives[0])]
    longest = max(one.shape[1] for side in sides for one in side)
    blank = encode(pipe, "", rule, asked.clip_skip)

    def whole(side: list[Tensor]) -> Tensor:
        """(turns, 1, S, C)"""
        return torch.stack([_filled(one, blank, longest) for one in side])

    first, *others = (whole(side) for side in sides[:-1])
    negative = None if asked.cfg == 1 else whole(sides[-1])
    guide = asked.guide
    if others or parts[0][1] != 1:
        guide = _all_of(parts, [first, *others], asked)
    return replace(asked, prompt=first, negative=negative, guide=guide, num=1)


def _filled(z: Tensor, blank: Tensor, length: int) -> Tensor:
    """(1, S, C) -> (1, length, C)"""
    missing = (length - z.shape[1]) // blank.shape[1]
    return torch.cat([z, *[blank] * missing], dim=1)


def _all_of(parts: Sequence[Piece], words: Sequence[Tensor], asked: Request) -> Any:
    """Guidance by several prompts at once.

    Source: Liu et al. 2022, "Compositional Visual Generation with Composable Diffusion Models", Eq. 11.
    """
    scale = 1.0 if asked.cfg is None else asked.cfg

    def guide(cond: Tensor, uncond: Tensor | None, turn: Turn) -> Tensor:
        # Eq. 11, Liu et al. 2022: ε = ε(∅) + Σᵢ wᵢ s (ε(cᵢ) − ε(∅))
        base = torch.zeros_like(cond) if uncond is None else uncond
        outputs = [cond, *(turn.look(each[turn.index]) for each in words[1:])]
        if uncond is None:  # without guidance, the weighted mean
            total = math.fsum(weight for _, weight in parts) or 1.0
            return sum((w * out for (_, w), out in zip(parts, outputs)), base) / total
        return base + sum((w * scale * (out - base) for (_, w), out in zip(parts, outputs)), 0 * base)

    return guide
