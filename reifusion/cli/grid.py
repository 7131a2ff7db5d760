"""`reifusion grid`: one picture of many, in which one or two settings change."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..files import writable
from ..settings import ABOUT, Settings, parsed
from .options import setting, takes


@takes(*map(setting, ABOUT))
def grid(
    given: dict[str, Any],
    x: Annotated[str, typer.Option(help="A setting and its values from left to right: cfg=3,5,7")],
    y: Annotated[str, typer.Option(help="The same from top to bottom: 'sampler=ddim,euler_a'")] = "",
    out: Annotated[str, typer.Option(help="A .png file, or a folder.")] = "images",
    keep: Annotated[bool, typer.Option("--keep", help="Keep the single pictures too, beside it.")] = False,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or mps. (default: the best there is)", show_default=False)
    ] = None,
) -> None:
    """Draws a table of pictures in which one setting changes from left to right, another from top to bottom.

    Values have commas between them, or | if they have commas themselves: --x "prompt=a cat|a dog, running". A
    seed that is left open is 0 everywhere.
    """
    from tqdm import tqdm

    from .. import album
    from .. import grid as grids

    across = grids.Axis.read(x)
    down = grids.Axis.read(y) if y else grids.NOTHING
    usual = replace(Settings(), **parsed(given))
    if usual.prompt is None and "prompt" in (across.name, down.name):
        usual = replace(usual, prompt="")
    if usual.code is not None:
        from ..own import run_file

        run_file(usual.code)
    rows = grids.cells(usual, across, down)
    file = album.png_path(out)
    folder = file.parent if file else Path(out)
    with writable(folder):
        pictures: list[list[Any]] = [[None] * len(row) for row in rows]
        drawn: list[tuple[int, int, Any, Any]] = []
        drawing = tqdm(
            grids.draw(rows, device), total=len(rows) * len(rows[0]), disable=not sys.stderr.isatty()
        )
        for k, i, picture, entry in drawing:
            pictures[k][i] = picture
            drawn.append((k, i, picture, entry))
        from ..files import free, whole

        names = "-".join(filter(None, (across.name, down.name)))
        path = free(file or folder / f"grid-{album.slug(usual.prompt or 'prompts')}-{names}.png")
        with whole(path) as temporary:
            grids.table(pictures, across, down).save(temporary, "PNG")
        if keep:
            for k, i, picture, entry in sorted(drawn, key=lambda one: one[:2]):
                values = (str(getattr(rows[k][i], axis.name)) for axis in (across, down) if axis.name)
                name = "-".join([path.stem, *map(album.slug, values)])
                album.save(picture, entry, path.with_name(f"{name}.png"))
    print(path)
