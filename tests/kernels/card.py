"""A stand-in for a GPU that records work: no CUDA, and the same traps.

While it records, every operation on memory is written down; playing does the same operations again, on the
same memory. So it does not see what Python would do now: another branch, another class, a weight in another
place. Reading a number while recording fails, as on a GPU. Recordings share their memory: what one of them
made is spoilt as soon as another is played.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

READS = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "item", "_unique2")


class Tape(TorchDispatchMode):
    """The operations that are done while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket.__name__ in READS:
            raise RuntimeError(f"{function} is not permitted when work is recorded")
        out = function(*args, **(kwargs or {}))
        self.operations.append((function, *_in_place((args, kwargs or {})), out))
        return out

    def play(self) -> None:
        for function, args, kwargs, out in self.operations:
            again = function(*args, **kwargs)
            returns = function._schema.returns
            if not returns:  # written in place, as by operations on lists of tensors
                continue
            outs, agains = (x if len(returns) > 1 else (x,) for x in (out, again))
            for says, before, now in zip(returns, outs, agains, strict=True):
                if says.alias_info is None:  # neither a view nor written in place: it has memory of its own
                    for x, y in zip(tree_flatten(before)[0], tree_flatten(now)[0], strict=True):
                        if isinstance(x, Tensor):
                            x.copy_(y)


def _in_place(values: Any) -> Any:
    """The same tensors by where they lie now, even if they are moved later."""
    return tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, values)


class Card:
    """A `Record` for `graphs.Recorder`."""

    def __init__(self) -> None:
        self.outputs: list[list[Tensor]] = []  # of each recording
        self.played: list[int] = []  # which

    def record(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        tape, number = Tape(), len(self.outputs)
        with tape:
            outputs = work()
        self.outputs.append([x for x in tree_flatten(outputs)[0] if isinstance(x, Tensor)])

        def play() -> None:
            for x in (x for other, its in enumerate(self.outputs) if other != number for x in its):
                x.fill_(torch.nan)
            tape.play()
            self.played.append(number)

        for x in self.outputs[-1]:
            x.fill_(torch.nan)  # recording computes nothing
        return outputs, play
