"""`reifusion serve`: pictures over HTTP."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace
from os.path import isdir
from pathlib import Path
from typing import Annotated, Any

import typer

from ..settings import Settings, parsed
from .options import setting, takes


@takes(setting("model", "mini"), *map(setting, ("vae", "dtype", "int8", "fp8", "manner")))
def serve(
    given: dict[str, Any],
    models: Annotated[
        str | None, typer.Option(help="A folder; its models can be asked for by name.", show_default=False)
    ] = None,
    loras: Annotated[
        str | None, typer.Option(help="A folder; its LoRAs can be asked for by name.", show_default=False)
    ] = None,
    controls: Annotated[
        str | None,
        typer.Option(help="A folder; its ControlNets can be asked for by name.", show_default=False),
    ] = None,
    host: Annotated[str, typer.Option(help="Where it listens; other than here, with a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where it listens.")] = 7861,
    token_file: Annotated[
        str | None,
        typer.Option(
            help="A file with the token that requests must have. (default: that in REIFUSION_TOKEN, or none)",
            show_default=False,
        ),
    ] = None,
    queue: Annotated[int, typer.Option(min=1, help="Requests that may wait; more get 429.")] = 64,
    keep: Annotated[int, typer.Option(min=1, help="Models that stay in memory.")] = 1,
    max_side: Annotated[int, typer.Option(min=8, help="Pixels at a picture's side.")] = 2048,
    max_pixels: Annotated[int, typer.Option(min=64, help="Pixels of a picture.")] = 2_400_000,
    max_steps: Annotated[int, typer.Option(min=1, max=1000, help="Steps of a picture.")] = 150,
    max_pictures: Annotated[int, typer.Option(min=1, help="Pictures of a request.")] = 10,
    max_body: Annotated[int, typer.Option(min=1, help="MiB of a request.")] = 32,
    grace: Annotated[
        float, typer.Option(min=0, help="Seconds that are left to what is drawn when it is told to stop.")
    ] = 30.0,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or mps. (default: the best there is)", show_default=False)
    ] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Compile the model.")] = False,
) -> None:
    """Serves OpenAI's images API and that of AUTOMATIC1111's web UI, on this machine only unless told."""
    needed = ("fastapi", "uvicorn", "prometheus_client", "multipart")
    if any(importlib.util.find_spec(name) is None for name in needed):
        raise ValueError('serving needs FastAPI; install it with: pip install "reifusion[server]"')
    from ..server.app import Config, run
    from ..server.limits import Limits

    limits = Limits(max_side, max_pixels, max_steps, max_pictures, body=max_body * 2**20)
    run(
        Config(
            replace(Settings(), **parsed(given)), _folder(models), _folder(loras), _folder(controls), host,
            port, _token(token_file), queue, keep, grace, limits, device, compile,
        )
    )  # fmt: skip


def _folder(path: str | None) -> Path | None:
    if path is not None and not isdir(path):
        raise ValueError(f"there is no folder {path}")
    return None if path is None else Path(path)


def _token(file: str | None) -> str | None:
    """Not an option itself, as every process on the machine can read the command line."""
    if file is None:
        return os.environ.get("REIFUSION_TOKEN") or None
    try:
        return Path(file).read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
