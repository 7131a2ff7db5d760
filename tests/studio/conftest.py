"""A tiny model for tests that need no meaningful pictures, and the page in a real browser for the others."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from reifusion.settings import Settings

from ..explain.conftest import model  # noqa: F401


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """The folder in which the studio writes its pictures."""
    return tmp_path_factory.mktemp("pictures")


@pytest.fixture(scope="session")
def address(folder) -> Iterator[str]:
    """The address of a studio that draws with the mini."""
    pytest.importorskip("fastapi", reason="the studio needs: pip install reifusion[studio]")
    from reifusion.studio.serve import serve

    running = serve("mini", None, False, str(folder))
    yield running.address
    running.close()


@pytest.fixture
def artifacts(tmp_path) -> Path:
    """The folder for screenshots."""
    folder = Path(os.environ.get("REIFUSION_ARTIFACTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def _opener(browser: Any, address: str) -> Iterator[Callable[[], Any]]:
    """Opens pages; at the end, no page may have failed, or have asked another server for anything."""
    context, wrong = browser.new_context(viewport={"width": 1280, "height": 800}), []

    def note(request: Any) -> None:
        if not request.url.startswith((address, "data:", "blob:")):
            wrong.append(request.url)

    def open_page() -> Any:
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("request", note)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(address)
        page.wait_for_selector("#more [data-name]", state="attached")  # it knows the model
        return page

    yield open_page
    context.close()
    assert wrong == []


@pytest.fixture
def open_tab(browser, address) -> Iterator[Callable[[], Any]]:
    with _opener(browser, address) as open_page:
        yield open_page


@pytest.fixture(scope="module")
def lasting_tab(browser, address) -> Iterator[Callable[[], Any]]:
    """Opens pages that several tests share."""
    with _opener(browser, address) as open_page:
        yield open_page


@pytest.fixture
def pipe(model) -> Any:  # noqa: F811
    """The tiny model as the studio uses it."""
    from reifusion.studio import drawing

    return drawing.model(Settings(model=model))


@pytest.fixture
def wanted(model) -> Callable[..., Settings]:  # noqa: F811
    """Makes settings for the tiny model."""

    def make(prompt: str = "a cat on a dog", **more: Any) -> Settings:
        return Settings(prompt, **{"model": model, "seed": 3, "sampler": "ddim", "steps": 4, **more})

    return make


@pytest.fixture
def finish(tmp_path) -> Callable[..., Any]:
    """Draws to the end; returns the Drawing."""
    from reifusion.studio.drawing import Drawing, draw

    def run(settings: Settings, preview: str | None = None) -> Any:
        *_, drawing = draw(Drawing(settings), tmp_path / "out", preview)
        assert not drawing.failed, drawing.note
        return drawing

    return run
