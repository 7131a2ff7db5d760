"""The names of tensors: ours, CompVis's (one `.ckpt`) and diffusers's (a folder), by one table.

`TABLE` says what the parts of each kind of block are called, `blocks` where the blocks stand; together
they are the list of renaming rules, which is read from left to right and from right to left alike.

A whole model in one dictionary: ours has "clip.…", "encoder.…", "decoder.…", "diffusion.…"; CompVis has
"cond_stage_model.…", "first_stage_model.…", "model.diffusion_model.…"; diffusers has the folders' names,
"text_encoder.…", "vae.…", "unet.…".
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from .config import ModelConfig
from .diffusion import plan

FORMATS = ("native", "compvis", "diffusers")
NETWORKS = ("clip", "encoder", "decoder", "diffusion")

# One section per kind of block. {q,k,v}: three tensors there are one here, stacked in that order.
# A dash is the block itself. What ends in `.weight` is a single tensor; all else has .weight and .bias.
TABLE = """
ours                    CompVis                             diffusers

[clip]
embedding.token         embeddings.token_embedding          embeddings.token_embedding
embedding.position      embeddings.position_embedding.weight  embeddings.position_embedding.weight
norm                    final_layer_norm                    final_layer_norm

[clip layer]
norm_1                  layer_norm1                         layer_norm1
attention.qkv           self_attn.{q,k,v}_proj              self_attn.{q,k,v}_proj
attention.out           self_attn.out_proj                  self_attn.out_proj
norm_2                  layer_norm2                         layer_norm2
linear_1                mlp.fc1                             mlp.fc1
linear_2                mlp.fc2                             mlp.fc2

[vae]
conv_in                 conv_in                             conv_in
norm                    norm_out                            conv_norm_out
conv_out                conv_out                            conv_out

[vae res]
norm_1                  norm1                               norm1
conv_1                  conv1                               conv1
norm_2                  norm2                               norm2
conv_2                  conv2                               conv2
skip                    nin_shortcut                        conv_shortcut

[vae attention]
norm                    norm                                group_norm
attention.qkv           {q,k,v}                             to_{q,k,v}
attention.out           proj_out                            to_out.0

[unet]
time_embedding.linear_1 time_embed.0                        time_embedding.linear_1
time_embedding.linear_2 time_embed.2                        time_embedding.linear_2
norm                    out.0                               conv_norm_out
conv_out                out.2                               conv_out

[res]
norm_1                  in_layers.0                         norm1
conv_1                  in_layers.2                         conv1
time                    emb_layers.1                        time_emb_proj
norm_2                  out_layers.0                        norm2
conv_2                  out_layers.3                        conv2
skip                    skip_connection                     conv_shortcut

[attention]
norm                    norm                                norm
proj_in                 proj_in                             proj_in
norm_1                  transformer_blocks.0.norm1          transformer_blocks.0.norm1
self_attention.qkv      transformer_blocks.0.attn1.to_{q,k,v}  transformer_blocks.0.attn1.to_{q,k,v}
self_attention.out      transformer_blocks.0.attn1.to_out.0  transformer_blocks.0.attn1.to_out.0
norm_2                  transformer_blocks.0.norm2          transformer_blocks.0.norm2
cross_attention.q       transformer_blocks.0.attn2.to_q     transformer_blocks.0.attn2.to_q
cross_attention.kv      transformer_blocks.0.attn2.to_{k,v}  transformer_blocks.0.attn2.to_{k,v}
cross_attention.out     transformer_blocks.0.attn2.to_out.0  transformer_blocks.0.attn2.to_out.0
norm_3                  transformer_blocks.0.norm3          transformer_blocks.0.norm3
feed_forward.linear_1   transformer_blocks.0.ff.net.0.proj  transformer_blocks.0.ff.net.0.proj
feed_forward.linear_2   transformer_blocks.0.ff.net.2       transformer_blocks.0.ff.net.2
proj_out                proj_out                            proj_out

[down]
conv                    op                                  conv

[up]
conv                    conv                                conv

