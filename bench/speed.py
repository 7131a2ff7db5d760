"""How fast is it? Every contender in one go, in turns, on the same weights and inputs: `make bench`.

A row is a piece of work: one step of the U-Net, a decoded picture. In each round every contender does it
once, so that what else the machine is busy with meets all alike; the median of the rounds counts. The numbers
that come out are held against those of diffusers in float32: a fast wrong answer is no result.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.contenders import CONTENDERS, STEPS, installed

HERE = Path(__file__).parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "reifusion", "bench")
REFERENCE = next(iter(CONTENDERS))

# glibc gives large blocks back to the system at once and asks for them again in the next layer, page by page.
# Kept, and in huge pages, they are there at once.
ALLOCATORS = {
    "as it is": {},
    "blocks kept": {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(2**40),
        "THP_MEM_ALLOC_ENABLE": "1",
    },
}

KEPT = {"TORCHINDUCTOR_CACHE_DIR": str(CACHE / "inductor")}  # what compiled contenders compile


@dataclass
class Row:
    """A piece of work. kind: text, unet, vae or picture; sizes in pixels."""

    name: str
    kind: str
    width: int = 512
    height: int = 512
    batch: int = 1

    @property
    def request(self) -> dict[str, Any]:
        return self.__dict__


ROWS = [
    Row("text encoder, 2 prompts", "text"),
    Row("U-Net step with guidance, 512×512", "unet"),
    Row("U-Net step with guidance, 768×512", "unet", 768),
    Row("U-Net step with guidance, 256×256", "unet", 256, 256),
    Row("VAE decode, 512×512", "vae"),
    Row("VAE decode, 1024×1024", "vae", 1024, 1024),
    Row(f"picture, 512×512, {STEPS} steps", "picture"),
]
SCALING = [Row(f"U-Net step, {batch} × 512×512", "unet", batch=batch) for batch in (1, 2, 4, 8)]
SCALING += [Row(f"U-Net step, {side}×{side}", "unet", side, side) for side in (256, 384, 512, 768, 1024)]
PROCESSES = ["load", "import", "cli"]  # rows that need a fresh process each time


@dataclass
class Result:
    """What one contender made of one row."""

    row: str
    contender: str
    allocator: str
    seconds: list[float] = field(default_factory=list)
    error: float | None = None  # of the numbers, relative to the reference's; None: they are not comparable
    peak: float = 0.0  # MB, resident, at most
    added: float = 0.0  # MB, of which not before the row began
    gflop: float = 0.0  # of the plain arithmetic, so that doing less of it counts as speed
    note: str = ""  # why there is nothing else here

    @property
    def median(self) -> float:
        return statistics.median(self.seconds) if self.seconds else float("nan")


class Worker:
    """A contender's process."""

    def __init__(self, name: str, folder: Path, device: str, environment: dict[str, str]):
        command = [sys.executable, "-m", "bench.contenders", name, str(folder), device]
        self.name = name
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=HERE.parent,
            env={**os.environ, **KEPT, **environment},
        )
        self.hello = self._read()

    def do(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return {"error": "its process has ended"}
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"error": f"its process ended with {self.process.wait()}"}

    def close(self) -> None:
        self.process.communicate()


def measure(
    rows: Sequence[Row],
    names: Sequence[str],
    folder: Path,
    rounds: int,
    device: str,
    allocator: str,
    say: Callable[[str], None],
) -> list[Result]:
    """All rows, by all contenders in turns."""
    workers = [Worker(name, folder, device, ALLOCATORS[allocator]) for name in names]
    width = context_width(folder)
    results: list[Result] = []
    try:
        for row in rows:
            request = {**row.request, "context_width": width}
            mine = {worker.name: Result(row.name, worker.name, allocator) for worker in workers}
            exact = None
            gflop = count_flops(folder, row)
            for turn in range(rounds + 1):  # the first is to warm up, and for the numbers
                for worker in workers:
                    result = mine[worker.name]
                    if result.note:
                        continue
                    answer = worker.do(request)
                    if answer.get("seconds") is None:
                        result.note = answer.get("error", "cannot be asked for this")
                    elif turn == 0:
                        output = take(answer["output"])
                        exact = output if worker.name == REFERENCE else exact
                        result.error, result.gflop = relative_error(output, exact), gflop
                    else:
                        result.seconds.append(answer["seconds"])
                        result.peak = max(result.peak, answer["peak"])
                        result.added = max(result.added, answer["peak"] - answer["before"])
            for result in mine.values():
                say(describe(result))
            results += mine.values()
    finally:
        for worker in workers:
            worker.close()
    return results


