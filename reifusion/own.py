"""Samplers and schedules of one's own, in a Python file that the user names."""

from __future__ import annotations

import os
import runpy
import traceback

from . import sampling  # noqa: F401  # whose names are taken
from .model.samplers import SAMPLERS

_defined: dict[str, list[str]] = {}  # the samplers of each file that was run


def run_file(path: str | os.PathLike) -> list[str]:
    """Runs a Python file. The samplers that it defines are known afterwards; returns their names.

    For files that the user gives, never for one that only a picture names. A file may be run again. Raises
    ValueError, in one sentence, for a file that is not there, that fails, that defines no sampler, or that
    defines one by a name that is taken.
    """
    path = os.fspath(path)
    for name in _defined.pop(os.path.abspath(path), []):
        del SAMPLERS[name]
    before = dict(SAMPLERS)
    try:
        runpy.run_path(path, run_name="own")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except Exception as error:
        raise ValueError(f"{_place(path, error)}: {type(error).__name__}: {error}") from error
    taken = [name for name, kind in before.items() if SAMPLERS[name] is not kind]
    found = [name for name in SAMPLERS if name not in before]
    if taken or not found:
        SAMPLERS.update(before)
        why = f"a sampler {taken[0]}, a name that is taken" if taken else "no sampler: no class with a name"
        raise ValueError(f"{path} defines {why}")
    _defined[os.path.abspath(path)] = found
    return found


def _place(path: str, error: Exception) -> str:
    """Returns where in the file an error arose."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    if isinstance(error, SyntaxError) and error.filename == path:
        lines.append(error.lineno)
    return f"{path}, line {lines[-1]}" if lines else path
