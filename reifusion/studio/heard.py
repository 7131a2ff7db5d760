"""What the model warns of while it draws, heard by the page that asked for the drawing."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..model.sentences import cut

_THREAD = threading.local()


def listen() -> None:
    """From now on, a thread that is in `heard` keeps its warnings; those of others go where they went."""
    before = warnings.showwarning

    def show(message: Any, *more: Any) -> None:
        told = getattr(_THREAD, "told", None)
        if told is None:
            before(message, *more)
        elif (said := sentence(str(message))) not in told:
            told.append(said)

    warnings.showwarning = show  # type: ignore[assignment]
    warnings.filterwarnings("always", category=UserWarning, module="reifusion")


@contextmanager
def heard(told: list[str]) -> Iterator[None]:
    """Adds to `told` what this thread is warned of, each in one sentence, once."""
    _THREAD.told = told
    try:
        yield
    finally:
        _THREAD.told = None


def sentence(text: str) -> str:
    """Returns the warning as a short sentence; a name at its beginning stays as it is."""
    text = cut(text, 160)
    first = text.partition(" ")[0]
    return (text[:1].upper() + text[1:] if first.isalpha() else text).rstrip(".") + "."
