"""Renders scenes from their specifications, in batches, on any device: what the mini learns from.

`python -m reifusion.train.mini.render --sheet scenes.png` shows some.
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from . import places
from .colours import dye, from_oklab
from .compose import KINDS, Specs, compose_scenes
from .library import read_library
from .styles import STYLES, premultiply


@torch.no_grad()
def render(pixels: Tensor, specs: Specs) -> Tensor:
    """Renders N scenes from a library's pixels (M, 4, S, S) uint8 -> (N, 3, S, S) in [-1, 1]."""
    side = pixels.shape[-1]
    canvas = from_oklab(specs.ground)[:, :, None, None].repeat(1, 1, side, side)
    outside = (specs.place >= 0).nonzero()[:, 0]
    if len(outside):
        canvas[outside] = places.draw(specs.place[outside], specs.seed[outside], side)
    for k in (0, 1):
        here = (specs.sprite[:, k] >= 0).nonzero()[:, 0]
        if not len(here):
            continue
        these = specs if len(here) == len(specs) else specs[here]
        sprites = _prepare(pixels, these, k)  # (N', 4, S, S), premultiplied
        sprites = place(sprites, these.scale[:, k], these.shift[:, k], these.mirror[:, k])
        if k == 0 and len(outside):
            canvas[outside] *= 1 - 0.3 * _shadow(sprites[outside, 3:], specs[outside])
        canvas[here] = canvas[here] * (1 - sprites[:, 3:]) + sprites[:, :3]
    return canvas.mul_(2).sub_(1).clamp_(-1, 1)


def _prepare(pixels: Tensor, specs: Specs, k: int) -> Tensor:
    """The k-th sprites of the scenes, dyed and in their styles."""
    sprites = pixels[specs.sprite[:, k]].float() / 255
    dyed = (specs.dye[:, k] >= 0).nonzero()[:, 0]
    if len(dyed):
        sprites[dyed] = dye(sprites[dyed], specs.dye[dyed, k])
    for i, draw in enumerate(STYLES.values()):
        styled = (specs.style == i).nonzero()[:, 0]
        if k == 0 and len(styled):
            sprites[styled] = draw(sprites[styled])
    return premultiply(sprites)


def place(sprites: Tensor, scale: Tensor, shift: Tensor, mirror: Tensor) -> Tensor:
    """Mirrors, scales and moves premultiplied sprites (N, 4, S, S). shift (N, 2): right, down, in sides."""
    sprites = torch.where(mirror[:, None, None, None], sprites.flip(-1), sprites)
    moved = ((scale != 1) | (shift != 0).any(1)).nonzero()[:, 0]
    if not len(moved):
        return sprites
    scale, shift, source = scale[moved], shift[moved], sprites[moved]
    theta = torch.zeros(len(moved), 2, 3, device=sprites.device)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 / scale
    theta[:, :, 2] = -2 * shift / scale[:, None]
    grid = F.affine_grid(theta, list(source.shape), align_corners=False)
    out = torch.empty_like(source)
    for shrunk in (
        False,
        True,
    ):  # a small one is read from a smaller picture, or pixels in between would be lost
        which = ((scale < 0.7) == shrunk).nonzero()[:, 0]
        if len(which):
            picture = F.avg_pool2d(source[which], 2) if shrunk else source[which]
            out[which] = F.grid_sample(picture, grid[which], align_corners=False)
    sprites[moved] = out
    return sprites


def _shadow(alpha: Tensor, specs: Specs, flat: float = 0.09) -> Tensor:
    """The shadow of what stands on the ground: its shape (N, 1, S, S), pressed flat around its foot."""
    foot, middle = 2 * specs.foot - 1, 2 * specs.shift[:, 0, 1]
    theta = torch.zeros(len(alpha), 2, 3, device=alpha.device)
    theta[:, 0, 0], theta[:, 1, 1] = 1, 1 / flat
    theta[:, 1, 2] = middle - foot / flat
    grid = F.affine_grid(theta, list(alpha.shape), align_corners=False)
    reach = alpha.shape[-1] // 128
    return F.avg_pool2d(
        F.grid_sample(F.avg_pool2d(alpha, 4), grid, align_corners=False), 2 * reach + 1, 1, reach
    )