def take(path: str) -> np.ndarray:
    output = np.load(path)
    os.unlink(path)
    return output


def relative_error(output: np.ndarray, exact: np.ndarray | None) -> float | None:
    """Of the norm; None if there is nothing to compare with."""
    if exact is None or output.shape != exact.shape:
        return None
    return float(np.linalg.norm(output - exact) / np.linalg.norm(exact))


def describe(result: Result) -> str:
    figures = f"{result.median:8.3f} s" if result.seconds else f"-- {result.note}"
    error = "" if result.error is None else f"  error {result.error:.1e}"
    memory = f"  +{result.added:.0f} MB" if result.seconds else ""
    return f"{result.row:36} {result.allocator:12} {result.contender:40} {figures}{error}{memory}"


# Rows that need a fresh process


def measure_processes(
    wanted: Sequence[str], names: Sequence[str], folder: Path, rounds: int, device: str, allocator: str
) -> list[Result]:
    environment = {**os.environ, **ALLOCATORS[allocator]}
    results: dict[tuple[str, str], Result] = {}

    def note(row: str, contender: str, seconds: float, peak: float = 0.0) -> None:
        result = results.setdefault((row, contender), Result(row, contender, allocator))
        result.seconds.append(seconds)
        result.peak = max(result.peak, peak)

    for _ in range(rounds):
        if "load" in wanted:
            for name in names:
                worker = Worker(name, folder, device, ALLOCATORS[allocator])
                worker.close()
                if "loaded" in worker.hello:
                    note("load the weights", name, worker.hello["loaded"], worker.hello["peak"])
        if "import" in wanted:
            for module in ("torch", "reifusion", "diffusers"):
                note(f"import {module}", module, run_python(_IMPORT[module], environment))
        if "cli" in wanted:
            for row, seconds in time_cli(environment).items():
                note(row, "reifusion", seconds)
    return list(results.values())


# A lazy package is imported when what it is for is there; and torch comes first, to be counted apart.
_TIMED = "import time, torch; start = time.perf_counter(); {}; print(time.perf_counter() - start)"
_IMPORT = {
    "torch": "import time; start = time.perf_counter(); import torch; print(time.perf_counter() - start)",
    "reifusion": _TIMED.format("import reifusion; reifusion.generate"),
    "diffusers": _TIMED.format("import diffusers; diffusers.StableDiffusionPipeline"),
}


def run_python(code: str, environment: dict[str, str]) -> float:
    """The number that it prints last."""
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def time_cli(environment: dict[str, str]) -> dict[str, float]:
    """From the shell to the PNG, with the mini."""
    start = time.perf_counter()
    out = CACHE / "cli"
    command = [sys.executable, "-m", "reifusion", "generate", "a red apple", "--seed", "1"]
    command += ["--steps", str(STEPS), "--out", str(out), "--quiet"]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    seconds = time.perf_counter() - start
    for file in out.glob("*.png"):
        file.unlink()
    return {f"shell to PNG, the mini, {STEPS} steps": seconds}


# The weights


