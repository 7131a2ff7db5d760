"""The curve of a run's loss, above the band in which the recipe expects it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from ..files import whole
from .checkpoint import TrainingError

ACCIDENT = 0.02  # a measured loss that is higher by no more than this share is not called higher


def plot(runs: Path | Sequence[Path], expected: Sequence[Sequence[float]], out: Path) -> None:
    """Draws the `training.jsonl` of one or several runs, finished or not, to a picture file.

    runs: folders of runs, or their logs. expected: rows (step, low, high), joined by straight lines.
    Raises TrainingError if a log is missing or has no losses, or if a row is not three numbers.
    """
    from matplotlib.colors import TABLEAU_COLORS
    from matplotlib.figure import Figure  # its import takes a second

    if any(len(row) != 3 or not all(map(math.isfinite, row)) or row[1] > row[2] for row in expected):
        raise TrainingError("the expected losses must be rows of step, low and high")
    runs = [runs] if isinstance(runs, Path) else list(runs)
    curves = {run: losses(run) for run in runs}
    measured = {run: {name: losses(run, name) for name in ("held_out", "seen")} for run in runs}
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    if expected:
        where, low, high = zip(*sorted(map(tuple, expected)), strict=True)
        axes.fill_between(where, low, high, color="tab:green", alpha=0.15, linewidth=0, label="expected")
        if len(where) == 1:  # a band of one step has no width
            axes.vlines(where, low, high, color="tab:green", alpha=0.3, linewidth=6)
    for number, (run, curve) in enumerate(curves.items()):
        steps, values = list(curve), list(curve.values())
        smooth = smoothed(values)
        colour = [*TABLEAU_COLORS][number % len(TABLEAU_COLORS)]
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        name = run.parent.name if run.suffix == ".jsonl" else run.name
        label = f"{name}: {smooth[-1]:.4g} at step {steps[-1]:,}"
        axes.plot(steps, smooth, color=colour, linewidth=1.8, label=label)
        for what, style in (("held_out", "o--"), ("seen", "o:")):
            if found := measured[run][what]:
                label = f"{name}: {what.replace('_', ' ')}, {list(found.values())[-1]:.4g}"
                axes.plot(list(found), list(found.values()), style, color=colour, ms=4, lw=1.2, label=label)
    if all(value > 0 for curve in curves.values() for value in curve.values()):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.2, which="both")
    axes.legend(frameon=False)
    try:
        with whole(out) as temporary:
            figure.savefig(temporary, dpi=150)
    except ValueError as error:  # Matplotlib lists the suffixes it supports
        raise TrainingError(f"the curve cannot be drawn to {out}: {error}") from None


def losses(run: Path, name: str = "loss") -> dict[int, float]:
    """Reads step -> loss from a run's log.

    Where a run went back, after a kill or to begin anew, what was logged of later steps does not count.
    name: "loss", which must be there, or that of a loss that is measured at checkpoints.
    """
    path = run if run.suffix == ".jsonl" else run / "training.jsonl"
    if not path.is_file():
        raise TrainingError(f"there is no {path}: nothing has been trained there yet")
    curve: dict[int, float] = {}
    before = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            step, loss = int(row["step"]), float(row.get(name, "nan"))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # the run is writing this line, or was killed while it wrote it
        if step < before:
            curve = {known: value for known, value in curve.items() if known <= step}
        before = step
        if math.isfinite(loss):
            curve[step] = loss
    if not curve and name == "loss":
        raise TrainingError(f"{path} has no losses yet; the first comes after a few steps")
    return dict(sorted(curve.items()))


def smoothed(values: Sequence[float], reach: int | None = None) -> list[float]:
    """Averages each value with up to `reach` neighbours on either side, so the curve does not lag behind.

    By default, these are few for a short run, whose loss may fall within as many points.
    """
    reach = min(10, len(values) // 10) if reach is None else reach
    return [fmean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]


def verdict(held_out: Mapping[int, float], seen: Mapping[int, float]) -> tuple[bool, str]:
    """True if a run learns its pictures by heart, and a sentence; (False, "") while it is too early to tell.

    It does if the loss on pictures that are held out, measured step -> loss, was above its lowest at the last
    two checkpoints, and that on the pictures which it learns has fallen since. Both are measured with the
    same noise each time, so a difference of a few percent is no accident.
    """
    steps = sorted(held_out.keys() & seen.keys())
    if len(steps) < 2:
        return False, ""
    best, last = min(steps, key=lambda step: held_out[step]), steps[-1]
    higher = all(held_out[step] > (1 + ACCIDENT) * held_out[best] for step in steps[-2:])
    if higher and seen[last] < seen[best]:
        return True, (
            f"it overfits: since step {best:,} the loss on pictures held out has risen from"
            f" {held_out[best]:.3g} to {held_out[last]:.3g}, while that on pictures it learns fell from"
            f" {seen[best]:.3g} to {seen[last]:.3g}; take a model from before (keep_every), a smaller one, or"
            " more pictures"
        )
    now = "" if best == last else f", and is {held_out[last]:.3g}"
    return False, (
        f"no sign of overfitting: the loss on pictures held out was lowest, {held_out[best]:.3g}, at step"
        f" {best:,}{now}"
    )
