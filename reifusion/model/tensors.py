"""Reads tensors from files of unknown origin: one tensor at a time, and without running code from the file.

Every complaint is a `ModelError` of one sentence.
"""

from __future__ import annotations

import re
import reprlib
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor


class ModelError(ValueError):
    """Says in one sentence what is wrong with a model's file."""


def short(value: Any) -> str:
    """Returns a value from a file as a message shows it: one line, however long the value is."""
    return reprlib.repr(value)


class TensorFile:
    """A file of tensors. Opening the file reads its header; `read` reads one tensor."""

    def __init__(self, path: Path):
        self.path = path
        self.metadata: dict[str, str] = {}
        self.shapes: dict[str, torch.Size] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._mapped = 0  # bytes read since it was opened
        self._get: Callable[[str], Tensor] | None = None
        try:
            self._size = path.stat().st_size
            with open(path, "rb") as stream:
                start = stream.read(64)
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error.strerror}") from None
        if start[8:9] == b"{":
            self._reopen = self._safetensors
        elif start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
            self._reopen = self._pickle
        elif start.startswith(b"version https://git-lfs"):
            raise ModelError(f"{path} is a Git LFS pointer; `git lfs pull` fetches the file itself")
        else:
            raise ModelError(f"{path} is not a checkpoint" if start else f"{path} is empty")
        self._get = self._reopen()

    def tensors(self) -> dict[str, Stored]:
        """Returns the file's tensors by name, none of them read yet. A scale is a part of its tensor."""
        scales = {self.scale(name) for name in self.shapes} - {None}
        beside = [name for name in self.shapes if scales and BESIDE_FLOAT8.fullmatch(name)]
        return {name: Stored(self, name) for name in self.shapes if name not in scales.union(beside)}

    def scale(self, name: str) -> str | None:
        """Returns the name of the tensor's scale, one for each row or one for all; None if it has none."""
        dtype, rows = self.dtypes.get(name), self.shapes.get(name, torch.Size())[:1]
        if dtype == torch.int8 and self.shapes.get(name + SCALE) == rows:
            return name + SCALE
        if dtype in FLOAT8 and name.endswith("weight"):
            for scale in (f"{name.removesuffix('weight')}scale_weight", f"{name}_scale"):
                if scale in self.shapes and self.shapes[scale].numel() in (1, *rows):
                    return scale
        return None

    def read(self, name: str, device: str | torch.device, dtype: torch.dtype | None) -> Tensor:
        """Reads and converts one tensor. A convolution's weights have their channels last in memory."""
        # The file is mapped into memory. Every part that was read counts as used until the mapping is closed,
        # so it is closed now and then; otherwise a whole checkpoint would be in memory beside the networks.
        if self._get is None or self._mapped > self._size // 32:
            self._get, self._mapped = None, 0
            self._get = self._reopen()
        try:
            tensor = self._get(name).detach()
        except (SafetensorError, NotImplementedError):
            raise ModelError(f"{self.path} holds {name} in a number format that is not built in") from None
        self._mapped += tensor.nbytes
        if (scale := self.scale(name)) is not None:  # W_ij = s_i · n_ij, the s in float32, the n of 8 bits
            tensor = tensor.float() * self._get(scale).float().reshape(-1, *[1] * (tensor.ndim - 1))
        # Convolutions are fastest in this order. Copying into it here saves a second copy later.
        order = torch.channels_last if tensor.ndim == 4 else torch.preserve_format
        return tensor.to(device, dtype or tensor.dtype, copy=True, memory_format=order)

    def _safetensors(self) -> Callable[[str], Tensor]:
        try:
            handle = safe_open(self.path, "pt")
        except (SafetensorError, OSError):
            raise ModelError(f"{self.path} is cut off or damaged; fetch it again") from None
        if not self.shapes:
            self.metadata = handle.metadata() or {}
            for name in handle.keys():  # noqa: SIM118
                part = handle.get_slice(name)
                self.shapes[name] = torch.Size(part.get_shape())
                self.dtypes[name] = _DTYPES.get(part.get_dtype(), torch.uint8)
        return handle.get_tensor

    def _pickle(self) -> Callable[[str], Tensor]:
        tensors = {name: x for name, x in _unpickle(self.path).items() if isinstance(x, Tensor)}
        for name, x in tensors.items():
            usual = x.layout == torch.strided and not (x.is_meta or x.is_quantized or x.is_complex())
            if not usual or x.untyped_storage().nbytes() < x.nbytes:  # which would be larger than its file
                raise ModelError(f"{self.path} is damaged or no checkpoint: {name} is no plain tensor")
        self.shapes = {name: x.shape for name, x in tensors.items()}
        self.dtypes = {name: x.dtype for name, x in tensors.items()}
        return tensors.__getitem__


