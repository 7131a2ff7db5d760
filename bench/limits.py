"""Describes the machine and the speed of its single kernels, the limit for everything built from them."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

PACKAGES = ("torch", "diffusers", "openvino", "stable-diffusion-cpp-python")


def machine(device: str) -> dict[str, Any]:
    """Returns everything on which figures depend; figures of other machines or versions are kept apart."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    abilities = {
        "AVX-512 BF16": getattr(torch.cpu, "_is_avx512_bf16_supported", bool)(),
        "AMX": getattr(torch.cpu, "_is_amx_tile_supported", bool)(),
    }
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "abilities": [name for name, has in abilities.items() if has],
        "accelerator": torch.cuda.get_device_name() if device == "cuda" else "none used",
        "python": platform.python_version(),
        "versions": versions,
    }


@torch.inference_mode()
def measure_limits(device: str) -> dict[str, float]:
    """Measures the fastest of several calls of a matrix product, a convolution and a copy."""
    half = torch.float16 if device == "cuda" else torch.bfloat16
    limits = {}
    for dtype in (half, torch.float32):
        short = str(dtype).removeprefix("torch.")
        x = torch.randn(2048, 1280, dtype=dtype, device=device)
        weight = torch.randn(5120, 1280, dtype=dtype, device=device)
        seconds = best(partial(F.linear, x, weight))
        limits[f"matmul {short}, TFLOP/s"] = 2 * 2048 * 1280 * 5120 / seconds / 1e12
        z = torch.randn(2, 320, 64, 64, dtype=dtype, device=device).to(memory_format=torch.channels_last)
        kernel = torch.randn(320, 320, 3, 3, dtype=dtype, device=device)
        seconds = best(partial(F.conv2d, z, kernel.to(memory_format=torch.channels_last), padding=1))
        limits[f"convolution {short}, TFLOP/s"] = 2 * 2 * 9 * 320 * 320 * 64 * 64 / seconds / 1e12
    block = torch.zeros(2**28, dtype=torch.uint8, device=device)
    other = torch.zeros_like(block)
    limits["bandwidth, GB/s"] = 2 * block.numel() / best(lambda: other.copy_(block)) / 1e9
    return limits


def best(call: Callable[[], Any], times: int = 7) -> float:
    """Returns the seconds of the fastest call after the first."""
    seconds = []
    for _ in range(times + 1):
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
