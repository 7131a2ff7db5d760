"""Writing files: a reader sees a whole file or none. `free` and `put` find names that are not taken."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def whole(path: str | os.PathLike) -> Iterator[Path]:
    """Yields another name for a file or folder, which becomes `path` if all goes well, or else vanishes."""
    path = Path(path)
    with scratch(path) as new, scratch(path) as old:
        try:
            yield new
            if path.is_dir() and not new.is_dir():
                raise IsADirectoryError(f"{path} is a folder, so no file was written there")
            if path.is_dir():  # a folder, unlike a file, cannot be replaced in one step
                path.rename(old)
            new.replace(path)
        finally:
            if old.exists() and not path.exists():
                old.rename(path)


@contextmanager
def scratch(path: Path) -> Iterator[Path]:
    """Yields a name beside `path` for a file or folder; whatever has the name at the end is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.with_name(f".{uuid.uuid4().hex[:8]}.{path.name}")
    try:
        yield name
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(f"{path} could not be written: {error.strerror}") from error
        raise
    finally:
        shutil.rmtree(name) if name.is_dir() else name.unlink(missing_ok=True)


def put(file: Path, path: Path) -> Path:
    """Gives a file the name `path`, or path-2, path-3, … if that is taken; returns the name that it got."""
    while True:
        target = free(path)
        with suppress(FileExistsError):  # another process has just taken the name
            try:
                os.link(file, target)
            except FileExistsError:
                raise
            except OSError:  # a file system without links
                target.touch(exist_ok=False)
                file.replace(target)
            return target


def named(text: str) -> Path:
    """Returns the path of that name. Raises ValueError for a name that no file system takes."""
    path = Path(text)
    if any(len(os.fsencode(part)) > 240 for part in path.parts) or len(os.fsencode(text)) > 4000:
        raise ValueError(f"the name {text[:20]}… is too long")
    return path


def write_text(path: str | os.PathLike, text: str) -> None:
    with whole(path) as temporary:
        # A text from a command line need not be UTF-8.
        temporary.write_text(text, "utf-8", "replace")


def write_json(path: str | os.PathLike, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def free(path: Path) -> Path:
    """Returns the path, or path-2, path-3, … if the path is taken."""
    number, target = 2, path
    while os.path.lexists(target):  # also a link to a file that is gone
        number, target = number + 1, path.with_stem(f"{path.stem}-{number}")
    return target


@contextmanager
def writable(folder: Path) -> Iterator[None]:
    """Checks, before the work begins, that files can be written to a folder; makes a folder that is missing.

    At the end, folders that were made here and are still empty are removed. Raises ValueError if nothing can
    be written.
    """
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise ValueError(f"cannot write to {folder}: {error.strerror}") from None
        yield
    finally:
        for made in missing:
            with suppress(OSError):
                made.rmdir()