def make_weights(quick: bool) -> Path:
    """A folder with random weights, since speed does not ask what for: as one file, and for diffusers."""
    import torch

    from reifusion.model import model_loader
    from reifusion.model.config import SD15, CLIPConfig, ModelConfig, UNetConfig, VAEConfig

    folder = CACHE / ("quick" if quick else "sd-1.5")
    if (folder / "diffusers" / "model_index.json").exists():
        return folder
    config = SD15
    if quick:
        config = ModelConfig(
            name="quick",
            clip=CLIPConfig(width=64, layers=2, heads=2),
            vae=VAEConfig(channels=(32, 64, 64, 64), layers=1),
            unet=UNetConfig(channels=(32, 64, 64, 64), layers=1, heads=2, context_width=64),
        )
    with torch.device("meta"):
        models = model_loader.build(config)
    generator = torch.Generator().manual_seed(0)
    for network in models.values():
        network.to(torch.float16).to_empty(device="cpu").requires_grad_(False)
        for name, x in network.named_parameters():
            around = float("norm" in name and name.endswith("weight"))
            spread = x[0].numel() ** -0.5 if x.ndim > 1 else 0.05
            x.copy_(around + spread * torch.randn(x.shape, generator=generator))
    folder.mkdir(parents=True, exist_ok=True)
    model_loader.save(config, models, folder / "model.safetensors", to="compvis")
    model_loader.save(config, models, folder / "diffusers", to="diffusers")
    return folder


def context_width(folder: Path) -> int:
    return json.loads((folder / "diffusers" / "unet" / "config.json").read_text())["cross_attention_dim"]


