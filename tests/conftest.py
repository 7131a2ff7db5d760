"""What several tests share: the small model, and searches that are the same in every run.

Searches by random inputs tell of the code alone, unless REIFUSION_MANY=10 searches for longer, and anew each
time.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reifusion.threads import wait_briefly

wait_briefly()  # before PyTorch is imported

import pytest
import torch
from hypothesis import settings
from torch import nn

import reifusion.sampling  # noqa: F401  # so that there are the same samplers in every test
from reifusion.weights import save
from tests.tiny import SMALL, WORDS, random_networks

# A busy machine is not a fault: no deadlines.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.register_profile("many", deadline=None)
settings.load_profile("many" if "REIFUSION_MANY" in os.environ else "fixed")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A real Chromium, one for all tests: a process has room for one session of Playwright."""
    sync = pytest.importorskip("playwright.sync_api", reason="a browser test needs: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("a browser test needs Chromium: apt-get install chromium")
    with sync.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    """The networks of SMALL."""
    return random_networks(SMALL)


@pytest.fixture(scope="module")
def folder(models: dict[str, nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same networks as a folder of diffusers."""
    path = tmp_path_factory.mktemp("diffusers") / "small"
    save(SMALL, models, path, "diffusers", WORDS)
    return path
