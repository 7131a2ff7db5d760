"""`reifusion studio`: a page in the browser."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated, Any

import typer

from ..files import writable
from .options import setting, takes


@takes(setting("model", "mini"))
def studio(
    given: dict[str, Any],
    port: Annotated[
        int | None,
        typer.Option(help="Where it listens.", min=1, max=65535, show_default="the first free one from 7860"),
    ] = None,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page.")] = True,
    out: Annotated[str, typer.Option(help="The folder for the pictures.")] = "images",
    preview_vae: Annotated[
        str | None,
        typer.Option(help="A tiny VAE (TAESD) to show the steps with.", show_default="the model's own"),
    ] = None,
) -> None:
    """Opens a page, on this machine only: draw, watch the picture form, look inside."""
    if importlib.util.find_spec("fastapi") is None or importlib.util.find_spec("uvicorn") is None:
        raise ValueError('the studio needs FastAPI; install it with: pip install "reifusion[studio]"')
    from ..studio.serve import run

    with writable(Path(out)):
        run(given["model"], port, browser, out, preview_vae)
