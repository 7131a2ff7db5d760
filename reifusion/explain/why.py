"""Why two pictures differ: what their files say of them, and what each difference is worth.

The first picture's settings are drawn once more with one difference at a time, in few steps of a small model:
the numbers are those of the mini and not of the model that drew the two, but their order is mostly the same.
Programs differ too, in what no setting says; `steer/manners.py` lists it, and each of it is tried as well.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from ..album import Entry, read
from ..model.pictures import open_picture
from ..model.pipeline import StableDiffusion
from ..model.samplers import samplers_for
from ..settings import ABOUT, Settings
from ..shortcuts.deepcache import deepcached
from ..steer import brownian, manners
from ..steer.manners import Manner

# Settings that only have a meaning together
SAMPLING = ("sampler", "schedule", "eta", "s_noise", "churn")
SECOND_PASS = ("hires", "hires_strength", "hires_by")
VARIATION = ("variation", "variation_seed")
TOGETHER = {"sampler": SAMPLING, "hires": SECOND_PASS, "variation": VARIATION}
ALONE = (
    "prompt", "negative", "seed", "steps", "cfg", "size", "clip_skip", "guidance_interval",
    "guidance_rescale", "deepcache", "ensd",
)  # fmt: skip
# What only the model that drew the pictures could tell
FILES = tuple(
    name for name in ABOUT
    if name not in (*ALONE, *SAMPLING, *SECOND_PASS, *VARIATION, "manner", "rng", "emphasis")
)  # fmt: skip
# What programs do, in words, and the two words for what they do or do not
MANNERS: dict[str, tuple[str, Any]] = {
    "rng": ("where noise comes from", ()),
    "emphasis": ("how words are weighted", ()),
    "language": ("whose brackets a prompt has", {"a1111": "A1111's", "comfyui": "ComfyUI's"}),
    "sigma": ("the first noise times", ("√(σ² + 1)", "σ")),
    "cut": ("pixels", ("rounded", "cut off")),
    "columns": ("variations turn", ("as a whole", "by columns")),
    "again": ("steps of the second pass", {None: "a share", "all": "all, of more"}),
    "drops": ("the last σ but one", ("visited", "left out")),
    "path": ("the noise of SDE samplers", {"": "drawn alone", "rng": "a path's", "cpu": "a CPU's path's"}),
}


COUNTED = {"": "counts", "never": "counts for nothing", "from it": "counts from the usual layer"}


@dataclass(frozen=True)
class Difference:
    """One difference, and what it is worth."""

    name: str
    first: str
    second: str
    levels: float | None = None  # of 255, the mean over all pixels; None: not tried


@dataclass(frozen=True)
class _Side:
    settings: Settings  # without a manner, which is resolved below
    manner: Manner


def differences(
    first: Entry, second: Entry, model: str = "mini", steps: int = 10, device: str | None = None
) -> list[Difference]:
    """Returns what differs, that of the most levels first, then what could not be tried.

    model: what the differences are tried with. steps: of the first picture, there.
    """
    one, other = _side(first), _side(second)
    pipe = Settings(model=model).pipe(device)
    usual = _Side(_tried(one.settings, pipe, model, steps), one.manner)
    plain = _drawn(pipe, usual)
    found = []
    for name, names in {**{name: (name,) for name in ALONE}, **TOGETHER}.items():
        values = [{key: getattr(side.settings, key) for key in names} for side in (one, other)]
        if values[0] != values[1] and not _same(name, one, other):
            changed = _scaled(usual.settings, one.settings, values[1], pipe, steps)
            try:
                levels = _levels(plain, _drawn(pipe, replace(usual, settings=changed)))
            except ValueError:  # what this model cannot draw, such as a sampler for rectified flow
                levels = None
            found.append(Difference(name, _said(values[0]), _said(values[1]), levels))
    for name, (title, words) in MANNERS.items():
        ours, theirs = (_does(side.manner, name, one.settings) for side in (one, other))
        if ours != theirs and _counts(name, one.settings):
            mixed = replace(one.manner, **{name: getattr(other.manner, name)})
            try:
                levels = _levels(plain, _drawn(pipe, replace(usual, manner=mixed)))
            except ValueError:
                levels = None
            said = [words[value] if words else _shown(value) for value in (ours, theirs)]
            found.append(Difference(title, said[0], said[1], levels))
    return sorted(found, key=lambda one: -(one.levels or 0)) + _files(first, second)


def apart(first: str, second: str) -> float | None:
    """Returns how many levels two pictures are apart; None if they are not of one size."""
    pictures = [open_picture(path) for path in (first, second)]
    return _levels(*pictures) if pictures[0].size == pictures[1].size else None


def table(found: Sequence[Difference]) -> list[tuple[str, ...]]:
    """Returns a head and a row for each difference, as text."""
    rows = [("what", "first", "second", "levels of 255")]
    for one in found:
        levels = "not tried" if one.levels is None else f"{one.levels:.2f}"
        rows.append((one.name, one.first, one.second, levels))
    return [tuple(cell if len(cell) <= 40 else f"{cell[:39]}…" for cell in row) for row in rows]


def why(first: str, second: str, **how: Any) -> list[Difference]:
    """Returns what differs between the files of two pictures. ValueError for files without settings."""
    return differences(read(first), read(second), **how)


def _side(entry: Entry) -> _Side:
    """Returns a picture's settings with the program's own where they leave it open."""
    settings = entry.settings
    manner = replace(settings, manner=entry.drawn_in()).there()
    sampler, schedule = settings.sampler, settings.schedule
    if sampler is not None:
        sampler, schedule = manners.sampled(sampler, schedule, manner)
    size = None if settings.size is None else manners.rounded(settings.size, manner)
    settings = replace(
        settings, sampler=sampler, schedule=schedule, size=size, seed=settings.seed or 0,
        prompt=settings.prompt or "", manner=None, rng=None, emphasis=None,
    )  # fmt: skip
    return _Side(settings, manner)


def _same(name: str, one: _Side, other: _Side) -> bool:
    """True if values differ that do not count, such as the strength of a second pass that is not done."""
    if name == "variation":
        return one.settings.variation == other.settings.variation == 0
    return name == "hires" and one.settings.hires == other.settings.hires == 1


def _does(manner: Manner, name: str, settings: Settings) -> Any:
    """What a program does with these settings."""
    return settings.sampler in manner.drops if name == "drops" else getattr(manner, name)


def _counts(name: str, settings: Settings) -> bool:
    """True if what a program does has an effect with these settings."""
    if name == "path":
        return settings.sampler in brownian.SAMPLERS
    if name == "language":
        return bool(re.search(r"[(\[\\]|\bAND\b|\bBREAK\b", f"{settings.prompt} {settings.negative}"))
    if name == "again":
        return settings.hires != 1
    return name != "columns" or settings.variation != 0


def _tried(settings: Settings, pipe: StableDiffusion, model: str, steps: int) -> Settings:
    """Returns the settings for the model that stands in: without files, at its size, in few steps."""
    usual = {name: ABOUT[name].default for name in FILES}
    fitting = samplers_for(pipe.config.schedule.prediction_type)
    if settings.sampler is not None and settings.sampler not in fitting:
        usual |= dict.fromkeys(SAMPLING)  # such as one for rectified flow: the model's own stands in
    return replace(settings, **usual | {"model": model, "size": (pipe.config.size,) * 2, "steps": steps})


def _scaled(
    usual: Settings, first: Settings, values: dict[str, Any], pipe: StableDiffusion, steps: int
) -> Settings:
    """Returns the settings with values of the other picture, in the measure of the model that stands in."""
    if "steps" in values:
        ratio = (values["steps"] or pipe.config.steps) / (first.steps or pipe.config.steps)
        values = {"steps": min(1000, max(1, round(steps * ratio)))}
    if "size" in values:
        whole = usual.size or (pipe.config.size,) * 2
        if first.size is None or values["size"] is None:
            return usual
        multiple, scale = pipe.config.multiple, min(whole) / min(first.size)
        sides = (min(4 * pipe.config.size, side * scale) for side in values["size"])
        width, height = (max(1, round(side / multiple)) * multiple for side in sides)
        values = {"size": (width, height)}
    return replace(usual, **values)


def _drawn(pipe: StableDiffusion, side: _Side) -> Image.Image:
    quick = deepcached(pipe, side.settings.deepcache)
    return side.settings.draw(quick, side.settings.request(), manner=side.manner)


def _levels(one: Image.Image, other: Image.Image) -> float:
    """The mean difference of two pictures; the second is brought to the first's size."""
    if other.size != one.size:
        other = other.resize(one.size, Image.Resampling.LANCZOS)
    return float(np.abs(np.asarray(one, float) - np.asarray(other, float)).mean())


