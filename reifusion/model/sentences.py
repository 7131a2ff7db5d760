"""Values in sentences: short enough that an error or a notice stays one sentence."""

from __future__ import annotations


def cut(text: str, most: int = 360) -> str:
    """Returns a text with its middle left out if the text is longer than `most`."""
    end = most // 3
    return text if len(text) <= most else f"{text[: most - end - 3]} … {text[-end:]}"


def shown(value: object) -> str:
    """Returns a value as Python writes it, in one line and short enough for a sentence."""
    return cut(" ".join(repr(value).split()), 80)
