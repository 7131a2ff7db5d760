"""Alike pixels attend as one: fewer tokens in the self-attention where there are most of them.

Bolya & Hoffman 2023, "Token Merging for Fast Stable Diffusion", arXiv:2303.17604, after Bolya et al. 2022,
"Token Merging", arXiv:2210.09461. Off unless asked for, since it changes the picture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import SelfAttention, Words

MOST = 0.75  # of each 2×2 pixels, one stays


class TokenMerging:
    """Stands in for a U-Net during one generation; at full resolution its self-attention sees fewer tokens.

    unet: is not changed. ratio: the share of tokens that is merged away, 0 … MOST. call: what to run, if not
    the U-Net itself (see `DeepCache`).
    """

    def __init__(self, unet: nn.Module, ratio: float, call: Callable[..., Tensor] | None = None):
        self.ratio = ratio
        self._call = call or unet
        self._layers = [layer for layer in unet.modules() if isinstance(layer, SelfAttention)]
        # Which pixels stay is drawn anew for each layer and step, the same for every picture: what a picture
        # looks like does not depend on its place in the batch.
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, latents: Tensor, context: Tensor | Words, *told: Tensor) -> Tensor:
        """The arguments and the output are those of `UNet.forward`."""
        height, width = latents.shape[-2:]
        merged: list[Merging] = []  # by the layer that is running, if it has so many tokens

        def before(_: Any, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x, *rest = given
            if x.shape[1] != height * width:
                return given
            merged.append(Merging(x, stay(height, width, self._generator), self.ratio))
            return merged[-1].merge(x), *rest

        def after(_: Any, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
            return merged.pop().unmerge(out) if merged else out

        handles = [layer.register_forward_pre_hook(before) for layer in self._layers]
        handles += [layer.register_forward_hook(after) for layer in self._layers]
        try:
            return self._call(latents, context, *told)
        finally:
            for handle in handles:
                handle.remove()


def stay(height: int, width: int, generator: torch.Generator) -> Tensor:
    """One pixel of each 2×2 by chance, as numbers of tokens: (⌊H/2⌋·⌊W/2⌋,), in order. At least one."""
    if height < 2 or width < 2:
        return torch.zeros(1, dtype=torch.int64)
    # §4.2, Bolya & Hoffman 2023: chosen by chance, since a regular grid is seen in the picture
    chance = torch.randint(4, (height // 2, width // 2), generator=generator)
    rows = 2 * torch.arange(height // 2)[:, None] + chance // 2
    columns = 2 * torch.arange(width // 2) + chance % 2
    return (rows * width + columns).flatten().sort().values


class Merging:
    """Which tokens of x (B, L, C) join which. dst: those that stay, (D,); the others are candidates."""

    def __init__(self, x: Tensor, dst: Tensor, ratio: float):
        length = x.shape[1]
        here = torch.zeros(length, dtype=torch.bool)
        here[dst] = True
        self._dst, self._src = dst.to(x.device), (~here).nonzero().flatten().to(x.device)
        count = min(int(ratio * length), len(self._src))
        # §3, Bolya et al. 2022: each candidate's most alike by the cosine; then the best pairs of all
        unit = F.normalize(x, dim=-1)
        score, partner = (unit[:, self._src] @ unit[:, self._dst].mT).max(dim=-1)  # (B, S, D) -> (B, S) twice
        order = score.argsort(dim=-1, descending=True, stable=True)
        self._alone = order[:, count:]  # candidates that stay all the same, (B, S - r)
        self._joined = order[:, :count]  # … that join another, (B, r)
        self._partner = partner.gather(1, self._joined)  # … and which, (B, r)

    def merge(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (B, L - r, C): those that join count in the mean of those they join."""
        src, dst = x[:, self._src], x[:, self._dst]
        dst = dst.scatter_reduce(1, _wide(self._partner, x), _pick(src, self._joined), "mean")
        return torch.cat([_pick(src, self._alone), dst], dim=1)

    def unmerge(self, y: Tensor) -> Tensor:
        """(B, L - r, C) -> (B, L, C): what was one is the same wherever it came from."""
        alone, dst = y.split([self._alone.shape[1], len(self._dst)], dim=1)
        src = y.new_empty(len(y), len(self._src), y.shape[-1])
        src.scatter_(1, _wide(self._alone, y), alone)
        src.scatter_(1, _wide(self._joined, y), _pick(dst, self._partner))
        out = y.new_empty(len(y), len(self._src) + len(self._dst), y.shape[-1])
        out[:, self._src], out[:, self._dst] = src, dst
        return out


def _wide(index: Tensor, x: Tensor) -> Tensor:
    """(B, K) -> (B, K, C), as `gather` and `scatter` want it."""
    return index[..., None].expand(-1, -1, x.shape[-1])


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """x (B, L, C), index (B, K) -> (B, K, C)"""
    return x.gather(1, _wide(index, x))
