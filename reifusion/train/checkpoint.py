"""A run on disk: everything that training changes, in one file that is whole at every moment."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class TrainingError(RuntimeError):
    """Training cannot continue; the message says why, and the last checkpoint is still good."""


def save_atomically(value: Any, path: Path) -> None:
    """Writes a new file and then renames it, so that a full disk or a kill leaves the old file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            torch.save(value, file)
            file.flush()
            os.fsync(file.fileno())  # otherwise, a power cut could leave the new name without the new bytes
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch turns some OSErrors into RuntimeErrors
        why = error.strerror if isinstance(error, OSError) else "the disk may be full"
        raise TrainingError(f"{path} could not be written ({why}); the previous file is whole") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keeps other runs out of a folder, where the system has locks; then removes what a killed one left.

    Raises TrainingError if another one runs there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".running", "wb") as file:
        locked = fcntl is not None
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise TrainingError(
                    f"another run is training in {folder}; wait for its end, or choose another folder"
                ) from None
            except OSError:  # a file system without locks
                locked = False
        for half in folder.glob(".checkpoint.pt.*") if locked else ():
            half.unlink(missing_ok=True)
        yield


def save_checkpoint(
    path: Path,
    model: nn.Module,
    ema: dict[str, Tensor],
    optimizers: list[torch.optim.Optimizer],
    scaler: torch.amp.GradScaler,
    step: int,
    made_of: Mapping[str, str],
    seconds: float = 0.0,
) -> None:
    """Writes the state of a run for `load_checkpoint`.

    step: the next one to be done. made_of: see `unchanged`. seconds: what the run has taken so far.
    """
    state = {
        "model": _own_state(model),
        "ema": ema,
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "optimizer_names": _names(optimizers),
        "scaler": scaler.state_dict(),
        "step": step,
        "seconds": seconds,
        "made_of": dict(made_of),
    }
    save_atomically(state, path)


def unchanged(path: Path, made_of: Mapping[str, str], allow: bool = False) -> None:
    """Compares what a run is made of now with what its checkpoint was made of, if there is a checkpoint.

    made_of: what must not change in the middle of a run, such as the data; name -> value, or a digest with
    "#" in front. Raises TrainingError for a change, or only warns of it. allow: only warn.
    """
    try:
        then = torch.load(path, map_location="cpu", weights_only=True, mmap=True).get("made_of", {})
    except Exception:  # there is none, or `load_checkpoint` will say what is wrong with it
        return
    changed = [name for name in made_of if then.get(name, made_of[name]) != made_of[name]]
    if not changed:
        return
    shown = [
        name if made_of[name].startswith("#") else f"{name} (from {then[name]} to {made_of[name]})"
        for name in changed
    ]
    what = f"since {path} was written, these have changed: {', '.join(shown)}"
    if not allow:
        raise TrainingError(
            f"{what}; to train anew, choose another folder or remove that file; to go on all the same, set"
            " allow_changes=true"
        )
    warnings.warn(f"{what}; the run goes on all the same", stacklevel=3)


def digest(weights: Mapping[str, Tensor]) -> str:
    """Returns a digest of weights for `made_of`, rounded to bf16, so that their dtype does not count."""
    found = hashlib.blake2b(digest_size=8)
    for name, weight in sorted(weights.items()):
        found.update(f"{name} {tuple(weight.shape)}".encode())
        raw = weight.detach().to(torch.bfloat16).cpu().contiguous().view(-1).view(torch.uint8)
        found.update(raw.numpy().tobytes())
    return f"#{found.hexdigest()}"


def load_checkpoint(
    path: Path,
    model: nn.Module,
    ema: dict[str, Tensor],
    optimizers: list[torch.optim.Optimizer],
    scaler: torch.amp.GradScaler,
) -> tuple[int, float]:
    """Restores the state of a run; returns the next step to be done, and the seconds that the run has taken.

    Raises TrainingError.
    """
    again = "to start again, choose another folder or remove that file"
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        model_saved, ema_saved, states, step = (saved[key] for key in ("model", "ema", "optimizers", "step"))
    except Exception:  # for a damaged file, torch.load raises errors of many types
        raise TrainingError(f"{path} is not a complete checkpoint of a training run; {again}") from None
    for now, then in ((_own_state(model), model_saved), (ema, ema_saved)):
        for name in sorted(now.keys() | then.keys()):
            here, there = (list(x[name].shape) if name in x else "missing" for x in (now, then))
            if here != there:
                raise TrainingError(
                    f"{path} belongs to another model ({name} is {there} there and {here} here); {again}"
                )
        with torch.no_grad():
            for name, value in now.items():
                value.copy_(then[name])
    if saved.get("optimizer_names", _names(optimizers)) != _names(optimizers):
        there, here = (" and ".join(x) for x in (saved["optimizer_names"], _names(optimizers)))
        raise TrainingError(f"{path} was trained with {there}, but the optimizer here is {here}; {again}")
    for optimizer, state in zip(optimizers, states, strict=True):
        asked = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        optimizer.load_state_dict(state)
        for group, now in zip(optimizer.param_groups, asked, strict=True):
            group.update(now)  # such as a weight decay that is not that of the checkpoint
    if scaler.is_enabled() and saved.get("scaler"):
        scaler.load_state_dict(saved["scaler"])
    return step, saved.get("seconds", 0.0)


def _names(optimizers: list[torch.optim.Optimizer]) -> list[str]:
    return [type(optimizer).__name__ for optimizer in optimizers]


def _own_state(model: nn.Module) -> dict[str, Tensor]:
    """Returns the model's state without the frozen weights, which training does not change."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    return {name: value for name, value in model.state_dict().items() if name not in frozen}
