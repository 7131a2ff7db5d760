"""Checks of single values, each refused in one sentence that names it."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .sentences import cut, shown


def texts_of(prompt: Any) -> list[str]:
    """The texts of a prompt; for vectors, an empty one for each picture. Raises ValueError for neither."""
    if isinstance(prompt, Tensor):
        if prompt.ndim not in (3, 4) or prompt.shape[-3] == 0:
            kind = _kind(prompt)
            raise ValueError(f"a prompt of vectors is (B, tokens, width), or (turns, B, …), not {kind}")
        if not prompt.is_floating_point() or not prompt.isfinite().all():
            raise ValueError("a prompt of vectors must be floating-point numbers, all of them finite")
        return [""] * prompt.shape[-3]
    texts = [prompt] if isinstance(prompt, str) else list(prompt) if isinstance(prompt, Sequence) else []
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"a prompt is a text, or a list with at least one text, not {shown(prompt)}")
    return texts


def latents_or_none(value: Any, name: str) -> None:
    """Raises ValueError for anything that is neither None nor a tensor with the axes of latents."""
    if value is not None and not (isinstance(value, Tensor) and value.ndim == 4):
        raise ValueError(f"{name} must be a tensor (B, 4, H/8, W/8), not {_kind(value)}")
    if value is not None and not value.isfinite().all():
        raise ValueError(f"{name} must be finite numbers, and some are not")


def _kind(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def side(name: str, asked: int | None, otherwise: float, factor: int) -> int:
    """A width or height, in pixels: what was asked, or the multiple of factor nearest to `otherwise`."""
    if asked is None:
        return round(otherwise / factor) * factor
    pixels = whole_number(asked, f"the {name}", factor)
    if pixels % factor:
        raise ValueError(f"the {name} must be a multiple of {factor}, not {pixels}")
    return pixels


def finite_number(value: Any, name: str) -> None:
    """Raises ValueError for anything that is neither None nor a finite number."""
    if value is not None and not math.isfinite(number(value, name)):
        raise ValueError(f"{name} must be a finite number, not {value}")


def number(value: Any, name: str) -> float:
    try:
        if isinstance(value, str | bytes):  # which `float` would read
            raise TypeError
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
