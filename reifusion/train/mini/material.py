"""The mini's own data: sprites on random backgrounds for its VAE, and captioned scenes for its U-Net."""

from __future__ import annotations

import hashlib
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ...model.clip import Tokenizer
from ..checkpoint import save_atomically
from ..latents import weights_hash
from ..text2image import Latents
from ..vae import VAE, PixelBatch
from .scenes import build_bank, load_bank
from .sprites import training_sprites

# ---- for the VAE ------------------------------------------------------------------------------------------


def random_pixels() -> PixelBatch:
    """Returns random pictures of the sprites. Raises DataError if they cannot be fetched."""
    sprites = torch.from_numpy(training_sprites()[0]).permute(0, 3, 1, 2).contiguous()  # (N, 4, 128, 128)
    return partial(random_pictures, sprites)


def random_pictures(sprites: Tensor, generator: torch.Generator, count: int, size: int) -> Tensor:
    """Sprites (N, 4, S, S) uint8 -> pictures (count, 3, size, size) in [-1, 1], on random backgrounds.

    Half are crops at full resolution, and half are whole sprites made smaller; if size is S, all are whole.
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    chosen = sprites[torch.randint(len(sprites), (count,), generator=generator)].float() / 255  # (B, 4, S, S)
    side = sprites.shape[-1]
    # One affine map for each picture: zoom, position, mirror.
    zoom = torch.where(uniform(count) < 0.5, torch.full((count,), size / side), 0.8 + 0.5 * uniform(count))
    zoom = torch.where(uniform(count) < 0.2, 2 * zoom, zoom) if size == side else zoom
    room = (1 - zoom).clamp(min=0.15)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = torch.where(uniform(count) < 0.5, zoom, -zoom)
    theta[:, 1, 1] = zoom
    theta[:, :, 2] = (2 * uniform(count, 2) - 1) * room[:, None]
    grid = F.affine_grid(theta, [count, 4, size, size], align_corners=False)
    chosen[:, :3] *= chosen[:, 3:]  # premultiplied, so that no dark rim appears at soft edges
    chosen = F.grid_sample(chosen, grid, mode="bilinear", align_corners=False)  # (B, 4, size, size)
    colour, alpha = chosen[:, :3], chosen[:, 3:]
    # A third get their colour channels shuffled: dyed subjects must survive the round trip as well.
    order = torch.stack([torch.randperm(3, generator=generator) for _ in range(count)])
    order = torch.where(uniform(count, 1) < 0.33, order, torch.arange(3))
    colour = torch.gather(colour, 1, order[:, :, None, None].expand_as(colour))
    background = torch.where(
        uniform(count, 1, 1, 1) < 0.5, torch.ones(count, 3, 1, 1), uniform(count, 3, 1, 1)
    )
    return (colour + (1 - alpha) * background) * 2 - 1


# ---- for the U-Net and the text encoder -------------------------------------------------------------------


def scenes(count: int, folder: Path) -> tuple[np.ndarray, list[str]]:
    """Returns pictures (N, 128, 128, 3) uint8 and their captions, which are composed once."""
    if (folder / "scenes.json").exists():
        images, captions = load_bank(folder)
        if len(captions) >= count:  # a longer bank begins with the scenes of a shorter one
            return images[:count], captions[:count]
        shutil.rmtree(folder)
    build_bank(count, seed=1, out=folder)
    return load_bank(folder)


@torch.inference_mode()
def encode(vae: VAE, images: np.ndarray, path: Path) -> Tensor:
    """Scenes (N, 128, 128, 3) uint8 -> latents (N, 4, 16, 16) bf16, kept in the file `path`."""
    # The file also says what the latents were made of, so that those of another VAE are not taken for them.
    of = hashlib.blake2b(weights_hash(vae.encoder).encode(), digest_size=8)
    for start in range(0, len(images), 1024):
        of.update(images[start : start + 1024].tobytes())
    made_of = of.hexdigest()
    kept = torch.load(path, weights_only=True) if path.exists() else None
    if isinstance(kept, dict) and kept.get("made_of") == made_of:
        return kept["latents"]
    latents = []
    for start in tqdm(range(0, len(images), 64), desc="encoding", unit="64 scenes"):
        x = torch.from_numpy(images[start : start + 64].copy()).permute(0, 3, 1, 2)  # (64, 3, 128, 128)
        with torch.autocast("cpu", torch.bfloat16):
            latents.append(vae.encoder(x.float() / 127.5 - 1).bfloat16())
    save_atomically({"made_of": made_of, "latents": torch.cat(latents)}, path)
    return torch.load(path, weights_only=True)["latents"]


def latents(means: Tensor, captions: list[str], tokenizer: Tokenizer) -> Latents:
    """Joins the scenes' latents and their captions."""
    return Latents(means, torch.tensor([tokenizer.encode(caption) for caption in captions]))
