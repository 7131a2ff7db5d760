"""The weights that all contenders of `bench.speed` use: random, since the values do not affect speed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "reifusion", "bench")


def make_weights(quick: bool) -> Path:
    """Makes, once, a folder with the same weights twice: as one file, 2 GB in float16, and for diffusers."""
    import torch

    from reifusion.model import model_loader
    from reifusion.model.config import SD15, CLIPConfig, ModelConfig, UNetConfig, VAEConfig
    from reifusion.weights import save

    folder = CACHE / ("quick" if quick else "sd-1.5")
    if (folder / "diffusers" / "model_index.json").exists():
        return folder
    config = SD15
    if quick:
        config = ModelConfig(
            name="quick",
            clip=CLIPConfig(width=64, layers=2, heads=2),
            vae=VAEConfig(channels=(32, 64, 64, 64), layers=1),
            unet=UNetConfig(channels=(32, 64, 64, 64), layers=1, heads=(2, 2, 2, 2), context_width=64),
        )
    models = model_loader.build(config)
    generator = torch.Generator().manual_seed(0)
    for network in models.values():
        network.to(torch.float16).to_empty(device="cpu").requires_grad_(False)
        for name, x in network.named_parameters():
            around = float("norm" in name and name.endswith("weight"))
            spread = x[0].numel() ** -0.5 if x.ndim > 1 else 0.05
            x.copy_(around + spread * torch.randn(x.shape, generator=generator))
    folder.mkdir(parents=True, exist_ok=True)
    save(config, models, folder / "model.safetensors", to="compvis")
    save(config, models, folder / "diffusers", to="diffusers")
    return folder


def context_width(folder: Path) -> int:
    return json.loads((folder / "diffusers" / "unet" / "config.json").read_text())["cross_attention_dim"]


def count_flops(folder: Path, kind: str, width: int, height: int, batch: int, steps: int) -> float:
    """Counts the GFLOP of the plain arithmetic: both halves of guidance in full, every convolution's products."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from reifusion.model import model_loader

    config = model_loader.info(folder / "model.safetensors").config
    models = model_loader.build(config)
    with torch.device("meta"):
        z = torch.empty(batch, 4, height // 8, width // 8)
        context = torch.empty(2 * batch, 77, config.unet.context_width)
        calls: dict[str, Callable[[], Any]] = {
            "text": lambda: models["clip"](torch.zeros(2, 77, dtype=torch.int64)),
            "unet": lambda: models["diffusion"](
                z.repeat(2, 1, 1, 1), context, torch.zeros(len(context), dtype=torch.int64)
            ),
            "vae": lambda: models["decoder"](z),
        }
        parts = {"text": 1, "unet": steps, "vae": 1} if kind == "picture" else {kind: 1}
        gflop = 0.0
        for name, times in parts.items():
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                calls[name]()
            gflop += times * counter.get_total_flops() / 1e9
    return gflop
