"""Replacing what a module does, and putting it back: the one way in which this package changes a network.

Fast kernels, 8-bit weights, LoRA layers, muted attention and deliberate bugs all go through `swap`. Hooks are
for watching a network, which changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def swap(module: nn.Module, by: type[nn.Module], **state: Any) -> Callable[[], None]:
    """Makes a module behave as a `by` from now on; returns a function that puts the old behaviour back.

    The module stays the same object, at its place in the network, with its parameters and its hooks: only its
    `forward` and its other methods become those of `by`. state: attributes, parameters or buffers that `by`
    needs beside them. Swaps may lie on top of each other, and are put back in the opposite order.
    """
    before = module.__class__
    module.__class__ = by
    for name, value in state.items():
        setattr(module, name, value)

    def put_back() -> None:
        for name in state:
            delattr(module, name)
        module.__class__ = before

    return put_back
