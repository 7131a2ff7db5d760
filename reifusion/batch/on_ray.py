"""The rows of a table, drawn on the machines of a Ray cluster.

Ray Data hands the rows to actors, each with a model of its own, and starts a row again when its actor, or its
machine, is gone. All machines see the same folders: that of the pictures, and those of the files that rows
name. A picture that is there already is not drawn again, so a row may be started twice without harm.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..settings import from_carried
from ..threads import wait_briefly
from .rows import Row
from .work import Drawn, draw, there

SOON = 10  # seconds to wait for an answer
PATIENCE = 3600  # seconds without a picture after which the run ends: actors that die are started for ever


def draw_on_ray(
    rows: Sequence[Row],
    out: Path,
    address: str,
    actors: int | None = None,
    device: str | None = None,
    compile: bool = False,
) -> Iterator[Drawn]:
    """Draws the rows on a cluster, and yields what became of each, in any order.

    address: of the cluster, as "host:6379" or "ray://host:10001"; "auto" for the one that this machine is in.
    actors: how many draw at the same time; None: one for each GPU, or for each machine if there are none.
    Raises RuntimeError if the cluster cannot be reached, or a row never comes back.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # what Ray would tell its makers
    _reach(address)
    import ray

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, ignore_reinit_error=True)
    except Exception as error:  # of many classes
        first, *_ = str(error).splitlines() or [type(error).__name__]
        raise RuntimeError(f"there is no Ray cluster at {address}: {first}") from None
    with contextlib.redirect_stdout(sys.stderr):  # where Ray says what died and is started again
        try:
            yield from _drawn(rows, out.absolute(), actors, device, compile)
        finally:
            ray.shutdown()


def _reach(address: str) -> None:
    """Raises RuntimeError if nobody listens there: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address != "auto":
        try:
            socket.create_connection((host, int(port)), timeout=SOON).close()
        except (OSError, ValueError) as error:
            raise RuntimeError(f"there is no Ray cluster at {address}: {error}") from None


def _drawn(
    rows: Sequence[Row], out: Path, actors: int | None, device: str | None, compile: bool
) -> Iterator[Drawn]:
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = PATIENCE
    gpus = 0 if device == "cpu" else int(ray.cluster_resources().get("GPU", 0))
    machines = sum(node["Alive"] for node in ray.nodes())
    actors = min(actors or gpus or machines, len(rows))
    known = {row.number: row for row in rows}
    asked = [{"row": row.number, "settings": json.dumps(row.settings.carried())} for row in rows]
    table = ray.data.from_items(asked, override_num_blocks=len(asked)).map_batches(
        Painter,  # one row a block, so that no more than one is drawn again when an actor dies
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=2),
        fn_constructor_args=(os.getcwd(), -(-actors // machines), str(out), device, compile),
        num_gpus=1 if gpus else None,
        # Less than a whole core, or Ray's own tasks find none on a small machine.
        num_cpus=None if gpus else 0.5,
    )
    for record in table.iter_rows():
        row = known.pop(record["row"], None)
        if row is not None:  # it may come twice, from an actor that was taken for dead
            yield Drawn(row, record["seconds"], json.loads(record["carried"]), record["error"])
    if known:
        raise RuntimeError(f"{len(known)} rows did not come back; the same command draws them")


class Painter:
    """What each actor runs: it loads a model when it needs it, and draws a row at each call."""

    def __init__(self, folder: str, share: int, out: str, device: str | None, compile: bool) -> None:
        """folder: where the command was given, for paths in rows that begin there. share: how many actors
        there are on a machine.
        """
        wait_briefly()
        import torch

        os.chdir(folder)
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // share))  # Ray allows one
        self._out = Path(out)
        self._next: deque[Row] = deque()
        # One call after the other, so that the model stays.
        self._drawing = draw(iter(self._next.popleft, None), self._out, device, compile)  # type: ignore[arg-type]

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """One row, as arrays of one -> what became of it, in the same form."""
        row = Row(int(batch["row"][0]), from_carried(json.loads(batch["settings"][0])))
        drawn = there(row, self._out) or self._draw(row)  # it is there if an actor died after it
        return {
            "row": [row.number],
            "seconds": [drawn.seconds],
            "carried": [json.dumps(drawn.carried)],
            "error": [drawn.error],
        }

    def _draw(self, row: Row) -> Drawn:
        self._next.append(row)
        return next(self._drawing)
