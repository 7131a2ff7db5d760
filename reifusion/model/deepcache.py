"""The U-Net's inside, computed on every N-th call only: between steps it hardly changes.

Ma, Fang & Wang 2023, "DeepCache: Accelerating Diffusion Models for Free", arXiv:2312.00858. Off unless asked
for, since it changes the picture.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .attention import Words
from .diffusion import UNet, as_many_as


class DeepCache:
    """Stands in for a U-Net during one generation. Calls 0, N, 2N, … are whole; the others only skim it.

    unet: is not changed. every: N; with 1 each call is whole.
    """

    def __init__(self, unet: UNet, every: int):
        self.unet = unet
        self.every = every
        self._skimmed = 0  # calls since the last whole one
        self._deep: Tensor | None = None  # what the last row of the way up got from below, (B', C, h, w)

    def __call__(self, latents: Tensor, context: Tensor | Words, *told: Tensor) -> Tensor:
        """The arguments and the output are those of `UNet.forward`."""
        deep = self._deep
        # More pictures than were kept: guidance sets in.
        if deep is None or len(deep) < len(context) or self._skimmed + 1 >= self.every:
            self._skimmed = 0
            return self._whole(latents, context, *told)
        self._skimmed += 1
        return self._shallow(latents, context, deep[: len(context)], *told)

    def _whole(self, latents: Tensor, context: Tensor | Words, *told: Tensor) -> Tensor:
        def keep(_: Any, given: tuple[Tensor, ...]) -> None:
            self._deep = given[0][:, : -self.unet.config.channels[0]]  # beside it stands the skip

        handle = self.unet.up[-1].register_forward_pre_hook(keep)
        try:
            return self.unet(latents, context, *told)
        finally:
            handle.remove()

    def _shallow(self, latents: Tensor, context: Tensor | Words, deep: Tensor, *told: Tensor) -> Tensor:
        """`UNet.forward` with all that lies between the first row and the last one known."""
        unet, time = self.unet, self.unet.time_embedding(*told)
        skip = as_many_as(deep, unet.down[0](latents, context, time))
        # §3.2, Ma et al. 2023: Concat(D₁ᵗ⁻¹(·), F_cacheᵗ), with F_cache = U₂ᵗ(·) of an earlier step
        x = torch.cat([deep, skip], dim=1)  # (B', C, h, w), (B', C', h, w) -> (B', C + C', h, w)
        return unet.conv_out(F.silu(unet.norm(unet.up[-1](x, context, time))))
