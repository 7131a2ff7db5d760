"""`reifusion train`."""

from __future__ import annotations

import typer


def train(context: typer.Context) -> None:
    """Trains a model; `reifusion train --help` says how."""
    from ..train.__main__ import main

    if (code := main(context.args)) == 130:  # it has said that it was stopped
        raise SystemExit(code)
    raise typer.Exit(code)
