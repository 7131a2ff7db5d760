"""What the weights of a prompt's words do, and a request with vectors in the place of its texts.

A weight is not a fact about text encoders but a rule about their output. There are several (`RULES`), and
programs with another rule draw another picture. How prompts are written is in `grammar.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..families.pooled_text import read_tokens
from ..families.sd3 import StableDiffusion3
from ..families.sdxl import StableDiffusionXL
from ..model.attention import SelfAttention
from ..model.finite import finite
from ..model.pipeline import StableDiffusion, as_gradients_are
from ..model.request import Request
from ..model.sentences import shown
from .grammar import BREAK, LANGUAGES, Piece, chunks, parse

if TYPE_CHECKING:
    from ..model.step import Turn

RULES = {
    "a1111": "w·z, and then the mean of before: AUTOMATIC1111's",
    "plain": "w·z: AUTOMATIC1111's without the mean",
    "comfyui": "e + w(z − e), e being the empty text's vector at the same place: ComfyUI's",
    "compel": "the same, and with w < 1 mixed with a text in which these words are not seen: compel's",
}


def weighted(z: Tensor, weights: Tensor, rule: str, empty: Tensor | None = None) -> Tensor:
    """The vectors z (77, C) of a chunk, of weights (77,); empty (77, C): those of the empty text."""
    w = weights[:, None].to(z)  # (77, 1)
    if rule in ("comfyui", "compel"):
        assert empty is not None
        return torch.where(w == 1, z, empty + w * (z - empty))
    heavy = w * z
    mean, now = z.mean(), heavy.mean()
    if rule == "plain" or abs(now) < 1e-12:  # where there is no mean to be kept
        return heavy
    return heavy * (mean / now)


def encode(
    pipe: StableDiffusion,
    text: str,
    rule: str,
    clip_skip: int = 0,
    read: Callable[[str], list[Piece]] = parse,
) -> Tensor:
    """text -> (1, 77·k, C), in the dtype of the U-Net: k chunks side by side. read: the language of weights.

    Of several text encoders, the words of each are weighted alone. What a family has behind the words, as
    SDXL has the vector for the whole text, comes from the first chunk, without weights.
    """
    pieces = read(text)
    with torch.no_grad():
        if not isinstance(pipe, StableDiffusionXL | StableDiffusion3):
            words, _ = _heard(pipe, "clip", pipe.tokenizer, pieces, rule, clip_skip)
            return words.to(pipe.dtype)
        heard = [_heard(pipe, name, own, pieces, rule, clip_skip) for name, own in pipe.encoders]
        sides, wholes = [words for words, _ in heard], [whole for _, whole in heard]
        if isinstance(pipe, StableDiffusionXL):
            return pipe.joined(sides, wholes).to(pipe.dtype)
        return pipe.joined(sides, wholes, _heard_by_t5(pipe, pieces, rule)).to(pipe.dtype)


def _heard(
    pipe: StableDiffusion, name: str, tokenizer: Any, pieces: Sequence[Piece], rule: str, clip_skip: int
) -> tuple[Tensor, Tensor | None]:
    """Pieces -> the words (1, 77·k, width) of one text encoder, and the first chunk as a whole (1, pooled)"""
    parts = chunks(pieces, tokenizer)

    def read(texts: list[list[int]]) -> tuple[Tensor, Tensor | None]:
        if isinstance(pipe, StableDiffusionXL | StableDiffusion3):
            z, whole = read_tokens(pipe, name, texts, tokenizer.end, clip_skip)
            return z.float(), whole
        return _read(pipe, texts, clip_skip).float(), None

    z, whole = read([*(ids for ids, _ in parts), tokenizer.encode("")])  # (k + 1, 77, width)
    words = []
    for one, (ids, by) in zip(z, parts):
        made = weighted(one, torch.tensor(by), rule, z[-1])
        runs = light(by) if rule == "compel" else []
        if runs:
            with pipe.borrow(name) as clip, unseen(clip, runs, len(ids)):
                without, _ = read([ids] * len(runs))
            # Each text without a piece counts as much as the piece is light: 0 for w = 1, ∞ for w = 0
            shares = [math.tan((1 - max(by[run.start], 1e-5)) * math.pi / 2) for run in runs]
            others = [weighted(other, torch.tensor(by), rule, z[-1]) for other in without]
            made = (made + sum(s * x for s, x in zip(shares, others))) / (1 + sum(shares))
        words.append(made)
    return torch.cat(words)[None], None if whole is None else whole[:1]


def light(weights: Sequence[float]) -> list[slice]:
    """Where pieces with weights below 1 are, in the weights of a chunk's tokens."""
    runs, begin = [], 0
    for end in range(1, len(weights) + 1):
        if end == len(weights) or weights[end] != weights[begin]:
            if weights[begin] < 1:
                runs.append(slice(begin, end))
            begin = end
    return runs


