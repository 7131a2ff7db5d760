"""Made-up drawings in place of the real ones, so that tests need no network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from reifusion.train.mini.colours import stands_out
from reifusion.train.mini.hands import HANDS
from reifusion.train.mini.library import SIDE, Library, Sprite, library_path, to_webp, write_library
from reifusion.train.mini.render import sprite_pictures

NOUNS = ["cat", "grapes", "orange", "unicorn", "sun", "owl", "jeans", *(f"thing {i}" for i in range(60))]


def made_up(nouns: Sequence[str] = NOUNS, side: int = 64, alike: bool = False) -> Library:
    """A library without packages: every noun by every hand, each a disc of its own colour.

    alike: the discs of one noun have nearly one colour.
    """
    rng = np.random.default_rng(0)
    apart = rng.permutation(list(product(*[np.linspace(0.2, 0.8, 5)] * 3)))  # colours that are told apart
    sprites, pixels = [], []
    for noun, colour in zip(nouns, apart, strict=False):
        for k, (name, hand) in enumerate(HANDS.items()):
            disc = ball((colour + 0.003 * k if alike else rng.uniform(0.2, 0.8, 3)).tolist(), side)
            record = Sprite(noun, hand.look, name, "test", (f"{noun} two",))
            sprites.append(replace(record, stands_out=stands_out(disc / 255), foot=SIDE * 15 // 16))
            pixels.append(disc)
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
