"""Words and pixels at one table: the transformer that Stable Diffusion 3 has in place of the U-Net.

Read `MMDiT.forward` first, then `Block.forward`. Patches of the latents and the words' vectors are two
streams of tokens. Each has weights of its own, and in every block both meet in one attention.
Source: Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis",
arXiv:2403.03206 (MM-DiT, §4); Peebles & Xie 2023, arXiv:2212.09748 (DiT, of which it is made).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..model.attention import Hook, Kernel, attention, merge_heads, softmax_attention, split_heads
from ..model.diffusion import sinusoids

TIME_WIDTH = 256  # numbers in the waves that tell the time
EPS = 1e-6  # of all norms


@dataclass(frozen=True)
class MMDiTConfig:
    """The sizes of the transformer. The defaults are Stable Diffusion 3 medium's."""

    in_channels: int = 16
    out_channels: int = 16
    patch: int = 2  # a token is a patch of p×p latents
    layers: int = 24
    heads: int = 24
    width: int = 1536  # of a token: 64 for each head
    context_width: int = 4096  # of the words
    pooled_width: int = 2048  # of the vector for the whole prompt
    positions: int = 192  # side of the table of positions, in patches: no picture is larger
    qk_norm: bool = False  # 3.5: RMSNorm on queries and keys
    # the blocks in which pixels then look at pixels alone; 3.5 medium: 0 … 12
    dual_attention: tuple[int, ...] = ()


class RMSNorm(nn.RMSNorm):
    """LayerNorm without the mean, in the dtype of its input: under autocast, its weight has another."""

    def forward(self, x: Tensor) -> Tensor:
        """(…, width) -> (…, width)"""
        # [rms-norm] Eq. 4, Zhang & Sennrich 2019: x / √(E[x²] + ε) · γ
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Queries(nn.Module):
    """What a token brings to attention, query, key and value, and what it takes from there."""

    def __init__(self, config: MMDiTConfig, takes: bool = True):
        super().__init__()
        self.heads = config.heads
        width, head = config.width, config.width // config.heads
        self.qkv = nn.Linear(width, 3 * width)
        self.norm_q = RMSNorm(head, eps=EPS) if config.qk_norm else nn.Identity()
        self.norm_k = RMSNorm(head, eps=EPS) if config.qk_norm else nn.Identity()
        self.out = nn.Linear(width, width) if takes else nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, L, width) -> q, k, v, each (B, heads, L, width/heads)"""
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        return self.norm_q(q), self.norm_k(k), v


class JointAttention(nn.Module):
    """All tokens of all streams look at each other. It has no weights: the streams bring theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.hook: Hook | None = None
        self.kernel: Kernel = attention

    def forward(self, *streams: tuple[Queries, Tensor]) -> list[Tensor]:
        """The queries and the tokens (B, L, width) of each stream -> what its tokens saw, (B, L, width)"""
        made = [queries(x) for queries, x in streams]
        # [joint-attention] §4, Esser et al. 2024: Attention([Q_x; Q_c], [K_x; K_c], [V_x; V_c])
        q, k, v = (torch.cat(parts, dim=2) for parts in zip(*made))  # (B, heads, L + S, width/heads)
        if self.hook is not None:  # beside the fused path, so that recording changes nothing
            self.hook(softmax_attention(q, k, v)[1])
        seen = merge_heads(self.kernel(q, k, v, False))  # (B, L + S, width)
        parts = seen.split([x.shape[1] for _, x in streams], dim=1)
        return [queries.out(part) for (queries, _), part in zip(streams, parts)]


