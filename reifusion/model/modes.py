"""Running a network: with derivatives or at full speed, and once more where its numbers grew too large."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .finite import finite


def as_gradients_are(network: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The network: with derivatives where gradients are on, and otherwise at full speed, in inference mode.

    Its output is always an ordinary tensor, fit for a graph.
    """

    def run(*inputs: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return network(*inputs)
        with torch.inference_mode():
            output = network(*inputs)
        return output.clone()

    return run


def decoded(decoder: nn.Module, z: Tensor) -> Tensor:
    """(1, 4, H/8, W/8) -> (1, 3, H, W). In float32 if the decoder's own dtype is too small."""
    decode, dtype = as_gradients_are(decoder), dtype_of(decoder)
    pixels = decode(z.to(dtype))
    if not pixels.isfinite().all() and z.isfinite().all():  # half precision ends at 65504
        warnings.warn(f"the VAE overflowed in {dtype}: decoded again in float32", stacklevel=1)
        decoder.float()
        pixels = decode(z.float())
        decoder.to(dtype)
    if not z.isfinite().all():
        raise FloatingPointError("the latents overflowed; try float32, or less guidance")
    return finite(pixels, "the VAE's decoder", decoder)


def dtype_of(network: nn.Module) -> torch.dtype:
    return next(network.parameters()).dtype
