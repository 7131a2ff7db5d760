"""Faster steps on a GPU: compiled networks, and steps that are recorded once and then played back.

Each is used only after it has given, in this very run, what the plain way gives. Otherwise the run goes on
without it, and a warning says so.

A GPU is done with most kernels before Python has asked for the next. A CUDA graph is a list of kernels, made
once and launched as a whole; it knows nothing but where memory lies. So what a step draws, its learning rate
and the share of its average are put where the graph reads them, and its figures are where it writes them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..kernels.graphs import Record, capture
from .checkpoint import TrainingError
from .objective import BatchPart, Drawn, has_dropout, rng, seed_layers

if TYPE_CHECKING:
    from .loop import Step

MOST_OFF = 0.05  # gradients in bfloat16 that are summed in another order differ by 1 or 2 %
MOST_KINDS = 6  # of batches that are recorded: each has a recording of its own


def faster(plain: Step, step: int, done: float) -> Step | RecordedStep:
    """Returns what does the same steps faster, as far as that is possible here. step: the first one."""
    plain.network = compiled(plain, step, done)
    return RecordedStep(plain) if can_be_recorded(plain) else plain


# ---- compiled networks ------------------------------------------------------------------------------------


def compiled(plain: Step, step: int, done: float) -> Callable[..., Any]:
    """Returns the network compiled, if that gives the gradients that it gives as it is; warns if not."""
    network = plain.network
    fast = torch.compile(network, dynamic=False)
    found = []
    for call in (network, fast):
        plain.network = call
        for weight in plain.trained.values():
            weight.grad = None
        try:
            plain.accumulate(step, done)
        except TrainingError:
            raise
        except Exception as error:
            if call is network:
                raise
            _warn(f"the networks cannot be compiled here, so steps are slower: {_line(error)}")
            return network
        found.append([p.grad.clone() for p in plain.trained.values() if p.grad is not None])
    off = far_off(found[1], found[0])
    if not off < MOST_OFF:
        _warn(f"compiled, the networks give other gradients ({off:.0%} off), so they are not compiled")
        return network
    return fast


# ---- recorded steps ---------------------------------------------------------------------------------------


def can_be_recorded(plain: Step) -> bool:
    """True if all of a step happens on one GPU, in one go, and all that is random can be drawn before it."""
    return (
        plain.accelerator.device.type == "cuda"
        and plain.accelerator.num_processes == 1
        and plain.config.accumulate == 1
        and not plain.scaler.is_enabled()  # it reads whether gradients are finite
        and isinstance(plain.objective, Drawn)
        # Once a recording has failed, the generator from which dropout draws is of no more use.
        and not has_dropout(plain.wrapped)
    )


@dataclass
class _Recording:
    """The recorded gradients of batches of one kind."""

    batch: tuple[Any, ...]  # where they are read
    figures: dict[str, Tensor]  # where they are written
    play: Callable[[], None]


class RecordedStep:
    """Does what a step does, in two launches: its gradients, and what is done with them.

    record: how to record. The first batch of its kind (shapes, and settings of the loss) takes the plain way,
    which also makes whatever is made only once. The second is recorded.
    """

    def __init__(self, plain: Step, record: Record = capture):
        self.plain, self.record = plain, record
        self.seen: set[Hashable] = set()  # kinds of batches
        self.recordings: dict[Hashable, _Recording] = {}
        self.play_update: Callable[[], None] | None = None
        self.failed = self.played = False
        # What changes from step to step lies where it is read without Python: the learning rate and the
        # share of the average, and what the gradients leave for the update.
        device = plain.accelerator.device
        self.rate, self.share, self.norm = (torch.zeros((), device=device) for _ in range(3))
        self.grads: dict[str, Tensor] = {}  # of each weight that has one

    def gradients(self, step: int, done: float) -> dict[str, Tensor]:
        """As `Step.gradients`."""
        recording = None if self.failed else self._find(step, done)
        self.played = recording is not None
        if recording is None:
            return self.plain.gradients(step, done)
        self._take(self.grads)
        seed_layers(self.plain.config.seed, step, self._part())
        recording.play()
        return recording.figures

    def update(self, step: int, done: float) -> None:
        """As `Step.update`; to the last bit the same whether it is played back or not."""
        rate, share = self.plain.numbers(step, done)
        self.rate.fill_(rate)
        self.share.fill_(share)
        if self.played and self.play_update is not None:
            self.play_update()
        else:
            self.plain.move(self.rate, self.share)
        self._set_rate(rate)  # which a checkpoint holds

    def _find(self, step: int, done: float) -> _Recording | None:
        """The recording for a step's batch, which now lies where it is read; None: the plain way is to go."""
        assert isinstance(self.plain.objective, Drawn)
        generator = rng(self.plain.config.seed, step, self.plain.draws_on)
        batch = self.plain.objective.draw(done, generator, self._part())
        kind = tuple(_kind(x) for x in batch)
        if kind not in self.recordings:
            if kind not in self.seen or len(self.recordings) == MOST_KINDS:
                self.seen.add(kind)
                return None
            try:
                self._record(kind, batch, step, done)
            except RuntimeError as error:
                self.failed, self.play_update = True, None
                self.recordings.clear()
                first = error.__context__  # a recording that is broken off ends with an error of its own
                why = _line(first if isinstance(first, Exception) else error)
                _warn(f"steps cannot be recorded here, so they are slower: {why}")
                return None
        recording = self.recordings[kind]
        for its, given in zip(recording.batch, batch, strict=True):
            if isinstance(its, Tensor):
                its.copy_(given)
        return recording

    def _record(self, kind: Hashable, batch: tuple[Any, ...], step: int, done: float) -> None:
        """Records what is done with such a batch. Raises RuntimeError if the plain way does otherwise."""
        self.plain.gradients(step, done)
        expected = {name: p.grad for name, p in self.plain.trained.items() if p.grad is not None}
        if not self.grads:
            self.grads = {name: torch.zeros_like(self.plain.trained[name]) for name in expected}
        if self.grads.keys() != expected.keys():
            raise RuntimeError("its batches train different weights")
        self._take(self.grads)
        its = tuple(x.clone() if isinstance(x, Tensor) else x for x in batch)
        recording = _Recording(its, *self.record(lambda: self._compute(its)))
        seed_layers(self.plain.config.seed, step, self._part())
        recording.play()
        off = far_off(list(self.grads.values()), list(expected.values()))
        if not off < MOST_OFF:
            raise RuntimeError(f"played back, a step has other gradients ({off:.0%} off)")
        if self.play_update is None:
            self.play_update = self._record_update(step, done)
        self.recordings[kind] = recording

    def _compute(self, batch: tuple[Any, ...]) -> dict[str, Tensor]:
        """What is recorded of `Step.gradients`: they are written where the update reads them."""
        assert isinstance(self.plain.objective, Drawn)
        grads = list(self.grads.values())
        torch._foreach_zero_(grads)
        loss, figures = self.plain.objective.loss(self.plain.in_precision(), *batch)
        loss.backward()
        norm = nn.utils.get_total_norm(grads)
        self.norm.copy_(norm)
        found = {**figures, "loss": loss.detach(), "grad_norm": norm}
        return {
            name: x if isinstance(x, Tensor) else torch.full((), x, device=norm.device)
            for name, x in found.items()
        }

    def _record_update(self, step: int, done: float) -> Callable[[], None]:
        """Returns what plays `Step.update`. What that changes is afterwards what it was before."""
        plain, play = self.plain, None
        states = [x for o in plain.optimizers for state in o.state.values() for x in state.values()]
        changing = [*plain.trained.values(), *plain.average.values(), *self.grads.values()]
        changing += [x for x in states if isinstance(x, Tensor)]
        before = _copies(changing)
        try:
            plain.update(step, done)
            expected = _copies(changing)
            _restore(changing, before)
            self._set_rate(self.rate, capturable=True)
            _, play = self.record(lambda: plain.move(self.rate, self.share))
            _restore(changing, before)
            for its, number in zip((self.rate, self.share), plain.numbers(step, done), strict=True):
                its.fill_(number)
            play()
            found = _copies(changing)
        finally:
            _restore(changing, before)
            self._set_rate(plain.numbers(step, done)[0], capturable=False)
        for x, y, was in zip(found, expected, before, strict=True):
            if not length([x - y]) <= MOST_OFF * length([y - was]) + 1e-6 * length([y]):
                raise RuntimeError("played back, a step moves the weights to other places")
        return play

    def _part(self) -> BatchPart:
        return BatchPart(device=self.plain.accelerator.device)

    def _take(self, grads: dict[str, Tensor]) -> None:
        """Makes these, and the norm that is computed of them, the gradients of the step."""
        for name, grad in grads.items():
            self.plain.trained[name].grad = grad
        self.plain.norm = self.norm

    def _set_rate(self, rate: float | Tensor, capturable: bool = False) -> None:
        for group in (group for optimizer in self.plain.optimizers for group in optimizer.param_groups):
            group["lr"] = rate
            if "capturable" in group:  # AdamW asks
                group["capturable"] = capturable


def far_off(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Returns the length of the difference of both, as a share of what is expected."""
    off = length([a - b for a, b in zip(found, expected, strict=True)])
    return off / length(expected) if off else 0.0


def length(tensors: Sequence[Tensor]) -> float:
    """Returns the length of all tensors, as if they were one vector."""
    return nn.utils.get_total_norm(tensors).item()


def _kind(x: Any) -> Hashable:
    return (x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else x


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies beside the GPU, whose memory is for other things."""
    return [x.detach().to("cpu", copy=True) for x in tensors]


@torch.no_grad()
def _restore(tensors: Sequence[Tensor], copies: Sequence[Tensor]) -> None:
    for x, copy in zip(tensors, copies, strict=True):
        x.copy_(copy)


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _warn(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=4)
