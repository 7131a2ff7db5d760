"""A run's progress while it trains: a bar, `training.jsonl`, and TensorBoard's curves and pictures."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..bar import Bar
from ..files import whole
from .checkpoint import TrainingError
from .plot import losses, verdict


class Seen(NamedTuple):
    """What a checkpoint has to show."""

    picture: Image.Image | None = None
    figures: Mapping[str, float] = {}  # such as the loss on pictures that are held out


class Progress:
    """Shows the steps from `start` to `steps`; every `every`-th becomes a line of `folder/training.jsonl`.

    steps: None if a clock ends the run.

    `tensorboard --logdir folder` shows the same figures as curves. After a kill, some steps are done and
    logged twice: then the later line counts.
    """

    def __init__(self, folder: Path, start: int, steps: int | None, every: int):
        from torch.utils.tensorboard import SummaryWriter  # its import takes a second

        self.every, self.folder = every, folder
        self.bar = Bar(initial=start, total=steps, mininterval=10, seconds=60)
        self.log = open(folder / "training.jsonl", "a")  # noqa: SIM115 (closed in __exit__)
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=start)
        self.seen, self.smoothed = 0, 0.0
        self.samples, self.since = 0.0, time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()
        with self._room():
            self.log.close()
            self.board.close()

    @contextmanager
    def _room(self) -> Iterator[None]:
        """Raises TrainingError where the curves cannot be written, as on a full disk."""
        try:
            yield
        except OSError as error:
            raise TrainingError(
                f"the curves in {self.folder} could not be written ({error.strerror}); the last checkpoint is"
                " whole"
            ) from error

    def step(self, step: int, samples: float, figures: dict[str, float]) -> None:
        """Shows one more step, done on `samples` samples; figures: its loss, and others worth a curve."""
        self.seen += 1
        # The mean of the first 100 losses, then a moving average in which older losses fade.
        self.smoothed += (figures["loss"] - self.smoothed) / min(self.seen, 100)
        self.samples += samples
        if step % self.every == 0:
            now = time.monotonic()
            row = {
                **figures,
                "smoothed": self.smoothed,
                "samples_per_second": self.samples / max(now - self.since, 1e-9),
            }
            self.samples, self.since = 0.0, now
            row = {name: value for name, value in row.items() if math.isfinite(value)}  # fp16 may overflow
            shown = {"step": step, "time": time.time(), **row}
            with self._room():
                print(json.dumps({name: round(value, 6) for name, value in shown.items()}), file=self.log)
                self.log.flush()
                for name, value in row.items():
                    self.board.add_scalar(name, value, step)
            self.bar.set_postfix_str(
                f"loss {self.smoothed:.4f}, {row['samples_per_second']:.1f} samples/s", refresh=False
            )
        self.bar.update()

    def show(self, step: int, seen: Seen) -> None:
        """Writes a picture to `folder/sheet-….png` and to TensorBoard, and figures to the log and there.

        Says so, and whether the figures mean that the run overfits.
        """
        told = []
        if seen.picture is not None:
            path = self.folder / f"sheet-{step:06d}.png"
            with whole(path) as temporary:
                seen.picture.save(temporary, "PNG")
            told.append(f"the sheet is {path}")
            self.board.add_image("samples", np.asarray(seen.picture.convert("RGB")), step, dataformats="HWC")
        if seen.figures:
            shown = {"step": step, "time": time.time(), **seen.figures}
            print(
                json.dumps({name: round(value, 6) for name, value in shown.items()}),
                file=self.log,
                flush=True,
            )
            for name, value in seen.figures.items():
                self.board.add_scalar(name, value, step)
        if {"held_out", "seen"} <= seen.figures.keys():
            held_out, learned = seen.figures["held_out"], seen.figures["seen"]
            told.append(f"the loss is {held_out:.3g} on pictures held out and {learned:.3g} on those learned")
            overfits, why = verdict(*(losses(self.folder, name) for name in ("held_out", "seen")))
            told += [why] * overfits
        if told:
            self.bar.write(f"reifusion: step {step:,}: {'; '.join(told)}", file=sys.stderr)
