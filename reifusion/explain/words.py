"""Which word made which pixel: cross-attention, recorded while a picture is drawn.

In a cross-attention layer every place of the picture spreads its attention, 1 in all, over the prompt's
tokens. `watch` keeps the attention of every layer, head and step while a picture is drawn, without changing
a bit of the picture. An `Attention` then tells and shows where a word was looked at (`heat`). Source: Tang
et al. 2022, "What the DAAM: Interpreting Stable Diffusion Using Cross Attention", arXiv:2210.04885.

In the joint attention of Stable Diffusion 3 a place spreads it over all other places too, and over the same
prompt in two sets of tokens, CLIP's and T5's.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import cast

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from ..families.mmdit import JointAttention
from ..families.unigram import SPACE, Unigram
from ..files import whole, write_json
from ..model.attention import CrossAttention, Hook, SelfAttention
from ..model.config import UNetConfig
from ..model.diffusion import plan
from ..model.pipeline import StableDiffusion
from ..model.request import Request
from ..settings import of_request
from ..weights.writing import write_tensors
from .figures import BAR, INK, PAPER, Exhibit, heat_bar, overlay, picture_grid, plain
from .guide import GUIDE, one_line
from .trajectory import describe

Layer = CrossAttention | SelfAttention | JointAttention
# Self-attention has L × L weights for every head: beyond this grid, recording them takes too much memory.
LARGEST_SELF_GRID = 32 * 32
# Words that join others: everything looks at them, or nothing in particular.
LITTLE = {"a", "an", "the", "of", "on", "in", "at", "to", "and", "with", "by", "as", "from", "under", "is"}


@dataclass(frozen=True)
class Word:
    text: str
    tokens: tuple[int, ...]  # the indices of its pieces in `Attention.tokens`


@dataclass
class Attention:
    """All attention of one picture: N steps, T tokens. Tensors are on the CPU, float16."""

    request: Request
    size: tuple[int, int]  # the picture's width and height
    tokens: list[str]  # as text: start, the prompt's, end, and all padding as one; then T5's, if there is one
    words: list[Word]  # of the prompt
    special: list[Word]  # start, end and padding
    pixel: tuple[int, int] | None = None  # the place that `looks` belongs to
    # layer -> (N, heads, T, h, w); over T it sums to 1, or to what joint attention leaves for words
    maps: dict[str, Tensor] = field(default_factory=dict)
    looks: dict[str, Tensor] = field(default_factory=dict)  # layer -> (N, heads, h, w), sums to 1 over h, w

    def heat(
        self,
        word: Word,
        steps: slice = slice(None),
        layers: Sequence[str] | None = None,
        heads: slice = slice(None),
    ) -> Tensor:
        """Returns the share of each pixel's attention that the word got, 0 to 1: (H, W), float32."""
        chosen = [self.maps[name] for name in layers or self.maps]
        return self._heat([maps[steps, heads][:, :, list(word.tokens)].float().sum(2) for maps in chosen])

    def look(self, layers: Sequence[str] | None = None) -> Tensor:
        """Returns the chosen pixel's attention to each pixel: (H, W), 1 where it is average."""
        chosen = [self.looks[name] for name in layers or self.looks]
        return self._heat([looks.float() * looks[0, 0].numel() for looks in chosen])

    def _heat(self, maps: list[Tensor]) -> Tensor:
        """Returns the mean of maps, each (n, heads, h, w) and of any grid, at the picture's size: (H, W)."""
        # [daam] §2.2, Tang et al. 2022: D_k[x, y] = Σᵢⱼₗ F⁽ⁱ⁾ⱼₖₗ[x, y], of layers i, steps j, heads l; F is a
        # head's map of the k-th word, scaled up bicubically. That is linear, so the sums come first here.
        # Divided by the number of maps, D is a share of attention, and relative to its maximum the same.
        total, number = torch.zeros(1, 1, *self.size[::-1]), 0
        for _, alike in groupby(sorted(maps, key=_grid), key=_grid):
            stack = torch.cat([part.flatten(0, 1) for part in alike])  # (n, h, w)
            total += F.interpolate(stack.sum(0)[None, None], self.size[::-1], mode="bicubic")
            number += len(stack)
        return (total[0, 0] / number).clamp(min=0)  # bicubic curves undershoot

    def share(self, word: Word) -> float:
        """Returns the word's share of all attention, 0 to 1."""
        return self.heat(word).mean().item()

    def telling(self, most: int) -> list[Word]:
        """Returns the words whose maps have the most contrast, at most `most`, in the prompt's order."""

        def contrast(word: Word) -> float:
            return self.heat(word).std().item()

        best = sorted(self.words, key=contrast, reverse=True)[:most]
        return [word for word in self.words if word in best]

    def find(self, text: str) -> Word:
        """Returns the prompt's first word with that text. Raises ValueError if there is none."""
        for word in self.words:
            if word.text == text.strip().lower():
                return word
        known = ", ".join(dict.fromkeys(word.text for word in self.words)) or "none"
        raise ValueError(f"the prompt has no word {text!r}; its words are {known}")

    def save(self, folder: str | os.PathLike) -> None:
        """Writes words.safetensors, each layer's maps and each word's heat, and words.json, their labels."""
        tensors = {f"maps.{name}": maps for name, maps in self.maps.items()}
        tensors |= {f"looks.{name}": looks for name, looks in self.looks.items()}
        words = [*self.words, *self.special]
        tensors["heat"] = torch.stack([self.heat(word) for word in words])  # (W, H, W)
        with whole(os.path.join(folder, "words.safetensors")) as temporary:
            write_tensors({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
        facts = {
            "settings": of_request(self.request),
            "tokens": self.tokens,
            "words": [{"text": w.text, "tokens": w.tokens, "share": self.share(w)} for w in words],
            "layers": {name: dict(zip(_AXES, maps.shape)) for name, maps in self.maps.items()},
            "pixel": self.pixel,
        }
        write_json(os.path.join(folder, "words.json"), facts)

    # Pictures

    def by_word(self, picture: Image.Image, special: bool = False) -> Exhibit:
        """Shows the picture with each word's heat over it, the mean over all layers, heads and steps."""
        words = [*self.words, *(self.special if special or not self.words else [])]
        heats = [self.heat(word) for word in words]
        most = _highest(heats)
        cells = [picture, *(overlay(picture, heat / most) for heat in heats)]
        captions = ["", *(f"{plain(word.text, 24)}\n{self.share(word):.1%}" for word in words)]
        rows = [slice(i, i + 7) for i in range(0, len(cells), 7)]
        figure = picture_grid(
            [cells[row] for row in rows],
            "Which word made which pixel",
            describe(self.request),
            captions=[captions[row] for row in rows],
            below=BAR,
        )
        heat_bar(figure, f"{most:.0%} of a place's attention")
        shares = ", ".join(f"{word.text} {self.share(word):.1%}" for word in words)
        alt = one_line(f"""
            The picture of “{self.request.prompts[0]}”, then once more for each word, with the places marked
            in red that looked at the word: {shares}.""")
        numbers = {"shares": [[word.text, self.share(word)] for word in words]}
        top = words[max(range(len(words)), key=lambda k: heats[k].max().item())]
        guide = f"One place gives “{top.text}” {most:.0%} of its attention, more than any gives another word."
        return Exhibit(figure, "Which word made which pixel", alt, f"{guide} {GUIDE['words']}", numbers)

    def by_step(self, picture: Image.Image, words: Sequence[Word], most: int = 8) -> Exhibit:
        """Shows a row for each word: the mean over groups of steps, from noise to picture."""
        steps = len(next(iter(self.maps.values())))
        edges = np.linspace(0, steps, min(most, steps) + 1).round().astype(int)
        spans = [slice(int(a), int(b)) for a, b in pairwise(edges)]
        labels = [f"step {s.start + 1}" + f"–{s.stop}" * (s.stop > s.start + 1) for s in spans]
        heats = [[self.heat(word, steps=span) for span in spans] for word in words]
        found = " ".join(
            f"The tenth of the places that look most at “{word.text}” have {focus(row[0]):.0%} of what it "
            f"gets in the first steps and {focus(row[-1]):.0%} in the last."
            for word, row in list(zip(words, heats))[:2]
        )
        return self._overlays(picture, words, heats, labels, "Words, step by step", "words-by-step", found)

    def by_layer(self, picture: Image.Image, words: Sequence[Word]) -> Exhibit:
        """Shows a row for each word: one layer after the other, down and up the U."""
        heats = [[self.heat(word, layers=[name]) for name in self.maps] for word in words]
        grids = [f"{maps.shape[-1]}×{maps.shape[-2]}" for maps in self.maps.values()]
        labels = [f"{label(name)}\n{grid}" for name, grid in zip(self.maps, grids)]
        names = [label(name) for name in self.maps]
        found = []
        for word, row in zip(words, heats):
            means = [heat.mean().item() for heat in row]
            high, low = means.index(max(means)), means.index(min(means))
            found.append(
                f"“{word.text}” is read most in {names[high]} ({means[high]:.1%}) and least in {names[low]} "
                f"({means[low]:.1%})."
            )
        title = "Words, layer by layer"
        return self._overlays(picture, words, heats, labels, title, "words-by-layer", " ".join(found[:3]))

    def by_head(self, picture: Image.Image, word: Word) -> Exhibit:
        """Shows a column for each layer: one head below the other, all for one word."""
        rows = [f"head {k}" for k in range(max(maps.shape[1] for maps in self.maps.values()))]
        heats = [
            [
                self.heat(word, layers=[name], heads=slice(k, k + 1)) if k < maps.shape[1] else None
                for name, maps in self.maps.items()
            ]
            for k in range(len(rows))
        ]
        labels = [label(name) for name in self.maps]
        title = f"“{word.text}”, head by head"
        means = [heat.mean().item() for row in heats for heat in row if heat is not None]
        deaf = sum(mean < 0.001 for mean in means)
        found = f"Of {len(means)} heads, {deaf} give it less than 0.1%, and one {max(means):.0%}."
        return self._overlays(picture, rows, heats, labels, title, "words-by-head", found)

    def of_pixel(self, picture: Image.Image) -> Exhibit:
        """Shows where the chosen pixel looked: in all layers, then at each resolution."""
        if self.pixel is None or not self.looks:
            raise ValueError("no pixel was chosen when the picture was drawn")
        grids = dict.fromkeys(tuple(looks.shape[-2:]) for looks in self.looks.values())
        looks, labels = [self.look()], ["all layers"]
        for grid in grids:
            alike = [name for name, maps in self.looks.items() if tuple(maps.shape[-2:]) == grid]
            looks.append(self.look(alike))
            labels.append(f"{grid[1]}×{grid[0]}, {len(alike)} layer{'s' * (len(alike) > 1)}")
        most = max(look.max().item() for look in looks)
        cells = [picture, *(overlay(picture, look / most) for look in looks)]
        cells = [_crossed(cell, self.pixel) for cell in cells]
        title = f"What the place ({self.pixel[0]}, {self.pixel[1]}) looks at"
        figure = picture_grid(
            [cells], title, describe(self.request), columns=["the picture", *labels], below=BAR
        )
        heat_bar(figure, f"{most:.0f} times the average")
        alt = f"The picture with a cross at {self.pixel}, and in red where it looks: {', '.join(labels)}."
        x, y = self.pixel
        finest = looks[1 + max(range(len(grids)), key=lambda k: list(grids)[k])]  # the layers that see finest
        there = int(finest.argmax())
        at = (there % self.size[0], there // self.size[0])
        mirror = finest[y, self.size[0] - 1 - x].item()
        found = (
            f"In the finest layers this place looks most at ({at[0]}, {at[1]}), {finest.max():.0f} times as "
            f"much as on average; at itself {finest[y, x]:.0f} times; at its mirror image {mirror:.0f} times."
        )
        numbers = {"pixel": [x, y], "most": list(at), "itself": finest[y, x].item(), "mirror": mirror}
        return Exhibit(figure, title, alt, f"{found} {GUIDE['pixel']}", numbers)

    def _overlays(
        self,
        picture: Image.Image,
        rows: Sequence[Word | str],
        heats: Sequence[Sequence[Tensor | None]],
        columns: list[str],
        title: str,
        guide: str,
        found: str,
    ) -> Exhibit:
        """Shows rows of overlays, all on one scale; None leaves a gap. found: what these numbers say."""
        names = [row if isinstance(row, str) else row.text for row in rows]
        most = _highest(heat for row in heats for heat in row if heat is not None)
        cells = [[None if heat is None else overlay(picture, heat / most) for heat in row] for row in heats]
        captions = [["" if heat is None else f"{heat.mean():.1%}" for heat in row] for row in heats]
        figure = picture_grid(
            cells,
            title,
            describe(self.request),
            columns=columns,
            rows=[plain(name, 24) for name in names],
            captions=captions,
            below=BAR,
        )
        heat_bar(figure, f"{most:.0%} of a place's attention")
        shown = [column.replace("\n", " ") for column in columns]
        listed = f"Rows: {', '.join(names)}. Columns: {', '.join(shown)}."
        alt = f"The picture of “{self.request.prompts[0]}” many times, with heat maps over it. {listed}"
        means = [[None if heat is None else heat.mean().item() for heat in row] for row in heats]
        numbers = {"rows": names, "columns": shown, "shares": means}
        return Exhibit(figure, title, alt, f"{found} {GUIDE[guide]}", numbers)


def words(
    pipe: StableDiffusion,
    request: Request,
    by: str = "word",
    word: str | None = None,
    special: bool = False,
    pixel: tuple[int, int] | None = None,
) -> Exhibit:
    """Draws the request's picture, and shows where the picture looked.

    by: "word", "step", "layer", "head", or "pixel", the place that looks. word: the only one to show; None:
    the most telling ones. special: also show start, end and padding, by word.
    """
    with watch(pipe, request, pixel) as attention:
        *_, last = pipe.denoise(request)
    chosen = (
        [attention.find(word)] if word else attention.telling(1 if by == "head" else 6) or attention.special
    )
    picture = pipe.decode(last.latents)[0]
    if by == "word":
        return attention.by_word(picture, special)
    if by == "pixel":
        return attention.of_pixel(picture)
    if by == "step":
        return attention.by_step(picture, chosen)
    if by == "layer":
        return attention.by_layer(picture, chosen)
    return attention.by_head(picture, chosen[0])


_AXES = ("steps", "heads", "tokens", "height", "width")


@contextmanager
def watch(
    pipe: StableDiffusion, request: Request, pixel: tuple[int, int] | None = None
) -> Iterator[Attention]:
    """Records the attention while the request's picture is drawn inside the `with`; complete at its end.

    pixel: (x, y) in the picture; its self-attention is kept too, in layers of up to 32 × 32 places. The
    request is for one picture. With guidance, the maps are those of its prompt, not of the negative prompt.
    Raises ValueError for a pixel outside the picture.
    """
    request = request.for_model(pipe.config)
    width, height = cast("tuple[int, int]", request.size)
    if pixel is not None and not (0 <= pixel[0] < width and 0 <= pixel[1] < height):
        raise ValueError(f"the pixel {pixel[0]},{pixel[1]} is outside the picture of {width}x{height}")
    attention, columns = _expect(pipe, request, pixel)
    factor = pipe.config.vae.factor
    maps: dict[str, list[Tensor]] = {}
    looks: dict[str, list[Tensor]] = {}
    before: list[tuple[Layer, Hook | None]] = []

    def watched(name: str, h: int, w: int, places: bool, words: bool) -> Hook:
        """A hook for a layer in which places see places, or words, or places and words behind them."""

        def hook(weights: Tensor) -> None:  # (B, heads, h·w or more, h·w or S or both)
            mine = weights[0, :, : h * w]  # with guidance, the prompt's half of the batch comes first
            if words:
                seen = (mine[..., h * w :] if places else mine).float()  # (heads, h·w, S)
                seen = torch.stack([seen[..., column].sum(-1) for column in columns], 1)  # (heads, T, h·w)
                maps.setdefault(name, []).append(_kept(seen, h, w))
            if places and pixel is not None and h * w <= LARGEST_SELF_GRID:
                place = pixel[1] * h // height * w + pixel[0] * w // width
                looks.setdefault(name, []).append(_kept(mine[:, place, : h * w], h, w))

        return hook

    try:
        for name, layer, h, w in _layers(pipe, height // factor, width // factor):
            places, words = not isinstance(layer, CrossAttention), not isinstance(layer, SelfAttention)
            if name.endswith("second_attention"):
                words = False  # pixels alone
            if not words and pixel is None:
                continue  # its weights would be computed for nothing
            before.append((layer, layer.hook))
            layer.hook = watched(name, h, w, places, words)
        yield attention
    finally:
        for layer, earlier in before:
            layer.hook = earlier
    attention.maps = {name: torch.stack(parts) for name, parts in maps.items()}
    attention.looks = {name: torch.stack(parts) for name, parts in looks.items()}


def prompt_words(pipe: StableDiffusion, request: Request) -> list[Word]:
    """Returns the prompt's words, as many as the text encoder has room for."""
    pieces = pipe.tokenizer.pieces(request.prompts[0])[: pipe.config.clip.context_length - 2]
    numbered = groupby(enumerate(pieces, 1), key=lambda entry: (entry[1].word_index, entry[1].word))
    return [Word(text, tuple(place for place, _ in group)) for (_, text), group in numbered]


def _layers(pipe: StableDiffusion, height: int, width: int) -> Iterator[tuple[str, Layer, int, int]]:
    """Yields the attention layers for latents of that size, with the height and width at which each works."""
    sizes = pipe.config.unet
    grids = row_grids(sizes, height, width) if isinstance(sizes, UNetConfig) else {}
    one = height // sizes.patch, width // sizes.patch
    for name, layer in pipe.models["diffusion"].named_modules():
        if isinstance(layer, Layer):
            yield name, layer, *(grids[_row(name)] if grids else one)


def _expect(
    pipe: StableDiffusion, request: Request, pixel: tuple[int, int] | None
) -> tuple[Attention, list[slice]]:
    """Returns an Attention without maps, and the columns of the weights that are each of its tokens."""
    length = pipe.config.clip.context_length
    pieces = pipe.tokenizer.pieces(request.prompts[0])[: length - 2]
    tokens = ["start", *(piece.text for piece in pieces), "end", "padding"]
    special = [Word(tokens[k], (k,)) for k in (0, len(tokens) - 2, len(tokens) - 1)]
    words = prompt_words(pipe, request)
    columns = [*(slice(k, k + 1) for k in range(len(tokens) - 1)), slice(len(tokens) - 1, length)]
    t5: Unigram | None = getattr(pipe.tokenizer, "t5", None)
    if t5 is not None:
        texts, also = _t5_tokens(pipe, request.prompts[0], t5)
        first, words = (
            len(tokens),
            [
                Word(word.text, (*word.tokens, *(len(tokens) + k for k in also.get(i, ()))))
                for i, word in enumerate(words)
            ],
        )
        tokens += [*texts, "end", "padding"]
        special += [Word("T5's end", (len(tokens) - 2,)), Word("T5's padding", (len(tokens) - 1,))]
        columns += [slice(length + k, length + k + 1) for k in range(len(tokens) - 1 - first)]
        columns.append(slice(length + len(tokens) - 1 - first, length + t5.length))
    return Attention(request, request.size, tokens, words, special, pixel), columns  # type: ignore[arg-type]


def _t5_tokens(pipe: StableDiffusion, prompt: str, t5: Unigram) -> tuple[list[str], dict[int, list[int]]]:
    """Returns T5's pieces of the prompt, and which of them belong to each of CLIP's words, by its number."""
    texts: list[str] = []
    also: dict[int, list[int]] = {}
    number = 0
    for part in prompt.split():  # no word and no piece crosses a space
        own = list(dict.fromkeys((piece.word_index, piece.word) for piece in pipe.tokenizer.pieces(part)))
        ends = np.cumsum([len(word) for _, word in own])
        place = 0
        for token in t5.tokenize(part):
            text = t5.pieces[token][0].removeprefix(SPACE)
            # The piece belongs to the word in which it begins. Both spell the part alike, but for rare signs.
            word = min(int(np.searchsorted(ends, place, side="right")), len(own) - 1)
            if own and len(texts) < t5.length - 1:
                also.setdefault(number + word, []).append(len(texts))
            texts.append(text or "▁")
            place += len(text)
        number += len(own)
    return texts[: t5.length - 1], also


def row_grids(config: UNetConfig, height: int, width: int) -> dict[str, tuple[int, int]]:
    """Returns the height and width at which each row of the U works ("down.3", "middle", "up.0")."""
    down, _, up = plan(config)
    grid, grids, pile = (height // config.patch, width // config.patch), {}, []
    for i, row in enumerate(down):
        if row[0][0] == "down":
            grid = (-(-grid[0] // 2), -(-grid[1] // 2))
        grids[f"down.{i}"] = grid
        pile.append(grid)
    grids["middle"] = grid
    return grids | {f"up.{i}": pile.pop() for i in range(len(up))}


def _row(name: str) -> str:
    """ "down.3.1.cross_attention" -> "down.3" """
    first, second, *_ = name.split(".")
    return first if first == "middle" else f"{first}.{second}"


def label(name: str) -> str:
    return _row(name).replace(".", " ")


def _kept(weights: Tensor, h: int, w: int) -> Tensor:
    """(…, h·w) -> (…, h, w), in half the memory: 11 bits are plenty for a picture."""
    return weights.to("cpu", torch.float16).unflatten(-1, (h, w))


def _grid(maps: Tensor) -> tuple[int, int]:
    return maps.shape[-2], maps.shape[-1]


def focus(heat: Tensor) -> float:
    """Returns the share of a map (H, W) that is in the tenth of its places where it is strongest."""
    strongest = heat.flatten().sort(descending=True).values[: heat.numel() // 10]
    return (strongest.sum() / heat.sum().clamp(min=1e-12)).item()


def _highest(heats: Iterable[Tensor]) -> float:
    """Returns the highest share of attention in any map; at most 1, though bicubic curves overshoot."""
    return min(1.0, max(heat.max().item() for heat in heats))


def relative(heat: Tensor) -> Tensor:
    return heat / heat.max().clamp(min=1e-12)


def _crossed(picture: Image.Image, pixel: tuple[int, int]) -> Image.Image:
    """Returns the picture with four strokes around the pixel, which leave it free."""
    picture, (x, y) = picture.copy(), pixel
    pen, arm, gap = ImageDraw.Draw(picture), max(5, picture.width // 20), max(2, picture.width // 60)
    for colour, width in ((PAPER, 3), (INK, 1)):
        for near, far in ((-gap, -arm), (gap, arm)):
            pen.line((x + near, y, x + far, y), fill=colour, width=width)
            pen.line((x, y + near, x, y + far), fill=colour, width=width)
    return picture
