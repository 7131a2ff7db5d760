"""Who is where in a scene: specifications without pixels, which `render` turns into pictures on any device.

Scene i depends only on (seed, i), so a longer bank begins with the scenes of a shorter one, and several
processes can write one together.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .captions import POSITIONS, Scene, caption, pick
from .colours import DYES, NAMES, PALETTE
from .held_out import held_out_colour, held_out_look, held_out_place, held_out_style
from .library import SIDE, Library, Sprite
from .places import GROUND, PLACES
from .styles import STYLES
from .subjects import COLOUR_WORDS

SHARES = {  # kind of scene -> how often
    "plain": 0.29,
    "background": 0.13,  # "a cat on a blue background"
    "dyed": 0.12,  # "a purple cat"
    "placed": 0.10,  # "a small cat on the left"
    "two": 0.09,  # "a dog next to a tree"
    "style": 0.16,  # "a line drawing of a cat"
    "place": 0.11,  # "a cat in the snow"
}
KINDS = tuple(SHARES)
COMBINE = 0.06  # chance of a background, and of a dye, in a scene of another kind
NAME_LOOK = 0.5  # how often the caption says the look
MIRROR = 0.25
# How often a look is drawn, where a subject has them all: 3d is the most pretty, flat is five hands.
LOOKS = {"3d": 0.26, "flat": 0.37, "cartoon": 0.15, "outlined": 0.1, "clip art": 0.12}
PAPER = ("line drawing", "pencil drawing")  # styles that stay white and black
ASHORE = ("place-", "sky-", "geometric", "warning", "other-symbol", "punctuation")  # not put in places
WHITE = (1.0, 0.0, 0.0)  # in Oklab


@dataclass
class Specs:
    """Specifications of N scenes, as columns. The second sprite is missing where its index is −1."""

    sprite: Tensor  # (N, 2) int64, indices into a library
    dye: Tensor  # (N, 2) int64, indices into the colours, −1 for none
    mirror: Tensor  # (N, 2) bool
    scale: Tensor  # (N, 2) float32
    shift: Tensor  # (N, 2, 2) float32: right and down from the middle, as shares of the side
    foot: Tensor  # (N,) float32: where the first sprite stands, as a share of the side
    style: Tensor  # (N,) int64, −1 for none
    place: Tensor  # (N,) int64, −1 for none
    ground: Tensor  # (N, 3) float32: the background's colour in Oklab
    seed: Tensor  # (N,) int64: of the place

    def __len__(self) -> int:
        return len(self.sprite)

    def __getitem__(self, index: Any) -> Specs:
        return Specs(*(getattr(self, field.name)[index] for field in fields(self)))

    def to(self, device: torch.device | str) -> Specs:
        return Specs(*(getattr(self, field.name).to(device) for field in fields(self)))


Rule = Callable[[str, str], bool]  # of held_out
Shown = Literal["trained", "held out", "all"]


class Composer:
    """Composes random scenes of a library's sprites.

    shows: which pairs of a subject with a style, a colour, a place: those of training, the others, or all.
    """

    def __init__(self, sprites: Sequence[Sprite], kind: str | None = None, shows: Shown = "trained"):
        self.sprites, self.kind, self.shows = sprites, kind, shows
        self.of: dict[str, dict[str, dict[str, list[int]]]] = {}  # subject -> look -> hand -> sprites
        for i in range(len(sprites)) if shows == "all" else training_sprites(sprites):
            s = sprites[i]
            self.of.setdefault(s.subject, {}).setdefault(s.look, {}).setdefault(s.hand, []).append(i)
        # Subjects that clip art alone draws have few drawings: half as often.
        self.subjects = [
            s for s, looks in self.of.items() for _ in range(1 if set(looks) == {"clip art"} else 2)
        ]
        records = {s.subject: s for s in sprites}
        dyeable = [s for s in self.subjects if records[s].dyeable]
        movable = [s for s in self.subjects if not records[s].category.startswith(ASHORE)]
        # Most styles lose the colour, and a "white heart" with it.
        colourless = [s for s in self.subjects if not COLOUR_WORDS & set(s.split())]
        self.fit = {
            "dyed": [s for s in dyeable if self._allowed(held_out_colour, s, DYES)],
            "place": [s for s in movable if self._allowed(held_out_place, s, PLACES)],
            "style": [s for s in colourless if self._styles(records[s])],
        }

    def compose(self, rng: np.random.Generator) -> tuple[Scene, dict[str, Any]]:
        """Returns what the scene shows, with its caption, and its row of Specs."""
        kind = self.kind or _draw(rng, SHARES)
        subjects = [pick(rng, self.fit.get(kind) or self.subjects)]
        look, hand = self._pick_hand(rng, subjects[0])
        if kind == "two":  # the other subject is by the same hand
            others = (pick(rng, self.subjects) for _ in range(100))
            subjects += [s for s in others if s != subjects[0] and hand in self.of[s].get(look, {})][:1]
            kind = "two" if len(subjects) == 2 else "plain"
        chosen = [pick(rng, self.of[subject][look][hand]) for subject in subjects]
        sprites = [self.sprites[i] for i in chosen]
        scene = Scene(
            kind, tuple(subjects), look, bool(rng.random() < NAME_LOOK), colours=("",) * len(subjects)
        )
        if kind == "style":
            scene = replace(scene, style=pick(rng, self._styles(sprites[0])), names_look=False)
        if (kind == "dyed" or rng.random() < COMBINE) and scene.style not in (*PAPER, "silhouette"):
            scene = replace(scene, colours=self._dyes(rng, sprites))
        if kind == "place":
            scene = replace(scene, place=self._place(rng, scene, sprites[0]))
        elif (
            kind == "background" or rng.random() < (0.3 if scene.style else COMBINE)
        ) and scene.style not in PAPER:
            scene = replace(scene, background=self._background(rng, scene, sprites))
        scene, scales, shifts, foot = _arrange(rng, scene, sprites)
        scene = replace(scene, caption=caption(rng, scene, sprites))
        ground = WHITE if scene.background == "white" else shade(rng, scene.background)
        second = len(chosen) == 2
        mirror = [s.mirrors and bool(rng.random() < MIRROR) for s in sprites]
        return scene, {
            "sprite": chosen if second else [*chosen, -1],
            "dye": [*(NAMES.index(c) if c else -1 for c in scene.colours), -1][:2],
            "mirror": [*mirror, False][:2],
            "scale": scales,
            "shift": shifts,
            "foot": foot,
            "style": list(STYLES).index(scene.style) if scene.style else -1,
            "place": list(PLACES).index(scene.place) if scene.place else -1,
            "ground": ground,
            "seed": int(rng.integers(2**31)),
        }

    def _allowed(self, held_out: Rule, subject: str, words: Iterable[str]) -> list[str]:
        return [w for w in words if self.shows == "all" or held_out(subject, w) == (self.shows == "held out")]

    def _styles(self, sprite: Sprite) -> list[str]:
        return [s for s in self._allowed(held_out_style, sprite.subject, STYLES) if suits(sprite, s)]

    def _pick_hand(self, rng: np.random.Generator, subject: str) -> tuple[str, str]:
        looks = self.of[subject]
        look = _draw(rng, {look: LOOKS[look] for look in looks})
        return look, pick(rng, list(looks[look]))

    def _dyes(self, rng: np.random.Generator, sprites: Sequence[Sprite]) -> tuple[str, ...]:
        which = int(rng.integers(len(sprites)))  # of two subjects, only one is dyed
        allowed = self._allowed(held_out_colour, sprites[which].subject, DYES)
        colour = pick(rng, allowed) if sprites[which].dyeable and allowed else ""
        return tuple(colour if i == which else "" for i in range(len(sprites)))

    def _background(self, rng: np.random.Generator, scene: Scene, sprites: Sequence[Sprite]) -> str:
        dyed = list(zip(sprites, scene.colours, strict=True))
        visible = [c for c in NAMES if all(_seen(scene, sprite, c, dye) for sprite, dye in dyed)]
        return pick(rng, visible) if visible else "white"

    def _place(self, rng: np.random.Generator, scene: Scene, sprite: Sprite) -> str:
        seen = [
            place
            for place, (_, _, colours) in PLACES.items()
            if all(_seen(scene, sprite, colour, scene.colours[0]) for colour in colours)
        ]
        allowed = self._allowed(held_out_place, sprite.subject, seen)
        return pick(rng, allowed) if allowed else ""


def _draw(rng: np.random.Generator, shares: dict[str, float]) -> str:
    """Draws one of the words, each as often as its share says."""
    ends = np.cumsum(list(shares.values()))
    return list(shares)[int(np.searchsorted(ends[:-1] / ends[-1], rng.random(), "right"))]


def _seen(scene: Scene, sprite: Sprite, colour: str, dyed: str) -> bool:
    """True if the sprite, which may be dyed, can be seen on this colour."""
    if scene.style == "silhouette":
        return colour not in ("black", "blue", "purple")
    return scene.style == "sticker" or (colour != dyed if dyed else colour in sprite.stands_out)


def suits(sprite: Sprite, style: str) -> bool:
    """True unless it would be the silhouette of a face, which is a disc."""
    return not (style == "silhouette" and sprite.category.startswith("face-"))


def training_sprites(sprites: Sequence[Sprite]) -> list[int]:
    """Returns the sprites that training may show: all but those of held-out looks."""
    return [i for i, sprite in enumerate(sprites) if not is_held_out(sprite)]


def is_held_out(sprite: Sprite) -> bool:
    """True if training never shows the sprite. Subjects that clip art alone draws are all shown."""
    return sprite.category != "clip art" and held_out_look(sprite.subject, sprite.look)


def shade(rng: np.random.Generator, colour: str) -> tuple[float, float, float]:
    """Draws a random shade of a named colour, in Oklab."""
    lightness, a, b = _PALETTE[NAMES.index(colour)]
    turned = complex(a, b) * np.exp(1j * rng.uniform(-0.08, 0.08)) * rng.uniform(0.85, 1.05)
    return lightness + rng.uniform(-0.03, 0.03), turned.real, turned.imag


_PALETTE = PALETTE.tolist()


def _arrange(
    rng: np.random.Generator, scene: Scene, sprites: Sequence[Sprite]
) -> tuple[Scene, list[float], list[list[float]], float]:
    """Returns the scene with size and position, scales, shifts and where the first sprite stands.

    Sizes and shifts are multiples of 16 pixels, so that moving a subject only moves its latents, which the
    U-Net sees in patches of two. A shift by less would make another picture of it.
    """
    size, position = "full", "middle"
    scales, shifts = [1.0, 1.0], [[0.0, 0.0], [0.0, 0.0]]
    if scene.kind == "two":
        size, position, scales = "half", "side by side", [0.5, 0.5]
        shifts = [[side, pick(rng, (-1, 0, 0, 1)) / 16] for side in (-0.25, 0.25)]
    elif scene.kind == "placed":
        size = pick(rng, ("small", "small", "big", "medium", "medium", "medium"))
        scales[0] = {"small": 0.375, "medium": 0.5, "big": 1.125}[size]
        reach = {"small": 0.25, "medium": 0.1875, "big": 0.0}[size]
        if size == "medium" or (size == "small" and rng.random() < 0.5):
            position = pick(rng, ("left", "right") if rng.random() < 0.5 else tuple(POSITIONS))
            right, down = POSITIONS[position][0]
            shifts[0] = [right * reach, down * reach]
    elif scene.place:
        scales[0] = pick(rng, (0.5, 0.625, 0.625, 0.75))
        standing = GROUND - 0.5 - scales[0] * (sprites[0].foot / SIDE - 0.5)
        shifts[0] = [pick(rng, (-2, -1, 0, 0, 1, 2)) / 16, round(standing * 16) / 16]
    elif not scene.style:
        scales[0] = pick(rng, (0.875, 0.9375, 1.0, 1.0))
    foot = 0.5 + shifts[0][1] + scales[0] * (sprites[0].foot / SIDE - 0.5)
    return replace(scene, size=size, position=position), scales, shifts, foot


# ---- many scenes ------------------------------------------------------------------------------------------


def compose_scenes(
    sprites: Sequence[Sprite],
    seed: int,
    indices: Iterable[int],
    kind: str | None = None,
    shows: Shown = "trained",
) -> tuple[Specs, list[Scene]]:
    """Composes scenes; to know what they show is for the evaluation."""
    composer = Composer(sprites, kind, shows)
    scenes, rows = zip(*(composer.compose(np.random.default_rng([seed, i])) for i in indices), strict=True)
    return _specs([_columns(rows)]), list(scenes)


def compose_bank(
    library: Library, seed: int, count: int, workers: int | None = None
) -> tuple[Specs, list[str]]:
    """Composes scenes 0 to count − 1; returns their specifications and captions.

    workers: how many processes, None for all processors where they are worth their start.
    """
    if workers is None:
        workers = (os.cpu_count() or 1) if count > 30_000 else 1
    jobs = [(seed, start, min(start + 1000, count)) for start in range(0, count, 1000)]
    if workers == 1:
        _begin(library.sprites)
        done = [_work(job) for job in jobs]
    else:
        # New processes: a forked one may wait for ever for the threads of PyTorch that it did not inherit.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context, _begin, (library.sprites,)) as pool:
            done = list(pool.map(_work, jobs))
    return _specs([columns for columns, _ in done]), [text for _, captions in done for text in captions]


_composer: Composer


def _begin(sprites: Sequence[Sprite]) -> None:
    global _composer
    _composer = Composer(sprites)


def _work(job: tuple[int, int, int]) -> tuple[dict[str, np.ndarray], list[str]]:
    seed, start, stop = job
    done = [_composer.compose(np.random.default_rng([seed, i])) for i in range(start, stop)]
    return _columns([row for _, row in done]), [scene.caption for scene, _ in done]


def _columns(rows: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    columns = {field.name: np.array([row[field.name] for row in rows]) for field in fields(Specs)}
    return {name: x.astype(np.float32) if x.dtype == np.float64 else x for name, x in columns.items()}


def _specs(parts: Sequence[dict[str, np.ndarray]]) -> Specs:
    return Specs(*(torch.from_numpy(np.concatenate([p[f.name] for p in parts])) for f in fields(Specs)))
