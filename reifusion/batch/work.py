"""Drawing the rows of a table, in one process or in several, and going on where an earlier run was stopped.

A picture is there whole or not at all, and its name says all that decides it: so a run draws what is not
there yet, whatever ended the last one. `manifest.jsonl` gets a line for each row when it is drawn, or fails.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import queue
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import sentence
from ..files import whole
from ..in_memory import Models, of_model
from .rows import Row

MANIFEST = "manifest.jsonl"


@dataclass(frozen=True)
class Drawn:
    """What became of a row."""

    row: Row
    seconds: float  # 0 of a picture that was there
    carried: dict[str, Any]  # what the picture's file says of it
    error: str = ""  # why there is no picture

    def line(self) -> dict[str, Any]:
        """The row as a line of the manifest."""
        if self.error:
            return {"row": self.row.number, "prompt": self.row.settings.prompt, "error": self.error}
        return {"row": self.row.number, "file": self.row.file, "seconds": self.seconds, **self.carried}


def missing(rows: Sequence[Row], out: Path) -> list[Row]:
    """Returns the rows whose picture is not there yet, those of one model together."""
    left = [row for row in rows if not (out / row.file).exists()]
    return sorted(left, key=lambda row: (of_model(row.settings), row.number))


def there(row: Row, out: Path) -> Drawn | None:
    """Returns what became of a row whose picture is there; None if it is not, or cannot be read."""
    from .. import album

    try:
        return Drawn(row, 0.0, album.read(out / row.file).carried())
    except ValueError:
        return None


def check(rows: Sequence[Row]) -> None:
    """Raises ValueError, with the row's number, for what its model cannot draw: before anything is loaded."""
    configs: dict[str, Any] = {}
    for row in rows:
        model = of_model(row.settings)
        try:
            if model not in configs:
                configs[model] = row.settings.config()
            row.settings.request().for_model(configs[model])
        except ValueError as error:
            raise ValueError(f"row {row.number + 1}: {error}") from None


def draw(rows: Sequence[Row], out: Path, device: str | None = None, compile: bool = False) -> Iterator[Drawn]:
    """Draws rows one after the other, and yields what became of each. Loads a model once for all its rows.

    One picture at a time, so that not a bit of it depends on the others.
    """
    from .. import album

    models = Models(device, compile)
    for row in rows:
        begun = time.monotonic()
        try:
            pipe = models.pipe(row.settings)
            request = row.settings.request().for_model(pipe.config)
            entry = album.entry(row.settings, request, pipe)
            picture = row.settings.draw(pipe, request)
            album.save(picture, entry, out / row.file)
            yield Drawn(row, round(time.monotonic() - begun, 3), entry.carried())
        except Exception as error:  # one row that cannot be drawn does not end the others
            why = str(error) if isinstance(error, ValueError) else sentence(error, "--size")
            yield Drawn(row, round(time.monotonic() - begun, 3), {}, why.splitlines()[0] if why else "failed")


def draw_in_processes(
    rows: Sequence[Row], out: Path, processes: int, device: str | None = None, compile: bool = False
) -> Iterator[Drawn]:
    """The same by several processes, each with a model of its own and its share of the cores or GPUs.

    Raises RuntimeError if a process ends before its time; what it had drawn is there.
    """
    context = multiprocessing.get_context("spawn")
    tasks: Any = context.Queue()
    results: Any = context.Queue()
    for row in rows:
        tasks.put(row)
    for _ in range(processes):
        tasks.put(None)
    workers = [
        context.Process(
            target=_work, args=(number, processes, tasks, results, out, device, compile), daemon=True
        )
        for number in range(processes)
    ]
    for worker in workers:
        worker.start()
    try:
        left = len(rows)
        while left:
            with contextlib.suppress(queue.Empty):
                yield results.get(timeout=0.5)
                left -= 1
                continue
            dead = [worker for worker in workers if worker.exitcode not in (None, 0)]
            over = all(worker.exitcode is not None for worker in workers)
            if (dead or over) and results.empty():
                why = (
                    f"a process ended ({_exit(dead[0].exitcode)})" if dead else "the processes ended too soon"
                )
                raise RuntimeError(f"{why} with {left} pictures left; the same command draws them")
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join()


def _work(
    number: int, of: int, tasks: Any, results: Any, out: Path, device: str | None, compile: bool
) -> None:
    """What each process does: it takes rows until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that was called
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // of))
    if torch.cuda.is_available() and device in (None, "cuda"):
        device = f"cuda:{number % torch.cuda.device_count()}"
    for drawn in draw(iter(tasks.get, None), out, device, compile):  # type: ignore[arg-type]
        results.put(drawn)


def _exit(code: int | None) -> str:
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-code).name
    return f"exit code {code}"


def note(drawn: Drawn, out: Path) -> None:
    """Adds a row to the manifest, on a line of its own: the last one may have been cut off by a kill."""
    line = json.dumps(drawn.line(), ensure_ascii=False) + "\n"
    with open(out / MANIFEST, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            line = line if file.read() == b"\n" else "\n" + line
        # A prompt need not be UTF-8.
        file.write(line.encode("utf-8", "replace"))


def note_forgotten(rows: Sequence[Row], out: Path) -> None:
    """Adds the rows whose picture is there, but not in the manifest, as a run was killed between the two."""
    noted = _noted(rows, out)
    for row in rows:
        if row.file not in noted and (out / row.file).exists() and (drawn := there(row, out)):
            note(drawn, out)


def _noted(rows: Sequence[Row], out: Path) -> dict[str, dict[str, Any]]:
    """Returns the last line of the manifest about each of these rows, by its file."""
    files, latest = {row.file for row in rows}, {}
    text = (out / MANIFEST).read_text("utf-8", "replace") if (out / MANIFEST).exists() else ""
    for line in text.split("\n"):
        # What raises is a line that was being written when a run was killed.
        with contextlib.suppress(ValueError, AttributeError):
            said = json.loads(line)
            if said.get("file") in files:
                latest[said["file"]] = said
    return latest


def sweep(rows: Sequence[Row], out: Path) -> None:
    """Removes the beginnings of pictures that a killed process left, when all rows are drawn."""
    files = {row.file for row in rows}
    for path in out.glob(".????????.*"):  # a name of `files.scratch`
        if path.name[len(".????????.") :] in files:
            path.unlink(missing_ok=True)


def write_table(rows: Sequence[Row], out: Path) -> Path | None:
    """Writes the manifest of all rows that are drawn as `manifest.parquet`, if pyarrow is there."""
    try:
        import pyarrow as arrow
        import pyarrow.parquet
    except ImportError:
        return None
    ordered = sorted(_noted(rows, out).values(), key=lambda said: said["row"])
    names = list(dict.fromkeys(name for said in ordered for name in said))
    columns = {name: [_cell(said.get(name)) for said in ordered] for name in names}
    path = out / "manifest.parquet"
    with whole(path) as temporary:
        pyarrow.parquet.write_table(arrow.table(columns), temporary)
    return path


def _cell(value: Any) -> Any:
    """A value that a column of a table can hold: lists, such as those of LoRAs, as JSON."""
    return json.dumps(value) if isinstance(value, list | dict) else value
