"""Takes away one thing at a time: a word's vectors, the word itself, a layer's cross-attention, one head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from PIL import Image
from torch import Tensor

from ..bar import Bar
from ..model.attention import CrossAttention
from ..model.pipeline import StableDiffusion
from ..model.request import Request
from .experiments import distance, draw
from .figures import Exhibit, picture_grid, plain
from .guide import GUIDE, one_line
from .steer import muted, rewritten
from .trajectory import describe
from .words import Word, label, prompt_words


def silenced(pipe: StableDiffusion, request: Request, word: Word) -> StableDiffusion:
    """Returns a model whose U-Net reads the empty prompt's vectors at the word's tokens.

    The later vectors stay, and they come from an encoder that had seen the word.
    """
    empty = pipe.encode_text([""], request.clip_skip)[0]  # (S, width)
    places = list(word.tokens)

    def edit(context: Tensor) -> Tensor:  # (B, S, width), the prompt first
        context = context.clone()
        context[0, places] = empty[places]
        return context

    return rewritten(pipe, edit)


def without_word(pipe: StableDiffusion, request: Request, word: Word) -> str:
    """Returns the prompt, as the tokenizer reads it, without the word."""
    ids = pipe.tokenizer.tokenize(request.prompts[0])
    return pipe.tokenizer.decode(i for k, i in enumerate(ids, 1) if k not in word.tokens)


def ablate(pipe: StableDiffusion, request: Request, most: int = 10) -> Exhibit:
    """Four rows: words silenced, words left out, layers muted, heads muted in the layer that mattered most.

    A long prompt is cut to its first `most` words.
    """
    request = request.for_model(pipe.config)
    words = numbered(prompt_words(pipe, request)[:most])
    layers = {
        label(name): module
        for name, module in pipe.models["diffusion"].named_modules()
        if isinstance(module, CrossAttention)
    }
    if not layers:
        raise ValueError(f"{pipe.config.name} has no cross-attention whose layers could be taken away")
    whole = draw(pipe, request)
    rows: dict[str, dict[str, Image.Image]] = {}
    bar = Bar(unit="picture", leave=False)

    def each(kind: str, things: dict[str, Any], drawn: Callable[[Any], Image.Image]) -> None:
        rows[kind] = {}
        for name, thing in things.items():
            rows[kind][name] = drawn(thing)
            bar.update()

    def leave_out(word: Word) -> Image.Image:
        return draw(pipe, replace(request, prompt=without_word(pipe, request, word)))

    def mute(layer: CrossAttention, head: int | None = None) -> Image.Image:
        with muted(layer, head):
            return draw(pipe, request)

    each("silenced", words, lambda word: draw(silenced(pipe, request, word), request))
    each("left out", words, leave_out)
    each("layer", layers, mute)
    strongest = max(layers, key=lambda name: distance(rows["layer"][name], whole))
    heads = {f"head {head}": head for head in range(layers[strongest].heads)}
    each("head", heads, lambda head: mute(layers[strongest], head))
    bar.close()

    away = {kind: {name: distance(p, whole) for name, p in row.items()} for kind, row in rows.items()}
    shown = [kind for kind in rows if rows[kind]]  # an empty prompt has no words
    labels = {
        "silenced": "a word's\nvectors",
        "left out": "a word",
        "layer": "a layer",
        "head": f"a head of\n{strongest}",
    }
    figure = picture_grid(
        [[whole, *rows[kind].values()] for kind in shown],
        "What happens without it",
        describe(request),
        rows=[f"without\n{labels[kind]}" for kind in shown],
        captions=[
            ["with all", *(f"{plain(name, 14)}\n{value:.0f} away" for name, value in away[kind].items())]
            for kind in shown
        ],
    )
    alt = one_line(f"""
        The picture of “{request.prompts[0]}”, then with one thing taken away at a time: the vectors of a
        word, a word, the cross-attention of a layer, a head of {strongest}.""")
    return Exhibit(figure, "What happens without it", alt, GUIDE["ablate"], away)


def numbered(words: list[Word]) -> dict[str, Word]:
    """Returns the words by name; the second "a" is "a (2)"."""
    named: dict[str, Word] = {}
    for word in words:
        name, count = word.text, 2
        while name in named:
            name, count = f"{word.text} ({count})", count + 1
        named[name] = word
    return named