def _files(first: Entry, second: Entry) -> list[Difference]:
    """Returns what only the model that drew the pictures could tell."""
    found = []
    for name in FILES:
        sides = []
        for entry in (first, second):
            value = getattr(entry.settings, name)
            value = entry.model_name or value if name == "model" else value
            if name == "strength" and entry.settings.init_image is None:
                value = ABOUT[name].default
            digest = entry.hashes.get(name)
            sides.append(_said({name: value}) + (f" [{digest}]" if digest else ""))
        if sides[0] != sides[1]:
            found.append(Difference(name, sides[0], sides[1]))
    if any(entry.settings.init_image and entry.settings.strength < 1 for entry in (first, second)):
        ways = [replace(entry.settings, manner=entry.drawn_in()).there().img2img for entry in (first, second)]
        if ways[0] != ways[1]:
            found.append(Difference("steps of img2img", ways[0], ways[1]))
    if any(entry.settings.clip_skip for entry in (first, second)):
        theirs = (replace(entry.settings, manner=entry.drawn_in()).there() for entry in (first, second))
        ways = [COUNTED[manner.from_two] for manner in theirs]
        if ways[0] != ways[1]:
            found.append(Difference("clip skip of SD 2 and XL", ways[0], ways[1]))
    return found


def _said(values: dict[str, Any]) -> str:
    """{"sampler": "euler", "schedule": None, "eta": 0.5} -> euler, eta 0.5"""
    (_, value), *more = values.items()
    rest = [f"{name} {_shown(one)}" for name, one in more if one not in (None, ABOUT[name].default)]
    return ", ".join([_shown(value), *rest])


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple) and len(value) == 2 and all(isinstance(one, int) for one in value):
        return "x".join(map(str, value))
    return "-" if value in (None, "", ()) else str(value)
