"""Writing so that who looks at a file sees a whole one or none, and so that nothing is overwritten."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole(path: str | os.PathLike) -> Iterator[Path]:
    """Yields another name to write to, which becomes `path` when all is well and vanishes otherwise."""
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    with whole(path) as temporary:
        # What a command line hands over need not be UTF-8.
        temporary.write_text(text, "utf-8", "replace")


def write_json(path: str | os.PathLike, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def free(path: Path) -> Path:
    """The path, or path-2, path-3, … if that is taken."""
    number, target = 2, path
    while target.exists():
        number, target = number + 1, path.with_stem(f"{path.stem}-{number}")
    return target
