"""The server put together, and how it starts and stops."""

from __future__ import annotations

import errno
import socket
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI
from fastapi import Request as Http
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from .. import __version__
from ..settings import Settings
from . import a1111, a1111_control, events, openai
from .catalog import Catalog
from .errors import Refusal, answer, is_a1111
from .limits import Limits
from .logs import log, write_to_stderr
from .metrics import Metrics
from .queue import Drawer, Queue
from .security import HERE, Guard, Observer
from .service import Service


@dataclass(frozen=True)
class Config:
    """How a server is to be."""

    usual: Settings = field(default_factory=Settings)  # the model, and what requests leave open
    models_folder: Path | None = None
    loras_folder: Path | None = None
    controls_folder: Path | None = None
    host: str = "127.0.0.1"
    port: int = 7861
    token: str | None = None
    queue: int = 64  # requests that may wait
    keep: int = 1  # models in memory
    grace: float = 30.0  # seconds for what is being drawn, when the server is to stop
    limits: Limits = field(default_factory=Limits)
    device: str | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        if self.token is None and self.host not in HERE:
            raise ValueError(
                f"on {self.host} others can reach the server, so it needs a token: see --token-file"
            )
        if self.token is not None and len(self.token) < 16:
            raise ValueError("a token has at least 16 letters")


def build(config: Config) -> FastAPI:
    """Returns the application. Its model is loaded when it starts."""
    metrics = Metrics()
    drawer = Drawer(config.usual, metrics, config.device, config.compile, config.keep)
    queue = Queue(drawer, metrics, config.queue)
    folders = config.models_folder, config.loras_folder, config.controls_folder
    catalog = Catalog(config.usual.model, *folders)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        with tempfile.TemporaryDirectory(prefix="reifusion-") as scratch:
            service.scratch = Path(scratch)
            queue.start()
            try:
                yield
            finally:
                queue.stop()

    service = Service(config.usual, catalog, config.limits, metrics, queue, Path())
    app = FastAPI(
        title="reifusion", version=__version__, lifespan=life,
        description="Pictures by Stable Diffusion, over OpenAI's images API and that of A1111.",
    )  # fmt: skip
    app.state.service = service
    for routes in (openai.routes, a1111.routes, a1111_control.routes, events.routes):
        app.include_router(routes(service))
    _add_health(app, queue, metrics)
    _add_errors(app)
    hosts = (*HERE, config.host) if config.token is None else ()
    # The last one is the first to be asked.
    app.add_middleware(Guard, token=config.token, hosts=hosts, most=config.limits.body)
    app.add_middleware(Observer, metrics=metrics)
    return app


def _add_health(app: FastAPI, queue: Queue, metrics: Metrics) -> None:
    @app.get("/healthz", tags=["Health"])
    async def healthz() -> dict[str, str]:
        """The process lives."""
        return {"status": "ok"}

    @app.get("/readyz", tags=["Health"])
    async def readyz() -> Response:
        """A request could be taken now; otherwise 503, and why not."""
        why = queue.ready()
        return JSONResponse({"status": why or "ok"}, 503 if why else 200)

    @app.get("/metrics", tags=["Health"])
    async def numbers() -> Response:
        """For Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/internal/ping", include_in_schema=False)
    async def ping() -> dict[str, str]:  # which clients of A1111 ask
        return {}


def _add_errors(app: FastAPI) -> None:
    """Tells of everything that goes wrong in the shape that the path's clients read."""

    @app.exception_handler(Refusal)
    async def refused(http: Http, refusal: Refusal) -> Response:
        return answer(http.url.path, refusal)

    @app.exception_handler(RequestValidationError)
    async def invalid(http: Http, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = [str(part) for part in first["loc"] if part != "body"]
        param = where[0] if where and first["type"] != "json_invalid" else None
        about = ".".join(where) if param else "the body is no valid JSON"
        status = 422 if is_a1111(http.url.path) else 400
        return answer(http.url.path, Refusal(status, f"{about}: {first['msg']}", param, "invalid_value"))

    @app.exception_handler(HTTPException)
    async def other(http: Http, error: HTTPException) -> Response:
        said = {404: "there is nothing at this path", 405: "this path does not take this method"}
        return answer(
            http.url.path, Refusal(error.status_code, said.get(error.status_code, str(error.detail)))
        )


class Server(uvicorn.Server):
    """Stops in order: takes nothing new, draws what it has, for as long as the grace lasts."""

    def __init__(self, config: Config) -> None:
        self._config, self._app = config, build(config)
        super().__init__(
            uvicorn.Config(
                self._app, config.host, config.port, log_config=None, access_log=False, server_header=False,
                timeout_graceful_shutdown=int(config.grace) + 5, lifespan="on",
            )
        )  # fmt: skip

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self.should_exit:
            log("stopping", seconds=self._config.grace)
            self._app.state.service.queue.close(self._config.grace)
        super().handle_exit(sig, frame)


def run(config: Config) -> None:
    """Serves until the process is told to stop. Raises ValueError for a model that cannot be loaded, and for
    a host or port that cannot be had.
    """
    config.usual.config()
    try:
        family, *_ = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server((config.host, config.port), family=family)
    except OSError as error:
        where, why = f"{config.host}:{config.port}", str(error.strerror).partition(" (")[0]
        other = "--port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "--host"
        raise ValueError(f"cannot listen on {where}: {why}; try another {other}") from None
    write_to_stderr()
    Server(config).run(sockets=[listener])
