"""Writing so that who looks at a file sees a whole one or none, and so that nothing is overwritten."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole(path: str | os.PathLike) -> Iterator[Path]:
    """Yields another name, for a file or a folder, that becomes `path` if all goes well, else vanishes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    mark = f".{uuid.uuid4().hex[:8]}"
    new, old = path.with_name(f"{mark}.{path.name}"), path.with_name(f"{mark}.old.{path.name}")
    try:
        yield new
        if path.is_dir():  # a folder, unlike a file, cannot be replaced in one step
            path.rename(old)
        new.replace(path)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        for rest in (new, old):
            shutil.rmtree(rest) if rest.is_dir() else rest.unlink(missing_ok=True)


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
