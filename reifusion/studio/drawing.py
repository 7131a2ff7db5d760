"""Drawing one picture after the other, while pages watch: what each step saw, who looked at which word."""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any, cast

import torch
from PIL import Image

from ..cli import DEFAULTS, _hash, _save, _slug
from ..explain.schedule import signal_and_noise
from ..explain.trajectory import _rms, _spread
from ..explain.words import Attention, watch
from ..model.ddpm import Sampler
from ..api import load
from ..model.pipeline import Step
from ..model.request import Request
from .wishes import keep

# One model draws for all pages, one picture at a time: recording puts hooks into it.
_LOCK = threading.Lock()
model = functools.lru_cache(maxsize=2)(load)  # two, so that two pages can compare two models

MOST = 25  # so many steps are decoded, evenly spread: at full size, a preview takes as long as a step


@dataclass
class Frame:
    """What there is to see at one place of the slider."""

    picture: Image.Image
    step: int | None = None  # 0 … total - 1; None: before the first, or after the last
    t: float | None = None  # the timestep
    push: float | None = None  # RMS of ε_cond - ε_uncond; None without guidance


@dataclass
class Drawing:
    """One picture: what was asked for, and what has come about so far."""

    request: Request
    settings: dict[str, Any]  # what the picture's file says; complete when `path` is there
    note: str = ""  # how far it is, in one sentence
    failed: bool = False  # then `note` says why
    done: bool = False
    frames: list[Frame] = field(default_factory=list)  # the noise, what each step saw, the picture
    total: int = 0  # steps
    sampler: Sampler | None = None
    signal: list[float] = field(default_factory=list)  # how much picture the network is given at each t
    noise: list[float] = field(default_factory=list)  # … and how much noise
    attention: Attention | None = None
    path: Path | None = None  # where the picture is; None until it is complete


def draw(request: Request, source: str, folder: Path, stop: threading.Event) -> Iterator[Drawing]:
    """Draws with the model of that name; yields the same `Drawing` whenever there is something new.

    The work is done in a thread of its own, so that the lock goes back however this ends: when all is done,
    when `stop` is set, or when nobody listens any more. Errors are in the drawing's note.
    """
    drawing, news = Drawing(request, {}, "Waiting for the picture of another page."), SimpleQueue[None]()

    def tell() -> None:
        news.put(None)

    def work() -> None:
        try:
            while not _LOCK.acquire(timeout=0.2):
                if stop.is_set():
                    return _stopped(drawing)
            try:
                _draw(drawing, source, folder, stop, tell)
            finally:
                _LOCK.release()
        except Exception as error:  # whatever it is, the page goes on and says so
            memory = isinstance(error, MemoryError) or re.search("allocate|out of memory", str(error))
            text = "out of memory; try a smaller size" if memory else str(error) or type(error).__name__
            drawing.note, drawing.failed = text.strip().splitlines()[0], True
        finally:
            drawing.done = True
            tell()

    if _LOCK.locked():
        yield drawing
    threading.Thread(target=work, daemon=True).start()
    try:
        done = False
        while not done:
            news.get()
            while not news.empty():  # who is slow misses some
                news.get()
            done = drawing.done
            yield drawing
    finally:
        stop.set()


def _draw(
    drawing: Drawing, source: str, folder: Path, stop: threading.Event, tell: Callable[[], None]
) -> None:
    drawing.note = f"Loading {source}."
    tell()
    pipe = model(source)
    request = drawing.request
    drawing.settings = settings = DEFAULTS | {
        "prompt": request.prompts[0],
        "negative": request.negatives[0],
        "model": source,
        "sampler": request.sampler(pipe.config),
        "steps": request.n_inference_steps,
        "cfg": request.cfg_scale,
        "seed": request.seed,
        "size": list(request.size(pipe.config)),
        "strength": request.strength,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "model_name": pipe.config.name,
    }
    drawing.sampler = pipe._sampler(request, [torch.Generator()])
    if request.picture is not None:
        drawing.sampler.set_strength(request.strength)
    _, signal, noise = signal_and_noise(drawing.sampler)
    if noise.max() > 1:  # samplers in σ blow x_t up, but the network is given it at unit variance
        signal, noise = signal / torch.hypot(signal, noise), noise / torch.hypot(signal, noise)
    drawing.signal, drawing.noise = signal.tolist(), noise.tolist()

    def look(step: Step) -> bool:
        if step.index == 0:
            # Samplers in σ blow x_t up. At most unit variance is what the decoder knows.
            noise = pipe.decode(step.x_t / step.x_t.std().clamp(min=1))[0]
            drawing.frames, drawing.total = [Frame(noise)], step.total
        if step.index in _spread(range(step.total), MOST):
            push = None if step.eps_uncond is None else _rms(step.eps_cond - step.eps_uncond)
            drawing.frames.append(Frame(pipe.decode(step.x0)[0], step.index, step.t, push))
        drawing.note = f"Step {step.index + 1} of {step.total}."
        tell()
        return not stop.is_set()

    if stop.is_set():
        return _stopped(drawing)
    with watch(pipe, request) as attention:
        picture = cast(Image.Image, pipe.generate(request, callback=look, progress=False))
    drawing.attention = attention
    drawing.frames.append(Frame(picture))
    if stop.is_set():  # what there is can be looked at, but no command would repeat it
        return _stopped(drawing)
    folder.mkdir(parents=True, exist_ok=True)
    for name, given in (("init_image", request.picture), ("mask", request.redraw)):
        if given is not None:
            settings[name] = keep(given, folder)
    for name in settings.keys() & {"model", "init_image", "mask"}:
        settings[f"{name}_hash"] = _hash(name, settings[name])
    drawing.path = _save(picture, settings, folder / f"{_slug(settings['prompt'])}-{settings['seed']}.png")
    drawing.note = f"Done: {drawing.path}"


def _stopped(drawing: Drawing) -> None:
    steps = [frame.step for frame in drawing.frames if frame.step is not None]
    drawing.note = f"Stopped after step {steps[-1] + 1} of {drawing.total}." if steps else "Stopped."
