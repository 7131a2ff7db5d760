"""How a drawing looks in the page: the picture with its words, and its place on the noise schedule."""

from __future__ import annotations

import base64
import io
import json
from html import escape
from typing import Any

import numpy as np
from torch.nn import functional as F

from ..explain.words import relative
from .drawing import Drawing

GRID = 64  # the finest grid on which heat maps are sent; only the attention of large pictures is finer


def view(drawing: Drawing, place: int) -> str:
    """Returns HTML: the frame at that place of the slider, and the prompt's words with their heat there.

    `studio.js` connects pixels and words, by mouse and by keyboard.
    """
    frame = drawing.frames[place]
    stream = io.BytesIO()
    frame.picture.save(stream, "PNG")
    words, heats = _heats(drawing, place)
    chips = "".join(
        f'<button type="button" class="word" data-word="{i}">{escape(text)}'
        f" <small>{share:.1%}</small></button>"
        for i, (text, share) in enumerate(words)
    )
    hint = (
        "Point at a word to see its pixels, or at the picture to see its words. Keyboard: Tab to a word, or "
        "to the picture and move about with the arrows."
    )
    return f"""<figure class="view" data-heats="{escape(json.dumps(heats))}">
<div class="canvas" {'tabindex="0" role="application"' if words else ""}
 aria-label="The picture, word by word">
<img alt="{escape(caption(drawing, place))}: {escape(drawing.request.prompts[0])}"
 src="data:image/png;base64,{_base64(stream.getvalue())}"><canvas aria-hidden="true"></canvas></div>
<figcaption><b>{escape(caption(drawing, place))}</b>
<div class="words" role="group" aria-label="Words of the prompt">{chips}</div>
<p class="here" role="status">{hint if words else ""}</p></figcaption></figure>"""


def caption(drawing: Drawing, place: int) -> str:
    frame = drawing.frames[place]
    if frame.step is not None:
        return (
            f"step {frame.step + 1} of {drawing.total}, t = {frame.t:g}: what the network sees in the noise"
        )
    if place == 0:
        return "the noise it began with"
    return "the picture" if drawing.path else "what the network saw when drawing was stopped"


def _heats(drawing: Drawing, place: int) -> tuple[list[tuple[str, float]], dict[str, object]]:
    """Returns each word with its share of all attention, and the words' maps in bytes, each up to 255."""
    frame, attention = drawing.frames[place], drawing.attention
    if attention is None or not attention.maps or (place == 0 and frame.step is None):
        return [], {}
    steps = slice(None) if frame.step is None else slice(frame.step, frame.step + 1)
    heats = [attention.heat(word, steps) for word in attention.words]  # each (H, W)
    words = [(word.text, heat.mean().item()) for word, heat in zip(attention.words, heats)]
    scale = min(1, GRID / max(attention.size))
    grid = [max(1, round(side * scale)) for side in attention.size]
    small = [F.interpolate(relative(heat)[None, None], grid[::-1], mode="area")[0, 0] for heat in heats]
    maps = [_base64((heat.numpy() * 255).round().astype(np.uint8).tobytes()) for heat in small]
    return words, {"width": grid[0], "height": grid[1], "maps": maps}


def schedule(drawing: Drawing, place: int) -> str:
    """Returns an SVG: the shares of picture and noise at each t, the sampler's timesteps, the current t."""
    width, height, left, foot = 560, 150, 8, 26
    last = len(drawing.signal) - 1
    timesteps = [float(t) for t in drawing.sampler.timesteps] if drawing.sampler else []

    def x(t: float) -> float:  # from noise to picture, as time goes
        return round(left + (width - 2 * left) * (1 - t / last), 1)

    def curve(values: list[float], name: str) -> str:
        points = (
            f"{x(t)},{height * (1 - values[t]) + 6:.1f}" for t in range(0, last + 1, max(1, last // 100))
        )
        return f'<polyline class="{name}" points="{" ".join(points)}"/>'

    ticks = "".join(f'<path class="tick" d="M{x(t)},{height + 8}v8"/>' for t in timesteps)
    frame = drawing.frames[place]
    t = frame.t if frame.t is not None else timesteps[0] if place == 0 and timesteps else 0
    here = f'<path class="marker" d="M{x(t)},2V{height + 20}"/>'
    at = min(last, max(0, round(t)))
    now = f"t = {t:g}: picture × {drawing.signal[at]:.3f}, noise × {drawing.noise[at]:.3f}"
    return f"""<figure class="schedule"><svg viewBox="0 0 {width} {height + foot}" role="img"
 aria-label="The noise schedule, from noise to picture; here {now}">{curve(drawing.signal, "signal")}
{curve(drawing.noise, "noise")}{ticks}{here}</svg>
<figcaption>{now}. <span class="signal">Picture</span> rises, <span class="noise">noise</span> falls; below,
the timesteps at which the sampler looks.</figcaption></figure>"""


def carries(settings: dict[str, Any]) -> str:
    """Returns HTML with what a picture's file says of the picture."""
    rows = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>" for name, value in settings.items()
    )
    return f'<dl class="facts">{rows}</dl>'


def says(text: str, failed: bool = False) -> str:
    """Returns HTML with one sentence about the state of the work."""
    role, kind = ("alert", "failed") if failed else ("status", "fine")
    return f'<p role="{role}" class="says {kind}">{escape(text)}</p>'


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
