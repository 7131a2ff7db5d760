"""Draws one picture after the other, while pages watch the steps and the attention."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from torch import Tensor

from .. import album
from ..errors import sentence
from ..explain.schedule import signal_and_noise
from ..explain.trajectory import decode_noisy
from ..explain.words import Attention, watch
from ..families import taesd
from ..in_memory import Models
from ..model.ddpm import Sampler
from ..model.pipeline import StableDiffusion, Step
from ..model.request import Request
from ..model.tensors import ModelError
from ..model.tuning import warn_of_little_noise
from ..settings import ABOUT, Settings
from ..weights import find
from .heard import heard
from .views import tiles
from .wishes import fitting

# One model draws for all pages, one picture at a time, because recording puts hooks into the model.
_LOCK, _LOADING, _LOOKING = threading.Lock(), threading.Lock(), threading.Lock()
_MODELS = Models(keep=2)  # so that two pages can compare two
# With these the network's inside runs otherwise than once a step at one size, or reads other words
_UNWATCHED = ("hires", "emphasis", "manner", "deepcache", "refiner", "only_masked", "outpaint", "ip_adapter")
SHARE = 0.2  # of the time, for pictures of steps while it draws: at full size, one takes as long as a step
TICK = 0.5  # seconds between two notes about something that takes long


def model(settings: Settings) -> StableDiffusion:
    """Returns the model of the settings, with all that is put into it. Raises ValueError for a wrong file."""
    if (pipe := _MODELS.there(settings)) is not None:
        return pipe
    with _LOADING:
        return _MODELS.pipe(settings)


def in_memory(settings: Settings) -> StableDiffusion | None:
    """Returns the model of the settings if it is in memory."""
    return _MODELS.there(settings)


@dataclass
class Frame:
    """One place of the slider: the noise, a step, or the picture. Latents are (1, C, h, w), on the CPU."""

    x_t: Tensor  # the latents before the step; at both ends, those that are there
    step: int | None = None  # 0 … total - 1; None: before the first, or after the last
    t: float | None = None  # the timestep
    x0: Tensor | None = None  # the clean latents that the network sees in x_t
    cond: Tensor | None = None  # the noise that it sees with the prompt
    uncond: Tensor | None = None  # … and without; None without guidance
    sigma: float = 0.0


@dataclass
class Drawing:
    """One picture: what was asked for, and what has come about so far."""

    settings: Settings  # as the picture's file says, as soon as it is complete
    note: str = ""  # how far the work is, in one sentence
    begun: float = field(default_factory=time.monotonic)
    loaded: bool = False  # True as soon as the model is there
    failed: bool = False  # then `note` says why
    warnings: list[str] = field(default_factory=list)  # in sentences
    done: bool = False
    request: Request | None = None  # with nothing left open, as soon as the model is loaded
    pipe: StableDiffusion | None = None
    looking: StableDiffusion | None = None  # what decodes the steps
    frames: list[Frame] = field(default_factory=list)
    total: int = 0  # steps
    sampler: Sampler | None = None
    signal: list[float] = field(default_factory=list)  # the share of picture in the network's input at each t
    noise: list[float] = field(default_factory=list)  # … and the share of noise
    words: Tensor | None = None  # the prompt's vectors, (77, 768)
    attention: Attention | None = None
    picture: Image.Image | None = None  # when it is complete, or what was there when it was stopped
    path: Path | None = None  # where it is; None until it is complete
    decoded: dict[tuple[int, str], Image.Image] = field(default_factory=dict)
    newest: int | None = None  # the last place that was decoded while drawing
    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def said(self) -> str:
        """The note; while the model is being loaded, with the seconds that this takes."""
        waiting = not (self.loaded or self.done)
        return f"{self.note[:-1]}: {time.monotonic() - self.begun:.0f} s." if waiting else self.note

    def look(self, place: int, what: str) -> Image.Image:
        """Returns the picture of x_t ("given") or x0 ("seen") at a place; decoded when first looked at.

        At both ends there is one thing to see; what is "given" there is its latents, a grey picture for each
        channel.
        """
        frame = self.frames[place]
        if (place, what) not in self.decoded:
            with _LOOKING:
                self.decoded[place, what] = self._decode(frame, what)
        return self.decoded[place, what]

    def _decode(self, frame: Frame, what: str) -> Image.Image:
        assert self.looking is not None
        if frame.step is None and what == "given":
            return tiles(frame.x_t)
        if frame.step is None and frame is not self.frames[0]:
            assert self.picture is not None
            return self.picture
        if what == "given" or frame.x0 is None:
            return decode_noisy(self.looking, frame.x_t)
        return self.looking.decode(frame.x0)[0]


def draw(drawing: Drawing, folder: Path, preview: str | None = None) -> Iterator[Drawing]:
    """Draws; yields the same `Drawing` whenever there is something new, and at least twice a second.

    preview: a tiny VAE, which decodes the steps of models that it fits; None: the model's own decodes them.
    The work is done in a thread of its own, so that the lock is released however the work ends: when the
    picture is done, when `stop` is set, or when nobody listens any more. Errors are in the drawing's note.
    """
    news = queue.SimpleQueue[None]()
    stop = drawing.stop

    def tell() -> None:
        news.put(None)

    def drawn() -> None:
        pipe = model(drawing.settings)
        drawing.loaded = True
        drawing.note = "Waiting for another picture."
        while not _LOCK.acquire(timeout=0.2):
            if stop.is_set():
                return _stopped(drawing)
        try:
            _draw(drawing, pipe, folder, tell, preview)
        finally:
            _LOCK.release()

    def work() -> None:
        try:
            with heard(drawing.warnings):
                drawn()
        except Exception as error:  # of any kind: the page goes on and says so
            drawing.note, drawing.failed = sentence(error), True
        finally:
            drawing.done = True
            tell()

    drawing.note = f"Loading {drawing.settings.model}."
    yield drawing
    threading.Thread(target=work, daemon=True).start()
    try:
        done = False
        while not done:
            with contextlib.suppress(queue.Empty):
                news.get(timeout=TICK)
                while not news.empty():  # a slow listener misses some
                    news.get()
            done = drawing.done
            if stop.is_set() and not drawing.loaded:  # what loads goes on, and is there the next time
                drawing.note, drawing.done, done = "Stopped.", True, True
            yield drawing
    finally:
        stop.set()


def previewing(pipe: StableDiffusion, preview: str | None) -> StableDiffusion:
    """Returns the model, with that tiny VAE. Raises ModelError for a tiny VAE of another family."""
    return pipe if preview is None else taesd.beside(pipe, find(preview, "vae"))


def _draw(
    drawing: Drawing, pipe: StableDiffusion, folder: Path, tell: Callable[[], None], preview: str | None
) -> None:
    settings, stop = drawing.settings, drawing.stop
    drawing.note = "Reading the prompt."
    tell()
    drawing.pipe = drawing.looking = pipe
    with contextlib.suppress(ModelError):  # the page may draw with another model than it began with
        drawing.looking = previewing(pipe, preview)
    drawing.request = request = settings.request().for_model(pipe.config)
    if large := fitting(request, pipe.config, settings.hires):
        drawing.warnings.append(large)
    drawing.sampler = pipe.sampler(request)
    warn_of_little_noise(drawing.sampler, request)
    _, signal, noise = signal_and_noise(drawing.sampler)
    drawing.signal, drawing.noise = signal.tolist(), noise.tolist()
    begun, looked, last = time.monotonic(), 0.0, None

    def look(step: Step) -> bool:
        nonlocal begun, looked, last
        cpu = {name: getattr(step, name) for name in ("x_t", "x0", "eps_cond", "eps_uncond")}
        x_t, x0, cond, uncond = (None if x is None else x[:1].detach().float().cpu() for x in cpu.values())
        assert x_t is not None
        last = step.latents[:1].detach().float().cpu()
        if not drawing.frames:
            drawing.words = step.words[0].detach().float().cpu()
            drawing.frames.append(Frame(x_t, sigma=step.sigma))
        drawing.total = step.total
        drawing.frames.append(Frame(x_t, step.index, float(step.t), x0, cond, uncond, step.sigma))
        now = time.monotonic()
        if looked <= SHARE * (now - begun):
            place = len(drawing.frames) - 1
            for what in ("given", "seen"):
                drawing.look(place, what)
            drawing.newest = place
            looked += time.monotonic() - now
        drawing.note = f"Step {step.index + 1} of {step.total}."
        tell()
        return not stop.is_set()

    if stop.is_set():
        return _stopped(drawing)
    watched = all(getattr(settings, name) == ABOUT[name].default for name in _UNWATCHED)
    with watch(pipe, request) if watched else contextlib.nullcontext() as attention:
        drawing.picture = settings.draw(pipe, request, callback=look)
    drawing.attention = attention
    assert last is not None
    if stop.is_set():  # the frames can be looked at, but no command would repeat them
        x0 = drawing.frames[-1].x0
        drawing.frames.append(Frame(last if x0 is None else x0))
        return _stopped(drawing)
    drawing.frames.append(Frame(last))
    folder.mkdir(parents=True, exist_ok=True)
    entry = album.entry(settings, request, pipe)
    drawing.path = album.save(drawing.picture, entry, folder / album.file_name(entry.settings))
    drawing.settings = entry.settings
    drawing.note = f"Done: {drawing.path}"


def _stopped(drawing: Drawing) -> None:
    steps = [frame.step for frame in drawing.frames if frame.step is not None]
    drawing.note = f"Stopped after step {steps[-1] + 1} of {drawing.total}." if steps else "Stopped."
