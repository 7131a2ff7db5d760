"""Which of many similar cases `make test` runs; `make slow` has the others."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest

SOME = ("ddim", "ddpm", "euler_a", "heun", "dpmpp_2m_karras", "dpmpp_sde", "flow")  # samplers of each kind


def often(values: Iterable[Any], some: Collection[Any] = SOME) -> list[Any]:
    """Returns the values as parameters; those that are not among `some` are marked as slow."""
    return [value if value in some else pytest.param(value, marks=pytest.mark.slow) for value in values]
