"""Swaps the keys of two words: the places that would look at one look at the other, and things change places.

In cross-attention a word has a key, by which places find it, and a value, which they then receive. If the
keys of two words change places and their values stay, each place that looks for the one receives the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..model.attention import CrossAttention, attention
from ..model.pipeline import StableDiffusion
from ..model.request import Request
from .experiments import draw
from .figures import Exhibit, picture_grid
from .guide import GUIDE, one_line
from .halves import foreground
from .steer import attending
from .trajectory import describe
from .words import LITTLE, Attention, Word, prompt_words, watch


@contextmanager
def keys_swapped(pipe: StableDiffusion, one: Word, other: Word) -> Iterator[None]:
    """Swaps the keys of two words of the prompt while the `with` lasts; for one picture at a time.

    Of words with several pieces, the last ones are swapped, as many as both have: a causal encoder knows the
    whole word only there. Raises ValueError for a model without cross-attention.
    """
    layers = [layer for layer in pipe.models["diffusion"].modules() if isinstance(layer, CrossAttention)]
    if not layers:
        raise ValueError(f"{pipe.config.name} has no cross-attention whose keys could be swapped")
    pairs = list(zip(reversed(one.tokens), reversed(other.tokens)))
    here, there = [a for pair in pairs for a in pair], [a for pair in pairs for a in reversed(pair)]

    def kernel(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        k = k.clone()  # (B, heads, S, d); with guidance, the prompt comes first in the batch
        k[:1, :, here] = k[:1, :, there]
        return attention(q, k, v, causal)

    with attending(layers, kernel):
        yield


def swap(
    pipe: StableDiffusion, request: Request, words: Sequence[str] | None = None, seeds: int = 3
) -> Exhibit:
    """Draws each of `seeds` seeds as it is, and with the keys of two words swapped.

    words: the two; None: two with telling maps that are apart. Raises ValueError for words that the prompt
    does not have.
    """
    request = request.for_model(pipe.config)
    first = request.seeds[0]
    asked = [replace(request, seed=first + k) for k in range(seeds)]
    one, other = chosen(pipe, asked[0], words)
    plain = [draw(pipe, each) for each in asked]
    with keys_swapped(pipe, one, other):
        swapped = [draw(pipe, each) for each in asked]
    turned = [likeness(a, b) for a, b in zip(plain, swapped)]
    many = sum(cosine < -0.5 for cosine in turned)
    found = f"In {many} of {seeds} pictures, left and right have changed their colours."
    title = f"The keys of “{one.text}” and “{other.text}”, swapped"
    figure = picture_grid(
        [plain, swapped],
        title,
        describe(request, "seed"),
        columns=[f"seed {first + k}" for k in range(seeds)],
        rows=["as it is", "keys\nswapped"],
        captions=[[], [f"likeness {cosine:.2f}" for cosine in turned]],
    )
    alt = one_line(f"""
        {seeds} pictures of “{request.prompts[0]}”, and below them the same with the keys of “{one.text}” and
        “{other.text}” swapped. {found}""")
    return Exhibit(figure, title, alt, f"{found} {GUIDE['swap']}", {"likeness": turned})


def chosen(pipe: StableDiffusion, request: Request, words: Sequence[str] | None) -> list[Word]:
    """Returns two words of the request's prompt: those named, or two with telling maps that are apart."""
    known = {word.text: word for word in reversed(prompt_words(pipe, request))}
    if words is None:
        if len(known) < 2:
            raise ValueError("to swap keys, the prompt must have two words")
        with watch(pipe, request) as attention:
            list(pipe.denoise(request))
        return _apart(attention)
    missing, there = [word for word in words if word not in known], ", ".join(reversed(known))
    if missing:
        raise ValueError(f"the prompt has no word {missing[0]!r}; its words are {there}")
    if len(words) != 2 or words[0] == words[1]:
        raise ValueError(
            f"the keys of two different words are swapped, not of {', '.join(words)!r}; there are {there}"
        )
    return [known[word] for word in words]


def _apart(attention: Attention) -> list[Word]:
    """Returns two words that name two things: those of which one is looked at where the other is not."""
    telling = attention.telling(8)
    words = [word for word in telling if word.text not in LITTLE]
    words = words if len(words) > 1 else telling
    heats = {word: attention.heat(word).flatten() for word in words}

    def together(pair: Iterable[Word]) -> float:
        return torch.cov(torch.stack([heats[word] for word in pair]))[0, 1].item()

    return list(min(combinations(words, 2), key=together))


def likeness(one: Image.Image, other: Image.Image) -> float:
    """Returns how alike two pictures are in how the things on their left differ from those on their right.

    The cosine of two differences of mean colours: 1 for the same picture, -1 if the colours have changed
    sides, 0 where a half is empty.
    """
    a, b = _left_less_right(one), _left_less_right(other)
    return float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-12))


def _left_less_right(picture: Image.Image) -> np.ndarray:
    """The mean colour of the things on the left, less that on the right: (3,)"""
    pixels, things = np.asarray(picture, dtype=float), foreground(picture).numpy()
    middle = things.shape[1] // 2
    halves = [(pixels[:, side], things[:, side]) for side in (slice(0, middle), slice(middle, None))]
    if not all(mask.any() for _, mask in halves):
        return np.zeros(3)
    left, right = (part[mask].mean(0) for part, mask in halves)
    return left - right
