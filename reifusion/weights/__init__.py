"""Weights from anywhere and back to a file. `load` and `info` accept hub ids too, and know every family."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from .. import families
from ..model import model_loader
from ..model.config import ModelConfig
from ..model.model_loader import Info
from ..model.tokenizer import Tokenizer
from .hub import find
from .writing import save

__all__ = ["find", "info", "load", "save"]


def load(
    source: str | Path = "mini",
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    config: ModelConfig | None = None,
) -> tuple[ModelConfig, dict[str, nn.Module], Tokenizer]:
    """Loads a model of any family as `model_loader.load` does. source may also be a hub id."""
    return model_loader.load(find(source), device, dtype, config, make=families.build)


def info(source: str | Path) -> Info:
    """Reads the facts about a model as `model_loader.info` does. source may also be a hub id."""
    return model_loader.info(find(source))
