"""What `reifusion train tiny` does, minute by minute, for the book's chapter on training.

    python -m docs.tiny                      # trains it, and writes docs/assets/tiny-training.json and .png
    python -m docs.tiny VAE FOLDER MINUTES CPU_MINUTES   # the same from the folders of two runs that are over

The training takes its ten minutes. So the book's build does not repeat it, but shows what was seen on the
way: the losses, and the sheets of all checkpoints.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn import functional as F

from bench.ablations import Judge, asked_for, figures, trained_judge, verdicts
from reifusion.api import load
from reifusion.files import whole, write_json
from reifusion.model.pictures import to_tensor
from reifusion.train.plot import losses
from reifusion.train.recipe import find, read
from reifusion.train.shapes import COLOURS, SIDE, SUBJECTS
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


def recognised(judge: Judge, film: list[list[Image.Image]], prompts: Sequence[str]) -> list[dict[str, int]]:
    """Returns of how many pictures of each sheet the judge says the thing and the colour of their prompts."""
    words = [set(prompt.split()) for prompt in prompts]
    named = [i for i, each in enumerate(words) if each & set(SUBJECTS) and each & set(COLOURS)]
    answers = torch.tensor(
        [
            [next(k for k, name in enumerate(names) if name in words[i]) for names in (SUBJECTS, COLOURS)]
            for i in named
        ]
    )
    found = []
    for row in film:
        good = verdicts(judge, torch.cat([to_tensor(row[i]) for i in named]), F.pad(answers, (0, 1)))
        found.append({"of": len(named), "thing": int(good[:, 0].sum()), "colour": int(good[:, 1].sum())})
    return found


def keep(vae: Path, run: Path, minutes: float, cpu_minutes: float) -> None:
    """Stores the losses of both runs, and all sheets of the second, a row for each.

    minutes: that they took together; cpu_minutes: of processor time, whatever else the machine does.
    """
    recipe = read("text2image", find("tiny"))
    sheets = sorted(run.glob("sheet-*.png"))
    rows = [pictures(sheet, len(recipe.prompts)) for sheet in sheets]
    film = Image.new("RGB", (SIDE * len(recipe.prompts), SIDE * len(sheets)))
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            film.paste(picture, (SIDE * x, SIDE * y))
    with whole(FILM) as temporary:
        film.quantize(256).save(temporary, "PNG")
    log = [json.loads(line) for line in (vae / "training.jsonl").read_text("utf-8").splitlines()]
    judge = trained_judge().eval()
    seen: dict[str, Any] = {
        "psnr": {line["step"]: round(line["psnr"], 2) for line in log if "psnr" in line},
        "minutes": round(minutes, 1),
        "cpu_minutes": round(cpu_minutes, 1),
        "batch": recipe.training.batch,
        "sheets": [int(sheet.stem.split("-")[1]) for sheet in sheets],
        "prompts": list(recipe.prompts),
        "recognised": recognised(judge, rows, recipe.prompts),
    }
    for name in ("loss", "held_out", "held_out_high_noise", "held_out_low_noise", "seen"):
        seen[name] = {step: round(loss, 4) for step, loss in losses(run, name).items()}
    seen["figures"] = figures(load(next(run.glob("*.safetensors"))), judge, asked_for())
    write_json(SEEN, seen)


def main() -> int:
    from reifusion.train.__main__ import main as train

    if len(sys.argv) == 5:
        keep(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4]))
        return 0
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        code = train(["tiny", f"folder={folder}"])
        if code == 0:
            minutes = (time.perf_counter() - begun) / 60
            keep(Path(folder) / "tiny-vae", Path(folder) / "tiny", minutes, time.process_time() / 60)
    return code


if __name__ == "__main__":
    sys.exit(main())
