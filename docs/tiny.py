"""What `reifusion train tiny` does, minute by minute, for the book's chapter on training.

    python -m docs.tiny                      # trains it, and writes docs/assets/tiny-training.json and .png
    python -m docs.tiny VAE FOLDER MINUTES   # the same from the folders of two runs that are over

The training takes its ten minutes. So the book's build does not repeat it, but shows what was seen on the
way: the losses, and the sheets of all checkpoints.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image

from bench.ablations import asked_for, figures, trained_judge
from reifusion.api import load
from reifusion.files import whole, write_json
from reifusion.train.plot import losses
from reifusion.train.recipe import find, read
from reifusion.train.shapes import SIDE
from reifusion.train.sheet import LABEL, NARROWEST

ASSETS = Path(__file__).parent / "assets"
SEEN = ASSETS / "tiny-training.json"
FILM = ASSETS / "tiny-training.png"
COLUMNS = 8  # of a sheet


def pictures(sheet: Path, count: int) -> list[Image.Image]:
    """Returns the pictures of a sheet, in their own size."""
    page = Image.open(sheet).convert("RGB")
    cells = [(i % COLUMNS * NARROWEST, i // COLUMNS * (NARROWEST + LABEL)) for i in range(count)]
    boxes = [(x, y, x + NARROWEST, y + NARROWEST) for x, y in cells]
    return [page.crop(box).resize((SIDE, SIDE), Image.Resampling.NEAREST) for box in boxes]


def keep(vae: Path, run: Path, minutes: float) -> None:
    """Stores the losses of both runs, and all sheets of the second, a row for each.

    minutes: of processor time that they took together; the clock also counts what others do on the machine.
    """
    recipe = read("text2image", find("tiny"))
    sheets = sorted(run.glob("sheet-*.png"))
    film = Image.new("RGB", (SIDE * len(recipe.prompts), SIDE * len(sheets)))
    for y, sheet in enumerate(sheets):
        for x, picture in enumerate(pictures(sheet, len(recipe.prompts))):
            film.paste(picture, (SIDE * x, SIDE * y))
    with whole(FILM) as temporary:
        film.quantize(256).save(temporary, "PNG")
    rows = [json.loads(row) for row in (vae / "training.jsonl").read_text("utf-8").splitlines()]
    seen: dict[str, Any] = {
        "psnr": {row["step"]: round(row["psnr"], 2) for row in rows if "psnr" in row},
        "cpu_minutes": round(minutes, 1),
        "batch": recipe.training.batch,
        "sheets": [int(sheet.stem.split("-")[1]) for sheet in sheets],
        "prompts": list(recipe.prompts),
    }
    for name in ("loss", "held_out", "held_out_high_noise", "held_out_low_noise", "seen"):
        seen[name] = {step: round(loss, 4) for step, loss in losses(run, name).items()}
    seen["figures"] = figures(load(next(run.glob("*.safetensors"))), trained_judge().eval(), asked_for())
    write_json(SEEN, seen)


def main() -> int:
    from reifusion.train.__main__ import main as train

    if len(sys.argv) == 4:
        keep(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        code = train(["tiny", f"folder={folder}"])
        if code == 0:
            keep(Path(folder) / "tiny-vae", Path(folder) / "tiny", time.process_time() / 60)
    return code


if __name__ == "__main__":
    sys.exit(main())
