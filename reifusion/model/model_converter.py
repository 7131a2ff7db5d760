"""The names of tensors: ours, CompVis's (one `.ckpt`) and diffusers's (a folder), by one table.

`TABLE` says what the parts of each kind of block are called, `blocks` where the blocks stand; together
they are the list of renaming rules, which is read from left to right and from right to left alike.

A whole model in one dictionary: ours has "clip.…", "encoder.…", "decoder.…", "diffusion.…"; CompVis has
"cond_stage_model.…", "first_stage_model.…", "model.diffusion_model.…"; diffusers has the folders' names,
"text_encoder.…", "vae.…", "unet.…".
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import CLIPConfig, ModelConfig, ScheduleConfig, UNetConfig, VAEConfig
from .diffusion import Layer, plan
from .tensors import ModelError

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

[guidance]
guidance.weight         cond_proj.weight                    cond_proj.weight

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
proj_out                proj_out                            proj_out

[transformer layer]
norm_1                  norm1                               norm1
self_attention.qkv      attn1.to_{q,k,v}                    attn1.to_{q,k,v}
self_attention.out      attn1.to_out.0                      attn1.to_out.0
norm_2                  norm2                               norm2
cross_attention.q       attn2.to_q                          attn2.to_q
cross_attention.kv      attn2.to_{k,v}                      attn2.to_{k,v}
cross_attention.out     attn2.to_out.0                      attn2.to_out.0
norm_3                  norm3                               norm3
feed_forward.linear_1   ff.net.0.proj                       ff.net.0.proj
feed_forward.linear_2   ff.net.2                            ff.net.2

[down]
conv                    op                                  conv

[up]
conv                    conv                                conv

[conv]
-                       -                                   -
"""


def blocks(config: ModelConfig) -> Iterator[tuple[str, str, str, str]]:
    """Every block of a model: its kind (a section of `TABLE`) and its name: ours, CompVis's, diffusers's."""
    cv, df = "cond_stage_model.transformer.text_model", "text_encoder.text_model"
    yield "clip", "clip", cv, df
    for i in range(config.clip.layers):
        yield "clip layer", f"clip.layers.{i}", f"{cv}.encoder.layers.{i}", f"{df}.encoder.layers.{i}"

    levels, layers = len(config.vae.channels), config.vae.layers
    for half, side, number in ("encoder", "down", layers), ("decoder", "up", layers + 1):
        cv, df = f"first_stage_model.{half}", f"vae.{half}"
        yield "vae", half, cv, df
        yield "vae res", f"{half}.middle.0", f"{cv}.mid.block_1", f"{df}.mid_block.resnets.0"
        yield "vae attention", f"{half}.middle.1", f"{cv}.mid.attn_1", f"{df}.mid_block.attentions.0"
        yield "vae res", f"{half}.middle.2", f"{cv}.mid.block_2", f"{df}.mid_block.resnets.1"
        for i in range(levels):
            # CompVis counts the decoder's levels from the picture's side; we and diffusers, as they are run.
            cv_level = f"{cv}.{side}.{i if half == 'encoder' else levels - 1 - i}"
            df_level = f"{df}.{side}_blocks.{i}"
            for k in range(number):
                yield "vae res", f"{half}.{side}.{i}.{k}", f"{cv_level}.block.{k}", f"{df_level}.resnets.{k}"
            resample = f"{cv_level}.{side}sample", f"{df_level}.{side}samplers.0"
            yield "up", f"{half}.{side}.{i}.{number}", *resample
    yield "conv", "encoder.quant", "first_stage_model.quant_conv", "vae.quant_conv"
    yield "conv", "decoder.post_quant", "first_stage_model.post_quant_conv", "vae.post_quant_conv"

    cv = "model.diffusion_model"
    yield "unet", "diffusion", cv, "unet"
    if config.unet.guidance_width is not None:
        yield "guidance", "diffusion.time_embedding", f"{cv}.time_embed", "unet.time_embedding"
    down, middle, up = plan(config.unet)
    for side, theirs, rows in ("down", "input_blocks", down), ("up", "output_blocks", up):
        for i, row in enumerate(rows):
            # We and CompVis count all rows; diffusers counts in each level, row 0 of the way down in none.
            level, k = divmod(i - (side == "down"), config.unet.layers + 1)
            for j, layer in enumerate(row):
                places = {"res": f"resnets.{k}", "attention": f"attentions.{k}"}
                place = places.get(layer.kind, f"{layer.kind}samplers.0")
                df = "unet.conv_in" if layer.kind == "conv" else f"unet.{side}_blocks.{level}.{place}"
                yield from _layer_blocks(layer, f"diffusion.{side}.{i}.{j}", f"{cv}.{theirs}.{i}.{j}", df)
    counts: Counter[str] = Counter()
    for j, layer in enumerate(middle):
        kind = {"res": "resnets", "attention": "attentions"}[layer.kind]
        df = f"unet.mid_block.{kind}.{counts[kind]}"
        yield from _layer_blocks(layer, f"diffusion.middle.{j}", f"{cv}.middle_block.{j}", df)
        counts[kind] += 1


