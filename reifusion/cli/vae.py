"""`reifusion vae …`: a VAE by itself, whatever the file it is in."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated, Any

import typer

from ..files import free, writable
from .models import check_target

app = typer.Typer(help="A VAE by itself: a picture drawn through it, and its file in another format.")
File = Annotated[str, typer.Argument(metavar="FILE", help="A VAE, or a model with one.")]


@app.command()
def show(
    file: File,
    picture: Annotated[str, typer.Argument(metavar="PICTURE", help="Any picture.")] = "",
    out: Annotated[str, typer.Option(help="The folder to write to.")] = "explain",
) -> None:
    """Draws a picture, or a test card, through a VAE: what comes back, the error, and the latents."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError('showing a VAE needs matplotlib: pip install "reifusion[explain]"')
    from ..model.pictures import read_picture

    given = read_picture(picture) if picture else None
    with writable(Path(out)):
        pipe = _load(file)
        from ..explain.latents import round_trip

        exhibit = round_trip(pipe, given)
        path = free(Path(out) / f"vae-{pipe.config.name}-{Path(picture).stem or 'test-card'}.png")
        exhibit.save(path)
    print(exhibit.alt)
    print(path)


@app.command()
def convert(
    file: File,
    target: Annotated[str, typer.Argument(metavar="DST", help="What to write.")],
    to: Annotated[str, typer.Option(help="native, compvis (one file) or diffusers (a folder).")],
    dtype: Annotated[str, typer.Option(help="fp32, fp16 or bf16.", show_default="as it is")] = "",
) -> None:
    """Writes a VAE alone, bit for bit unless --dtype says otherwise."""
    from ..api import DTYPES
    from ..weights.vae import save_vae

    check_target(target, to, dtype, DTYPES)
    with writable(Path(target).parent):
        save_vae(_load(file), target, to, DTYPES.get(dtype))
    print(target)


def _load(file: str) -> Any:
    from ..weights.vae import load_vae

    return load_vae(file)
