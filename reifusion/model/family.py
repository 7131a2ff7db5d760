"""A family of models: how its files are recognised and read, and what is built from them.

Loading and saving are the same for all families, and are handed one. `STABLE_DIFFUSION` is that of versions
1.x and 2.x.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .clip import CLIP
from .config import MINI, SD15, SD21, CLIPConfig, ModelConfig
from .decoder import Decoder
from .diffusers_folder import PARTS, config_from_diffusers, config_to_diffusers, model_index
from .diffusion import UNet
from .encoder import Encoder
from .model_converter import LAYOUT, Layout, structure
from .pipeline import StableDiffusion
from .prediction import Prediction
from .tensors import ModelError, Stored
from .tokenizer import END, Tokenizer
from .tokenizer_folder import read_tokenizer, write_tokenizer

Shapes = Mapping[str, torch.Size]  # of all tensors, under our names


class FromShapes(NamedTuple):
    """A config that a file's shapes told, and how it is known what the U-Net predicts."""

    config: ModelConfig
    known_from: str = "nothing in the file says otherwise"


@dataclass(frozen=True)
class Family:
    """What loading and saving need to know of a family of models."""

    name: str  # as in the header of our files
    layout: Layout  # the names in its files
    folders: tuple[str, ...]  # those with weights in a folder of diffusers; a model may lack some of them
    config: type[ModelConfig]
    recognises: Callable[[Collection[str]], bool]  # by names of tensors, or of files in a folder of diffusers
    from_shapes: Callable[[Shapes, Prediction | None], FromShapes]  # which is told what a file's signs say
    from_diffusers: Callable[[Mapping[str, Mapping[str, Any]], str], ModelConfig]  # of the JSONs, and a name
    to_diffusers: Callable[[Any], dict[str, dict[str, Any]]]  # of a config: the JSONs, by folder
    index: Callable[[Any], dict[str, Any]]  # of a config: what model_index.json says beside the parts
    build: Callable[[Any], dict[str, nn.Module]]  # of a config: its networks on "meta", shapes without memory
    read_tokenizer: Callable[[Path, Mapping[str, str], Any], Any]  # of a path, a file's header, and a config
    write_tokenizer: Callable[[Any, Path, Any], None]  # into a folder of diffusers, for a config
    suited: Callable[[Any], ModelConfig]  # of a config: the same, with the settings that its pictures need
    pipeline: Callable[[Any], type[StableDiffusion]]  # of a config: what draws with it
    # of a path and its tensors: all tensors of the model, under their usual names, in files beside it too
    completed: Callable[[Path, dict[str, Stored]], dict[str, Stored]] = lambda path, tensors: tensors
    # of a config and the path of a VAE, which is taken in place of its own: the config that goes with it
    with_vae: Callable[[Any, Path], ModelConfig] = lambda config, path: config
    header: Callable[[Any], dict[str, str]] = lambda tokenizer: {}  # of a tokenizer: more for a file's header


# What is built


class _Unfilled(TorchFunctionMode):
    """Skips `torch.nn.init`, which on "meta" would fill nothing and yet import PyTorch's compiler."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__module__", None) != "torch.nn.init":
            return function(*args, **(kwargs or {}))
        return None


def without_memory(make: Callable[[], dict[str, nn.Module]]) -> dict[str, nn.Module]:
    """Makes networks on PyTorch's "meta" device: shapes without memory."""
    with _Unfilled(), torch.device("meta"):
        return make()


def build(config: ModelConfig, unet: type[UNet] = UNet) -> dict[str, nn.Module]:
    """Returns the networks of a config on PyTorch's "meta" device: shapes without memory."""
    return without_memory(
        lambda: {
            "clip": CLIP(config.clip),
            "encoder": Encoder(config.vae),
            "decoder": Decoder(config.vae),
            "diffusion": unet(config.unet),
        }
    )


# What the shapes of a file tell


PRESETS = (SD15, SD21, MINI)  # the preset with the same shapes supplies what shapes cannot tell


def from_shapes(
    shapes: Shapes, told: Prediction | None = None, presets: Sequence[ModelConfig] = PRESETS
) -> FromShapes:
    """Finds the config of a file by its shapes. The preset with the same shapes supplies the rest."""
    for preset in presets:
        config = like(preset, shapes)
        # A vocabulary may have grown. A U-Net may be given more than latents (9 channels: inpainting, 8:
        # editing by words), or the guidance scale.
        same_clip = replace(config.clip, vocab_size=preset.clip.vocab_size) == preset.clip
        usual = replace(config.unet, in_channels=preset.unet.in_channels, guidance_width=None)
        same_unet = usual == preset.unet
        if same_clip and same_unet and config.vae == preset.vae and config.unet.in_channels in (4, 8, 9):
            return _which_sd2(config, told) if preset is SD21 else FromShapes(config)
    raise ModelError(
        "it has the shapes of no known model, and shapes alone are not enough: it needs a config"
    )


