"""The training loop, once: every model here is trained by `train`.

Everything random in a step is drawn from (seed, step), and a checkpoint holds weights, their moving
average and the optimizer's state. So a run that was killed goes on as if nothing had happened.
"""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import muon


@dataclass(frozen=True)
class LoopConfig:
    steps: int = 10_000
    lr: float = 1e-3  # the highest; see `learning_rate`
    warmup: int = 200  # steps in which the learning rate rises from 0
    decay: float = 0.2  # share of the steps, at the end, in which it falls to 0
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    muon: bool = False  # Muon for the matrices; otherwise AdamW for all
    max_grad_norm: float = 1.0
    ema: float = 0.999  # decay of the moving average of the weights; the average is what ships
    seed: int = 0
    checkpoint_minutes: float = 5.0
    log_every: int = 20


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why, and the last checkpoint is still good."""


def learning_rate(step: int, config: LoopConfig) -> float:
    """Up in a line, flat, down in a line: the end can be moved later without spoiling the beginning."""
    up = min(1.0, (step + 1) / max(1, config.warmup))
    down = min(1.0, (config.steps - step) / max(1.0, config.decay * config.steps))
    return config.lr * up * max(0.0, down)


def rng(seed: int, step: int) -> torch.Generator:
    """The randomness of one step."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)


def save_atomically(value: Any, path: Path) -> None:
    """Writes beside the file, then renames: a full disk or a kill leaves the old one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        torch.save(value, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def stop_asked() -> Iterator[Callable[[], bool]]:
    """Turns Ctrl-C and SIGTERM into a question to ask between steps, where nothing is half done."""
    asked: list[int] = []
    before = {}
    if threading.current_thread() is threading.main_thread():  # signals come to no other
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, lambda number, _: asked.append(number))
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(
    model: nn.Module,
    loss: Callable[[int, torch.Generator], tuple[Tensor, dict[str, float]]],
    config: LoopConfig,
    folder: Path,
    every_checkpoint: Callable[[int, dict[str, Tensor]], None] | None = None,
) -> dict[str, Tensor]:
    """Minimises `loss(step, generator)` over the model's parameters; returns their moving average.

    Goes on from `folder/checkpoint.pt` where there is one. Ctrl-C or SIGTERM writes it and raises
    KeyboardInterrupt. Raises TrainingError when the loss is not finite.
    """
    if config.muon:
        optimizers = muon.optimizers(model, config.lr, config.weight_decay, config.betas)
    else:
        optimizers = [
            torch.optim.AdamW(
                model.parameters(), config.lr, config.betas, weight_decay=config.weight_decay, fused=True
            )
        ]
    parameters = list(model.parameters())
    ema = [p.detach().clone() for p in parameters]
    names = [name for name, _ in model.named_parameters()]
    start, path = 0, folder / "checkpoint.pt"
    if path.exists():
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        ema, start = [saved["ema"][name] for name in names], saved["step"]

    def checkpoint(step: int) -> None:
        average = dict(zip(names, ema, strict=True))
        state = {
            "model": model.state_dict(),
            "ema": average,
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "step": step,
        }
        save_atomically(state, path)
        if every_checkpoint is not None:
            every_checkpoint(step, average)

    folder.mkdir(parents=True, exist_ok=True)
    saved_at = time.monotonic()
    bar = tqdm(range(start, config.steps), initial=start, total=config.steps, mininterval=10)
    with open(folder / "training.jsonl", "a") as log, stop_asked() as stop:
        for step in bar:
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, config)
            value, figures = loss(step, rng(config.seed, step))
            if not math.isfinite(value.item()):
                raise TrainingError(
                    f"the loss is {value.item()} at step {step}; the last good state is {path}"
                )
            model.zero_grad(set_to_none=True)
            value.backward()
            norm = nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            for optimizer in optimizers:
                optimizer.step()
            # The average follows quickly at first: 0.1, 0.18, … up to config.ema.
            torch._foreach_lerp_(
                ema, [p.detach() for p in parameters], 1 - min(config.ema, (1 + step) / (10 + step))
            )
            if step % config.log_every == 0:
                row = {
                    "step": step,
                    "loss": value.item(),
                    "grad_norm": norm.item(),
                    "time": time.time(),
                    **figures,
                }
                print(
                    json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}),
                    file=log,
                )
                log.flush()
                bar.set_postfix(loss=f"{value.item():.4f}", refresh=False)
            if stop() or time.monotonic() - saved_at > 60 * config.checkpoint_minutes:
                checkpoint(step + 1)
                saved_at = time.monotonic()
            if stop():
                raise KeyboardInterrupt
    checkpoint(config.steps)
    return dict(zip(names, ema, strict=True))
