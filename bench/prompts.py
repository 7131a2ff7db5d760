"""The 500 prompts of the evaluation, each with a real picture that fulfils it.

Nobody picked them: subjects, styles, colours and places are drawn with a fixed seed from the lists of the
training, the words are the training's own captions, and the real pictures are its scenes. So the tests that
judge a model's pictures can also judge real ones, which shows how far the tests themselves can be trusted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from reifusion.train.mini.captions import Scene
from reifusion.train.mini.compose import Shown, Specs, compose_scenes
from reifusion.train.mini.held_out import held_out_colour, held_out_place, held_out_style
from reifusion.train.mini.library import Library
from reifusion.train.mini.render import render

from . import pixels

COUNTS = {  # kind of prompt -> how many of them
    "plain": 60,  # "a cat"
    "look": 40,  # "a flat drawing of a cat"
    "style": 40,  # "a line drawing of a cat": the model was trained on this style of this subject
    "style held out": 60,  # the model was trained on cats and on line drawings, but on none of a cat
    "background": 30,  # "a cat on a blue background"
    "dye": 30,  # "a purple cat": the model was trained on this colour of this subject
    "dye held out": 40,  # the model was not trained on this colour of this subject
    "left or right": 30,  # "a cat on the left"
    "small": 20,  # "a small cat"
    "two": 30,  # "a cat next to a tree"
    "place": 20,  # "a cat in the snow": the model was trained on this subject in this place
    "place held out": 20,  # the model was never shown this subject in this place
    "seeds": 80,  # "a cat", four times
}
SEEDS = 4  # pictures of the same prompt
DRAWN_AS = {  # kind of prompt -> kind of scene, where it has another name
    "look": "plain",
    "style held out": "style",
    "dye": "dyed",
    "dye held out": "dyed",
    "left or right": "placed",
    "small": "placed",
    "place held out": "place",
    "seeds": "plain",
}


@dataclass(frozen=True)
class Prompt:
    kind: str  # one of COUNTS
    text: str
    seed: int  # of the picture to draw
    scene: Scene  # what a picture for the prompt shows
    image: np.ndarray  # a real picture for the prompt, (256, 256, 3) uint8


def make_prompts(library: Library, counts: dict[str, int] = COUNTS) -> list[Prompt]:
    """Returns the prompts, kind by kind; smaller counts give the beginning of each kind.

    Raises ValueError if there are too few sprites for the counts.
    """
    made = []
    for kind, wanted in counts.items():
        number, times = list(COUNTS).index(kind), SEEDS if kind == "seeds" else 1
        chosen = list(islice(_distinct(_scenes(library, kind, number)), -(-wanted // times)))
        if len(chosen) * times < wanted:
            raise ValueError(f"these pictures give {len(chosen)} prompts of the kind {kind!r}, not {wanted}")
        several = [each for each in chosen for _ in range(times)][:wanted]
        made += [
            Prompt(kind, scene.caption, 1000 * number + i, scene, image)
            for i, (scene, image) in enumerate(several)
        ]
    return made


def _scenes(library: Library, kind: str, number: int) -> Iterator[tuple[Scene, np.ndarray]]:
    """Draws scenes of this kind; the i-th that is tried depends only on the kind and on i."""
    shows: Shown = "held out" if kind.endswith("held out") else "trained"
    for start in range(0, 4_000, 200):
        specs, scenes = compose_scenes(
            library.sprites, 2026 + number, range(start, start + 200), DRAWN_AS.get(kind, kind), shows
        )
        for i, scene in enumerate(scenes):
            if _is_of(kind, scene, library):
                image = real_picture(library, specs[i : i + 1])
                if _can_be_judged(kind, scene, library, specs[i : i + 1], image):
                    yield scene, image


def real_picture(library: Library, specs: Specs) -> np.ndarray:
    """Specifications of one scene -> (256, 256, 3) uint8"""
    return pixels.to_images(render(library.pixels, specs))[0]


def _is_of(kind: str, scene: Scene, library: Library) -> bool:
    """True if the scene shows what this kind of prompt is about, and nothing else that is special."""
    subject, *_ = scene.subjects
    dyed, ground = scene.colours[0], scene.background != "white"
    if any(scene.colours) != kind.startswith("dye") or ground != (kind == "background"):
        return False
    if kind.startswith("style"):
        return held_out_style(subject, scene.style) == kind.endswith("held out")
    if kind.startswith("dye"):
        return held_out_colour(subject, dyed) == kind.endswith("held out")
    if kind.startswith("place"):
        return held_out_place(subject, scene.place) == kind.endswith("held out")
    if scene.names_look != (kind == "look") and kind in ("plain", "look", "seeds"):
        return False
    if kind == "seeds":  # a bare name, of which there are several drawings
        return len(library.of[subject]) > SEEDS and scene.caption in (f"a {subject}", f"an {subject}")
    if kind == "left or right":
        return scene.size == "medium" and scene.position in ("left", "right")
    if kind == "small":
        return scene.size == "small" and scene.position == "middle"
    return scene.kind == DRAWN_AS.get(kind, kind)


def _can_be_judged(kind: str, scene: Scene, library: Library, specs: Specs, image: np.ndarray) -> bool:
    """True if the test of this kind's pixels finds in the real picture what it has to find in a model's."""
    if kind == "background":
        return pixels.background_name(image) == scene.background
    if kind.startswith("dye"):  # and not if the subject has that colour anyway
        undyed = real_picture(library, replaced_dye(specs))
        return pixels.dye_name(image) == scene.colours[0] != pixels.dye_name(undyed)
    if kind == "left or right":
        return pixels.side_name(image) == scene.position
    if kind == "small":
        return pixels.extent(image) < pixels.SMALL
    return True


def replaced_dye(specs: Specs) -> Specs:
    """Returns the scenes without their dyes."""
    undyed = specs[:]
    undyed.dye = torch.full_like(specs.dye, -1)
    return undyed


def _distinct(scenes: Iterator[tuple[Scene, np.ndarray]]) -> Iterator[tuple[Scene, np.ndarray]]:
    """Leaves out scenes that were asked for before, in whatever words."""
    before = set()
    for scene, image in scenes:
        look = scene.look if scene.names_look else ""
        special = (scene.style, scene.place, *scene.colours, scene.background, scene.position, look)
        asked = (*scene.subjects, *special)
        if asked not in before and scene.caption not in before:
            before |= {asked, scene.caption}
            yield scene, image
