"""A network's work, recorded once and played back: one launch in place of a thousand, for drawing on a GPU.

A GPU is done with most kernels before Python has asked for the next. A CUDA graph is a list of kernels that
was made once and is launched as a whole: the same kernels, so the same numbers to the bit. The first call of
its kind (a network, a piece of work, shapes) runs as it is written, the second is recorded, and all others
are played back.

What is played back is what was recorded: no Python runs, and all memory is where it was. Inputs are therefore
copied in and outputs copied out, and a network that is no longer the one that was recorded is recorded anew:
`state_of` has all that counts. New numbers in the memory of the old weights need nothing: they are read.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ..families import lcm
from ..model import diffusion
from .fast import inferring, watched

# Does some work once, or only writes down how; returns its outputs, and what does it again into their memory.
Record = Callable[[Callable[[], Any]], tuple[Any, Callable[[], None]]]
KEPT = 6  # recordings of a network, for so many shapes; each holds some memory


@dataclass
class _Recording:
    inputs: list[Tensor] = field(default_factory=list)
    outputs: Any = None  # a tensor, or a tuple of them
    play: Callable[[], None] | None = None  # None: it was not recorded yet
    failed: bool = False
    thread: int = field(default_factory=threading.get_ident)  # in which it was run


@dataclass
class _Network:
    state: State
    recordings: OrderedDict[Hashable, _Recording] = field(default_factory=OrderedDict)


class Recorder:
    """Decides what is run, what is recorded, what is played back and what is thrown away.

    record: how to record. kept: how many recordings of a network; of more, the one that was not played for
    longest goes. Any thread may play; they take turns.
    """

    def __init__(self, record: Record, kept: int = KEPT):
        self.record, self.kept = record, kept
        self._networks: WeakKeyDictionary[nn.Module, _Network] = WeakKeyDictionary()
        self._turn = threading.RLock()
        self._eager = 0  # how many want that nothing is played back

    def __call__(self, network: nn.Module, work: Callable[..., Any], *inputs: Tensor, **more: Tensor) -> Any:
        """Returns work(*inputs, **more), which depends on the network and on these tensors alone."""
        with self._turn:
            recording = None if self._eager else self._find(network, work, inputs, more)
            if recording is not None and recording.play is None:
                self._record(recording, work, inputs, more)
            if recording is not None and recording.play is not None:
                for its, given in zip(recording.inputs, (*inputs, *more.values()), strict=True):
                    its.copy_(given)
                recording.play()
                outputs = (
                    recording.outputs
                )  # which the next playing overwrites, be it of this recording or not
                return outputs.clone() if isinstance(outputs, Tensor) else tuple(x.clone() for x in outputs)
        return work(*inputs, **more)

    def _find(
        self, network: nn.Module, work: Callable[..., Any], inputs: Sequence[Any], more: Mapping[str, Any]
    ) -> _Recording | None:
        """The recording to play, or to make first; None if the work is to be run."""
        tensors = (*inputs, *more.values())
        state = state_of(network)
        if state is None or not all(isinstance(x, Tensor) for x in tensors):
            return None
        known = self._networks.get(network)
        if known is None or known.state != state:
            known = self._networks[network] = _Network(state)
        kind = (work.__qualname__, *more, *((x.shape, x.stride(), x.dtype, x.device) for x in tensors))
        recording = known.recordings.pop(kind, None)
        known.recordings[kind] = recording or _Recording()  # now the last to go
        while len(known.recordings) > self.kept:
            known.recordings.popitem(last=False)
        return None if recording is None or recording.failed else recording

    def _record(
        self,
        recording: _Recording,
        work: Callable[..., Any],
        inputs: Sequence[Tensor],
        more: Mapping[str, Tensor],
    ) -> None:
        its = [x.clone() for x in (*inputs, *more.values())]
        named = dict(zip(more, its[len(inputs) :]))
        try:
            with self.eager():  # recordings inside of this one
                if recording.thread != threading.get_ident():
                    work(*inputs, **more)  # cuDNN takes memory for each new thread, which no recording may
                outputs, play = self.record(lambda: work(*its[: len(inputs)], **named))
        except RuntimeError as error:
            recording.failed = True
            warnings.warn(f"{work.__qualname__} is run, as it cannot be recorded: {error}", stacklevel=4)
        else:
            recording.inputs, recording.outputs, recording.play = its, outputs, play

    @contextmanager
    def eager(self) -> Iterator[None]:
        """Everything is run as it is written while the `with` lasts."""
        with self._turn:
            self._eager += 1
        try:
            yield
        finally:
            with self._turn:
                self._eager -= 1

    def forget(self, network: nn.Module) -> None:
        """Throws a network's recordings away, and with them their memory."""
        with self._turn:
            self._networks.pop(network, None)


