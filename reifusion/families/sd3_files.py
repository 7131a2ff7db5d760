"""The files of Stable Diffusion 3: single ones, with text encoders inside or beside, and folders."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..model import diffusers_folder, family, model_converter
from ..model.config import CLIPConfig, ScheduleConfig, VAEConfig
from ..model.diffusers_folder import by_fields
from ..model.family import Family, FromShapes, Shapes, size_of
from ..model.model_converter import Block, Layout
from ..model.prediction import Prediction
from ..model.tensors import ModelError, Stored, TensorFile, short
from ..model.tokenizer import END, Tokenizer
from ..model.tokenizer_folder import write_tokenizer
from .mmdit import MMDiTConfig
from .pooled_text import padding_with
from .sd3 import MEDIUM, PRESETS, SD3Config, StableDiffusion3, Tokenizers, build
from .sd3_names import TABLE, mmdit_blocks, t5_blocks
from .t5 import T5Config
from .unigram import Unigram, from_json, read_unigram, to_json, write_unigram

SINGLE = "text_encoders."  # how the names of text encoders begin in a single file


# Names


def blocks(config: SD3Config, open_clip: bool) -> Iterator[Block]:
    """Yields every block of a model. open_clip plays no part: single files have CLIP's names."""
    for name, layers, single, folder in (
        ("clip", config.clip, f"{SINGLE}clip_l.transformer", "text_encoder"),
        ("clip_2", config.clip_2, f"{SINGLE}clip_g.transformer", "text_encoder_2"),
    ):
        theirs = f"{single}.text_model", f"{folder}.text_model"
        yield from model_converter.clip_blocks(layers, False, name, *theirs)
        yield "pooled text", name, single, folder
    if config.t5 is not None:
        yield from t5_blocks(config.t5.layers, "t5", f"{SINGLE}t5xxl.transformer", "text_encoder_3")
    yield from model_converter.vae_blocks(config.vae)
    yield from mmdit_blocks(config.unet)


# The layers of each network, by format
LAYERS = {
    "clip": (
        r"clip\.layers\.(\d+)",
        r"text_encoders\.clip_l\.transformer\.text_model\.encoder\.layers\.(\d+)",
        r"text_encoder\.text_model\.encoder\.layers\.(\d+)",
    ),
    "clip_2": (
        r"clip_2\.layers\.(\d+)",
        r"text_encoders\.clip_g\.transformer\.text_model\.encoder\.layers\.(\d+)",
        r"text_encoder_2\.text_model\.encoder\.layers\.(\d+)",
    ),
    "t5": (
        r"t5\.layers\.(\d+)",
        r"text_encoders\.t5xxl\.transformer\.encoder\.block\.(\d+)",
        r"text_encoder_3\.encoder\.block\.(\d+)",
    ),
    "mmdit": (
        r"diffusion\.blocks\.(\d+)",
        r"model\.diffusion_model\.joint_blocks\.(\d+)",
        r"transformer\.transformer_blocks\.(\d+)",
    ),
    "second": (
        r"diffusion\.blocks\.(\d+)\.pixels\.second\.",
        r"model\.diffusion_model\.joint_blocks\.(\d+)\.x_block\.attn2\.",
        r"transformer\.transformer_blocks\.(\d+)\.attn2\.",
    ),
}
QK_NORM = re.compile(r"(diffusion|model\.diffusion_model|transformer)\..*\.(norm_q|ln_q)\.weight$")


def structure(names: Collection[str], format: str) -> SD3Config:
    """Counts a model's blocks by its names. Returns a config with these counts, whose sizes mean nothing."""
    column = model_converter.FORMATS.index(format)
    numbers = {
        name: {int(found[1]) for x in names if (found := re.match(patterns[column], x))}
        for name, patterns in LAYERS.items()
    }
    counts = {name: len(found) for name, found in numbers.items()}
    known, kind = model_converter.structure(names, format), MEDIUM
    return replace(
        kind,
        clip=replace(kind.clip, layers=counts["clip"]),
        clip_2=replace(kind.clip_2, layers=counts["clip_2"]),
        t5=T5Config(layers=counts["t5"]) if counts["t5"] else None,
        vae=replace(known.vae, quant=False),
        unet=replace(
            kind.unet,
            layers=counts["mmdit"],
            qk_norm=any(map(QK_NORM.match, names)),
            dual_attention=tuple(sorted(numbers["second"])),
        ),
    )


