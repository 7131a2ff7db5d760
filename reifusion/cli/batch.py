"""`reifusion batch`: a table of pictures, drawn row by row, and resumed after a stop."""

from __future__ import annotations

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
    processes: Annotated[int, typer.Option(min=1, help="How many draw at the same time.")] = 1,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or mps. (default: the best there is)", show_default=False)
    ] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Compile the models.")] = False,
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

        if processes > 1:
            raise ValueError("--code is for one process; leave out --processes")
        run_file(str(given["code"]))
    rows, folder = read_rows(Path(table), replace(Settings(), **parsed(given))), Path(out)
    work.check(rows)
    with writable(folder):
        left = work.missing(rows, folder)
        if len(left) < len(rows):
            print(f"{len(rows) - len(left)} of {len(rows)} pictures are there already", file=sys.stderr)
        many = min(processes, len(left))
        drawing = (
            work.draw_in_processes(left, folder, many, device, compile)
            if many > 1
            else work.draw(left, folder, device, compile)
        )
        failed = 0
        with tqdm(total=len(left), unit="picture", disable=not sys.stderr.isatty()) as bar:
            for drawn in drawing:
                work.note(drawn, folder)
                bar.update()
                if drawn.error:
                    failed += 1
                    bar.clear()
                    print(f"reifusion: row {drawn.row.number + 1}: {drawn.error}", file=sys.stderr)
                else:
                    print(folder / drawn.row.file, flush=True)
        if left:
            work.write_table(rows, folder)
    if failed:
        raise RuntimeError(f"{failed} of {len(left)} pictures could not be drawn; manifest.jsonl says why")
