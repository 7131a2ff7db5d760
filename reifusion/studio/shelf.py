"""The pictures in the studio's folder: what each says of itself, and its settings for the page."""

from __future__ import annotations

from os.path import isfile
from pathlib import Path
from typing import Any

from .. import album
from ..model.samplers import SAMPLERS
from ..settings import Settings
from . import wishes

MOST = 60  # pictures that are listed
NEEDED = ("prompt", "sampler", "steps", "cfg", "seed", "size")  # to draw a picture again


def listed(folder: Path) -> list[dict[str, str]]:
    """Returns the newest pictures of the folder that were drawn here, each with a line about it."""
    newest_first = sorted(folder.glob("*.png"), key=changed, reverse=True)
    found: list[dict[str, str]] = []
    for path in newest_first:
        try:
            found.append({"name": path.name, "about": about(_entry(path).settings)})
        except ValueError:  # a picture from elsewhere
            continue
        if len(found) == MOST:
            break
    return found


def changed(file: Path) -> float:
    """Returns when the file was last written to; 0 for one that has been removed since it was seen."""
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0


def taken(folder: Path, name: str) -> dict[str, Any]:
    """Returns the settings of a picture for the page's fields, its input pictures, and what its file says.

    Raises ValueError, in one sentence, for a picture that does not say enough to be drawn again.
    """
    entry = _entry(folder / name)
    own = entry.settings
    said = f"Settings of {folder / name}" + (f", but without its {own.code}." if own.code else ".")
    given = wishes.texts(own)
    if own.code:
        given = {key: value for key, value in given.items() if key not in ("sampler", "schedule")}
    return {
        "settings": given,
        "picture": _inside(folder, own.init_image),
        "mask": _inside(folder, own.mask),
        "facts": {key: str(value) for key, value in entry.carried().items() if value},
        "said": said,
    }


def about(told: Settings) -> str:
    """Returns a line about a picture of these settings."""
    sampler = SAMPLERS[told.sampler].title if told.sampler in SAMPLERS else told.sampler
    return f"{told.prompt}: seed {told.seed}, {sampler}, {told.steps} steps, CFG {told.cfg:g}"


def path_of(folder: Path, name: str) -> Path:
    """Returns the path of a picture in the folder. Raises ValueError for what is none of its pictures."""
    path = folder / name
    if path.suffix != ".png" or path.name != name or not path.is_file():
        raise ValueError(f"there is no picture {name} in {folder}")
    return path


def _entry(path: Path) -> album.Entry:
    """Reads what a picture's file says. Raises ValueError if that is not enough to draw the picture again."""
    entry = album.read(path)
    if not entry.ours:
        raise ValueError(f"{path} was drawn by another program")
    if missing := sorted(name for name in NEEDED if getattr(entry.settings, name) is None):
        raise ValueError(f"{path} does not say its {', '.join(missing)}")
    return entry


def _inside(folder: Path, path: str | None) -> str | None:
    """Returns the name of an input picture that lies in the folder, as those of the studio do."""
    if path is None or Path(path).resolve().parent != folder.resolve() or not isfile(path):
        return None
    return Path(path).name
