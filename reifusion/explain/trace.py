"""What every module does, in the order in which they run: shapes, parameters, arithmetic, time, statistics.

`trace` watches the first denoising step, and runs each network again with the same inputs and a hook at
every module. A `Trace` is a table: as text, as JSON, and as a page whose rows lead to the line of source
that makes the call. The fast kernels are taken out for it, so the lines are the textbook's.
"""

from __future__ import annotations

import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from ..families.mmdit import JointAttention
from ..files import write_json, write_text
from ..model.attention import CrossAttention, SelfAttention
from ..model.pipeline import StableDiffusion
from ..model.request import Request
from ..settings import of_request
from . import web
from .trajectory import describe

PACKAGE = Path(__file__).parents[1]
TEXTBOOK = (PACKAGE / "model", PACKAGE / "families")  # where the source is that rows lead to


@dataclass
class Row:
    """One call of one module. The numbers include the module's submodules; those named `own_…` do not."""

    name: str  # as in `pipe.models`: "diffusion.down.1.0.conv_1"
    kind: str  # its class
    depth: int  # 0 for a whole network
    takes: list[list[int]]  # the shapes of the tensors that it takes
    gives: list[int]  # the shape of its output
    mean: float  # of its output
    std: float
    parameters: int
    flops: int  # additions and multiplications in matrix products and convolutions; the rest is small
    own_flops: int
    source: str  # the file that makes the call: "model/diffusion.py"
    line: int  # the line in that file
    seconds: float = 0.0
    own_seconds: float = 0.0


@dataclass
class Trace:
    """The rows of all modules that run for a picture, in the order in which they begin."""

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
        """Returns the table for a terminal."""
        table: list[tuple[str, ...]] = [("module", *_HEAD, "called at")]
        table += [
            (f"{'  ' * row.depth}{_short(row)} ({row.kind})", *_cells(row), f"{row.source}:{row.line}")
            for row in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(*table)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in table]
        return "\n".join([f"{describe(self.request)} · {self.machine}", "", *lines, ""])

    def html(self) -> str:
        """Returns a page with the table, and below it the source that the rows lead to."""
        total = {row.name: row.seconds for row in self.networks}
        lines, open_ones = [], 0
        for row, following in zip(self.rows, [*self.rows[1:], None]):
            lines += ["</details>"] * (open_ones - row.depth)
            part = row.seconds / max(total[row.name.partition(".")[0]], 1e-12)
            cells = "".join(f"<span>{escape(cell)}</span>" for cell in _cells(row))
            link = f'<a href="#{row.source}-{row.line}">{escape(_short(row))}</a>'
            line = f"<span>{link} <i>{row.kind}</i></span>{cells}<span>{row.source}:{row.line}</span>"
            kind, style = f"row d{row.depth}", f"--depth:{row.depth};--part:{part:.4f}"
            if inside := following is not None and following.depth > row.depth:
                # The first is a whole network: its parts are in sight.
                lines.append(f"<details{' open' if row.depth == 0 else ''}>")
                lines.append(f'<summary class="{kind}" style="{style}">{line}</summary>')
            else:
                lines.append(f'<div class="{kind}" style="{style}">{line}</div>')
            open_ones = row.depth + inside
        lines += ["</details>"] * open_ones
        kinds = "\n".join(
            f'<tr><th scope="row">{kind}</th>'
            f"<td>{calls}</td><td>{_human(flops)}</td><td>{1e3 * own:.2f}</td></tr>"
            for kind, calls, flops, own in self.kinds()
        )
        body = _BODY.format(
            about=escape(f"{describe(self.request)} · {self.machine}"),
            head="".join(f"<span>{head}</span>" for head in ("module", *_HEAD, "called at")),
            rows="\n".join(lines),
            kinds=kinds,
            readers="the text encoder runs once"
            if any(row.name == "clip" for row in self.rows)
            else "the text encoders, which are not in this table, run once",
            listings="\n".join(_listing(source) for source in dict.fromkeys(row.source for row in self.rows)),
        )
        return web.page("Every module, in order", _STYLE, body)

    def save(self, folder: str | os.PathLike) -> None:
        """Writes trace.txt, trace.json and trace.html."""
        write_text(Path(folder, "trace.txt"), self.text())
        write_text(Path(folder, "trace.html"), self.html())
        facts = {"settings": of_request(self.request), "machine": self.machine}
        write_json(Path(folder, "trace.json"), facts | {"rows": [asdict(row) for row in self.rows]})


