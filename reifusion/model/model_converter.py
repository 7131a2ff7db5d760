"""The names of tensors: ours, CompVis's (one `.ckpt`) and diffusers's (a folder), by one table.

`TABLE` names the layers of each kind of block, and `blocks` says where the blocks are. Together they give the
list of renaming rules, which works from left to right and from right to left alike.

In a dictionary with a whole model, our names begin with "clip.", "encoder.", "decoder." or "diffusion.";
CompVis's begin with "cond_stage_model.", "first_stage_model." or "model.diffusion_model."; diffusers's begin
with the name of the folder, "text_encoder.", "vae." or "unet.".
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .config import CLIPConfig, ModelConfig, UNetConfig, VAEConfig
from .diffusers_folder import open_folder
from .diffusion import Layer, plan
from .tensors import ModelError, TensorFile

FORMATS = ("native", "compvis", "diffusers")
NETWORKS = ("clip", "encoder", "decoder", "diffusion")  # without one of these, there is no model

# One section for each kind of block, one row for each of its layers. How a row is read:
#   {q,k,v}    three of their layers, stacked in this order, are one of ours
#   -          the block itself is the layer
#   ….weight   the row is this one tensor, as is ….bias, and a row that ends with "tensor"; every other row is
#              a layer, which has a .weight and perhaps a .bias
#   …ᵀ         their tensor is ours transposed
#   …⇅         of their tensor's rows, the second half is our first
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

[open clip]
embedding.token         token_embedding                     embeddings.token_embedding
embedding.position      positional_embedding                embeddings.position_embedding.weight
norm                    ln_final                            final_layer_norm

[open clip layer]
norm_1                  ln_1                                layer_norm1
attention.qkv.weight    attn.in_proj_weight                 self_attn.{q,k,v}_proj.weight
attention.qkv.bias      attn.in_proj_bias                   self_attn.{q,k,v}_proj.bias
attention.out           attn.out_proj                       self_attn.out_proj
norm_2                  ln_2                                layer_norm2
linear_1                mlp.c_fc                            mlp.fc1
linear_2                mlp.c_proj                          mlp.fc2

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

[vae resample]
conv                    conv                                conv

[conv]
-                       -                                   -
"""

# A block's kind, which is a section of `TABLE`, and its names: ours, CompVis's, diffusers's
Block = tuple[str, str, str, str]


def blocks(config: ModelConfig, open_clip: bool) -> Iterator[Block]:
    """Yields every block of a model. open_clip: CompVis's names of the text encoder are those of SD 2.x."""
    cv = "cond_stage_model.model" if open_clip else "cond_stage_model.transformer.text_model"
    yield from clip_blocks(config.clip, open_clip, "clip", cv, "text_encoder.text_model")
    yield from vae_blocks(config.vae)
    yield from unet_blocks(config.unet)


def clip_blocks(config: CLIPConfig, open_clip: bool, ours: str, cv: str, df: str) -> Iterator[Block]:
    """Yields the blocks of a text encoder, whose names begin so. open_clip: CompVis's are OpenCLIP's."""
    kind, layers = ("open clip", "transformer.resblocks") if open_clip else ("clip", "encoder.layers")
    yield kind, ours, cv, df
    for i in range(config.layers):
        yield f"{kind} layer", f"{ours}.layers.{i}", f"{cv}.{layers}.{i}", f"{df}.encoder.layers.{i}"