@contextmanager
def unseen(clip: nn.Module, runs: Sequence[slice], length: int) -> Generator[None, None, None]:
    """Inside, no token of text k in the batch sees those of the k-th run, while all keep their places."""
    seen = torch.ones(len(runs), 1, length, length, dtype=torch.bool).tril()  # (B, 1, L, S)
    for text, run in zip(seen, runs):
        text[..., run] = False

    def masked(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen.to(q.device))

    layers = [layer for layer in clip.modules() if isinstance(layer, SelfAttention)]
    before = [layer.kernel for layer in layers]
    try:
        for layer in layers:
            layer.kernel = masked
        yield
    finally:
        for layer, kernel in zip(layers, before):
            layer.kernel = kernel


def _read(pipe: StableDiffusion, tokens: Sequence[Sequence[int]], clip_skip: int) -> Tensor:
    """B × 77 tokens -> (B, 77, C)"""
    if clip_skip >= pipe.config.clip.layers:
        raise ValueError(f"clip_skip must be less than {pipe.config.clip.layers}, not {clip_skip}")
    with pipe.borrow("clip") as clip:
        run = as_gradients_are(partial(clip, skip=clip_skip))
        return finite(run(torch.tensor(tokens).to(pipe.device)), "the text encoder", clip)


def _heard_by_t5(pipe: StableDiffusion3, pieces: Sequence[Piece], rule: str) -> Tensor:
    """Pieces -> T5's words, (1, 256, 4096): breaks mean nothing to it, and what is too long is cut."""
    tokenizer = getattr(pipe.tokenizer, "t5", None)
    if tokenizer is None:
        return pipe.t5([[]])
    said = [piece for piece in pieces if piece != (BREAK, -1)]
    tokens = [(token, weight) for words, weight in said for token in tokenizer.tokenize(words)]
    tokens = [*tokens[: tokenizer.length - 1], (tokenizer.end, 1.0)]
    tokens += [(tokenizer.pad, 1.0)] * (tokenizer.length - len(tokens))
    z = pipe.t5([[token for token, _ in tokens], tokenizer.encode("")]).float()
    return weighted(z[0], torch.tensor([weight for _, weight in tokens]), rule, z[1])[None]


def check(rule: str, *texts: str | None, language: str = "a1111") -> None:
    """Raises ValueError for a rule that does not exist, and for a weight that is no number."""
    if rule not in RULES:
        raise ValueError(f"emphasis must be {', '.join(RULES)}, not {shown(rule)}")
    for text in texts:
        for part, _ in LANGUAGES[language].together(text or ""):
            LANGUAGES[language].parse(part)


def suits(pipe: StableDiffusion) -> bool:
    """True if it is known how the model reads a prompt: as one of Stable Diffusion 1 to 3, or XL."""
    known = StableDiffusion, StableDiffusionXL, StableDiffusion3
    return type(pipe).vectors in [kind.vectors for kind in known]


REPEATS = 6  # of the longer side: more would fill the memory


