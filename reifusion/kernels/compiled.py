"""The blocks of the U-Net and of the decoder, compiled by `torch.compile`, where the user asks for it.

One block of a kind is compiled, for each of the shapes that it meets, which takes less time than all of the
U-Net at once. The plain forward runs whenever derivatives, hooks or another compiler are about.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..model import decoder, diffusion, encoder
from .fast import inferring, watched

NETWORKS = ("diffusion", "decoder")
BACKEND = "inductor"
SHAPES = 64  # that one kind of block may meet; PyTorch gives up at 8, and SD 1.5 has 14


def _form(kind: type[nn.Module]) -> type[nn.Module]:
    """A kind of block whose forward is compiled, when it is first called."""

    @functools.cache
    def compiled(backend: str) -> Callable[..., Tensor]:
        config: Any = torch._dynamo.config
        config.cache_size_limit = max(config.cache_size_limit, SHAPES)
        return torch.compile(kind.forward, dynamic=False, backend=backend)

    def forward(self: nn.Module, *inputs: Any) -> Tensor:
        hooked = any(watched(part) or getattr(part, "hook", None) is not None for part in self.modules())
        run = kind.forward if hooked or not inferring() else compiled(BACKEND)
        return run(self, *inputs)

    return type(f"Compiled{kind.__name__}", (kind,), {"forward": forward, "__doc__": kind.__doc__})


FORMS: dict[type[nn.Module], type[nn.Module]] = {
    kind: _form(kind)
    for kind in (
        diffusion.ResidualBlock,
        diffusion.AttentionBlock,
        encoder.ResidualBlock,
        encoder.AttentionBlock,
        decoder.Upsample,
    )
}
