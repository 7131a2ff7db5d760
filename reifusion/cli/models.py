"""`reifusion info` and `reifusion convert`: what is in a file, and the same model in another format."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..files import named, writable

if TYPE_CHECKING:
    from ..model.config import CLIPConfig, ScheduleConfig


def info(
    file: Annotated[str, typer.Argument(help="A model, or a picture drawn here.", show_default=False)],
) -> None:
    """Says what is in a file: a model's format and sizes, or a picture's settings."""
    for name, value in (_of_picture if file.lower().endswith(".png") else _of_model)(file).items():
        print(f"{name:12} {value}")


def _of_picture(file: str) -> dict[str, Any]:
    from .. import album

    return album.read(file).carried()


def _of_model(file: str) -> dict[str, Any]:
    from .. import weights
    from ..model.tensors import ModelError

    try:
        found = weights.info(file)
    except ModelError:
        if part := _of_part(file):
            return part
        raise
    config, schedule, numbers = found.config, found.config.schedule, found.parameters
    return {
        "file": found.path,
        "format": found.format,
        "model": f"{config.name}, for pictures of {config.size}x{config.size}",
        "size": f"{found.size / 1e6:,.1f} MB, {found.dtype}",
        "parameters": f"{sum(numbers.values()):,}",
        **{f"  {name}": f"{number:,}" for name, number in numbers.items()},
        "memory": _memory(numbers),
        "text": "; and ".join(_text(clip) for clip in (config.clip, getattr(config, "clip_2", None)) if clip),
        "vae": f"1/{config.vae.factor} of each side, {config.vae.latent_channels} channels",
        **_denoiser(config.unet),
        "schedule": _schedule(schedule, found.prediction_known_from),
        **({"not used": _named(found.unused)} if found.unused else {}),
        **found.metadata,
    }


def _text(clip: CLIPConfig) -> str:
    return f"{clip.layers} layers of {clip.width}, {clip.vocab_size:,} tokens"


def _memory(numbers: Mapping[str, int]) -> str:
    """How much the weights take, and how much the largest network, where idle ones wait on another device."""
    whole, most = sum(numbers.values()), max(numbers.values())
    sizes = f"{2 * whole / 1e6:,.0f} MB of weights in 16 bits, {4 * whole / 1e6:,.0f} in 32"
    return f"{sizes}; with an idle device, {most / whole:.0%} of that"


def _denoiser(sizes: Any) -> dict[str, str]:
    """What there is to say of a U-Net, or of the transformer in its place."""
    if hasattr(sizes, "channels"):
        channels, depths = (" ".join(map(str, x)) for x in (sizes.channels, sizes.attention))
        return {"unet": f"channels {channels}, transformer layers {depths}"}
    return {"transformer": f"{sizes.layers} blocks of {sizes.width}, patches of {sizes.patch}x{sizes.patch}"}


def _of_part(file: str) -> dict[str, Any]:
    """What there is to say of a VAE or a U-Net in a file of its own; {} for any other file."""
    from ..families import SD3, SDXL, STABLE_DIFFUSION, taesd
    from ..model.model_converter import LAYOUT
    from ..model.part import PARTS, open_part
    from ..model.tensors import ModelError

    path = Path(os.path.expanduser(file))
    if not os.path.isfile(path):  # which, unlike Path's own, says no to a name that is too long
        return {}
    if tiny := taesd.sizes(path):
        return {
            "file": path,
            "format": "a tiny VAE (TAESD); to draw with it, name a model, and this file with --vae",
            "vae": f"1/{taesd.FACTOR} of each side, {tiny.channels} channels: for {tiny.fits}",
            "parameters": f"{tiny.parameters:,}",
        }
    kinds = [("vae", "VAE", LAYOUT), ("unet", "transformer", SD3.layout)]
    kinds += [("unet", "U-Net", family.layout) for family in (SDXL, STABLE_DIFFUSION)]
    for part, name, layout in kinds:
        try:
            tensors, rules, unknown, header = open_part(path, part, layout)
        except ModelError:
            continue
        numbers = dict.fromkeys(PARTS[part][0], 0)
        for rule in rules:
            numbers[rule.ours.split(".")[0]] += sum(tensors[x].shape.numel() for x in rule.theirs)
        alone = sum(len(rule.theirs) for rule in rules) + len(unknown) == len(tensors)
        if layout in (SD3.layout, SDXL.layout) and unknown:  # those of another family
            continue
        if alone and all(numbers.values()):
            return {
                "file": path,
                "format": f"a {name} alone; to draw with it, name a model, and this file with --{part}",
                "parameters": f"{sum(numbers.values()):,}",
                **{f"  {network}": f"{number:,}" for network, number in numbers.items()},
                **({"not used": _named(unknown)} if unknown else {}),
                **{key: value for key, value in header.items() if key != "format"},
            }
    return {}


def _schedule(schedule: ScheduleConfig, known_from: str) -> str:
    own = "βs of its own" if schedule.trained_betas else schedule.beta_schedule
    words = [] if schedule.prediction_type == "flow" else [own]
    words += [schedule.prediction_type, *(["zero terminal SNR"] if schedule.zero_terminal_snr else [])]
    words += [] if schedule.shift is None else [f"shift {schedule.shift:g}"]
    return f"{', '.join(words)} ({known_from})"


def _named(tensors: Sequence[str]) -> str:
    """a, b, c, d -> 4 of its tensors: a, b, c, …"""
    return f"{len(tensors)} of its tensors: {', '.join([*tensors[:3], *(['…'] if len(tensors) > 3 else [])])}"


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="The model to read.", show_default=False)],
    target: Annotated[str, typer.Argument(metavar="DST", help="What to write.", show_default=False)],
    to: Annotated[
        str, typer.Option(help="native, compvis (one file) or diffusers (a folder).", show_default=False)
    ],
    dtype: Annotated[
        str, typer.Option(help="fp32, fp16, bf16, or int8 (native alone).", show_default="as it is")
    ] = "",
    ema: Annotated[bool, typer.Option("--ema", help="Take the moving averages of the weights.")] = False,
) -> None:
    """Writes a model in another format, bit for bit unless --dtype says otherwise."""
    import torch

    from .. import weights
    from ..api import DTYPES

    dtypes = DTYPES | {"int8": torch.int8}
    check_target(target, to, dtype, dtypes)
    with writable(Path(target).parent):
        metadata = weights.info(source).metadata
        config, models, tokenizer = weights.load(source, changes=weights.Changes(ema=ema))
        weights.save(config, models, target, to, tokenizer, metadata, dtypes.get(dtype))
    print(target)


def check_target(target: str, to: str, dtype: str, dtypes: Collection[str]) -> None:
    """Raises ValueError for a file, a format or a number format that cannot be written."""
    from ..model.model_converter import FORMATS

    if dtype and dtype not in dtypes:
        raise ValueError(f"there is no dtype {dtype!r} to write; there are {', '.join(dtypes)}")
    if to not in FORMATS:
        raise ValueError(f"there is no format {to!r}; there are {', '.join(FORMATS)}")
    if to != "diffusers" and not target.endswith(".safetensors"):
        raise ValueError(f"the format {to} is a .safetensors file, not {target}")
    if named(target).exists():
        raise ValueError(f"{target} is there already, and nothing is overwritten")
