"""A key of a recipe: a field of a dataclass with a sentence that explains it and the limits of its values."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any


class RecipeError(ValueError):
    """A recipe that cannot be followed; the message says why, in one sentence."""


@dataclass(frozen=True)
class Key:
    """A key, apart from its value. The value None switches something off and has no limits."""

    says: str
    least: float | None = None  # the smallest value that is allowed
    above: float | None = None  # every value must be larger than this
    most: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()  # of a string; "" stands for its default
    trains: tuple[str, ...] = ()  # the trainings that use the key; (): all of them
    endless: bool = False  # True: infinity is allowed

    def allows(self, value: Any) -> bool:
        if isinstance(value, tuple):
            return all(map(self.allows, value))
        if isinstance(value, str):
            return not self.choices or value in self.choices
        if value is None or isinstance(value, bool) or not isinstance(value, int | float):
            return True
        if isinstance(value, int) and abs(value) >= 2**63:  # neither a float nor an index
            return False
        return (
            not math.isnan(value)
            and (self.endless or not math.isinf(value))
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )

    @property
    def limits(self) -> str:
        if self.choices:
            *most, last = (choice for choice in self.choices if choice)
            return f"{', '.join(most)} or {last}"
        low = f"{self.least:g} or more" if self.least is not None else ""
        low = f"above {self.above:g}" if self.above is not None else low
        high = f"at most {self.most:g}" if self.most is not None else ""
        high = f"below {self.below:g}" if self.below is not None else high
        return " and ".join(filter(None, (low, high)))


def key(default: Any, says: str, **limits: Any) -> Any:
    """Returns a field of a dataclass for `check`."""
    return field(default=default, metadata={"key": Key(says, **limits)})


def about(settings: Any) -> dict[str, Key]:
    """Returns the keys among the fields of a dataclass."""
    return {f.name: f.metadata["key"] for f in fields(settings) if "key" in f.metadata}


def shortened(value: Any) -> str:
    """Returns the repr of a value for a message, whatever its length."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def check(settings: Any) -> None:
    """Raises RecipeError if a value of a dataclass is outside the limits of its key."""
    for name, its in about(settings).items():
        value = getattr(settings, name)
        if not its.allows(value):
            value = list(value) if isinstance(value, tuple) else value
            raise RecipeError(f"{name} must be {its.limits or 'a finite number'}, not {shortened(value)}")