def trace(pipe: StableDiffusion, request: Request) -> Trace:
    """Runs text encoder, U-Net (the first step) and decoder for the request's picture, each four times.

    Once with hooks that look at every module's tensors, then three times with hooks that only take the time:
    the fastest run counts. A module that is called twice has two rows.
    """
    request, device = request.for_model(pipe.config), torch.device(pipe.device)
    rows: list[Row] = []
    with kernels.plain(pipe.models), torch.inference_mode():
        for name, call in _calls(pipe, request).items():
            network = pipe.models[name].to(device)
            looked_at = _look(name, network, call)
            times = min((_time(network, call, device) for _ in range(3)), key=lambda times: times[0][0])
            for row, (seconds, inside) in zip(looked_at, times, strict=True):
                row.seconds, row.own_seconds = seconds, seconds - inside
            rows += looked_at
    return Trace(request, f"{device}, {str(pipe.dtype).removeprefix('torch.')}", rows)


def _calls(pipe: StableDiffusion, request: Request) -> dict[str, Callable[[], Tensor]]:
    """Returns the first call of each network in the first step, ready to be made again."""
    calls: dict[str, Callable[[], Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(network: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            calls.setdefault(name, lambda: network(*given, **named))

        return hook

    networks = {name: pipe.models[name] for name in ("clip", "diffusion", "decoder")}
    handles = [
        network.register_forward_pre_hook(keep(name), with_kwargs=True) for name, network in networks.items()
    ]
    try:
        with closing(pipe.denoise(request)) as steps:
            pipe.decode(next(steps).x0)
    finally:
        for handle in handles:
            handle.remove()
    return calls


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

    def leave(module: nn.Module, given: tuple[Any, ...], output: Tensor | Sequence[Tensor]) -> None:
        row, first = running[-1], output if isinstance(output, Tensor) else output[0]
        row.gives = list(first.shape)
        row.mean, row.std = first.double().mean().item(), first.double().std(correction=0).item()
        row.own_flops = own_flops(module, given, first)
        for outer in running:
            outer.flops += row.own_flops
        running.pop()

    with _hooked(network, enter, leave):
        call()
    return rows


def _time(network: nn.Module, call: Callable[[], Tensor], device: torch.device) -> list[list[float]]:
    """Returns, for each call of a module, its seconds and how many of them its submodules took."""
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
    """Returns the file and line of the textbook that is calling the module; without one, its `forward`'s."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.parent in TEXTBOOK:
            return path.relative_to(PACKAGE).as_posix(), frame.f_lineno
        frame = frame.f_back
    code = type(module).forward.__code__
    return Path(code.co_filename).relative_to(PACKAGE).as_posix(), code.co_firstlineno


def own_flops(module: nn.Module, given: tuple[Any, ...], output: Tensor) -> int:
    """Counts the additions and multiplications of the module itself: 2 for each product in a sum."""
    if isinstance(module, nn.Linear):
        return 2 * output.numel() * module.in_features
    if isinstance(module, nn.Conv2d):
        height, width = module.kernel_size
        return 2 * output.numel() * module.in_channels // module.groups * height * width
    if isinstance(module, SelfAttention | CrossAttention):
        # Q Kᵀ and its product with V: two matrix products of L × S × width
        looked_at = given[1] if isinstance(module, CrossAttention) else given[0]
        return 4 * output.numel() * looked_at.shape[1]
    if isinstance(module, JointAttention):  # all tokens of all streams look at each other
        length = sum(x.shape[1] for _, x in given)
        return 4 * len(output) * length**2 * output.shape[-1]
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
    """Returns a source file as HTML, in which each line has an id to lead to."""
    lines = (PACKAGE / source).read_text("utf-8").splitlines()
    numbered = "\n".join(
        f'<span id="{source}-{number}"><b>{number:4}</b> {escape(line)}</span>'
        for number, line in enumerate(lines, 1)
    )
    return f"<details><summary>{source}</summary>\n<pre>{numbered}</pre></details>"


_STYLE = """
body { font-size: 14px; line-height: 1.45; margin: 1.5rem; }
i { color: var(--grey); font-style: normal; }
.tree { font-variant-numeric: tabular-nums; }
.row { display: grid; border-bottom: 1px solid var(--rule);
  grid-template-columns: minmax(14rem, 3fr) minmax(7rem, 2fr) 8rem 7.5rem 5rem repeat(3, 4.6rem)
  minmax(9rem, 2fr); }
.row > span { padding: .2rem .5rem; text-align: right; }
.row > span:first-child { text-align: left; overflow-wrap: anywhere;
  padding-left: calc(1.5rem + var(--depth, 0) * .9rem); }
.row > span:last-child { text-align: left; color: var(--grey); }
.head { position: sticky; top: 0; background: var(--paper); font-weight: 600; z-index: 1; }
.d0 { font-weight: 600; border-top: 2px solid var(--ink); }
summary.row { cursor: pointer; }
summary.row > span:first-child::before { content: "▸"; display: inline-block; width: 1em; margin-left: -1em; }
details[open] > summary.row > span:first-child::before { content: "▾"; }
.row[style] > span:nth-child(6) { --bar: light-dark(#dfe7fb, #22315c);
  background: linear-gradient(to left, var(--bar) calc(var(--part) * 100%), transparent 0); }
table { border-collapse: collapse; }
th, td { padding: .15rem .7rem; border-bottom: 1px solid var(--rule); }
th[scope=row] { text-align: left; }
details > summary:not(.row) { font-size: 1.15em; font-weight: 600; cursor: pointer; padding: .3rem 0; }
pre { font: 12.5px/1.5 ui-monospace, monospace; overflow-x: auto; }
pre b { color: var(--grey); font-weight: 400; }
pre span { display: inline-block; min-width: 100%; scroll-margin-top: 40vh; }
pre span:target { background: light-dark(#fff1b8, #574a12); }
@media (max-width: 1100px) { /* without what it takes, mean and std */
  .row { grid-template-columns: minmax(9rem, 3fr) 8rem 7rem 4.6rem 4.6rem minmax(7rem, 2fr); }
  .row > span:is(:nth-child(2), :nth-child(7), :nth-child(8)) { display: none; }
}
@media (max-width: 700px) { /* the name, what it gives, and the time */
  body { margin: .7rem; }
  .row { grid-template-columns: minmax(0, 1fr) 7rem 4.4rem; }
  .row > span:is(:nth-child(4), :nth-child(5), :last-child) { display: none; }
}
"""

_BODY = """<h1>Every module, in order</h1>
<p class="about">{about}</p>
<p>For a picture, {readers}, the U-Net once in every step, of which this is the first, and the decoder
once. A row opens to the rows inside it, and its numbers include theirs. The bar behind the
milliseconds is the share of the network's time. A name leads to the line that makes the call.</p>
<div class="tree"><div class="row head">{head}</div>
{rows}
</div>
<h2>Where time and arithmetic go</h2>
<p>Each kind of module, without the modules inside. A FLOP is one addition or multiplication.</p>
<table><thead><tr><th scope="col">kind</th><th scope="col">calls</th><th scope="col">FLOPs</th>
<th scope="col">ms</th></tr></thead><tbody>
{kinds}
</tbody></table>
<h1>Source</h1>
{listings}
"""
