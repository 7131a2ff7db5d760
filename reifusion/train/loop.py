"""The training loop: one function, `train`, trains every model here.

Everything random in a step is drawn from (seed, step), and a checkpoint holds the weights, their moving
average and the optimizer's state. So a run that was killed resumes as if nothing had happened.

A step's batch can be cut into parts, for several processes or for little memory. Random numbers are drawn
for the whole batch and cut afterwards, so the parts together give the same gradient as the whole batch.
"""

from __future__ import annotations

import math
import signal
import statistics
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..kernels.training import in_training
from . import muon
from .checkpoint import TrainingError, load_checkpoint, save_checkpoint, unchanged
from .faster import faster
from .keys import check, key
from .objective import BatchPart, Objective, rng, seed_layers
from .objective import Drawn as Drawn
from .objective import normal as normal
from .progress import Progress, Seen

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class LoopConfig:
    """The settings of every training. Raises RecipeError for a value outside its limits."""

    steps: int = key(10_000, "number of steps, all in all", least=1)
    lr: float = key(1e-3, "the highest learning rate", least=0)
    warmup: int = key(200, "steps in which the learning rate rises from 0", least=0)
    decay: float = key(0.2, "share of the steps, at the end, in which it falls to 0", least=0, most=1)
    betas: tuple[float, float] = key((0.9, 0.99), "AdamW's two decay rates", least=0, below=1)
    weight_decay: float = key(0.01, "how strongly weights are pulled towards 0", least=0)
    muon: bool = key(False, "Muon for the matrices and AdamW for the rest; otherwise AdamW for everything")
    max_grad_norm: float | None = key(1.0, "longer gradients are shortened to this; none: never", above=0)
    ema: float = key(
        0.999, "decay of the weights' moving average, which becomes the finished model", least=0, below=1
    )
    seed: int = key(0, "decides everything random", least=0, below=2**63)
    accumulate: int = key(1, "parts into which a process cuts its batch, to compute one at a time", least=1)
    mixed_precision: str = key(
        "bf16",
        "number format of the networks' arithmetic; weights are always fp32",
        choices=("bf16", "fp16", "no"),
    )
    explode: float = key(
        10.0, "three losses in a row above this many times the usual one end the run", above=1, endless=True
    )
    minutes: float | None = key(
        None,
        "ends the run after this time, its learning rate with it, if `steps` does not; none: no clock",
        above=0,
    )
    compile: bool = key(
        False,
        "compiles the networks and, on a single GPU, records whole steps; that takes a minute or two and"
        " makes steps there at least twice as fast",
    )
    checkpoint_minutes: float = key(
        5.0, "time between two checkpoints; the first comes after a fifth of it", least=0
    )
    keep_every: int = key(
        0,
        "steps between two models that stay, each in a file with its step in its name; 0: only the last",
        least=0,
        trains=("text2image", "lora", "inversion", "control"),
    )
    # On a GPU, losses are read and their health is checked at these steps alone: reading makes a GPU wait.
    log_every: int = key(20, "steps between two lines of the log", least=1)
    allow_changes: bool = key(False, "resume although the data, the base model or the target has changed")

    def __post_init__(self) -> None:
        check(self)


def learning_rate(step: int, done: float, config: LoopConfig) -> float:
    """Rises linearly, stays flat, falls linearly: `steps` can be changed later without spoiling the start.

    done: the share of the training that lies behind, from 0 to 1.
    """
    up = min(1.0, (step + 1) / max(1, config.warmup))
    down = min(1.0, (1 - done) / max(1 / config.steps, config.decay))
    return config.lr * up * max(0.0, down)


class Clock:
    """Knows which share of a run lies behind it: of its steps, or of its time if it has only so much.

    seconds: what the run has taken before it was resumed.
    """

    def __init__(self, config: LoopConfig, seconds: float = 0.0):
        self.config, self.begun = config, time.monotonic() - seconds

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begun

    def done(self, step: int) -> float:
        """Returns a number from 0 to 1; it has to be 1 before a run ends."""
        share = step / self.config.steps
        if self.config.minutes is not None:
            share = max(share, self.seconds / (60 * self.config.minutes))
        return min(1.0, share)


@contextmanager
def stop_asked() -> Iterator[Callable[[], bool]]:
    """Yields a function that returns True once Ctrl-C or SIGTERM has come, to be asked between steps.

    The second one ends the program at once, as if there were no handler.
    """
    asked: list[int] = []
    before: dict[int, Any] = {}

    def ask(number: int, _: Any) -> None:
        asked.append(number)
        print("reifusion: stopping, and writing the checkpoint; once more stops at once", file=sys.stderr)
        for signum, handler in before.items():
            signal.signal(signum, handler)

    if threading.current_thread() is threading.main_thread():  # only this thread receives signals
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, ask)
    try:
        yield lambda: bool(asked)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def processes() -> Accelerator:
    """Returns the device, and the other processes if `accelerate launch` started several.

    In `with processes().main_process_first():` one process writes files before the others look for them.
    """
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    # The others wait while the main process encodes a data set or draws a sheet, however long that takes.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=1))
    # cpu=True on a machine without a GPU: otherwise processes launched together do not find one another.
    # Mixed precision is our own: with two optimizers, accelerate's fp16 would unscale the gradients twice.
    return Accelerator(
        cpu=not torch.accelerator.is_available(), mixed_precision="no", kwargs_handlers=[patience]
    )


