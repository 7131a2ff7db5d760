"""What a scene shows, and the many ways to ask for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from .library import Sprite
from .places import PLACES
from .subjects import article, noun_phrase

T = TypeVar("T")

MEDIA = {  # look -> words for a picture with that look
    "3d": ("picture", "render", "icon"),
    "flat": ("picture", "drawing", "icon"),
    "cartoon": ("picture", "drawing"),
    "outlined": ("picture", "drawing", "icon"),
    "clip art": ("picture", "drawing"),
}
STYLED = {  # style -> ways to ask for a subject in it
    "pixel art": ("pixel art of {}", "pixel art of {}", "{}, pixel art", "{} as pixel art"),
    "silhouette": ("a silhouette of {}", "a silhouette of {}", "the silhouette of {}", "{}, silhouette"),
    "line drawing": ("a line drawing of {}", "a line drawing of {}", "{}, line drawing", "line art of {}"),
    "sticker": ("a sticker of {}", "a sticker of {}", "{}, sticker", "{} as a sticker"),
    "pencil drawing": ("a pencil drawing of {}", "a pencil sketch of {}", "{}, pencil drawing"),
}  # fmt: skip
SIZES = {"small": ("small", "little", "tiny"), "big": ("big", "large", "huge")}
POSITIONS = {  # name -> direction from the middle (right, down), and ways to say it
    "left": ((-1, 0), ("on the left", "on the left side")),
    "right": ((1, 0), ("on the right", "on the right side")),
    "top": ((0, -1), ("at the top",)),
    "bottom": ((0, 1), ("at the bottom",)),
    "top left": ((-1, -1), ("in the top left corner", "at the top left")),
    "top right": ((1, -1), ("in the top right corner", "at the top right")),
    "bottom left": ((-1, 1), ("in the bottom left corner", "at the bottom left")),
    "bottom right": ((1, 1), ("in the bottom right corner", "at the bottom right")),
}
PAIRINGS = (  # {0} is on the left
    "{0} next to {1}",
    "{0} and {1}",
    "{0} beside {1}",
    "{0} to the left of {1}",
    "{1} to the right of {0}",
    "{0} on the left and {1} on the right",
)


@dataclass(frozen=True)
class Scene:
    """What a scene shows; the evaluation asks for it, too."""

    kind: str
    subjects: tuple[str, ...]
    look: str  # of its sprites
    names_look: bool = False  # True if the caption says the look
    style: str = ""  # computed
    colours: tuple[str, ...] = ("",)  # what each subject is dyed in
    background: str = "white"
    place: str = ""
    size: str = "full"
    position: str = "middle"
    caption: str = ""


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    return options[int(rng.integers(len(options)))]


def caption(rng: np.random.Generator, scene: Scene, sprites: Sequence[Sprite]) -> str:
    """Returns one of the many ways to ask for the scene, which shows these sprites."""
    draw = rng.random()
    single = len(sprites) == 1
    look = scene.look if scene.names_look else ""
    before = look if draw < 0.45 and single else ""  # "a 3d cat"
    size = pick(rng, SIZES[scene.size]) if scene.size in SIZES else ""
    things = [
        noun_phrase(rng, _noun(rng, sprite, colour or scene.style), size, before, colour)
        for sprite, colour in zip(sprites, scene.colours, strict=True)
    ]
    text = things[0] if single else pick(rng, PAIRINGS).format(*things)
    if scene.position in POSITIONS:
        text += " " + pick(rng, POSITIONS[scene.position][1])
    if scene.place:
        text += " " + pick(rng, PLACES[scene.place][1])
    elif scene.background != "white" or rng.random() < 0.04:
        ground = article(f"{scene.background} background")
        text += " " + pick(rng, (f"on {ground}", f"on {ground}", f"with {ground}", f"on {scene.background}"))
    if scene.style:
        return pick(rng, STYLED[scene.style]).format(text)
    if look and not before:
        of = f"{article(look)} {pick(rng, MEDIA[look])} of {text}"
        return pick(rng, (of, of, f"{text}, {look} style", f"{text} in {look} style"))
    if not look and draw < 0.2 and single:
        return text.removeprefix("a ").removeprefix("an ")
    if not look and draw < 0.4:
        return pick(rng, ("a picture of ", "a picture of ", "an image of ", "an icon of ")) + text
    return text


def _noun(rng: np.random.Generator, sprite: Sprite, changed: str) -> str:
    # What the drawing shows is no longer so ("grey lizard") if it was dyed or has another style.
    if sprite.caption and not changed and rng.random() < 0.5:
        return sprite.caption
    return pick(rng, sprite.synonyms) if sprite.synonyms and rng.random() < 0.25 else sprite.subject
