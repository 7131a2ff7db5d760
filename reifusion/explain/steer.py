"""Changes one thing in the model for a while: the words that the U-Net reads, a layer, a head, attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from ..model.attention import CrossAttention, Kernel, SelfAttention, split_heads
from ..model.pipeline import StableDiffusion
from ..swap import swap


def rewritten(pipe: StableDiffusion, edit: Callable[[Tensor], Tensor]) -> StableDiffusion:
    """Returns the same networks with `edit` between text encoder and U-Net: (B, S, width) -> the same shape.

    With guidance, the prompt comes first in the batch and the negative prompt second.
    """
    kind: type[Any] = type(pipe)  # of whatever family

    class Rewritten(kind):
        """A model whose U-Net reads edited vectors, not those that the text encoder wrote."""

        def encode_text(self, prompts: Sequence[str], clip_skip: int = 0, *, grad: bool = False) -> Tensor:
            return edit(super().encode_text(prompts, clip_skip, grad=grad))

    return Rewritten(**{part.name: getattr(pipe, part.name) for part in fields(pipe) if part.init})


class Silent(CrossAttention):
    """Cross-attention that adds nothing to the picture."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x (B, L, width), y (B, S, context_width) -> (B, L, width), all 0"""
        return torch.zeros_like(x)


class WithoutHead(CrossAttention):
    """Cross-attention in which one head adds nothing."""

    silent: int  # which head

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x (B, L, width), y (B, S, context_width) -> (B, L, width)"""
        q = split_heads(self.q(x), self.heads)
        k, v = (split_heads(part, self.heads) for part in self.kv(y).chunk(2, dim=-1))
        heads = list(self.kernel(q, k, v, False).unbind(1))  # each (B, L, d)
        heads[self.silent] = torch.zeros_like(heads[self.silent])
        return self.out(torch.cat(heads, dim=-1))


@contextmanager
def swapped(module: nn.Module, by: type[nn.Module], **state: Any) -> Iterator[None]:
    """Makes a module behave as a `by` while the `with` lasts; see `swap`."""
    put_back = swap(module, by, **state)
    try:
        yield
    finally:
        put_back()


@contextmanager
def muted(layer: CrossAttention, head: int | None = None) -> Iterator[None]:
    """Mutes one head of a layer while the `with` lasts; None: all heads."""
    with swapped(layer, Silent) if head is None else swapped(layer, WithoutHead, silent=head):
        yield


@contextmanager
def attending(layers: Sequence[SelfAttention | CrossAttention], kernel: Kernel) -> Iterator[None]:
    """Has attention layers compute by another kernel, which takes what `attention` takes, in the `with`."""
    before = [layer.kernel for layer in layers]
    for layer in layers:
        layer.kernel = kernel
    try:
        yield
    finally:
        for layer, own in zip(layers, before):
            layer.kernel = own


@contextmanager
def watching(layers: Sequence[SelfAttention | CrossAttention]) -> Iterator[list[Tensor]]:
    """Yields a list to which each call of a layer adds its attention weights, (B, heads, L, S)."""
    before = [layer.hook for layer in layers]
    seen: list[Tensor] = []
    for layer in layers:
        layer.hook = seen.append
    try:
        yield seen
    finally:
        for layer, own in zip(layers, before):
            layer.hook = own
