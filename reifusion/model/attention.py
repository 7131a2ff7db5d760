"""Attention: every token looks at every other token, or at the words (Vaswani et al. 2017).

Two forms of the same equation stand side by side. `softmax_attention` is the one to read and to record;
`attention` is PyTorch's fused kernel, which never stores the L × S weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.nn import functional as F

# Called with the attention weights (B, heads, L, S) of a layer by the layers that have such a hook.
Hook = Callable[[Tensor], None]
# The one slot for a faster kernel: takes what `attention` takes and returns the same numbers.
Kernel = Callable[[Tensor, Tensor, Tensor, bool], Tensor]


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> tuple[Tensor, Tensor]:
    """Written out. q (B, h, L, d), k, v (B, h, S, d) -> (B, h, L, d) and the weights (B, h, L, S)."""
    # [attention] Eq. 1, Vaswani et al. 2017: Attention(Q, K, V) = softmax(Q Kᵀ / √d_k) V
    scores = (q @ k.transpose(-2, -1)) / math.sqrt(q.shape[-1])  # (B, h, L, S)
    if causal:  # token i sees tokens 0 … i only
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        # [causal-mask] §3.2.3, Vaswani et al. 2017: a token that must not be seen scores -∞
        scores = scores.masked_fill(future, -math.inf)
    exact = torch.promote_types(scores.dtype, torch.float32)  # bf16 has 8 bits
    weights = scores.to(exact).softmax(dim=-1).to(v.dtype)
    return weights @ v, weights


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """The same, without ever storing the weights. q (B, h, L, d), k and v (B, h, S, d) -> (B, h, L, d)."""
    inputs = (q, k, v)
    # On a CPU the fused kernel has no second derivative, and for few tokens its first is slow. Nowhere has it
    # a derivative in forward mode.
    slow = q.device.type == "cpu" and any(x.requires_grad for x in inputs)
    if slow or any(unpack_dual(x).tangent is not None for x in inputs):
        return softmax_attention(q, k, v, causal)[0]
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, L, h·d) -> (B, h, L, d)"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, h, L, d) -> (B, L, h·d)"""
    return x.transpose(1, 2).flatten(-2)


class SelfAttention(nn.Module):
    """Tokens (pixels, words) attend to tokens of the same sequence."""

    def __init__(self, heads: int, width: int, bias: bool = True):
        super().__init__()
        self.heads = heads
        self.hook: Hook | None = None
        self.kernel: Kernel = attention
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        """x (B, L, width) -> (B, L, width). causal: no token sees a later token."""
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        if self.hook is not None:  # beside the fused path, so that recording changes nothing
            self.hook(softmax_attention(q, k, v, causal)[1])
        return self.out(merge_heads(self.kernel(q, k, v, causal)))


class CrossAttention(nn.Module):
    """Pixels (x) attend to words (y): the place where the prompt enters the picture."""

    def __init__(self, heads: int, width: int, context_width: int, bias: bool = False):
        super().__init__()
        self.heads = heads
        self.hook: Hook | None = None
        self.kernel: Kernel = attention
        self.q = nn.Linear(width, width, bias=bias)
        self.kv = nn.Linear(context_width, 2 * width, bias=bias)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x (B, L, width), y (B, S, context_width) -> (B, L, width)."""
        q = split_heads(self.q(x), self.heads)
        k, v = (split_heads(part, self.heads) for part in self.kv(y).chunk(2, dim=-1))
        if self.hook is not None:
            self.hook(softmax_attention(q, k, v)[1])
        # [multi-head] §3.2.2, Vaswani et al. 2017: MultiHead(Q, K, V) = [h₁; …; hₙ] W
        return self.out(merge_heads(self.kernel(q, k, v, False)))
