"""`reifusion batch`: a table of pictures, drawn row by row, and resumed after a stop."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..files import writable
from ..settings import ABOUT, Settings, parsed
from .options import setting, takes


@takes(*[setting(name) for name in ABOUT if name != "prompt"])
def batch(
    given: dict[str, Any],
    table: Annotated[
        str,
        typer.Argument(
            metavar="TABLE",
            help="A .txt with a prompt a line; or a .csv, .jsonl or .parquet with settings as columns.",
        ),
    ],
    out: Annotated[str, typer.Option(help="The folder to write to.")] = "batch",
    processes: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="How many draw at the same time. (default: 1; on Ray, one for each GPU or machine)",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or mps. (default: the best there is)", show_default=False)
    ] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Compile the models.")] = False,
    ray: Annotated[
        str | None,
        typer.Option(
            help="Draw on this Ray cluster, as host:6379, or auto; all its machines see the same folders.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Draws a row a picture; the same command goes on after a stop, and draws only what is not there.

    Options are the settings of rows that have none of their own. A seed that is left open is the row's
    number, so the same table draws the same pictures. manifest.jsonl, and .parquet, say what was drawn from
    what.
    """
    from tqdm import tqdm

    from ..batch import work
    from ..batch.rows import read_rows

    if given.get("code") is not None:
        from ..own import run_file

        if (processes or 1) > 1 or ray is not None:
            raise ValueError("--code is for one process; leave out --processes")
        run_file(str(given["code"]))
    if ray is not None and importlib.util.find_spec("ray") is None:
        raise ValueError('--ray needs Ray; install it with: pip install "reifusion[ray]"')
    rows, folder = read_rows(Path(table), replace(Settings(), **parsed(given))), Path(out)
    work.check(rows)
    with writable(folder):
        left = work.missing(rows, folder)
        work.note_forgotten(rows, folder)
        if len(left) < len(rows):
            print(f"{len(rows) - len(left)} of {len(rows)} pictures are there already", file=sys.stderr)
        many = min(processes or 1, len(left))
        if ray is not None and left:
            from ..batch.on_ray import draw_on_ray

            drawing = draw_on_ray(left, folder, ray, processes, device, compile)
        elif many > 1:
            drawing = work.draw_in_processes(left, folder, many, device, compile)
        else:
            drawing = work.draw(left, folder, device, compile)
        failed, paths = 0, sys.stdout
        with tqdm(total=len(left), unit="picture", disable=not sys.stderr.isatty()) as bar:
            for drawn in drawing:
                work.note(drawn, folder)
                bar.update()
                if drawn.error:
                    failed += 1
                    bar.clear()
                    print(f"reifusion: row {drawn.row.number + 1}: {drawn.error}", file=sys.stderr)
                else:
                    print(folder / drawn.row.file, file=paths, flush=True)
        work.sweep(rows, folder)
        work.write_table(rows, folder)
    if failed:
        raise RuntimeError(f"{failed} of {len(left)} pictures could not be drawn; manifest.jsonl says why")