def _layer_blocks(layer: Layer, ours: str, cv: str, df: str) -> Iterator[tuple[str, str, str, str]]:
    """A layer of the U-Net, and the transformer layers in it."""
    yield layer.kind, ours, cv, df
    for d in range(layer.depth):
        inner = f"transformer_blocks.{d}"
        yield "transformer layer", f"{ours}.layers.{d}", f"{cv}.{inner}", f"{df}.{inner}"


# Our configs and the `config.json`s of diffusers: our field, their key, and what its absence means.
# An equals sign in place of a field: here it has always that value, and a file with another is refused.
CONFIGS = """
ours                their key                 absent

[text_encoder]
vocab_size          vocab_size
context_length      max_position_embeddings   77
width               hidden_size
layers              num_hidden_layers
heads               num_attention_heads
activation          hidden_act                "quick_gelu"
=                   layer_norm_eps            1e-05

[vae]
in_channels         in_channels
latent_channels     latent_channels
channels            block_out_channels
layers              layers_per_block
groups              norm_num_groups           32
scale_factor        scaling_factor            0.18215
=                   act_fn                    "silu"
=                   mid_block_add_attention   true
=                   shift_factor              null
=                   use_post_quant_conv       true
=                   use_quant_conv            true

[unet]
in_channels         in_channels
out_channels        out_channels
channels            block_out_channels
layers              layers_per_block
heads               attention_head_dim        8
context_width       cross_attention_dim
groups              norm_num_groups           32
linear_projection   use_linear_projection     false
guidance_width      time_cond_proj_dim        null
=                   act_fn                    "silu"
=                   addition_embed_type       null
=                   center_input_sample       false
=                   class_embed_type          null
=                   downsample_padding        1
=                   dual_cross_attention      false
=                   encoder_hid_dim           null
=                   flip_sin_to_cos           true
=                   freq_shift                0
=                   mid_block_scale_factor    1
=                   norm_eps                  1e-05
=                   num_attention_heads       null
=                   num_class_embeds          null
=                   only_cross_attention      false
=                   resnet_time_scale_shift   "default"
attention           transformer_layers_per_block  1

[scheduler]
num_training_steps  num_train_timesteps
beta_start          beta_start
beta_end            beta_end
beta_schedule       beta_schedule
prediction_type     prediction_type           "epsilon"
zero_terminal_snr   rescale_betas_zero_snr    false
original_inference_steps  original_inference_steps  50
=                   trained_betas             null

[flow scheduler]
num_training_steps  num_train_timesteps
=                   invert_sigmas             false
=                   shift                     1.0
=                   shift_terminal            null
=                   use_dynamic_shifting      false
"""
FLOW_SCHEDULER = "FlowMatchEulerDiscreteScheduler"  # the one class there that has no β

# In the files, and of no use here: the schedule's constants, moving averages of the weights, what was needed
# in training only, the safety checker, and the parts of CLIP that Stable Diffusion leaves out.
HARMLESS = re.compile(
    r"(betas|alphas_cumprod\w*|sqrt_\w+|log_one_minus_\w+|posterior_\w+|logvar|lvlb_weights|scale_factor)$"
    r"|model_ema\.|first_stage_model\.loss\.|safety_checker\.|feature_extractor\."
    r"|(.*\.)?(position_ids|logit_scale|text_projection(\.\w+)?|visual_projection\.\w+)$|(.*\.)?vision_model\."
)

