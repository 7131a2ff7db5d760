"""The decoder on a GPU, where its maps are large: some rows at a time, made when they are asked for.

A layer is a function from rows to rows. The map that an upsampling makes, and what a residual block computes
inside of it, are never stored: their rows are made as often as they are needed, for the statistics of each
GroupNorm and for the result, which takes the place of the block's input. That is half as much arithmetic
again, in a quarter of the memory. On a CPU, where arithmetic is dear, `bands.py` stores more.

Memory is all that PyTorch allocates beside weights and latents, including the room that cuDNN asks for. At
1024² in half precision, the layers as they are took 1,879 MB of an H200. By rows, the map of 128 channels and
the one that it is made of are stored (268 and 134 MB), bands take 32 MB, and cuDNN's room comes on top. A
first version made the last layer from 171 MB at a time and took 645 MB there; counting had foretold 644.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..model import decoder
from ..model.config import VAEConfig
from ..model.encoder import ResidualBlock, unscale_latents
from .fast import watched
from .graphs import on_gpu

LARGE = 2**28  # bytes of a map; there is room for smaller ones
BAND = 2**22  # bytes of a map, about: what is made at a time


@dataclass
class Map:
    """A map (1, C, H, W), of which any rows can be had."""

    channels: int
    height: int
    width: int
    dtype: torch.dtype
    rows: Callable[[int, int], Tensor]  # top, bottom -> (1, C, bottom - top, W)
    memory: Tensor | None = None  # (1, C, H, W), if it is stored
    made_of: int = 0  # channels of the map that its rows are made of

    def bands(self) -> Iterator[tuple[int, int]]:
        """Yields top and bottom of bands, each of two rows at least, but for the last.

        A band, or what it is made of, has about BAND bytes: the picture has 3 channels, and comes from 128.
        """
        rows = max(2, BAND // (max(self.channels, self.made_of) * self.width * self.dtype.itemsize))
        for top in range(0, self.height, rows):
            yield top, min(top + rows, self.height)


def suits(network: decoder.Decoder, latents: Tensor) -> bool:
    """True if the largest map, what the last upsampling makes, is large, and no hook watches the layers.

    Not in float64, for which the statistics are too coarse.
    """
    layers = (module for module in network.modules() if module is not network)
    return (
        largest(network.config, latents) * latents.element_size() > LARGE
        and on_gpu(latents)
        and latents.dtype != torch.float64
        and not any(map(watched, layers))
    )


def largest(config: VAEConfig, latents: Tensor) -> int:
    """Returns the numbers in the decoder's largest map for a picture, which the last upsampling makes."""
    return config.channels[:2][-1] * latents.shape[-2] * latents.shape[-1] * config.factor**2


def decode(network: decoder.Decoder, latents: Tensor) -> Tensor:
    """`Decoder.forward`: scaled latents (B, 4, h, w) -> pictures (B, 3, 8h, 8w)"""
    x = network.middle(network.conv_in(network.post_quant(unscale_latents(latents, network.config))))
    parts = list(x.split(1))
    del x  # its memory is for the first maps, and then for others
    return torch.cat([_decode(network, parts.pop(0)) for _ in range(len(parts))])


def _decode(network: decoder.Decoder, x: Tensor) -> Tensor:
    """(1, C, h, w) after the middle, which is overwritten -> the picture (1, 3, 8h, 8w)"""
    now = stored(x.contiguous(memory_format=torch.channels_last))
    del x
    for block in itertools.chain(*network.up):
        if isinstance(block, ResidualBlock):
            now = stored(made(residual(now, block), now.memory))
        else:
            now = convolved(enlarged(now), block.conv)
    return made(convolved(now, network.conv_out, normed(now, network.norm)))


def stored(x: Tensor) -> Map:
    """A map that is there: x (1, C, H, W)"""
    _, channels, height, width = x.shape
    return Map(channels, height, width, x.dtype, lambda top, bottom: x[:, :, top:bottom], x)