def count_flops(folder: Path, row: Row) -> float:
    """GFLOP of the plain arithmetic: both halves of guidance in full, every product of every convolution."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from reifusion.model import model_loader

    config = model_loader.info(folder / "model.safetensors").config
    with torch.device("meta"):
        models = model_loader.build(config)
        z = torch.empty(row.batch, 4, row.height // 8, row.width // 8)
        context = torch.empty(2 * row.batch, 77, config.unet.context_width)
        calls: dict[str, Callable[[], Any]] = {
            "text": lambda: models["clip"](torch.zeros(2, 77, dtype=torch.int64)),
            "unet": lambda: models["diffusion"](
                z.repeat(2, 1, 1, 1), context, torch.zeros(len(context), dtype=torch.int64)
            ),
            "vae": lambda: models["decoder"](z),
        }
        counts = {}
        for name in calls if row.kind == "picture" else [row.kind]:
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                calls[name]()
            counts[name] = counter.get_total_flops() / 1e9
    return sum(
        count * (STEPS if name == "unet" and row.kind == "picture" else 1) for name, count in counts.items()
    )


# The machine


def measure_limits(device: str) -> dict[str, float]:
    """What single kernels can do here: the most that anything made of them can hope for."""
    import torch
    from torch.nn import functional as F

    half = torch.float16 if device == "cuda" else torch.bfloat16
    limits = {}
    with torch.inference_mode():
        for dtype in (half, torch.float32):
            short = str(dtype).removeprefix("torch.")
            x = torch.randn(2048, 1280, dtype=dtype, device=device)
            weight = torch.randn(5120, 1280, dtype=dtype, device=device)
            seconds = best(partial(F.linear, x, weight))
            limits[f"matmul {short}, TFLOP/s"] = 2 * 2048 * 1280 * 5120 / seconds / 1e12
            z = torch.randn(2, 320, 64, 64, dtype=dtype, device=device).to(memory_format=torch.channels_last)
            kernel = torch.randn(320, 320, 3, 3, dtype=dtype, device=device)
            kernel = kernel.to(memory_format=torch.channels_last)
            seconds = best(partial(F.conv2d, z, kernel, padding=1))
            limits[f"convolution {short}, TFLOP/s"] = 2 * 2 * 9 * 320 * 320 * 64 * 64 / seconds / 1e12
        block = torch.zeros(2**28, dtype=torch.uint8, device=device)
        other = torch.zeros_like(block)
        limits["bandwidth, GB/s"] = 2 * block.numel() / best(lambda: other.copy_(block)) / 1e9
    return limits


def best(call: Callable[[], Any], times: int = 7) -> float:
    import torch

    seconds = []
    for _ in range(times + 1):
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def machine(device: str) -> dict[str, Any]:
    import torch

    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    versions = {}
    for name in ("torch", "diffusers", "openvino", "stable-diffusion-cpp-python"):
        import importlib.metadata

        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    abilities = {
        "AVX-512 BF16": getattr(torch.cpu, "_is_avx512_bf16_supported", bool)(),
        "AMX": getattr(torch.cpu, "_is_amx_tile_supported", bool)(),
    }
    accelerator = torch.cuda.get_device_name() if device == "cuda" else "none used"
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "abilities": [name for name, has in abilities.items() if has],
        "accelerator": accelerator,
        "python": platform.python_version(),
        "versions": versions,
        "load average at start": round(os.getloadavg()[0], 2),
    }


# The report


def report(facts: dict[str, Any], results: Sequence[Result], scaling: Sequence[Result]) -> str:
    about, limits = facts["machine"], facts["limits"]
    abilities = ", ".join(about["abilities"]) or "no bfloat16 instructions"
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    kernels = ", ".join("{0} {2:.2f}{1}".format(*name.split(","), value) for name, value in limits.items())
    lines = [
        "# How fast it is",
        "",
        f"`make bench`, {facts['date']}: {about['cpu']}, {about['threads']} threads, {abilities}; "
        f"accelerator: {about['accelerator']}; {versions}.",
        f"Medians of {facts['rounds']}, in turns. Load of the machine before: {about['load average at start']}.",
        *["", "**Only a trial: a small model, and a quarter of each side.**"] * facts["quick"],
        "",
        f"What single kernels reach here: {kernels}.",
        "",
        "*Share*: the row's plain arithmetic by that time, of the faster of matmul and convolution in the",
        "contender's dtype; who does less arithmetic for the same numbers may exceed 100 %. *Error*: that of",
        f"the numbers against {REFERENCE}, relative to their norm. *Peak*: resident memory; *added*: the part",
        "of it that was not there before.",
        "",
    ]
    lines += [f"Not here: {', '.join(facts['missing'])} (not installed).", ""] * bool(facts["missing"])
    for row in dict.fromkeys(result.row for result in results):
        mine = [result for result in results if result.row == row]
        lines += [f"## {row}", "", "| contender | " + " | ".join(f"s, {a}" for a in facts["allocators"])]
        lines[-1] += " | × ours | share | error | peak MB | added MB |"
        lines.append("|---" + "|---:" * (len(facts["allocators"]) + 5) + "|")
        ours = best_of(mine, "reifusion bf16") or best_of(mine, "reifusion")
        for name in dict.fromkeys(result.contender for result in mine):
            its = [result for result in mine if result.contender == name]
            times = {result.allocator: result.median for result in its if result.seconds}
            if not times:
                lines.append(f"| {name} | {its[0].note} |" + " |" * (len(facts["allocators"]) + 4))
                continue
            fastest = min(its, key=lambda result: result.median if result.seconds else float("inf"))
            cells = [f"{times[a]:.3f}" if a in times else "" for a in facts["allocators"]]
            cells.append(f"{fastest.median / ours:.2f}" if ours else "")
            speed = fastest.gflop / fastest.median / 1e3
            cells.append(f"{100 * speed / limit_of(limits, name):.0f} %" if fastest.gflop else "")
            cells.append("" if fastest.error is None else f"{fastest.error:.1e}")
            cells += [f"{value:.0f}" if value else "" for value in (fastest.peak, fastest.added)]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    if scaling:
        lines += [
            "## Scaling, reifusion bf16",
            "",
            "| | s | s a picture | added MB |",
            "|---|---:|---:|---:|",
        ]
        for result in scaling:
            batch = int(result.row.split(" × ")[0].split()[-1]) if " × " in result.row else 1
            figures = f"{result.median:.3f} | {result.median / batch:.3f} | {result.added:.0f}"
            lines.append(
                f"| {result.row} | {figures} |" if result.seconds else f"| {result.row} | {result.note} |||"
            )
        lines.append("")
    lines += ["![The same as bars](speed.png)", ""] * (HERE / "speed.png").exists()
    return "\n".join(lines)


def best_of(results: Sequence[Result], contender: str) -> float | None:
    return min((r.median for r in results if r.contender == contender and r.seconds), default=None)


def limit_of(limits: dict[str, float], contender: str) -> float:
    """TFLOP/s, of the faster of matmul and convolution in the contender's dtype."""
    full = contender.split()[1:2] == ["fp32"]
    return max(value for name, value in limits.items() if "FLOP" in name and ("float32" in name) == full)


