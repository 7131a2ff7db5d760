"""The U-Net: looks at noisy latents, the time and the words, and predicts the noise.

Read `plan` first: it is the whole U as a list. Then `UNet.forward`, which walks it.
Source: Ronneberger et al. 2015 (the U), Ho et al. 2020 (time), Rombach et al. 2022, §3.3 (words).
"""

from __future__ import annotations

import math
from functools import singledispatch
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import CrossAttention, SelfAttention
from .config import UNetConfig


class Layer(NamedTuple):
    """One layer of the U, before it is built."""

    kind: str  # "conv", "res", "attention", "down" or "up"
    into: int  # channels of its input
    out: int  # channels of its output
    depth: int = 0  # transformer layers of an "attention"
    heads: int = 0  # attention heads of an "attention"


@singledispatch  # a family may register another plan for its own config
def plan(config: UNetConfig) -> tuple[list[list[Layer]], list[Layer], list[list[Layer]]]:
    """The U as data: the way down, the bottom, the way up. For SD 1.x, at 64×64 latents:

        down  0  conv 4→320                     64×64     up  11  res 640→320   attention
              1  res 320→320    attention                     10  res 640→320   attention
              2  res 320→320    attention                      9  res 960→320   attention
              3  down 320                       32×32          8  res 960→640   attention  up
              4  res 320→640    attention                      7  res 1280→640  attention
              5  res 640→640    attention                      6  res 1920→640  attention
              6  down 640                       16×16          5  res 1920→1280 attention  up
              7  res 640→1280   attention                      4  res 2560→1280 attention
              8  res 1280→1280  attention                      3  res 2560→1280 attention
              9  down 1280                       8×8           2  res 2560→1280            up
             10  res 1280→1280                                 1  res 2560→1280
             11  res 1280→1280                                 0  res 2560→1280
                        middle  res 1280→1280, attention, res 1280→1280

    Every row of the way down leaves its output on a pile; row i of the way up takes the last one
    off and reads it beside its own input. That is the skip connection, and why `res` narrows there.
    """
    channels, levels = config.channels, len(config.channels)

    def attention(level: int, depth: int) -> list[Layer]:
        wide = channels[level]
        return [Layer("attention", wide, wide, depth, config.heads[level])] if depth else []

    down: list[list[Layer]] = [[Layer("conv", config.in_channels * config.patch**2, channels[0])]]
    pile = [channels[0]]  # the channels of each skip
    now = channels[0]
    for level, wide in enumerate(channels):
        for _ in range(config.layers):
            down.append([Layer("res", now, wide), *attention(level, config.attention[level])])
            pile.append(wide)
            now = wide
        if level < levels - 1:
            down.append([Layer("down", now, now)])
            pile.append(now)
    middle: list[Layer] = []
    if config.middle:
        middle = [Layer("res", now, now), *attention(-1, config.middle_attention), Layer("res", now, now)]
    up: list[list[Layer]] = []
    for level in reversed(range(levels)):
        wide = channels[level]
        for i in range(config.layers + 1):
            row = [Layer("res", now + pile.pop(), wide), *attention(level, config.attention[level])]
            if level > 0 and i == config.layers:
                row.append(Layer("up", wide, wide))
            up.append(row)
            now = wide
    return down, middle, up


class Given(NamedTuple):
    """The inputs that every layer of the U is given beside x; each layer takes those that it needs."""

    time: Tensor  # (B, 4·channels) or (1, 4·channels)
    context: Tensor  # the words, (B, S, context_width)
    size: torch.Size | None = None  # (h, w) to grow to; None: twice as large


def sinusoids(t: Tensor, width: int) -> Tensor:
    """The time as waves of falling frequency: t (B,) -> (B, width), float32 or finer. Cosines first.

    Source: Vaswani et al. 2017, §3.5.
    """
    half = width // 2
    t = t.to(torch.promote_types(t.dtype, torch.float32))
    # [time-embedding] §3.5, Vaswani et al. 2017: ω_i = 10000^(−i / half), i = 0 … half−1
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, dtype=t.dtype, device=t.device) / half)
    angles = t[:, None] * frequencies  # (B,) -> (B, half)
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


