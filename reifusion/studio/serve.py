"""The server of the page, for this machine only."""

from __future__ import annotations

import signal
import socket
import threading
import time
import webbrowser
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from ..settings import Settings
from .drawing import model, previewing
from .routes import Studio, build

FIRST = 7860  # the port to begin with


@dataclass
class Running:
    """A studio that serves in a thread of its own."""

    address: str
    studio: Studio
    server: uvicorn.Server
    thread: threading.Thread

    def close(self) -> None:
        for one in self.studio.drawings.values():
            one.stop.set()
        self.studio.trainings.stop()
        self.server.should_exit = True
        self.thread.join(10)


def serve(
    source: str = "mini",
    port: int | None = None,
    browser: bool = True,
    folder: str = "images",
    preview: str | None = None,
) -> Running:
    """Starts the page at 127.0.0.1 and returns when it answers.

    port: None for the first free one from 7860. preview: a tiny VAE that decodes the steps. Raises ValueError
    for a source that is not a model, for a preview that is no tiny VAE for it, and for a port that is taken.
    """
    previewing(model(Settings(model=source)), preview)  # a wrong file is found before the page opens
    listener = _listener(port)
    studio = Studio(source, Path(folder), preview)
    config = uvicorn.Config(
        build(studio), log_config=None, access_log=False, server_header=False, lifespan="off",
        timeout_graceful_shutdown=2,
    )  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    address = f"http://127.0.0.1:{listener.getsockname()[1]}/"
    if browser:
        webbrowser.open(address)
    return Running(address, studio, server, thread)


def _listener(port: int | None) -> socket.socket:
    for one in (port,) if port else range(FIRST, FIRST + 100):
        try:
            return socket.create_server(("127.0.0.1", one), backlog=64)
        except OSError:
            continue
    raise ValueError(f"port {port} is taken, or no port is free: try another --port")


def run(source: str, port: int | None, browser: bool, folder: str, preview: str | None = None) -> None:
    """Serves the page until Ctrl-C or SIGTERM, which ends its training in the same way."""
    running = serve(source, port, browser, folder, preview)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    print(f"The studio is at {running.address}  (Ctrl-C ends it)", flush=True)
    try:
        while running.thread.is_alive():
            running.thread.join(1)
    finally:
        running.close()