# Other spellings of the same names, found in the wild.
ALIASES = (
    # ours, when an attention block had one transformer layer
    (
        r"(diffusion\.(?:(?:down|up)\.\d+|middle)\.1)\.(?=norm_\d|self_attention|cross_attention|feed_forward)",
        r"\1.layers.0.",
    ),
    # transformers 5 saves a CLIPTextModel without `text_model.`
    (r"(cond_stage_model\.transformer|text_encoder)\.(?=embeddings|encoder|final_layer)", r"\1.text_model."),
    # diffusers before 0.15, in the VAE's attention
    (r"(vae\.\w+\.mid_block\.attentions\.0)\.query\.", r"\1.to_q."),
    (r"(vae\.\w+\.mid_block\.attentions\.0)\.key\.", r"\1.to_k."),
    (r"(vae\.\w+\.mid_block\.attentions\.0)\.value\.", r"\1.to_v."),
    (r"(vae\.\w+\.mid_block\.attentions\.0)\.proj_attn\.", r"\1.to_out.0."),
)

# An LCM has this one tensor more.
GUIDANCE = re.compile(r"time_embed(ding)?\.(cond_proj|guidance)\.weight$")

# How a format is recognised.
MARKS = {
    "native": r"clip\.embedding\.|diffusion\.|encoder\.quant\.|decoder\.post_quant\.",
    "compvis": r"cond_stage_model\.|first_stage_model\.|model\.diffusion_model\.",
    "diffusers": r"text_encoder\.|vae\.|unet\.",
}

# Names that are counted to know the blocks of a checkpoint: ours, CompVis's, diffusers's. #: any number,
# *: anything.
COUNTS = {
    "clip_layers": ("clip.layers.#", "*.text_model.encoder.layers.#", "*.text_model.encoder.layers.#"),
    "vae_levels": ("encoder.down.#", "*_model.encoder.down.#", "vae.encoder.down_blocks.#"),
    "vae_layers": (
        "encoder.down.0.#.norm_1",
        "*_model.encoder.down.0.block.#",
        "vae.encoder.down_blocks.0.resnets.#",
    ),
    "halvings": (
        "diffusion.down.#.0.conv.",
        "*_model.input_blocks.#.0.op",
        "unet.down_blocks.#.downsamplers",
    ),
    "unet_layers": (
        "diffusion.down.#.0.conv_1",
        "*_model.input_blocks.#.0.in_layers",
        "unet.down_blocks.#.resnets.#",
    ),
    "transformers": (
        "diffusion.down.#.1.layers.#.",
        "*_model.input_blocks.#.1.transformer_blocks.#.",
        "unet.down_blocks.#.attentions.0.transformer_blocks.#.",
    ),
    "middle": (
        "diffusion.middle.1.layers.#.",
        "*_model.middle_block.1.transformer_blocks.#.",
        "unet.mid_block.attentions.0.transformer_blocks.#.",
    ),
}


@dataclass(frozen=True)
class Rule:
    """One of our tensors, and the one or more of theirs that it is made of."""

    ours: str
    theirs: tuple[str, ...]
    pointwise: bool = False  # a linear layer here, a 1×1 convolution in some files
    convolution: bool = False  # a linear layer here, a 1×1 convolution in files of this format

    def merge(self, parts: list[Tensor]) -> Tensor:
        """Theirs -> ours."""
        if self.pointwise:
            parts = [x.flatten(1) if x.ndim == 4 else x for x in parts]  # (C, C, 1, 1) -> (C, C)
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def split(self, tensor: Tensor) -> list[Tensor]:
        """Ours -> theirs."""
        if self.convolution:
            tensor = tensor[:, :, None, None]  # (C, C) -> (C, C, 1, 1)
        if len(self.theirs) == 1:
            return [tensor]
        return [part.clone() for part in tensor.chunk(len(self.theirs))]  # a file must not hold views


def _sections(table: str) -> dict[str, list[list[str]]]:
    sections = (section.split("]") for section in table.split("\n[")[1:])
    return {kind: [row.split() for row in rows.splitlines() if row] for kind, rows in sections}


def rules(config: ModelConfig, format: str) -> list[Rule]:
    """Every renaming rule between our names and a format's. Of the config, only the structure counts."""
    if format not in FORMATS:
        raise ModelError(f"there is no format {format!r}; the formats are {', '.join(FORMATS)}")
    column, linear = FORMATS.index(format), config.unet.linear_projection
    table, found = _sections(TABLE), []
    for kind, *names in blocks(config):
        for row in table[kind]:
            ours, theirs = (f"{names[c]}.{row[c]}".removesuffix(".-") for c in (0, column))
            group = re.search(r"\{(.*)\}", theirs)
            parts = [theirs.replace(group[0], x) for x in group[1].split(",")] if group else [theirs]
            if row[1].endswith(".weight"):
                found.append(Rule(ours, tuple(parts)))
                continue
            for suffix in (".weight", ".bias"):
                pointwise = (
                    kind in ("vae attention", "attention") and suffix == ".weight" and row[0] != "norm"
                )
                convolution = pointwise and (
                    format == "compvis" if kind == "vae attention" else format != "native" and not linear
                )
                theirs_with = tuple(part + suffix for part in parts)
                found.append(Rule(ours + suffix, theirs_with, pointwise, convolution))
    return found