SCALE = ".scale"  # ends the name of a tensor's scales
FLOAT8 = torch.float8_e4m3fn, torch.float8_e5m2
# What lies beside weights of float8 and their scales, as ComfyUI writes them: a mark, and scales of inputs
BESIDE_FLOAT8 = re.compile(r"(.*\.)?(scaled_fp8|scale_input|input_scale|comfy_quant)")


class Stored(NamedTuple):
    """A tensor that is still in its file."""

    file: TensorFile
    name: str  # in that file

    @property
    def shape(self) -> torch.Size:
        return self.file.shapes[self.name]

    @property
    def dtype(self) -> torch.dtype:
        return self.file.dtypes[self.name]

    @property
    def is_floating_point(self) -> bool:
        """True if it is one once it has been read, as is one of 8 bits with its scales."""
        return self.dtype.is_floating_point or self.file.scale(self.name) is not None

    def read(self, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Tensor:
        return self.file.read(self.name, device, dtype)


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I8": torch.int8,
}


# The objects that trainings leave beside their weights. None of them is made: see `_Inert`.
BESIDE = re.compile(
    r"(pytorch_lightning|lightning|lightning_fabric|lightning_utilities|numpy|omegaconf|torch\.optim|pathlib"
    r"|datetime|typing)\..*|argparse\.Namespace|_codecs\.encode|collections\.(defaultdict|deque)"
    r"|slice|range|xrange|bytearray|object|int|long|list|dict|tuple|set|frozenset"
)


class _Inert:
    """Stands for an object in a checkpoint that is no tensor, whatever its class, and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _InertDict:
    """`_Inert` for kinds of dict, whose entries PyTorch puts into a plain one only."""

    def __new__(cls, *args: Any) -> Any:
        return {}


class _InertList:
    """`_Inert` for kinds of list."""

    def __new__(cls, *args: Any) -> Any:
        return []


def _inert(name: str) -> type:
    if name.lower().endswith("dict"):
        return _InertDict
    return _InertList if name.endswith(("deque", "list")) else _Inert


def _unpickle(path: Path) -> Mapping[str, Any]:
    """Opens a `.ckpt`, `.pt` or `.bin`: its tensors by name, which stay on disk until they are used."""
    zipped = zipfile.is_zipfile(path)  # since PyTorch 1.6; the older format cannot be mapped into memory
    mapped = zipped and path.suffix != ".safetensors"  # which torch.load trusts more than the content
    stand_ins: set[str] = set()
    while True:
        try:
            with (
                torch.serialization.safe_globals([(_inert(name), name) for name in stand_ins]),
                open(path, "rb") as stream,
            ):
                content = torch.load(path if mapped else stream, "cpu", mmap=mapped, weights_only=True)
            break
        except UnpicklingError as error:
            # PyTorch stops at the first name that it does not know.
            code = re.search(r"GLOBAL ([\w.]+)", str(error))
            if code is None:
                raise ModelError(f"{path} is not a checkpoint, or is damaged") from None
            if code[1] in stand_ins or not BESIDE.fullmatch(code[1]):
                raise ModelError(
                    f"{path} holds code ({code[1]}) beside its tensors and was not opened"
                ) from None
            stand_ins.add(code[1])
            stand_ins.add(f"builtins.{code[1]}")  # whose module PyTorch does not tell
        except Exception as error:  # a damaged pickle can raise anything
            raise ModelError(f"{path} is cut off or damaged, or is not a checkpoint") from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]  # as Lightning nests it
    if not isinstance(content, Mapping):
        raise ModelError(f"{path} holds no tensors by name")
    return content