def train(
    model: nn.Module,
    objective: Objective,
    config: LoopConfig,
    folder: Path,
    every_checkpoint: Callable[[int, dict[str, Tensor]], Seen] | None = None,
    describe: Callable[[int], str] | None = None,
    made_of: Mapping[str, str] | None = None,
    draws_on: torch.device | str = "cpu",
    spent: float = 0.0,
    keep: Callable[[int, dict[str, Tensor]], None] | None = None,
) -> dict[str, Tensor]:
    """Minimises the objective over the parameters that require gradients; returns their moving average.

    Resumes from `folder/checkpoint.pt` if that exists. every_checkpoint(step, average) returns what there is
    to see; it is not called when the run is being stopped, and if it fails, that is only a warning.
    keep(step, average): called at every checkpoint, and every `keep_every` steps. describe(step) names the
    step's samples, for error messages. made_of: see `unchanged`. draws_on: the device of the objective's
    generators. spent: the seconds of the run's time that went by before. Ctrl-C or SIGTERM writes the
    checkpoint and raises KeyboardInterrupt. Raises TrainingError when the loss is not finite or explodes,
    when the checkpoint belongs to another run, and when the disk is full.
    """
    accelerator = processes()
    wrapped = accelerator.prepare_model(model)
    optimizers = make_optimizers(model, config)
    scaler = torch.amp.GradScaler(accelerator.device.type, enabled=config.mixed_precision == "fp16")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ema = {name: p.detach().clone() for name, p in trained.items()}
    path = folder / "checkpoint.pt"
    made_of = made_of or {}
    unchanged(path, made_of, config.allow_changes)
    start, seconds = 0, min(spent, 54 * (config.minutes or math.inf))  # a tenth of the time is for steps
    if path.exists():
        start, seconds = load_checkpoint(path, model, ema, optimizers, scaler)
    clock = Clock(config, seconds)
    if clock.done(start) >= 1:
        over = f"{start} steps were done before, and steps is {config.steps}"
        if start < config.steps:
            over = f"the run's {config.minutes:g} minutes are over"
        warnings.warn(
            f"nothing is left to train: {over}; to train anew, choose another folder or remove {path}",
            stacklevel=2,
        )
    plain = Step(
        wrapped,
        wrapped,
        objective,
        config,
        accelerator,
        scaler,
        optimizers,
        trained,
        ema,
        draws_on,
    )
    work = faster(plain, start, clock.done(start)) if config.compile and clock.done(start) < 1 else plain
    look_every = config.log_every if waits(accelerator.device) else 1
    health, unread = _Health(config.explode), _Unread()
    saved_at = time.monotonic() - 48 * config.checkpoint_minutes  # so that something is to be seen soon
    step = start

    def checkpoint(step: int, show: bool = True) -> None:
        if not accelerator.is_main_process:
            return
        seconds = clock.seconds if config.minutes else 0.0
        save_checkpoint(path, model, ema, optimizers, scaler, step, made_of, seconds)
        if keep is not None:
            keep(step, ema)
        if progress is not None and every_checkpoint is not None and show:
            try:
                progress.show(step, every_checkpoint(step, ema))
            except Exception as error:  # such as too little memory: a picture does not end hours of work
                why = f"{type(error).__name__}: {error}".splitlines()[0]
                warnings.warn(f"what the model draws at step {step} cannot be shown: {why}", stacklevel=2)

    def look() -> None:
        """Reads the figures of the last steps, checks them and shows them."""
        for at, figures in unread.read():
            problem = health.problem(figures["loss"], figures["grad_norm"], scaler)
            if problem:
                names = f" ({describe(at)})" if describe is not None else ""
                kept = f"the last good state is {path}" if path.exists() else "nothing has been saved yet"
                raise TrainingError(f"{problem} at step {at}{names}; {_norms(model)}; {kept}")
            if progress is not None:
                progress.step(at, figures.pop("samples", 0.0), figures)

    folder.mkdir(parents=True, exist_ok=True)
    main = accelerator.is_main_process
    total = config.steps if config.minutes is None else None
    seen = Progress(folder, start, total, config.log_every) if main else nullcontext()
    with seen as progress, stop_asked() as stop, in_training(model):
        while (done := _agreed(clock.done(step), accelerator, config)) < 1:
            figures = work.gradients(step, done)
            unread.add(step, figures, {"lr": learning_rate(step, done, config)})
            # Several processes have to agree, which makes a GPU wait; a single one can stop at any step.
            if (step + 1) % look_every == 0 or (accelerator.num_processes == 1 and stop()):
                look()
                # These losses have shown that the weights, not yet updated by this step, are good.
                asked = any(_of_all(float(stop()), accelerator))
                if health.good and (asked or time.monotonic() - saved_at > 60 * config.checkpoint_minutes):
                    checkpoint(step, show=not asked)
                    saved_at = time.monotonic()
                if asked:
                    raise KeyboardInterrupt
            work.update(step, done)
            step += 1
            if config.keep_every and step % config.keep_every == 0 and keep is not None and main:
                keep(step, ema)
        look()
        if not all(p.isfinite().all() for p in trained.values()):
            raise TrainingError(f"the last step left weights that are not finite; {path} is older than that")
        checkpoint(step)
        accelerator.wait_for_everyone()
    return ema


