"""A VAE in a file of its own: its encoder and decoder, in our own names."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from ..files import whole
from ..model.config import ModelConfig
from ..model.tensors import ModelError
from ..weights import load
from ..weights.vae import FORMAT
from ..weights.writing import write_tensors
from .vae import VAE


def save_vae(vae: VAE, path: Path) -> None:
    """Writes both halves, whole or not at all."""
    tensors = {name: x.detach().cpu().contiguous() for name, x in vae.state_dict().items()}
    config = json.dumps(asdict(vae.encoder.config))
    with whole(path) as temporary:
        write_tensors(tensors, temporary, {"format": FORMAT, "config": config})


def is_vae(source: str) -> bool:
    """True if the source is a file written by `save_vae`."""
    try:
        with safe_open(source, "pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (OSError, SafetensorError):  # a folder, a hub id, a .ckpt, or nothing: `load` gives the error
        return False


def load_vae(source: str, config: ModelConfig) -> VAE:
    """Reads a VAE from a file of `save_vae` or out of a whole model. Raises ModelError."""
    vae = VAE(config.vae)
    if is_vae(source):
        tensors, sizes = load_file(source), config.vae
    else:
        found, models, _ = load(source, dtype=torch.float32)
        halves = {half: models[half].state_dict() for half in ("encoder", "decoder")}
        tensors = {f"{half}.{name}": x for half, state in halves.items() for name, x in state.items()}
        sizes = found.vae
    wanted = {name: x.shape for name, x in vae.state_dict().items()}
    if sizes != config.vae or {name: x.shape for name, x in tensors.items()} != wanted:
        raise ModelError(f"the VAE of {source} has other sizes than the VAE of {config.name}")
    vae.load_state_dict(tensors)
    return vae.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