[conv]
-                       -                                   -
"""


def blocks(config: ModelConfig) -> Iterator[tuple[str, str, str, str]]:
    """Every block of a model: its kind (a section of `TABLE`) and its name, ours, CompVis's and diffusers's."""
    text = "cond_stage_model.transformer.text_model", "text_encoder.text_model"
    yield "clip", "clip", *text
    for i in range(config.clip.layers):
        yield "clip layer", f"clip.layers.{i}", f"{text[0]}.encoder.layers.{i}", f"{text[1]}.encoder.layers.{i}"

    levels, layers = len(config.vae.channels), config.vae.layers
    for half in ("encoder", "decoder"):
        theirs = f"first_stage_model.{half}", f"vae.{half}"
        yield "vae", half, *theirs
        yield "vae res", f"{half}.middle.0", f"{theirs[0]}.mid.block_1", f"{theirs[1]}.mid_block.resnets.0"
        yield "vae attention", f"{half}.middle.1", f"{theirs[0]}.mid.attn_1", f"{theirs[1]}.mid_block.attentions.0"
        yield "vae res", f"{half}.middle.2", f"{theirs[0]}.mid.block_2", f"{theirs[1]}.mid_block.resnets.1"
        side, number = ("down", layers) if half == "encoder" else ("up", layers + 1)
        for i in range(levels):
            # CompVis counts the decoder's levels from the picture; we and diffusers from the latents.
            level = i if half == "encoder" else levels - 1 - i
            cv, df = f"{theirs[0]}.{side}.{level}", f"{theirs[1]}.{side}_blocks.{i}"
            for k in range(number):
                yield "vae res", f"{half}.{side}.{i}.{k}", f"{cv}.block.{k}", f"{df}.resnets.{k}"
            yield "up", f"{half}.{side}.{i}.{number}", f"{cv}.{side}sample", f"{df}.{side}samplers.0"
    yield "conv", "encoder.quant", "first_stage_model.quant_conv", "vae.quant_conv"
    yield "conv", "decoder.post_quant", "first_stage_model.post_quant_conv", "vae.post_quant_conv"

    yield "unet", "diffusion", "model.diffusion_model", "unet"
    down, middle, up = plan(config.unet)
    for side, blocks_, rows in ("down", "input_blocks", down), ("up", "output_blocks", up):
        for row, row_layers in enumerate(rows):
            # Rows are counted through; diffusers counts within a level. Row 0 of the way down is before all levels.
            level, k = divmod(row - (side == "down"), config.unet.layers + 1)
            for j, (kind, *_) in enumerate(row_layers):
                where = {"res": f"resnets.{k}", "attention": f"attentions.{k}"}.get(kind, f"{kind}samplers.0")
                df = "unet.conv_in" if kind == "conv" else f"unet.{side}_blocks.{level}.{where}"
                yield kind, f"diffusion.{side}.{row}.{j}", f"model.diffusion_model.{blocks_}.{row}.{j}", df
    for j, where in enumerate(("resnets.0", "attentions.0", "resnets.1")):
        cv, df = f"model.diffusion_model.middle_block.{j}", f"unet.mid_block.{where}"
        yield middle[j][0], f"diffusion.middle.{j}", cv, df


# In the files, and of no use here: the schedule's constants, moving averages of the weights, what was needed
# in training only, the safety checker, and the parts of CLIP that Stable Diffusion leaves out.
HARMLESS = re.compile(
    r"(betas|alphas_cumprod\w*|sqrt_\w+|log_one_minus_\w+|posterior_\w+|logvar|lvlb_weights|scale_factor)$"
    r"|model_ema\.|first_stage_model\.loss\.|safety_checker\.|feature_extractor\."
    r"|(.*\.)?(position_ids|logit_scale|text_projection(\.\w+)?|visual_projection\.\w+)$|(.*\.)?vision_model\."
)

# Other spellings of the same names, found in the wild.
ALIASES = (
    # transformers 5 saves a CLIPTextModel without `text_model.`
    (r"(cond_stage_model\.transformer|text_encoder)\.(embeddings|encoder|final_layer_norm)\.", r"\1.text_model.\2."),
    # diffusers before 0.15, in the VAE's attention
    (r"(vae\.\w+\.mid_block\.attentions\.0)\.query\.", r"\1.to_q."),
    (r"(vae\.\w+\.mid_block\.attentions\.0)\.key\.", r"\1.to_k."),
    (r"(vae\.\w+\.mid_block\.attentions\.0)\.value\.", r"\1.to_v."),
    (r"(vae\.\w+\.mid_block\.attentions\.0)\.proj_attn\.", r"\1.to_out.0."),
)

# How a format is recognised.
MARKS = {
    "native": r"clip\.embedding\.|diffusion\.|encoder\.quant\.|decoder\.post_quant\.",
    "compvis": r"cond_stage_model\.|first_stage_model\.|model\.diffusion_model\.",
    "diffusers": r"text_encoder\.|vae\.|unet\.",
}


class ModelError(ValueError):
    """What is wrong with a model's file, in one sentence."""