def recognises(names: Collection[str]) -> bool:
    """True for the names of tensors, or of files in a folder of diffusers, of this family."""
    single = r"(model\.diffusion_model\.)?joint_blocks\.\d+\.context_block\."
    marks = rf"diffusion\.blocks\.\d+\.words\.|{single}|transformer/"
    return any(re.match(marks, name) for name in names)


def completed(path: Path, tensors: dict[str, Stored]) -> dict[str, Stored]:
    """A file's tensors under the usual names, with those of the text encoders in files beside it.

    Stability publishes the transformer with the VAE, and the text encoders as `clip_l.safetensors`, `clip_g…`
    and `t5xxl…`, beside it or in a folder `text_encoders`. Where its CLIP-L lacks a projection, there is
    none, which is to say that it changes nothing.
    """
    if any(name.startswith("joint_blocks.") for name in tensors):
        other = r"first_stage_model\.|text_encoders\."
        prefix = "model.diffusion_model."
        tensors = {x if re.match(other, x) else prefix + x: tensor for x, tensor in tensors.items()}
    if path.is_file() and not any(x.startswith(("clip.", SINGLE)) for x in tensors):
        for name in "clip_l", "clip_g", "t5xxl":
            if beside := _beside(path, name):
                theirs = TensorFile(beside).tensors()
                tensors = tensors | {f"{SINGLE}{name}.transformer.{x}": y for x, y in theirs.items()}
    for name in [x for x in tensors if x.endswith("encoder.embed_tokens.weight")]:  # once more, or alone
        tensors.setdefault(name.replace("encoder.embed_tokens", "shared"), tensors[name])
        del tensors[name]
    position = tensors.get(f"{SINGLE}clip_l.transformer.text_model.embeddings.position_embedding.weight")
    if position is not None and len(position.shape) == 2:
        projection = f"{SINGLE}clip_l.transformer.text_projection.weight"
        tensors.setdefault(projection, Identity(position.file, position.name))
    return tensors


def _beside(path: Path, name: str) -> Path | None:
    """Finds the file of a text encoder: the first by name, which is fp16 before fp8."""
    for folder in (path.parent, path.parent / "text_encoders"):
        if found := sorted(folder.glob(f"{name}*.safetensors")):
            return found[0]
    return None