def request(
    pipe: StableDiffusion, asked: Request, rule: str, before: int = 0, language: str = "a1111"
) -> Request:
    """A request for one picture, with vectors in the place of its texts.

    Both sides get the same length: the chunks of each are repeated, which attention does not notice, or, for
    compel's rule, for joint attention and where that would be long, the shorter one is filled up with the
    chunk of an empty text. before: the turns of a first pass, see `schedule`. language: of the texts, one of
    LANGUAGES. Raises ValueError for a rule that does not exist, a weight that is no number, and models of
    other families.
    """
    speech = LANGUAGES[language]
    check(rule)
    if not suits(pipe):
        raise ValueError(f"emphasis does not know how {pipe.config.name} reads prompts")
    if getattr(pipe, "refiner", None) is not None:
        raise ValueError("emphasis and a refiner do not go together: the refiner needs vectors of its own")
    if rule == "compel" and isinstance(pipe, StableDiffusion3):
        raise ValueError("compel's rule is for CLIP alone, and Stable Diffusion 3 has T5 too")
    asked = asked.for_model(pipe.config)
    drawn = len(pipe.sampler(asked).timesteps)
    turns = len(pipe.sampler(replace(asked, init_image=None, mask=None, latents=None, start=0)).timesteps)
    known: dict[str, Tensor] = {}

    def vectors(text: str) -> list[Tensor]:
        """The vectors of each turn, (1, 77·k, C)"""
        texts = speech.schedule(text, turns, drawn, before)
        for one in texts:
            if one not in known:
                known[one] = encode(pipe, one, rule, asked.clip_skip, speech.parse)
        return [known[one] for one in texts]

    parts = speech.together(asked.prompts[0])
    sides = [*(vectors(text) for text, _ in parts), vectors(asked.negatives[0])]
    if rule in ("a1111", "plain") and asked.negatives[0] == "" and getattr(pipe.config, "zeros", False):
        # SDXL's base learned without words by zeros; ComfyUI and compel read the empty text all the same
        sides[-1] = [torch.zeros_like(one) for one in sides[-1]]
    blank = encode(pipe, "", rule, asked.clip_skip)
    chunk = pipe.config.clip.context_length
    behind = blank.shape[1] - chunk  # rows behind the words
    if rule in ("a1111", "plain"):
        sides[:-1] = [list(side) for side in zip(*(_stretched(turn, behind) for turn in zip(*sides[:-1])))]

    def whole(side: list[Tensor], *others: Tensor) -> Tensor:
        """(turns, 1, S, C), of a length that the others can have too"""
        lengths = {one.shape[1] - behind for one in (*side, *others)}
        common = math.lcm(*lengths)
        if rule == "compel" or isinstance(pipe, StableDiffusion3) or common > REPEATS * max(lengths):
            return torch.stack([_filled(one, blank, max(lengths) + behind, chunk) for one in side])
        return torch.stack([_repeated(one, common, behind) for one in side])

    against = [] if asked.cfg == 1 else sides[-1]
    first = whole(sides[0], *against)
    others = [whole(side) for side in sides[1:-1]]
    negative = whole(against, *sides[0]) if against else None
    guide = asked.guide
    if others or parts[0][1] != 1:
        guide = _all_of(parts, [first, *others], asked)
    return replace(asked, prompt=first, negative=negative, guide=guide, num=1)


def _filled(z: Tensor, blank: Tensor, length: int, chunk: int) -> Tensor:
    """(1, S, C) -> (1, length, C), with chunks of blank between the words and what comes behind them"""
    words = z.shape[1] - (blank.shape[1] - chunk)
    missing = (length - z.shape[1]) // chunk
    return torch.cat([z[:, :words], *[blank[:, :chunk]] * missing, z[:, words:]], dim=1)


def _stretched(turn: Sequence[Tensor], behind: int) -> list[Tensor]:
    """The parts of an AND in one turn, each (1, S, C), in one length: A1111 repeats the last vector."""
    longest, found = max(z.shape[1] for z in turn), []
    for z in turn:
        words, rest = z.split([z.shape[1] - behind, behind], dim=1)
        found.append(torch.cat([words, words[:, -1:].expand(-1, longest - z.shape[1], -1), rest], dim=1))
    return found


def _repeated(z: Tensor, length: int, behind: int) -> Tensor:
    """(1, S, C) -> (1, length + behind, C): the words again and again, and then what comes behind them"""
    words, rest = z.split([z.shape[1] - behind, behind], dim=1)
    return torch.cat([words.repeat(1, length // words.shape[1], 1), rest], dim=1)


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
