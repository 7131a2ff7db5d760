"""The map in chapter 1: the stations of a picture, each linked to its chapter and its code."""

from __future__ import annotations

import html
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from docs.equations import ROOT
from reifusion.model.attention import CrossAttention
from reifusion.model.clip import CLIP
from reifusion.model.ddpm import Sampler, randn
from reifusion.model.decoder import Decoder
from reifusion.model.diffusion import UNet
from reifusion.model.encoder import Encoder
from reifusion.model.guidance import Guidance
from reifusion.model.tokenizer import Tokenizer


class Station(NamedTuple):
    title: str
    does: str
    chapter: str
    code: Callable[..., Any]  # whose first line the map links to


# The rows of the map, from above: when, and what
ROWS = {
    "once, before": (
        Station("Tokenizer", "the prompt becomes 32 numbers", "words", Tokenizer.encode),
        Station("Text encoder", "they become 32 vectors of 192 numbers", "words", CLIP.forward),
        Station("Noise", "the seed becomes latents, 4×32×32", "forward", randn),
        Station("VAE encoder", "or a picture becomes them", "vae", Encoder.forward),
    ),
    "in each of 20 steps": (
        Station("U-Net", "sees noise in the latents", "unet", UNet.walk),
        Station("Attention", "places look at each other and at words", "attention", CrossAttention.forward),
        Station("Guidance", "enlarges what the words change", "guidance", Guidance.__call__),
        Station("Sampler", "takes some noise away", "samplers", Sampler.step),
    ),
    "once, at the end": (Station("VAE decoder", "latents become 256×256 pixels", "vae", Decoder.forward),),
}


def stations() -> str:
    """Returns the map as HTML, for a page in book/."""
    rows = []
    for when, row in ROWS.items():
        boxes = "".join(
            f'<li><a class="station" href="{one.chapter}.html">{html.escape(one.title)}</a>'
            f"<span>{html.escape(one.does)}</span>{_line(one.code)}</li>"
            for one in row
        )
        rows.append(f"<li><b>{when}</b><ol>{boxes}</ol></li>")
    return f'<nav class="stations" aria-label="The stations of a picture"><ol>{"".join(rows)}</ol></nav>'


def _line(code: Callable[..., Any]) -> str:
    path = Path(inspect.getsourcefile(code) or "").relative_to(ROOT).as_posix()
    line = inspect.getsourcelines(code)[1]
    shown = path.removeprefix("reifusion/model/")
    return f'<a class="line" href="../source/{path}.html#L{line}">{shown}:{line}</a>'