class Stream(nn.Module):
    """One stream's weights in a block: those for pixels, or those for words."""

    def __init__(self, config: MMDiTConfig, dual: bool = False, last: bool = False):
        """dual: with a second attention. last: after this block, nobody asks for the stream any more."""
        super().__init__()
        width = config.width
        self.norm = nn.LayerNorm(width, eps=EPS, elementwise_affine=False)
        self.modulation = nn.Linear(width, width * (2 if last else 9 if dual else 6))
        self.queries = Queries(config, takes=not last)
        if dual:
            self.second = Queries(config)
        if not last:
            self.linear_1 = nn.Linear(width, 4 * width)
            self.linear_2 = nn.Linear(4 * width, width)

    def changes(self, condition: Tensor) -> list[tuple[Tensor, ...]]:
        """Time and prompt (B, width) -> shift, scale and gate of each of the block's parts, (B, 1, width)

        The parts are attention, the feed-forward, and the second attention. The last block's words have only
        the first, which lacks the gate.
        """
        numbers = self.modulation(F.silu(condition))[:, None]  # (B, width) -> (B, 1, 6·width)
        each = numbers.split(condition.shape[-1], dim=-1)
        return [each[i : i + 3] for i in range(0, len(each), 3)]

    def think(self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        """The feed-forward, each token for itself: x (B, L, width) -> (B, L, width)"""
        h = self.linear_1(modulated(self.norm(x), shift, scale))  # (B, L, width) -> (B, L, 4·width)
        # Figure 3, Peebles & Xie 2023: x + α ⊙ f(x), where training begins with α = 0
        return x + gate * self.linear_2(F.gelu(h, approximate="tanh"))


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """The normalised x (B, L, width) as time and prompt want it; shift and scale are (B, 1, width)."""
    # [adaln] Figure 3, Peebles & Xie 2023: (1 + γ) ⊙ LN(x) + β
    return x * (1 + scale) + shift


class Block(nn.Module):
    """Pixels and words look at each other and at themselves. Then each token thinks for itself."""

    def __init__(self, config: MMDiTConfig, index: int):
        super().__init__()
        dual, self.last = index in config.dual_attention, index == config.layers - 1
        self.attention = JointAttention()
        self.second_attention = JointAttention() if dual else None
        self.pixels = Stream(config, dual=dual)
        self.words = Stream(config, last=self.last)

    def forward(self, x: Tensor, c: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels x (B, L, width), words c (B, S, width), time and prompt (B, width) -> x and c

        The last block leaves the words as they were.
        """
        look, think, *again = self.pixels.changes(condition)
        c_look, *c_think = self.words.changes(condition)
        h = self.pixels.norm(x)
        seen, c_seen = self.attention(
            (self.pixels.queries, modulated(h, *look[:2])),
            (self.words.queries, modulated(self.words.norm(c), *c_look[:2])),
        )
        x = x + look[2] * seen
        if self.second_attention is not None:  # which reads what the first one read
            shift, scale, gate = again[0]
            (seen,) = self.second_attention((self.pixels.second, modulated(h, shift, scale)))
            x = x + gate * seen
        x = self.pixels.think(x, *think)
        return x, c if self.last else self.words.think(c + c_look[2] * c_seen, *c_think[0])


class Vector(nn.Sequential):
    """Makes one vector for all tokens, of a number's waves or of a prompt's pooled vector."""

    def __init__(self, into: int, width: int):
        super().__init__(nn.Linear(into, width), nn.SiLU(), nn.Linear(width, width))


class MMDiT(nn.Module):
    """v_θ(x_t, t, words): the velocity from picture to noise."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.config = config
        width, patch = config.width, config.patch
        self.patches = nn.Conv2d(config.in_channels, width, patch, stride=patch)
        self.position = nn.Parameter(torch.zeros(1, config.positions**2, width))
        self.time = Vector(TIME_WIDTH, width)
        self.pooled = Vector(config.pooled_width, width)
        self.words = nn.Linear(config.context_width, width)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.layers))
        self.norm = nn.LayerNorm(width, eps=EPS, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, patch * patch * config.out_channels)

    def forward(
        self, latents: Tensor, context: Tensor, t: Tensor, pooled: Tensor, skip: Collection[int] = ()
    ) -> Tensor:
        """latents (B, 16, h, w), words (B, S, 4096), t (B,) or (1,), pooled (B, 2048) -> like latents

        t: in 0 … 1000. skip: blocks to leave out, which shows what they add. Raises ValueError for latents
        whose sides are no multiples of the patch, or longer than the table of positions.
        """
        places = self.places(*latents.shape[-2:])  # (h/2·w/2, width)
        x = self.patches(latents)  # (B, 16, h, w) -> (B, width, h/2, w/2)
        x = x.flatten(2).transpose(1, 2) + places  # (B, width, h/2, w/2) -> (B, h/2·w/2, width)
        c = self.words(context)  # (B, S, 4096) -> (B, S, width)
        condition = self.time(sinusoids(t, TIME_WIDTH).to(c.dtype)) + self.pooled(pooled)  # (B, width)
        for i, block in enumerate(self.blocks):
            if i not in skip:
                x, c = block(x, c, condition)
        shift, scale = self.modulation(F.silu(condition))[:, None].chunk(2, dim=-1)
        x = self.out(modulated(self.norm(x), shift, scale))  # (B, h/2·w/2, width) -> (B, h/2·w/2, 2·2·16)
        return self.picture(x, *latents.shape[-2:])

    @torch.no_grad()
    def initialize(self) -> None:
        """Random weights to train from: blocks that change nothing yet, and waves for the table of positions.

        Source: Peebles & Xie 2023, §3.2 and their code.
        """
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        for module in self.modules():
            if isinstance(module, Stream | MMDiT):
                nn.init.zeros_(module.modulation.weight)
        nn.init.zeros_(self.out.weight)
        side, half = self.config.positions, self.config.width // 2
        waves = sinusoids(torch.arange(side) - side / 2, half)  # (side, width/2)
        rows, columns = waves[:, None].expand(-1, side, -1), waves.expand(side, -1, -1)
        self.position.copy_(torch.cat([rows, columns], dim=-1).flatten(0, 1))

    def places(self, height: int, width: int) -> Tensor:
        """The vectors of the places of h × w latents: the middle of the table, (h/2·w/2, width)."""
        patch, side = self.config.patch, self.config.positions
        if height % patch or width % patch:
            raise ValueError(f"the sides of latents must be multiples of {patch}, not {height}×{width}")
        if max(height, width) > side * patch:
            raise ValueError(f"latents of {height}×{width} are too large: {side * patch} a side is the most")
        rows, columns = height // patch, width // patch
        top, left = (side - rows) // 2, (side - columns) // 2
        table = self.position[0].unflatten(0, (side, side))
        return table[top : top + rows, left : left + columns].flatten(0, 1)

    def picture(self, x: Tensor, height: int, width: int) -> Tensor:
        """Tokens back in their places: (B, h/2·w/2, 2·2·16) -> (B, 16, h, w)"""
        patch = self.config.patch
        x = x.unflatten(1, (height // patch, width // patch)).unflatten(-1, (patch, patch, -1))
        x = x.permute(0, 5, 1, 3, 2, 4)  # (B, h/2, w/2, 2, 2, 16) -> (B, 16, h/2, 2, w/2, 2)
        return x.flatten(4, 5).flatten(2, 3)