class State:
    """What a recording of a network depends on, beside its inputs."""

    def __init__(self) -> None:
        self.memory: list[Any] = []  # of each parameter and buffer: where it lies and how it is to be read
        self.objects: list[Any] = []  # of each module: its class, and the attributes that its class gave it

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, State)
            and self.memory == other.memory
            and len(self.objects) == len(other.objects)
            and all(one is another for one, another in zip(self.objects, other.objects))
        )


def state_of(network: nn.Module) -> State | None:
    """Returns the state of a network; None if a hook watches it, which no recording would call."""
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return None
    state, modules = State(), [network]
    while modules:
        module = modules.pop()
        own = vars(module)
        if watched(module) or own.get("hook") is not None:
            return None
        state.objects.append(type(module))
        state.objects += [value for name, value in own.items() if name not in _OF_EVERY_MODULE]
        for x in (*module._parameters.values(), *module._buffers.values()):
            if x is not None:
                state.memory.append((x.data_ptr(), x.dtype, x.shape, x.stride()))
        modules += [child for child in module._modules.values() if child is not None]
    return state


_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}


# ---- on a GPU ---------------------------------------------------------------------------------------------


def capture(work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
    """A `Record`: work as a CUDA graph. Graphs share their memory, as only one is at work at a time."""
    graph = torch.cuda.CUDAGraph()
    pool = next((other.pool() for other in _GRAPHS), None)
    stream = _stream(torch.cuda.current_device())
    try:
        # The outer one gives this thread its stream back even if recording fails, which PyTorch's own does
        # not. Other threads may go on: "thread_local".
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"),
        ):
            outputs = work()
    except RuntimeError:
        # PyTorch holds that recording into this memory goes on, and asks this graph: both are left alone.
        _FAILED.append(graph)
        _GRAPHS.clear()
        raise
    _GRAPHS.add(graph)
    return outputs, graph.replay


_GRAPHS: WeakSet[Any] = WeakSet()  # whose memory the next one may share
_FAILED: list[Any] = []


@functools.cache
def _stream(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


recorder = Recorder(capture)


def on_gpu(x: Tensor) -> bool:
    """True if x is used to draw on the GPU, and nothing but numbers is wanted of the networks."""
    return (
        x.device.type == "cuda"
        and inferring()
        and not torch.is_autocast_enabled("cuda")
        and not torch._C._len_torch_dispatch_stack()  # modes that count or change the operations
    )


def suits(x: Tensor) -> bool:
    """True if what x is put into may be played back: on the device and the stream that were recorded."""
    return (
        on_gpu(x)
        and x.device.index == torch.cuda.current_device()
        and torch.cuda.current_stream() == torch.cuda.default_stream()  # not so while a graph is recorded
    )


class Recorded(nn.Module):
    """A network whose work may be played back."""

    def _apply(self, *args: Any, **more: Any) -> Any:
        before = next(self.parameters()).device
        super()._apply(*args, **more)
        if next(self.parameters()).device != before:
            recorder.forget(self)
        return self


def played(network: nn.Module, work: Callable[..., Any], *inputs: Tensor, **more: Tensor) -> Any:
    """Returns work(*inputs, **more), played back where that is possible.

    work: depends on the network and on these tensors alone, and is known by its name.
    """
    if isinstance(network, Recorded) and suits(inputs[0]):
        return recorder(network, work, *inputs, **more)
    return work(*inputs, **more)


class UNet(diffusion.UNet, Recorded):
    """The U-Net, played back."""

    def forward(self, latents: Tensor, context: Tensor, t: Tensor) -> Tensor:
        """latents (B, 4, h, w), context (B, S, width), t (B,) or (1,) -> (B, 4, h, w)"""
        return played(self, super().forward, latents, context, t)


class LCMUNet(lcm.LCMUNet, Recorded):
    """The U-Net of an LCM, played back."""

    def forward(self, latents: Tensor, context: Tensor, t: Tensor, guidance: Tensor | None = None) -> Tensor:
        """latents (B, 4, h, w), context (B, S, width), t and guidance (B,) or (1,) -> (B, 4, h, w)"""
        more = {} if guidance is None else {"guidance": guidance}
        return played(self, super().forward, latents, context, t, **more)
