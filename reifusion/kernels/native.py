"""Our own attention kernel, `attention.c`, compiled when it is first needed, where it beats PyTorch's.

It does on CPUs with AVX-512 BF16 and without AMX, which PyTorch's kernel uses: a step of SD 1.5 takes three
fifths of the time there. Where there is no compiler, or it fails, or REIFUSION_NATIVE=0 forbids it, PyTorch's
kernel does the work: slower, and the same to the last bits of bfloat16.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from ..model import attention as textbook
from .fast import inferring

SOURCE = Path(__file__).with_name("attention.c")
# Named one by one, not -march=native, so that the library runs on every CPU that passes `_suits`.
FLAGS = ["-O3", "-shared", "-fPIC", "-fopenmp", "-mfma"]
FLAGS += ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16"]


class _View(ctypes.Structure):
    """`View` in attention.c: where a (B, heads, L, d) tensor lies in memory."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("head", ctypes.c_int64),
        ("row", ctypes.c_int64),
    )


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """`model.attention.attention` by the faster of the two kernels, for the slot of an attention layer."""
    if inferring() and not causal and (out := flash_attention(q, k, v)) is not None:
        return out
    return textbook.attention(q, k, v, causal)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, log_sums: Tensor | None = None) -> Tensor | None:
    """q (B, h, L, d), k and v (B, h, S, d) -> (B, h, L, d); None where `attention.c` does not apply.

    log_sums (B, h, L), float32: takes log₂ Σ e^score of each query, which `gradients` needs.
    """
    if not applies(q, k, v):
        return None
    library, out = _library(), _rows_like(q)
    assert library is not None
    to = (out.data_ptr(), None if log_sums is None else log_sums.data_ptr())
    sizes = (*q.shape[:3], *k.shape[2:], torch.get_num_threads())
    if library.attention(*map(_view, (q, k, v)), *to, *sizes):
        raise MemoryError("could not allocate memory for attention")
    return out.transpose(1, 2)


def applies(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """True if `attention.c` is made for these tensors, and for this CPU."""
    fits = k.shape == v.shape and q.shape[:2] == k.shape[:2] and q.shape[-1] == k.shape[-1]
    if not fits or q.shape[-1] % 2 or q.shape[-1] > 512 or 0 in (*q.shape, *k.shape):
        return False
    return all(_flat(x) for x in (q, k, v)) and _library() is not None


def gradients(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients for q, k and v, if `grad` is that for the `out` of `flash_attention`; shapes as there."""
    library = _library()
    assert library is not None  # it has made `out`
    given = [x if _flat(x) else x.bfloat16().contiguous() for x in (q, k, v, out, grad)]
    found = [_rows_like(x) for x in (q, k, v)]
    to = (log_sums.data_ptr(), *(x.data_ptr() for x in found))
    sizes = (*q.shape[:3], *k.shape[2:], torch.get_num_threads())
    if library.attention_gradients(*map(_view, given), *to, *sizes):
        raise MemoryError("could not allocate memory for the gradients of attention")
    to_q, to_k, to_v = (x.transpose(1, 2) for x in found)
    return to_q, to_k, to_v


def _flat(x: Tensor) -> bool:
    """True if the numbers of a row lie side by side, as bfloat16 and on the CPU."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.stride(-1) == 1


def _rows_like(x: Tensor) -> Tensor:
    """(B, h, L, d) -> room for (B, L, h, d), in which the next layer reads it"""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3])


def _view(x: Tensor) -> _View:
    return _View(x.data_ptr(), *x.stride()[:3])


@functools.cache
def _library() -> ctypes.CDLL | None:
    """Compiles attention.c, once for all processes; None where that is impossible or of no use."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang"))), None)
    if not _suits() or compiler is None or os.environ.get("REIFUSION_NATIVE") == "0":
        return None
    name = hashlib.sha256(SOURCE.read_bytes() + " ".join(FLAGS).encode()).hexdigest()[:16]
    try:
        path = _cache() / f"attention-{name}.so"
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                made = Path(folder, path.name)
                command = [compiler, *FLAGS, "-o", str(made), str(SOURCE), "-lm"]
                subprocess.run(command, check=True, capture_output=True, timeout=60)
                made.chmod(0o700)
                made.replace(path)  # whole, or not there
        if not (_private(path.parent) and _private(path)):
            return None
        library = ctypes.CDLL(str(path))
    except (OSError, RuntimeError, subprocess.SubprocessError):  # RuntimeError: there is no home
        return None
    sizes: list[type] = [ctypes.c_int64] * 5 + [ctypes.c_int]
    library.attention.argtypes = [_View] * 3 + [ctypes.c_void_p] * 2 + sizes
    library.attention_gradients.argtypes = [_View] * 5 + [ctypes.c_void_p] * 4 + sizes
    return library


def _suits() -> bool:
    """True if this CPU can run the kernel and has no AMX, with which PyTorch's own kernel is faster."""
    bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    return os.name == "posix" and bf16 and not getattr(torch.cpu, "_is_amx_tile_supported", bool)()


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "reifusion", "native")


def _private(path: Path) -> bool:
    """True if only this user can have written the path. A library is executed when it is loaded."""
    facts = path.stat()
    return facts.st_uid == os.getuid() and not facts.st_mode & 0o022
