"""T5: an encoder of long texts, which Stable Diffusion 3 has beside its two CLIPs.

All words see all others, later ones too. Where a word stands is not in its vector: attention is told how far
apart two words are. `unigram.py` cuts texts into its tokens.
Source: Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
Transformer", arXiv:1910.10683; the gated feed-forward of its version 1.1: Shazeer 2020, arXiv:2002.05202.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..model.attention import Hook, merge_heads, split_heads
from ..model.ddpm import exact

EPS = 1e-6


@dataclass(frozen=True)
class T5Config:
    """The sizes of the encoder. The defaults are those of T5 1.1 XXL, which Stable Diffusion 3 uses."""

    vocab_size: int = 32128
    width: int = 4096
    layers: int = 24
    heads: int = 64
    head_width: int = 64
    hidden: int = 10240  # of the feed-forward
    buckets: int = 32  # distances between tokens are told apart in this many classes, …
    far: int = 128  # … of which the last begins here


class T5(nn.Module):
    """Tokens -> one vector for each."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.bias = nn.Embedding(config.buckets, config.heads)  # one for all layers
        self.layers = nn.ModuleList(T5Layer(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=EPS)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, L), whole numbers in [0, vocab_size) -> (B, L, width). Padding is not masked.

        In half precision the sums are float32: they outgrow 65504.
        """
        dtype = self.embedding.weight.dtype
        places = torch.arange(tokens.shape[-1], device=tokens.device)
        distance = places - places[:, None]  # (L, L): how far token j is after token i
        bias = self.bias(bucket(distance, self.config)).permute(2, 0, 1)  # (L, L, heads) -> (heads, L, L)
        x = exact(self.embedding(tokens))  # (B, L) -> (B, L, width)
        for layer in self.layers:
            x = layer(x, bias)
        return normed(self.norm, x, dtype)


def bucket(distance: Tensor, config: T5Config) -> Tensor:
    """Whole numbers, any shape -> the classes that they are in, 0 … buckets - 1.

    Half of the classes are for tokens before, half for tokens after. In each half, the near ones have a class
    for each distance, and the far ones share classes that grow as the logarithm does.
    """
    half = config.buckets // 2
    near = half // 2
    steps = distance.abs()
    # [t5-buckets] §2.1, Raffel et al. 2020, and its code: n_e + ⌊log(d / n_e) / log(far / n_e) · (n - n_e)⌋
    far = near + (torch.log(steps.float() / near) / math.log(config.far / near) * (half - near)).long()
    return half * (distance > 0) + torch.where(steps < near, steps, far.clamp(max=half - 1))


def normed(norm: nn.RMSNorm, x: Tensor, dtype: torch.dtype) -> Tensor:
    """x (B, L, width), normalised in its own precision, as dtype."""
    return F.rms_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), EPS).to(dtype)


class T5Layer(nn.Module):
    """Tokens look at each other, then each thinks for itself."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.norm_1 = nn.RMSNorm(config.width, eps=EPS)
        self.attention = BiasedAttention(config)
        self.norm_2 = nn.RMSNorm(config.width, eps=EPS)
        self.gate = nn.Linear(config.width, config.hidden, bias=False)
        self.linear_1 = nn.Linear(config.width, config.hidden, bias=False)
        self.linear_2 = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x (B, L, width), bias (heads, L, L) -> (B, L, width)"""
        dtype = self.gate.weight.dtype
        x = x + self.attention(normed(self.norm_1, x, dtype), bias)
        h = normed(self.norm_2, x, dtype)
        # Eq. 5, Shazeer 2020: GEGLU(x) = GELU(xW) ⊗ xV, with GELU's approximation by tanh
        h = F.gelu(self.gate(h), approximate="tanh") * self.linear_1(h)  # (B, L, hidden)
        if dtype == torch.float16:  # the product's sum is what overflows
            return x + F.linear(exact(h), exact(self.linear_2.weight))
        return x + self.linear_2(h)


class BiasedAttention(nn.Module):
    """Self-attention that is told the distance between tokens."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.heads = config.heads
        self.hook: Hook | None = None
        inner = config.heads * config.head_width
        self.qkv = nn.Linear(config.width, 3 * inner, bias=False)
        self.out = nn.Linear(inner, config.width, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x (B, L, width), bias (heads, L, L) -> (B, L, width)"""
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        # [t5-attention] §2.1, Raffel et al. 2020: softmax(Q Kᵀ + B) V, with no √d_k: it is in the weights
        scores = q @ k.transpose(-2, -1) + bias  # (B, heads, L, L)
        weights = exact(scores).softmax(dim=-1).to(v.dtype)
        if self.hook is not None:
            self.hook(weights)
        return self.out(merge_heads(weights @ v))
