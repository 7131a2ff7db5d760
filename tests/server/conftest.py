"""A server with tiny models, in a thread of this process."""

from __future__ import annotations

import contextlib
import copy
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

pytest.importorskip("fastapi", reason="the server needs: pip install reifusion[server]")
pytest.importorskip("prometheus_client", reason="the server needs: pip install reifusion[server]")

import httpx
import torch
from safetensors.torch import save_file

from reifusion.model.diffusion import UNet
from reifusion.server.app import Config, Server
from reifusion.settings import Settings
from reifusion.steer.control_files import save_control
from reifusion.steer.controlnet import ControlNet
from reifusion.weights import save

from ..explain.conftest import TINY, TOKENIZER, tiny
from ..tiny import networks


@dataclass
class Running:
    """A server that runs, and what it is asked with."""

    address: str
    server: Server
    thread: threading.Thread

    @property
    def queue(self) -> Any:
        return self.server._app.state.service.queue

    def client(self, **more: Any) -> httpx.Client:
        return httpx.Client(base_url=self.address, timeout=60, trust_env=False, **more)

    def stop(self) -> None:
        self.server.handle_exit(signal.SIGTERM, None)
        self.thread.join(30)
        assert not self.thread.is_alive()


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """A folder with two tiny models."""
    folder = tmp_path_factory.mktemp("models")
    save(TINY, tiny().models, folder / "tiny.safetensors", tokenizer=TOKENIZER)
    save(TINY, networks(TINY, noise=0.2), folder / "other.safetensors", tokenizer=TOKENIZER)
    return folder


@pytest.fixture(scope="session")
def loras(tmp_path_factory) -> Path:
    """A folder with a LoRA for these models."""
    folder = tmp_path_factory.mktemp("loras")
    generator = torch.Generator().manual_seed(0)
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    lora = {
        f"{name}.lora_down.weight": torch.randn(2, 16, generator=generator),
        f"{name}.lora_up.weight": torch.randn(16, 2, generator=generator),
        f"{name}.alpha": torch.tensor(2.0),
    }
    save_file(lora, folder / "zork.safetensors")
    return folder


@pytest.fixture(scope="session")
def controls(tmp_path_factory) -> Path:
    """A folder with a ControlNet for these models."""
    folder = tmp_path_factory.mktemp("controls")
    net = ControlNet(copy.deepcopy(cast(UNet, tiny().models["diffusion"])), (4, 8, 8, 8))
    torch.manual_seed(1)
    for parameter in net.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    save_control(net, TINY, folder / "canny.safetensors")
    return folder


@contextlib.contextmanager
def serving(config: Config, ready: bool = True) -> Iterator[Running]:
    server = Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    until(lambda: server.started)
    running = Running(f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", server, thread)
    try:
        with running.client() as client:
            until(lambda: not ready or client.get("/readyz").status_code == 200)
        yield running
    finally:
        if thread.is_alive():
            running.stop()


def until(true: Callable[[], Any], seconds: float = 30) -> None:
    """Waits until something is true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def settings(models: Path) -> Settings:
    return Settings(model=str(models / "tiny.safetensors"), dtype="fp32", steps=3)


@pytest.fixture(scope="module")  # no longer, so that it does not run beside the tests of other parts
def running(models, loras, controls) -> Iterator[Running]:
    config = Config(settings(models), models, loras, controls, port=0, device="cpu", grace=5, keep=2)
    with serving(config) as one:
        yield one


@pytest.fixture(scope="module")
def api(running: Running) -> Any:
    """The running server as webuiapi, a client of A1111's API, sees it."""
    webuiapi = pytest.importorskip("webuiapi", reason="a test of A1111's API needs: pip install webuiapi")
    host, _, port = running.address.removeprefix("http://").partition(":")
    return webuiapi.WebUIApi(host=host, port=int(port))


@pytest.fixture
def http(running: Running) -> Iterator[httpx.Client]:
    with running.client() as client:
        yield client


@pytest.fixture(autouse=True)
def own_proxies(monkeypatch):
    """No proxy stands between a client and this machine."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
