"""What a step minimises: an objective, the part of a batch that it is asked for, and its random numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .checkpoint import TrainingError


@dataclass(frozen=True)
class BatchPart:
    """The share of a step's batch that is computed in one go: part `index` of `count`, on a device."""

    index: int = 0
    count: int = 1
    device: torch.device | str = "cpu"

    def of(self, batch: Tensor) -> Tensor:
        """(B, …) -> (B / count, …): every count-th sample, so that no part gets all the low timesteps."""
        if len(batch) % self.count:
            raise TrainingError(
                f"a batch of {len(batch)} cannot be cut into {self.count} equal parts"
                " (processes times `accumulate`); choose another batch"
            )
        return batch[self.index :: self.count].to(self.device)


# The mean loss of a part's samples, and figures for the log; the figure "samples" is their number.
Loss: TypeAlias = tuple[Tensor, Mapping[str, float | Tensor]]

# objective(network, done, rng(seed, step), part) -> loss. `network` takes the model's arguments; it may be
# distributed. done: the share of the training that lies behind, from 0 to 1.
Objective: TypeAlias = Callable[[Callable[..., Any], float, torch.Generator, BatchPart], Loss]


@dataclass(frozen=True)
class Drawn:
    """An objective in two halves: all that is random is drawn first, and the loss only computes.

    draw(done, generator, part) -> the batch: tensors on the part's device, and settings of the loss, such as
    a bool. What differs from step to step has to be a tensor. loss(network, *batch) -> loss.
    """

    draw: Callable[[float, torch.Generator, BatchPart], tuple[Any, ...]]
    loss: Callable[..., Loss]

    def __call__(
        self, network: Callable[..., Any], done: float, generator: torch.Generator, part: BatchPart
    ) -> Loss:
        return self.loss(network, *self.draw(done, generator, part))


def rng(seed: int, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Returns the generator of one step's random numbers, which are drawn on the device."""
    return torch.Generator(device).manual_seed((seed * 1_000_003 + step) % 2**63)


def seed_layers(seed: int, step: int, part: BatchPart) -> None:
    """Seeds torch's own generator, from which layers such as dropout draw."""
    torch.manual_seed(rng(seed + 1 + part.index, step).initial_seed())


def has_dropout(model: nn.Module) -> bool:
    """True if some layers draw from torch's own generator."""
    return any(isinstance(layer, nn.Dropout) and layer.p > 0 for layer in model.modules())


def normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Draws standard normal numbers on the generator's device."""
    return torch.randn(shape, generator=generator, device=generator.device)
