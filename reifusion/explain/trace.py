"""What every module does, in the order in which they run: shapes, parameters, arithmetic, time, statistics.

`trace` runs each network as the first denoising step does, with a hook at every module. A `Trace` is a
table: as text, as JSON, and as a page whose rows lead to the line of source that makes the call.
"""

from __future__ import annotations

import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from ..files import write_json, write_text
from ..model import attention
from ..model.attention import CrossAttention, SelfAttention
from ..model.ddpm import randn
from ..model.pipeline import StableDiffusion
from ..model.request import Request
from .trajectory import describe, settings

MODEL = Path(attention.__file__).parent  # the folder of the source files to which rows lead


@dataclass
class Row:
    """One call of one module, including its submodules; the `own_…` fields leave them out."""

    name: str  # as in `pipe.models`: "diffusion.down.1.0.conv_1"
    kind: str  # its class
    depth: int  # 0 for a whole network
    takes: list[list[int]]  # the shapes of the input tensors
    gives: list[int]  # the shape of the output
    mean: float  # of the output
    std: float
    parameters: int
    flops: int  # additions and multiplications in matrix products and convolutions; the rest is small
    own_flops: int
    source: str  # the file in reifusion/model that makes the call
    line: int  # the line of the call in that file
    seconds: float = 0.0
    own_seconds: float = 0.0


@dataclass
class Trace:
    request: Request
    machine: str
    rows: list[Row]

    @property
    def networks(self) -> list[Row]:
        """The whole networks: text encoder, U-Net, decoder."""
        return [row for row in self.rows if row.depth == 0]

    def kinds(self) -> list[tuple[str, int, int, float]]:
        """Returns each class of module with its calls, their own FLOPs and seconds; the slowest first."""
        sums: dict[str, list[Any]] = defaultdict(lambda: [0, 0, 0.0])
        for row in self.rows:
            for i, part in enumerate((1, row.own_flops, row.own_seconds)):
                sums[row.kind][i] += part
        return sorted(((kind, *parts) for kind, parts in sums.items()), key=lambda entry: -entry[3])

    def text(self) -> str:
        """The table, for the terminal."""
        table: list[tuple[str, ...]] = [("module", *_HEAD, "called at")]
        table += [
            (f"{'  ' * row.depth}{_short(row)} ({row.kind})", *_cells(row), f"{row.source}:{row.line}")
            for row in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(*table)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in table]
        return "\n".join([f"{describe(self.request)} · {self.machine}", "", *lines, ""])

    def html(self) -> str:
        """Returns a self-contained page: the table, and below it the source to which its rows lead."""
        total = {row.name: row.seconds for row in self.networks}
        body = []
        for row in self.rows:
            part = row.seconds / max(total[row.name.partition(".")[0]], 1e-12)
            cells = "".join(f"<td>{escape(cell)}</td>" for cell in _cells(row))
            body.append(
                f'<tr class="d{row.depth}" style="--depth:{row.depth};--part:{part:.4f}">'
                f'<th scope="row"><a href="#{row.source}-{row.line}">{escape(_short(row))}</a> '
                f"<i>{row.kind}</i></th>{cells}<td>{row.source}:{row.line}</td></tr>"
            )
        kinds = "\n".join(
            f'<tr><th scope="row">{kind}</th>'
            f"<td>{calls}</td><td>{_human(flops)}</td><td>{1e3 * own:.2f}</td></tr>"
            for kind, calls, flops, own in self.kinds()
        )
        return _PAGE.format(
            about=escape(f"{describe(self.request)} · {self.machine}"),
            head="".join(f'<th scope="col">{head}</th>' for head in ("module", *_HEAD, "called at")),
            body="\n".join(body),
            kinds=kinds,
            listings="\n".join(_listing(source) for source in dict.fromkeys(row.source for row in self.rows)),
        )

    def save(self, folder: str | os.PathLike) -> None:
        """Writes trace.txt, trace.json and trace.html."""
        write_text(Path(folder, "trace.txt"), self.text())
        write_text(Path(folder, "trace.html"), self.html())
        facts = {"settings": settings(self.request), "machine": self.machine}
        write_json(Path(folder, "trace.json"), facts | {"rows": [asdict(row) for row in self.rows]})


