"""What the page shows of a drawing, as data and as pictures: words with their heat, the schedule, tensors."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..explain.trajectory import rms
from ..explain.words import LITTLE, relative
from .heard import sentence
from .known import never_read

if TYPE_CHECKING:
    from .drawing import Drawing

GRID = 64  # the finest grid on which heat maps are sent; only the attention of large pictures is finer


def begun_with_picture(drawing: Drawing) -> bool:
    """True if the loop began with a picture under noise, and not with noise alone."""
    return drawing.request is not None and drawing.request.init_image is not None


def caption(drawing: Drawing, place: int) -> str:
    """Returns what the slider says at that place."""
    frame = drawing.frames[place]
    if frame.step is not None:
        return f"step {frame.step + 1} of {drawing.total}, t = {frame.t:g}"
    if place == 0:
        picture = begun_with_picture(drawing)
        return "your picture under noise, with which it began" if picture else "the noise it began with"
    return "the picture" if drawing.path else "what was there when drawing was stopped"


def under(drawing: Drawing, place: int) -> tuple[str, str]:
    """Returns what is written under the two pictures of a place."""
    frame = drawing.frames[place]
    if frame.step is not None:
        return "x_t: what the network is given", "x̂₀: what it sees in it"
    channels, height, width = frame.x_t.shape[1:]
    size = f"{channels} × {height} × {width}"
    if place == 0:
        what = "your picture under noise" if begun_with_picture(drawing) else "noise"
        return f"the latents, {size}: {what}", "the same, decoded"
    return f"the latents, {size}", "decoded: " + caption(drawing, place)


def heats(drawing: Drawing, place: int) -> dict[str, Any]:
    """Returns the prompt's words at that place: each with its share of all attention and its heat map.

    A map is bytes in base64, up to 255 where it is `peak`, row by row. "little" are words that join others.
    """
    frame, attention = drawing.frames[place], drawing.attention
    if attention is None or not attention.maps or (place == 0 and frame.step is None):
        return {"width": 0, "height": 0, "words": []}
    steps = slice(None) if frame.step is None else slice(frame.step, frame.step + 1)
    scale = min(1, GRID / max(attention.size))
    width, height = (max(1, round(side * scale)) for side in attention.size)
    words = []
    for word in attention.words:
        heat = attention.heat(word, steps)  # (H, W)
        small = F.interpolate(relative(heat)[None, None], (height, width), mode="area")[0, 0]
        words.append(
            {
                "text": word.text,
                "share": heat.mean().item(),
                "peak": heat.max().item(),
                "little": word.text in LITTLE or not any(map(str.isalnum, word.text)),
                "map": base64.b64encode((small.numpy() * 255).round().astype(np.uint8).tobytes()).decode(),
            }
        )
    return {"width": width, "height": height, "words": words}


def curve(drawing: Drawing) -> dict[str, Any]:
    """Returns the shares of picture and noise over t, about 100 points, and where the sampler looks."""
    last = len(drawing.signal) - 1
    at = range(0, last + 1, max(1, last // 100))
    timesteps = [] if drawing.sampler is None else [float(t) for t in drawing.sampler.timesteps]
    return {
        "last": last,
        "t": list(at),
        "signal": [round(drawing.signal[t], 4) for t in at],
        "noise": [round(drawing.noise[t], 4) for t in at],
        "timesteps": timesteps,
    }


def shares(drawing: Drawing, place: int) -> tuple[float, float] | None:
    """Returns how much picture and noise the network's input holds at a place; None for the finished one."""
    frame = drawing.frames[place]
    if frame.step is None and place > 0:
        return None
    if frame.step is None and not begun_with_picture(drawing):
        return 0.0, 1.0
    t = float(drawing.sampler.timesteps[0]) if frame.t is None and drawing.sampler else frame.t or 0.0
    at = min(len(drawing.signal) - 1, max(0, round(t)))
    return drawing.signal[at], drawing.noise[at]


def push(drawing: Drawing, place: int) -> float | None:
    """Returns the RMS of ε_cond - ε_uncond; None without guidance."""
    frame = drawing.frames[place]
    return None if frame.cond is None or frame.uncond is None else rms(frame.cond - frame.uncond)


def notes(pipe: Any, prompt: str) -> list[str]:
    """Returns what a reader of the prompt should know before drawing, each in one sentence."""
    pieces = pipe.tokenizer.pieces(prompt)
    said, room = [], pipe.config.clip.context_length - 2
    if not prompt.strip():
        said.append("An empty prompt: the model draws whatever comes.")
    if len(pieces) > room:
        lost = pipe.tokenizer.decode([piece.id for piece in pieces[room:]])
        has = f"the prompt has {len(pieces)} tokens and there is room for {room}, so this is cut off: "
        said.append(sentence(has + lost))  # in the words of the warning, which comes with the picture
    if words := never_read(pipe.config.name, prompt):
        said.append(words)
    return said


# Tensors as pictures


def tensor(drawing: Drawing, place: int, name: str) -> Tensor | None:
    """Returns a tensor of a place by the name that the page has for it; None if there is none."""
    frame = drawing.frames[place]
    if name == "words":
        return drawing.words
    if name == "next":
        return drawing.frames[place + 1].x_t if place + 1 < len(drawing.frames) else None
    if name == "scaled":  # as the network sees x_t, which some samplers have in a scale of their own
        if drawing.sampler is None or frame.step is None:
            return None
        return drawing.sampler.scale_model_input(frame.x_t, drawing.sampler.timesteps[frame.step])
    if name == "push":
        return None if frame.cond is None or frame.uncond is None else frame.cond - frame.uncond
    return {"x_t": frame.x_t, "x0": frame.x0, "cond": frame.cond, "uncond": frame.uncond}.get(name)


def tensor_picture(values: Tensor) -> Image.Image:
    """(1, C, h, w) -> a tile for each channel; (L, width) -> a pixel for each number, blue to red."""
    return tiles(values) if values.ndim == 4 else _coloured(values)


def tiles(latents: Tensor) -> Image.Image:
    """(1, C, h, w) -> the channels as tiles, as square as they go."""
    channels, height, width = latents.shape[1:]
    across = next(k for k in range(max(1, round(channels**0.5)), channels + 1) if channels % k == 0)
    rows = latents[0].unflatten(0, (channels // across, across))  # (r, c, h, w)
    return _coloured(rows.transpose(1, 2).reshape(channels // across * height, across * width))


def _coloured(values: Tensor) -> Image.Image:
    """(H, W) -> blue below 0, white at 0, red above; the ends are at three standard deviations."""
    x = (values / (3 * values.std(correction=0)).clamp(min=1e-12)).clamp(-1, 1)[..., None]
    high, low = torch.tensor([178.0, 24.0, 43.0]), torch.tensor([33.0, 102.0, 172.0])
    white = torch.tensor([250.0, 250.0, 250.0])
    levels = white + (high - white) * x.clamp(min=0) + (low - white) * (-x).clamp(min=0)
    return Image.fromarray(levels.round().to(torch.uint8).numpy())
