"""Draws one picture after the other, while pages watch the steps and the attention."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any, cast

from PIL import Image

from .. import album
from ..api import load
from ..errors import sentence
from ..explain.schedule import signal_and_noise
from ..explain.trajectory import decode_noisy, rms, spread
from ..explain.words import Attention, watch
from ..families import taesd
from ..model.ddpm import Sampler
from ..model.pipeline import StableDiffusion, Step
from ..model.request import Request
from ..model.tensors import ModelError
from ..settings import Settings
from ..weights import find

# One model draws for all pages, one picture at a time, because recording puts hooks into the model.
_LOCK = threading.Lock()
model = functools.lru_cache(maxsize=2)(load)  # two, so that two pages can compare two models

MOST = 25  # steps that are decoded, evenly spread: at full size, a preview takes as long as a step


@dataclass
class Frame:
    """The view at one place of the slider."""

    picture: Image.Image
    step: int | None = None  # 0 … total - 1; None: before the first, or after the last
    t: float | None = None  # the timestep
    push: float | None = None  # RMS of ε_cond - ε_uncond; None without guidance


@dataclass
class Drawing:
    """One picture: what was asked for, and what has come about so far."""

    request: Request  # with nothing left open, as soon as the model is loaded
    note: str = ""  # how far the work is, in one sentence
    failed: bool = False  # then `note` says why
    done: bool = False
    frames: list[Frame] = field(default_factory=list)  # the noise, what each step saw, the picture
    total: int = 0  # steps
    sampler: Sampler | None = None
    signal: list[float] = field(default_factory=list)  # the share of picture in the network's input at each t
    noise: list[float] = field(default_factory=list)  # … and the share of noise
    attention: Attention | None = None
    path: Path | None = None  # where the picture is; None until it is complete
    settings: Settings | None = None  # as the picture's file says; None until it is complete


def draw(
    request: Request, source: str, folder: Path, stop: threading.Event, preview: str | None = None
) -> Iterator[Drawing]:
    """Draws with the model of that name; yields the same `Drawing` whenever there is something new.

    preview: a tiny VAE, which decodes the steps of models that it fits; None: the model's own decodes them.
    The work is done in a thread of its own, so that the lock is released however the work ends: when the
    picture is done, when `stop` is set, or when nobody listens any more. Errors are in the drawing's note.
    """
    drawing, news = Drawing(request, "Waiting for the picture of another page."), SimpleQueue[None]()

    def tell() -> None:
        news.put(None)

    def work() -> None:
        try:
            while not _LOCK.acquire(timeout=0.2):
                if stop.is_set():
                    return _stopped(drawing)
            try:
                _draw(drawing, source, folder, stop, tell, preview)
            finally:
                _LOCK.release()
        except Exception as error:  # of any kind: the page goes on and says so
            drawing.note, drawing.failed = sentence(error), True
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
            while not news.empty():  # a slow listener misses some
                news.get()
            done = drawing.done
            yield drawing
    finally:
        stop.set()


def previewing(source: str, preview: str | None) -> StableDiffusion:
    """Returns the model, with that tiny VAE. Raises ModelError for a tiny VAE of another family."""
    pipe = model(source)
    return pipe if preview is None else taesd.beside(pipe, find(preview, "vae"))


def _draw(
    drawing: Drawing,
    source: str,
    folder: Path,
    stop: threading.Event,
    tell: Callable[[], None],
    preview: str | None,
) -> None:
    drawing.note = f"Loading {source}."
    tell()
    pipe = looking = model(source)
    with contextlib.suppress(ModelError):  # the page may draw with another model than it began with
        looking = previewing(source, preview)
    drawing.request = request = drawing.request.for_model(pipe.config)
    drawing.sampler = pipe.sampler(request)
    _, signal, noise = signal_and_noise(drawing.sampler)
    drawing.signal, drawing.noise = signal.tolist(), noise.tolist()

    def look(step: Step) -> bool:
        if step.index == 0:
            drawing.frames, drawing.total = [Frame(decode_noisy(looking, step.x_t))], step.total
        if step.index in spread(range(step.total), MOST):
            push = None if step.eps_uncond is None else rms(step.eps_cond - step.eps_uncond)
            drawing.frames.append(Frame(looking.decode(step.x0)[0], step.index, step.t, push))
        drawing.note = f"Step {step.index + 1} of {step.total}."
        tell()
        return not stop.is_set()

    if stop.is_set():
        return _stopped(drawing)
    with watch(pipe, request) as attention:
        picture = cast(Image.Image, pipe.generate(request, callback=look, progress=False))
    drawing.attention = attention
    drawing.frames.append(Frame(picture))
    if stop.is_set():  # the frames can be looked at, but no command would repeat them
        return _stopped(drawing)
    folder.mkdir(parents=True, exist_ok=True)
    given = {"init_image": request.init_image, "mask": request.mask}
    kept: dict[str, Any] = {
        name: album.keep(one, folder) for name, one in given.items() if isinstance(one, Image.Image)
    }
    entry = album.entry(Settings(model=source, **kept), request, pipe)
    drawing.path = album.save(picture, entry, folder / album.file_name(entry.settings))
    drawing.settings = entry.settings
    drawing.note = f"Done: {drawing.path}"


def _stopped(drawing: Drawing) -> None:
    steps = [frame.step for frame in drawing.frames if frame.step is not None]
    drawing.note = f"Stopped after step {steps[-1] + 1} of {drawing.total}." if steps else "Stopped."
