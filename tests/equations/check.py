"""Shared by the equations' tests: a function under `@checks(id)` returns our line's values and NumPy's."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Pair = tuple[Any, Any]  # our line's result (a tensor, an array or a number), and the equation in NumPy

EXACT = 1e-12  # where our line computes in float64
SINGLE = 1e-6  # where it computes in float32, whatever its input


@dataclass(frozen=True)
class Check:
    pair: Callable[[], Pair]
    within: float  # the largest error that is still rounding

    @property
    def error(self) -> float:
        """Returns the largest difference, relative to the largest value."""
        ours, expected = (
            np.asarray(x.detach() if hasattr(x, "detach") else x, np.float64) for x in self.pair()
        )
        if ours.shape != expected.shape:
            raise AssertionError(f"shapes differ: {ours.shape}, and the equation's {expected.shape}")
        return float(np.abs(ours - expected).max() / max(float(np.abs(expected).max()), 1e-30))


CHECKS: dict[str, Check] = {}


def checks(id: str, within: float = EXACT) -> Callable[[Callable[[], Pair]], Callable[[], Pair]]:
    """Marks a function as the check of equation `id`."""

    def mark(pair: Callable[[], Pair]) -> Callable[[], Pair]:
        if id in CHECKS and CHECKS[id].pair.__module__ != pair.__module__:
            raise ValueError(f"equation {id} is checked twice")
        CHECKS[id] = Check(pair, within)
        return pair

    return mark


def all_checks() -> dict[str, Check]:
    """Returns all checks by their equations."""
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        importlib.import_module(f"tests.equations.{path.stem}")
    return CHECKS


# Inputs that several checks share


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """Draws standard normal numbers, float64."""
    return np.random.default_rng(seed).standard_normal(shape)


# Stable Diffusion's schedule, (1000,): βₜ and ᾱₜ
BETAS = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
ALPHA_BAR = np.cumprod(1 - BETAS)