def vae_blocks(config: VAEConfig) -> Iterator[Block]:
    levels = len(config.channels)
    for half, side, layers in ("encoder", "down", config.layers), ("decoder", "up", config.layers + 1):
        cv, df = f"first_stage_model.{half}", f"vae.{half}"
        yield "vae", half, cv, df
        yield "vae res", f"{half}.middle.0", f"{cv}.mid.block_1", f"{df}.mid_block.resnets.0"
        yield "vae attention", f"{half}.middle.1", f"{cv}.mid.attn_1", f"{df}.mid_block.attentions.0"
        yield "vae res", f"{half}.middle.2", f"{cv}.mid.block_2", f"{df}.mid_block.resnets.1"
        for i in range(levels):
            # CompVis numbers the decoder's levels from the last to run; diffusers and we, from the first.
            level = f"{half}.{side}.{i}"
            cv_level = f"{cv}.{side}.{i if half == 'encoder' else levels - 1 - i}"
            df_level = f"{df}.{side}_blocks.{i}"
            for k in range(layers):
                yield "vae res", f"{level}.{k}", f"{cv_level}.block.{k}", f"{df_level}.resnets.{k}"
            resamplers = f"{cv_level}.{side}sample", f"{df_level}.{side}samplers.0"
            yield "vae resample", f"{level}.{layers}", *resamplers
    yield "conv", "encoder.quant", "first_stage_model.quant_conv", "vae.quant_conv"
    yield "conv", "decoder.post_quant", "first_stage_model.post_quant_conv", "vae.post_quant_conv"


def unet_blocks(config: UNetConfig) -> Iterator[Block]:
    cv = "model.diffusion_model"
    yield "unet", "diffusion", cv, "unet"
    if config.guidance_width is not None:
        yield "guidance", "diffusion.time_embedding", f"{cv}.time_embed", "unet.time_embedding"
    down, middle, up = plan(config)
    for side, theirs, rows in ("down", "input_blocks", down), ("up", "output_blocks", up):
        for i, row in enumerate(rows):
            # CompVis and we number all rows; diffusers numbers each level's own, and leaves out `conv_in`.
            level, k = divmod(i - (side == "down"), config.layers + 1)
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


def _layer_blocks(layer: Layer, ours: str, cv: str, df: str) -> Iterator[Block]:
    """Yields a layer of the U-Net and the transformer layers in it."""
    yield layer.kind, ours, cv, df
    for d in range(layer.depth):
        inner = f"transformer_blocks.{d}"
        yield "transformer layer", f"{ours}.layers.{d}", f"{cv}.{inner}", f"{df}.{inner}"


# How a tensor is turned into ours, and back, by the sign behind its name in `TABLE`.
TURNS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda x: x,
    "ᵀ": lambda x: x.T.contiguous(),
    "⇅": lambda x: torch.cat(x.chunk(2)[::-1]),
}


@dataclass(frozen=True)
class Rule:
    """One of our tensors, and the one or more of theirs that it is made of."""

    ours: str
    theirs: tuple[str, ...]
    pointwise: bool = False  # ours is linear, and files may hold it as a 1×1 convolution: both can be read
    convolution: bool = False  # files of this format do hold it as a 1×1 convolution: this is written
    turn: str = ""  # one of `TURNS`

    def merge(self, parts: list[Tensor]) -> Tensor:
        """Makes our tensor from theirs."""
        if self.pointwise:
            parts = [x.flatten(1) if x.ndim == 4 else x for x in parts]  # (C, C, 1, 1) -> (C, C)
        parts = [TURNS[self.turn](x) for x in parts]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def split(self, tensor: Tensor) -> list[Tensor]:
        """Makes their tensors from ours."""
        if self.convolution:
            tensor = tensor[:, :, None, None]  # (C, C) -> (C, C, 1, 1)
        if len(self.theirs) == 1:
            return [TURNS[self.turn](tensor)]
        return [TURNS[self.turn](part).clone() for part in tensor.chunk(len(self.theirs))]  # not views


# Which format and which blocks a checkpoint has


# Tensors that are not needed here: the schedule's constants, moving averages of the weights, the tensors of
# training, the safety checker, and the parts of CLIP that Stable Diffusion leaves out.
HARMLESS = re.compile(
    r"(betas|alphas_cumprod\w*|sqrt_\w+|log_one_minus_\w+|posterior_\w+|logvar|lvlb_weights|scale_factor)$"
    r"|(v_pred|ztsnr)$|model_ema\.|first_stage_model\.loss\.|safety_checker\.|feature_extractor\."
    r"|cond_stage_model\.model\.transformer\.resblocks\.23\."  # the last layer, whose output 2.x does not use
    r"|(.*\.)?(position_ids|logit_scale|text_projection(\.\w+)?|visual_projection\.\w+)$|(.*\.)?vision_model\."
)

