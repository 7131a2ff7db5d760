"""Attention for networks that are trained on a CPU, without ever storing the L × S weights or their slopes.

In bfloat16 it is `attention.c`, where the CPU has the instructions for it. PyTorch's own fused kernel is
faster than the written-out form only where there are many weights. Neither has a second derivative, which
training does not need. bench/NOTES.md has what each buys.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..model import attention as textbook
from . import native

MANY = 128  # keys from which on `attention.c` is faster than the written-out form
LONG = 256 * 256  # queries × keys from which on PyTorch's fused kernel is


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """`model.attention.attention` by the fastest of three ways, for the slot of an attention layer."""
    learning = any(x.requires_grad for x in (q, k, v))
    if q.device.type != "cpu" or causal or not learning or torch.compiler.is_compiling():
        return textbook.attention(q, k, v, causal)
    if k.shape[-2] >= MANY and native.applies(q, k, v):
        return Fused.apply(q, k, v)
    if q.shape[-2] * k.shape[-2] >= LONG:
        return F.scaled_dot_product_attention(q, k, v)
    return textbook.attention(q, k, v)


class Fused(torch.autograd.Function):
    """`attention.c`, with the gradients that it computes itself."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, h, L, d), k and v (B, h, S, d) -> (B, h, L, d), bfloat16"""
        log_sums = q.new_empty(q.shape[:3], dtype=torch.float32)
        out = native.flash_attention(q, k, v, log_sums)
        assert out is not None  # `native.applies` has said so
        ctx.save_for_backward(q, k, v, out, log_sums)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient of the result -> those of q, k and v"""
        q, k, v, out, log_sums = ctx.saved_tensors
        return native.gradients(q, k, v, out, log_sums, grad)


@contextmanager
def in_training(network: nn.Module) -> Iterator[None]:
    """Gives attention layers this kernel while the `with` lasts; those that were given another keep it."""
    from . import ATTENTION

    ours = (textbook.attention, native.attention)
    before = [(x, x.kernel) for x in network.modules() if isinstance(x, ATTENTION) and x.kernel in ours]
    for layer, _ in before:
        layer.kernel = attention
    try:
        yield
    finally:
        for layer, kernel in before:
            layer.kernel = kernel
