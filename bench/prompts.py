"""The 500 prompts of the evaluation, each with a real picture that fulfils it.

Nobody picked them: subjects, styles and colours are drawn with a fixed seed from the lists of the training,
the words are the training's own captions, and the real pictures are its scenes. So the tests that judge a
model's pictures can also judge real ones, which shows how far the tests themselves can be trusted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from reifusion.train.mini.scenes import DYES, KINDS, Scene, SceneConfig, Sprites, caption, compose, dye
from reifusion.train.mini.sprites import LOOKS, held_out_colour, held_out_sprites, training_sprites

from .pixels import dye_name, on_white

COUNTS = {  # kind of prompt -> how many of them
    "plain": 100,  # "a cat"
    "style": 100,  # "a flat drawing of a cat": the model was trained on this drawing
    "style held out": 80,  # the model was trained on cats and on flat drawings, but never on this drawing
    "background": 50,  # "a cat on a blue background"
    "dye": 40,  # "a purple cat": the model was trained on this colour of this subject
    "dye held out": 40,  # the model was not trained on this colour of this subject
    "left or right": 30,  # "a cat on the left"
    "small": 30,  # "a small cat"
    "two": 30,  # "a cat next to a tree"
}


@dataclass(frozen=True)
class Prompt:
    kind: str  # one of COUNTS
    text: str
    seed: int  # of the picture to draw
    scene: Scene  # a real picture for the prompt, (128, 128, 3) uint8, and what it shows


def make_prompts(
    trained: Sprites | None = None, held_out: Sprites | None = None, counts: dict[str, int] = COUNTS
) -> list[Prompt]:
    """Returns the prompts, kind by kind; smaller counts give the beginning of each kind.

    Raises ValueError if there are too few sprites for the counts.
    """
    trained = trained or Sprites(*training_sprites())
    held_out = held_out or Sprites(*held_out_sprites())
    made = []
    for kind, wanted in counts.items():
        number = list(COUNTS).index(kind)
        scenes = _scenes(kind, number, held_out if kind == "style held out" else trained)
        chosen = list(islice(_distinct(scenes), wanted))
        if len(chosen) < wanted:
            raise ValueError(f"these pictures give {len(chosen)} prompts of the kind {kind!r}, not {wanted}")
        made += [Prompt(kind, scene.caption, 1000 * number + i, scene) for i, scene in enumerate(chosen)]
    return made


def _scenes(kind: str, number: int, sprites: Sprites) -> Iterator[Scene]:
    """Draws scenes of this kind; the i-th that is tried depends only on the kind and on i."""
    drawn_as = {"background": "background", "left or right": "placed", "small": "placed", "two": "two"}
    shares = {name: float(name == drawn_as.get(kind, "plain")) for name in KINDS}
    styled = float(kind.startswith("style"))
    config = SceneConfig(**shares, combine=0, name_style=styled, prefer_3d=1, mirror=0, synonym=0, aside=0)
    for i in range(3_000):
        rng = np.random.default_rng([2026, number, i])
        if kind.startswith("dye"):
            scene = _dyed(rng, sprites, config, held_out=kind == "dye held out")
        else:
            scene = compose(rng, sprites, config)
        if scene is not None and _is_of(kind, scene):
            yield scene


def _is_of(kind: str, scene: Scene) -> bool:
    tags = scene.tags
    if kind == "style held out":
        return LOOKS[tags["style"]] != "3d"  # a glossy drawing's twin in 3d is never held out
    if kind == "background":
        return tags["background"] != "white"  # some subjects do not stand out from any colour
    if kind == "left or right":
        return tags["size"] == "medium" and tags["position"] in ("left", "right")
    if kind == "small":
        return tags["size"] == "small" and tags["position"] == "middle"
    return True


def _dyed(rng: np.random.Generator, sprites: Sprites, config: SceneConfig, held_out: bool) -> Scene | None:
    """Draws a dyed subject; None if no colour is (not) held out, or if the subject has it by nature."""
    subject = sprites.dyeable[int(rng.integers(len(sprites.dyeable)))]
    colours = [colour for colour in DYES if held_out_colour(subject, colour) == held_out]
    if not colours:
        return None
    colour = colours[int(rng.integers(len(colours)))]
    sprite = sprites.get(subject, "3d")
    if dye_name(on_white(sprite)) == colour:
        return None
    tags = {"kind": "dyed", "subjects": [subject], "style": "3d", "says_style": False, "colours": [colour],
            "background": "white", "size": "full", "position": "middle"}  # fmt: skip
    return Scene(on_white(dye(sprite, colour)), caption(rng, sprites, tags, config), tags)


def _distinct(scenes: Iterator[Scene]) -> Iterator[Scene]:
    """Leaves out scenes that were asked for before, in whatever words."""
    before = set()
    for scene in scenes:
        tags = scene.tags
        asked = (*tags["subjects"], tags["style"], *tags["colours"], tags["background"], tags["position"])
        if asked not in before and scene.caption not in before:
            before |= {asked, scene.caption}
            yield scene
