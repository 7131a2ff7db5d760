"""A tiny VAE in place of a model's own: a hundredth of the work, for previews and for slow machines.

It was distilled from the VAE that it stands in for, and there is one for each family. It has no mean and
variance, no norm and no attention; latents go in and come out scaled.
Source: Boer Bohan 2023, "Tiny AutoEncoder for Stable Diffusion", github.com/madebyollin/taesd.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..model.config import VAEConfig
from ..model.diffusers_folder import open_weights
from ..model.pipeline import StableDiffusion
from ..model.tensors import ModelError, Stored, TensorFile

FACTOR = 8  # pixels per latent, along each side


class Block(nn.Module):
    """ReLU(x + f(x)), f = three convolutions"""

    def __init__(self, width: int):
        super().__init__()
        convs = [nn.Conv2d(width, width, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)"""
        return F.relu(x + self.conv(x))


class TinyEncoder(nn.Module):
    """Picture -> latents."""

    def __init__(self, latent_channels: int, width: int = 64):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), Block(width)]
        for _ in range(3):
            layers.append(nn.Conv2d(width, width, 3, padding=1, stride=2, bias=False))
            layers += [Block(width) for _ in range(3)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, latent_channels, 3, padding=1))

    def forward(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """image (B, 3, H, W) in [-1, 1] -> scaled latents (B, 4, H/8, W/8); noise is of no use to it"""
        return self.layers((image + 1) / 2)


class TinyDecoder(nn.Module):
    """Latents -> picture."""

    def __init__(self, latent_channels: int, width: int = 64):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(latent_channels, width, 3, padding=1), nn.ReLU()]
        for _ in range(3):
            layers += [Block(width) for _ in range(3)]
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1, bias=False)]
        self.layers = nn.Sequential(*layers, Block(width), nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, 4, h, w) -> picture (B, 3, 8h, 8w), about [-1, 1] (not clamped)"""
        bounded = 3 * torch.tanh(latents / 3)  # a latent that is far out spoils no more than its place
        return 2 * self.layers(bounded) - 1


# A name in a file: diffusers's, or its author's, with "taesd_" and without "layers"; he counts `bounded` too.
NAME = re.compile(r"(?:taesd_)?(encoder|decoder)\.(layers\.)?(\d+)\.((?:conv\.\d+\.)?(?:weight|bias))")


def recognises(path: Path) -> bool:
    """True if a file, or a folder with a VAE of diffusers, holds both halves of a tiny VAE."""
    try:
        return {name.split(".")[0] for name in _tidy(_open(path))} == {"encoder", "decoder"}
    except ModelError:
        return False


class Sizes(NamedTuple):
    """What `info` says of a tiny VAE."""

    channels: int  # of the latents
    parameters: int

    @property
    def fits(self) -> str:
        """The models whose latents have as many channels."""
        return "Stable Diffusion 1.x, 2.x or XL" if self.channels == 4 else "Stable Diffusion 3"


def sizes(path: Path) -> Sizes | None:
    """Returns the sizes of a tiny VAE, read from the header alone; None for any other file."""
    if not recognises(path):
        return None
    stored = _open(path)
    names = _tidy(stored)
    shapes = {name: stored[theirs].shape for name, theirs in names.items()}
    first = shapes.get("decoder.layers.0.weight", ())
    return Sizes(first[1] if len(first) == 4 else 0, sum(shape.numel() for shape in shapes.values()))


def load(
    path: Path, config: VAEConfig, device: str | torch.device, dtype: torch.dtype | None
) -> dict[str, nn.Module]:
    """Loads the two halves, "encoder" and "decoder", for a model whose own VAE has that config.

    Raises ModelError for a tiny VAE of another family.
    """
    stored = _open(path)
    names = _tidy(stored)
    found = sizes(path)
    if found is None:
        raise ModelError(f"{path} is no tiny VAE, of which both halves are needed")
    channels = found.channels
    if (channels, config.factor) != (config.latent_channels, FACTOR):
        its = f"{channels} channels at an eighth of each side"
        ours = f"{config.latent_channels} at 1/{config.factor}"
        raise ModelError(f"{path} is a tiny VAE for latents of {its}, and the model has {ours}")
    with torch.device("meta"):
        models: dict[str, nn.Module] = {"encoder": TinyEncoder(channels), "decoder": TinyDecoder(channels)}
    for part, network in models.items():
        state = {}
        for name, x in network.state_dict().items():
            own = stored.get(names.get(f"{part}.{name}", ""))
            if own is None or own.shape != x.shape:
                raise ModelError(f"{path} is no tiny VAE that is known here: see its {part}.{name}")
            state[name] = own.read(device, dtype)
        network.load_state_dict(state, assign=True)
        network.eval()
    return models


def beside(pipe: StableDiffusion, path: Path) -> StableDiffusion:
    """Returns the model with a tiny VAE in its own one's place; the other networks are the same.

    Raises ModelError for a tiny VAE of another family, and for a file that is none.
    """
    tiny = load(path, pipe.config.vae, pipe.device, pipe.dtype)
    return replace(pipe, models=pipe.models | tiny)


def _open(path: Path) -> dict[str, Stored]:
    return open_weights(path) if path.is_dir() else TensorFile(path).tensors()


def _tidy(names: Collection[str]) -> dict[str, str]:
    """Returns the names in a file by those in our networks."""
    found = {}
    for name in names:
        if match := NAME.fullmatch(name):
            part, layers, place, rest = match.groups()
            own = int(place) - (part == "decoder" and layers is None)
            found[f"{part}.layers.{own}.{rest}"] = name
    return found
