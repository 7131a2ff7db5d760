"""A run on disk: all that training changes, in one file that is whole at every moment."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why, and the last checkpoint is still good."""


def save_atomically(value: Any, path: Path) -> None:
    """Writes beside the file, then renames: a full disk or a kill leaves the old one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            torch.save(value, file)
            file.flush()
            os.fsync(file.fileno())  # else a power cut could leave the new name without the new bytes
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch wraps some of the first in the second
        why = error.strerror if isinstance(error, OSError) else "is the disk full?"
        raise TrainingError(f"{path} could not be written ({why}); what was there before is whole") from error
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(
    path: Path,
    model: nn.Module,
    ema: dict[str, Tensor],
    optimizers: list[torch.optim.Optimizer],
    scaler: torch.amp.GradScaler,
    step: int,
) -> None:
    """Writes what `load_checkpoint` takes up. step: the one that comes next."""
    state = {
        "model": _own_state(model),
        "ema": ema,
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "optimizer_names": _names(optimizers),
        "scaler": scaler.state_dict(),
        "step": step,
    }
    save_atomically(state, path)


def load_checkpoint(
    path: Path,
    model: nn.Module,
    ema: dict[str, Tensor],
    optimizers: list[torch.optim.Optimizer],
    scaler: torch.amp.GradScaler,
) -> int:
    """Takes up the state in a checkpoint; returns the step that comes next. Raises TrainingError."""
    again = "choose another folder to begin anew, or remove it"
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        model_saved, ema_saved, states, step = (saved[key] for key in ("model", "ema", "optimizers", "step"))
    except Exception:  # the reader raises whatever it stumbles over
        raise TrainingError(f"{path} is not a whole checkpoint of a training; {again}") from None
    for now, then in ((_own_state(model), model_saved), (ema, ema_saved)):
        for name in sorted(now.keys() | then.keys()):
            here, there = (list(x[name].shape) if name in x else "missing" for x in (now, then))
            if here != there:
                raise TrainingError(
                    f"{path} is of another model ({name} is {there} there and {here} here); {again}"
                )
        with torch.no_grad():
            for name, value in now.items():
                value.copy_(then[name])
    if saved.get("optimizer_names", _names(optimizers)) != _names(optimizers):
        there, here = (" and ".join(x) for x in (saved["optimizer_names"], _names(optimizers)))
        raise TrainingError(f"{path} was trained with {there}, and the optimizer here is {here}; {again}")
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict(state)
    if scaler.is_enabled() and saved.get("scaler"):
        scaler.load_state_dict(saved["scaler"])
    return step


def _names(optimizers: list[torch.optim.Optimizer]) -> list[str]:
    return [type(optimizer).__name__ for optimizer in optimizers]


def _own_state(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: the state without the frozen weights."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    return {name: value for name, value in model.state_dict().items() if name not in frozen}
