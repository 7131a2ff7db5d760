"""`reifusion samplers`: every sampler and schedule, what it costs, and its names in other programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer


def samplers(
    code: Annotated[str | None, typer.Option(help="A Python file with your own; it is run.")] = None,
) -> None:
    """Lists samplers and schedules, with their names in diffusers, A1111, ComfyUI and stable-diffusion.cpp.

    Order: the error falls with the step's length to that power. Calls: of the network, in a step. Noise:
    fresh in each step, by --eta where you can choose.
    """
    from .. import families  # noqa: F401  # adds its samplers
    from ..own import run_file
    from ..sampling.elsewhere import samplers_table, schedules_table

    if code is not None:
        run_file(code)
    print(aligned(samplers_table()), aligned(schedules_table()), sep="\n\n")


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Returns the rows with their columns below one another."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows)