def random_pictures(
    scenes: Tensor, sprites: Tensor, generator: torch.Generator, count: int, size: int
) -> Tensor:
    """Random pictures (count, 3, size, size) in [-1, 1] for the VAE: half parts of scenes, half sprites.

    scenes: rendered (N, 3, S, S) uint8. sprites: (M, 4, S, S) uint8. All are on one device.
    """
    device = scenes.device

    def chosen(of: Tensor, count: int) -> Tensor:
        return torch.randint(len(of), (count,), generator=generator, device=device)

    these, room = chosen(scenes, count // 2), scenes.shape[-1] - size + 1
    corner = torch.randint(room, (len(these), 2, 1), generator=generator, device=device)
    rows, columns = (corner + torch.arange(size, device=device)).unbind(1)  # (N, size) each
    parts = scenes.permute(0, 2, 3, 1)[these[:, None, None], rows[:, :, None], columns[:, None, :]]
    parts = parts.permute(0, 3, 1, 2).float() / 127.5 - 1
    return torch.cat([parts, sprite_pictures(sprites[chosen(sprites, count - len(these))], generator, size)])


def sprite_pictures(sprites: Tensor, generator: torch.Generator, size: int) -> Tensor:
    """Sprites (N, 4, S, S) uint8 -> pictures (N, 3, size, size) in [-1, 1], of parts or of all."""
    count, side, device = len(sprites), sprites.shape[-1], sprites.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    # One affine map for each picture: zoom, position, mirror.
    zoom = torch.where(uniform(count) < 0.6, size / side, 0.8 + 0.5 * uniform(count))
    theta = torch.zeros(count, 2, 3, device=device)
    theta[:, 0, 0] = torch.where(uniform(count) < 0.5, zoom, -zoom)
    theta[:, 1, 1] = zoom
    theta[:, :, 2] = (2 * uniform(count, 2) - 1) * (1 - zoom).clamp(min=0.15)[:, None]
    grid = F.affine_grid(theta, [count, 4, size, size], align_corners=False)
    x = premultiply(sprites.float() / 255)
    near = F.grid_sample(x, grid, align_corners=False)
    far = F.grid_sample(F.avg_pool2d(x, 2), grid, align_corners=False)
    x = torch.where((zoom * side > 1.5 * size)[:, None, None, None], far, near)
    # A third get their colour channels shuffled: dyed subjects must survive the round trip as well.
    order = torch.where(
        uniform(count, 1) < 0.33, uniform(count, 3).argsort(1), torch.arange(3, device=device)
    )
    colour = torch.gather(x[:, :3], 1, order[:, :, None, None].expand(-1, -1, size, size))
    ground = torch.where(uniform(count, 1, 1, 1) < 0.5, 1.0, uniform(count, 3, 1, 1))
    return (colour + (1 - x[:, 3:]) * ground) * 2 - 1


# ---- to look at -------------------------------------------------------------------------------------------


def scene_sheet(pictures: Tensor, captions: list[str], columns: int = 8, cell: int = 192) -> Image.Image:
    """Draws a contact sheet: pictures (N, 3, S, S) in [-1, 1], each above its caption."""
    width, height = cell + 8, cell + 36
    page = Image.new("RGB", (columns * width, -(-len(captions) // columns) * height), "gainsboro")
    draw = ImageDraw.Draw(page)
    for i, text in enumerate(captions):
        x, y = i % columns * width + 4, i // columns * height + 4
        picture = ((pictures[i].permute(1, 2, 0) + 1) * 127.5).round().byte().cpu().numpy()
        page.paste(Image.fromarray(picture).resize((cell, cell), Image.Resampling.LANCZOS), (x, y))
        draw.text((x, y + cell), "\n".join(textwrap.wrap(text, cell // 6)), fill="black")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m reifusion.train.mini.render", description="Shows training scenes."
    )
    parser.add_argument("--sheet", type=Path, required=True, help="the PNG to write")
    parser.add_argument("--kind", choices=KINDS, help="only this kind")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    library = read_library()
    specs, scenes = compose_scenes(library.sprites, args.seed, range(args.count), args.kind)
    scene_sheet(render(library.pixels, specs), [scene.caption for scene in scenes]).save(args.sheet)


if __name__ == "__main__":
    main()
