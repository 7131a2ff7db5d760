"""The afternoon's path through the code: each file with its lines, and the minutes that they take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Stop:
    files: tuple[str, ...]
    look_for: str
    chapters: tuple[str, ...]
    pace: int = 12  # lines per minute: 12 where there are equations, more where the code is plain

    def lines(self) -> int:
        return sum(len((ROOT / file).read_text(encoding="utf-8").splitlines()) for file in self.files)

    def minutes(self) -> int:
        return max(5, round(self.lines() / self.pace / 5) * 5)


M = "reifusion/model/"
PATH = (
    Stop((f"{M}config.py",), "every size of SD 1.5, and of the mini, on one screen", ("big-picture",), 20),
    Stop((f"{M}pipeline.py", f"{M}request.py"),
         "<code>denoise</code>: the four stations from words to pixels; <code>generate</code> is around it",
         ("big-picture", "guidance"), 20),
    Stop((f"{M}ddpm.py",),
         "the noise schedule; <code>add_noise</code>; the mean and the variance of the step back",
         ("forward", "reverse")),
    Stop((f"{M}attention.py",), "the written-out softmax beside the fused kernel", ("attention",)),
    Stop((f"{M}diffusion.py",),
         "<code>plan</code>, the U as a list; then <code>UNet.forward</code>, which walks it", ("unet",)),
    Stop((f"{M}clip.py",), "bytes to pieces to vectors", ("words",), 16),
    Stop((f"{M}encoder.py", f"{M}decoder.py"),
         "the reparameterisation; the scale factor, applied by the encoder, undone by the decoder", ("vae",)),
    Stop((f"{M}samplers.py",), "one step each: DDIM, Euler, DPM-Solver++, UniPC; and rectified flow",
         ("samplers", "flow")),
    Stop((f"{M}model_converter.py", f"{M}diffusers_folder.py", f"{M}model_loader.py", f"{M}tensors.py"),
         "the table of names; how a file of unknown format is read safely", ("checkpoints",), 30),
)  # fmt: skip
LATER = {
    "fast.py": "what PyTorch does slowly",
    "native.py": "our own attention kernel, in C",
    "bands.py": "the decoder in bands, for little memory",
    "lora.py": "how a LoRA is added, and removed again",
    "deepcache.py": "some steps skip the deep rows of the U",
    "tome.py": "alike places are merged before attention",
    "int8.py": "weights in eight bits",
}


def left_out() -> list[str]:
    """Returns the files of the model that neither the path nor the list after it names."""
    named = {Path(file).name for stop in PATH for file in stop.files} | {*LATER, "__init__.py"}
    return sorted(path.name for path in (ROOT / M).glob("*.py") if path.name not in named)


def _link(file: str) -> str:
    if not (ROOT / file).is_file():
        raise FileNotFoundError(f"the reading order names {file}, which is not there")
    return f'<a href="source/{file}.html"><code>{file.removeprefix("reifusion/")}</code></a>'


def table() -> str:
    """Returns the path as an HTML table. Raises FileNotFoundError for a file or chapter that is missing."""
    from docs.equations import chapters

    numbers = {name.removesuffix(".md"): number for number, name in enumerate(chapters(), 1)}
    rows = []
    for stop in PATH:
        there = ", ".join(f'<a href="book/{name}.html">{numbers[name]}</a>' for name in stop.chapters)
        files = " ".join(map(_link, stop.files))
        cells = (stop.minutes(), stop.lines(), files, stop.look_for, there)
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{text}</th>" for text in ("minutes", "lines", "file", "look for", "chapter"))
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def later() -> str:
    items = "".join(f"<li>{_link(M + name)}: {what}</li>" for name, what in LATER.items())
    return f"<ul>{items}</ul>"


def total() -> str:
    minutes, lines = sum(stop.minutes() for stop in PATH), sum(stop.lines() for stop in PATH)
    return f"{minutes // 60} hours and {minutes % 60} minutes for {lines:,} lines"
