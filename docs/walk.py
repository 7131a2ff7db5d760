"""Follows one call: the files that a reader would have to open, and the lines that run.

`python -m docs.walk` measures diffusers, which the book's build does not install, and writes the result,
with versions, to `docs/walk-diffusers.json`. Our own walk is measured whenever the book is built.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

STORED = Path(__file__).with_name("walk-diffusers.json")
STEPS = 3  # more steps run the same lines again


def walked(call: Callable[[], Any], *packages: str) -> dict[str, list[int]]:
    """Runs the call; returns how many lines run, and how many there are, in each file of the packages."""
    roots = [Path(importlib.import_module(name).__file__ or "").parent for name in packages]
    prefixes = tuple(f"{root}/" for root in roots)
    run: dict[str, set[int]] = {}

    def enter(frame: FrameType, event: str, _: Any) -> Any:
        return lines if frame.f_code.co_filename.startswith(prefixes) else None

    def lines(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            run.setdefault(frame.f_code.co_filename, set()).add(frame.f_lineno)
        return lines

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        call()
    finally:
        sys.settrace(before)
    found = {}
    for file, numbers in sorted(run.items()):
        root = next(root for root in roots if file.startswith(f"{root}/"))
        length = len(Path(file).read_text(encoding="utf-8").splitlines())
        found[f"{root.name}/{Path(file).relative_to(root).as_posix()}"] = [len(numbers), length]
    return found


def ours() -> dict[str, list[int]]:
    """Follows the drawing of one picture by the mini; loading the mini is not counted."""
    import reifusion
    from reifusion import kernels

    pipe = reifusion.load()
    kernels.uninstall(pipe.models)  # the textbook's own lines
    settings: dict[str, Any] = {"steps": STEPS, "sampler": "dpmpp_2m", "seed": 0}
    return walked(lambda: pipe.generate("a cat", progress=False, **settings), "reifusion")


def theirs() -> dict[str, Any]:
    """Follows the same call in diffusers, on a model of the same classes with random weights."""
    import diffusers
    import transformers

    from reifusion.model.clip import CLIP
    from reifusion.model.config import CLIPConfig, ModelConfig, UNetConfig, VAEConfig
    from reifusion.model.decoder import Decoder
    from reifusion.model.diffusion import UNet
    from reifusion.model.encoder import Encoder
    from reifusion.model.tokenizer import Tokenizer
    from reifusion.weights import save

    config = ModelConfig(
        size=64,
        clip=CLIPConfig(width=32, layers=2, heads=2),
        vae=VAEConfig(channels=(16, 16, 32, 32), layers=1, groups=8),
        unet=UNetConfig(channels=(32, 64), attention=(1, 0), heads=(4, 4), context_width=32, groups=16),
    )
    networks = {"clip": CLIP(config.clip), "diffusion": UNet(config.unet)}
    models = {**networks, "encoder": Encoder(config.vae), "decoder": Decoder(config.vae)}
    with tempfile.TemporaryDirectory() as folder:
        save(config, models, Path(folder, "tiny"), "diffusers", Tokenizer())
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(Path(folder, "tiny"))
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    files = walked(lambda: pipe("a cat", num_inference_steps=STEPS), "diffusers", "transformers")
    versions = {"diffusers": diffusers.__version__, "transformers": transformers.__version__}
    kinds = ("Pipeline", "Scheduler")
    offers = {kind: sum(name.endswith(kind) for name in dir(diffusers)) for kind in kinds}
    return {"versions": versions, "offers": offers, "files": files}


def main() -> int:
    found = theirs()
    text = re.sub(r"\[\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2]", json.dumps(found, indent=1)) + "\n"
    temporary = STORED.with_name(f".{STORED.name}.new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(STORED)
    print(f"{len(found['files'])} files of {found['versions']} in {STORED.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
