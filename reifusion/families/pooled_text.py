"""A text encoder that gives the words, and beside them one vector for the whole text, as from SDXL on.

Podell et al. 2023, "SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis",
arXiv:2307.01952, §2.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor, nn

from ..model.clip import CLIP
from ..model.config import CLIPConfig
from ..model.finite import finite
from ..model.pipeline import StableDiffusion, as_gradients_are
from ..model.tokenizer import Tokenizer

BIG_G = CLIPConfig(width=1280, layers=32, heads=20, activation="gelu")  # OpenCLIP's ViT-bigG/14


class TextEncoder(CLIP):
    """CLIP without its last layer, and a vector for the whole text from all of it."""

    def __init__(self, config: CLIPConfig, pooled: int | None = None):
        super().__init__(config)
        self.projection = None if pooled is None else nn.Linear(config.width, pooled, bias=False)

    def both(self, tokens: Tensor, ends: Tensor, skip: int = 0) -> tuple[Tensor, Tensor | None]:
        """tokens (B, L), ends (B,): where each text ends -> words (B, L, width), whole text (B, pooled).

        skip: how many more of the last layers to leave out. The second is None without a projection. Raises
        ValueError for a `skip` out of range.
        """
        last = len(self.layers) - 1 - skip
        if not 0 <= skip < len(self.layers):
            raise ValueError(f"skip must be from 0 to {len(self.layers) - 1}, not {skip}")
        words = x = self.embedding(tokens)  # (B, L) -> (B, L, width)
        for i, layer in enumerate(self.layers if self.projection else self.layers[:last]):
            x = layer(x)
            words = x if i < last else words  # the last layer learned to compare with pictures; and no norm
        if self.projection is None:
            return words, None
        # [pooled-text] §2.4, Radford et al. 2021: of the text's end, which has seen all of it: W LN(h)
        end = self.norm(x)[torch.arange(len(x), device=x.device), ends]  # (B, L, width) -> (B, width)
        return words, self.projection(end)

    def forward(self, tokens: Tensor, skip: int = 0) -> Tensor:
        """tokens (B, L) -> (B, L, width), as `both` says."""
        return self.both(tokens, torch.zeros_like(tokens[:, 0]), skip)[0]


def read_prompts(
    pipe: StableDiffusion, name: str, prompts: Sequence[str], tokenizer: Tokenizer, clip_skip: int
) -> tuple[Tensor, Tensor | None]:
    """B prompts -> what `read_tokens` makes of their tokens."""
    return read_tokens(pipe, name, [tokenizer.encode(prompt) for prompt in prompts], tokenizer.end, clip_skip)


def read_tokens(
    pipe: StableDiffusion, name: str, texts: Sequence[Sequence[int]], end: int, clip_skip: int
) -> tuple[Tensor, Tensor | None]:
    """B × 77 tokens -> the words (B, 77, width) of the text encoder of that name, whole texts (B, pooled).

    end: the token at which a text ends. The second is None for an encoder without a projection. Raises
    FloatingPointError for numbers that are not finite.
    """
    tokens, ends = torch.tensor(texts), torch.tensor([text.index(end) for text in texts])
    with pipe.borrow(name) as network:
        encoder = cast(TextEncoder, network)

        def both(tokens: Tensor, ends: Tensor) -> Tensor:
            words, whole = encoder.both(tokens, ends, clip_skip)
            parts = [words.flatten(1)] + ([] if whole is None else [whole])
            return torch.cat(parts, dim=1)  # (B, 77·width + pooled): one tensor, as the next line wants

        made = as_gradients_are(both)(tokens.to(pipe.device), ends.to(pipe.device))
        finite(made, "the text encoder", encoder)
    shape = tokens.shape[1], encoder.config.width
    words, whole = made[:, : shape[0] * shape[1]], made[:, shape[0] * shape[1] :]
    return words.unflatten(1, shape), None if encoder.projection is None else whole


@lru_cache(maxsize=4)
def padding_with(tokenizer: Tokenizer, pad: str) -> Tokenizer:
    """Returns a tokenizer that fills up with another token."""
    merges, length = tokenizer.merges_text, tokenizer.context_length
    return Tokenizer(merges, length, vocabulary=tokenizer.vocabulary, pad=pad, exact=tokenizer.exact)
