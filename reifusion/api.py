"""The way in: `load` finds a model and makes it ready, `generate` draws with one call."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast, overload

import torch
from PIL import Image
from torch import Tensor

from . import families, kernels, sampling, weights  # noqa: F401  # sampling adds samplers
from .model import first_call
from .model.asked import Prompt, Rest
from .model.first_call import Networks
from .model.pictures import Picture
from .model.pipeline import StableDiffusion, Step
from .model.sentences import shown
from .shortcuts.deepcache import deepcached

if TYPE_CHECKING:
    from typing_extensions import Unpack

Device: TypeAlias = torch.device | str | None

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


def load(
    source: str | os.PathLike = "mini",
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    *,
    vae: str | os.PathLike | None = None,
    unet: str | os.PathLike | None = None,
    prediction_type: str | None = None,
    compile: bool = False,
    idle_device: torch.device | str | None = None,
    ema: bool = False,
) -> StableDiffusion:
    """A model, ready to draw.

    source: "mini", a .safetensors or .ckpt file, a folder of diffusers, or a hub id "owner/name".
    device: None for the best there is. dtype: a torch.dtype, "bf16", "fp16", "fp32" or "fp64"; None for the
    one that suits the device. vae, unet: where to find another VAE or U-Net for the model. prediction_type:
    what the U-Net predicts, "epsilon", "v_prediction" or "flow"; None for what the model's file says.
    compile: the first picture of each size takes much longer, and those after it less time. idle_device:
    where networks are loaded, and wait while they do not work; None: all are on `device`. ema: the moving
    averages of the U-Net's weights are taken, of a file that has both; `ModelError` if it has none.
    Raises ValueError, in one sentence, for a source that is no model (`ModelError`), and for a device or a
    dtype that does not exist.
    """
    device = find_device(device)
    idle = None if idle_device is None else find_device(idle_device)
    model, vae, unet = (None if path is None else os.fspath(path) for path in (source, vae, unet))
    changes = weights.Changes(prediction_type, vae, unet, ema)
    config, models, tokenizer = weights.load(
        cast(str, model), idle or device, find_dtype(dtype, device), changes=changes
    )
    for network in models.values():
        # The order in memory in which convolutions are fastest.
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    kernels.install(models, compile)
    return families.adapted(StableDiffusion(config, tokenizer, models, device, idle))


def find_device(device: torch.device | str | None) -> torch.device:
    """Returns the device of that name, or the best there is. Raises ValueError if this machine lacks it."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device is None:
        return torch.device(next(name for name, there in available.items() if there))
    try:
        device = torch.device(device)
    except RuntimeError:
        raise ValueError(f"there is no device {shown(device)}; there are {', '.join(available)}") from None
    try:
        there = available.get(device.type, device.type != "meta")  # which holds shapes and no numbers
        torch.empty(0, device=device if there else "cpu")
    except Exception:  # each kind of device has errors of its own
        there = False
    if not there:
        raise ValueError(f"PyTorch finds no {device} device on this machine")
    return device


def find_dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    """Returns the dtype of that name, or the one that suits the device. Raises ValueError for others."""
    if dtype is None:
        # On CPUs bfloat16 is only fast where it is built in, as AVX-512 or AMX.
        built_in = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
        dtype = {"cuda": "fp16", "cpu": "bf16" if built_in else "fp32"}.get(device.type, "fp32")
    for short, known in DTYPES.items():
        if dtype in (short, known, str(known).removeprefix("torch.")):
            return known
    raise ValueError(f"there is no dtype {shown(dtype)}; there are {', '.join(DTYPES)}")


@functools.lru_cache(maxsize=1)
def _mini(device: torch.device | str | None) -> StableDiffusion:
    return load(device=device)


@overload
def generate(  # type: ignore[overload-overlap]  # a text is also a sequence of texts
    prompt: str, uncond_prompt: Prompt | None = ..., input_image: Picture | None = ...,
    strength: float = ..., do_cfg: bool = ..., cfg_scale: float | None = ..., sampler_name: str | None = ...,
    n_inference_steps: int | None = ..., models: Networks | None = ..., seed: int | None = ...,
    device: Device = ..., idle_device: Device = ..., tokenizer: Any = ..., *, num_images: Literal[1] = ...,
    callback: Callable[[Step], Any] | None = ..., progress: bool = ..., deepcache: int = ...,
    **settings: Unpack[Rest],
) -> Image.Image: ...  # fmt: skip


@overload
def generate(  # type: ignore[overload-overlap]
    prompt: str, uncond_prompt: Prompt | None = ..., input_image: Picture | None = ...,
    strength: float = ..., do_cfg: bool = ..., cfg_scale: float | None = ..., sampler_name: str | None = ...,
    n_inference_steps: int | None = ..., models: Networks | None = ..., seed: int | None = ...,
    device: Device = ..., idle_device: Device = ..., tokenizer: Any = ..., *, num_images: int = ...,
    callback: Callable[[Step], Any] | None = ..., progress: bool = ..., deepcache: int = ...,
    **settings: Unpack[Rest],
) -> Image.Image | list[Image.Image]: ...  # fmt: skip


@overload
def generate(
    prompt: Sequence[str] | Tensor, uncond_prompt: Prompt | None = ..., input_image: Picture | None = ...,
    strength: float = ..., do_cfg: bool = ..., cfg_scale: float | None = ..., sampler_name: str | None = ...,
    n_inference_steps: int | None = ..., models: Networks | None = ..., seed: int | None = ...,
    device: Device = ..., idle_device: Device = ..., tokenizer: Any = ..., *, num_images: int = ...,
    callback: Callable[[Step], Any] | None = ..., progress: bool = ..., deepcache: int = ...,
    **settings: Unpack[Rest],
) -> list[Image.Image]: ...  # fmt: skip


def generate(*args: Any, deepcache: int = 1, **settings: Any) -> Image.Image | list[Image.Image]:
    call = inspect.signature(first_call.generate).bind(*args, **settings)
    asked = call.arguments
    models, device = asked.get("models"), asked.get("device")
    if models is None:
        models = _mini(device)
    elif isinstance(models, Mapping):
        models = families.adapted(first_call.of_networks(models, asked.get("tokenizer")))
        if device is None and asked.get("idle_device") is not None:
            device = find_device(None)
    asked["models"] = deepcached(models, deepcache)
    asked["device"] = None if device is None else find_device(device)
    return first_call.generate(*call.args, **call.kwargs)


functools.update_wrapper(generate, first_call.generate)  # so that it has its signature, and says what it says
