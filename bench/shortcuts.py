"""Measures what the shortcuts save, and what they change: `python -m bench.shortcuts`, in under four minutes.

The change is measured on the mini's pictures: the same prompts and seeds, with and without each shortcut. The
time is that of these pictures and of one step of a U-Net as large as SD 1.5's, with random weights, since
their values do not affect speed. Contenders take turns, and the median counts. Writes SHORTCUTS.md,
shortcuts.json and shortcuts.png.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import reifusion
from reifusion import kernels
from reifusion.model.config import SD15, UNetConfig
from reifusion.model.diffusion import UNet
from reifusion.model.pipeline import StableDiffusion
from reifusion.shortcuts.deepcache import DeepCache, deepcached
from reifusion.shortcuts.int8 import quantize

HERE = Path(__file__).parent
PROMPTS = ["a red apple", "a house in the snow", "a purple cat", "a smiling face"]
STEPS = 25
SCALE = 4.0  # of guidance

# The settings beyond the usual ones; "int8" is not a setting of a request, but another network.
SHORTCUTS: dict[str, dict[str, Any]] = {
    "none": {},
    "guidance only for σ in 0.3–5": {"guidance_interval": (0.3, 5)},
    "guidance only for σ in 0.5–15": {"guidance_interval": (0.5, 15)},
    "DeepCache, every 2nd step": {"deepcache": 2},
    "DeepCache, every 3rd step": {"deepcache": 3},
    "DeepCache, every 5th step": {"deepcache": 5},
    "weights of 8 bits": {"int8": True},
    "σ in 0.3–5, every 2nd step, 8 bits": {"guidance_interval": (0.3, 5), "deepcache": 2, "int8": True},
}
# Other changes to a picture, for comparison with the shortcuts.
YARDSTICKS: dict[str, dict[str, Any]] = {
    "a step less": {"steps": STEPS - 1},
    "half the steps": {"steps": STEPS // 2},
    "float32 in place of the usual dtype": {"dtype": "fp32"},
    "the next seed": {"seed": 1},
}


@dataclass
class Row:
    name: str
    wall: list[float] = field(default_factory=list)  # seconds of each round
    cpu: list[float] = field(default_factory=list)  # seconds of all threads together
    change: float | None = None  # of the pictures, or of the U-Net's output

    def time(self, call: Callable[[], Any]) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        result = call()
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)
        return result


def in_turns(calls: Mapping[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, Row], dict[str, Any]]:
    """Returns each call's times and result. The first turn warms up and gives the result."""
    rows = {name: Row(name) for name in calls}
    results = {name: call() for name, call in calls.items()}
    for _ in range(rounds):
        for name, call in calls.items():
            rows[name].time(call)
    return rows, results


# The mini's pictures


def measure_pictures(rounds: int) -> tuple[list[Row], dict[str, list[Image.Image]]]:
    pipes = {"": reifusion.load(), "int8": reifusion.load(), "fp32": reifusion.load(dtype="fp32")}
    quantize(pipes["int8"])

    def draw(wish: Mapping[str, Any]) -> list[Image.Image]:
        asked = {"seed": 0, "steps": STEPS, "cfg": SCALE, "sampler": "ddim", **wish}
        pipe: StableDiffusion = pipes["int8" if asked.pop("int8", False) else asked.pop("dtype", "")]
        pipe = deepcached(pipe, asked.pop("deepcache", 1))
        # One by one, as the command line draws.
        drawn = [pipe.generate(prompt, progress=False, **asked) for prompt in PROMPTS]
        return [picture for picture in drawn if isinstance(picture, Image.Image)]

    calls = {name: lambda wish=wish: draw(wish) for name, wish in SHORTCUTS.items()}
    rows, drawn = in_turns(calls, rounds)
    plain = drawn["none"]
    for name, row in rows.items():
        row.change = difference(drawn[name], plain)
    for name, wish in YARDSTICKS.items():
        rows[name] = Row(name, change=difference(draw(wish), plain))
    return list(rows.values()), drawn


