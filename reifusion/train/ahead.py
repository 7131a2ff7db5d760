"""Batches of pictures drawn by another thread, while the step before them is trained."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from .vae import PixelBatch

Batch = tuple[Tensor, Tensor]  # pictures (count, 3, size, size), and the state that drawing leaves


class Ahead:
    """A `PixelBatch` that gives the same pictures as another, and has begun with the next ones by then.

    Step s + 1 draws by the seed after that of step s (see `rng`), so what it is going to ask for is known. A
    request that was not foreseen is drawn at once.
    """

    def __init__(self, draw: PixelBatch):
        self.draw = draw
        self.pool = ThreadPoolExecutor(1)
        self.begun: dict[tuple[int, int, int], Future[Batch]] = {}  # by seed, count and size

    def __call__(self, generator: torch.Generator, count: int, size: int) -> Tensor:
        """The pictures, and the generator as if they had been drawn just now."""
        seed = generator.initial_seed()
        if generator.device.type != "cpu" or not torch.equal(generator.get_state(), _new(seed).get_state()):
            return self.draw(generator, count, size)  # it was used before
        now, soon = (seed, count, size), ((seed + 1) % 2**63, count, size)
        self.begun = {key: batch for key, batch in self.begun.items() if key in (now, soon)}
        for key in (now, soon):
            if key not in self.begun:
                self.begun[key] = self.pool.submit(self._drawn, *key)
        pictures, state = self.begun[now].result()
        generator.set_state(state)
        return pictures

    def _drawn(self, seed: int, count: int, size: int) -> Batch:
        generator = _new(seed)
        return self.draw(generator, count, size), generator.get_state()


def _new(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
