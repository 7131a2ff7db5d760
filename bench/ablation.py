"""Measures what each fast form gains, on steps of SD 1.5's U-Net without that form: for bench/NOTES.md.
It counts the processor's time on one thread, which other work on the machine disturbs least.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress

import torch
from torch import nn

from bench.weights import make_weights
from reifusion import kernels
from reifusion.api import load
from reifusion.kernels import fast, halves, native
from reifusion.swap import swap


@contextmanager
def without(unet: nn.Module, kind: type[nn.Module]) -> Iterator[None]:
    """Takes one fast form out of the network for a while."""
    layers = [layer for layer in unet.modules() if type(layer) is kind]
    put_back = [swap(layer, kernels.PLAIN[kind]) for layer in layers]
    try:
        yield
    finally:
        for undo in put_back:
            undo()


@contextmanager
def without_attention_c() -> Iterator[None]:
    library, native._library = native._library, lambda: None  # type: ignore[assignment]
    try:
        yield
    finally:
        native._library = library


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.ablation", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a small model")
    parser.add_argument("--size", type=int, default=512)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pipe = load(make_weights(options.quick) / "model.safetensors", "cpu")
    unet, config = pipe.models["diffusion"], pipe.config.unet
    x = torch.randn(1, 4, options.size // 8, options.size // 8).to(pipe.dtype).repeat(2, 1, 1, 1)
    context, t = torch.randn(2, 77, config.context_width).to(pipe.dtype), torch.tensor([501.0])
    forms: dict[str, Callable[[], AbstractContextManager]] = {
        "nothing": nullcontext,
        "attention.c": without_attention_c,
        "Linear without addmm": lambda: without(unet, fast.Linear),
        "Conv2d as a matrix product": lambda: without(unet, fast.Conv2d),
        "GEGLU in two passes": lambda: without(unet, fast.GEGLU),
        "upsampling by small kernels": lambda: without(unet, fast.UNetUpsample),
        "one half until the words": lambda: without(unet, halves.Row),
        "any of them": lambda: kernels.plain({"diffusion": unet}),
    }
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    with torch.inference_mode(), suppress(KeyboardInterrupt):  # the results so far are printed
        for turn in range(options.rounds + 1):
            for name, form in forms.items():
                with form():
                    start = time.process_time()
                    unet(x, context, t)
                    if turn > 0:
                        seconds[name].append(time.process_time() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items() if times}
    whole = medians["nothing"]
    print(f"| without | s, one thread, {pipe.dtype} | slower by | rounds |\n|---|---:|---:|---:|")
    for name, median in medians.items():
        print(f"| {name} | {median:.3f} | {100 * (median / whole - 1):.1f} % | {len(seconds[name])} |")


if __name__ == "__main__":
    main()
