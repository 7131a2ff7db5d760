"""Checks of single values, each refused in one sentence that names it."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

from .sentences import cut, shown


def texts(value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else list(value) if isinstance(value, Sequence) else []
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"a prompt is a text, or a list with at least one text, not {shown(value)}")
    return texts


def number(value: Any, name: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number, not {shown(value)}") from None


def interval(value: Any) -> tuple[float, float]:
    low, high = pair(value)
    if not low < high:
        raise ValueError(f"guidance_interval must begin below its end, and not {low:g} to {high:g}")
    return low, high


def pair(value: Any) -> tuple[float, float]:
    if not is_pair(value):
        raise ValueError(f"guidance_interval must be two numbers, like (0.3, 5), not {shown(value)}")
    low, high = (number(end, "an end of guidance_interval") for end in value)
    return low, high


def is_pair(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2


def whole_number(value: Any, name: str, low: int, high: float = math.inf) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, not {shown(value)}") from None
    if not low <= number <= high:
        limits = f"at least {low}" if high == math.inf else f"between {low} and {high}"
        raise ValueError(f"{name} must be {limits}, not {cut(str(number), 40)}")
    return number
