"""Where the time goes: `reifusion generate --profile`.

Hooks time each network, and each kind of block in the U-Net, while they draw as always: the modules that are
watched are those whose fast forms do not mind a hook. The arithmetic is counted apart, on networks without
weights. The trace opens in a browser: chrome://tracing or ui.perfetto.dev.
"""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ..families import build
from ..files import write_text
from ..model.attention import CrossAttention, SelfAttention
from ..model.diffusion import GEGLU, Downsample, ResidualBlock, Upsample
from ..model.pipeline import StableDiffusion

NETWORKS = {"clip": "text encoder", "encoder": "VAE encoder", "diffusion": "U-Net", "decoder": "VAE decoder"}
KINDS: dict[type, str] = {
    ResidualBlock: "residual blocks",
    SelfAttention: "self-attention",
    CrossAttention: "cross-attention",
    GEGLU: "feed-forward",
    Downsample: "downsampling",
    Upsample: "upsampling",
}
REST = "norms, projections, skips"


@dataclass
class Part:
    """A network, or a kind of block in the U-Net."""

    name: str
    calls: int
    seconds: float
    gflop: float  # of the plain arithmetic


@dataclass
class Profile:
    """The measurements, complete once the `with` of `profiled` has ended."""

    device: str
    limit: float = 0.0  # GFLOP/s: the most that a large product or convolution reaches here
    parts: list[Part] = field(default_factory=list)  # the U-Net's kinds of block after the U-Net
    spans: list[tuple[str, str, float, float]] = field(default_factory=list)  # name, kind, start, end

    def text(self) -> str:
        """A table for the terminal."""
        whole = sum(part.seconds for part in self.parts if part.name in NETWORKS.values())
        head = ("part", "calls", "s", "of all", "GFLOP", "GFLOP/s", "of limit")
        table = [head]
        for part in self.parts:
            speed = part.gflop / max(part.seconds, 1e-9)
            arithmetic = (f"{part.gflop:.1f}", f"{speed:.0f}", f"{speed / self.limit:.0%}")
            name = part.name if part.name in NETWORKS.values() else f"  {part.name}"
            share = f"{part.seconds / max(whole, 1e-9):.0%}"
            table.append(
                (
                    name,
                    str(part.calls),
                    f"{part.seconds:.3f}",
                    share,
                    *(arithmetic if part.gflop else ("",) * 3),
                )
            )
        widths = [max(map(len, column)) for column in zip(*table)]
        lines = [
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))
            )
            for row in table
        ]
        if all(part.name != NETWORKS["clip"] for part in self.parts):
            lines.append("the text encoders of this family are not in the table")
        return "\n".join([*map(str.rstrip, lines), f"limit: {self.limit:.0f} GFLOP/s ({self.device})"])

    def save(self, path: str | os.PathLike) -> None:
        """Writes the spans as a Chrome trace, in microseconds."""
        begin = min((start for _, _, start, _ in self.spans), default=0.0)
        events = [
            {"name": name, "cat": kind, "ph": "X", "pid": 1, "tid": 1}
            | {"ts": 1e6 * (start - begin), "dur": 1e6 * (end - start)}
            for name, kind, start, end in self.spans
        ]
        write_text(path, json.dumps({"traceEvents": events}))


Shape: TypeAlias = tuple[torch.Size, torch.dtype]
# Of the tensors that a network was given: those without a name, and those with one
Given: TypeAlias = tuple[list[Shape | None], dict[str, Shape | None]]


