"""The beginning of the U-Net, computed once for both halves of the guidance.

Guidance puts the same latents under two prompts into one batch. Until the first cross-attention, the two
halves of that batch are the same numbers, so the rows of the U up to there need only one of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..model.diffusion import AttentionBlock, Given, SwitchSequential, TransformerLayer
from .fast import bare, drawing


class Row(SwitchSequential):
    """A row of the U, computed for one half of the batch as long as both halves are the same."""

    def forward(self, x: Tensor, given: Given) -> Tensor:  # type: ignore[override]
        """x (B, C, H, W) -> (B, C', H', W')"""
        paired = drawing(x) and same_halves(x) and (len(given.time) == 1 or same_halves(given.time))
        if not (paired and len(given.context) == len(x)):
            return super().forward(x, given)
        x = x[: len(x) // 2]
        half = given._replace(time=given.time[: max(1, len(given.time) // 2)])
        for layer in self:
            if len(x) == len(given.context):
                x = layer(x, given)
            elif isinstance(layer, AttentionBlock) and _open(layer):
                x = _attend(layer, x, given)
            elif isinstance(layer, AttentionBlock):
                x = layer(torch.cat([x, x]), given)
            else:
                x = layer(x, half)
        return x if len(x) == len(given.context) else torch.cat([x, x])


def same_halves(x: Tensor) -> bool:
    """True if the second half of the batch x (B, …) repeats the first."""
    if len(x) % 2:
        return False
    one, other = x.chunk(2)
    # Most rows see two different halves, and the first of their numbers show it.
    return torch.equal(one[..., :1], other[..., :1]) and torch.equal(one, other)


def _open(block: AttentionBlock) -> bool:
    """True if no hook watches the block or its first layer, so that these need not be called as a whole."""
    return len(block.layers) > 0 and bare(block, AttentionBlock) and bare(block.layers[0], TransformerLayer)


def _attend(block: AttentionBlock, x: Tensor, given: Given) -> Tensor:
    """`AttentionBlock.forward` with the batch doubled after the first self-attention: (B/2, …) -> (B, …)"""
    height, width = x.shape[-2:]
    h = block.proj_in(block.norm(x).permute(0, 2, 3, 1).flatten(1, 2))  # (B/2, C, H, W) -> (B/2, H·W, C)
    first, *others = block.layers
    assert isinstance(first, TransformerLayer)
    h = h + first.self_attention(first.norm_1(h))
    x, h = torch.cat([x, x]), torch.cat([h, h])
    h = h + first.cross_attention(first.norm_2(h), given.context)
    h = h + first.feed_forward(first.norm_3(h))
    for layer in others:
        h = layer(h, given.context)
    return x + block.proj_out(h).unflatten(1, (height, width)).permute(0, 3, 1, 2)  # -> (B, C, H, W)