@dataclass
class Step:
    """What happens in a step, in two halves: between them the loop may look, before weights have moved."""

    network: Callable[..., Any]
    wrapped: nn.Module  # the model, or what lets processes train it together
    objective: Objective
    config: LoopConfig
    accelerator: Accelerator
    scaler: torch.amp.GradScaler
    optimizers: list[torch.optim.Optimizer]
    trained: dict[str, nn.Parameter]
    average: dict[str, Tensor]
    draws_on: torch.device | str
    norm: Tensor = field(init=False)  # of the gradients

    def gradients(self, step: int, done: float) -> dict[str, Tensor]:
        """Computes the gradients of the step's loss; returns its figures, each a tensor of one number."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        figures = self.accumulate(step, done)
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        self.norm = nn.utils.get_total_norm([p.grad for p in self.trained.values() if p.grad is not None])
        return figures | {"grad_norm": self.norm}

    def accumulate(self, step: int, done: float) -> dict[str, Tensor]:
        """`accumulate_gradients`, of this step."""
        return accumulate_gradients(
            self.in_precision(),
            self.wrapped,
            self.objective,
            step,
            done,
            self.config,
            self.accelerator,
            self.scaler,
            self.draws_on,
        )

    def in_precision(self) -> Callable[..., Any]:
        """Returns the network with its products in half precision."""
        # Not within what is compiled: PyTorch's compiler then finds less in its cache.
        return in_mixed_precision(self.network, self.config, self.accelerator.device)

    def update(self, step: int, done: float) -> None:
        """Moves the weights along the gradients, and their average after them."""
        self.move(*self.numbers(step, done))

    def numbers(self, step: int, done: float) -> tuple[float, float]:
        """Returns the learning rate, and the share of the new weights in their moving average."""
        # At first, γ = (1 + step) / (10 + step) is small, so the average follows the weights quickly.
        return learning_rate(step, done, self.config), 1 - min(self.config.ema, (1 + step) / (10 + step))

    def move(self, rate: float | Tensor, share: float | Tensor) -> None:
        """`update`, by these `numbers`. They may be on the device, where they are not read."""
        if self.config.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(self.trained.values(), self.config.max_grad_norm, self.norm)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            self.scaler.step(optimizer)
        self.scaler.update()
        follow(list(self.average.values()), [p.detach() for p in self.trained.values()], share)


def follow(average: list[Tensor], weights: list[Tensor], share: float | Tensor) -> None:
    """Moves an average towards new weights, in place. share: 1 − γ, or a tensor of it, which is not read."""
    # [ema] §2, Tarvainen & Valpola 2017: θ̄ ← γ θ̄ + (1 − γ) θ
    if not isinstance(share, Tensor):
        torch._foreach_lerp_(average, weights, share)
        return
    change = torch._foreach_sub(weights, average)
    torch._foreach_mul_(change, share)
    torch._foreach_add_(average, change)


def accumulate_gradients(
    network: Callable[..., Any],
    wrapped: nn.Module,
    objective: Objective,
    step: int,
    done: float,
    config: LoopConfig,
    accelerator: Accelerator,
    scaler: torch.amp.GradScaler,
    draws_on: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """Adds the gradients of a step's mean loss to the parameters'; returns the loss and other figures.

    The figures stay on the device, each a tensor of one number, and can be NaN.
    """
    count = config.accumulate * accelerator.num_processes
    rows = []
    for i in range(config.accumulate):
        part = BatchPart(accelerator.process_index * config.accumulate + i, count, accelerator.device)
        seed_layers(config.seed, step, part)
        last = i == config.accumulate - 1  # only then do the processes exchange their gradients
        with nullcontext() if last else accelerator.no_sync(wrapped):
            loss, figures = objective(network, done, rng(config.seed, step, draws_on), part)
            scaler.scale(loss / config.accumulate).backward()
        rows.append({"loss": loss.detach(), **figures})
    names = list(rows[0])
    table = torch.stack([_numbers([row[name] for name in names], accelerator.device) for row in rows])
    if accelerator.num_processes > 1:
        table = accelerator.gather(table)  # (parts, figures)
    # A figure can be missing (NaN) in a part: the loss at low timesteps, if the part has no low timesteps.
    means = dict(zip(names, table.nanmean(0), strict=True))
    if "samples" in means:
        means["samples"] = means["samples"] * count
    return means | {"loss": table[:, 0].mean()}


def _numbers(values: list[float | Tensor], device: torch.device) -> Tensor:
    """Makes one tensor (n,) of numbers, without reading those that are on the device."""
    return torch.stack(
        [x.float() if isinstance(x, Tensor) else torch.full((), x, device=device) for x in values]
    )


def _of_all(value: float, accelerator: Accelerator) -> list[float]:
    """Returns the value of every process."""
    if accelerator.num_processes == 1:
        return [value]
    return accelerator.gather(torch.tensor([value], device=accelerator.device)).tolist()


def _agreed(done: float, accelerator: Accelerator, config: LoopConfig) -> float:
    """Returns the share that is done by the clock of the first process, if there is a clock."""
    return done if config.minutes is None else _of_all(done, accelerator)[0]


def waits(device: torch.device) -> bool:
    """True if a look at a number makes the device wait: all do except a CPU."""
    return device.type != "cpu"


class _Unread:
    """The figures of steps that nobody has looked at: they are still on the device."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, dict[str, float]]] = []
        self.names: list[str] = []
        self.rows: list[Tensor] = []

    def add(self, step: int, figures: Mapping[str, Tensor], known: Mapping[str, float]) -> None:
        self.names = sorted(figures)  # a step that is played back has them in another order
        self.rows.append(torch.stack([figures[name].float() for name in self.names]))
        self.steps.append((step, dict(known)))

    def read(self) -> list[tuple[int, dict[str, float]]]:
        """Returns each step with its figures, except those that are missing (NaN); forgets them."""
        if not self.steps:
            return []
        rows = torch.stack(self.rows).tolist()  # the one transfer
        found = []
        for (step, known), row in zip(self.steps, rows, strict=True):
            figures = dict(zip(self.names, row, strict=True))
            own = {k: x for k, x in figures.items() if math.isfinite(x) or k in ("loss", "grad_norm")}
            found.append((step, own | known))
        self.steps, self.rows = [], []
        return found


