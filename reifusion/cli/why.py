"""`reifusion why`: why two pictures differ, and what each difference is worth."""

from __future__ import annotations

from typing import Annotated

import typer

from .samplers import aligned


def why(
    first: Annotated[str, typer.Argument(help="A picture.", show_default=False)],
    second: Annotated[str, typer.Argument(help="Another.", show_default=False)],
    model: Annotated[str, typer.Option(help="What the differences are tried with.")] = "mini",
    steps: Annotated[int, typer.Option(help="How many steps the first picture gets there.")] = 10,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or mps. (default: the best there is)", show_default=False)
    ] = None,
) -> None:
    """Says why two pictures differ, by the settings in their files: ours, A1111's, ComfyUI's or sd.cpp's.

    The first is drawn again with one difference at a time. Levels: how far that moves a pixel, on average.
    """
    from ..explain import why as reasons

    if not 1 <= steps <= 1000:
        raise ValueError(f"--steps must be between 1 and 1000, not {steps}")
    found = reasons.why(first, second, model=model, steps=steps, device=device)
    distance = reasons.apart(first, second)
    if distance is not None:
        print(f"The pictures are {distance:.2f} levels of 255 apart.\n")
    print(aligned(reasons.table(found)) if found else "Their files say the same.")
