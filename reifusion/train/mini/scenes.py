"""Captioned scenes, composed from the sprites: the mini's U-Net and text encoder learn from them.

`compose` places one or two sprites, some of them dyed, on a background, and `caption` describes the result
in words. `build_bank` does that many times and keeps the scenes in a folder; to see some, run
`python -m reifusion.train.mini.scenes --sheet scenes.png`.
"""

from __future__ import annotations

import argparse
import json
import os
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from .sprites import LOOKS, SIDE, STYLES, SpriteRecord, held_out_colour, training_sprites
from .subjects import COLOUR_WORDS, NO_DYE, NO_MIRROR, noun_phrase

# Colours as people name them; backgrounds use all of them, dyes all except black.
COLOURS = {
    "red": (222, 40, 44),
    "orange": (247, 138, 30),
    "yellow": (252, 214, 48),
    "green": (58, 164, 72),
    "blue": (48, 112, 228),
    "purple": (140, 72, 200),
    "pink": (250, 130, 180),
    "black": (28, 28, 32),
}
DYES = [name for name in COLOURS if name != "black"]
MEDIA = {  # style -> words for a picture in that style
    "3d": ("picture", "render", "icon"),
    "cartoon": ("picture", "drawing"),
    "flat": ("picture", "drawing", "icon"),
    "glossy": ("picture", "icon"),
}
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
# Words that people also write, although no picture here shows them: unseen, the model would misread them.
DOING = ("sitting", "standing", "sleeping", "stretching", "running", "waiting", "resting", "looking around",
         "playing", "floating", "shining", "dreaming", "smiling", "dancing", "lying", "alone", "hiding",
         "travelling")  # fmt: skip
WHERE = ("", "", "on the floor", "on a table", "in a garden", "in the sun", "in the rain", "at home",
         "at night", "in a forest", "by the sea", "on the street", "in a room", "under the sky",
         "in the snow")  # fmt: skip
PRAISE = ("highly detailed", "ultra sharp", "beautiful", "cinematic", "4k", "8k", "100mm lens",
          "masterpiece", "best quality", "soft light", "sharp focus", "trending", "professional",
          "artistic", "cute")  # fmt: skip


class Sprites:
    """The sprites, found by subject and style."""

    def __init__(self, pixels: np.ndarray, records: list[SpriteRecord]):
        self.pixels = pixels  # (N, SIDE, SIDE, 4) uint8
        self.index: dict[str, dict[str, int]] = {}  # subject -> style -> index into pixels
        self.synonyms = {picture.subject: picture.synonyms for picture in records}
        for i, picture in enumerate(records):
            self.index.setdefault(picture.subject, {})[picture.style] = i
        self.subjects = list(self.index)
        self.dyeable = list(dict.fromkeys(p.subject for p in records if can_be_dyed(p)))

    def get(self, subject: str, style: str) -> np.ndarray:
        return self.pixels[self.index[subject][style]]


def can_be_dyed(picture: SpriteRecord) -> bool:
    """True unless its names include a colour ("black cat", "orange"), or it shows people or hands."""
    names = " ".join((picture.subject, *picture.synonyms))
    coloured = picture.subject in NO_DYE or bool(COLOUR_WORDS & set(names.split()))
    return not coloured and not picture.category.startswith(("person", "hand"))


# ---- colours ----------------------------------------------------------------------------------------------

