"""The stations of the pipeline, from the prompt to the picture: what each does at a place of the slider.

A station says in a sentence what happens there, which numbers enter, and has the tensors that are there now,
the lines of code that are at work, and its chapter of the book.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..explain.trajectory import rms
from ..explain.words import label
from ..families.mmdit import JointAttention
from ..model.attention import softmax_attention
from ..model.clip import CLIP, CLIPEmbedding
from ..model.config import UNetConfig
from ..model.ddpm import Sampler, randn
from ..model.encoder import unscale_latents
from ..model.guidance import Guidance
from ..model.pictures import to_picture
from ..model.tokenizer import Tokenizer
from .drawing import Drawing
from .excerpts import Excerpt, coloured, excerpts, whole
from .views import begun_with_picture, caption, heats, push, shares, tensor, under

# The book, where it is built: in the package, or in a clone
BOOKS = (Path(__file__).parents[1] / "data" / "book", Path(__file__).parents[2] / "site")
BOOK = next((folder for folder in BOOKS if (folder / "index.html").is_file()), None)
CHAPTERS = {
    "words": "Words", "forward": "Noise, and the forward process", "attention": "Attention",
    "guidance": "Guidance", "reverse": "The reverse step, derived", "samplers": "Samplers as solvers",
    "vae": "The VAE, and why latents", "flow": "From DDPM to rectified flow",
    "sd3": "Words and pixels at one table",
}  # fmt: skip


@dataclass
class Station:
    """One box of the map."""

    title: str
    now: str  # what is written in the box: a few letters
    said: str
    chapter: str
    code: Sequence[Excerpt] = ()
    tensors: dict[str, str] = field(default_factory=dict)  # the name that `views.tensor` knows -> a label
    rows: list[tuple[str, str]] = field(default_factory=list)  # what else is there: a name and a value
    filled: str = ""  # the equation with the numbers of this place


def stations(drawing: Drawing, place: int) -> dict[str, Station]:
    """Returns the boxes of the map in the order of the work."""
    frame, sampler, request, pipe = drawing.frames[place], drawing.sampler, drawing.request, drawing.pipe
    assert sampler is not None and request is not None and pipe is not None
    prompt, room = request.prompts[0] or drawing.settings.prompt or "", pipe.config.clip.context_length
    pieces = pipe.tokenizer.pieces(prompt)[: room - 2]
    joint = not isinstance(pipe.config.unet, UNetConfig)  # Stable Diffusion 3
    running, begun = frame.step is not None, begun_with_picture(drawing)
    at = f"At t = {frame.t:g}" if running else "In each step"
    shape = " × ".join(map(str, frame.x_t.shape[1:]))
    found = {
        "tokens": Station(
            "Tokens", f"{len(pieces) + 2} of {room}",
            f"Each word becomes one or more of {pipe.tokenizer.vocab_size:,} tokens; a start, an end and "
            f"padding make {room}.", "words", [whole(Tokenizer.encode)],
            rows=[(piece.text, str(piece.id)) for piece in pieces],
        ),
        "clip": Station(
            "CLIP", "" if drawing.words is None else " × ".join(map(str, drawing.words.shape)),
            "Each token has a vector, and then reads those before it: a row for each token.",
            "words", [*excerpts(CLIPEmbedding.forward), whole(CLIP.forward)],
            {"words": "the words' vectors, start first"},
        ),
        "noise": Station(
            "Noise", f"seed {request.seeds[0]}",
            "The loop begins with your picture under noise, and not with noise alone." if begun
            else f"From the seed, {request.seeds[0]}, on the CPU: everywhere the same.",
            "forward",
            (excerpts(type(sampler).add_noise) or excerpts(Sampler.add_noise)) if begun else [whole(randn)],
            {"x_t": "x_t, as the sampler scales it"} if place == 0 else {},
        ),
        "unet": Station(
            "Transformer" if joint else "U-Net", f"t = {frame.t:g}" if running else f"{drawing.total} times",
            f"{at} the network looks at the noisy latents and, by attention, at the words.",
            "sd3" if joint else "attention",
            excerpts(*((JointAttention, "joint-attention") if joint else (softmax_attention, "attention"))),
            {"scaled": "x_t, which it is given", "cond": "the noise that it sees"} if running else {},
            _layers(drawing, place),
        ),
        "guidance": _guidance(drawing, place),
        "sampler": _sampler(drawing, place),
        "vae": Station(
            "VAE", shape,
            f"The latents, a small picture of {frame.x_t.shape[1]} numbers a place, become pixels.",
            "vae", [whole(unscale_latents), whole(to_picture)],
            {"x_t": "the latents"} if not running and place else {"x0": "x̂₀"} if running else {},
        ),
    }  # fmt: skip
    return found


def _layers(drawing: Drawing, place: int) -> list[tuple[str, str]]:
    """Returns each layer in which pixels look at words, with the word that they look at most."""
    attention, step = drawing.attention, drawing.frames[place].step
    if attention is None or not attention.words:
        return []
    rows = []
    for name, maps in attention.maps.items():  # (N, heads, T, h, w)
        mean = (maps if step is None else maps[step : step + 1]).float().mean((0, 1, 3, 4))  # (T,)
        shares = [(sum(mean[k].item() for k in word.tokens), word.text) for word in attention.words]
        share, text = max(shares)
        rows.append((f"{label(name)}, {maps.shape[-1]} × {maps.shape[-2]}", f"{text} {share:.1%}"))
    return rows


def _guidance(drawing: Drawing, place: int) -> Station:
    request, pushed = drawing.request, push(drawing, place)
    assert request is not None
    said = f"What the prompt changes is multiplied by s = {request.cfg:g}."
    if pushed is not None:
        said = f"The prompt's push, {pushed:.4f} on average, is multiplied by s = {request.cfg:g}."
    elif request.cfg == 1:
        said = "At s = 1 there is no guidance: the network runs once a step, with the prompt alone."
    elif drawing.frames[place].step is not None:
        said = "There is no guidance in this step: the network runs once, with the prompt alone."
    found = excerpts(Guidance.__call__, "guidance")
    return Station(
        "Guidance", f"s = {request.cfg:g}", said, "guidance", found,
        {} if pushed is None else {"uncond": "without the prompt", "push": "where the prompt pushes"},
        filled="" if pushed is None else f"ε = ε_uncond + {request.cfg:g} (ε_cond − ε_uncond)",
    )  # fmt: skip


def _sampler(drawing: Drawing, place: int) -> Station:
    frame, sampler = drawing.frames[place], drawing.sampler
    assert sampler is not None
    kind = {"epsilon": ["x0-from-eps"], "v_prediction": ["x0-from-v"]}.get(sampler.prediction_type, [])
    sees = excerpts(type(sampler).predict, *kind) or [whole(type(sampler).predict)]
    flow = sampler.prediction_type == "flow"
    chapter = "flow" if flow else "reverse" if sampler.name == "ddpm" else "samplers"
    rows, filled = [], ""
    if frame.step is not None and frame.x0 is not None and (share := shares(drawing, place)) is not None:
        filled = _filled(sampler.prediction_type, *share)
        rows = [
            ("noise beside one part of picture", f"{frame.sigma:.3f}"),
            ("size of x̂₀", f"{rms(frame.x0):.3f}"),
        ]
    return Station(
        "Sampler", sampler.title,
        f"From the noise that was seen follows x̂₀, the clean picture; {sampler.title} then goes on to the "
        "next, less noisy latents.",
        chapter, [*sees, *way_back(type(sampler))],
        {} if frame.step is None
        else {
            "scaled": "x_t, as the network is given it",
            "x0": "x̂₀",
            "next": "the next x_t, in the sampler's scale",
        },
        rows,
        filled,
    )  # fmt: skip


def _filled(prediction: str, signal: float, noise: float) -> str:
    """Returns how x̂₀ follows, with the shares of picture and noise in x_t as numbers."""
    if prediction == "flow":
        return f"x̂₀ = xₜ − {noise:.3f} v"
    if prediction == "epsilon":
        return f"x̂₀ = (xₜ − {noise:.3f} ε) / {signal:.3f}"
    return f"x̂₀ = {signal:.3f} xₜ − {noise:.3f} v"


def way_back(kind: type[Sampler]) -> tuple[Excerpt, ...]:
    """Returns the equations of a sampler's step: its own, and those of the class that defines the step."""
    giver = next(one for one in kind.__mro__ if "_step" in vars(one) or "step" in vars(one))
    found = [excerpt for one in dict.fromkeys((kind, giver)) for excerpt in excerpts(one)]
    return tuple(found) or (whole(kind._step),)


