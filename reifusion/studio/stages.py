"""Explains the stage on view: the equations, and the lines that compute them.

Both are read from the code itself. An equation is a comment that begins with `# [id] source: …`; the
statement below it computes it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path

from ..model.attention import softmax_attention
from ..model.clip import CLIPEmbedding
from ..model.ddpm import Sampler, randn
from ..model.encoder import scale_latents, unscale_latents
from ..model.guidance import Guidance
from ..model.pictures import to_picture
from .drawing import Drawing

PACKAGE = Path(__file__).parents[2]
MOST = 14  # lines of an excerpt


@dataclass(frozen=True)
class Excerpt:
    equation: str  # with its source: "Eq. 4, Ho et al. 2020: q(xₜ | x₀) = …"; empty for code without one
    code: str
    place: str  # "reifusion/model/ddpm.py:181"


def excerpts(thing: Callable | type, *ids: str) -> list[Excerpt]:
    """Returns the equations in the source of a function or class: those with the ids, or all without ids."""
    lines, first = inspect.getsourcelines(thing)
    found, i = [], 0
    while i < len(lines):
        mark = re.match(r"(\s*)# \[([a-z][\w-]*)\] (.*)", lines[i])
        i += 1
        if mark is None or (ids and mark[2] not in ids):
            continue
        text = [mark[3]]
        while i < len(lines) and lines[i].strip().startswith("#"):
            text.append(lines[i].strip("# \n"))
            i += 1
        end = i  # the statements of this paragraph, at the equation's indentation or deeper
        while end < min(len(lines), i + MOST) and re.match(rf"{mark[1]}(?!# \[)\s*\S", lines[end]):
            end += 1
        found.append(_excerpt(thing, " ".join(text), lines[i:end], first + i))
    return found


def whole(thing: Callable) -> Excerpt:
    """Returns the source of a function without an equation, as far as there is room."""
    lines, first = inspect.getsourcelines(thing)
    more = ["    …\n"] if len(lines) > MOST else []
    return _excerpt(thing, "", lines[:MOST] + more, first)


def _excerpt(thing: Callable | type, equation: str, lines: list[str], line: int) -> Excerpt:
    path = Path(inspect.getsourcefile(inspect.unwrap(thing)) or "").resolve()
    return Excerpt(
        equation, inspect.cleandoc("\n" + "".join(lines)), f"{path.relative_to(PACKAGE).as_posix()}:{line}"
    )


def _way_back(sampler: Sampler) -> list[Excerpt]:
    """Returns the equations of a sampler's step: its own, and those of the class that defines the step."""
    kind = type(sampler)
    giver = next(one for one in kind.__mro__ if "_step" in vars(one) or "step" in vars(one))
    found = [excerpt for one in dict.fromkeys((kind, giver)) for excerpt in excerpts(one)]
    return found or [whole(kind._step)]


def happens(drawing: Drawing, place: int) -> str:
    """Returns HTML that explains what happens at that place of the slider."""
    frame, sampler, request = drawing.frames[place], drawing.sampler, drawing.request
    assert sampler is not None
    if frame.step is None and place == 0:
        sections = [
            ("The prompt becomes numbers", "Each token has a vector; then the tokens read each other.",
             excerpts(CLIPEmbedding.forward)),
            ("Noise is drawn", f"From the seed, {request.seed}, on the CPU: everywhere the same.",
             [whole(randn)]),
        ]  # fmt: skip
        if request.init_image is not None:
            said = "The loop begins with your picture under noise, and not with noise alone."
            sections.append(("Your picture", said, excerpts(type(sampler).add_noise)))
    elif frame.step is None:
        said = "The latents, a small picture of four numbers a place, become pixels."
        found = [*excerpts(scale_latents), whole(unscale_latents), whole(to_picture)]
        sections = [("The picture is decoded", said, found)]
    else:
        kind = {"epsilon": ["x0-from-eps"], "v_prediction": ["x0-from-v"]}.get(sampler.prediction_type, [])
        said = f"At t = {frame.t:g} the network looks at the noisy latents and, by attention, at the words."
        sections = [("The pixels look at the words", said, excerpts(softmax_attention, "attention"))]
        if frame.push is not None:
            said = f"The prompt's push, {frame.push:.4f} on average, is multiplied by {request.cfg:g}."
            sections.append(("Guidance", said, excerpts(Guidance.__call__, "guidance")))
        said = "The clean picture above follows from the noise that the network sees."
        sees = excerpts(type(sampler).predict, *kind) or [whole(type(sampler).predict)]
        sections.append(("What it sees", said, sees))
        said = f"{sampler.title} goes on to the next, less noisy latents."
        sections.append(("One step back", said, _way_back(sampler)))
    stages = "".join(
        f'<section class="stage"><h3>{escape(title)}</h3><p>{escape(said)}</p>'
        + "".join(map(_html, found))
        + "</section>"
        for title, said, found in sections
    )
    return f'<div class="stages">{stages}</div>'


def _html(excerpt: Excerpt) -> str:
    equation = f'<p class="equation">{escape(excerpt.equation)}</p>' if excerpt.equation else ""
    code = f"<pre><code>{escape(excerpt.code)}</code></pre>"
    return f'{equation}{code}<p class="place">{escape(excerpt.place)}</p>'