class TimeEmbedding(nn.Module):
    """Timestep -> the vector that every residual block adds."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.linear_1 = nn.Linear(width, 4 * width)
        self.linear_2 = nn.Linear(4 * width, 4 * width)

    def forward(self, t: Tensor) -> Tensor:
        """t (B,), any dtype -> (B, 4·width)"""
        waves = sinusoids(t, self.width).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(waves)))


class InputConv(nn.Conv2d):
    """The first layer: latents to channels, p×p latents at a time."""

    def __init__(self, in_channels: int, out_channels: int, patch: int):
        super().__init__(in_channels, out_channels, 3, padding=1)
        self.patch = patch  # p; 1 in Stable Diffusion

    def forward(self, x: Tensor, given: Given) -> Tensor:  # type: ignore[override]
        """x (B, 4, H, W) -> (B, C, H/p, W/p)"""
        return super().forward(F.pixel_unshuffle(x, self.patch))  # (B, 4, H, W) -> (B, 4p², H/p, W/p)


class ResidualBlock(nn.Module):
    """x + f(x, time): two convolutions, with the time added between them."""

    def __init__(self, in_channels: int, out_channels: int, time_width: int, groups: int):
        super().__init__()
        self.norm_1 = nn.GroupNorm(groups, in_channels, eps=1e-5)
        self.conv_1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(time_width, out_channels)
        self.norm_2 = nn.GroupNorm(groups, out_channels, eps=1e-5)
        self.conv_2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, given: Given) -> Tensor:
        """x (B, in, H, W) -> (B, out, H, W)"""
        # [silu] §2, Hendrycks & Gimpel 2016: SiLU(x) = x σ(x)
        h = self.conv_1(F.silu(self.norm_1(x)))
        h = h + self.time(F.silu(given.time))[:, :, None, None]  # one number per channel, at every pixel
        h = self.conv_2(F.silu(self.norm_2(h)))
        # [residual-block] Eq. 2, He et al. 2016: y = W_s x + f(x)
        return self.skip(x) + h


class GEGLU(nn.Module):
    """The transformer's feed-forward, gated (Shazeer 2020)."""

    def __init__(self, width: int):
        super().__init__()
        self.linear_1 = nn.Linear(width, 8 * width)
        self.linear_2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, width) -> (B, L, width)"""
        x, gate = self.linear_1(x).chunk(2, dim=-1)  # width -> twice 4·width
        # [geglu] Eq. 5, Shazeer 2020: GEGLU(x) = (xW + b) ⊗ GELU(xV + c), with the exact GELU
        return self.linear_2(x * F.gelu(gate))


class TransformerLayer(nn.Module):
    """Pixels look at each other, then at the words, then each pixel thinks for itself."""

    def __init__(self, width: int, heads: int, context_width: int):
        super().__init__()
        self.norm_1 = nn.LayerNorm(width)
        self.self_attention = SelfAttention(heads, width, bias=False)
        self.norm_2 = nn.LayerNorm(width)
        self.cross_attention = CrossAttention(heads, width, context_width)
        self.norm_3 = nn.LayerNorm(width)
        self.feed_forward = GEGLU(width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x (B, L, width), context (B, S, context_width) -> (B, L, width)"""
        x = x + self.self_attention(self.norm_1(x))
        x = x + self.cross_attention(self.norm_2(x), context)
        return x + self.feed_forward(self.norm_3(x))


class AttentionBlock(nn.Module):
    """x + a transformer over the pixels of x."""

    def __init__(self, channels: int, depth: int, heads: int, config: UNetConfig):
        super().__init__()
        self.norm = nn.GroupNorm(config.groups, channels, eps=1e-6)  # 1e-6 here, 1e-5 in residual blocks
        self.proj_in = nn.Linear(channels, channels)  # in SD 1.x's files, a 1×1 convolution
        self.layers = nn.ModuleList(
            TransformerLayer(channels, heads, config.context_width) for _ in range(depth)
        )
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, given: Given) -> Tensor:
        """x (B, C, H, W) -> (B, C, H, W)"""
        height, width = x.shape[-2:]
        h = self.proj_in(self.norm(x).permute(0, 2, 3, 1).flatten(1, 2))  # (B, C, H, W) -> (B, H·W, C)
        for layer in self.layers:
            h = layer(h, given.context)
        h = self.proj_out(h).unflatten(1, (height, width)).permute(0, 3, 1, 2)  # -> (B, C, H, W)
        return x + h