# Spellings in the wild, and the names in `TABLE` that they stand for.
ALIASES = (
    # what PyTorch puts before the names of a network that is compiled or trained in parallel
    (r"((?:unet|vae|text_encoder|model\.diffusion_model)\.)?(?:module\.|_orig_mod\.)+", r"\1"),
    # our own, when an attention block had only one transformer layer
    (
        r"(diffusion\.(?:(?:down|up)\.\d+|middle)\.1)\.(?=norm_\d|self_attention|cross_attention|feed_forward)",
        r"\1.layers.0.",
    ),
    # transformers 5 saves a CLIPTextModel without `text_model.`
    (
        r"((?:cond_stage_model|conditioner\.embedders\.0)\.transformer|text_encoder)\.(?=embeddings|encoder|final_layer)",
        r"\1.text_model.",
    ),
    # diffusers before 0.15 named the layers of the VAE's attention differently
    (r"(vae\.\w+\.mid_block\.attentions\.0)\.query\.", r"\1.to_q."),
    (r"(vae\.\w+\.mid_block\.attentions\.0)\.key\.", r"\1.to_k."),
    (r"(vae\.\w+\.mid_block\.attentions\.0)\.value\.", r"\1.to_v."),
    (r"(vae\.\w+\.mid_block\.attentions\.0)\.proj_attn\.", r"\1.to_out.0."),
)

# Only larger relatives have these: a second text encoder, a U-Net that is told more, a transformer.
LARGER = r"conditioner\.|text_encoders\.|clip_2\.|.*(add_embedding|label_emb|label_1|joint_blocks)\."

# Only an LCM has this tensor.
GUIDANCE = re.compile(r"time_embed(ding)?\.(cond_proj|guidance)\.weight$")

# The names of SD 2.x's text encoder in CompVis's format begin like this.
OPEN_CLIP = r"cond_stage_model\.model\."

# How a format is recognised: one of its names begins like this.
MARKS = {
    "native": r"clip\.embedding\.|diffusion\.|encoder\.quant\.|decoder\.post_quant\.",
    "compvis": r"cond_stage_model\.|first_stage_model\.|model\.diffusion_model\.",
    "diffusers": r"text_encoder\.|vae\.|unet\.|transformer\.",
}

# A checkpoint's blocks are counted by these names: ours, CompVis's, diffusers's. A * stands for any text. A #
# stands for any number, and the count is that of the different numbers.
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
    "middle_attention": (
        "diffusion.middle.1.layers.#.",
        "*_model.middle_block.1.transformer_blocks.#.",
        "unet.mid_block.attentions.0.transformer_blocks.#.",
    ),
    "middle": ("diffusion.middle.#.", "*_model.middle_block.#.", "unet.mid_block.resnets.#."),
}


def detect(names: Collection[str]) -> str:
    """Returns the format that a checkpoint's names belong to."""
    for format, mark in MARKS.items():
        if any(re.match(mark, name) for name in names):
            return format
    raise ModelError("these are not the tensors of a Stable Diffusion model in any format known here")


