"""`reifusion train`."""

from __future__ import annotations

import typer


def train(context: typer.Context) -> None:
    """Trains a model; `reifusion train --help` says how."""
    from ..train.__main__ import main

    raise typer.Exit(main(context.args) or 0)
