"""Changing one thing inside the model, and putting it back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields

from torch import Tensor

from ..model.attention import CrossAttention
from ..model.pipeline import StableDiffusion


@dataclass
class Rewritten(StableDiffusion):
    """A model whose U-Net reads other vectors than those of the text encoder."""

    edit: Callable[[Tensor], Tensor] = lambda context: context

    def encode_text(self, prompts: Sequence[str], clip_skip: int = 0) -> Tensor:
        return self.edit(super().encode_text(prompts, clip_skip))


def rewritten(pipe: StableDiffusion, edit: Callable[[Tensor], Tensor]) -> StableDiffusion:
    """Returns the same networks with `edit` between text encoder and U-Net: (B, S, width) -> the same shape.

    With guidance the prompt comes first in the batch, and the negative prompt after it.
    """
    return Rewritten(**{part.name: getattr(pipe, part.name) for part in fields(pipe) if part.init}, edit=edit)


@contextmanager
def muted(layer: CrossAttention, head: int | None = None) -> Iterator[None]:
    """Silences one head of the layer (None: all heads) until the block ends, and then restores the layer."""
    weight, bias = layer.out.weight.data, layer.out.bias.data
    kept = weight.clone(), bias.clone()
    width = weight.shape[1] // layer.heads
    try:
        if head is None:
            weight.zero_()
            bias.zero_()
        else:  # the output is a sum over heads, each with its own columns of this matrix
            weight[:, head * width : (head + 1) * width] = 0
        yield
    finally:
        weight.copy_(kept[0])
        bias.copy_(kept[1])
