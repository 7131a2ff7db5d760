"""ControlNets in files: with the names of their authors, and with those of diffusers; both are written too.

The names of a ControlNet's way down are those of the U-Net that it was made from, so the table in
`model_converter.py` serves it; `OWN` has the rest.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import families, kernels
from ..families.sdxl_unet import SDXLUNetConfig
from ..files import whole
from ..model.config import ModelConfig, UNetConfig
from ..model.diffusers_folder import open_weights
from ..model.diffusion import UNet
from ..model.family import without_memory
from ..model.model_converter import FORMATS, Rule, rules
from ..model.pipeline import StableDiffusion
from ..model.tensors import ModelError, Stored, TensorFile
from .controlnet import ControlNet
from .t2i_adapter import MARK, T2IAdapter, load_t2i_adapter

# What the names of a U-Net in a whole model begin with, and what a ControlNet's begin with in its place
UNET = {"compvis": ("model.diffusion_model.", "control_model."), "diffusers": ("unet.", "")}
# How the names of a file are recognised
MARKS = {"compvis": r"(control_model\.)?input_hint_block\.", "diffusers": r"controlnet_cond_embedding\."}
# Layers that a U-Net lacks: ours, CompVis's and diffusers's. A # stands for a number.
OWN = (
    ("outs.#", "zero_convs.#.0", "controlnet_down_blocks.#"),
    ("middle_out", "middle_block_out.0", "controlnet_mid_block"),
)
# Relatives, by the name of a tensor, to say what they are
RELATIVES = (
    (r"lora_controlnet$", "a Control-LoRA, which is not built in"),
    (r"difference$", "the difference of a ControlNet and a model, which is not built in"),
    (
        r"(.*\.)?(task_embedding|control_add_embedding\.)",
        "a ControlNet for several kinds of hints, which is not built in",
    ),
    (r"image_proj\.|ip_adapter\.", "an IP-Adapter, which has an option of its own"),
    (
        r"transformer_blocks\.\d+\.(attn|ff_context|norm1_context)",
        "a ControlNet for Stable Diffusion 3, which is not built in",
    ),
)


def load_control(source: str | Path, pipe: StableDiffusion, fast: bool = True) -> ControlNet | T2IAdapter:
    """Reads a ControlNet, or a T2I-Adapter, for a model, to the model's device and dtype.

    source: a `.safetensors` file or a pickle, with the names of its authors or of diffusers, or a folder of
    diffusers. fast: installs the fast forms of its layers. Raises ModelError, in one sentence, for a file
    that is no ControlNet, is damaged, or was made for another kind of model.
    """
    path = Path(source).expanduser()
    if not path.exists():
        raise ModelError(f"there is no file or folder {path}")
    tensors = open_weights(path) if path.is_dir() else TensorFile(path).tensors()
    for pattern, what in RELATIVES:
        if any(re.match(pattern, name) for name in tensors):
            raise ModelError(f"{path} is {what}")
    if any(re.match(MARK, name) for name in tensors):
        return load_t2i_adapter(tensors, path, pipe)
    format = next((key for key, mark in MARKS.items() if any(re.match(mark, name) for name in tensors)), None)
    if format is None:
        raise ModelError(f"{path} is not a ControlNet: it has no layers that look at a hint")
    before = UNET[format][1]
    named = {before + name.removeprefix(before): tensor for name, tensor in tensors.items()}
    unet = pipe.models["diffusion"]
    if not isinstance(unet, UNet):
        raise ModelError(f"{path} is for models with a U-Net, which {pipe.config.name} does not have")
    config, channels = _config(named, format, pipe.config), _channels(named, format)
    if (pixels := 2 ** (len(channels) - 1)) != pipe.config.vae.factor * pipe.config.unet.patch:
        wrong = f"its hints have {pixels} pixels at a latent's side, and not {pipe.config.vae.factor}"
        raise ModelError(f"{path} is no ControlNet for {pipe.config.name}: {wrong}")
    net = without_memory(lambda: {"control": _empty(config, channels)})["control"]
    assert isinstance(net, ControlNet)
    state, expected = {}, net.state_dict()
    every = control_rules(net, config, format)
    for rule in every:
        there = [name for name in rule.theirs if name in named]
        if len(there) < len(rule.theirs):
            missing = next(name for name in rule.theirs if name not in named)
            raise ModelError(f"{path} is no ControlNet for {pipe.config.name}: it lacks {missing}")
        needs = [x.shape for x in replace(rule, convolution=False).split(expected[rule.ours])]
        for name, need in zip(rule.theirs, needs):
            shape = tuple(named[name].shape)
            if shape != tuple(need) and not (rule.pointwise and shape == (*need, 1, 1)):
                wrong = f"{name} has shape {shape}, and not {tuple(need)}"
                raise ModelError(f"{path} is no ControlNet for {pipe.config.name}: {wrong}")
        state[rule.ours] = rule.merge([named[name].read(pipe.device, pipe.dtype) for name in rule.theirs])
    used = {name for rule in every for name in rule.theirs}
    if unknown := [name for name in named if name not in used]:
        raise ModelError(
            f"{path} has {len(unknown)} tensors that are no part of a ControlNet, first {unknown[0]}"
        )
    net.load_state_dict(state, assign=True)
    net.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if fast:
        kernels.install({"control": net})
    return net


def save_control(net: ControlNet, config: ModelConfig, path: str | Path, format: str = "diffusers") -> None:
    """Writes a ControlNet of a model's. format: "diffusers", or "compvis", the names of its authors."""
    theirs: dict[str, Tensor] = {}
    state = net.state_dict()
    for rule in control_rules(net, replace(config, unet=net.config), format):
        theirs |= zip(rule.theirs, rule.split(state[rule.ours]), strict=True)
    with whole(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in theirs.items()}, temporary, {"format": "pt"})