@dataclass(frozen=True)
class Rule:
    """One of our tensors, and the one or more of theirs that it is made of."""

    ours: str
    theirs: tuple[str, ...]
    pointwise: bool = False  # a linear layer here, a 1×1 convolution in some files

    def merge(self, parts: list[Tensor]) -> Tensor:
        """Theirs -> ours."""
        if self.pointwise:
            parts = [part.flatten(1) if part.ndim == 4 else part for part in parts]  # (C, C, 1, 1) -> (C, C)
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def split(self, tensor: Tensor, format: str) -> list[Tensor]:
        """Ours -> theirs."""
        if self.pointwise and format == "compvis":
            tensor = tensor[:, :, None, None]  # (C, C) -> (C, C, 1, 1)
        if len(self.theirs) == 1:
            return [tensor]
        return [part.clone() for part in tensor.chunk(len(self.theirs))]  # a file must not hold views


def _table() -> dict[str, list[list[str]]]:
    sections: dict[str, list[list[str]]] = {}
    for section in TABLE.split("[")[1:]:
        kind, rows = section.split("]")
        sections[kind] = [row.split() for row in rows.splitlines() if row.strip()]
    return sections


def rules(config: ModelConfig, format: str) -> list[Rule]:
    """Every renaming rule between our names and those of a format. Of the config only the structure counts."""
    if format not in FORMATS:
        raise ModelError(f"there is no format {format!r}; the formats are {', '.join(FORMATS)}")
    column = FORMATS.index(format)
    table, found = _table(), []
    for kind, *names in blocks(config):
        for row in table[kind]:
            ours, theirs = (f"{names[c]}.{row[c]}".removesuffix(".-") for c in (0, column))
            group = re.search(r"\{(.*)\}", theirs)
            parts = [theirs.replace(group[0], x) for x in group[1].split(",")] if group else [theirs]
            if row[1].endswith(".weight"):
                ending = "" if column == 0 else ".weight"
                found.append(Rule(ours, tuple(part.removesuffix(".weight") + ending for part in parts)))
                continue
            for suffix in (".weight", ".bias"):
                pointwise = kind == "vae attention" and suffix == ".weight" and row[0] != "norm"
                found.append(Rule(ours + suffix, tuple(part + suffix for part in parts), pointwise))
    return found


def detect(names: Collection[str]) -> str:
    """The format that a checkpoint's names belong to."""
    for format, mark in MARKS.items():
        if any(re.match(mark, name) for name in names):
            return format
    raise ModelError("these are not the tensors of a Stable Diffusion model in any format known here")


