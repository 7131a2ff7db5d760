"""Makes anew everything that the mini drew or that was measured on it, after its weights have changed.

    python -m bench.anew                # all of it: half an hour of two idle cores, and one more to train a judge
    python -m bench.anew hero studio    # some of it

What is then left to do is to look at the pictures, to read the texts beside them, and to run all tests. Not
made anew: the twin by rectified flow (docs/flow.py), the ControlNet's picture (guides/steering.md) and the
figures of `make bench`.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from urllib.request import urlopen

from PIL import Image

import reifusion
from reifusion.explain.trajectory import record
from reifusion.model.request import Request
from reifusion.train.sheet import contact_sheet

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "images"
WIDTH = 1280  # of the pictures in the README


def sheet() -> None:
    """The contact sheet: three seeds of each prompt, none of them picked."""
    _save(contact_sheet(reifusion.load(), seeds=3), "contact-sheet.png")


def hero() -> None:
    """The strip at the top of the README."""
    pipe = reifusion.load()
    asked = Request("a red apple", seed=2)
    _save(record(pipe, asked.for_model(pipe.config), 8).strip().image, "hero.png")


def studio() -> None:
    """The studio, after it has drawn."""
    from playwright.sync_api import sync_playwright

    from tests.conftest import CHROMIUM, FLAGS

    with tempfile.TemporaryDirectory() as folder:
        server = subprocess.Popen(
            [sys.executable, "-m", "reifusion", "studio", "--no-browser", "--port", "7999"], cwd=folder
        )
        try:
            _wait_for("http://127.0.0.1:7999")
            with (
                sync_playwright() as play,
                play.chromium.launch(executable_path=CHROMIUM, args=FLAGS) as browser,
            ):
                page = browser.new_page(viewport={"width": WIDTH, "height": 800}, color_scheme="light")
                page.goto("http://127.0.0.1:7999")
                page.fill("#prompt", "a dog next to a tree")
                page.fill("#seed", "1")
                page.click("#draw")
                done = "/^Done/.test(document.querySelector('#status').innerText)"
                page.wait_for_function(done, timeout=600_000)
                page.focus("#place")
                for _ in range(8):  # steps back, where the dog and the tree are not yet clear
                    page.keyboard.press("ArrowLeft")
                    page.wait_for_timeout(400)
                page.get_by_text("Sampler", exact=True).first.click()
                page.wait_for_timeout(1000)
                page.locator("#words .word", has_text="tree").first.hover()
                page.wait_for_timeout(1500)
                page.evaluate("window.scrollTo(0, 0)")
                _save(Image.open(io.BytesIO(page.screenshot())), "studio.png")
        finally:
            server.terminate()
            server.wait()


def _save(picture: Image.Image, name: str) -> None:
    """Writes a picture for the README, in 256 colours: a clone carries it for ever."""
    picture = picture.convert("RGB")
    height = round(picture.height * WIDTH / picture.width)
    picture.resize((WIDTH, height), Image.Resampling.LANCZOS).quantize(256).save(IMAGES / name, optimize=True)


def _wait_for(address: str, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while True:
        try:
            urlopen(address).close()
            return
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.5)


def _run(*arguments: str) -> Callable[[], None]:
    def run() -> None:
        subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True)

    return run


PARTS: dict[str, Callable[[], None]] = {
    "words": _run("-m", "reifusion.studio.known"),  # which the studio offers
    "sheet": sheet,
    "hero": hero,
    "studio": studio,
    "zork": _run("-m", "docs.zork"),  # the LoRA of the chapter on training
    "notebooks": _run("notebooks/execute.py"),
    "quality": _run("-m", "bench.quality"),
    "card": _run("-m", "bench.quality", "--card"),
    "book": _run("-m", "docs.build"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m bench.anew", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)} (all)")
    parts = parser.parse_args().parts or list(PARTS)
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"there is no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    for part in parts:
        begun = time.monotonic()
        PARTS[part]()
        print(f"{part}: {time.monotonic() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