class Identity(Stored):
    """Stands for a square matrix that changes nothing, as wide as the tensor that it is named by."""

    @property
    def shape(self) -> torch.Size:
        width = super().shape[1]
        return torch.Size((width, width))

    def read(self, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Tensor:
        return torch.eye(self.shape[0], device=device, dtype=dtype or self.dtype)


# What the shapes of a file tell


def from_shapes(shapes: Shapes, told: Prediction | None = None) -> FromShapes:
    """Finds the config of a file by its shapes. The preset with the same transformer supplies the rest."""

    def size(name: str, axis: int) -> int:
        return size_of(shapes, name, axis)

    def heads(width: int) -> int:
        if width % 64:
            raise ModelError("its heads are not 64 wide, and shapes alone are not enough: it needs a config")
        return width // 64

    def clip(preset: CLIPConfig, name: str, layers: int) -> CLIPConfig:
        found = family.clip_like(preset, shapes, name, layers)
        return replace(found, heads=heads(found.width))

    kind = structure(shapes, "native")
    patch, width = size("diffusion.patches.weight", 2), size("diffusion.patches.weight", 0)
    mmdit = MMDiTConfig(
        in_channels=size("diffusion.patches.weight", 1),
        out_channels=size("diffusion.out.weight", 0) // patch**2,
        patch=patch,
        layers=kind.unet.layers,
        heads=heads(width),
        width=width,
        context_width=size("diffusion.words.weight", 1),
        pooled_width=size("diffusion.pooled.0.weight", 1),
        positions=round(size("diffusion.position", 1) ** 0.5),
        qk_norm=kind.unet.qk_norm,
        dual_attention=kind.unet.dual_attention,
    )
    preset = next((preset for preset in PRESETS if preset.unet == mmdit), None)
    vae_levels = range(len(kind.vae.channels))
    vae = replace(
        (preset or MEDIUM).vae,
        in_channels=size("encoder.conv_in.weight", 1),
        latent_channels=size("decoder.conv_in.weight", 1),
        channels=tuple(size(f"encoder.down.{i}.0.conv_1.weight", 0) for i in vae_levels),
        layers=kind.vae.layers,
        quant="encoder.quant.weight" in shapes,
    )
    t5 = None
    if kind.t5 is not None:
        t5_heads = size("t5.bias.weight", 1)
        t5 = T5Config(
            vocab_size=size("t5.embedding.weight", 0),
            width=size("t5.embedding.weight", 1),
            layers=kind.t5.layers,
            heads=t5_heads,
            head_width=size("t5.layers.0.attention.out.weight", 1) // t5_heads,
            hidden=size("t5.layers.0.gate.weight", 0),
            buckets=size("t5.bias.weight", 0),
        )
    config = replace(
        preset or replace(MEDIUM, name="sd3"),
        clip=clip(MEDIUM.clip, "clip", kind.clip.layers),
        clip_2=clip(MEDIUM.clip_2, "clip_2", kind.clip_2.layers),
        pooled=(size("clip.projection.weight", 0), size("clip_2.projection.weight", 0)),
        t5=t5,
        vae=vae,
        unet=mmdit,
    )
    return FromShapes(config, "as in all models of this family")


# Folders of diffusers


# Our field, their key, and the value that a file without the key means, as in `diffusers_folder.FIELDS`
T5_FIELDS = (
    ("vocab_size", "vocab_size", 32128),
    ("width", "d_model"),
    ("layers", "num_layers"),
    ("heads", "num_heads"),
    ("head_width", "d_kv"),
    ("hidden", "d_ff"),
    ("buckets", "relative_attention_num_buckets", 32),
    ("far", "relative_attention_max_distance", 128),
)
T5_FIXED = {"feed_forward_proj": "gated-gelu", "layer_norm_epsilon": 1e-06}
MMDIT_FIELDS = (
    ("in_channels", "in_channels", 16),
    ("out_channels", "out_channels", 16),
    ("patch", "patch_size", 2),
    ("layers", "num_layers", 18),
    ("heads", "num_attention_heads", 18),
    ("context_width", "joint_attention_dim", 4096),
    ("pooled_width", "pooled_projection_dim", 2048),
    ("positions", "pos_embed_max_size", 96),
)
VAE_FIELDS = (
    *diffusers_folder.FIELDS["vae"],
    ("shift", "shift_factor", None),
    ("quant", "use_quant_conv", True),
)
VAE_FIXED = {"act_fn": "silu", "latents_mean": None, "latents_std": None, "mid_block_add_attention": True}
FLOW_FIELDS = (*diffusers_folder.FIELDS["flow scheduler"], ("shift", "shift", 1.0))
FLOW_FIXED = {key: x for key, x in diffusers_folder.FIXED["flow scheduler"].items() if key != "shift"}


def from_diffusers(jsons: Mapping[str, Mapping[str, Any]], name: str) -> SD3Config:
    """Translates the contents of the `config.json`s, by folder, into our config."""
    clips = [
        CLIPConfig(**diffusers_folder.translated(jsons[part], "text_encoder", part))
        for part in ("text_encoder", "text_encoder_2")
    ]
    pooled, pooled_2 = (jsons[part].get("projection_dim", 512) for part in ("text_encoder", "text_encoder_2"))
    t5 = None
    if "text_encoder_3" in jsons:
        t5 = T5Config(**by_fields(jsons["text_encoder_3"], T5_FIELDS, T5_FIXED, "text_encoder_3"))
    theirs = jsons["transformer"]
    mmdit = by_fields(theirs, MMDIT_FIELDS, {}, "transformer")
    width = mmdit["heads"] * theirs.get("attention_head_dim", 64)
    for key, fitting in (
        ("qk_norm", (None, "rms_norm")),
        ("caption_projection_dim", (width,)),
        ("pooled_projection_dim", (pooled + pooled_2,)),
    ):
        if theirs.get(key) not in fitting:
            raise ModelError(f"its transformer has {key} = {short(theirs.get(key))}, which does not fit")
    vae = by_fields(jsons["vae"], VAE_FIELDS, VAE_FIXED, "vae")
    if jsons["vae"].get("use_post_quant_conv", True) != vae["quant"]:
        raise ModelError("its vae has a convolution at one of its two ends alone, which is not built in")
    scheduler = jsons["scheduler"]
    if scheduler.get("_class_name") != diffusers_folder.FLOW_SCHEDULER:
        raise ModelError(f"its scheduler is {short(scheduler.get('_class_name'))}, which is not built in")
    pad = jsons.get("tokenizer_config", {}).get("pad_token", END)
    config = SD3Config(
        name=name,
        clip=clips[0],
        clip_2=clips[1],
        pooled=(pooled, pooled_2),
        t5=t5,
        vae=VAEConfig(**vae | {"shift": vae["shift"] or 0.0}),
        unet=MMDiTConfig(
            **mmdit,
            width=width,
            qk_norm=theirs.get("qk_norm") is not None,
            dual_attention=tuple(theirs.get("dual_attention_layers") or ()),
        ),
        schedule=ScheduleConfig(
            **by_fields(scheduler, FLOW_FIELDS, FLOW_FIXED, "scheduler"), prediction_type="flow"
        ),
        pad_2=pad["content"] if isinstance(pad, Mapping) else pad,
    )
    side = theirs.get("sample_size", 128)
    preset = next((preset for preset in PRESETS if preset.unet == config.unet), MEDIUM)
    return replace(config, size=side * config.vae.factor, steps=preset.steps, cfg=preset.cfg)


def to_diffusers(config: SD3Config) -> dict[str, dict[str, Any]]:
    """Translates our config into the contents of the `config.json`s, by folder."""

    def theirs(ours: Any, fields: Iterable[tuple[Any, ...]], fixed: Mapping[str, Any]) -> dict[str, Any]:
        return {key: getattr(ours, field) for field, key, *_ in fields} | dict(fixed)

    jsons = {
        part: diffusers_folder.clip_to_diffusers(clip)
        | {"architectures": ["CLIPTextModelWithProjection"], "projection_dim": pooled}
        for part, clip, pooled in zip(
            ("text_encoder", "text_encoder_2"), (config.clip, config.clip_2), config.pooled, strict=True
        )
    }
    if config.t5 is not None:
        jsons["text_encoder_3"] = theirs(config.t5, T5_FIELDS, T5_FIXED) | {
            "architectures": ["T5EncoderModel"],
            "model_type": "t5",
            "is_encoder_decoder": True,
            "tie_word_embeddings": False,
        }
    levels, width = len(config.vae.channels), config.unet.width
    jsons["vae"] = theirs(config.vae, VAE_FIELDS, VAE_FIXED) | {
        "_class_name": "AutoencoderKL",
        "use_post_quant_conv": config.vae.quant,
        "out_channels": config.vae.in_channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "sample_size": config.size,
    }
    jsons["transformer"] = theirs(config.unet, MMDIT_FIELDS, {}) | {
        "_class_name": "SD3Transformer2DModel",
        "attention_head_dim": width // config.unet.heads,
        "caption_projection_dim": width,
        "qk_norm": "rms_norm" if config.unet.qk_norm else None,
        "dual_attention_layers": list(config.unet.dual_attention),
        "sample_size": config.size // config.vae.factor,
    }
    jsons["scheduler"] = theirs(config.schedule, FLOW_FIELDS, FLOW_FIXED) | {
        "_class_name": diffusers_folder.FLOW_SCHEDULER
    }
    return jsons


def index(config: SD3Config) -> dict[str, Any]:
    """Returns what model_index.json says beside the parts of the model."""
    absent = ["feature_extractor", "image_encoder"]
    absent += [] if config.t5 else ["text_encoder_3", "tokenizer_3"]
    return {"_class_name": "StableDiffusion3Pipeline", **{name: [None, None] for name in absent}}


# Tokenizers


def tokenizers_of(path: Path, header: Mapping[str, str], config: SD3Config) -> Tokenizers:
    """Reads the tokenizers of a file, by its header, or of a folder of diffusers.

    Stability's files have no tokenizer for T5. It is looked for beside them, in `tokenizer_3` or as
    `spiece.model`. Warns if it is not there: T5 is then left out.
    """
    clip = family.tokenizer_of(path, header, config)
    both = Tokenizers(clip.merges_text, clip.context_length, vocabulary=clip.vocabulary, exact=clip.exact)
    if config.t5 is None:
        return both
    if "t5" in header:
        both.t5 = from_json(json.loads(header["t5"]), config.t5_length)
    elif path.is_dir():
        both.t5 = read_unigram(path / "tokenizer_3", config.t5_length)
    else:
        for folder in (path.parent / "tokenizer_3", path.parent, path.parent / "text_encoders"):
            if (folder / "spiece.model").is_file():
                both.t5 = read_unigram(folder, config.t5_length)
                break
        else:
            warnings.warn(
                f"{path} has a T5 and no tokenizer for it, so T5 is left out, until its spiece.model lies "
                "beside the file",
                stacklevel=2,
            )
    if both.t5 is not None and both.t5.vocab_size > config.t5.vocab_size:
        raise ValueError(f"T5's tokenizer knows {both.t5.vocab_size} tokens, T5 {config.t5.vocab_size}")
    return both


def write_tokenizers(tokenizer: Tokenizer, folder: Path, config: SD3Config) -> None:
    """Writes the tokenizers into a folder of diffusers."""
    write_tokenizer(tokenizer, folder / "tokenizer")
    write_tokenizer(padding_with(tokenizer, config.pad_2), folder / "tokenizer_2")
    if config.t5 is not None:
        if (t5 := getattr(tokenizer, "t5", None)) is None:
            raise ModelError("a folder of diffusers needs T5's tokenizer, which is not there")
        write_unigram(t5, folder / "tokenizer_3")


def header(tokenizer: Tokenizer) -> dict[str, str]:
    """Returns what a file's header must hold to bring T5's tokenizer back."""
    t5: Unigram | None = getattr(tokenizer, "t5", None)
    return {} if t5 is None else {"t5": json.dumps(to_json(t5), ensure_ascii=False)}


# How the names of a transformer in a file of its own begin, and what is to stand before them
ALONE = (
    (r"transformer\.", ""),
    (r"joint_blocks\.", "model.diffusion_model."),
    (r"transformer_blocks\.", "transformer."),
    (r"blocks\.", "diffusion."),
)
SD3 = Family(
    name="sd3",
    layout=Layout(blocks, structure, TABLE, "transformer", ALONE),
    folders=("text_encoder", "text_encoder_2", "text_encoder_3", "vae", "transformer"),
    config=SD3Config,
    recognises=recognises,
    from_shapes=from_shapes,
    from_diffusers=from_diffusers,
    to_diffusers=to_diffusers,
    index=index,
    build=build,
    read_tokenizer=tokenizers_of,
    write_tokenizer=write_tokenizers,
    suited=lambda config: config,
    pipeline=lambda config: StableDiffusion3,
    completed=completed,
    header=header,
)
