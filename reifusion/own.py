"""Samplers and schedules of one's own, in a Python file that the user names."""

from __future__ import annotations

import os
import runpy
import traceback
from typing import Any

from . import sampling  # noqa: F401  # whose names are taken
from .model.samplers import SAMPLERS
from .model.spacing import SCHEDULES

_defined: dict[str, list[str]] = {}  # the samplers and schedules of each file that was run


def run_file(path: str | os.PathLike) -> list[str]:
    """Runs a Python file. What samplers and schedules it defines is known from then on; returns their names.

    For files that the user gives, never for one that only a picture names. A file may be run again. Raises
    ValueError, in one sentence, for a file that is not there, that fails, that defines none, or that defines
    one by a name that is taken.
    """
    path = os.fspath(path)
    tables: dict[str, dict[str, Any]] = {"sampler": SAMPLERS, "schedule": SCHEDULES}
    for name in _defined.pop(os.path.abspath(path), []):
        for table in tables.values():
            table.pop(name, None)
    before = {kind: dict(table) for kind, table in tables.items()}
    try:
        runpy.run_path(path, run_name="own")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except (Exception, SystemExit) as error:
        raise ValueError(f"{_place(path, error)}: {type(error).__name__}: {error}") from error
    taken = [
        (kind, name) for kind, was in before.items() for name in was if tables[kind][name] is not was[name]
    ]
    found = [name for kind, table in tables.items() for name in table if name not in before[kind]]
    if taken or not found:
        for kind, was in before.items():
            tables[kind].update(was)
        why = (
            f"a {taken[0][0]} {taken[0][1]}, a name that is taken"
            if taken
            else "no sampler: no class with a name"
        )
        raise ValueError(f"{path} defines {why}")
    _defined[os.path.abspath(path)] = found
    return found


def _place(path: str, error: BaseException) -> str:
    """Returns where in the file an error arose."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    if isinstance(error, SyntaxError) and error.filename == path:
        lines.append(error.lineno)
    return f"{path}, line {lines[-1]}" if lines else path