def facts(drawing: Drawing, place: int) -> dict[str, Any]:
    """Returns all that the page shows at a place of the slider, ready for JSON."""
    frame, share = drawing.frames[place], shares(drawing, place)
    return {
        "place": place,
        "caption": caption(drawing, place),
        "under": under(drawing, place),
        "step": frame.step,
        "t": frame.t,
        "share": share,
        "heats": heats(drawing, place),
        "stations": {name: _as_json(drawing, place, one) for name, one in stations(drawing, place).items()},
    }


def _as_json(drawing: Drawing, place: int, station: Station) -> dict[str, Any]:
    chapter = station.chapter
    there = BOOK is not None and (BOOK / "book" / f"{chapter}.html").is_file()
    shown = []
    for name, said in station.tensors.items():
        if (values := tensor(drawing, place, name)) is not None:
            shape = " × ".join(map(str, values.shape[-3:]))
            mean, std = values.mean().item(), values.std(correction=0).item()
            shown.append({"name": name, "label": said, "shape": shape, "mean": mean, "std": std})
    return {
        "title": station.title,
        "now": station.now,
        "said": station.said,
        "chapter": CHAPTERS[chapter],
        "book": f"/book/book/{chapter}.html" if there else None,
        "code": [
            {"equation": one.equation, "html": coloured(one.code), "place": one.place} for one in station.code
        ],
        "tensors": shown,
        "rows": station.rows,
        "filled": station.filled,
    }
