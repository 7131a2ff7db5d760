"""A VAE in a file of its own: its encoder and decoder, in our own names."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..files import whole
from ..model.config import ModelConfig
from ..model.tensors import ModelError
from ..weights import vae as weights_vae
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
    """Reads a VAE from a file or a folder of its own, or out of a whole model. Raises ModelError."""
    found = weights_vae.load_vae(source, torch.float32)
    _same(source, found.config, config)
    vae = VAE(config.vae)
    for half in ("encoder", "decoder"):
        vae.get_submodule(half).load_state_dict(found.models[half].state_dict())
    return vae.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def check_vae(source: str, config: ModelConfig) -> None:
    """Raises ModelError if `load_vae` will, but reads no more of the file than its beginning."""
    _same(source, weights_vae.find_config(source), config)


def _same(source: str, found: ModelConfig, config: ModelConfig) -> None:
    if found.vae != config.vae:
        raise ModelError(f"the VAE of {source} has other sizes than the VAE of {config.name}")
