"""Weights kept in 8-bit floating point, and widened for each use: half the memory, and the same arithmetic.

As AUTOMATIC1111's web UI has it: the weights of linear layers and convolutions, in the U-Net or transformer
and in the text encoders; neither the VAE nor norms. A number of the kind e4m3 has 3 bits behind its first
(Micikevicius et al. 2022, "FP8 Formats for Deep Learning", arXiv:2209.05433, Table 1), so a weight is off by
up to 1/16 of itself, and one below 2⁻⁶ by up to 2⁻¹⁰: the smallest become 0. The picture is another. Off
unless asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from ..kernels import fast
from ..swap import swap

if TYPE_CHECKING:
    from ..model.pipeline import StableDiffusion

KIND = torch.float8_e4m3fn
LARGEST = torch.finfo(KIND).max  # 448


def store(pipe: StableDiffusion | Mapping[str, nn.Module]) -> None:
    """Keeps the weights of the U-Net, or transformer, and of the text encoders in 8 bits, in place, for good.

    pipe: a model, or a dict of its networks. LoRAs are to be added before: later they find no weights.
    """
    models = pipe if isinstance(pipe, Mapping) else pipe.models
    for name, network in models.items():
        if name not in ("encoder", "decoder"):
            for layer in network.modules():
                if type(layer) in (nn.Linear, nn.Conv2d, fast.Linear, fast.Conv2d):
                    store_layer(cast("nn.Linear | nn.Conv2d", layer))


def store_layer(layer: nn.Linear | nn.Conv2d) -> None:
    """Keeps the weight of one layer in 8 bits, in place and for good."""
    weight = layer.weight.detach()
    del layer.weight
    # Beyond the largest there is no number. As whole numbers, `.to(dtype)` leaves them alone.
    layer.register_buffer("kept", weight.clamp(-LARGEST, LARGEST).to(KIND).view(torch.uint8))
    layer.requires_grad_(False)
    by = Fp8Conv2d if isinstance(layer, nn.Conv2d) else Fp8Linear
    swap(layer, by, widened_to=weight.dtype)


class _Fp8:
    """A layer whose weight is widened whenever it is asked for."""

    kept: Tensor  # the weight of 8 bits, as whole numbers
    widened_to: torch.dtype

    @property
    def weight(self) -> Tensor:
        """The weight in the dtype that it had."""
        return self.kept.view(KIND).to(self.widened_to)


class Fp8Linear(_Fp8, nn.Linear):  # type: ignore[override]  # a weight that is made, and not set
    """x Wᵀ + b"""


class Fp8Conv2d(_Fp8, nn.Conv2d):  # type: ignore[override]
    """A convolution."""
