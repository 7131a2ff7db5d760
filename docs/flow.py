"""The mini beside its twin that was trained by rectified flow, for the book's chapter on flow.

    python -m docs.flow runs/mini-flow/mini-flow.safetensors

Both get the same prompts and seeds, at few steps and at many. It takes ten minutes, so the book's build does
not repeat it, but shows docs/assets/flow.json and flow.png, which this module writes.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bench.judge import fingerprint, get_judge
from bench.prompts import make_prompts
from bench.quality import draw, portion, score, verdicts
from reifusion.api import load
from reifusion.files import whole, write_json
from reifusion.model.model_loader import ModelError
from reifusion.model.pipeline import StableDiffusion
from reifusion.train.mini.library import read_library

ASSETS = Path(__file__).parent / "assets"
STEPS = (4, 8, 25)
CFG = 4.0
# Both samplers add no noise on the way and call the network once a step.
SAMPLERS = {"DDPM, drawn by DDIM": "ddim", "rectified flow, drawn by Euler": "flow"}
ROWS = {
    "subject, among 20": "subject",
    "style, seen of this subject: style and subject": "style",
    "dye and subject": "colour and subject",
    "left, right, small, two: where and subject": "place and subject",
}
SHOWN = ("a red apple", "an octopus", "a cartoon penguin", "a purple cat", "a dog next to a tree", "a rocket")


def measured(pipe: StableDiffusion, sampler: str, steps: int, count: int) -> dict[str, float]:
    """Returns the share of `count` prompts that are drawn right, by kind."""
    judge, prompts = get_judge(), make_prompts(read_library(), portion(count))
    settings = {"sampler": sampler, "steps": steps, "cfg": CFG}
    with tempfile.TemporaryDirectory() as folder:
        images = draw(pipe, prompts, settings, Path(folder))
    said, _ = verdicts(images, prompts, judge)
    return {ROWS[figure.name]: figure.value for figure in score(prompts, said, said) if figure.name in ROWS}


def pictures(pipe: StableDiffusion, sampler: str) -> np.ndarray:
    """A row for each number of steps, a column for each prompt: (H, W, 3) uint8"""
    rows = []
    for steps in STEPS:
        made: Any = pipe.generate(list(SHOWN), seed=1, sampler=sampler, steps=steps, cfg=CFG, progress=False)
        rows.append(np.concatenate([np.asarray(picture) for picture in made], axis=1))
    return np.concatenate(rows)


def table() -> str:
    """Returns the results as Markdown: a row for each model and number of steps, a column for each figure."""
    models = json.loads((ASSETS / "flow.json").read_text("utf-8"))["models"]
    rows = [["right, in %", "steps", *ROWS.values()], ["---", *["---:"] * (1 + len(ROWS))]]
    for name, model in models.items():
        for steps, figures in model["steps"].items():
            rows.append([name, steps, *(f"{100 * figures[column]:.0f}" for column in ROWS.values())])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: python -m docs.flow MODEL, the file that the recipe mini-flow makes", file=sys.stderr)
        return 2
    try:
        models = dict(zip(SAMPLERS, (load("mini"), load(sys.argv[1])), strict=True))
    except ModelError as error:
        print(error, file=sys.stderr)
        return 1
    count = 200
    report = {
        name: {
            "sha256": fingerprint(*pipe.models.values()),
            "steps": {str(steps): measured(pipe, SAMPLERS[name], steps, count) for steps in STEPS},
        }
        for name, pipe in models.items()
    }
    write_json(ASSETS / "flow.json", {"prompts": count, "cfg": CFG, "models": report})
    page = np.concatenate([pictures(pipe, SAMPLERS[name]) for name, pipe in models.items()])
    with whole(ASSETS / "flow.png") as temporary:
        Image.fromarray(page).quantize(256).save(temporary, "PNG")
    print(f"written: {ASSETS / 'flow.json'} and flow.png beside it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
