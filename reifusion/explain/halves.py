"""Measures whether words find their things, with prompts that name two things and their sides."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..bar import Bar
from ..model.pipeline import StableDiffusion
from ..model.request import Request
from .figures import Exhibit, picture_grid, two_heats
from .guide import GUIDE
from .trajectory import describe
from .words import watch

THINGS = (
    "apple", "cat", "dog", "car", "tree", "house", "rocket", "fish", "castle", "guitar", "banana", "star",
    "penguin", "strawberry", "octopus", "pizza", "butterfly", "elephant", "sunflower", "mushroom",
)  # fmt: skip
CUT = 0.4  # of a map's maximum: the threshold that Tang et al. 2022, §3, found best


@dataclass(frozen=True)
class Finding:
    """The places that looked at one word, in numbers."""

    prompt: str
    seed: int
    word: str
    side: str  # "left" or "right", as the prompt says
    share: float  # the share of the word's attention that is on its side; 0.5 is chance
    iou: float  # of the word's map and the things on its side
    other_iou: float  # of the word's map and the things on the other side


def pairs(count: int, seed: int) -> list[tuple[str, str]]:
    """Draws pairs of different things, one for the left and one for the right, at random."""
    rng = np.random.default_rng(seed)
    return [
        (THINGS[a], THINGS[b]) for a, b in (rng.choice(len(THINGS), 2, replace=False) for _ in range(count))
    ]


def measure(heat: Tensor, things: Tensor, left: bool) -> tuple[float, float, float]:
    """Returns the share, iou and other_iou of a `Finding`; heat (H, W) ≥ 0, things (H, W) bool."""
    own = torch.zeros_like(things)
    middle = things.shape[1] // 2
    own[:, slice(0, middle) if left else slice(middle, None)] = True
    mapped = heat > CUT * heat.max()
    share = (heat[own].sum() / heat.sum().clamp(min=1e-12)).item()
    return share, iou(mapped, things & own), iou(mapped, things & ~own)


def iou(one: Tensor, other: Tensor) -> float:
    """|A ∩ B| / |A ∪ B| of two masks; 0 where both are empty."""
    return ((one & other).sum() / (one | other).sum().clamp(min=1)).item()


def foreground(picture: Image.Image) -> Tensor:
    """True where a picture differs from its background, the median colour of its rim: (H, W) bool."""
    pixels = torch.from_numpy(np.array(picture, dtype=np.float32))  # (H, W, 3)
    inside = torch.zeros(pixels.shape[:2], dtype=torch.bool)
    inside[4:-4, 4:-4] = True
    rim = pixels[~inside]  # (P, 3)
    return (pixels - rim.median(0).values).abs().amax(-1) > 40


def halves(pipe: StableDiffusion, request: Request, num: int = 12) -> Exhibit:
    """So many prompts, each with two words and two sides; the request's prompt is not used."""
    request = request.for_model(pipe.config)
    findings: list[Finding] = []
    cells: list[Image.Image] = []
    captions = []
    for k, things in enumerate(Bar(pairs(num, request.seeds[0]), unit="picture", leave=False)):
        one, other = (f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}" for thing in things)
        asked = replace(
            request, prompt=f"{one} on the left and {other} on the right", seed=request.seeds[0] + k
        )
        with watch(pipe, asked) as attention:
            *_, last = pipe.denoise(asked)
        picture = pipe.decode(last.latents)[0]
        heats = [attention.heat(attention.find(thing)) for thing in things]
        for thing, heat, side in zip(things, heats, ("left", "right")):
            found = measure(heat, foreground(picture), side == "left")
            findings.append(Finding(asked.prompts[0], asked.seeds[0], thing, side, *found))
        cells += [picture, two_heats(picture, *heats)]
        captions += [f"{things[0]} – {things[1]}", f"{findings[-2].share:.0%} – {findings[-1].share:.0%}"]
    share, own, other_side = (
        float(np.mean([getattr(finding, name) for finding in findings]))
        for name in ("share", "iou", "other_iou")
    )
    summary = f"{share:.1%} of a word's attention is on its side (chance 50%)"
    summary += f" · IoU {own:.2f} with the things there, {other_side:.2f} with those on the other side"
    lines = [slice(i, i + 6) for i in range(0, len(cells), 6)]
    figure = picture_grid(
        [cells[line] for line in lines],
        "Do words find their things?",
        f"{summary} · {describe(request, 'prompt', 'seed')}",
        captions=[captions[line] for line in lines],
    )
    alt = f"{num} pictures of two things each, and beside each where the two words were looked at. {summary}."
    numbers = {"share": share, "iou": own, "other_iou": other_side, "findings": [vars(f) for f in findings]}
    return Exhibit(figure, "Do words find their things?", alt, GUIDE["halves"], numbers, _table(findings))


def _table(findings: list[Finding]) -> str:
    lines = [f"{'prompt':56} {'word':12} share   IoU  IoU of the other side"]
    for found in findings:
        numbers = f"{found.share:5.2f} {found.iou:5.2f} {found.other_iou:5.2f}"
        lines.append(f"{found.prompt:56} {found.word:12} {numbers}")
    return "\n".join(lines)
