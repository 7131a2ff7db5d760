"""The queue in front of the model, and the one thread that draws.

A job is one request with one or more pictures. They are drawn one after the other, each alone, so that not a
bit of a picture depends on who else is asking; `Drawer` keeps the models that were used last.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import shutil
import threading
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from .. import album
from ..errors import sentence
from ..in_memory import Models
from ..model.pipeline import StableDiffusion, Step
from ..model.request import Request
from ..settings import Settings
from .errors import Refusal
from .logs import log
from .metrics import Metrics

LONGEST_WAIT = 120  # seconds; clients give up where they are told to wait longer


class Cancelled(Exception):
    """The job is not wanted any more."""


class Job:
    """One request: what is asked for, how far it is, and what has been drawn."""

    def __init__(
        self,
        settings: Settings,
        request: Request,
        pictures: int = 1,
        *,
        id: str | None = None,
        dialect: str = "",
        previews: int = 0,
        folder: Path | None = None,
    ) -> None:
        """request: with nothing left open; picture k is drawn from its seed + k,
        or that of its variation. previews: how many times in
        each picture what it will be is decoded. folder: what belongs to the job alone, removed at its end.
        Made in a running event loop, which hears of every step.
        """
        self.id = id or uuid.uuid4().hex
        self.settings, self.request, self.pictures = settings, request, pictures
        self.dialect, self.previews, self.folder = dialect, previews, folder
        self.state = "waiting"  # then loading, drawing, and done, failed or cancelled
        self.picture = self.step = self.steps = 0  # the picture that is being drawn, and how far it is
        self.drawn: list[tuple[Image.Image, album.Entry]] = []
        self.preview: Image.Image | None = None  # the last one, whoever wanted it
        self.partial: Image.Image | None = None  # the last one of the job's own
        self.shown = 0  # of these, in this picture so far
        self.wants_preview = False  # True: the next step is decoded
        self.interrupted = self.skipped = False  # end early and keep what is there: all pictures, or this one
        self.error: Refusal | None = None
        self.since = time.monotonic()  # in this state
        self._cancelled = False
        self._listeners: set[asyncio.Event] = set()
        self._loop = asyncio.get_running_loop()

    @property
    def over(self) -> bool:
        return self.state in ("done", "failed", "cancelled")

    @property
    def progress(self) -> float:
        """From 0 to 1."""
        return (self.picture + (self.step / self.steps if self.steps else 0)) / self.pictures

    def cancel(self, error: Refusal | None = None) -> None:
        """Ends the job before its next step. error: what its client hears, if there still is one."""
        self.error = self.error or error
        self._cancelled = True

    def become(self, state: str, error: Refusal | None = None) -> None:
        self.state, self.error, self.since = state, self.error or error, time.monotonic()
        self.tell()

    def tell(self) -> None:
        """Wakes everyone who listens; may be called in any thread."""
        with contextlib.suppress(RuntimeError):  # of a loop that was closed
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        for event in self._listeners:
            event.set()

    async def changes(self, heartbeat: float | None = None) -> AsyncIterator[bool]:
        """Yields True whenever something is new, at last when the job is over.

        heartbeat: yields False when nothing was new for so many seconds.
        """
        event = asyncio.Event()
        self._listeners.add(event)
        try:
            new = True
            while True:
                event.clear()
                over = self.over
                yield new
                if over:
                    return
                try:
                    await asyncio.wait_for(event.wait(), heartbeat)
                    new = True
                except asyncio.TimeoutError:
                    new = False
        finally:
            self._listeners.discard(event)

    def check(self) -> None:
        """Raises Cancelled if nobody wants the job any more."""
        if self._cancelled:
            raise Cancelled

    def look(self, step: Step, decode: Callable[[Any], list[Image.Image]]) -> bool:
        """Called after each step, in the drawing thread. Returns False to end the picture early."""
        self.check()
        self.step, self.steps = step.index + 1, step.total
        due = (self.shown + 1) * step.total // (self.previews + 1)
        own = self.shown < self.previews and self.step >= due and self.step < step.total
        if own or self.wants_preview:
            self.preview = decode(step.x0)[0]
            self.wants_preview = False
        if own:
            self.partial = self.preview
            self.shown += 1
        self.tell()
        return not (self.interrupted or self.skipped)


class Queue:
    """Jobs in the order in which they came; at most so many wait."""

    def __init__(self, drawer: Drawer, metrics: Metrics, most: int = 64) -> None:
        self.most = most
        self.current: Job | None = None  # that is being drawn
        self._drawer, self._metrics = drawer, metrics
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closing = self._ended = False
        self._mean = 1.0  # seconds of a job, the later ones counting more
        self._jobs: dict[str, Job] = {}  # that are not over, by id
        self._thread = threading.Thread(target=self._work, name="drawer", daemon=True)
        metrics.watch(lambda: len(self._waiting), lambda: float(self.current is not None))

    def start(self) -> None:
        """Loads the usual model, then begins to draw."""
        self._thread.start()

    @property
    def closing(self) -> bool:
        return self._closing

    def ready(self) -> str:
        """Returns why no job can be taken now; "" if one can."""
        if self._closing:
            return "the server is stopping"
        if why := self._drawer.not_ready:
            return why
        return "the queue is full" if len(self._waiting) >= self.most else ""

    def put(self, job: Job) -> None:
        """Adds a job.

        Raises Refusal: 503 while the server stops, 429 when the queue is full, 409 for an id that is taken.
        """
        with self._changed:
            if self._closing:
                raise Refusal(503, "the server is stopping", retry_after=5)
            if job.id in self._jobs:
                raise Refusal(409, f"there is a job {job.id} already", "id")
            if len(self._waiting) >= self.most:
                wait = min(LONGEST_WAIT, max(1, math.ceil(self._mean)))
                raise Refusal(429, f"{self.most} requests are waiting already", None, "queue_full", wait)
            self._waiting.append(job)
            self._jobs[job.id] = job
            self._changed.notify()

    def find(self, id: str) -> Job:
        """Returns the job that is not over yet. Raises Refusal, 404, if there is none."""
        if (job := self._jobs.get(id)) is None:
            raise Refusal(404, "there is no job of this id that waits or is drawn", "id")
        return job

    def __contains__(self, id: str) -> bool:
        """True while the job of this id is not over."""
        return id in self._jobs

    def place(self, job: Job) -> int:
        """Returns how many jobs are before this one."""
        with self._changed, contextlib.suppress(ValueError):
            return self._waiting.index(job) + (self.current is not None)
        return 0

    def cancel(self, job: Job, error: Refusal | None = None) -> None:
        """Ends a job: at once if it waits, before its next step if it is drawn. One that is over stays so."""
        job.cancel(error)
        with self._changed:
            if job not in self._waiting:
                return
            self._waiting.remove(job)
        self._end(job, "cancelled")

    def close(self, seconds: float) -> None:
        """Takes no more jobs; those that are not over in so many seconds are answered with 503."""
        with self._changed:
            self._closing = True
        timer = threading.Timer(seconds, self._cancel_all)
        timer.daemon = True
        timer.start()

    def stop(self) -> None:
        """Ends all jobs and the thread, and waits for it."""
        with self._changed:
            self._closing = self._ended = True
            self._changed.notify()
        self._cancel_all()
        if self._thread.is_alive():
            self._thread.join()

    def _cancel_all(self) -> None:
        for job in list(self._jobs.values()):
            self.cancel(job, Refusal(503, "the server is stopping", retry_after=5))

    def _work(self) -> None:
        self._drawer.get_ready()
        while (job := self._next()) is not None:
            self._metrics.took("queue", time.monotonic() - job.since)
            begun = time.monotonic()
            try:
                self._drawer.draw(job)
                self._end(job, "done")
            except Cancelled:
                self._end(job, "cancelled")
            except Refusal as error:
                self._end(job, "failed", error)
            except ValueError as error:  # what the model cannot draw
                self._end(job, "failed", Refusal(400, str(error).splitlines()[0]))
            except Exception as error:  # the next job may well be drawn
                log("failed", logging.ERROR, error, id=job.id)
                self._end(job, "failed", Refusal(500, sentence(error)))
            if job.state == "done":
                self._mean += 0.2 * (time.monotonic() - begun - self._mean)

    def _next(self) -> Job | None:
        with self._changed:
            self.current = None
            self._changed.wait_for(lambda: self._waiting or self._ended)
            if self._ended:
                return None
            self.current = self._waiting.popleft()
            return self.current

    def _end(self, job: Job, state: str, error: Refusal | None = None) -> None:
        if job.folder is not None:
            shutil.rmtree(job.folder, ignore_errors=True)
        self._jobs.pop(job.id, None)
        self._metrics.jobs.labels(state).inc()
        job.become(state, error)


class Drawer:
    """The models in memory, and how a job is drawn with one of them."""

    def __init__(
        self,
        usual: Settings,
        metrics: Metrics,
        device: str | None = None,
        compile: bool = False,
        keep: int = 1,
    ) -> None:
        """usual: of the model that is loaded first. keep: how many models stay in memory."""
        self._usual, self._metrics = usual, metrics
        self._models = Models(device, compile, keep, lambda: metrics.stage("load"))
        self.not_ready = "the model is being loaded"

    def get_ready(self) -> None:
        """Loads the usual model. If that fails, `not_ready` says why."""
        try:
            self._models.pipe(self._usual)
            self.not_ready = ""
        except Exception as error:
            self.not_ready = sentence(error)
            log("the model could not be loaded", logging.ERROR, why=self.not_ready)

    def draw(self, job: Job) -> None:
        """Draws the pictures of a job into it. Raises Cancelled, and what loading and drawing raise."""
        job.check()
        job.become("loading")
        pipe = self._models.pipe(job.settings)
        self.not_ready = ""
        job.become("drawing")
        request = job.request.for_model(pipe.config)
        entry = album.entry(job.settings, request, pipe)
        assert request.seed is not None
        for k in range(job.pictures):
            job.check()
            job.picture, job.step, job.shown, job.skipped = k, 0, 0, False
            each = job.settings.nth(request.seed, k)
            picture = self._one(job, each, pipe, replace(request, seed=each.seed, num=1))
            said = replace(entry.settings, seed=each.seed, variation_seed=each.variation_seed)
            job.drawn.append((picture, replace(entry, settings=said)))
            self._metrics.pictures.inc()
            if job.interrupted:
                break
        job.picture, job.step = len(job.drawn), 0

    def _one(self, job: Job, settings: Settings, pipe: StableDiffusion, request: Request) -> Image.Image:
        begun = last = time.monotonic()

        def look(step: Step) -> bool:
            nonlocal last
            go_on = job.look(step, pipe.decode)
            last = time.monotonic()
            return go_on

        picture = settings.draw(pipe, request, callback=look)
        self._metrics.took("sample", last - begun)
        self._metrics.took("decode", time.monotonic() - last)
        return picture
