"""The same arithmetic in fewer passes over memory, for drawing on a CPU. bench/NOTES.md has what each buys.

All of it is PyTorch and keeps nothing between calls, so that weights may change at any time. A fast form is
used where `drawing` is true; everywhere else the plain `forward` of the class runs that it stands on.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.nn import functional as F

from ..model import decoder, diffusion
from ..model.diffusion import Given


def drawing(x: Tensor) -> bool:
    """True if x is used to draw on a CPU: no derivative, autocast or compiler needs the plain form."""
    return x.device.type == "cpu" and x.dtype in _DTYPES and inferring()


def inferring() -> bool:
    """True if nothing but numbers is wanted of the networks: no derivative, graph, or batch in a batch."""
    return (
        not torch.compiler.is_compiling()  # torch.compile and torch.export read no further than this
        and torch.is_inference_mode_enabled()  # neither backward nor forward mode
        and torch._C._functorch.peek_interpreter_stack() is None  # … but torch.func has its way even there
        and not torch.is_autocast_enabled("cpu")  # autocast knows the plain forms only
        and not torch.jit.is_tracing()  # for TorchScript or ONNX
    )


# The dtypes in which oneDNN computes on this CPU.
_DTYPES = [torch.float32] if torch.backends.mkldnn.is_available() else []
if _DTYPES and torch.ops.mkldnn._is_mkldnn_bf16_supported():
    _DTYPES.append(torch.bfloat16)


def bare(module: nn.Module, kind: type) -> bool:
    """True if the module is of that kind and no hook watches it, so that its call may be skipped."""
    return type(module) is kind and not watched(module)


def watched(module: nn.Module) -> bool:
    """True if a hook is to be called with the module's inputs or output."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


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
    """Gathers what each output of a convolution padded by 1 sees: (B, C, H, W) -> (B, H', W', size²·C)"""
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))  # (B, H+2, W+2, C)
    windows = padded.unfold(1, size, 1).unfold(2, size, 1)  # (B, H', W', C, size, size)
    return windows.permute(0, 1, 2, 4, 5, 3).flatten(3)


class GroupNorm(nn.GroupNorm):
    """PyTorch's, which in forward mode and under torch.func only reads maps in the usual order of memory."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, …) -> (B, C, …)"""
        if not torch.compiler.is_compiling():
            transformed = torch._C._functorch.peek_interpreter_stack() is not None
            x = x.contiguous() if transformed or unpack_dual(x).tangent is not None else x
        return super().forward(x)


class GEGLU(diffusion.GEGLU):
    """The feed-forward, with GELU and the product done while oneDNN writes its results."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, width) -> (B, L, width)"""
        linear = self.linear_1
        if not (drawing(x) and bare(linear, Linear)):
            return super().forward(x)
        (W, V), (b, c) = linear.weight.chunk(2), linear.bias.chunk(2)
        gate = torch.ops.mkldnn._linear_pointwise.default(x, V, c, "gelu", [], "none")
        return self.linear_2(torch.ops.mkldnn._linear_pointwise.binary(x, gate, W, b, "mul"))


class UNetUpsample(diffusion.Upsample):
    """The U-Net's upsampling, where it doubles both sides, on the small map."""

    def forward(self, x: Tensor, given: Given) -> Tensor:
        """(B, C, H, W) -> (B, C, 2H, 2W), or (B, C, *given.size)"""
        doubled = given.size is None or tuple(given.size) == tuple(2 * side for side in x.shape[-2:])
        if doubled and drawing(x) and bare(self.conv, Conv2d):
            return doubled_and_smoothed(x, self.conv)
        return super().forward(x, given)


class VAEUpsample(decoder.Upsample):
    """The VAE's upsampling, on the small map."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 2H, 2W)"""
        if drawing(x) and bare(self.conv, Conv2d):
            return doubled_and_smoothed(x, self.conv)
        return super().forward(x)


# Of the three rows that a 3×3 kernel sees in an enlarged map, two repeat the same pixel. From an even row the
# kernel sees the pixel above once and its own pixel twice; from an odd row, its own pixel twice and the pixel
# below once. The same holds for columns.
_ROWS = torch.tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])  # (phase, row of 2, row of 3)
_PHASES = torch.einsum("pak,qbl->pqabkl", _ROWS, _ROWS).reshape(4, 4, 9)  # (phase, pixel of 2×2, of 3×3)


def doubled_and_smoothed(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """`conv` of x with every pixel repeated four times: x (B, C, h, w) -> (B, C', 2h, 2w)

    Four 2×2 kernels on the small map, one for each pixel that grows out of one. That is 16 products for four
    pixels, where the 3×3 kernel needs 36. Sums of weights are rounded once more.
    """
    batch, _, height, width = x.shape
    weight = conv.weight.permute(2, 3, 0, 1).flatten(0, 1)  # (C', C, 3, 3) -> (9, C', C)
    kernels = torch.einsum("pak,koi->paoi", _PHASES.to(x.dtype), weight)  # -> (4 phases, 2×2, C', C)
    size = (batch, conv.out_channels, 2 * height, 2 * width)
    y = torch.empty(size, dtype=x.dtype, memory_format=torch.channels_last)
    for top in range(0, height, 32):  # some rows at a time, for the sake of memory
        rows = min(32, height - top)
        window = F.pad(x, (1, 1, 1 - top, top + rows + 1 - height))  # (B, C, rows + 2, w + 2)
        for phase, kernel in enumerate(kernels):
            i, j = divmod(phase, 2)
            kernel = kernel.unflatten(0, (2, 2)).permute(2, 3, 0, 1)  # -> (C', C, 2, 2)
            seen = window[:, :, i : i + rows + 1, j : j + width + 1]
            y[:, :, 2 * top + i : 2 * (top + rows) : 2, j::2] = F.conv2d(seen, kernel, conv.bias)
    return y
