"""`reifusion edges`: the edges of a picture, as a hint for a ControlNet."""

from __future__ import annotations

from typing import Annotated

import typer

from ..files import named, whole, writable


def edges(
    picture: Annotated[str, typer.Argument(help="The picture.", show_default=False)],
    out: Annotated[str, typer.Option(help="The .png file to write.")] = "edges.png",
    low: Annotated[float, typer.Option(help="An edge goes on while brightness changes by more.")] = 100,
    high: Annotated[float, typer.Option(help="An edge begins where brightness changes by more.")] = 200,
) -> None:
    """Draws the edges of a picture, white on black."""
    from ..steer.edges import edges

    path = named(out)
    if path.suffix.lower() != ".png":
        raise ValueError(f"--out must be the name of a .png file, not {out}")
    with writable(path.parent):
        found = edges(picture, low, high)
        with whole(path) as temporary:
            found.save(temporary, "PNG")
    print(path)
