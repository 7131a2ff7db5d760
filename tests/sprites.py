"""Made-up drawings in place of the real ones, so that tests need no network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import save_file
from torch import Tensor

from reifusion.train.mini.colours import NAMES
from reifusion.train.mini.hands import HANDS
from reifusion.train.mini.library import SIDE, Library, Sprite, library_path, to_webp, write_library
from reifusion.train.mini.render import sprite_pictures
from reifusion.train.mini.sprites import STYLES, sprites_path

NOUNS = ["cat", "grapes", "orange", "unicorn", "sun", "owl", "jeans", *(f"thing {i}" for i in range(60))]


def disc(rgb: tuple[int, int, int], eye: bool = False) -> np.ndarray:
    """Draws a softly shaded disc, with a white eye if `eye` is True -> (128, 128, 4) uint8."""
    y, x = np.mgrid[-1:1:128j, -1:1:128j]
    sprite = np.zeros((128, 128, 4), np.uint8)
    sprite[..., :3] = (np.array(rgb) * (0.9 + 0.1 * x[..., None])).astype(np.uint8)
    if eye:
        sprite[50:60, 50:60, :3] = 255
    sprite[..., 3] = 255 * (x**2 + y**2 < 0.75)
    return sprite


def prepared(folder: Path, nouns: Sequence[str] = NOUNS, eye: bool = False, brightest: int = 255) -> Path:
    """Fills the cache in `folder`: every noun in every style, each a disc of its own colour."""
    rng = np.random.default_rng(0)
    common = {"category": "test", "keywords": [], "emoji": "", "licence": "MIT"}
    pairs = [(noun, style) for noun in nouns for style in STYLES]
    records = [{"subject": n, "style": style, "synonyms": [f"{n} two"], **common} for n, style in pairs]
    pixels = np.stack([disc(tuple(rng.integers(40, brightest, 3)), eye) for _ in pairs])
    folder.mkdir(exist_ok=True)
    save_file({"pictures": pixels}, sprites_path(folder), metadata={"pictures": json.dumps(records)})
    return folder


def made_up(nouns: Sequence[str] = NOUNS, side: int = 64) -> Library:
    """A library without packages: every noun by every hand, each a disc of its own colour."""
    rng = np.random.default_rng(0)
    sprites, pixels = [], []
    for noun in nouns:
        for name, hand in HANDS.items():
            sprites.append(
                Sprite(
                    noun,
                    hand.look,
                    name,
                    "test",
                    (f"{noun} two",),
                    (),
                    "",
                    "MIT",
                    "",
                    True,
                    True,
                    NAMES,
                    SIDE * 15 // 16,
                )
            )
            pixels.append(ball(rng.uniform(0.2, 0.8, 3).tolist(), side))
    return Library(sprites, torch.stack(pixels))


def ball(rgb: Sequence[float], side: int = 64) -> Tensor:
    """Draws a softly shaded disc as large as sprites are -> (4, side, side) uint8."""
    x = torch.linspace(-1, 1, side)
    colour = torch.tensor(rgb)[:, None, None] * (0.9 + 0.1 * x).expand(side, side)
    inside = (x[:, None] ** 2 + x**2 < 0.875**2).float()
    return (torch.cat([colour, inside[None]]) * 255).round().byte()


def prepared_library(folder: Path, nouns: Sequence[str] = NOUNS[:7]) -> Path:
    """Fills the cache in `folder` with a made-up library, so that nothing is fetched."""
    library = made_up(nouns, SIDE)
    pictures = [to_webp(Image.fromarray(x.permute(1, 2, 0).numpy())) for x in library.pixels]
    write_library(list(zip(library.sprites, pictures, strict=True)), library_path(folder))
    return folder


def random_sprites(sprites: Tensor, generator: torch.Generator, count: int, size: int) -> Tensor:
    """Random pictures (count, 3, size, size) of these sprites (N, 4, S, S) uint8, as a VAE is trained on."""
    chosen = torch.randint(len(sprites), (count,), generator=generator)
    return sprite_pictures(sprites[chosen], generator, size)
