"""The inside of the U-Net, computed in every N-th step only: between steps it hardly changes.

Ma, Fang & Wang 2023, "DeepCache: Accelerating Diffusion Models for Free", arXiv:2312.00858. Off unless asked
for, since it changes the picture.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..kernels.graphs import played
from ..model.diffusion import Given, UNet
from ..model.pipeline import StableDiffusion, as_it_is
from ..model.request import whole_number


class DeepCache(nn.Module):
    """Stands in for a U-Net during one generation. Calls 0, N, 2N, … are whole; the others are shallow.

    unet: is not changed. every: N; with 1 each call is whole.
    """

    def __init__(self, unet: UNet, every: int):
        super().__init__()
        self.unet = unet
        self.every = every
        self._shallow_calls = 0  # since the last whole one
        self._deep: Tensor | None = None  # of the last whole one: (B, C', h, w)

    def forward(self, latents: Tensor, context: Tensor, t: Tensor, **more: Any) -> Tensor:
        """Takes the arguments of `UNet.forward`, and returns its output."""
        # Guidance that sets in later needs more pictures than were kept; guidance that ends, the first ones.
        deep = None if self._deep is None or len(self._deep) < len(latents) else self._deep[: len(latents)]
        if deep is None or self._shallow_calls + 1 >= self.every:
            self._shallow_calls = 0
            output, self._deep = played(self.unet, self._whole, latents, context, t, **more)
            return output
        self._shallow_calls += 1
        return played(self.unet, self._shallow, latents, context, t, deep, **more)

    def _whole(self, latents: Tensor, context: Tensor, t: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
        """`UNet.forward`, and what comes into the last row of the way up, from below: (B, C', h, w)."""
        kept: list[Tensor] = []

        def keep(_: Any, inputs: tuple[Tensor, ...]) -> None:
            kept.append(inputs[0][:, : -self.unet.config.channels[0]])  # the rest is the skip

        handle = self.unet.up[-1].register_forward_pre_hook(keep)
        try:
            return self.unet(latents, context, t, **more), kept[0]
        finally:
            handle.remove()

    def _shallow(self, latents: Tensor, context: Tensor, t: Tensor, deep: Tensor, **more: Any) -> Tensor:
        """`UNet.walk` with everything between the first row and the last one known."""
        given = Given(self.unet.time_embedding(t, **more), context)
        skip = self.unet.down[0](latents, given)
        # §3.2, Ma et al. 2023: Concat(D₁ᵗ⁻¹(·), F_cacheᵗ), with F_cache = U₂ᵗ(·) of an earlier step
        x = torch.cat([deep, skip], dim=1)  # (B, C, h, w), (B, C', h, w) -> (B, C + C', h, w)
        return self.unet.last(self.unet.up[-1](x, given))


def deepcached(pipe: StableDiffusion, every: int) -> StableDiffusion:
    """The same model, whose U-Net works whole in every N-th step only.

    Raises ValueError for N < 1, and for a model without a U-Net.
    """
    every = whole_number(every, "deepcache", 1)
    if every == 1:
        return pipe
    if not isinstance(pipe.models["diffusion"], UNet):
        raise ValueError(f"deepcache is for models with a U-Net, which {pipe.config.name} does not have")
    if pipe.around is not as_it_is:
        raise ValueError("deepcache skips the inside of the U-Net, which a ControlNet steers: take one")
    return replace(pipe, around=lambda unet, request: DeepCache(cast(UNet, unet), every))
