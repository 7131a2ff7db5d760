"""Weights from anywhere and back to a file. `load` and `info` accept hub ids too, and know every family."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from .. import families
from ..families import taesd
from ..families.few_steps import by_name
from ..model import model_loader
from ..model.config import ModelConfig
from ..model.model_loader import Changes, Info
from ..model.tokenizer import Tokenizer
from .hub import find
from .writing import read_back, save

__all__ = ["Changes", "find", "find_config", "info", "load", "read_back", "save"]


def load(
    source: str | Path = "mini",
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    config: ModelConfig | None = None,
    changes: Changes | None = None,
) -> tuple[ModelConfig, dict[str, nn.Module], Tokenizer]:
    """Loads a model of any family as `model_loader.load` does. source may also be a hub id."""
    path = find(source)
    own, models, tokenizer = model_loader.load(
        path, device, dtype, config, families.FAMILIES, _found(changes)
    )
    if tiny := _tiny_vae(changes):
        models |= taesd.load(tiny, own.vae, device, dtype)
    return (_suited(own, source, changes) if config is None else own), models, tokenizer


def find_config(source: str | Path, changes: Changes | None = None) -> ModelConfig:
    """Returns a model's config as `model_loader.find_config` does. source may also be a hub id."""
    config = model_loader.find_config(find(source), families.FAMILIES, _found(changes))
    return _suited(config, source, changes)


def info(source: str | Path, changes: Changes | None = None) -> Info:
    """Reads the facts about a model as `model_loader.info` does. source may also be a hub id."""
    path = find(source)
    found = model_loader.info(path, families.FAMILIES, _found(changes))
    return replace(found, config=_suited(found.config, source, changes))


def _suited(config: ModelConfig, source: str | Path, changes: Changes | None) -> ModelConfig:
    """Returns the config for what its file's name tells, and for the VAE that is taken."""
    if changes is not None and changes.vae is not None:
        config = families.family_of(config).with_vae(config, find(changes.vae, "vae"))
    return by_name(config, Path(source).name)


def _found(changes: Changes | None) -> Changes | None:
    if changes is None:
        return None
    vae = None if changes.vae is None or _tiny_vae(changes) else find(changes.vae, "vae")
    return replace(changes, vae=vae, unet=None if changes.unet is None else find(changes.unet, "unet"))


def _tiny_vae(changes: Changes | None) -> Path | None:
    """Returns the path of the VAE that is asked for, if it is a tiny one, which is loaded by itself."""
    path = None if changes is None or changes.vae is None else find(changes.vae, "vae")
    return path if path is not None and taesd.recognises(path) else None