class Downsample(nn.Module):
    """Halves height and width, rounding up. Padded on all sides, unlike the VAE's."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, given: Given) -> Tensor:
        """(B, C, H, W) -> (B, C, ⌈H/2⌉, ⌈W/2⌉)"""
        return self.conv(x)


class Upsample(nn.Module):
    """Grows to the size of the skip that comes next: twice as large, or one less where that size is odd."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, given: Given) -> Tensor:
        """(B, C, H, W) -> (B, C, 2H, 2W), or (B, C, *given.size)"""
        height, width = x.shape[-2:]
        return self.conv(F.interpolate(x, size=given.size or (2 * height, 2 * width), mode="nearest"))


class SwitchSequential(nn.Sequential):
    """Layers one after the other. Each is given the same, and takes from it what it needs."""

    def forward(self, x: Tensor, given: Given) -> Tensor:  # type: ignore[override]
        for layer in self:
            x = layer(x, given)
        return x


class UNet(nn.Module):
    """ε_θ(x_t, t, words), or v_θ: see `ScheduleConfig.prediction_type`."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        time_width = 4 * config.channels[0]

        def build(row: list[Layer]) -> SwitchSequential:
            make = {
                "conv": lambda layer: InputConv(layer.into, layer.out, config.patch),
                "res": lambda layer: ResidualBlock(layer.into, layer.out, time_width, config.groups),
                "attention": lambda layer: AttentionBlock(layer.out, layer.depth, layer.heads, config),
                "down": lambda layer: Downsample(layer.out),
                "up": lambda layer: Upsample(layer.out),
            }
            return SwitchSequential(*(make[layer.kind](layer) for layer in row))

        down, middle, up = plan(config)
        self.time_embedding = TimeEmbedding(config.channels[0])
        self.down = nn.ModuleList(build(row) for row in down)
        self.middle = build(middle)
        self.up = nn.ModuleList(build(row) for row in up)
        self.norm = nn.GroupNorm(config.groups, config.channels[0], eps=1e-5)
        self.conv_out = nn.Conv2d(config.channels[0], config.out_channels * config.patch**2, 3, padding=1)

    def forward(self, latents: Tensor, context: Tensor, t: Tensor) -> Tensor:
        """latents (B, 4, h, w), context (B, S, width), t (B,) or (1,) in 0 … 1000 -> (B, 4, h, w)"""
        return self.walk(latents, Given(self.time_embedding(t), context))  # t (B,) -> (B, 1280)

    def walk(self, x: Tensor, given: Given) -> Tensor:
        """Down, through the middle, and up again: (B, 4, h, w) -> (B, 4, h, w)"""
        pile = self.descend(x, given)
        return self.ascend(self.middle(pile[-1], given), pile, given)

    def descend(self, x: Tensor, given: Given) -> list[Tensor]:
        """The way down: (B, 4, h, w) -> the output of each row, which the way up reads again"""
        pile = []
        for row in self.down:
            x = row(x, given)
            pile.append(x)
        return pile

    def ascend(self, x: Tensor, pile: list[Tensor], given: Given) -> Tensor:
        """The way up, which empties the pile: (B, C, h, w) -> (B, 4, h, w)"""
        for row in self.up:
            x = torch.cat([x, pile.pop()], dim=1)  # (B, C, h, w), (B, C', h, w) -> (B, C + C', h, w)
            x = row(x, given._replace(size=pile[-1].shape[-2:] if pile else None))
        return self.last(x)

    def last(self, x: Tensor) -> Tensor:
        """The last layers: (B, C, h/p, w/p) -> (B, 4, h, w)"""
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm(x))), self.config.patch)


UNeti = UNet  # its name in the project's first version
