"""A pretended GPU: tensors that say they are on "cuda:0" and hold no numbers, beside real ones on the CPU.

Operations between the two devices fail as on a card, and so does asking a CPU for a stream. What is copied to
the CPU arrives as zeros; the question "is this finite?" is answered with yes. Nothing can be recorded there.
Derivatives are made up, as PyTorch's engine would look for the card.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

DEVICE = torch.device("cuda:0")
# Even to index a tensor of a device, PyTorch asks which one is current: somebody has to answer for CUDA.
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, NoOpDeviceGuardImpl<DeviceType::CUDA>)
}
"""


@functools.cache
def possible() -> bool:
    """True if tensors can be said to be on "cuda". PyTorch without CUDA wants a compiler, for two seconds."""
    if torch.cuda.is_available():
        return False
    if torch.backends.cuda.is_built():
        torch._C._ensureCUDADeviceGuardSet()
        return True
    compiler, home = shutil.which("c++"), Path(torch.__file__).parent
    if compiler is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "guard.cpp"), Path(folder, "guard.so")
        source.write_text(GUARD)
        command = [compiler, "-std=c++20", "-shared", "-fPIC", f"-I{home}/include", f"-L{home}/lib"]
        made = subprocess.run([*command, source, "-lc10", "-o", library], capture_output=True)
        if made.returncode == 0:
            ctypes.CDLL(str(library))
    return made.returncode == 0


class Card(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.operations = 0  # on the card

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), function.overloadpacket.__name__
        there = any(isinstance(x, FakeTensor) for x in tree_flatten((args, kwargs))[0])
        device = kwargs.get("device")
        if not there and (device is None or device.type != "cuda"):
            return function(*args, **kwargs)
        if name == "_local_scalar_dense":
            return True if args[0].dtype == torch.bool else 0
        if name == "_to_copy" and device is not None and device.type == "cpu":
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if name == "copy_" and not isinstance(args[0], FakeTensor):
            return args[0].zero_()
        if name == "_fused_adamw_" and all(x.device == DEVICE for x in tree_flatten(args)[0]):
            return None  # whose form with a tensor for the learning rate knows only real tensors
        if kwargs.get("generator") is not None:
            assert _place(kwargs["generator"]) in _Generator.of_card, "a CPU's generator draws on the GPU"
            kwargs["generator"] = None
        self.operations += 1
        with self.fake:
            return function(*args, **kwargs)


class _Generator(torch.Generator):
    """A generator of either device."""

    of_card: ClassVar[set[int]] = set()  # where they lie; PyTorch hands them on without their Python class

    def __new__(cls, device: Any = "cpu") -> _Generator:
        made = super().__new__(cls)
        if torch.device(device).type == "cuda":
            cls.of_card.add(_place(made))
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE if _place(self) in self.of_card else torch.device("cpu")

    def __del__(self) -> None:
        self.of_card.discard(_place(self))


def _place(generator: Any) -> int:
    return generator._cdata


def _to(module: nn.Module, *where: Any, **more: Any) -> nn.Module:
    """`Module.to`, which would fail for weights without numbers that are there already."""
    if where == (DEVICE,) and not more and all(x.device == DEVICE for x in module.state_dict().values()):
        return module
    return _TO(module, *where, **more)


_TO = nn.Module.to


def _stream(device: Any = None) -> SimpleNamespace:
    if device is not None and torch.device(device).type != "cuda":
        raise ValueError(f"Expected a cuda device, but got: {device}")
    return SimpleNamespace()


class Processes:
    """What `accelerate` would say of one process with a GPU."""

    device, num_processes, process_index, is_main_process = DEVICE, 1, 0, True

    def prepare_model(self, model: nn.Module) -> nn.Module:
        self.model = model.to(DEVICE)
        return self.model

    def no_sync(self, _: nn.Module) -> Any:
        return nullcontext()

    def wait_for_everyone(self) -> None:
        pass

    def gradients(self, *_: Any) -> None:
        """Stands for `Tensor.backward`."""
        for p in self.model.parameters():
            if p.requires_grad:
                p.grad = torch.empty_like(p)


@contextmanager
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    """Tensors can be on DEVICE while the `with` lasts."""
    nothing = lambda *_: None  # noqa: E731
    event = SimpleNamespace(record=nothing, query=lambda: True, synchronize=nothing)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "current_stream", _stream)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(Tensor, "pin_memory", lambda x: x)
    monkeypatch.setattr(torch, "Generator", _Generator)
    monkeypatch.setattr(nn.Module, "to", _to)
    # As in `FakeTensorMode`: no copies of Python's numbers behind its back.
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with Card() as card, torch.no_grad():
            yield card
    finally:
        torch._C._set_only_lift_cpu_tensors(before)