def detect(names: Collection[str]) -> str:
    """The format that a checkpoint's names belong to."""
    for format, mark in MARKS.items():
        if any(re.match(mark, name) for name in names):
            return format
    raise ModelError("these are not the tensors of a Stable Diffusion model in any format known here")


def structure(names: Collection[str], format: str) -> ModelConfig:
    """How many blocks of what kind a model has, counted from its names; the sizes in it mean nothing."""
    numbers: dict[str, set[tuple[str, ...]]] = {}  # what is counted -> the different numbers found at its #
    for what, patterns in COUNTS.items():
        escaped = re.escape(patterns[FORMATS.index(format)])
        pattern = re.compile(escaped.replace(r"\#", r"(\d+)").replace(r"\*", ".*"))
        numbers[what] = {m.groups() for name in names if (m := pattern.match(name))}
    levels, vae_levels = len(numbers["halvings"]) + 1, len(numbers["vae_levels"])
    layers = len(numbers["unet_layers"]) // levels
    # A row's number tells its level, as in `blocks`; diffusers's names have the level itself.
    per_row = 1 if format == "diffusers" else layers + 1
    transformers = {((int(i) - (format != "diffusers")) // per_row, d) for i, d in numbers["transformers"]}
    depths = Counter(level for level, _ in transformers)
    config = ModelConfig()
    return replace(
        config,
        clip=replace(config.clip, layers=len(numbers["clip_layers"])),
        vae=replace(config.vae, channels=(0,) * vae_levels, layers=len(numbers["vae_layers"])),
        unet=replace(
            config.unet,
            channels=(0,) * levels,
            attention=tuple(depths[level] for level in range(levels)),
            middle_attention=len(numbers["middle"]),
            heads=(0,) * levels,
            layers=layers,
            guidance_width=0 if any(GUIDANCE.search(name) for name in names) else None,
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
        missing = [part for part in rule.theirs if part not in spelling]
        if there and missing:
            raise ModelError(f"tensor {missing[0]} is missing, though {there[0]} is there")
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
        raise ModelError(f"{len(unknown)} tensors have no place in the model, first {unknown[0]}")
    native = {rule.ours: rule.merge([state_dict[name] for name in rule.theirs]) for rule in matched}
    if to == "native":
        return native
    theirs: dict[str, Tensor] = {}
    for rule in rules(config or structure(native, "native"), to):
        if rule.ours in native:
            theirs |= zip(rule.theirs, rule.split(native[rule.ours]), strict=True)
    return theirs


def load_from_standard_weights(
    path: str | Path, device: str | torch.device = "cpu"
) -> dict[str, dict[str, Tensor]]:
    """A checkpoint in any format -> the state dicts of "clip", "encoder", "decoder" and "diffusion"."""
    from . import model_loader  # it stands on this file

    return model_loader.read_states(path, device)


def _config_sections(flow: bool) -> dict[str, list[list[str]]]:
    """`CONFIGS` with the schedule that is meant, either of β or of a flow."""
    sections = _sections(CONFIGS)
    of_flow = sections.pop("flow scheduler")
    return sections | {"scheduler": of_flow} if flow else sections


def config_from_diffusers(jsons: Mapping[str, Mapping[str, Any]], name: str = "diffusers") -> ModelConfig:
    """The contents of the `config.json`s in text_encoder/, vae/, unet/ and scheduler/ -> our config."""
    fields: dict[str, dict[str, Any]] = {}
    flow = jsons["scheduler"].get("_class_name") == FLOW_SCHEDULER
    for part, rows in _config_sections(flow).items():
        fields[part] = {}
        for field, key, *absent in rows:
            if key not in jsons[part] and not absent:
                raise ModelError(f"the config of its {part} lacks {key}")
            value = jsons[part].get(key, json.loads(absent[0]) if absent else None)
            if field != "=":
                fields[part][field] = tuple(value) if isinstance(value, list) else value
            elif value != json.loads(absent[0]):
                raise ModelError(f"its {part} has {key} = {value!r}, which is not built in")
    if flow:
        fields["scheduler"]["prediction_type"] = "flow"
    elif jsons["scheduler"].get("timestep_spacing") == "trailing":  # else it is the samplers' own here
        implied = fields["scheduler"]["zero_terminal_snr"]
        fields["scheduler"]["timestep_spacing"] = None if implied else "trailing"
    unet, kinds = fields["unet"], jsons["unet"]["down_block_types"]
    for field, key in (("heads", "attention_head_dim"), ("attention", "transformer_layers_per_block")):
        value = unet[field]  # one number for all levels, or one for each
        unet[field] = value if isinstance(value, tuple) else (value,) * len(kinds)
        if len(unet[field]) != len(kinds) or not all(isinstance(n, int) for n in unet[field]):
            raise ModelError(f"its unet has {key} = {value!r}, which does not fit its {len(kinds)} levels")
    unet["middle_attention"] = unet["attention"][-1]
    unet["attention"] = tuple(n if "CrossAttn" in kind else 0 for n, kind in zip(unet["attention"], kinds))
    vae = VAEConfig(**fields["vae"])
    return ModelConfig(
        name=name,
        size=(jsons["unet"].get("sample_size") or 64) * vae.factor,
        clip=CLIPConfig(**fields["text_encoder"]),
        vae=vae,
        unet=UNetConfig(**unet),
        schedule=ScheduleConfig(**fields["scheduler"]),
    )


def config_to_diffusers(config: ModelConfig) -> dict[str, dict[str, Any]]:
    """Our config -> the contents of the `config.json`s of diffusers, by folder."""
    ours = {"text_encoder": config.clip, "vae": config.vae, "unet": config.unet, "scheduler": config.schedule}
    jsons: dict[str, dict[str, Any]] = {part: {} for part in ours}
    flow = config.schedule.prediction_type == "flow"
    for part, rows in _config_sections(flow).items():
        for field, key, *value in rows:
            jsons[part][key] = json.loads(value[0]) if field == "=" else getattr(ours[part], field)
    heads, attention, levels = config.unet.heads, config.unet.attention, len(config.vae.channels)
    jsons["text_encoder"] |= {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "intermediate_size": 4 * config.clip.width,
        "bos_token_id": config.clip.vocab_size - 2,
        "eos_token_id": config.clip.vocab_size - 1,
        "pad_token_id": config.clip.vocab_size - 1,
    }
    jsons["vae"] |= {
        "_class_name": "AutoencoderKL",
        "out_channels": config.vae.in_channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "sample_size": config.size,
    }
    jsons["unet"] |= {
        "_class_name": "UNet2DConditionModel",
        "down_block_types": ["CrossAttnDownBlock2D" if here else "DownBlock2D" for here in attention],
        "up_block_types": ["CrossAttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attention)],
        "sample_size": config.size // config.vae.factor,
    }
    # The key's name is a mistake of diffusers: it is the number of heads.
    jsons["unet"]["attention_head_dim"] = heads[0] if len(set(heads)) == 1 else list(heads)
    # The middle has as many transformer layers as the last entry says, whether that level has any or not.
    depths = [*(depth or 1 for depth in attention[:-1]), config.unet.middle_attention]
    if attention[-1] not in (0, depths[-1]):
        raise ModelError("its middle has another depth than its last level, which diffusers cannot express")
    jsons["unet"]["transformer_layers_per_block"] = depths[0] if len(set(depths)) == 1 else depths
    if flow:
        jsons["scheduler"]["_class_name"] = FLOW_SCHEDULER
        return jsons
    if config.unet.guidance_width is not None:
        jsons["scheduler"]["_class_name"] = "LCMScheduler"
        return jsons
    del jsons["scheduler"]["original_inference_steps"]  # which the other schedulers do not know
    jsons["scheduler"] |= {  # SD 1.x's own sampler; a pipeline can be given another
        "_class_name": "DDIMScheduler" if config.schedule.zero_terminal_snr else "PNDMScheduler",
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "clip_sample": False,  # for the samplers that would, by default, clip x̂₀ to [−1, 1]
        "steps_offset": 1,
    }
    if config.schedule.zero_terminal_snr or config.schedule.timestep_spacing:
        jsons["scheduler"]["timestep_spacing"] = "trailing"
    return jsons
