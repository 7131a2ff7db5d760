"""An error as one sentence, for whoever uses a program and does not read its code."""

from __future__ import annotations

import re


def sentence(error: BaseException, size: str = "size") -> str:
    """Returns what went wrong in one line. size: what the user calls the setting that memory depends on."""
    text = str(error).strip()
    if isinstance(error, MemoryError) or re.search("allocate|out of memory", text):
        return f"out of memory; try a smaller {size}"
    return brief(text) or type(error).__name__


def brief(text: str, limit: int = 600) -> str:
    """Returns the first line of a message, without its middle if a long value from a file stands there."""
    first = (text.strip().splitlines() or [""])[0]
    return first if len(first) <= limit else f"{first[: limit // 2]} … {first[-limit // 3 :]}"
