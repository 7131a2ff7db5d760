"""A few drawings made with Pillow, which stand in for the npm packages that the mini is trained on."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw

from reifusion.train.mini.colours import COLOURS
from reifusion.train.mini.library import SIDE, Library, Sprite


def library() -> Library:
    pixels, sprites = [], []
    for name, draw in {"sun": _sun, "house": _house, "fish": _fish, "tree": _tree}.items():
        large = Image.new("RGBA", (512, 512))  # drawn large, so that edges come out smooth
        draw(ImageDraw.Draw(large))
        picture = large.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        pixels.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
        foot = picture.getchannel("A").getbbox()[3]
        sprites.append(
            Sprite(
                subject=name,
                look="flat",
                hand="made here",
                category="",
                synonyms=(),
                keywords=(),
                caption="",
                licence="MIT",
                creator="",
                dyeable=True,
                mirrors=True,
                stands_out=tuple(COLOURS),
                foot=foot,
            )
        )
    return Library(sprites, torch.stack(pixels))


def _sun(d: ImageDraw.ImageDraw) -> None:
    for k in range(12):
        x, y = 256 + 220 * np.cos(k * np.pi / 6), 256 + 220 * np.sin(k * np.pi / 6)
        d.line([(256, 256), (x, y)], (255, 190, 40), 18)
    d.ellipse([116, 116, 396, 396], (255, 214, 60))


def _house(d: ImageDraw.ImageDraw) -> None:
    d.rectangle([96, 236, 416, 456], (236, 214, 180))
    d.polygon([(56, 246), (256, 66), (456, 246)], (196, 72, 60))
    d.rectangle([216, 336, 296, 456], (120, 84, 60))


def _fish(d: ImageDraw.ImageDraw) -> None:
    d.polygon([(336, 256), (476, 156), (476, 356)], (60, 120, 220))
    d.ellipse([46, 136, 386, 376], (80, 150, 240))
    d.ellipse([116, 206, 156, 246], "white")
    d.ellipse([128, 216, 148, 236], "black")


def _tree(d: ImageDraw.ImageDraw) -> None:
    d.rectangle([226, 316, 286, 476], (130, 90, 60))
    d.ellipse([96, 46, 416, 366], (70, 160, 80))