def difference(pictures: Sequence[Image.Image], plain: Sequence[Image.Image]) -> float:
    """Returns by how much a pixel's value, 0 … 255, is off on average."""
    pairs = [
        (np.array(a, dtype=float), np.array(b, dtype=float)) for a, b in zip(pictures, plain, strict=True)
    ]
    return float(np.mean([np.abs(a - b).mean() for a, b in pairs]))


def sheet(drawn: Mapping[str, Sequence[Image.Image]], side: int = 96) -> Image.Image:
    """A row for each shortcut, a column for each prompt."""
    left, font = 250, ImageFont.load_default(13)
    page = Image.new("RGB", (left + len(PROMPTS) * (side + 4), len(drawn) * (side + 4)), "white")
    draw = ImageDraw.Draw(page)
    for i, (name, pictures) in enumerate(drawn.items()):
        draw.text((4, i * (side + 4) + side / 2), name, "black", font, anchor="lm")
        for j, picture in enumerate(pictures):
            page.paste(picture.resize((side, side)), (left + j * (side + 4), i * (side + 4)))
    return page


# A step of SD 1.5's U-Net


def measure_steps(rounds: int, quick: bool) -> tuple[list[Row], dict[str, float]]:
    """Returns the times of one step with guidance for each shortcut, and the networks' sizes in MB."""
    config = UNetConfig(channels=(64, 128), attention=(1, 1)) if quick else SD15.unet
    dtype = reifusion.load().dtype
    unet = random_unet(config).to(dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    small = copy.deepcopy(unet)
    quantize({"diffusion": small})
    kernels.install({"unet": unet, "small": small})
    side, generator = 64, torch.Generator().manual_seed(1)
    half = torch.randn(1, 4, side, side, generator=generator).to(dtype)
    latents = torch.cat([half, half])
    context = torch.randn(2, 77, config.context_width, generator=generator).to(dtype)
    t = torch.tensor([500.0])
    cached = DeepCache(unet, sys.maxsize)  # only the first call is deep
    calls: dict[str, Callable[[], torch.Tensor]] = {
        "a step": lambda: unet(latents, context, t),
        "outside the interval of guidance": lambda: unet(half, context[:1], t),
        "between DeepCache's whole steps": lambda: cached(latents, context, t),
        "weights of 8 bits": lambda: small(latents, context, t),
    }
    with torch.inference_mode():
        cached(latents, context, t)
        rows, outputs = in_turns(calls, rounds)
        exact = outputs["a step"].float()
        change = outputs["weights of 8 bits"].float() - exact
        rows["weights of 8 bits"].change = (change.norm() / exact.norm()).item()
    sizes = {
        name: sum(x.nbytes for x in network.state_dict().values()) / 1e6
        for name, network in (("a step", unet), ("weights of 8 bits", small))
    }
    return list(rows.values()), sizes


def random_unet(config: UNetConfig) -> UNet:
    with torch.device("meta"):
        unet = UNet(config)
    unet.to(torch.float32).to_empty(device="cpu").requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(0)
    for name, x in unet.named_parameters():
        if x.ndim > 1:
            spread = (3 / x[0].numel()) ** 0.5
            x.uniform_(-spread, spread, generator=generator)
        else:
            x.fill_(float("norm" in name and name.endswith("weight")))
    return unet


# The report


def report(facts: Mapping[str, Any], pictures: Sequence[Row], steps: Sequence[Row]) -> str:
    lines = [
        "# What the shortcuts save, and what they change",
        "",
        "Written by `python -m bench.shortcuts`. Options of `reifusion generate` and of `generate()`; all are off unless asked for.",
        "",
        f"{facts['date']}, {facts['cpu']}, {facts['threads']} threads, {facts['dtype']}, torch {facts['torch']}, "
        f"load {facts['load']:.1f}, median of {facts['rounds']}. On a busy machine, trust the processor's time.",
        "",
        f"## The mini, {STEPS} steps of DDIM with guidance {SCALE:g}, {len(PROMPTS)} pictures of the same prompts and seeds",
        "",
        "| | s per picture | processor's s | faster | pixels off by, of 255 |",
        "|---|---:|---:|---:|---:|",
        *[line(row, pictures[0], len(PROMPTS)) for row in pictures],
        "",
        "![The same prompts and seeds with each shortcut](shortcuts.png)",
        "",
        "The last rows are no shortcuts, but what else changes a picture, to measure the others by. A picture "
        "that differs is not yet a worse one; `python -m bench.quality` says which.",
        "",
        f"## {facts['unet']}, random weights, one step at 512×512 with guidance",
        "",
        "| | s | processor's s | faster | output off by | weights, MB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in steps:
        size = facts["sizes"].get(row.name)
        lines.append(f"{line(row, steps[0], 1, share=True)} {'' if size is None else f'{size:,.0f}'} |")
    lines += [
        "",
        f"So a picture of {STEPS} steps, without text encoder and VAE:",
        "",
        "| | s | faster |",
        "|---|---:|---:|",
    ]
    whole = {row.name: median(row.wall) for row in steps}
    full, alone, shallow = (whole[row.name] for row in steps[:3])
    inside, all_of_it = facts["guided"], STEPS * full
    for name, seconds in {
        "no shortcut": all_of_it,
        f"guidance only for σ in 0.3–5: {inside} of {STEPS} steps": inside * full + (STEPS - inside) * alone,
        **{
            f"DeepCache, every {n}": -(-STEPS // n) * full + (STEPS - -(-STEPS // n)) * shallow
            for n in (2, 3, 5)
        },
        "LCM, 4 steps, no second half (another model, or a LoRA)": 4 * alone,
    }.items():
        lines.append(f"| {name} | {seconds:.1f} | {all_of_it / seconds:.2f} × |")
    return "\n".join(lines) + "\n"


def line(row: Row, plain: Row, count: int, share: bool = False) -> str:
    change = "" if not row.change else f"{100 * row.change:.2f} %" if share else f"{row.change:.2f}"
    if not row.wall:
        return f"| {row.name} | | | | {change} |"
    wall, cpu = median(row.wall) / count, median(row.cpu) / count
    gain = median(plain.wall) / median(row.wall), median(plain.cpu) / median(row.cpu)
    faster = f"{gain[0]:.2f} × ({gain[1]:.2f} ×)"
    return f"| {row.name} | {wall:.3f} | {cpu:.3f} | {faster} | {change} |"


def median(times: Sequence[float]) -> float:
    return statistics.median(times)


def guided_steps() -> int:
    """Counts the steps with guidance in the interval, the same for every model with SD 1.5's schedule."""
    asked: dict[str, Any] = {
        "steps": STEPS,
        "sampler": "ddim",
        "guidance_interval": (0.3, 5),
    }
    return sum(step.eps_uncond is not None for step in reifusion.load().denoise("a cat", **asked))


def cpu_name() -> str:
    try:
        names = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
        return names[0].partition(": ")[2]
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.shortcuts", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="a small U-Net, to try this out")
    parser.add_argument("--out", type=Path, default=HERE, help="where the three files go")
    options = parser.parse_args(argv)
    if min(options.rounds, options.threads) < 1:
        parser.error("--rounds and --threads are 1 at least")
    torch.set_num_threads(options.threads)
    start = time.perf_counter()
    pictures, drawn = measure_pictures(options.rounds)
    steps, sizes = measure_steps(options.rounds, options.quick)
    facts: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu_name(),
        "threads": options.threads,
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "dtype": str(reifusion.load().dtype).removeprefix("torch."),
        "rounds": options.rounds,
        "unet": "A small U-Net" if options.quick else "SD 1.5's U-Net",
        "sizes": sizes,
        "guided": guided_steps(),
    }
    figures = {"pictures": [asdict(row) for row in pictures], "steps": [asdict(row) for row in steps]}
    options.out.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("SHORTCUTS.md", report(facts, pictures, steps)),
        ("shortcuts.json", json.dumps(facts | figures, indent=1, ensure_ascii=False) + "\n"),
    ):
        (options.out / f".{name}").write_text(text, encoding="utf-8")
        (options.out / f".{name}").replace(options.out / name)
    sheet(drawn).save(options.out / ".shortcuts.png")
    (options.out / ".shortcuts.png").replace(options.out / "shortcuts.png")
    print(f"{options.out / 'SHORTCUTS.md'}, in {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
