"""GroupNorm with SiLU, and the gate of GEGLU, in one pass each, for drawing on a GPU: written in Triton.

PyTorch's GroupNorm on a GPU knows one order of memory, channels first, and the convolutions around it want
the other: for each norm a map is turned round twice, and read and written once more for SiLU. These kernels
leave it as it is. Statistics and all arithmetic are in float32, and rounded once.

Triton comes with PyTorch for CUDA; without it, or with REIFUSION_NATIVE=0, nothing of this is installed.
"""

from __future__ import annotations

import functools
import os
from typing import no_type_check

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..model import diffusion, encoder
from ..model.diffusion import Given
from .fast import GEGLU as FastGEGLU
from .fast import GroupNorm as FastGroupNorm
from .fast import watched
from .graphs import on_gpu

try:
    import triton
    import triton.language as tl
except ImportError:  # there is none for a CPU
    triton = tl = None

PARTS = 32  # of a map's pixels; the statistics of each are found by a program of their own
BLOCK = 4096  # numbers that a program holds at a time


@functools.cache
def available() -> bool:
    """True if there is a GPU of NVIDIA's, and Triton can compile for it, which also takes a C compiler."""
    forbidden = os.environ.get("REIFUSION_NATIVE") == "0"
    if triton is None or forbidden or not torch.cuda.is_available() or torch.version.hip is not None:
        return False
    x = torch.ones(1, 320, 2, 2, device="cuda", dtype=torch.float16).to(memory_format=torch.channels_last)
    try:
        return bool(_normalized(x, nn.GroupNorm(32, 320).to(x), silu=True).isfinite().all())
    except Exception:  # whatever fails between here and the GPU
        return False


# A map (B, C, H, W) with its channels last is pixels × groups × channels of a group in memory. A program
# holds P pixels × G groups × W channels: W is a power of 2, not less than the channels there are.


