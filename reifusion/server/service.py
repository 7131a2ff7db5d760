"""From a dialect's settings to a job that has been drawn: what the two dialects share."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from fastapi import Request as Http
from PIL import Image

from .. import album
from ..settings import Settings
from .catalog import Catalog
from .errors import GONE, Refusal
from .limits import Limits
from .metrics import Metrics
from .pictures import to_bytes, without_paths
from .queue import Job, Queue


@dataclass
class Service:
    """All that a route needs."""

    usual: Settings  # what a request leaves open
    catalog: Catalog
    limits: Limits
    metrics: Metrics
    queue: Queue
    scratch: Path  # a folder for pictures that clients send, each as long as its job

    async def begin(
        self,
        http: Http,
        settings: Settings,
        pictures: int = 1,
        inputs: Mapping[str, Image.Image] | None = None,
        **more: Any,
    ) -> Job:
        """Checks what is asked for, and puts it in the queue.

        inputs: pictures that were sent, by their names in `Settings`, or those of hints in `control`. more:
        of `Job`. Raises Refusal: 400 for what cannot be drawn, and what `Queue.put` raises.
        """
        if why := "the server is stopping" if self.queue.closing else "":
            raise Refusal(503, why, retry_after=5)
        id = http.scope["state"]["id"]
        folder = self.scratch / id
        try:
            settings, request = await asyncio.to_thread(
                self._checked, settings, pictures, inputs or {}, folder
            )
            job = Job(settings, request, pictures, id=id, folder=folder if inputs else None, **more)
            width, height = request.size
            http.scope["state"]["facts"] = {
                "model": self.catalog.name_of(settings.model), "pictures": pictures, "width": width,
                "height": height, "steps": request.steps,
            }  # fmt: skip
            self.queue.put(job)
        except BaseException:
            if id not in self.queue:  # or it would be the folder of the other job of this id
                shutil.rmtree(folder, ignore_errors=True)
            raise
        return job

    def _checked(
        self, settings: Settings, pictures: int, inputs: Mapping[str, Image.Image], folder: Path
    ) -> tuple[Settings, Any]:
        self.limits.check_asked(settings, pictures)
        try:
            if inputs:
                folder.mkdir(exist_ok=True)
                kept: dict[str, Any] = {name: album.keep(one, folder) for name, one in inputs.items()}
                control = tuple((file, kept.pop(hint, hint), *rest) for file, hint, *rest in settings.control)
                settings = replace(settings, control=cast(Any, control), **kept)
            config = settings.config()
            if not config.edits:  # A1111's clients send it whatever the model is
                settings = replace(settings, image_guidance=None)
            request = settings.request().for_model(config)
            settings.nth(request.seeds[0], pictures - 1)  # the last one has a seed too
        except Refusal:
            raise
        except ValueError as error:
            raise Refusal(400, self._without_paths(str(error).splitlines()[0])) from None
        self.limits.check_drawn(settings, request, pictures)
        return settings, request

    def size_of(self, settings: Settings) -> tuple[int, int] | None:
        """Returns the size of the picture; None for a part of one, and for what `begin` will refuse."""
        if settings.only_masked is not None:
            return None
        try:
            request = replace(settings, mask_blur=0).request().for_model(settings.config())
            self.limits.check_drawn(settings, request, 1)
        except (ValueError, Refusal):
            return None
        return cast("tuple[int, int]", request.size)

    async def finish(self, http: Http, job: Job) -> None:
        """Waits until the job is over; cancels it if the client leaves. Raises Refusal if it failed."""
        left, over = asyncio.create_task(_left(http)), asyncio.create_task(_over(job))
        try:
            await asyncio.wait({left, over}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            left.cancel()
            over.cancel()
            self.queue.cancel(job)  # which changes nothing if it is over
        self.check(job)

    def check(self, job: Job) -> None:
        """Raises Refusal for a job that ended without what was asked for."""
        if job.state != "done" and not job.interrupted:
            error = job.error or Refusal(GONE, "the job was cancelled")
            raise replace(error, message=self._without_paths(error.message))

    def _without_paths(self, message: str) -> str:
        """Returns the message without the folders of this machine, which are nothing to a client."""
        for folder in (
            self.catalog.models_folder,
            self.catalog.loras_folder,
            self.catalog.controls_folder,
            self.scratch,
        ):
            message = message if folder is None else message.replace(f"{folder}{os.sep}", "")
        return message

    async def encoded(self, job: Job, format: str = "png", quality: int = 100) -> list[bytes]:
        """Returns the job's pictures as files."""

        def encode() -> list[bytes]:
            with self.metrics.stage("encode"):
                return [
                    to_bytes(picture, without_paths(entry, self.catalog), format, quality)
                    for picture, entry in job.drawn
                ]

        return await asyncio.to_thread(encode)


async def _over(job: Job) -> None:
    async for _ in job.changes():
        pass


async def _left(http: Http) -> None:
    """Returns when the client has left. To be called when the body has been read."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
