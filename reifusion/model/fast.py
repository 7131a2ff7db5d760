"""The same arithmetic in fewer turns, for drawing on a CPU. What each function buys is in bench/NOTES.md.

All of it is PyTorch and keeps nothing between calls, so that weights may change at any time. `drawing` says
where it is used: on a CPU, without gradients. Everywhere else the plain form runs, which stands first in each
function. The tests hold the two equal.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def drawing(x: Tensor) -> bool:
    """Is x on its way to a picture, on a CPU, and not to a gradient or a compiler?"""
    return (
        x.device.type == "cpu"
        and x.dtype in _DTYPES
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")  # which knows the plain forms only
        and not torch.compiler.is_compiling()
    )


# What oneDNN computes in on this CPU.
_DTYPES = [torch.float32] if torch.backends.mkldnn.is_available() else []
if _DTYPES and torch.ops.mkldnn._is_mkldnn_bf16_supported():
    _DTYPES.append(torch.bfloat16)


def _bare(module: nn.Module, kind: type) -> bool:
    """Does nobody stand around the module (LoRA) or watch it (a hook)? Then it need not be called by name."""
    return type(module) is kind and not module._forward_hooks and not module._forward_pre_hooks


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # oneDNN adds the bias as it writes; PyTorch's addmm fills the output with it first, another turn. And in
    # float32 PyTorch would call MKL, which on AMD's processors is half as fast.
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


class Linear(nn.Linear):
    """x Wᵀ + b"""

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out)"""
        if not drawing(x):
            return super().forward(x)
        return _multiply(x, self.weight, self.bias)


class Conv2d(nn.Conv2d):
    """A convolution; where weights outweigh pixels, as a matrix product."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H', W')"""
        plain = (self.kernel_size, self.stride, self.padding) != ((3, 3), (1, 1), (1, 1))
        # oneDNN's convolution brings the weights into another order on each call. That is nothing beside the
        # work at 64×64 and three quarters of the time at 8×8.
        if plain or self.weight.numel() < 10 * x.numel() or not drawing(x):
            return super().forward(x)
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)  # (out, in, 3, 3) -> (out, 9·in)
        y = _multiply(_patches(x, 3), weight, self.bias)  # (B, H, W, 9·in) -> (B, H, W, out)
        return y.permute(0, 3, 1, 2)


def _patches(x: Tensor, size: int) -> Tensor:
    """What each output pixel of a convolution padded by 1 looks at: (B, C, H, W) -> (B, H', W', size²·C)"""
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))  # (B, H+2, W+2, C)
    windows = padded.unfold(1, size, 1).unfold(2, size, 1)  # (B, H', W', C, size, size)
    return windows.permute(0, 1, 2, 4, 5, 3).flatten(3)


def geglu(x: Tensor, linear: nn.Linear) -> Tensor:
    """(xW + b) ⊗ GELU(xV + c), with the exact GELU: (B, L, width) -> (B, L, 4·width)"""
    if not (drawing(x) and _bare(linear, Linear)):
        value, gate = linear(x).chunk(2, dim=-1)
        return value * F.gelu(gate)
    # The same, GELU and product done as oneDNN writes its results.
    (W, V), (b, c) = linear.weight.chunk(2), linear.bias.chunk(2)
    gate = torch.ops.mkldnn._linear_pointwise.default(x, V, c, "gelu", [], "none")
    return torch.ops.mkldnn._linear_pointwise.binary(x, gate, W, b, "mul")


# Of the three rows that a 3×3 kernel sees in an enlarged picture, two are the same pixel's. From an even
# row it sees the pixel above once and its own twice, from an odd row its own twice and the one below.
# So with columns.
_ROWS = torch.tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])  # (phase, row of 2, row of 3)
_PHASES = torch.einsum("pak,qbl->pqabkl", _ROWS, _ROWS).reshape(4, 4, 9)  # (phase, pixel of 2×2, of 3×3)


def upsampled(x: Tensor, conv: nn.Conv2d, size: torch.Size | tuple[int, int]) -> Tensor:
    """Grown to `size` by repeating pixels, then smoothed. x (B, C, h, w) -> (B, C', H, W)"""
    batch, _, height, width = x.shape
    doubled = tuple(size) == (2 * height, 2 * width)
    if not (doubled and drawing(x) and _bare(conv, Conv2d)):
        return conv(F.interpolate(x, size=size, mode="nearest"))
    # The same: four 2×2 kernels on the small picture, one for each pixel that grows out of one. 16 products
    # for four pixels, where the 3×3 kernel needs 36. Sums of weights are rounded once more.
    weight = conv.weight.permute(2, 3, 0, 1).flatten(0, 1)  # (C', C, 3, 3) -> (9, C', C)
    kernels = torch.einsum("pak,koi->paoi", _PHASES.to(x.dtype), weight)  # -> (4 phases, 2×2, C', C)
    y = torch.empty(batch, conv.out_channels, *size, dtype=x.dtype, memory_format=torch.channels_last)
    for top in range(0, height, 32):  # some rows at a time, for the sake of memory
        rows = min(32, height - top)
        window = F.pad(x, (1, 1, 1 - top, top + rows + 1 - height))  # (B, C, rows + 2, w + 2)
        for phase, kernel in enumerate(kernels):
            i, j = divmod(phase, 2)
            kernel = kernel.unflatten(0, (2, 2)).permute(2, 3, 0, 1)  # -> (C', C, 2, 2)
            seen = window[:, :, i : i + rows + 1, j : j + width + 1]
            y[:, :, 2 * top + i : 2 * (top + rows) : 2, j::2] = F.conv2d(seen, kernel, conv.bias)
    return y
