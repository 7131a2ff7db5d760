"""What the equations' tests share: a function under `@checks(id)` returns our line's values and NumPy's."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Pair = tuple[Any, Any]  # what our line gives (a tensor, an array or a number), and the equation in NumPy
CHECKS: dict[str, Callable[[], Pair]] = {}


def checks(id: str) -> Callable[[Callable[[], Pair]], Callable[[], Pair]]:
    """Marks a function as the check of equation `id`."""

    def mark(check: Callable[[], Pair]) -> Callable[[], Pair]:
        if id in CHECKS and CHECKS[id].__module__ != check.__module__:
            raise ValueError(f"equation {id} is checked twice")
        CHECKS[id] = check
        return check

    return mark


def error(check: Callable[[], Pair]) -> float:
    """The largest difference, relative to the largest value."""
    ours, expected = (np.asarray(x.detach() if hasattr(x, "detach") else x, np.float64) for x in check())
    if ours.shape != expected.shape:
        raise AssertionError(f"shapes differ: {ours.shape}, and the equation's {expected.shape}")
    return float(np.abs(ours - expected).max() / max(float(np.abs(expected).max()), 1e-30))


def errors() -> dict[str, float]:
    """Equation -> its error, all that there are."""
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        importlib.import_module(f"tests.equations.{path.stem}")
    return {id: error(check) for id, check in CHECKS.items()}
