"""Noise, drawn so that a seed is a picture on every device and in every place of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeAlias

import torch
from torch import Tensor


class Source(Protocol):
    """What a picture's noise is drawn from, if that is not a generator of torch's."""

    def randn(self, shape: Sequence[int]) -> Tensor:
        """The next standard normal noise of that shape: float32 on the CPU."""


Generators: TypeAlias = "torch.Generator | Source | Sequence[torch.Generator | Source] | None"


def randn(shape: Sequence[int], generator: Generators = None) -> Tensor:
    """Standard normal noise, float32 on the CPU, drawn image by image.

    shape: (B, …). generator: one CPU generator per image of the batch, or a single one that all images
    share in turn, or None for torch's own. With one per image, an image's noise depends neither on
    the device nor on its neighbours in the batch: a seed gives the same picture in any position.
    Raises ValueError if there are not as many generators as images.
    """
    count, *image = shape
    generators = generator if isinstance(generator, Sequence) else [generator] * count
    if len(generators) != count:
        raise ValueError(f"{count} images need {count} generators, one for each, not {len(generators)}")
    return torch.stack([_one(image, generator) for generator in generators])


def _one(image: Sequence[int], generator: torch.Generator | Source | None) -> Tensor:
    if generator is None or isinstance(generator, torch.Generator):
        return torch.randn(image, generator=generator, dtype=torch.float32)
    return generator.randn(image)


def bring(x: Tensor, device: torch.device | str) -> Tensor:
    """Returns x, which is on the CPU, on the device. A GPU fetches it while this program goes on."""
    if torch.device(device).type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)  # from memory that stays in its place until then
