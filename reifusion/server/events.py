"""How far a job is, as server-sent events; and its end by its id.

The id is the `X-Request-ID` that a request is sent with, or is answered with.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter
from fastapi.responses import StreamingResponse

from .errors import Refusal
from .queue import Job
from .service import Service


def event(data: dict[str, Any], name: str | None = None) -> bytes:
    """Returns one event, as text/event-stream has it."""
    first = f"event: {name}\n" if name else ""
    return f"{first}data: {json.dumps(data)}\n\n".encode()


def streamed(events: AsyncIterator[bytes]) -> StreamingResponse:
    """Returns the response that sends events as they come."""
    return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})


def routes(service: Service) -> APIRouter:
    """Returns the routes of jobs."""
    router = APIRouter(prefix="/jobs", tags=["Jobs"])

    @router.get("/{id}", responses={200: {"content": {"text/event-stream": {}}}})
    async def watch(id: str) -> StreamingResponse:
        """Tells how far a job is, whenever that changes, until it is over."""
        job = service.queue.find(id)

        async def tell() -> AsyncIterator[bytes]:
            async for new in job.changes(heartbeat=10):
                yield event(_said(service, job)) if new else b": still here\n\n"

        return streamed(tell())

    @router.delete("/{id}", status_code=202)
    async def cancel(id: str) -> dict[str, str]:
        """Ends a job; the request that waits for it is answered with 410."""
        service.queue.cancel(service.queue.find(id), Refusal(410, "the job was cancelled", None, "cancelled"))
        return {"id": id}

    return router


def _said(service: Service, job: Job) -> dict[str, Any]:
    return {
        "id": job.id, "state": job.state, "progress": round(job.progress, 4),
        "before": service.queue.place(job) if job.state == "waiting" else 0,
        "picture": job.picture, "pictures": job.pictures, "step": job.step, "steps": job.steps,
    }  # fmt: skip
