"""The page and the server that shows it, to this machine only."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from . import drawing
from .acts import Acts, connect
from .layout import Parts, gr, theme

HERE = Path(__file__).parent


def page(source: str = "mini", folder: str | os.PathLike = "images", preview: str | None = None) -> gr.Blocks:
    """Returns the page, which begins with the model `source` and writes pictures to the folder.

    preview: a tiny VAE that decodes the steps.
    """
    folder = Path(folder)
    with gr.Blocks(title="reifusion studio", analytics_enabled=False, delete_cache=(3600, 86400)) as blocks:
        parts = Parts(source, drawing.model(source).config, folder)
        connect(blocks, parts, Acts(parts, folder, preview))
    return blocks


def serve(
    source: str = "mini",
    port: int | None = None,
    browser: bool = True,
    folder: str = "images",
    preview: str | None = None,
) -> tuple[gr.Blocks, str]:
    """Starts the page at 127.0.0.1, in threads of its own; returns the page and its address.

    port: None for the first free one from 7860. preview: a tiny VAE that decodes the steps. Raises ValueError
    for a source that is not a model, for a preview that is no tiny VAE for it, and for a port that is taken.
    """
    drawing.previewing(source, preview)  # a wrong file is found before the page opens
    blocks = page(source, folder, preview)
    blocks.queue(default_concurrency_limit=4)
    script = f"<script>{(HERE / 'studio.js').read_text('utf-8')}</script>"
    try:
        _, address, _ = blocks.launch(
            server_name="127.0.0.1",
            server_port=port,
            inbrowser=browser,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,
            footer_links=[],
            allowed_paths=[os.path.abspath(folder)],
            theme=theme(),
            css_paths=HERE / "studio.css",
            head=script,
        )
    except OSError:
        raise ValueError(f"port {port} is taken, or no port is free: try another --port") from None
    return blocks, address


def run(source: str, port: int | None, browser: bool, folder: str, preview: str | None = None) -> None:
    """Serves the page until Ctrl-C."""
    blocks, address = serve(source, port, browser, folder, preview)
    print(f"The studio is at {address}  (Ctrl-C ends it)", flush=True)
    try:
        threading.Event().wait()
    finally:
        blocks.close(verbose=False)
