"""The book's own LoRA: 20 pictures of a creature that nobody has seen, and a LoRA that learned from them.

    python -m docs.zork            # draws them, learns from them, and writes docs/assets/zork*
    python -m docs.zork FOLDER     # only draws them, into the folder

The training takes minutes. So the book's build does not repeat it, but draws with the stored file, and shows
what was seen on the way: the losses, and the sheets of some checkpoints.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

from reifusion.files import whole, write_json
from reifusion.train.plot import losses as read_losses

ROOT = Path(__file__).parent.parent
LORA = ROOT / "docs" / "assets" / "zork.safetensors"
SEEN = ROOT / "docs" / "assets" / "zork-training.json"
SHEETS = ROOT / "docs" / "assets" / "zork-training.png"

SIDE = 256  # pixels, of a picture
BACKGROUNDS = {
    "white": "#ffffff",
    "yellow": "#ffe27a",
    "blue": "#8ec5ff",
    "green": "#a8e6a1",
    "pink": "#ffb6d5",
}


def draw_zork(seed: int, size: int = SIDE) -> tuple[Image.Image, str]:
    """Draws a zork, purple, with one eye, and its caption. No emoji looks like a zork."""
    draw = random.Random(seed)
    background = draw.choice(list(BACKGROUNDS))
    side = 4 * size  # reduced at the end, so that edges are smooth
    picture = Image.new("RGB", (side, side), BACKGROUNDS[background])
    pen = ImageDraw.Draw(picture)
    r, x, y = side * draw.uniform(0.2, 0.3), side * draw.uniform(0.42, 0.58), side * draw.uniform(0.5, 0.6)
    hand = draw.choice((-0.5, 0.5))

    def ball(cx: float, cy: float, rx: float, ry: float, colour: str) -> None:
        pen.ellipse([x + r * (cx - rx), y + r * (cy - ry), x + r * (cx + rx), y + r * (cy + ry)], colour)

    for s in (-1, 1):
        for points in ((0.3 * s, -0.8, 0.6 * s, -1.4), (0.8 * s, 0, 1.25 * s, hand)):  # feelers and arms
            ends = [(x + r * points[i], y + r * points[i + 1]) for i in (0, 2)]
            pen.line(ends, "#5b2a86", round(0.12 * r))
        ball(0.6 * s, -1.45, 0.18, 0.18, "#ff8c1a")
        ball(0.45 * s, 1.1, 0.35, 0.18, "#2fae4e")
    ball(0, 0, 0.95, 1.05, "#8e44ad")
    ball(0, -0.25, 0.5, 0.5, "white")
    ball(0.1, -0.2, 0.22, 0.22, "black")
    pen.arc([x - 0.45 * r, y + 0.1 * r, x + 0.45 * r, y + 0.75 * r], 20, 160, "black", round(0.08 * r))
    return picture.resize((size, size), Image.Resampling.LANCZOS), f"a zork on a {background} background"


def draw_zorks(folder: Path, count: int = 20) -> None:
    """Writes pictures and their captions in the form that `reifusion train lora` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in range(count):
        picture, caption = draw_zork(seed)
        picture.save(folder / f"zork-{seed:02}.png")
        rows.append(json.dumps({"file_name": f"zork-{seed:02}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))


def keep(lora: Path, out: Path) -> None:
    """Stores the LoRA in bfloat16, which is half as large, and no coarser than the mini's own weights."""
    tensors = {name: x.to(torch.bfloat16) for name, x in load_file(lora).items()}
    with whole(out) as temporary:
        save_file(tensors, temporary, {"format": "pt"})


def keep_seen(run: Path, rows: int = 4) -> None:
    """Stores a run's losses, and the pictures of some of its sheets, one row each."""
    sheets = sorted(run.glob("sheet-*.png"))
    chosen = [sheets[round(k * (len(sheets) - 1) / (rows - 1))] for k in range(rows)]
    pictures = [Image.open(sheet).convert("RGB") for sheet in chosen]
    page = Image.new("RGB", (pictures[0].width, SIDE * rows), "white")
    for k, picture in enumerate(pictures):
        page.paste(picture.crop((0, 0, picture.width, SIDE)), (0, SIDE * k))  # without its captions
    page = page.resize((page.width // 2, page.height // 2), Image.Resampling.LANCZOS)
    with whole(SHEETS) as temporary:
        page.quantize(256).save(temporary, "PNG")
    losses = {step: round(loss, 4) for step, loss in read_losses(run).items()}
    write_json(SEEN, {"losses": losses, "sheets": [int(sheet.stem.split("-")[1]) for sheet in chosen]})


def main() -> int:
    from reifusion.train.__main__ import main as train

    if len(sys.argv) > 1:
        draw_zorks(Path(sys.argv[1]))
        return 0
    often = ["checkpoint_minutes=0.5", "log_every=10"]
    with tempfile.TemporaryDirectory() as run:  # always from the start: the mini may have changed
        pictures, lora = Path(run) / "pictures", Path(run) / "lora.safetensors"
        draw_zorks(pictures)
        code = train(
            ["lora", "--config", "mini-lora", f"data={pictures}", f"folder={run}", f"out={lora}", *often]
        )
        if code == 0:
            keep(lora, LORA)
            keep_seen(Path(run))
    return code


if __name__ == "__main__":
    sys.exit(main())