def structure(names: Collection[str], format: str) -> ModelConfig:
    """How many blocks of what kind a model has, counted from its names; the sizes in it mean nothing."""

    def found(*patterns: str) -> set[str]:  # the distinct places of a block; one pattern per format
        pattern = re.compile(patterns[FORMATS.index(format)])
        return {m[1] for name in names if (m := pattern.match(name))}

    unet = r"model\.diffusion_model\.input_blocks"
    text_layers = found(
        r"clip\.layers\.(\d+)\.", r"cond_stage_model\..*\.layers\.(\d+)\.", r"text_encoder\..*\.layers\.(\d+)\."
    )
    vae_levels = found(
        r"encoder\.down\.(\d+)\.", r"first_stage_model\.encoder\.down\.(\d+)\.", r"vae\.encoder\.down_blocks\.(\d+)\."
    )
    vae_layers = found(
        r"encoder\.down\.0\.(\d+)\.norm_1\.",
        r"first_stage_model\.encoder\.down\.0\.block\.(\d+)\.",
        r"vae\.encoder\.down_blocks\.0\.resnets\.(\d+)\.",
    )
    halvings = found(
        r"diffusion\.down\.(\d+)\.0\.conv\.", rf"{unet}\.(\d+)\.0\.op\.", r"unet\.down_blocks\.(\d+)\.downsamplers\."
    )
    res = found(
        r"diffusion\.down\.(\d+)\.0\.conv_1\.",
        rf"{unet}\.(\d+)\.0\.in_layers\.",
        r"unet\.down_blocks\.(\d+\.resnets\.\d+)\.",
    )
    attention = found(
        r"diffusion\.down\.(\d+)\.1\.", rf"{unet}\.(\d+)\.1\.", r"unet\.down_blocks\.(\d+)\.attentions\."
    )
    levels = len(halvings) + 1
    layers = len(res) // levels
    at = {int(x) if format == "diffusers" else (int(x) - 1) // (layers + 1) for x in attention}
    base = ModelConfig()
    return replace(
        base,
        clip=replace(base.clip, layers=len(text_layers)),
        vae=replace(base.vae, channels=(0,) * len(vae_levels), layers=len(vae_layers)),
        unet=replace(
            base.unet,
            channels=(0,) * levels,
            layers=layers,
            attention=tuple(level in at for level in range(levels)),
        ),
    )


def match(names: Collection[str], config: ModelConfig | None = None) -> tuple[str, list[Rule], list[str]]:
    """A checkpoint's names -> its format, the rules that lead from them to ours, and the names no rule knows.

    The rules have the names as the checkpoint spells them. Harmless names are not among the unknown.
    """
    spelling = {}
    for name in names:
        tidy = name
        for pattern, new in ALIASES:
            tidy = re.sub(rf"^{pattern}", new, tidy)
        spelling[tidy] = name
    format = detect(spelling)
    matched, used = [], set()
    for rule in rules(config or structure(spelling, format), format):
        there = [part for part in rule.theirs if part in spelling]
        if 0 < len(there) < len(rule.theirs):
            raise ModelError(f"tensor {next(p for p in rule.theirs if p not in there)} is missing beside {there[0]}")
        if there:
            matched.append(replace(rule, theirs=tuple(spelling[part] for part in there)))
            used.update(there)
    unknown = [spelling[name] for name in spelling if name not in used and not HARMLESS.match(name)]
    return format, matched, unknown


def convert(
    state_dict: Mapping[str, Tensor], to: str = "native", config: ModelConfig | None = None
) -> dict[str, Tensor]:
    """A model's tensors under the names of another format: "native", "compvis" or "diffusers".

    The format it comes from is recognised. Nothing is computed, so a way there and back is bit-exact;
    what is not part of the model (`HARMLESS`) is left out.
    """
    _, matched, unknown = match(state_dict, config)
    if unknown:
        raise ModelError(f"tensor {unknown[0]} has no place in this model (and {len(unknown) - 1} more like it)")
    native = {rule.ours: rule.merge([state_dict[name] for name in rule.theirs]) for rule in matched}
    if to == "native":
        return native
    theirs: dict[str, Tensor] = {}
    for rule in rules(config or structure(native, "native"), to):
        if rule.ours in native:
            theirs.update(zip(rule.theirs, rule.split(native[rule.ours], to)))
    return theirs


def load_from_standard_weights(path: str | Path, device: str | torch.device = "cpu") -> dict[str, dict[str, Tensor]]:
    """A checkpoint in any format -> the state dicts of "clip", "encoder", "decoder" and "diffusion"."""
    from . import model_loader  # it stands on this file

    return model_loader.read_states(path, device)
