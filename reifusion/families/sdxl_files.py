"""The files of Stable Diffusion XL: their names, what their shapes tell, and folders of diffusers."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from ..model import diffusers_folder, family, model_converter
from ..model.config import CLIPConfig, UNetConfig
from ..model.family import Family, FromShapes, Shapes
from ..model.model_converter import Block, Layout
from ..model.prediction import Prediction
from ..model.tensors import ModelError, short
from ..model.tokenizer import END, Tokenizer
from ..model.tokenizer_folder import read_tokenizer, write_tokenizer
from . import taesd
from .pix2pix import InstructPix2PixXL
from .pooled_text import BIG_G, padding_with
from .sdxl import BASE, PRESETS, REFINER, SSD_1B, VEGA, SDXLConfig, StableDiffusionXL, build
from .sdxl_unet import SDXLUNetConfig

# Names


TABLE = (
    model_converter.TABLE
    + """
[told]
label_1                 0.0                                 linear_1
label_2                 0.2                                 linear_2

[projection]
projection.weight       text_projectionᵀ                    text_projection.weight
"""
)


def blocks(config: SDXLConfig, open_clip: bool) -> Iterator[Block]:
    """Yields every block of a model. open_clip is of no importance: CompVis's names are always the same."""
    cv = "conditioner.embedders"
    if config.clip_2 is None:
        last, place, df = "clip", f"{cv}.0.model", "text_encoder_2"
        yield from model_converter.clip_blocks(config.clip, True, last, place, f"{df}.text_model")
    else:
        last, place, df = "clip_2", f"{cv}.1.model", "text_encoder_2"
        first = f"{cv}.0.transformer.text_model", "text_encoder.text_model"
        yield from model_converter.clip_blocks(config.clip, False, "clip", *first)
        yield from model_converter.clip_blocks(config.clip_2, True, last, place, f"{df}.text_model")
    yield "projection", last, place, df
    yield from model_converter.vae_blocks(config.vae)
    yield from model_converter.unet_blocks(config.unet)
    yield "told", "diffusion.time_embedding", "model.diffusion_model.label_emb", "unet.add_embedding"


# The layers of CLIP-L, of bigG beside it, and of bigG alone, in each format.
LAYERS = {
    "native": (r"clip\.layers\.(\d+)", r"clip_2\.layers\.(\d+)", r"clip\.layers\.(\d+)"),
    "compvis": (
        r"conditioner\.embedders\.0\.transformer\.text_model\.encoder\.layers\.(\d+)",
        r"conditioner\.embedders\.1\.model\.transformer\.resblocks\.(\d+)",
        r"conditioner\.embedders\.0\.model\.transformer\.resblocks\.(\d+)",
    ),
    "diffusers": (
        r"text_encoder\.text_model\.encoder\.layers\.(\d+)",
        r"text_encoder_2\.text_model\.encoder\.layers\.(\d+)",
        r"text_encoder_2\.text_model\.encoder\.layers\.(\d+)",
    ),
}
# The transformer layers in the rows of the way up, in each format. diffusers numbers each level's rows anew.
UP = {
    "native": r"diffusion\.up\.(?P<row>\d+)\.1\.layers\.(\d+)",
    "compvis": r"model\.diffusion_model\.output_blocks\.(?P<row>\d+)\.1\.transformer_blocks\.(\d+)",
    "diffusers": r"unet\.up_blocks\.(\d+)\.attentions\.(?P<row>\d+)\.transformer_blocks\.(\d+)",
}


def structure(names: Collection[str], format: str) -> SDXLConfig:
    """Counts a model's blocks by its names. Returns a config with these counts, whose sizes mean nothing."""
    first, second, alone = (
        len({found[1] for name in names if (found := re.match(pattern, name))}) for pattern in LAYERS[format]
    )
    known = model_converter.structure(names, format)
    unet = SDXLUNetConfig(**vars(replace(known.unet, linear_projection=True)))
    rows: dict[int, set[str]] = {row: set() for row in range(len(unet.channels) * (unet.layers + 1))}
    for found in filter(None, (re.match(UP[format], name) for name in names)):
        row = int(found["row"]) + (int(found[1]) * (unet.layers + 1) if format == "diffusers" else 0)
        if row in rows:
            rows[row].add(found[found.re.groups])
    both = first > 0 and second > 0
    return SDXLConfig(
        clip=replace(known.clip, layers=first if both else alone),
        clip_2=replace(BIG_G, layers=second) if both else None,
        vae=known.vae,
        unet=replace(unet, up=uneven(unet, tuple(map(len, rows.values())))),
    )


