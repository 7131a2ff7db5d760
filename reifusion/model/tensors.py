"""Files of tensors: reading them one tensor at a time without running what they hold, and writing them whole.

No code in a file is ever run, and every complaint is a `ModelError` of one sentence.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


class ModelError(ValueError):
    """What is wrong with a model's file, in one sentence."""


def write_tensors(tensors: Mapping[str, Tensor], path: Path, header: Mapping[str, str] | None = None) -> None:
    """Writes a `.safetensors` that others may read as far as the user's umask lets them."""
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, None if header is None else dict(header))  # for the owner's eyes only
    path.chmod(mode)


class TensorFile:
    """A file of tensors: opening it reads the header, `read` one tensor."""

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

    def read(self, name: str, device: str | torch.device, dtype: torch.dtype | None) -> Tensor:
        """One tensor, converted; a convolution's weights with their channels last in memory."""
        # The file is mapped into memory. All that was read of it counts as used until the mapping is closed,
        # so it is closed now and then; otherwise a whole checkpoint would be in memory beside the networks.
        if self._get is None or self._mapped > self._size // 32:
            self._get, self._mapped = None, 0
            self._get = self._reopen()
        tensor = self._get(name).detach()
        self._mapped += tensor.nbytes
        # At once in the order in which convolutions are fastest, instead of once more afterwards.
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
        self.shapes = {name: x.shape for name, x in tensors.items()}
        self.dtypes = {name: x.dtype for name, x in tensors.items()}
        return tensors.__getitem__


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
}


class _Inert:
    """Stands in for what PyTorch Lightning leaves in a checkpoint beside the weights; does nothing."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass


def _unpickle(path: Path) -> Mapping[str, Any]:
    """A `.ckpt`, `.pt` or `.bin` -> its tensors by name, left on disk until used. Nothing in it is run."""
    zipped = zipfile.is_zipfile(path)  # since PyTorch 1.6; the older format cannot be mapped into memory
    stand_ins: list[Any] = []
    try:
        if zipped:
            for name in torch.serialization.get_unsafe_globals_in_checkpoint(path):
                if not name.startswith(("pytorch_lightning.", "lightning.")):
                    raise ModelError(f"{path} holds code ({name}) beside its tensors and was not opened")
                stand_ins.append((_Inert, name))
        mapped = zipped and path.suffix != ".safetensors"  # with that name, torch.load trusts the name
        with torch.serialization.safe_globals(stand_ins), open(path, "rb") as stream:
            content = torch.load(path if mapped else stream, "cpu", mmap=mapped, weights_only=True)
    except UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            raise ModelError(f"{path} holds code ({code[1]}) beside its tensors and was not opened") from None
        raise ModelError(f"{path} is not a checkpoint, or is damaged") from None
    except ModelError:
        raise
    except Exception as error:  # whatever the parser stumbles over
        raise ModelError(f"{path} is cut off or damaged, or is not a checkpoint") from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]  # Lightning's
    if not isinstance(content, Mapping):
        raise ModelError(f"{path} holds no tensors by name")
    return content
