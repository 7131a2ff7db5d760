"""The decoder's large maps, a band of rows at a time and in place: on a CPU, half the memory.

A convolution sees one row above and one row below, so a band can be computed from its own rows and those two.
Only GroupNorm sees the whole map. Its two numbers for each group are therefore computed first, in a pass of
their own, and then used in every band. Nothing is blended, and nothing depends on the height of a band.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..model import decoder
from ..model.encoder import ResidualBlock, unscale_latents
from . import rows as by_rows
from .fast import inferring, watched
from .graphs import Recorded, played

BAND = 2**22  # bytes, about: small beside a map, large beside the overhead of a call


class Decoder(decoder.Decoder, Recorded):
    """The VAE's decoder, which works in bands or by rows where its maps are large."""

    def forward(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, 4, h, w) -> picture (B, 3, 8h, 8w), about [-1, 1] (not clamped)."""
        if by_rows.suits(self, latents):
            return by_rows.decode(self, latents)
        if not suits(self, latents, by_rows.largest(self.config, latents) // 2):
            return played(self, super().forward, latents)
        x = self.middle(self.conv_in(self.post_quant(unscale_latents(latents, self.config))))
        return torch.cat([self._in_bands(part) for part in x.split(1)])

    def _in_bands(self, x: Tensor) -> Tensor:
        """(1, C, h, w) after the middle -> the picture (1, 3, 8h, 8w)"""
        x = run(itertools.chain(*self.up), x)
        return torch.cat([y for _, y in norm_silu_conv(x, self.norm, self.conv_out)], dim=2)


def suits(network: nn.Module, x: Tensor, numbers: int) -> bool:
    """True if maps with that many numbers fill some bands, and no hook watches the layers."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.bfloat16, torch.float32)
        and numbers * x.element_size() > 2 * BAND
        and inferring()
        and not any(watched(module) for module in network.modules() if module is not network)
    )


def run(blocks: Iterable[nn.Module], x: Tensor) -> Tensor:
    """Does `for block in blocks: x = block(x)`, and overwrites x: (1, C, h, w) -> (1, C', H, W)"""
    x, room = x.contiguous(memory_format=torch.channels_last), None
    for block in blocks:
        if isinstance(block, ResidualBlock):
            x, room = _residual(block, x, room)
        else:
            x, room = x.contiguous(memory_format=torch.channels_last), None
            x = block(x)
    return x


def norm_silu_conv(x: Tensor, norm: nn.GroupNorm, conv: nn.Conv2d) -> Iterator[tuple[slice, Tensor]]:
    """Yields conv(silu(norm(x))) band by band: the rows and their values. Then x may lose these rows."""
    height = x.shape[2]
    mean, var = group_statistics(x, norm)
    weight, bias = norm.weight.float(), norm.bias.float()
    zeros = torch.zeros_like(_rows(x, 0, 1))  # the convolution's padding, and silu(0) = 0
    above = zeros
    for rows in bands(x):
        # GroupNorm whose statistics are known is BatchNorm. One row more than the band: the one below.
        h = F.batch_norm(_rows(x, rows.start, rows.stop + 1), mean, var, weight, bias, eps=norm.eps)
        window = torch.cat([above, h] + [zeros] * (rows.stop == height), dim=2)
        above = h[:, :, rows.stop - rows.start - 1 :][:, :, :1].clone()  # before the caller overwrites it
        yield rows, F.conv2d(F.silu(window, inplace=True), conv.weight, conv.bias, padding=(0, 1))


def group_statistics(x: Tensor, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
    """Returns mean and variance of each channel's group over all pixels of x (1, C, H, W): each (C,)."""
    channels, groups = norm.num_channels, norm.num_groups
    one, zero = torch.ones(channels), torch.zeros(channels)
    count, mean, spread = 0, torch.zeros(groups).double(), torch.zeros(groups).double()
    for rows in bands(x):
        part = _rows(x, rows.start, rows.stop)
        pixels = part.shape[2] * part.shape[3]
        _, its_mean, rstd = torch.native_group_norm(part, one, zero, 1, channels, pixels, groups, norm.eps)
        its_count = pixels * channels // groups
        its_spread = (rstd[0].double() ** -2 - norm.eps) * its_count
        # Eq. 2.1, Chan et al. 1979: the sums of squares about the mean of two parts become that of the whole
        difference, total = its_mean[0] - mean, count + its_count
        spread += its_spread + difference**2 * (count * its_count / total)
        mean += difference * (its_count / total)
        count = total
    of_channel = [each.repeat_interleave(channels // groups).float() for each in (mean, spread / count)]
    return of_channel[0], of_channel[1].clamp(min=0)


def bands(x: Tensor) -> Iterator[slice]:
    """Yields the rows of a map, cut into bands of about BAND bytes."""
    rows = max(1, BAND // (x[:, :, 0].numel() * x.element_size()))
    for top in range(0, x.shape[2], rows):
        yield slice(top, min(top + rows, x.shape[2]))


def _rows(x: Tensor, start: int, stop: int) -> Tensor:
    return x[:, :, start:stop].contiguous(memory_format=torch.channels_last)


def _residual(block: ResidualBlock, x: Tensor, room: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns the block's output, in the memory of x, and a second map whose memory is free for use."""
    height, width = x.shape[-2:]
    wide, narrow = block.conv_1.in_channels, block.conv_1.out_channels
    if wide == narrow:
        out, h = x, torch.empty_like(x) if room is None else room
        for rows, y in norm_silu_conv(x, block.norm_1, block.conv_1):
            h[:, :, rows] = y
    else:
        halves = x.permute(0, 2, 3, 1) if wide == 2 * narrow else x.new_empty(1, height, width, 2 * narrow)
        # A row of x makes room for a row of h and a row of out: (1, H, 2, W, C/2) -> twice (1, C/2, H, W)
        h, out = halves.view(1, height, 2, width, narrow).permute(2, 0, 4, 1, 3)
        for rows, y in norm_silu_conv(x, block.norm_1, block.conv_1):
            skip = block.skip(x[:, :, rows])
            h[:, :, rows], out[:, :, rows] = y, skip
    for rows, y in norm_silu_conv(h, block.norm_2, block.conv_2):
        out[:, :, rows] += y
    return out, h