def uneven(unet: SDXLUNetConfig, depths: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the depths of the rows on the way up, or () if they are those of the way down."""
    even = tuple(depth for depth in reversed(unet.attention) for _ in range(unet.layers + 1))
    return () if depths == even else depths


def recognises(names: Collection[str]) -> bool:
    """True for the names of tensors, or of files in a folder of diffusers, of base or refiner."""
    marks = r"clip_2\.|diffusion\.time_embedding\.label_|conditioner\.embedders\.|text_encoder_2[./]"
    return any(re.match(marks, name) for name in names)


def from_shapes(shapes: Shapes, told: Prediction | None = None) -> FromShapes:
    """Finds the config of a file by its shapes. The preset with the same shapes supplies the rest.

    A U-Net may have lost layers, as those of SSD-1B and Segmind Vega have.
    """
    kind = structure(shapes, "native")
    base = REFINER if kind.clip_2 is None else BASE
    config = cast(SDXLConfig, family.like(base, shapes, kind))
    if kind.clip_2 and base.clip_2:
        second = family.clip_like(base.clip_2, shapes, "clip_2", kind.clip_2.layers)
        config = replace(config, clip_2=second)
    config = replace(config, unet=replace(config.unet, up=kind.unet.up))
    # A vocabulary may have grown, and a U-Net may be given more than latents.
    same = [replace(config.clip, vocab_size=base.clip.vocab_size) == base.clip, config.vae == base.vae]
    same += [config.unet.channels == base.unet.channels, config.unet.in_channels in (4, 8, 9)]
    if all(same) and config.unet.context_width == base.unet.context_width:
        usual = replace(config.unet, in_channels=4)
        preset = next((preset for preset in PRESETS if preset.unet == usual), base)
        return FromShapes(replace(config, name=preset.name))
    raise ModelError("it has the shapes of no known SDXL, and shapes alone are not enough: it needs a config")


# Folders of diffusers


TOLD = "projection_class_embeddings_input"
DEPTHS = "transformer_layers_per_block"
BARE = "UNetMidBlock2D"  # the middle that is one residual block
EULER, ANCESTRAL = "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"  # the latter is SDXL-Turbo's


def from_diffusers(jsons: Mapping[str, Mapping[str, Any]], name: str) -> SDXLConfig:
    """Translates the contents of the `config.json`s, by folder, into our config."""
    last = jsons.get("text_encoder_2", {})
    unet = dict(jsons["unet"])
    if (kind := unet.pop("addition_embed_type", None)) != "text_time":
        raise ModelError(f"its unet has addition_embed_type = {short(kind)}, which is not built in")
    up, bare = unet.pop("reverse_transformer_layers_per_block", None), unet.get("mid_block_type") == BARE
    if bare:
        del unet["mid_block_type"]
    if isinstance(unet.get(DEPTHS), list):
        unet[DEPTHS] = [_even(depth) for depth in unet[DEPTHS]]
    fields = diffusers_folder.fields_from_diffusers(
        {**jsons, "unet": unet, "text_encoder": jsons.get("text_encoder", last)}
    )
    second = diffusers_folder.translated(last, "text_encoder", "text_encoder_2")
    pooled: Any = last.get("projection_dim", 512)
    waves, told = (unet.get(f"{key}_dim", 0) for key in ("addition_time_embed", TOLD))
    whole = all(isinstance(number, int) for number in (pooled, waves, told))
    if not whole or waves < 1 or told not in (pooled + 5 * waves, pooled + 6 * waves):
        raise ModelError(f"its unet has {TOLD}_dim = {short(told)}, which does not fit its text encoder")
    fields["unet"] = _unet(fields["unet"], up, bare)
    ancestral = jsons["scheduler"].get("_class_name") == ANCESTRAL and fields["schedule"].timestep_spacing
    index, pad = jsons.get("model_index", {}), jsons.get("tokenizer_config", {}).get("pad_token", END)
    return SDXLConfig(
        name=name,
        **fields,
        sampler="euler_a" if ancestral else BASE.sampler,
        clip_2=CLIPConfig(**second) if "text_encoder" in jsons else None,
        pooled=pooled,
        numbers=(told - pooled) // waves,
        waves=waves,
        pad_2=(pad["content"] if isinstance(pad, Mapping) else pad) if "text_encoder" in jsons else "!",
        zeros=bool(index.get("force_zeros_for_empty_prompt", True)),
        upcast=bool(jsons["vae"].get("force_upcast", True)),
    )


def _unet(plain: UNetConfig, up: Any, bare: bool) -> SDXLUNetConfig:
    """Returns the U-Net with what only this family has: up, depths of the way up, as diffusers writes them,
    and bare, True if the middle is one residual block."""
    unet = SDXLUNetConfig(**vars(plain))
    if bare:
        unet = replace(unet, middle_attention=0)
    if up is None:
        return unet
    levels, rows = tuple(reversed(unet.attention)), unet.layers + 1
    depths: list[Any] = []
    for depth, level in zip(up if isinstance(up, list) else [], levels):
        own = depth if isinstance(depth, list) else [depth] * rows
        depths += own if level else [0] * rows
    if len(depths) != len(levels) * rows or not all(isinstance(depth, int) for depth in depths):
        raise ModelError(f"its unet has reverse_{DEPTHS} = {short(up)}, which does not fit its levels")
    return replace(unet, up=uneven(unet, tuple(depths)))


def _even(depth: Any) -> Any:
    """[2, 2] -> 2, the depth of all blocks of a level; others stay"""
    return depth[0] if isinstance(depth, list) and depth and depth.count(depth[0]) == len(depth) else depth


def to_diffusers(config: SDXLConfig) -> dict[str, dict[str, Any]]:
    """Translates our config into the contents of the `config.json`s, by folder."""
    unet = config.unet
    bare = unet.middle and not unet.middle_attention
    # In diffusers the last level's depth counts for the middle too, even where the middle has no use for it.
    written = replace(unet, middle_attention=unet.attention[-1] or 1) if bare else unet
    jsons = diffusers_folder.config_to_diffusers(replace(config, unet=written))
    if bare:
        jsons["unet"]["mid_block_type"] = BARE
    if unet.up:
        rows = unet.layers + 1
        depths = [unet.up[i : i + rows] for i in range(0, len(unet.up), rows)]
        jsons["unet"][f"reverse_{DEPTHS}"] = [list(level) if any(level) else 1 for level in depths]
    if config.clip_2 is None:
        del jsons["text_encoder"]
    jsons["text_encoder_2"] = diffusers_folder.clip_to_diffusers(config.clip_2 or config.clip) | {
        "architectures": ["CLIPTextModelWithProjection"],
        "projection_dim": config.pooled,
    }
    jsons["unet"] |= {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": config.waves,
        f"{TOLD}_dim": config.pooled + config.numbers * config.waves,
    }
    jsons["vae"]["force_upcast"] = config.upcast
    if jsons["scheduler"]["_class_name"] in ("PNDMScheduler", EULER):
        diffusers_folder.euler(jsons["scheduler"], ANCESTRAL if config.sampler == "euler_a" else EULER)
        jsons["scheduler"]["timestep_spacing"] = config.schedule.timestep_spacing or "leading"
    return jsons


def index(config: SDXLConfig) -> dict[str, Any]:
    """Returns what model_index.json says beside the parts of the model."""
    kind = "Inpaint" if config.inpaints else "Img2Img" if config.clip_2 is None else ""
    kind = "InstructPix2Pix" if config.edits else kind
    said: dict[str, Any] = {
        "_class_name": f"StableDiffusionXL{kind}Pipeline",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "force_zeros_for_empty_prompt": config.zeros,
    }
    if config.clip_2 is None:
        said |= {"text_encoder": [None, None], "tokenizer": [None, None], "requires_aesthetics_score": True}
    if kind == "Inpaint":
        said["requires_aesthetics_score"] = config.rows == 2
    return said


def tokenizer_of(path: Path, header: Mapping[str, str], config: SDXLConfig) -> Tokenizer:
    """Reads the tokenizer of a file, by its header, or of a folder of diffusers: the first of two."""
    if path.is_dir() and config.clip_2 is None:
        return read_tokenizer(path / "tokenizer_2", config.clip.context_length)
    return family.tokenizer_of(path, header, config)


def write_tokenizers(tokenizer: Tokenizer, folder: Path, config: SDXLConfig) -> None:
    """Writes the tokenizers into a folder of diffusers."""
    if config.clip_2 is None:
        write_tokenizer(tokenizer, folder / "tokenizer_2")
    else:
        write_tokenizer(tokenizer, folder / "tokenizer")
        write_tokenizer(padding_with(tokenizer, config.pad_2), folder / "tokenizer_2")


def with_vae(config: SDXLConfig, path: Path) -> SDXLConfig:
    """Returns the config for another VAE: whether float16 is enough for it, its folder or its name says."""
    jsons = [folder / "config.json" for folder in (path / "vae", path)]
    found = next((file for file in jsons if file.is_file()), None)
    if found is not None:
        said = json.loads(found.read_text("utf-8")).get("force_upcast", True)
        return replace(config, upcast=bool(said) and not taesd.recognises(path))
    enough = re.search(r"fp16[-_. ]?fix", path.name, re.IGNORECASE) or taesd.recognises(path)
    return replace(config, upcast=not enough)


def suited(config: SDXLConfig) -> SDXLConfig:
    """Returns a config with the settings that its pictures need."""
    if config.schedule.timestep_spacing == "trailing" and config.schedule.prediction_type == "epsilon":
        return replace(config, steps=4, cfg=1.0)  # SDXL-Turbo, and others distilled
    small = next((one for one in (SSD_1B, VEGA) if one.unet == config.unet), config)
    return replace(config, cfg=small.cfg)


SDXL = Family(
    name="sdxl",
    layout=Layout(blocks, structure, TABLE),
    folders=("text_encoder", "text_encoder_2", "vae", "unet"),
    config=SDXLConfig,
    recognises=recognises,
    from_shapes=from_shapes,
    from_diffusers=from_diffusers,
    to_diffusers=to_diffusers,
    index=index,
    build=build,
    read_tokenizer=tokenizer_of,
    write_tokenizer=write_tokenizers,
    suited=suited,
    with_vae=with_vae,
    pipeline=lambda config: InstructPix2PixXL if config.edits else StableDiffusionXL,
)
