"""The U-Net: looks at noisy latents, the time and the words, and says what the noise is.

Read `plan` first: it is the whole U as a list. Then `UNet.forward`, which walks it.
Source: Ronneberger et al. 2015 (the U), Ho et al. 2020 (time), Rombach et al. 2022, §3.3 (words).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import CrossAttention, SelfAttention, Words
from .config import UNetConfig
from .fast import Conv2d, Linear, geglu, upsampled

Layer = tuple  # ("conv" | "res" | "attention" | "down" | "up", channels in, channels out)


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
    down: list[list[Layer]] = [[("conv", config.in_channels, channels[0])]]
    pile = [channels[0]]  # the channels of each skip
    now = channels[0]
    for level, wide in enumerate(channels):
        for _ in range(config.layers):
            row: list[Layer] = [("res", now, wide)]
            if config.attention[level]:
                row.append(("attention", wide, wide))
            down.append(row)
            pile.append(wide)
            now = wide
        if level < levels - 1:
            down.append([("down", now, now)])
            pile.append(now)
    middle: list[Layer] = [("res", now, now), ("attention", now, now), ("res", now, now)]
    up: list[list[Layer]] = []
    for level in reversed(range(levels)):
        wide = channels[level]
        for i in range(config.layers + 1):
            row = [("res", now + pile.pop(), wide)]
            if config.attention[level]:
                row.append(("attention", wide, wide))
            if level > 0 and i == config.layers:
                row.append(("up", wide, wide))
            up.append(row)
            now = wide
    return down, middle, up


def sinusoids(t: Tensor, width: int) -> Tensor:
    """The time as waves of falling frequency: t (B,) -> (B, width), float32. Cosines first, as SD has it.

    Source: Vaswani et al. 2017, §3.5.
    """
    half = width // 2
    # [time-embedding] §3.5, Vaswani et al. 2017: ω_i = 10000^(−i / half), i = 0 … half−1
    frequencies = torch.exp(
        -math.log(10_000) * torch.arange(half, dtype=torch.float32, device=t.device) / half
    )
    angles = t.float()[:, None] * frequencies  # (B,) -> (B, half)
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


def guidance_sinusoids(scale: Tensor, width: int) -> Tensor:
    """How strong guidance is, as waves: scale (B,) -> (B, width), float32. Sines first, as LCMs have it.

    Source: Meng et al. 2023, "On Distillation of Guided Diffusion Models", arXiv:2210.03142, §3.1.
    """
    half = width // 2
    # Luo et al. 2023's code: ω_i = 10000^(−i / (half − 1)), of 1000 w with w = s − 1
    frequencies = torch.exp(torch.arange(half, device=scale.device) * (-math.log(10_000) / (half - 1)))
    angles = 1000 * (scale.float()[:, None] - 1) * frequencies  # (B,) -> (B, half)
    return torch.cat([torch.sin(angles), torch.cos(angles)], dim=-1)


def as_many_as(many: Tensor | Words, x: Tensor) -> Tensor:
    """The batch x, over again until it is as long as the other: (B, …) -> (B', …)"""
    return x if len(x) == len(many) else torch.cat([x] * (len(many) // len(x)))


class TimeEmbedding(nn.Module):
    """Timestep -> the vector that every residual block adds. An LCM's holds the guidance as well."""

    def __init__(self, width: int, guidance_width: int | None = None):
        super().__init__()
        self.width = width
        self.guidance = None if guidance_width is None else Linear(guidance_width, width, bias=False)
        self.linear_1 = Linear(width, 4 * width)
        self.linear_2 = Linear(4 * width, 4 * width)

    def forward(self, t: Tensor, guidance: Tensor | None = None) -> Tensor:
        """t (B,), any dtype, guidance (B,), its scale s -> (B, 4·width)"""
        waves = sinusoids(t, self.width).to(self.linear_1.weight.dtype)
        if self.guidance is not None and guidance is not None:
            its_waves = guidance_sinusoids(guidance, self.guidance.in_features)
            waves = waves + self.guidance(its_waves.to(waves.dtype))
        return self.linear_2(F.silu(self.linear_1(waves)))


class ResidualBlock(nn.Module):
    """x + f(x, time): two convolutions, with the time added between them."""

    def __init__(self, in_channels: int, out_channels: int, time_width: int, groups: int):
        super().__init__()
        self.norm_1 = nn.GroupNorm(groups, in_channels, eps=1e-5)
        self.conv_1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = Linear(time_width, out_channels)
        self.norm_2 = nn.GroupNorm(groups, out_channels, eps=1e-5)
        self.conv_2 = Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.skip = nn.Identity() if same else Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x (B, in, H, W), time (B, time_width) -> (B, out, H, W)"""
        # [silu] §2, Hendrycks & Gimpel 2016: SiLU(x) = x σ(x)
        h = self.conv_1(F.silu(self.norm_1(x)))
        shift = as_many_as(h, self.time(F.silu(time)))
        h = h + shift[:, :, None, None]  # one number per channel, the same at every pixel
        h = self.conv_2(F.silu(self.norm_2(h)))
        # [residual-block] Eq. 2, He et al. 2016: y = W_s x + f(x)
        return self.skip(x) + h


class GEGLU(nn.Module):
    """The transformer's feed-forward, gated (Shazeer 2020)."""

    def __init__(self, width: int):
        super().__init__()
        self.linear_1 = Linear(width, 8 * width)
        self.linear_2 = Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, width) -> (B, L, width)"""
        # [geglu] Eq. 5, Shazeer 2020: GEGLU(x) = (xW + b) ⊗ GELU(xV + c), with the exact GELU
        return self.linear_2(geglu(x, self.linear_1))  # width -> 4·width -> width


class AttentionBlock(nn.Module):
    """A transformer layer over the pixels: they look at each other, then at the words, then think."""

    def __init__(self, channels: int, config: UNetConfig):
        super().__init__()
        heads = config.heads_at(channels)
        self.linear_projection = config.linear_projection
        self.norm = nn.GroupNorm(config.groups, channels, eps=1e-6)  # 1e-6 here, 1e-5 in residual blocks
        self.proj_in = self._projection(channels)
        self.norm_1 = nn.LayerNorm(channels)
        self.self_attention = SelfAttention(heads, channels, bias=False)
        self.norm_2 = nn.LayerNorm(channels)
        self.cross_attention = CrossAttention(heads, channels, config.context_width)
        self.norm_3 = nn.LayerNorm(channels)
        self.feed_forward = GEGLU(channels)
        self.proj_out = self._projection(channels)

    def _projection(self, channels: int) -> nn.Module:
        return Linear(channels, channels) if self.linear_projection else Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor | Words) -> Tensor:
        """x (B, C, H, W), context (B', S, context_width) -> (B', C, H, W); B' is a multiple of B"""
        height, width = x.shape[-2:]
        h = self.norm(x)
        if not self.linear_projection:
            h = self.proj_in(h)
        h = h.permute(0, 2, 3, 1).flatten(1, 2)  # (B, C, H, W) -> (B, H·W, C)
        if self.linear_projection:
            h = self.proj_in(h)
        h = h + self.self_attention(self.norm_1(h))
        x, h = as_many_as(context, x), as_many_as(context, h)  # from here on, the halves of guidance differ
        h = h + self.cross_attention(self.norm_2(h), context)
        h = h + self.feed_forward(self.norm_3(h))
        if self.linear_projection:
            h = self.proj_out(h)
        h = h.unflatten(1, (height, width)).permute(0, 3, 1, 2)  # (B, H·W, C) -> (B, C, H, W)
        if not self.linear_projection:
            h = self.proj_out(h)
        return x + h


class Downsample(nn.Module):
    """Halves height and width, rounding up. Padded on all sides, unlike the VAE's."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, ⌈H/2⌉, ⌈W/2⌉)"""
        return self.conv(x)


class Upsample(nn.Module):
    """Grows to the size of the skip that comes next: twice as large, or one less where H was odd."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        """x (B, C, h, w), size (H, W) -> (B, C, H, W)"""
        return upsampled(x, self.conv, size)


class SwitchSequential(nn.Sequential):
    """Layers one after the other; each gets, beside x, what its kind needs."""

    def forward(  # type: ignore[override]
        self, x: Tensor, context: Tensor | Words, time: Tensor, size: torch.Size | None = None
    ) -> Tensor:
        for layer in self:
            if isinstance(layer, ResidualBlock):
                x = layer(x, time)
            elif isinstance(layer, AttentionBlock):
                x = layer(x, context)
            elif isinstance(layer, Upsample):
                x = layer(x, size)
            else:
                x = layer(x)
        return x


class UNet(nn.Module):
    """ε_θ(x_t, t, words), or v_θ: see `ScheduleConfig.prediction_type`."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        time_width = 4 * config.channels[0]

        def build(row: list[Layer]) -> SwitchSequential:
            make = {
                "conv": lambda i, o: Conv2d(i, o, 3, padding=1),
                "res": lambda i, o: ResidualBlock(i, o, time_width, config.groups),
                "attention": lambda i, o: AttentionBlock(o, config),
                "down": lambda i, o: Downsample(o),
                "up": lambda i, o: Upsample(o),
            }
            return SwitchSequential(*(make[kind](i, o) for kind, i, o in row))

        down, middle, up = plan(config)
        self.time_embedding = TimeEmbedding(config.channels[0], config.guidance_width)
        self.down = nn.ModuleList(build(row) for row in down)
        self.middle = build(middle)
        self.up = nn.ModuleList(build(row) for row in up)
        self.norm = nn.GroupNorm(config.groups, config.channels[0], eps=1e-5)
        self.conv_out = Conv2d(config.channels[0], config.out_channels, 3, padding=1)

    def forward(
        self, latents: Tensor, context: Tensor | Words, t: Tensor, guidance: Tensor | None = None
    ) -> Tensor:
        """latents (B, 4, h, w) of any size, context (B', S, width), t (B,) or (1,), 0 … 1000 -> (B', 4, h, w)

        guidance (B,) or (1,): the scale s, for an LCM, whose output is then guided already; others ignore it.

        B' is B, or a multiple: the same latents under other words, as guidance needs them, are computed once
        until they meet the first of the words.
        """
        time = self.time_embedding(t, guidance)  # (B,) -> (B, 1280)
        x, pile = latents, []
        for block in self.down:
            x = block(x, context, time)
            pile.append(x)
        x = self.middle(x, context, time)
        for block in self.up:
            skip = as_many_as(x, pile.pop())
            x = torch.cat([x, skip], dim=1)  # (B, C, h, w), (B, C', h, w) -> (B, C + C', h, w)
            x = block(x, context, time, size=pile[-1].shape[-2:] if pile else None)
        return self.conv_out(F.silu(self.norm(x)))


UNeti = UNet  # the seed's name for it