def plot(results: Sequence[Result], path: Path) -> bool:
    """Bars, a panel for each row. False where there is no matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = list(dict.fromkeys(result.row for result in results if result.seconds))
    if not rows:
        return False
    figure, axes = pyplot.subplots(
        len(rows), 1, figsize=(8, 1.9 * len(rows)), squeeze=False, layout="constrained"
    )
    for row, ax in zip(rows, axes[:, 0]):
        times: dict[str, float] = {}
        for result in results:
            if result.row == row and result.seconds:
                times[result.contender] = min(result.median, times.get(result.contender, float("inf")))
        names = sorted(times, key=times.__getitem__, reverse=True)
        colours = ["tab:orange" if "reifusion" in name else "tab:gray" for name in names]
        ax.bar_label(ax.barh(names, [times[name] for name in names], color=colours), fmt="%.3g s", padding=3)
        ax.set_title(row, loc="left")
        ax.margins(x=0.15)
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)
    return True


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.speed", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rows", help="only rows whose name has this in it; load, import and cli are rows too"
    )
    parser.add_argument(
        "--contenders", help="only those whose name begins like one of these, comma-separated"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--quick", action="store_true", help="a small model and small pictures, to try this out"
    )
    parser.add_argument("--out", type=Path, default=HERE, help="where RESULTS.md, results.json, speed.png go")
    parser.add_argument(
        "--allocator", choices=list(ALLOCATORS), help="only with this setting of the allocator"
    )
    options = parser.parse_args(argv)
    if options.rounds < 1:
        parser.error("--rounds is 1 at least")
    begins = tuple((options.contenders or "").split(","))
    chosen = [name for name in CONTENDERS if name.startswith(begins)]
    if not chosen:
        parser.error(f"no contender's name begins like that; there are {', '.join(CONTENDERS)}")
    names = [name for name in chosen if installed(name)]
    wanted = options.rows or ""
    rows, scaling = ([row for row in group if wanted in row.name] for group in (ROWS, SCALING))
    processes = [row for row in PROCESSES if wanted in row]
    if not (rows or scaling or processes):
        parser.error(f"no row has {wanted!r} in its name; there are {', '.join(r.name for r in ROWS)}")
    if options.quick:
        for row in (*rows, *scaling):
            row.width, row.height = row.width // 4, row.height // 4

    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = make_weights(options.quick)
    facts: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "rounds": options.rounds,
        "quick": options.quick,
        "machine": machine(device),
        "limits": measure_limits(device),
        "missing": [name for name in chosen if name not in names],
        "allocators": [options.allocator] if options.allocator else list(ALLOCATORS),
    }
    results: list[Result] = []
    scaled: list[Result] = []
    for allocator in facts["allocators"]:
        if rows:
            results += measure(rows, names, folder, options.rounds, device, allocator, print)
        results += measure_processes(processes, names, folder, options.rounds, device, allocator)
        if scaling and "reifusion bf16" in names and allocator == facts["allocators"][-1]:
            scaled = measure(scaling, ["reifusion bf16"], folder, options.rounds, device, allocator, print)
    options.out.mkdir(parents=True, exist_ok=True)
    plot(results, options.out / "speed.png")
    figures = [{**result.__dict__, "median": result.median} for result in (*results, *scaled)]
    for name, text in (
        ("results.json", json.dumps(facts | {"results": figures}, indent=1, ensure_ascii=False) + "\n"),
        ("RESULTS.md", report(facts, results, scaled)),
    ):
        temporary = options.out / f".{name}"
        temporary.write_text(text)
        temporary.replace(options.out / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
