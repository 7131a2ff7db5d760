"""A model in the cache of the hub is loaded at once and quietly; other answers of the hub are one line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from reifusion.weights import save
from tests.tiny import SMALL, WORDS, random_networks

pytestmark = pytest.mark.slow

NOBODY = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with some/model in it."""
    home = tmp_path_factory.mktemp("hub")
    kept = home / "hub" / "models--some--model"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text("a" * 40)
    (kept / "snapshots").mkdir()
    save(SMALL, random_networks(SMALL), kept / "snapshots" / ("a" * 40), "diffusers", WORDS)
    return home


@pytest.fixture
def hub() -> Iterator[Callable[[int, str], tuple[str, list[str]]]]:
    """Starts a hub that gives the same answer to everybody; returns its address, and what it was asked."""
    servers = []

    def start(status: int, code: str = "") -> tuple[str, list[str]]:
        asked: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                self.send_response(status)
                if code:
                    self.send_header("X-Error-Code", code)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

            do_HEAD = do_GET

            def log_message(self, *_: object) -> None:
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}", asked

    yield start
    for server in servers:
        server.shutdown()


def info(name: str, home: Path, endpoint: str) -> tuple[int, str, float]:
    """`reifusion info` in a process of its own -> exit code, stderr, seconds"""
    hub = {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_TOKEN": ""}
    start = time.monotonic()
    command = [sys.executable, "-m", "reifusion", "info", name]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | hub, timeout=100)
    return result.returncode, result.stderr, time.monotonic() - start


ANSWERS = [(401, ""), (401, "GatedRepo"), (403, "GatedRepo"), (404, "RepoNotFound"), (429, ""), (503, "")]


def test_a_cached_model_does_not_need_the_hub(cache, hub):
    address, asked = hub(404, "RepoNotFound")
    for endpoint in address, NOBODY:
        code, told, seconds = info("some/model", cache, endpoint)
        assert (code, told) == (0, "") and seconds < 30
    assert not asked


@pytest.mark.parametrize(
    "status, error, says",
    [
        (401, "RepoNotFound", "no public model on the hub"),
        (404, "RepoNotFound", "no public model on the hub"),
        (403, "GatedRepo", "on the hub it is for those who accepted its terms there and ran: hf auth login"),
        (429, "", "the hub answered 429 and the model is not in the local cache"),
        (503, "", "the hub answered 503 and the model is not in the local cache"),
    ],
)
def test_what_the_hub_answered_is_said_in_a_line(tmp_path, hub, status, error, says):
    address, asked = hub(status, error)
    code, told, seconds = info("some/model", tmp_path, address)
    assert code == 2 and told == f"reifusion: there is no file or folder some/model, and {says}\n"
    assert seconds < 30 and len(asked) <= 2


def test_a_hub_that_is_not_there_is_said_soon(tmp_path):
    code, told, seconds = info("some/model", tmp_path, NOBODY)
    assert code == 2 and told.count("\n") == 1 and "the hub was not reached" in told and seconds < 30


def test_a_half_fetched_model_is_not_taken_for_a_whole_one(cache, tmp_path, hub):
    shutil.copytree(cache, tmp_path / "half", dirs_exist_ok=True)
    next((tmp_path / "half").rglob("unet/*.safetensors")).unlink()
    address, asked = hub(404, "RepoNotFound")
    code, told, _ = info("some/model", tmp_path / "half", address)
    assert code == 2 and "no public model on the hub" in told and asked