def structure(names: Collection[str], format: str) -> ModelConfig:
    """Counts a model's blocks by its names. Returns a config with these counts, whose sizes mean nothing."""
    numbers: dict[str, set[tuple[str, ...]]] = {}  # the different numbers that each # of `COUNTS` stands for
    for what, patterns in COUNTS.items():
        escaped = re.escape(patterns[FORMATS.index(format)])
        pattern = re.compile(escaped.replace(r"\#", r"(\d+)").replace(r"\*", ".*"))
        numbers[what] = {m.groups() for name in names if (m := pattern.match(name))}
    levels, vae_levels = len(numbers["halvings"]) + 1, len(numbers["vae_levels"])
    layers = len(numbers["unet_layers"]) // levels
    # diffusers's names have the number of the level; the others have that of the row, as in `unet_blocks`.
    per_row = 1 if format == "diffusers" else layers + 1
    transformers = {((int(i) - (format != "diffusers")) // per_row, d) for i, d in numbers["transformers"]}
    depths = Counter(level for level, _ in transformers)
    config = ModelConfig()
    blocks = {m[1] for name in names if (m := re.match(rf"{OPEN_CLIP}transformer\.resblocks\.(\d+)", name))}
    return replace(
        config,
        clip=replace(config.clip, layers=len(numbers["clip_layers"]) or min(23, len(blocks))),
        vae=replace(config.vae, channels=(0,) * vae_levels, layers=len(numbers["vae_layers"])),
        unet=replace(
            config.unet,
            channels=(0,) * levels,
            attention=tuple(depths[level] for level in range(levels)),
            middle_attention=len(numbers["middle_attention"]),
            middle=bool(numbers["middle"]),
            heads=(0,) * levels,
            layers=layers,
            guidance_width=0 if any(GUIDANCE.search(name) for name in names) else None,
        ),
    )


class Layout(NamedTuple):
    """The names in the files of one family of models."""

    blocks: Callable[[Any, bool], Iterator[Block]]  # as `blocks`, for a config of the family
    structure: Callable[[Collection[str], str], ModelConfig]
    table: str = TABLE  # with sections for its own kinds of block
    denoiser: str = "unet"  # the folder of diffusers with what is called "diffusion" here
    alone: tuple[tuple[str, str], ...] = ()  # its spellings in a file of its own, as in `part.PARTS`


LAYOUT = Layout(blocks, structure)  # of Stable Diffusion 1.x and 2.x


def rules(
    config: ModelConfig, format: str, open_clip: bool | None = None, layout: Layout = LAYOUT
) -> list[Rule]:
    """Returns all rules between our names and a format's. The sizes in the config do not matter.

    open_clip: as for `blocks`; None for what models with this text encoder usually have.
    """
    if open_clip is None:
        open_clip = config.clip.activation == "gelu"
    if format not in FORMATS:
        raise ModelError(f"there is no format {format!r}; the formats are {', '.join(FORMATS)}")
    sections = {}
    for section in layout.table.split("\n[")[1:]:
        kind, rows = section.split("]")
        sections[kind] = [row.split() for row in rows.splitlines() if row]
    # The blocks with pointwise layers (all except the norm), and the formats that have convolutions there.
    linear = not isinstance(config.unet, UNetConfig) or config.unet.linear_projection
    convolutions = {"vae attention": ("compvis",), "attention": () if linear else ("compvis", "diffusers")}
    found, column = [], FORMATS.index(format)
    for kind, *names in layout.blocks(config, open_clip):
        for row in sections[kind]:
            ours, theirs = (f"{names[c]}.{row[c]}".removesuffix(".-") for c in (0, column))
            turn = theirs[-1] if theirs[-1] in TURNS else ""
            theirs = theirs.removesuffix(turn)
            stack = re.search(r"\{(.*)\}", theirs)
            parts = [theirs.replace(stack[0], x) for x in stack[1].split(",")] if stack else [theirs]
            alone = row[-1].endswith((".weight", ".bias", "tensor"))
            for suffix in ("",) if alone else (".weight", ".bias"):
                pointwise = kind in convolutions and row[0] != "norm" and suffix == ".weight"
                convolution = pointwise and format in convolutions[kind]
                theirs_with = tuple(part + suffix for part in parts)
                found.append(Rule(ours + suffix, theirs_with, pointwise, convolution, turn))
    return found


def match(
    names: Collection[str], config: ModelConfig | None = None, layout: Layout = LAYOUT
) -> tuple[str, list[Rule], list[str]]:
    """Returns a checkpoint's format, the rules for its tensors, and the names that no rule knows.

    The rules have the names in the checkpoint's own spelling. The `HARMLESS` names are not among the unknown.
    """
    spelling = {}
    for name in names:
        tidy = name
        for pattern, new in ALIASES:
            tidy = re.sub(rf"^{pattern}", new, tidy)
        spelling[tidy] = name
    format = detect(spelling)
    matched, used = [], set()
    open_clip = any(re.match(OPEN_CLIP, name) for name in spelling)
    for rule in rules(config or layout.structure(spelling, format), format, open_clip, layout):
        there = [part for part in rule.theirs if part in spelling]
        missing = [part for part in rule.theirs if part not in spelling]
        if there and missing:
            raise ModelError(f"tensor {missing[0]} is missing, though {there[0]} is there")
        if there:
            matched.append(replace(rule, theirs=tuple(spelling[part] for part in there)))
            used.update(there)
    unknown = [spelling[name] for name in spelling if name not in used and not HARMLESS.match(name)]
    return format, matched, unknown


def passed_over(path: Path, unknown: list[str]) -> str:
    """Says which tensors of a file are not used."""
    count = "a tensor that is" if len(unknown) == 1 else f"{len(unknown)} tensors that are"
    such = unknown[0] if len(unknown) == 1 else f"such as {unknown[0]}"
    return f"{path} has {count} no part of the model, {such}; not used"


# From one format to another


def convert(
    state_dict: Mapping[str, Tensor],
    to: str = "native",
    config: ModelConfig | None = None,
    layout: Layout = LAYOUT,
) -> dict[str, Tensor]:
    """Renames a model's tensors from any format to "native", "compvis" or "diffusers".

    Nothing is computed, so a round trip is bit-exact. Tensors that are not part of the model (`HARMLESS`) are
    left out.
    """
    format, matched, unknown = match(state_dict, config, layout)
    if unknown:
        raise ModelError(f"{len(unknown)} tensors have no place in the model, first {unknown[0]}")
    native = {rule.ours: rule.merge([state_dict[name] for name in rule.theirs]) for rule in matched}
    if to == "native":
        return native
    if config is None:
        config = layout.structure(native, "native")
        # Our names do not tell whether the projections are convolutions in files. They are in SD 1.x, whose
        # words are 768 wide.
        if format == "native":
            words = [x for name, x in native.items() if name.endswith("cross_attention.kv.weight")]
            linear = all(x.shape[1] != 768 for x in words)
        else:
            projections = [rule.theirs[0] for rule in matched if rule.ours.endswith("proj_in.weight")]
            linear = all(state_dict[name].ndim == 2 for name in projections)
        config = replace(config, unet=replace(config.unet, linear_projection=linear))
    theirs: dict[str, Tensor] = {}
    for rule in rules(config, to, layout=layout):
        if rule.ours in native:
            theirs |= zip(rule.theirs, rule.split(native[rule.ours]), strict=True)
    return theirs


def load_from_standard_weights(
    path: str | Path, device: str | torch.device = "cpu"
) -> dict[str, dict[str, Tensor]]:
    """Reads the state dicts of "clip", "encoder", "decoder" and "diffusion" from a file of any format."""
    path = Path(path).expanduser()
    stored = open_folder(path) if path.is_dir() else TensorFile(path).tensors()
    if any(re.match(LARGER, name) for name in stored):
        raise ModelError(f"{path} is Stable Diffusion XL or 3, which only reifusion.load opens")
    _, matched, unknown = match(stored)
    if unknown:
        warnings.warn(passed_over(path, unknown), stacklevel=2)
    needed = {name: stored[name] for rule in matched for name in rule.theirs}
    states: dict[str, dict[str, Tensor]] = {network: {} for network in NETWORKS}
    for name, tensor in convert({name: tensor.read(device) for name, tensor in needed.items()}).items():
        network, inner = name.split(".", 1)
        states[network][inner] = tensor
    return states
