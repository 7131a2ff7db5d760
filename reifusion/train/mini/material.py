"""The mini's own data: random pictures for its VAE, and captioned scenes, encoded once, for its U-Net.

Everything happens on the device that trains: sprites lie there, scenes are rendered there from their
specifications, and latents stay there.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ...bar import Bar
from ...files import whole
from ...model.encoder import Encoder
from ...model.tokenizer import Tokenizer
from ...weights.writing import write_tensors
from ..latents import weights_hash
from ..text2image import Latents
from ..vae import PixelBatch
from .compose import Specs, compose_bank, training_sprites
from .library import Library, read_library
from .render import random_pictures, render

SHARD = 1000  # scenes in a file of latents: no more than these are encoded again after a kill
SEED = 1  # of the scenes
FOR_THE_VAE = 4_000  # scenes, drawn once: it sees parts of them, and sprites on any colour


@dataclass(frozen=True)
class Bank:
    """Captioned scenes, not yet drawn."""

    library: Library
    specs: Specs
    captions: list[str]

    def __len__(self) -> int:
        return len(self.captions)

    def first(self, count: int) -> Bank:
        """Returns the first scenes alone."""
        return Bank(self.library, self.specs[:count], self.captions[:count])

    def digest(self) -> str:
        """Returns what tells this bank from others, for `made_of`."""
        return f"#{hashlib.blake2b(repr(self.captions).encode(), digest_size=8).hexdigest()}"


def bank(count: int) -> Bank:
    """Composes the first scenes. A longer bank begins with the scenes of a shorter one.

    Raises DataError if the drawings cannot be fetched.
    """
    library = read_library()
    return Bank(library, *compose_bank(library, SEED, count))


def random_pixels(device: torch.device | str = "cpu") -> PixelBatch:
    """Returns a function that draws random pictures for a VAE, on the device. Raises DataError."""
    library = read_library()
    specs, _ = compose_bank(library, SEED, FOR_THE_VAE)
    specs, pixels = specs.to(device), library.pixels.to(device)
    some = at_once(device)
    starts = range(0, FOR_THE_VAE, some)
    scenes = torch.cat([levels(render(pixels, specs[first : first + some])) for first in starts])
    return partial(random_pictures, scenes, pixels[training_sprites(library.sprites)])


def at_once(device: torch.device | str) -> int:
    """Returns how many scenes to draw at a time: on a GPU many, as 10 take as long as 100 (500: 4 GB)."""
    return 50 if torch.device(device).type == "cpu" else 500


def levels(x: Tensor) -> Tensor:
    """Pictures in [-1, 1] -> their 256 levels, uint8"""
    return ((x + 1) * 127.5).round().byte()


@torch.inference_mode()
def encode(
    encoder: Encoder,
    scenes: Bank,
    folder: Path | None = None,
    device: torch.device | str = "cpu",
    seconds: float | None = None,
) -> Tensor:
    """Draws the scenes and encodes them: latents (N, 4, h, w) in bfloat16, on the device.

    folder: keeps them in files, so that a run that was killed goes on from there; None: keeps no files.
    seconds: encodes only as many thousands as that time allows, but one at least; None: encodes all.
    """
    begun, device = time.monotonic(), torch.device(device)
    batch = 50 if device.type == "cpu" else 250  # to encode
    some = at_once(device)
    encoder = encoder.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    pixels, of = scenes.library.pixels.to(device), weights_hash(encoder)
    shards: list[Tensor] = []
    for start in Bar(range(0, len(scenes), SHARD), desc="encoding", unit="thousand scenes"):
        if shards and seconds is not None and time.monotonic() - begun > seconds:
            break
        specs = scenes.specs[start : start + SHARD]
        path = None if folder is None else folder / f"{_digest(of, pixels.shape, specs)}.safetensors"
        if path is not None and path.exists():
            shards.append(load_file(path)["latents"].to(device))
            continue
        parts = []
        for first in range(0, len(specs), some):
            pictures = render(pixels, specs[first : first + some].to(device))  # (some, 3, S, S)
            for x in pictures.split(batch):
                with torch.autocast(device.type, torch.bfloat16):
                    parts.append(encoder(x.contiguous(memory_format=torch.channels_last)).bfloat16())
        shards.append(torch.cat(parts).contiguous())
        if path is not None:
            with whole(path) as temporary:
                write_tensors({"latents": shards[-1].cpu()}, temporary)
    return torch.cat(shards).clone()


def _digest(of: str, shape: torch.Size, specs: Specs) -> str:
    """Returns a hash of all that decides some latents: the encoder, the sprites and the scenes."""
    found = hashlib.blake2b(f"{of} {tuple(shape)}".encode(), digest_size=8)
    for field in fields(specs):
        found.update(getattr(specs, field.name).contiguous().numpy().tobytes())
    return found.hexdigest()


def latents(means: Tensor, captions: list[str], tokenizer: Tokenizer) -> Latents:
    """Joins the latents of the first scenes and their captions, on the latents' device."""
    tokens = torch.tensor([tokenizer.encode(caption) for caption in captions[: len(means)]])
    return Latents(means, tokens.to(means.device))
