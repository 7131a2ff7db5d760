"""`reifusion evaluate`: how a model draws what a data set has, in figures and sheets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..files import free, writable
from ..settings import ABOUT, Settings, parsed, requested
from .options import option, setting, takes

OWN = ("negative", "lora", "embedding", "sampler", "steps", "cfg", "size", "vae", "dtype")


@takes(
    option("model", ABOUT["model"].help, argument=True, required=True, metavar="MODEL"),
    *[setting(name) for name in OWN],
)
def evaluate(
    given: dict[str, Any],
    data: Annotated[str, typer.Option(help="Pictures with captions, as for training.", show_default=False)],
    prompts: Annotated[str, typer.Option(help="A .txt with a prompt a line, in place of captions.")] = "",
    count: Annotated[int, typer.Option(min=4, help="Pictures to draw, of all prompts and seeds.")] = 64,
    seeds: Annotated[int, typer.Option(min=2, help="Pictures of each prompt.")] = 4,
    features: Annotated[str, typer.Option(help="The model whose U-Net looks at the pictures.")] = "mini",
    out: Annotated[str, typer.Option(help="The folder to write to.")] = "evaluation",
) -> None:
    """Draws captions of a data set and compares the pictures with the data's: how far, how varied, copies?

    KID is 0 if nobody could tell the drawn pictures from the data's; the last column says what the data alone
    would get. Figures compare only with those of the same data and --features. Look at the sheets: drawn.png
    shows every picture, nearest.png those that are most like one of the data, which stands below.
    """
    settings = replace(Settings(prompt="", seed=0), **parsed(given))
    settings.request().for_model(settings.config())  # what cannot be drawn is found before the data is read
    if seeds * 2 > count:
        raise ValueError(f"--count must be at least twice --seeds, and {count} is less than {2 * seeds}")
    folder = free(Path(out))
    with writable(folder):
        from ..api import load
        from ..train.evaluate import Features
        from ..train.evaluate import evaluate as measure
        from ..train.images import open_pictures
        from ..train.watch import prompts_of_sheet

        wanted = prompts_of_sheet([prompts], None, 0, 0) if prompts else ()
        pictures = open_pictures(data)
        looks = Features(load(features))
        asked = {name: getattr(settings, name) for name in OWN if name in requested() and name in given}
        found = measure(settings.pipe(), pictures, looks, wanted, count, seeds, **asked)
        found.write(folder)
    print(found)
    print(folder)
