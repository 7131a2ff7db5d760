"""From tokens to vectors: CLIP's text encoder (Radford et al. 2021, §2.4).

A prompt is cut into tokens (`tokenizer.py`), and each token becomes a vector that has seen all tokens before
it. The U-Net looks at these vectors to know what to draw.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import SelfAttention
from .config import CLIPConfig
from .tokenizer import Tokenizer as Tokenizer


class CLIP(nn.Module):
    """The text encoder: a transformer in which no token sees a later one.

    Source: Radford et al. 2021, §2.4; the numbers agree with `transformers.CLIPTextModel`.
    """

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config = config
        self.embedding = CLIPEmbedding(config)
        self.layers = nn.ModuleList(CLIPLayer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.initialize()

    def forward(self, tokens: Tensor, skip: int = 0) -> Tensor:
        """tokens (B, L) whole numbers in [0, vocab_size), L ≤ context_length -> (B, L, width).

        skip: how many of the last layers to leave out, from 0 to layers - 1. The final norm stays, so
        `skip=1` is `clip_skip=1` of diffusers, and "Clip skip: 2" of the web UIs, which count from 1.
        Padding is not masked: Stable Diffusion was trained that way.

        Raises ValueError for too many tokens or a `skip` out of range.
        """
        if not 0 <= skip < len(self.layers):
            raise ValueError(f"skip must be from 0 to {len(self.layers) - 1}, not {skip}")
        x = self.embedding(tokens)  # (B, L) -> (B, L, width)
        for layer in self.layers[: len(self.layers) - skip]:
            x = layer(x)
        return self.norm(x)

    @torch.no_grad()
    def initialize(self) -> None:
        """Random weights to train from. Source: `initialize_parameters` of openai/CLIP."""
        width, depth = self.config.width, self.config.layers
        nn.init.normal_(self.embedding.token.weight, std=0.02)
        nn.init.normal_(self.embedding.position, std=0.01)
        # What is added to the residual stream shrinks with depth, so that its variance does not grow with it.
        added = (width * 2 * depth) ** -0.5
        stds = {"qkv": width**-0.5, "out": added, "linear_1": (2 * width) ** -0.5, "linear_2": added}
        for name, layer in self.layers.named_modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=stds[name.rpartition(".")[2]])
                nn.init.zeros_(layer.bias)


class CLIPEmbedding(nn.Module):
    """The vector of a token plus the vector of its position: both learned."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.token = nn.Embedding(config.vocab_size, config.width)
        self.position = nn.Parameter(torch.zeros(config.context_length, config.width))

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, L), L ≤ context_length -> (B, L, width). Raises ValueError for a longer sequence."""
        length = tokens.shape[-1]
        if length > len(self.position):
            raise ValueError(f"{length} tokens are too many: this model has {len(self.position)} positions")
        # [token-embedding] Eq. 2, Radford et al. 2018: h₀ = U Wₑ + W_p
        return self.token(tokens) + self.position[:length]


class CLIPLayer(nn.Module):
    """Tokens look back at each other, then each thinks for itself: a pre-norm transformer block."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.norm_1 = nn.LayerNorm(config.width)
        self.attention = SelfAttention(config.heads, config.width)
        self.norm_2 = nn.LayerNorm(config.width)
        self.linear_1 = nn.Linear(config.width, 4 * config.width)
        self.linear_2 = nn.Linear(4 * config.width, config.width)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, width) -> (B, L, width)."""
        x = x + self.attention(self.norm_1(x), causal=True)
        h = self.activation(self.linear_1(self.norm_2(x)))  # (B, L, width) -> (B, L, 4·width)
        return x + self.linear_2(h)  # (B, L, 4·width) -> (B, L, width)


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI's CLIP was trained with this approximation, so the exact GELU in its place is wrong."""
    # [quick-gelu] §2, Hendrycks & Gimpel 2016: GELU(x) ≈ x σ(1.702 x)
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}
