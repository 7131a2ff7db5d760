"""Measures what each fast form gains, on steps of SD 1.5's U-Net without that form: for bench/NOTES.md.
It counts the processor's time on one thread, which other work on the machine disturbs least.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.weights import make_weights
from reifusion.model import attention, diffusion, fast, pipeline


def plain_geglu(x: Tensor, linear: nn.Linear) -> Tensor:
    value, gate = linear(x).chunk(2, dim=-1)
    return value * F.gelu(gate)


def plain_upsampled(x: Tensor, conv: nn.Conv2d, size: Any) -> Tensor:
    return conv(F.interpolate(x, size=size, mode="nearest"))


WITHOUT: dict[str, Callable[[], AbstractContextManager]] = {
    "nothing": nullcontext,
    "attention.c": lambda: patch.object(attention, "flash_attention", lambda q, k, v: None),
    "Linear without addmm": lambda: patch.object(fast.Linear, "forward", nn.Linear.forward),
    "Conv2d as a matrix product": lambda: patch.object(fast.Conv2d, "forward", nn.Conv2d.forward),
    "geglu in two turns": lambda: patch.object(diffusion, "geglu", plain_geglu),
    "upsampled by small kernels": lambda: patch.object(diffusion, "upsampled", plain_upsampled),
    "Words": nullcontext,
    "one half until the words": nullcontext,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.ablation", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a small model")
    parser.add_argument("--size", type=int, default=512)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pipe = pipeline.load(make_weights(options.quick) / "model.safetensors")
    unet, config = pipe.models["diffusion"], pipe.config.unet
    x = torch.randn(1, 4, options.size // 8, options.size // 8).to(pipe.dtype)
    context = torch.randn(2, 77, config.context_width).to(pipe.dtype)
    words, t = attention.Words(context), torch.tensor([501])
    seconds: dict[str, list[float]] = {name: [] for name in WITHOUT}
    with torch.inference_mode(), suppress(KeyboardInterrupt):  # the results so far are printed
        for turn in range(options.rounds + 1):
            for name, without in WITHOUT.items():
                given = x.repeat(2, 1, 1, 1) if name == "one half until the words" else x
                with without():
                    start = time.process_time()
                    unet(given, context if name == "Words" else words, t)
                    if turn > 0:
                        seconds[name].append(time.process_time() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items() if times}
    whole = medians["nothing"]
    print(f"| without | s, one thread, {pipe.dtype} | slower by | rounds |\n|---|---:|---:|---:|")
    for name, median in medians.items():
        print(f"| {name} | {median:.3f} | {100 * (median / whole - 1):.1f} % | {len(seconds[name])} |")


if __name__ == "__main__":
    main()