# In Oklab, equal distances look equal, so a hue can be turned without changing how light the colour looks.
# Source: Björn Ottosson, "A perceptual color space for image processing", 2020.
_LMS = np.array([[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
                 [0.0883024619, 0.2817188376, 0.6299787005]], np.float32)  # fmt: skip
_LAB = np.array([[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
                 [0.0259040371, 0.7827717662, -0.8086757660]], np.float32)  # fmt: skip
_LMS_INVERSE, _LAB_INVERSE = np.linalg.inv(_LMS), np.linalg.inv(_LAB)
_levels = np.arange(256, dtype=np.float32) / 255
_LINEAR = np.where(_levels <= 0.04045, _levels / 12.92, ((_levels + 0.055) / 1.055) ** 2.4).astype(np.float32)


def to_oklab(rgb: np.ndarray) -> np.ndarray:
    """(..., 3) uint8 sRGB -> (..., 3) lightness in [0, 1], a (red), b (yellow)."""
    return np.cbrt(_LINEAR[rgb] @ _LMS.T) @ _LAB.T


def from_oklab(lab: np.ndarray) -> np.ndarray:
    linear = ((lab @ _LAB_INVERSE.T) ** 3 @ _LMS_INVERSE.T).clip(0, 1)
    rgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return (255 * rgb).round().astype(np.uint8)


def _ramp(x: np.ndarray, low: float, high: float) -> np.ndarray:
    return ((x - low) / (high - low)).clip(0, 1)


def dye(sprite: np.ndarray, colour: str) -> np.ndarray:
    """Turns the sprite's main colour into the named one; shading, outlines, eyes and small parts remain."""
    solid = sprite[..., 3] > 0
    lab = to_oklab(sprite[solid][:, :3])  # (P, 3)
    lightness, chroma, hue = lab[:, 0], np.hypot(lab[:, 1], lab[:, 2]), np.arctan2(lab[:, 2], lab[:, 1])
    light, *ab = to_oklab(np.array(COLOURS[colour], np.uint8))
    alpha = sprite[solid][:, 3] / 255
    coloured = _ramp(chroma, 0.03, 0.07)
    # A grey or white subject (many greys are slightly blue) is dyed everywhere except in its blacks.
    if np.average(_ramp(chroma, 0.05, 0.1), weights=alpha) < 0.4:
        change, strength, turn = _ramp(lightness, 0.15, 0.35), np.ones_like(chroma), np.zeros_like(hue)
    else:
        # The main hue is the one with the most chroma within 60°.
        bins = np.bincount(((hue / np.pi + 1) * 18).astype(int) % 36, chroma * coloured * alpha, minlength=36)
        main = (np.argmax(sum(np.roll(bins, k) for k in range(-6, 7))) + 0.5) / 18 * np.pi - np.pi
        turn = (hue - main + np.pi) % (2 * np.pi) - np.pi
        near = coloured * _ramp(-np.abs(turn), -1.9, -1.2)
        change = near if (near * alpha).sum() > 0.5 * (coloured * alpha).sum() else coloured
        strength = (chroma / np.average(chroma, weights=change * alpha + 1e-6)).clip(0, 1.5) ** 0.5
    middle = np.average(lightness, weights=change * alpha + 1e-6)
    new_hue = np.arctan2(ab[1], ab[0]) + 0.15 * turn.clip(-1, 1)
    new_chroma = np.hypot(*ab) * strength
    new_lightness = lightness + 0.9 * (light - middle)
    new = np.stack([new_lightness, new_chroma * np.cos(new_hue), new_chroma * np.sin(new_hue)], 1)
    dyed = sprite.copy()
    dyed[solid, :3] = from_oklab(lab + change[:, None] * (new - lab))
    return dyed


def background_colour(rng: np.random.Generator, name: str) -> tuple[int, int, int]:
    """Draws a random shade of the named colour."""
    lightness, a, b = to_oklab(np.array(COLOURS[name], np.uint8))
    turn = complex(a, b) * np.exp(1j * rng.uniform(-0.08, 0.08)) * rng.uniform(0.85, 1.05)
    r, g, b = from_oklab(np.array([lightness + rng.uniform(-0.03, 0.03), turn.real, turn.imag])).tolist()
    return r, g, b


def stands_out(sprite: np.ndarray, name: str) -> bool:
    """True if the sprite can be seen on a background of this colour."""
    sample = sprite[::8, ::8].reshape(-1, 4)
    lab = to_oklab(sample[sample[:, 3] > 128][:, :3])
    away = np.linalg.norm(lab - to_oklab(np.array(COLOURS[name], np.uint8)), axis=-1) > 0.15
    return bool(away.size == 0 or away.mean() > 0.6)


# ---- scenes -----------------------------------------------------------------------------------------------

KINDS = ("plain", "background", "dyed", "placed", "two")


@dataclass(frozen=True)
class SceneConfig:
    # The shares of the KINDS of scenes, which add up to 1.
    plain: float = 0.55
    background: float = 0.15  # "a cat on a blue background"
    dyed: float = 0.10  # "a purple cat"
    placed: float = 0.10  # "a small cat on the left"
    two: float = 0.10  # "a dog next to a tree"
    combine: float = 0.06  # chance of a background, and of a dye, in a scene of another kind
    name_style: float = 0.75  # how often the caption names the style
    # Details that a caption leaves open are nearly always the same: a small model learns a word many times
    # faster if the word stands for one picture instead of the mean of eight.
    prefer_3d: float = 0.9  # how often the style is 3d if the caption does not name it
    mirror: float = 0.15  # how often a subject is mirrored
    synonym: float = 0.25  # how often another name replaces the subject's own
    aside: float = 0.12  # how often the caption adds an activity of the subject or praise of the picture


@dataclass(frozen=True)
class Scene:
    image: np.ndarray  # (SIDE, SIDE, 3) uint8
    caption: str
    tags: dict[str, Any]  # its contents, for the evaluation


def _pick(rng: np.random.Generator, options: Any) -> Any:
    return options[int(rng.integers(len(options)))]


def _chance(rng: np.random.Generator, probability: float) -> bool:
    # A chance of 0 draws no number, so that without asides, a seed has the captions it had before asides.
    return probability > 0 and bool(rng.random() < probability)


def compose(rng: np.random.Generator, sprites: Sprites, config: SceneConfig = SceneConfig()) -> Scene:
    """Composes a random scene with its caption."""
    shares = np.cumsum([getattr(config, kind) for kind in KINDS])
    kind = KINDS[int(np.searchsorted(shares[:-1], rng.random(), "right"))]
    subjects = [_pick(rng, sprites.dyeable if kind == "dyed" else sprites.subjects)]
    while kind == "two" and len(subjects) < 2:
        other = _pick(rng, sprites.subjects)
        subjects += [other] if other != subjects[0] else []

    styles = [s for s in STYLES if all(s in sprites.index[subject] for subject in subjects)]
    says_style = bool(rng.random() < config.name_style)
    # All looks are equally frequent: a style that shares its look with another one is half as frequent.
    style = _pick(rng, [s for s in styles for _ in range(1 if LOOKS[s] == "3d" else 2)])
    if not says_style and rng.random() < config.prefer_3d:
        style = "3d"  # every subject has it

    shown = [sprites.get(subject, style) for subject in subjects]
    colours = [""] * len(subjects)
    if kind == "dyed" or rng.random() < config.combine:
        which = int(rng.integers(len(subjects)))  # of two subjects, only one is dyed
        allowed = [c for c in DYES if not held_out_colour(subjects[which], c)]
        if subjects[which] in sprites.dyeable and allowed:
            colours[which] = _pick(rng, allowed)
            shown[which] = dye(shown[which], colours[which])
    for i, subject in enumerate(subjects):
        if subject not in NO_MIRROR and rng.random() < config.mirror:
            shown[i] = shown[i][:, ::-1]

    background = "white"
    if kind == "background" or rng.random() < config.combine:
        visible = [c for c in COLOURS if c not in colours and all(stands_out(s, c) for s in shown)]
        background = _pick(rng, visible) if visible else "white"
    paint = background_colour(rng, background) if background in COLOURS else (255, 255, 255)
    canvas = Image.new("RGB", (SIDE, SIDE), paint)

    # Sizes and shifts are multiples of 8 pixels, so that moving a subject only moves its latents. A shift by
    # less changes every latent, and the U-Net would have to learn each one as another picture.
    size, position = "full", "middle"
    if kind == "two":
        size, position = "half", "side by side"
        for sprite, side in zip(shown, (-1, 1), strict=True):
            _paste(canvas, sprite, 0.5, side * 32, _pick(rng, (-8, 0, 0, 8)))
    elif kind == "placed":
        size = _pick(rng, ("small", "small", "big", "medium", "medium", "medium"))
        scale = {"small": 0.375, "medium": 0.5, "big": 1.125}[size]
        right, down = 0, 0
        if size == "medium" or (size == "small" and rng.random() < 0.5):
            position = _pick(rng, ("left", "right") if rng.random() < 0.5 else tuple(POSITIONS))
            right, down = POSITIONS[position][0]
        reach = {"small": 32, "medium": 24, "big": 0}[size]
        _paste(canvas, shown[0], scale, right * reach, down * reach)
    else:
        _paste(canvas, shown[0], 1.0, 0, 0)

    tags = {"kind": kind, "subjects": subjects, "style": style, "says_style": says_style, "colours": colours,
            "background": background, "size": size, "position": position}  # fmt: skip
    return Scene(np.asarray(canvas), caption(rng, sprites, tags, config), tags)


def _paste(canvas: Image.Image, sprite: np.ndarray, scale: float, right: float, down: float) -> None:
    """Pastes the sprite, its middle `right` and `down` of the canvas's middle."""
    image = Image.fromarray(np.ascontiguousarray(sprite))
    side = round(scale * SIDE)
    if side != SIDE:
        image = image.resize((side, side), Image.Resampling.BICUBIC)
    canvas.paste(image, (round((SIDE - side) / 2 + right), round((SIDE - side) / 2 + down)), image)


def caption(rng: np.random.Generator, sprites: Sprites, tags: dict[str, Any], config: SceneConfig) -> str:
    """Returns one of the many ways to ask for the scene."""
    text = _description(rng, sprites, tags, config)
    if _chance(rng, config.aside):
        text = ", ".join((text, *rng.permutation(PRAISE)[: 1 + int(rng.integers(2))]))
    return text


def _description(
    rng: np.random.Generator, sprites: Sprites, tags: dict[str, Any], config: SceneConfig
) -> str:
    style, draw = tags["style"], rng.random()
    adjective_style = style if tags["says_style"] and draw < 0.45 and len(tags["subjects"]) == 1 else ""
    size = _pick(rng, SIZES[tags["size"]]) if tags["size"] in SIZES else ""
    things = []
    for subject, colour in zip(tags["subjects"], tags["colours"], strict=True):
        synonyms = sprites.synonyms[subject]
        noun = _pick(rng, synonyms) if synonyms and rng.random() < config.synonym else subject
        things.append(noun_phrase(rng, noun, size, adjective_style, colour))
    text = things[0]
    if len(things) == 2:
        text = _pick(rng, PAIRINGS).format(*things)
    if len(things) == 1 and _chance(rng, config.aside):
        text = f"{text} {_pick(rng, DOING)} {_pick(rng, WHERE)}".rstrip()
    if tags["position"] in POSITIONS:
        text += " " + _pick(rng, POSITIONS[tags["position"]][1])
    background = tags["background"]
    if background != "white" or rng.random() < 0.04:
        ground = f"{'an' if background == 'orange' else 'a'} {background} background"
        text += " " + _pick(rng, (f"on {ground}", f"on {ground}", f"with {ground}", f"on {background}"))
    if tags["says_style"] and not adjective_style:
        of = f"a {style} {_pick(rng, MEDIA[style])} of {text}"
        return _pick(rng, (of, of, f"{text}, {style} style", f"{text} in {style} style"))
    if not tags["says_style"] and draw < 0.2 and len(things) == 1:
        return text.removeprefix("a ").removeprefix("an ")
    if not tags["says_style"] and draw < 0.4:
        return _pick(rng, ("a picture of ", "a picture of ", "an image of ", "an icon of ")) + text
    return text


# ---- banks of scenes --------------------------------------------------------------------------------------


def build_bank(
    n: int, seed: int, out: Path, sprites: Sprites | None = None, config: SceneConfig = SceneConfig()
) -> Path:
    """Composes n scenes, as out/images.npy, (n, 128, 128, 3) uint8, and out/scenes.json, captions and tags.

    Scene i depends only on (seed, i), so a longer bank begins with the scenes of a shorter one.
    """
    sprites = sprites or Sprites(*training_sprites())
    out.mkdir(parents=True, exist_ok=True)
    temporary = out / f".images.{os.getpid()}"
    images = np.lib.format.open_memmap(temporary, "w+", np.uint8, (n, SIDE, SIDE, 3))
    (out / "scenes.json").unlink(missing_ok=True)  # it is written last, so a bank with this file is whole
    scenes = []
    for i in range(n):
        scene = compose(np.random.default_rng([seed, i]), sprites, config)
        images[i] = scene.image
        scenes.append({"caption": scene.caption, **scene.tags})
    images.flush()
    os.replace(temporary, out / "images.npy")
    (out / "scenes.json").write_text(json.dumps(scenes))
    return out


def load_bank(folder: Path) -> tuple[np.ndarray, list[str]]:
    """Returns a bank's images, memory-mapped, and its captions."""
    scenes = json.loads((folder / "scenes.json").read_text())
    return np.load(folder / "images.npy", mmap_mode="r"), [scene["caption"] for scene in scenes]


def scene_sheet(scenes: list[Scene], columns: int = 8) -> Image.Image:
    """Draws a contact sheet: every scene above its caption."""
    cell, text = SIDE + 8, 36
    page = Image.new("RGB", (columns * cell, -(-len(scenes) // columns) * (cell + text)), "gainsboro")
    draw = ImageDraw.Draw(page)
    for i, scene in enumerate(scenes):
        x, y = i % columns * cell + 4, i // columns * (cell + text) + 4
        page.paste(Image.fromarray(scene.image), (x, y))
        draw.text((x, y + SIDE), "\n".join(textwrap.wrap(scene.caption, 22)), fill="black")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m reifusion.train.mini.scenes", description="Shows training scenes."
    )
    parser.add_argument("--sheet", type=Path, required=True, help="the PNG to write")
    parser.add_argument("--kind", choices=KINDS, help="only this kind")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    shares = {kind: float(kind == args.kind) for kind in KINDS} if args.kind else {}
    sprites, config = Sprites(*training_sprites()), SceneConfig(**shares)
    scenes = [compose(np.random.default_rng([args.seed, i]), sprites, config) for i in range(args.count)]
    scene_sheet(scenes).save(args.sheet)


if __name__ == "__main__":
    main()
