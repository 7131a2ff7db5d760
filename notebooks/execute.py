"""Executes notebooks and keeps their outputs small: `make demo`, or `python notebooks/execute.py 3-words`.

Without names it executes this folder and demo.ipynb. A notebook is written back only if all of its cells ran.
"""

from __future__ import annotations

import base64
import io
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image

from reifusion.files import whole

HERE = Path(__file__).parent
LARGEST = 60_000  # bytes of a picture
SECONDS = 1800  # the time that a cell may take on a slow machine


def notebooks() -> list[Path]:
    return [HERE.parent / "demo.ipynb", *sorted(HERE.glob("*.ipynb"))]


def execute(path: Path) -> Any:
    """Returns the notebook with fresh outputs. Raises CellExecutionError if a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", record_timing=False,
                            resources={"metadata": {"path": str(path.parent)}})  # fmt: skip
    client.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [_small(output) for output in cell.outputs if not _is_bar(output)]
    return notebook


def _is_bar(output: Any) -> bool:
    """True for a progress bar on stderr, in one line or in several, or the empty line after it."""
    at_stderr = output.output_type == "stream" and output.name == "stderr"
    return at_stderr and ("\r" in output.text or "%|" in output.text or not output.text.strip())


def _small(output: Any) -> Any:
    """Keeps one format of a picture, with as many colours, and if necessary pixels, as fit."""
    data = output.get("data", {})
    if "image/png" in data:
        data.pop("image/jpeg", None)
        data["image/png"] = base64.b64encode(small_png(base64.b64decode(data["image/png"]))).decode()
    return output


def small_png(png: bytes, largest: int = LARGEST) -> bytes:
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    while True:
        for colours in (256, 128):
            file = io.BytesIO()
            picture.quantize(colours, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
            if file.tell() <= largest:
                return file.getvalue()
        size = (round(picture.width * 0.9), round(picture.height * 0.9))
        picture = picture.resize(size, Image.Resampling.LANCZOS)


def main(names: list[str]) -> int:
    known = {path.stem: path for path in notebooks()}
    unknown = [name for name in names if Path(name).stem not in known]
    if unknown:
        print(f"there is no notebook {unknown[0]!r}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    for path in [known[Path(name).stem] for name in names] or known.values():
        begun = time.monotonic()
        notebook = execute(path)
        with whole(path) as temporary:
            nbformat.write(notebook, temporary)
        print(f"{path.name}: {time.monotonic() - begun:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
