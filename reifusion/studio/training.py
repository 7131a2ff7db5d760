"""Trainings to watch: their curves and sheets as they come. The smallest model's can be started here."""

from __future__ import annotations

import itertools
import json
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from ..model.sentences import shown
from ..settings import Settings
from ..train.checkpoint import TrainingError
from ..train.plot import losses, smoothed, verdict
from .shelf import changed

POINTS = 300  # of a curve that are shown
LONGEST = 24 * 60  # minutes
SAYS = re.compile(r"\d+/\d+|\d+it |reifusion: ")  # of what the command writes: how far it is, or a sentence


class Trainings:
    """The runs below a folder, wherever they were started; at most one of them is the studio's own."""

    def __init__(self, folder: Path) -> None:
        """folder: where `reifusion train` writes its runs."""
        self.folder = folder
        self.own: subprocess.Popen[str] | None = None
        self.said = ""  # the last line of the own one
        self._read: dict[str, tuple[float, dict[str, Any]]] = {}  # when a log was written, and its curves
        self._lock = threading.Lock()

    @property
    def going(self) -> bool:
        """True while the studio's own training goes on."""
        return self.own is not None and self.own.poll() is None

    def names(self) -> list[str]:
        """Returns the names of the runs, those that were written to last first."""
        logs = [log for depth in ("*", "*/*") for log in self.folder.glob(f"{depth}/training.jsonl")]
        logs.sort(key=changed, reverse=True)
        return [log.parent.relative_to(self.folder).as_posix() for log in logs]

    def path(self, name: str) -> Path:
        """Returns a run's folder. Raises ValueError for a name that is not among `names`."""
        if name not in self.names():
            raise ValueError(f"there is no run {shown(name)} in {self.folder}")
        return self.folder / name

    def state(self) -> dict[str, Any]:
        """Returns the runs and how the studio's own is doing."""
        code = None if self.own is None else self.own.poll()
        failed = code not in (None, 0, 130, -signal.SIGTERM)
        return {"runs": self.names(), "going": self.going, "said": self.said, "failed": failed}

    def news(self, name: str) -> dict[str, Any]:
        """Returns a run's curves, as lists of (step, loss), its sheets, and the model if it is there."""
        run = self.path(name)
        written = changed(run / "training.jsonl")
        at, curves = self._read.get(name, (None, {}))
        if at != written:  # a log of weeks takes a second to read
            curves = _curves(run)
            self._read[name] = written, curves
        sheets = [int(sheet.stem.removeprefix("sheet-")) for sheet in sorted(run.glob("sheet-*.png"))]
        return curves | {
            "name": name,
            "steps": max([curves["steps"], *sheets[-1:]]),
            "sheets": sheets,
            "model": next((str(file) for file in run.glob("*.safetensors") if _draws(file)), None),
            "quiet": round(time.time() - written),
        }

    def sheet(self, name: str, step: int) -> Path:
        """Returns the file of the sheet of a step. Raises ValueError if there is none."""
        found = self.path(name) / f"sheet-{step:06d}.png"
        if not found.is_file():
            raise ValueError(f"the run {name} has no sheet of step {step}")
        return found

    def start(self, minutes: float) -> None:
        """Starts to train the tiny model, or goes on where it was stopped.

        Raises ValueError if one is going on, or for a time that is not above 0 and at most a day.
        """
        if not 0 < minutes <= LONGEST:
            raise ValueError(f"a training takes above 0 and at most {LONGEST} minutes")
        with self._lock:
            if self.going:
                raise ValueError("a training is going on already; stop it first")
            here = f"folder={self._next()}"
            command = [sys.executable, "-m", "reifusion", "train", "tiny", here, "--minutes", f"{minutes:g}"]
            self.said = "It begins: the drawings, the VAE, then the U-Net with the text encoder."
            self.own = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                text=True, errors="replace",
            )  # fmt: skip
        threading.Thread(target=self._listen, args=(self.own,), daemon=True).start()

    def stop(self) -> None:
        """Ends the studio's own training as Ctrl-C does, and waits for it: it stores where it is."""
        own = self.own
        if own is None or not self.going:
            return
        own.terminate()
        try:
            own.wait(20)
        except subprocess.TimeoutExpired:
            own.kill()
            own.wait()

    def _next(self) -> Path:
        """Returns the folder of the last run that was started here if it is not complete, else a new one."""
        for number in range(1, 10_000):
            folder = self.folder / f"studio-{number}"
            if not (folder / "tiny" / "tiny.safetensors").exists():
                break
        return folder

    def _listen(self, own: subprocess.Popen[str]) -> None:
        assert own.stderr is not None
        for line in own.stderr:
            if own is self.own and SAYS.search(line):
                self.said = line.strip().removeprefix("reifusion: ")
        if own.wait() == 0 and own is self.own:
            self.said = "Done."


def _curves(run: Path) -> dict[str, Any]:
    """Reads what a run's log says: curves, the last step, the verdict and the minutes."""
    try:
        curve = losses(run)
    except TrainingError:  # it has only begun
        curve = {}
    steps, values = list(curve), list(curve.values())
    every = max(1, len(steps) // POINTS)
    measured = {what: losses(run, what) for what in ("held_out", "seen")}
    return {
        "steps": max(steps[-1:], default=0),
        "loss": _rounded(zip(steps, values))[::every],
        "smooth": _rounded(zip(steps, smoothed(values)))[::every],
        **{what: _rounded(found.items()) for what, found in measured.items()},
        "verdict": verdict(measured["held_out"], measured["seen"])[1],
        "minutes": round(_minutes(run / "training.jsonl"), 1),
    }


def _draws(file: Path) -> bool:
    """True for a whole model, which can be drawn with; not for a VAE or a LoRA."""
    try:
        Settings(model=str(file)).config()
    except (ValueError, OSError):
        return False
    return True


def _rounded(pairs: Any) -> list[tuple[int, float]]:
    return [(step, round(loss, 4)) for step, loss in pairs]


def _minutes(log: Path) -> float:
    """Returns the time from the first to the last line of a log, without what lies between two runs of it."""
    rows = map(_row, log.read_text("utf-8").splitlines())
    times = [float(row["time"]) for row in rows if "time" in row]
    return sum(gap for a, b in itertools.pairwise(times) if 0 < (gap := b - a) < 600) / 60


def _row(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:  # it is being written
        return {}
    return row if isinstance(row, dict) else {}
