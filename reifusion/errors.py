"""Errors as one sentence, for whoever uses a program and does not read its code."""

from __future__ import annotations

import re

from .model.sentences import cut as cut
from .model.sentences import shown as shown


def sentence(error: BaseException, size: str = "size") -> str:
    """Returns what went wrong in one line. size: what the user calls the setting that memory depends on."""
    text = str(error).strip()
    if isinstance(error, MemoryError) or re.search("allocate|out of memory", text):
        return f"out of memory; try a smaller {size}"
    first, *_ = text.splitlines() or [type(error).__name__]
    return cut(first)