def trace(pipe: StableDiffusion, request: Request) -> Trace:
    """Runs text encoder, U-Net (the first step, both halves of the guidance) and decoder, each four times.

    The first run has hooks that look at every module's tensors. The other three have hooks that only take the
    time, and the fastest run counts. A module that is called twice has two rows.
    """
    width, height = request.size(pipe.config)
    vae, device = pipe.config.vae, torch.device(pipe.device)
    guided = request.do_cfg and request.cfg_scale != 1
    prompts = [request.prompts[0]] + [request.negatives[0]] * guided
    tokens = torch.tensor([pipe.tokenizer.encode(prompt) for prompt in prompts]).to(device)
    context = pipe.encode_text(prompts, request.clip_skip)
    shape = (1, vae.latent_channels, height // vae.factor, width // vae.factor)
    noise = randn(shape, torch.Generator().manual_seed(request.seeds[0])).to(device, pipe.dtype)
    x = noise.repeat(len(prompts), 1, 1, 1)
    if (extra := pipe.config.unet.in_channels - vae.latent_channels) > 0:  # mask and picture, for inpainting
        x = torch.cat([x, x.new_zeros(len(x), extra, *shape[2:])], dim=1)
    t = torch.full((len(prompts),), pipe.config.schedule.num_training_steps - 1.0, device=device)
    networks = {name: pipe.models[name].to(device) for name in ("clip", "diffusion", "decoder")}
    calls: dict[str, Callable[[], Tensor]] = {
        "clip": lambda: networks["clip"](tokens, skip=request.clip_skip),
        "diffusion": lambda: networks["diffusion"](x, context, t),
        "decoder": lambda: networks["decoder"](noise),
    }
    rows: list[Row] = []
    with torch.inference_mode():
        for name, call in calls.items():
            looked_at = _look(name, networks[name], call)
            times = min(
                (_time(networks[name], call, device) for _ in range(3)), key=lambda times: times[0][0]
            )
            for row, (seconds, inside) in zip(looked_at, times, strict=True):
                row.seconds, row.own_seconds = seconds, seconds - inside
            rows += looked_at
    return Trace(request, f"{device}, {str(pipe.dtype).removeprefix('torch.')}", rows)


def _look(name: str, network: nn.Module, call: Callable[[], Tensor]) -> list[Row]:
    """Returns a row for each call of a module, in the order in which the calls begin."""
    names = {module: ".".join(filter(None, (name, path))) for path, module in network.named_modules()}
    rows: list[Row] = []
    running: list[Row] = []

    def enter(module: nn.Module, given: tuple[Any, ...]) -> None:
        source, line = _caller(module)
        takes = [list(part.shape) for part in given if isinstance(part, Tensor)]
        parameters = sum(parameter.numel() for parameter in module.parameters())
        kind = type(module).__name__
        row = Row(names[module], kind, len(running), takes, [], 0, 0, parameters, 0, 0, source, line)
        rows.append(row)
        running.append(row)

    def leave(module: nn.Module, given: tuple[Any, ...], output: Tensor) -> None:
        row = running[-1]
        row.gives = list(output.shape)
        row.mean, row.std = output.double().mean().item(), output.double().std(correction=0).item()
        row.own_flops = own_flops(module, given, output)
        for outer in running:
            outer.flops += row.own_flops
        running.pop()

    with _hooked(network, enter, leave):
        call()
    return rows


def _time(network: nn.Module, call: Callable[[], Tensor], device: torch.device) -> list[list[float]]:
    """Returns the seconds of each call of a module, and the seconds spent in its submodules."""
    times: list[list[float]] = []
    running: list[list[float]] = []

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def enter(module: nn.Module, given: tuple[Any, ...]) -> None:
        times.append([0.0, 0.0])
        running.append(times[-1])
        times[-1][0] -= now()

    def leave(module: nn.Module, given: tuple[Any, ...], output: Tensor) -> None:
        mine = running.pop()
        mine[0] += now()
        if running:
            running[-1][1] += mine[0]

    with _hooked(network, enter, leave):
        call()
    return times


@contextmanager
def _hooked(network: nn.Module, enter: Callable, leave: Callable) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(enter) for module in network.modules()]
    handles += [module.register_forward_hook(leave) for module in network.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _caller(module: nn.Module) -> tuple[str, int]:
    """Returns the file and line in reifusion/model that call the module, or if none do, its `forward`'s."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if Path(frame.f_code.co_filename).parent == MODEL:
            return Path(frame.f_code.co_filename).name, frame.f_lineno
        frame = frame.f_back
    code = type(module).forward.__code__
    return Path(code.co_filename).name, code.co_firstlineno


def own_flops(module: nn.Module, given: tuple[Any, ...], output: Tensor) -> int:
    """Counts the module's additions and multiplications, without submodules: 2 for each product in a sum."""
    if isinstance(module, nn.Linear):
        return 2 * output.numel() * module.in_features
    if isinstance(module, nn.Conv2d):
        height, width = module.kernel_size
        return 2 * output.numel() * module.in_channels // module.groups * height * width
    if isinstance(module, SelfAttention | CrossAttention):
        # Q Kᵀ and its product with V: two matrix products of L × S × width
        looked_at = given[1] if isinstance(module, CrossAttention) else given[0]
        return 4 * output.numel() * looked_at.shape[1]
    return 0


# The table

_HEAD = ("takes", "gives", "parameters", "FLOPs", "ms", "mean", "std")


def _cells(row: Row) -> tuple[str, ...]:
    return (
        " ".join("×".join(map(str, shape)) for shape in row.takes),
        "×".join(map(str, row.gives)),
        f"{row.parameters:,}",
        _human(row.flops),
        f"{1e3 * row.seconds:.2f}",
        f"{row.mean:.3f}",
        f"{row.std:.3f}",
    )


def _short(row: Row) -> str:
    """ "diffusion.down.1.0.conv_1" -> "down.1.0.conv_1" """
    return row.name if row.depth == 0 else row.name.split(".", 1)[1]


def _human(number: float) -> str:
    """1234567 -> "1.23 M" """
    for unit in ("", " k", " M", " G", " T"):
        if number < 1000 or unit == " T":
            break
        number /= 1000
    return f"{number:.3g}{unit}"


def _listing(source: str) -> str:
    """Returns a source file as HTML, each line with an id for links."""
    lines = (MODEL / source).read_text("utf-8").splitlines()
    numbered = "\n".join(
        f'<span id="{source}-{number}"><b>{number:4}</b> {escape(line)}</span>'
        for number, line in enumerate(lines, 1)
    )
    return f"<h2>{source}</h2>\n<pre>{numbered}</pre>"


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Every module, in order</title>
<style>
:root {{ color-scheme: light dark; --ink: light-dark(#1b1b1f, #ececf1); --grey: light-dark(#63636e, #a0a0ac);
  --rule: light-dark(#d8d8de, #3a3a42); --paper: light-dark(#fff, #17171a);
  --mark: light-dark(#fff1b8, #574a12); --bar: light-dark(#dfe7fb, #22315c);
  --link: light-dark(#2f5bd0, #93b0ff); }}
body {{ font: 14px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem; }}
p {{ max-width: 46rem; }} p.about, i {{ color: var(--grey); font-style: normal; }} a {{ color: var(--link); }}
table {{ border-collapse: collapse; white-space: nowrap; }}
th, td {{ padding: .15rem .7rem; text-align: right; border-bottom: 1px solid var(--rule); font-weight: 400; }}
th[scope=row] {{ text-align: left; padding-left: calc(.7rem + var(--depth, 0) * 1.1rem); }}
thead th {{ position: sticky; top: 0; background: var(--paper); font-weight: 600; }}
thead th:first-child, td:last-child {{ text-align: left; }}
tr.d0 th, tr.d0 td {{ font-weight: 600; border-top: 2px solid var(--ink); }}
tr[class] td:nth-child(6) {{
  background: linear-gradient(to left, var(--bar) calc(var(--part) * 100%), transparent 0); }}
pre {{ font: 12.5px/1.5 ui-monospace, monospace; overflow-x: auto; }}
pre b {{ color: var(--grey); font-weight: 400; }}
pre span {{ display: inline-block; min-width: 100%; scroll-margin-top: 40vh; }}
pre span:target {{ background: var(--mark); }}
</style>
<h1>Every module, in order</h1>
<p class="about">{about}</p>
<p>Drawing a picture runs the text encoder once, the U-Net once for every step (this is the first), and the
decoder once. A row's numbers include all rows that are indented below it. The bar behind the
milliseconds is the share of the network's time. A name leads to the line that makes the call.</p>
<table><thead><tr>{head}</tr></thead><tbody>
{body}
</tbody></table>
<h2>Where time and arithmetic go</h2>
<p>Each kind of module, without its submodules. A FLOP is one addition or multiplication.</p>
<table><thead><tr><th scope="col">kind</th><th scope="col">calls</th><th scope="col">FLOPs</th>
<th scope="col">ms</th></tr></thead><tbody>
{kinds}
</tbody></table>
<h1>Source</h1>
{listings}
</html>
"""