@contextmanager
def profiled(pipe: StableDiffusion) -> Iterator[Profile]:
    """Times what `pipe` does inside the `with`."""
    device, dtype = torch.device(pipe.device), pipe.dtype
    profile = Profile(f"{device.type}, {str(dtype).removeprefix('torch.')}")
    shapes: dict[str, Given] = {}
    handles: list[Any] = []

    def watch(module: nn.Module, name: str, kind: str, network: str | None = None) -> None:
        started: list[float] = []

        def enter(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            if network is not None:
                found = [_shape(x) for x in given], {key: _shape(x) for key, x in named.items()}
                shapes.setdefault(network, found)
            started.append(_now(device))

        def leave(*_: Any) -> None:
            profile.spans.append((name, kind, started.pop(), _now(device)))

        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave))

    for key, kind in NETWORKS.items():
        watch(pipe.models[key], kind, kind, key)
    for name, module in pipe.models["diffusion"].named_modules():
        if (block := kind_of(module)) is not None:
            watch(module, name, block)
    try:
        yield profile
    finally:
        for handle in handles:
            handle.remove()
    profile.spans.sort(key=lambda span: (span[2], -span[3]))
    profile.parts = _sum_up(profile.spans, _count(pipe, shapes))
    profile.limit = measure_limit(device, dtype)


def kind_of(module: nn.Module) -> str | None:
    """Returns the kind of a block of the U-Net, in whatever fast form it is; None for any other module."""
    return next((name for kind, name in KINDS.items() if isinstance(module, kind)), None)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _shape(x: Any) -> Shape | None:
    return (x.shape, x.dtype) if isinstance(x, Tensor) else None


def _sum_up(spans: list[tuple[str, str, float, float]], gflop: dict[str, float]) -> list[Part]:
    calls: dict[str, int] = defaultdict(int)
    seconds: dict[str, float] = defaultdict(float)
    for _, kind, start, end in spans:
        calls[kind] += 1
        seconds[kind] += end - start
    parts = []
    for network in NETWORKS.values():
        if not calls[network]:
            continue
        parts.append(Part(network, calls[network], seconds[network], gflop[network] * calls[network]))
        if network == NETWORKS["diffusion"]:
            steps, whole = calls[network], parts[-1]
            blocks = [
                Part(kind, calls[kind], seconds[kind], gflop[kind] * steps)
                for kind in KINDS.values()
                if calls[kind]
            ]
            rest = Part(REST, steps, whole.seconds, whole.gflop)
            for block in blocks:
                rest.seconds -= block.seconds
                rest.gflop -= block.gflop
            parts += [*sorted(blocks, key=lambda part: -part.seconds), rest]
    return parts


def _count(pipe: StableDiffusion, shapes: dict[str, Given]) -> dict[str, float]:
    """GFLOP of one call of each network, and of each kind of block in the U-Net."""
    networks = build(pipe.config)  # without weights
    gflop: dict[str, float] = defaultdict(float)
    for key, (given, named) in shapes.items():
        network = networks[key]
        inputs = [_empty(x) for x in given if x is not None]
        more = {name: _empty(x) for name, x in named.items() if x is not None}
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(*inputs, **more)
        gflop[NETWORKS[key]] = counter.get_total_flops() / 1e9
        if key == "diffusion":
            counts = counter.get_flop_counts()
            for name, module in network.named_modules():
                if (kind := kind_of(module)) is not None:
                    its = counts.get(f"{type(network).__name__}.{name}", {})
                    gflop[kind] += sum(its.values()) / 1e9
    return gflop


def _empty(shape: Shape) -> Tensor:
    return torch.empty(shape[0], dtype=_plain(shape[1]), device="meta")


def _plain(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.is_floating_point else dtype


def measure_limit(device: torch.device, dtype: torch.dtype) -> float:
    """GFLOP/s of a large matrix product or convolution, whichever is faster; takes a tenth of a second."""
    x = torch.ones(1024, 1280, device=device, dtype=dtype)
    weight = torch.ones(1280, 1280, device=device, dtype=dtype)
    z = torch.ones(1, 256, 48, 48, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    kernel = torch.ones(256, 256, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    calls: list[tuple[float, Callable[[], Tensor]]] = [
        (2e-9 * x.numel() * len(weight), lambda: F.linear(x, weight)),
        (2e-9 * z.numel() * kernel[0].numel(), lambda: F.conv2d(z, kernel, padding=1)),
    ]
    limit = 0.0
    with torch.inference_mode():
        for gflop, call in calls:
            for _ in range(6):
                start = _now(device)
                call()
                limit = max(limit, gflop / (_now(device) - start))
    return limit
