"""Noise for a stretch from one σ to another, taken from a Brownian path that the seed alone decides.

The samplers of k-diffusion that solve a stochastic equation take their noise so: W(σ') − W(σ), divided by
√|σ' − σ|, is standard normal noise, and with more steps the picture converges, as the path stays the same.
How a seed becomes a path is that of torchsde 0.2.6 (Li et al. 2020, arXiv:2001.01328, §4): a tree of halves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..model.ddpm import Sampler
from ..model.noise import Source
from ..sampling.solver import Solver

DIGITS = 6  # behind the point, to which every σ is rounded
POOL = 24  # words of entropy in NumPy's seed sequences
SAMPLERS = ("dpmpp_2s_sde", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde")  # those that use a path
Steps: TypeAlias = "list[tuple[float, float]]"


class BrownianPath:
    """W on [low, high], with W(low) = 0. Each half's noise has a seed of its own, made from the path's."""

    def __init__(
        self, low: float, high: float, seed: int, shape: Sequence[int], source: Callable[[int], Source]
    ) -> None:
        """source: what draws a standard normal tensor of `shape` from a seed."""
        self.low, self.high, self.seed, self.shape, self.source = low, high, seed, shape, source
        root = np.random.SeedSequence(seed, pool_size=POOL).generate_state(1)[0]
        self._whole = self._noise(root) * math.sqrt(high - low)  # W(high)
        self._known = {round(low, DIGITS): torch.zeros_like(self._whole), round(high, DIGITS): self._whole}

    def __call__(self, sigma: float) -> Tensor:
        """W(σ), float64. σ outside of the path's ends counts as the nearer one."""
        at = round(min(max(sigma, self.low), self.high), DIGITS)
        if at not in self._known:
            if len(self._known) > 8:  # the ends stay, and what was asked last
                self._known = dict([*self._known.items()][:2] + [*self._known.items()][-3:])
            self._known[at] = self._found(at)
        return self._known[at]

    def _found(self, at: float) -> Tensor:
        begin, end = round(self.low, DIGITS), round(self.high, DIGITS)
        before, inside = torch.zeros_like(self._whole), self._whole  # W(begin), and W(end) − W(begin)
        key = depth = 0
        while at not in (begin, end):
            half = round(0.5 * (begin + end), DIGITS)
            sequence = np.random.SeedSequence(self.seed, spawn_key=(key, depth), pool_size=POOL)
            left, right, whole = half - begin, end - half, end - begin
            noise = self._noise(sequence.generate_state(1)[0])
            # A path between two known points has its mean on the line, and the variance l r / (l + r)
            first = left / whole * inside + math.sqrt(left * right / whole) * noise
            is_right = at > half
            begin, end = (half, end) if is_right else (begin, half)
            before = before + first if is_right else before
            inside = inside - first if is_right else first
            key, depth = 2 * key + is_right, depth + 1
        return before if at == begin else before + inside

    def _noise(self, seed: int) -> Tensor:
        return self.source(int(seed)).randn(self.shape).double()


class Increments:
    """The noise of a picture: first what it begins with, then what a path adds from one σ to the next."""

    def __init__(self, first: Source, path: Callable[[Sequence[int]], BrownianPath], steps: Steps) -> None:
        """path: makes it for a shape. steps: from which σ to which, for each time that a sampler asks."""
        self._first: Source | None = first
        self._make, self._steps = path, iter(steps)
        self._path: BrownianPath | None = None

    def randn(self, shape: Sequence[int]) -> Tensor:
        """The next standard normal noise of that shape: float32 on the CPU."""
        if self._first is not None:
            source, self._first = self._first, None
            return source.randn(shape)
        self._path = self._path or self._make(shape)
        begin, end = next(self._steps)
        return ((self._path(end) - self._path(begin)) / math.sqrt(abs(end - begin))).float()


def on_a_path(
    make: Callable[[int], Source], sampler: Sampler, whole: Sampler, draw: Callable[[int], Source]
) -> Callable[[int], Source]:
    """A source that begins as `make` does, and then draws on a path for that sampler.

    whole: the sampler whose σ are the path's ends. draw: what draws a path's noise from a seed.
    """
    assert isinstance(sampler, Solver) and isinstance(whole, Solver)
    steps: Steps = []
    for sigma, later in zip(sampler.sigmas, sampler.sigmas[1:]):
        if later > 0:
            steps += [(sigma, at) for at in sampler._calls(sigma, later)[1:]]  # noise in the middle of a step
            steps.append((sigma, later))
    steps = [(_single(begin), _single(end)) for begin, end in steps]
    high, low = _single(whole.sigmas[0]), _single(whole.sigmas[-2])  # the last is 0

    def source(seed: int) -> Source:
        return Increments(make(seed), lambda shape: BrownianPath(low, high, seed, shape, draw), steps)

    return source


def _single(sigma: float) -> float:
    """σ as those programs have it: in float32."""
    return float(np.float32(sigma))
