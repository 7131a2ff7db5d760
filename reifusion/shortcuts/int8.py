"""Weights of 8 bits and products of whole numbers: half the memory, and on some CPUs less time.

Dettmers et al. 2022, "LLM.int8()", arXiv:2208.07339, without its exceptions for outliers: the rows of a
weight are scaled once, its input in every call. Off unless asked for, since it changes the picture. On a CPU
without instructions for it (VNNI), and on a GPU, weights are widened for each use: that saves memory alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..families import mmdit
from ..kernels.fast import inferring
from ..model.diffusion import AttentionBlock, ResidualBlock
from ..swap import swap

if TYPE_CHECKING:
    from ..model.pipeline import StableDiffusion

LEAST = 512  # terms of a sum; where there are fewer, scaling takes longer than multiplying
ROWS = 256  # at a time, so that their sums of 32 bits stay in the cache


def quantize(pipe: StableDiffusion | Mapping[str, nn.Module]) -> None:
    """Gives the large weights of the U-Net, or of the transformer, 8 bits each, in place and for good.

    pipe: a model, or a dict with its "diffusion". LoRAs are to be added before: later they find no weights.
    """
    models = pipe if isinstance(pipe, Mapping) else pipe.models
    for block in models["diffusion"].modules():
        if isinstance(block, ResidualBlock | AttentionBlock | mmdit.Block):
            for layer in block.modules():
                if not isinstance(layer, nn.Linear | nn.Conv2d) or not isinstance(layer.weight, nn.Parameter):
                    continue  # the latter has 8 bits already
                if layer.weight[0].numel() >= LEAST:
                    quantize_layer(layer)


def quantize_layer(layer: nn.Linear | nn.Conv2d) -> None:
    """Gives the weight of one layer 8 bits, in place and for good."""
    weight = layer.weight.detach()
    if weight.ndim == 4:
        weight = weight.permute(0, 2, 3, 1).flatten(1)  # (out, in, k, k) -> (out, k·k·in)
    rows, scale = whole_numbers(weight, (1,))
    del layer.weight
    layer.register_buffer("weight", rows)
    layer.register_buffer("scale", scale.flatten())
    layer.requires_grad_(False)
    swap(layer, Int8Conv2d if isinstance(layer, nn.Conv2d) else Int8Linear)


def whole_numbers(x: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Returns x as int8 in ±127, and the float32 scale that makes it x again: one scale along the axes."""
    scale = x.abs().amax(axes, keepdim=True).float().clamp(min=1e-12) / 127
    # §2.1, Dettmers et al. 2022: x₈ = ⌊127 x / max|x|⌉
    return (x / scale).round_().to(torch.int8), scale


class _Int8(nn.Module):
    """A layer whose weight is int8, (out, in), with a scale for each row."""

    weight: Tensor  # (out, in), int8
    scale: Tensor  # (out,)
    bias: Tensor | None

    def widened(self, dtype: torch.dtype) -> Tensor:
        """The weight in a floating-point dtype, rounded."""
        return (self.weight * self.scale[:, None]).to(dtype)

    def multiply(self, rows: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """int8 (M, in), times scale (M, 1), times the weight -> (M, out)"""
        sums = torch._int_mm(rows, self.weight.t()).float()  # whole numbers of 32 bits: exact
        # §2.1, Dettmers et al. 2022: x W ≈ s_x s_W (x₈ W₈)
        sums.mul_(scale).mul_(self.scale)
        return (sums if self.bias is None else sums.add_(self.bias)).to(dtype)


def _suits(x: Tensor) -> bool:
    """True if the CPU multiplies whole numbers fast, and no derivative is asked for: they have none."""
    vnni = getattr(torch.cpu, "_is_vnni_supported", bool)()
    return inferring() and x.device.type == "cpu" and vnni


class Int8Linear(_Int8):
    """x Wᵀ + b, each row of x with its own scale."""

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out)"""
        rows = x.flatten(0, -2)
        if not _suits(x):
            return F.linear(x, self.widened(x.dtype), self.bias)
        out = x.new_empty(len(rows), len(self.weight))
        for part, to in zip(rows.split(ROWS), out.split(ROWS)):
            to.copy_(self.multiply(*whole_numbers(part, (1,)), x.dtype))
        return out.unflatten(0, x.shape[:-1])


class Int8Conv2d(_Int8):
    """A convolution of 1×1, or of 3×3 padded by 1. Where pixels are shared, a picture has one scale."""

    kernel_size: tuple[int, int]

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H, W)"""
        size = self.kernel_size[0]
        if not _suits(x):
            kernel = (
                self.widened(x.dtype)
                .unflatten(1, (self.kernel_size[0], self.kernel_size[0], -1))
                .permute(0, 3, 1, 2)
            )
            return F.conv2d(x, kernel, self.bias, padding=self.kernel_size[0] // 2)
        size = self.kernel_size[0]
        pad, width = size // 2, x.shape[3]
        whole, scale = whole_numbers(x, (1, 2, 3))  # (B, in, H, W), (B, 1, 1, 1)
        whole = F.pad(whole.permute(0, 2, 3, 1), (0, 0, pad, pad, pad, pad))  # (B, H + 2, W + 2, in)
        windows = whole.unfold(1, size, 1).unfold(2, size, 1)  # (B, H, W, in, k, k)
        out = x.new_empty(*windows.shape[:3], len(self.weight))
        for part, to in zip(*(y.split(max(1, ROWS // (len(x) * width)), dim=1) for y in (windows, out))):
            rows = part.permute(0, 1, 2, 4, 5, 3).reshape(-1, self.weight.shape[1])
            scales = scale.expand(-1, *part.shape[1:3], 1).reshape(-1, 1)
            to.copy_(self.multiply(rows, scales, x.dtype).view(to.shape))
        return out.permute(0, 3, 1, 2)