def like(preset: ModelConfig, shapes: Shapes, kind: ModelConfig | None = None) -> ModelConfig:
    """Returns a preset with the sizes of these shapes.

    kind: how many blocks there are of each, as `structure` says.
    """

    def size(name: str, axis: int) -> int:
        return size_of(shapes, name, axis)

    kind = kind or structure(shapes, "native")
    vae_levels, unet_levels = range(len(kind.vae.channels)), range(len(kind.unet.channels))
    rows = [1 + level * (kind.unet.layers + 1) for level in unet_levels]
    vae: dict[str, Any] = {
        "in_channels": size("encoder.conv_in.weight", 1),
        "latent_channels": size("decoder.post_quant.weight", 0),
        "channels": tuple(size(f"encoder.down.{i}.0.conv_1.weight", 0) for i in vae_levels),
        "layers": kind.vae.layers,
    }
    words = next((name for name in shapes if name.endswith(".cross_attention.kv.weight")), "")
    unet: dict[str, Any] = {
        "in_channels": size("diffusion.down.0.0.weight", 1) // preset.unet.patch**2,
        "out_channels": size("diffusion.conv_out.weight", 0) // preset.unet.patch**2,
        "channels": tuple(size(f"diffusion.down.{row}.0.conv_1.weight", 0) for row in rows),
        "attention": kind.unet.attention,
        "middle_attention": kind.unet.middle_attention,
        "middle": kind.unet.middle,
        "layers": kind.unet.layers,
        "context_width": size(words, 1),
        "guidance_width": None if kind.unet.guidance_width is None else size(GUIDANCE_WEIGHT, 1),
    }
    return replace(
        preset,
        clip=clip_like(preset.clip, shapes, "clip", kind.clip.layers),
        vae=replace(preset.vae, **vae),
        unet=replace(preset.unet, **unet),
    )


def clip_like(preset: CLIPConfig, shapes: Shapes, name: str, layers: int) -> CLIPConfig:
    """Returns a text encoder's preset with the sizes of these shapes, and with that many layers."""
    vocabulary = size_of(shapes, f"{name}.embedding.token.weight", 0)
    length, width = (size_of(shapes, f"{name}.embedding.position", axis) for axis in (0, 1))
    return replace(preset, vocab_size=vocabulary, context_length=length, width=width, layers=layers)


GUIDANCE_WEIGHT = "diffusion.time_embedding.guidance.weight"


def size_of(shapes: Shapes, name: str, axis: int) -> int:
    """Returns the size of a tensor along an axis. Raises ModelError if it is not there."""
    if len(shapes.get(name, ())) <= axis:
        raise ModelError(f"it lacks {name}")
    return shapes[name][axis]


def _which_sd2(config: ModelConfig, told: Prediction | None) -> FromShapes:
    """Tells the models of 2.x for 512x512, which predict the noise, from those for 768x768, and says how."""
    if config.unet.in_channels == config.vae.latent_channels and not (told and told.type == "epsilon"):
        return FromShapes(config, "usual for 2.x; the models for 512x512 need --prediction-type epsilon")
    schedule = replace(config.schedule, prediction_type="epsilon")
    return FromShapes(replace(config, size=512, schedule=schedule), "usual for inpainting")


def suited(config: ModelConfig) -> ModelConfig:
    """Returns a config with the settings that its pictures need."""
    if config.unet.guidance_width is not None:  # as Luo et al. 2023 draw with their LCMs
        return replace(config, sampler="lcm", steps=4, cfg=8.0)
    if config.schedule.timestep_spacing == "trailing" and config.schedule.prediction_type == "epsilon":
        return replace(config, sampler="euler", steps=4, cfg=1.0)  # SD-Turbo (Sauer et al. 2023)
    return config


# The tokenizer


def tokenizer_of(path: Path, header: Mapping[str, str], config: ModelConfig) -> Tokenizer:
    """Reads the tokenizer of a file, by its header, or of a folder of diffusers."""
    clip = config.clip
    if path.is_dir():
        return read_tokenizer(path / "tokenizer", clip.context_length)
    vocabulary = json.loads(header.get("vocabulary", "null"))
    open_clip = clip.activation == "gelu" and "config" not in header
    pad = header.get("pad", "!" if open_clip else END)  # as 2.x was trained
    merges, exact = header.get("tokenizer"), json.loads(header.get("exact", "[]"))
    return Tokenizer(merges, clip.context_length, vocabulary=vocabulary, pad=pad, exact=exact)


STABLE_DIFFUSION = Family(
    name="stable-diffusion",
    layout=LAYOUT,
    folders=PARTS,
    config=ModelConfig,
    recognises=lambda names: True,  # all that no other family has
    from_shapes=from_shapes,
    from_diffusers=config_from_diffusers,
    to_diffusers=config_to_diffusers,
    index=model_index,
    build=build,
    read_tokenizer=tokenizer_of,
    write_tokenizer=lambda tokenizer, folder, config: write_tokenizer(tokenizer, folder / "tokenizer"),
    suited=suited,
    pipeline=lambda config: StableDiffusion,
)
