"""How a prompt becomes tokens: the pieces that the network reads, and how each was put together."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from ..model.pipeline import StableDiffusion
from ..model.request import Request
from ..model.tokenizer import END_OF_WORD, Tokenizer, as_bytes, merge_pair, parse_merges
from .figures import GREY, INK, MARGIN, PALETTE, RULE, Exhibit, axes_at, plain, sheet, write
from .guide import GUIDE

WIDTH = 1100  # pixels of the figure
LETTER = 8.4  # pixels of one letter in a box
TOKEN, LINE = 72, 28  # pixels from one row of tokens, or of merging, to the next


def merges(tokenizer: Tokenizer, word: str) -> list[list[str]]:
    """Returns the states of a word (`Piece.word`) from its bytes to its tokens, one merge at a time.

    Bytes are written as in `byte_letters`; the last byte of a word ends with "</w>".
    """
    # The first line may be a heading.
    ranks = {pair: rank for rank, pair in enumerate(parse_merges("\n" + tokenizer.merges_text))}
    states = [as_bytes(word)]
    while known := [pair for pair in pairwise(states[-1]) if pair in ranks]:
        states.append(merge_pair(states[-1], min(known, key=ranks.__getitem__)))
    return states


def of_prompt(pipe: StableDiffusion, request: Request) -> Exhibit:
    """Shows the tokens of the request's prompt."""
    return tokens(pipe.tokenizer, request.prompts[0])


def tokens(tokenizer: Tokenizer, prompt: str, most: int = 6) -> Exhibit:
    """Draws every token in a box, and the merging of the words that took the most merges, at most `most`."""
    pieces = tokenizer.pieces(prompt)
    room = tokenizer.context_length - 2
    kept, padding = pieces[:room], room - len(pieces[:room])
    boxes = [("start", tokenizer.start, "0", GREY)]
    boxes += [(p.text, p.id, str(k), PALETTE[p.word_index % 5]) for k, p in enumerate(kept, 1)]
    boxes += [("end", tokenizer.end, str(len(kept) + 1), GREY)]
    if padding > 0:
        boxes.append((f"padding × {padding}", tokenizer.pad, f"{len(kept) + 2} – {room + 1}", GREY))
    histories = sorted({p.word: merges(tokenizer, p.word) for p in kept}.values(), key=len, reverse=True)[
        :most
    ]

    title = "The prompt as the network reads it"
    subtitle = (
        f"“{prompt}” · {len(pieces)} tokens, room for {room} · a vocabulary of {tokenizer.vocab_size:,}"
    )
    _, top = sheet(WIDTH, 100, title, subtitle)
    places, below = _flow([_width(text, str(id)) for text, id, _, _ in boxes], top + 12, [TOKEN] * len(boxes))
    ladders, bottom = _flow(
        [_breadth(h) for h in histories], below + 56, [LINE * len(h) + 20 for h in histories], 36
    )
    figure, _ = sheet(WIDTH, bottom + MARGIN, title, subtitle)
    canvas = axes_at(figure, 0, 0, WIDTH, bottom + MARGIN)
    canvas.set(xlim=(0, WIDTH), ylim=(bottom + MARGIN, 0))
    canvas.axis("off")
    for (x, y), (text, id, place, colour) in zip(places, boxes):
        middle = x + _box(canvas, x, y, text, colour, _width(text, str(id))) / 2
        write(figure, middle, y + 36, str(id), size=8.5, ha="center", color=INK)
        write(figure, middle, y + 51, place, size=7.5, ha="center", color=GREY)
    if histories:
        write(figure, MARGIN, below + 24, "From letters to tokens, one merge a line", size=11, weight="bold")
    for (x, y), history in zip(ladders, histories):
        for k, state in enumerate(history):
            right = x
            for part in state:
                new = k > 0 and part not in history[k - 1]
                right += _box(canvas, right, y + k * LINE, _shown(part), PALETTE[0] if new else RULE) + 4

    alt = f"“{prompt}” is {len(pieces)} tokens: {' · '.join(piece.text for piece in pieces)}."
    if len(pieces) > room:
        alt += f" The last {len(pieces) - room} of them are cut off."
    numbers = {"ids": [id for _, id, _, _ in boxes], "pieces": [text for text, _, _, _ in boxes]}
    return Exhibit(figure, title, alt, GUIDE["tokens"], numbers)


def _flow(
    widths: list[float], top: float, heights: list[int], gap: int = 6
) -> tuple[list[tuple[float, float]], int]:
    """Returns the places of boxes of these sizes, row by row, and the y at which the last row ends."""
    places, x, y, tallest = [], float(MARGIN), top, 0
    for width, height in zip(widths, heights):
        if x + width > WIDTH - MARGIN and x > MARGIN:
            x, y, tallest = MARGIN, y + tallest, 0
        places.append((x, y))
        x, tallest = x + width + gap, max(tallest, height)
    return places, round(y + tallest)


def _box(canvas: Axes, x: float, y: float, text: str, colour: str, width: float = 0) -> float:
    """Draws a token and returns its width."""
    width = width or _width(text)
    canvas.add_patch(Rectangle((x, y), width, 24, facecolor=colour, alpha=0.22, linewidth=0))
    canvas.add_patch(Rectangle((x, y), width, 24, facecolor="none", edgecolor=colour, linewidth=1))
    style: dict[str, Any] = {
        "family": "DejaVu Sans Mono",
        "size": 10,
        "ha": "center",
        "va": "center_baseline",
    }
    canvas.text(x + width / 2, y + 12, plain(text), **style)
    return width


def _width(*texts: str) -> float:
    return LETTER * max(1, *map(len, texts)) + 10


def _breadth(history: list[list[str]]) -> float:
    return max(sum(_width(_shown(part)) + 4 for part in state) for state in history)


def _shown(part: str) -> str:
    return part.replace(END_OF_WORD, "_")