def enlarged(x: Map) -> Map:
    """Every pixel four times: (1, C, H, W) -> (1, C, 2H, 2W)"""

    def rows(top: int, bottom: int) -> Tensor:
        large = F.interpolate(x.rows(top // 2, (bottom + 1) // 2), scale_factor=2.0, mode="nearest")
        return large[:, :, top % 2 :][:, :, : bottom - top]

    return Map(x.channels, 2 * x.height, 2 * x.width, x.dtype, rows)


def convolved(x: Map, conv: nn.Conv2d, before: Callable[[Tensor], Tensor] = lambda rows: rows) -> Map:
    """A 3×3 convolution, padded by 1, of before(x): (1, C, H, W) -> (1, C', H, W)"""

    def rows(top: int, bottom: int) -> Tensor:
        window = before(x.rows(max(top - 1, 0), min(bottom + 1, x.height)))
        if top == 0 or bottom == x.height:
            window = F.pad(window, (0, 0, int(top == 0), int(bottom == x.height)))
        return F.conv2d(window, conv.weight, conv.bias, padding=(0, 1))

    return Map(conv.out_channels, x.height, x.width, x.dtype, rows, made_of=x.channels)


def normed(x: Map, norm: nn.GroupNorm) -> Callable[[Tensor], Tensor]:
    """silu(norm(x)), as a function of rows of x. Makes all rows of x, for the statistics."""
    channels, groups = x.channels // norm.num_groups, norm.num_groups
    shares, means, variances = [], [], []  # of the bands; the latter (G,)
    for top, bottom in x.bands():
        rows = x.rows(top, bottom).unflatten(1, (groups, channels)).float()  # -> (1, G, C/G, h, W)
        variance, mean = torch.var_mean(rows, (0, 2, 3, 4), correction=0)
        shares.append((bottom - top) / x.height)
        means.append(mean.double())
        variances.append(variance.double())
    zero = torch.zeros_like(means[0])
    mean = sum((share * m for share, m in zip(shares, means)), zero)
    # Eq. 2.1, Chan et al. 1979: the spread of the whole is that of its parts, and that of their means
    spread = (share * (v + (m - mean) ** 2) for share, v, m in zip(shares, variances, means))
    of_mean, of_variance = (y.repeat_interleave(channels).float() for y in (mean, sum(spread, zero)))
    weight, bias = norm.weight.float(), norm.bias.float()

    def before(rows: Tensor) -> Tensor:
        # GroupNorm whose statistics are known is BatchNorm.
        y = F.batch_norm(rows, of_mean, of_variance, weight, bias, eps=norm.eps)
        return F.silu(y, inplace=True)

    return before


def residual(x: Map, block: ResidualBlock) -> Map:
    """`ResidualBlock.forward`: (1, C, H, W) -> (1, C', H, W)"""
    h = convolved(x, block.conv_1, normed(x, block.norm_1))
    y = convolved(h, block.conv_2, normed(h, block.norm_2))
    return Map(
        y.channels,
        x.height,
        x.width,
        x.dtype,
        lambda top, bottom: block.skip(x.rows(top, bottom)) + y.rows(top, bottom),
    )


def made(x: Map, room: Tensor | None = None) -> Tensor:
    """All rows of a map: (1, C, H, W). They are written over room, if that has their shape.

    Rows of x may be made of those at the same place of the room, and of two above and two below.
    """
    shape = (1, x.channels, x.height, x.width)
    waiting: tuple[slice, Tensor] | None = None  # not written yet, as the next band sees what is there
    for top, bottom in x.bands():
        rows = x.rows(top, bottom)
        if room is None or room.shape != shape:
            room = torch.empty(shape, dtype=x.dtype, device=rows.device, memory_format=torch.channels_last)
        if waiting is not None:
            room[:, :, waiting[0]] = waiting[1]
        waiting = slice(top, bottom), rows
    assert room is not None and waiting is not None
    room[:, :, waiting[0]] = waiting[1]
    return room
