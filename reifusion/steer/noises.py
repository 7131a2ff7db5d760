"""Where noise comes from in other programs: a CPU's generator or a GPU's, begun anew for the steps or not.

A seed is a picture only together with the program that draws numbers from it. `NOISES` has the ways of
several programs, each a function of a seed, for `Request.source`. `Philox` draws a CUDA device's numbers
anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..model.noise import Source

# Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3", Table 2 and §3.3: Philox4x32-10
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85  # added to the key between rounds
ROUNDS = 10
LOW = 0xFFFFFFFF  # the lower half of 64 bits


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10 of counters (4, n), uint32, with a key of two words: four random words each, (4, n)."""
    c0, c1, c2, c3 = counter.astype(np.uint64)
    k0, k1 = key
    for _ in range(ROUNDS):
        p0, p1 = c0 * np.uint64(MULTIPLIERS[0]), c2 * np.uint64(MULTIPLIERS[1])
        c0, c1 = (p1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0), p1 & np.uint64(LOW)
        c2, c3 = (p0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1), p0 & np.uint64(LOW)
        k0, k1 = (k0 + WEYL[0]) & LOW, (k1 + WEYL[1]) & LOW
    return np.stack([c0, c1, c2, c3]).astype(np.uint32)


class Philox:
    """The normal numbers that PyTorch draws on a CUDA device from that seed: one picture's noise.

    As in AUTOMATIC1111's `rng_philox.py` and stable-diffusion.cpp, element i of call k is a function of the
    seed, k and i. A device does so for as many numbers as it computes at once, its multiprocessors times the
    threads of each: 36,864 on an RTX 4060, for 768×768 pixels, 196,608 on an RTX 4090, for 1,773×1,773. With
    more, real devices differ among themselves, and from this.
    """

    def __init__(self, seed: int) -> None:
        self.key = seed & LOW, seed >> 32 & LOW
        self.call = 0

    def randn(self, shape: Sequence[int]) -> Tensor:
        """The next standard normal noise of that shape: float32 on the CPU."""
        n = math.prod(shape)
        counter = np.zeros((4, n), np.uint32)
        counter[0], counter[2] = self.call, np.arange(n, dtype=np.uint32)
        self.call += 1
        first, second = philox(counter, self.key)[:2].astype(np.float64)
        # Box & Muller 1958: √(-2 ln u) sin v, from u in (0, 1) and v in (0, 2π); the constants are CUDA's
        u = first * 2.3283064e-10 + 2.3283064e-10 / 2
        v = second * (2.3283064e-10 * 6.2831855) + 2.3283064e-10 * 6.2831855 / 2
        normal = np.sqrt(-2 * np.log(u)) * np.sin(v)
        return torch.from_numpy(normal.astype(np.float32)).reshape(tuple(shape))


class Torch:
    """The numbers that PyTorch draws on a CPU from that seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def randn(self, shape: Sequence[int]) -> Tensor:
        """The next standard normal noise of that shape: float32 on the CPU."""
        return torch.randn(tuple(shape), generator=self.generator, dtype=torch.float32)


class Then:
    """Noise that comes from one source at first, and from another in the steps."""

    def __init__(self, first: Source, later: Source) -> None:
        self.first: Source | None = first
        self.later = later

    def randn(self, shape: Sequence[int]) -> Tensor:
        """The next standard normal noise of that shape: float32 on the CPU."""
        source, self.first = self.first or self.later, None
        return source.randn(shape)


class First:
    """Noise of which the first is changed, and the later noise, in the steps, is not."""

    def __init__(self, source: Source, change: Callable[[Tensor], Tensor]) -> None:
        self.source, self.change = source, change
        self.begun = False

    def randn(self, shape: Sequence[int]) -> Tensor:
        """The next noise of that shape: float32 on the CPU."""
        noise = self.source.randn(shape)
        changed = noise if self.begun else self.change(noise)
        self.begun = True
        return changed


NOISES: dict[str, Callable[[int], Source]] = {
    "cpu": Torch,  # ours; diffusers' with a generator on the CPU; A1111's RNG: CPU
    "philox": Philox,  # diffusers' with a generator on CUDA; A1111's RNG: GPU or NV; sd.cpp's --rng cuda
    "comfyui": lambda seed: Then(Torch(seed), Philox(seed)),  # on a GPU, which begins anew for the steps
    "comfyui-cpu": lambda seed: Then(Torch(seed), Torch(seed + 1)),
    "invokeai": lambda seed: Then(Torch(seed & LOW), Torch(seed & LOW ^ LOW)),
}
