"""`reifusion book`: the book, from the package, without a network."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from http.server import ThreadingHTTPServer

DATA = Path(__file__).parent.parent / "data"
CLONE = DATA.parent.parent / "site"  # where `make docs` builds it
TYPES = {".mjs": "text/javascript", ".js": "text/javascript", ".wasm": "application/wasm"}


def book(
    browser: Annotated[
        bool, typer.Option("--browser/--no-browser", help="Open it, or only print where it is.")
    ] = True,
    port: Annotated[
        int, typer.Option(help="Where it listens.", min=0, max=65535, show_default="a free one")
    ] = 0,
) -> None:
    """Opens the book. Its pages are files; the one that draws in the browser needs this to be running."""
    folder = built()
    if not browser:
        print(folder / "index.html")
        return
    import webbrowser

    with served(folder, port) as server, contextlib.suppress(KeyboardInterrupt):
        address = f"http://127.0.0.1:{server.server_address[1]}/"
        print(f"The book is at {address} until you press Ctrl-C.", flush=True)
        webbrowser.open(address)
        server.serve_forever()


def built() -> Path:
    """Returns the folder of the built book, of the package or of a clone. Raises ValueError without one."""
    for folder in (DATA / "book", CLONE):
        if (folder / "index.html").is_file():
            return folder
    raise ValueError("the book is not built yet; `make docs` in the clone builds it")


def served(folder: Path, port: int = 0) -> ThreadingHTTPServer:
    """Returns a server of the folder, to this machine only; /mini.safetensors is the mini's file.

    port: 0 for a free one. Raises ValueError if another program has it.
    """
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    class Handler(SimpleHTTPRequestHandler):
        extensions_map = SimpleHTTPRequestHandler.extensions_map | TYPES

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, directory=str(folder), **kwargs)

        def translate_path(self, path: str) -> str:
            return str(DATA / path[1:]) if path == "/mini.safetensors" else super().translate_path(path)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    try:
        return ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError:
        raise ValueError(f"another program listens on port {port}; --port 0 finds a free one") from None