@no_type_check
def _statistics(
    x, means, spreads, pixels, groups, width,
    PARTS: tl.constexpr, P: tl.constexpr, G: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """The mean of each group in a part of its pixels, and the sum of the squares about it."""
    part, blocks = tl.program_id(0), tl.cdiv(groups, G)
    picture = (tl.program_id(1) // blocks).to(tl.int64)
    group = tl.program_id(1) % blocks * G + tl.arange(0, G)
    channels = tl.arange(0, W)[None, None, :]
    there = (group[None, :, None] < groups) & (channels < width)
    x += picture * pixels * groups * width + group[None, :, None] * width + channels
    per = tl.cdiv(tl.cdiv(pixels, PARTS), P) * P  # pixels of a part
    count, mean, spread = 0.0, tl.zeros([G], tl.float32), tl.zeros([G], tl.float32)
    for start in range(part * per, tl.minimum(part * per + per, pixels), P):
        at = (start + tl.arange(0, P)[:, None, None]).to(tl.int64)
        y = tl.load(x + at * groups * width, mask=there & (at < pixels), other=0.0).to(tl.float32)
        its_count = (tl.minimum(pixels - start, P) * width).to(tl.float32)
        its_mean = tl.sum(tl.sum(y, 2), 0) / its_count
        off = tl.where(there & (at < pixels), y - its_mean[None, :, None], 0.0)
        # Eq. 2.1, Chan et al. 1979: the sums of squares about the mean of two parts become that of the whole
        difference, total = its_mean - mean, count + its_count
        spread += tl.sum(tl.sum(off * off, 2), 0) + difference * difference * count * its_count / total
        mean += difference * its_count / total
        count = total
    found = (picture * groups + group) * PARTS + part
    tl.store(means + found, mean, mask=group < groups)
    tl.store(spreads + found, spread, mask=group < groups)


@no_type_check
def _normalize(
    x, y, weight, bias, means, spreads, pixels, groups, width, eps,
    SILU: tl.constexpr, PARTS: tl.constexpr, P: tl.constexpr, G: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """γ (x - E[x]) / √(Var[x] + ε) + β of some pixels, and SiLU of that."""
    blocks = tl.cdiv(groups, G)
    picture = (tl.program_id(1) // blocks).to(tl.int64)
    group = tl.program_id(1) % blocks * G + tl.arange(0, G)
    parts = tl.arange(0, PARTS)[None, :]
    per = tl.cdiv(tl.cdiv(pixels, PARTS), P) * P
    counts = (tl.minimum(tl.maximum(pixels - parts * per, 0), per) * width).to(tl.float32)
    found, known = (picture * groups + group[:, None]) * PARTS + parts, group[:, None] < groups
    its_means = tl.load(means + found, mask=known, other=0.0)
    count = tl.sum(counts, 1)  # (1,)
    mean = tl.sum(counts * its_means, 1) / count  # (G,)
    off = its_means - mean[:, None]
    spread = tl.sum(tl.load(spreads + found, mask=known, other=0.0) + counts * off * off, 1)
    scale = 1 / tl.sqrt(spread / count + eps)
    channels = tl.arange(0, W)[None, None, :]
    number, at = (
        group[None, :, None] * width + channels,
        tl.program_id(0) * P + tl.arange(0, P)[:, None, None],
    )
    is_channel = (group[None, :, None] < groups) & (channels < width)
    there, memory = is_channel & (at < pixels), (picture * pixels + at) * groups * width + number
    gamma = tl.load(weight + number, mask=is_channel, other=0.0).to(tl.float32)
    beta = tl.load(bias + number, mask=is_channel, other=0.0).to(tl.float32)
    z = tl.load(x + memory, mask=there, other=0.0).to(tl.float32)
    z = (z - mean[None, :, None]) * scale[None, :, None] * gamma + beta
    if SILU:
        z = z * tl.sigmoid(z)
    tl.store(y + memory, z, mask=there)


@no_type_check
def _gate(x, y, rows, width, R: tl.constexpr, W: tl.constexpr):
    """The first half of each row, times GELU of the second."""
    row = (tl.program_id(0) * R + tl.arange(0, R)[:, None]).to(tl.int64)
    column = tl.program_id(1) * W + tl.arange(0, W)[None, :]
    there = (row < rows) & (column < width)
    value = tl.load(x + row * 2 * width + column, mask=there, other=0.0).to(tl.float32)
    gate = tl.load(x + row * 2 * width + width + column, mask=there, other=0.0).to(tl.float32)
    gelu = 0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476))
    tl.store(y + row * width + column, value * gelu, mask=there)


if triton is not None:
    _statistics, _normalize, _gate = map(triton.jit, (_statistics, _normalize, _gate))


def norm_silu(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """F.silu(norm(x)): (B, C, H, W) -> (B, C, H, W)"""
    return _normalized(x, norm, True) if suits(x) and not watched(norm) else F.silu(norm(x))


def suits(x: Tensor) -> bool:
    """True if x (B, C, H, W) is for these kernels, and has its channels last in memory."""
    return is_here(x) and x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)


def is_here(x: Tensor) -> bool:
    """True if x is used to draw on the GPU on which Triton launches, and float32 is not too coarse for it."""
    return on_gpu(x) and x.device.index == torch.cuda.current_device() and x.dtype != torch.float64


def _normalized(x: Tensor, norm: nn.GroupNorm, silu: bool) -> Tensor:
    batch, channels, height, width = x.shape
    pixels, groups, y = height * width, norm.num_groups, torch.empty_like(x)
    means, spreads = x.new_empty(2, batch * groups, PARTS, dtype=torch.float32)
    W = triton.next_power_of_2(channels // groups)
    G = max(1, 64 // W)  # so that 64 channels that lie side by side are read together
    P = max(1, BLOCK // (G * W))
    sizes, blocks = (pixels, groups, channels // groups), batch * triton.cdiv(groups, G)
    _statistics[PARTS, blocks](x, means, spreads, *sizes, PARTS, P, G, W)
    grid = triton.cdiv(pixels, P), blocks
    _normalize[grid](x, y, norm.weight, norm.bias, means, spreads, *sizes, norm.eps, silu, PARTS, P, G, W)
    return y


class GroupNorm(FastGroupNorm):
    """Of maps whose channels are last in memory, which it leaves so."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, …) -> (B, C, …)"""
        return _normalized(x, self, False) if suits(x) else super().forward(x)


class UNetResidualBlock(diffusion.ResidualBlock):
    """x + f(x, time), with each norm and SiLU in one."""

    def forward(self, x: Tensor, given: Given) -> Tensor:
        """x (B, in, H, W) -> (B, out, H, W)"""
        h = self.conv_1(norm_silu(x, self.norm_1))
        h = h + self.time(F.silu(given.time))[:, :, None, None]
        return self.skip(x) + self.conv_2(norm_silu(h, self.norm_2))


class VAEResidualBlock(encoder.ResidualBlock):
    """x + f(x), with each norm and SiLU in one."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H, W)"""
        return self.skip(x) + self.conv_2(norm_silu(self.conv_1(norm_silu(x, self.norm_1)), self.norm_2))


class GEGLU(FastGEGLU):
    """The feed-forward, with the gate in one."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, width) -> (B, L, width)"""
        if not is_here(x):
            return super().forward(x)
        h = self.linear_1(x).contiguous()  # (B, L, 2F)
        y = h.new_empty(*h.shape[:-1], h.shape[-1] // 2)
        rows, width = h.shape[:-1].numel(), y.shape[-1]
        _gate[triton.cdiv(rows, 16), triton.cdiv(width, 256)](h, y, rows, width, 16, 256)
        return self.linear_2(y)


FORMS: dict[type[nn.Module], type[nn.Module]] = {
    nn.GroupNorm: GroupNorm,
    diffusion.ResidualBlock: UNetResidualBlock,
    encoder.ResidualBlock: VAEResidualBlock,
    diffusion.GEGLU: GEGLU,
}