def control_rules(net: ControlNet, config: ModelConfig, format: str) -> list[Rule]:
    """Returns the rules between the tensors of a ControlNet and those of a file, all of which are needed."""
    whole_model, own = UNET[format]
    layout, found = families.family_of(config).layout, []
    expected = net.state_dict()
    for rule in rules(config, format, layout=layout):
        ours = rule.ours.removeprefix("diffusion.")
        if ours != rule.ours and ours in expected:
            names = tuple(own + name.removeprefix(whole_model) for name in rule.theirs)
            found.append(replace(rule, ours=ours, theirs=names))
    column, last = FORMATS.index(format), len(net.hint) - 1
    for i in range(len(net.hint)):
        if format == "compvis":
            theirs = f"{own}input_hint_block.{2 * i}"
        else:
            place = {0: "conv_in", last: "conv_out"}.get(i, f"blocks.{i - 1}")
            theirs = f"controlnet_cond_embedding.{place}"
        found += [Rule(f"hint.{i}.{x}", (f"{theirs}.{x}",)) for x in ("weight", "bias")]
    for row in OWN:
        for i in range(len(net.outs) if "#" in row[0] else 1):
            ours, theirs = (row[c].replace("#", str(i)) for c in (0, column))
            found += [Rule(f"{ours}.{x}", (f"{own}{theirs}.{x}",)) for x in ("weight", "bias")]
    return found


def _empty(config: ModelConfig, channels: list[int]) -> nn.Module:
    unet = families.build(config)["diffusion"]
    assert isinstance(unet, UNet)
    return ControlNet(unet, channels)


def _channels(named: Mapping[str, Stored], format: str) -> list[int]:
    """Returns the channels of the hint's encoder: of its first layer, and of each that halves the size."""
    pattern = {
        "compvis": r"control_model\.input_hint_block\.(\d+)\.weight",
        "diffusers": r"controlnet_cond_embedding\.blocks\.(\d+)\.weight",
    }[format]
    step = 2 if format == "compvis" else 1
    sizes = {
        int(m[1]) // step: tensor.shape[0]
        for name, tensor in named.items()
        if (m := re.fullmatch(pattern, name))
    }
    if format == "diffusers":
        first = named.get("controlnet_cond_embedding.conv_in.weight")
        sizes = {i + 1: size for i, size in sizes.items()} | (
            {0: first.shape[0]} if first is not None else {}
        )
    else:
        sizes.pop(max(sizes, default=0), None)  # the last one leads to the U-Net's width
    return [size for i, size in sorted(sizes.items()) if i % 2 == 0] or [1]


def _config(names: Collection[str], format: str, config: ModelConfig) -> ModelConfig:
    """Returns the model's config, with as many transformer layers as the file has: there are smaller ones."""
    before, own = UNET[format][0], UNET[format][1]
    layout = families.family_of(config).layout
    counted = layout.structure([before + name.removeprefix(own) for name in names], format).unet
    assert isinstance(counted, UNetConfig)
    unet = replace(
        config.unet,
        attention=counted.attention,
        middle_attention=counted.middle_attention,
        in_channels=config.vae.latent_channels,
    )
    if isinstance(unet, SDXLUNetConfig):
        unet = replace(unet, up=())  # a ControlNet has no way up
    return replace(config, unet=unet)