def in_mixed_precision(
    network: Callable[..., Any], config: LoopConfig, device: torch.device
) -> Callable[..., Any]:
    """Returns the network with its products in the config's half precision."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": None}[config.mixed_precision]

    def call(*inputs: Any, **more: Any) -> Any:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            return network(*inputs, **more)

    return call


def make_optimizers(model: nn.Module, config: LoopConfig) -> list[torch.optim.Optimizer]:
    """Returns the optimizers of the parameters that require gradients."""
    if config.muon:
        return muon.optimizers(model, config.lr, config.weight_decay, config.betas)
    trained = [p for p in model.parameters() if p.requires_grad]
    return [torch.optim.AdamW(trained, config.lr, config.betas, weight_decay=config.weight_decay, fused=True)]


class _Health:
    """Watches whether the losses are finite and near the usual one."""

    def __init__(self, explode: float):
        self.explode = explode
        self.recent: deque[float] = deque(maxlen=100)
        self.streak = 0  # losses in a row that were far too high

    @property
    def good(self) -> bool:
        return self.streak == 0

    def problem(self, loss: float, norm: float, scaler: torch.amp.GradScaler) -> str | None:
        """Says what is wrong with a step's loss and gradients; None if nothing is."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        # fp16 overflows now and then; the scaler skips such a step and tries a smaller scale.
        if not math.isfinite(norm) and not (scaler.is_enabled() and scaler.get_scale() > 1):
            return f"the gradient's norm is {norm}"
        usual = statistics.median(self.recent) if len(self.recent) >= 20 else math.inf
        self.streak = self.streak + 1 if loss > self.explode * usual > 0 else 0
        self.recent.append(loss)
        if self.streak == 3:
            many = f"{self.explode:g} times the usual {usual:.4g}"
            return f"the loss is {loss:.4g}, more than {many} for the third time in a row,"
        return None


def _norms(model: nn.Module) -> str:
    """Lists the gradient's norm in each part of the model, for an error message."""
    norms = []
    for name, child in model.named_children():
        grads = [p.grad for p in child.parameters() if p.grad is not None]
        if grads:
            norms.append(f"{name} {nn.utils.get_total_norm(grads).item():.3g}")
    return f"the gradients' norms: {', '.join(norms)}"
