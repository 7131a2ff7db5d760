"""A folder of diffusers: which of its files hold the weights, and its `config.json`s, read and made.

The folder has a subfolder for each part: `text_encoder/`, `vae/` and `unet/` with weights, and `scheduler/`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from .config import CLIPConfig, ModelConfig, ScheduleConfig, UNetConfig, VAEConfig
from .tensors import ModelError, Stored, TensorFile, short

PARTS = ("text_encoder", "vae", "unet")  # the subfolders with weights that are used here

# Our field, their key, and the value that a file without the key means. Without a third entry, the file must
# have the key.
FIELDS: dict[str, tuple[tuple[Any, ...], ...]] = {
    "text_encoder": (
        ("vocab_size", "vocab_size"),
        ("context_length", "max_position_embeddings", 77),
        ("width", "hidden_size"),
        ("layers", "num_hidden_layers"),
        ("heads", "num_attention_heads"),
        ("activation", "hidden_act", "quick_gelu"),
    ),
    "vae": (
        ("in_channels", "in_channels"),
        ("latent_channels", "latent_channels"),
        ("channels", "block_out_channels"),
        ("layers", "layers_per_block"),
        ("groups", "norm_num_groups", 32),
        ("scale_factor", "scaling_factor", 0.18215),
    ),
    "unet": (
        ("in_channels", "in_channels"),
        ("out_channels", "out_channels"),
        ("channels", "block_out_channels"),
        ("layers", "layers_per_block"),
        ("heads", "attention_head_dim", 8),  # diffusers's mistake: the number of heads, not their width
        ("attention", "transformer_layers_per_block", 1),
        ("middle", "mid_block_type", "UNetMidBlock2DCrossAttn"),
        ("context_width", "cross_attention_dim"),
        ("groups", "norm_num_groups", 32),
        ("linear_projection", "use_linear_projection", False),
        ("guidance_width", "time_cond_proj_dim", None),
    ),
    "scheduler": (
        ("num_training_steps", "num_train_timesteps"),
        ("beta_start", "beta_start"),
        ("beta_end", "beta_end"),
        ("beta_schedule", "beta_schedule"),
        ("trained_betas", "trained_betas", None),
        ("prediction_type", "prediction_type", "epsilon"),
        ("zero_terminal_snr", "rescale_betas_zero_snr", False),
        ("original_inference_steps", "original_inference_steps", 50),
    ),
    "flow scheduler": (("num_training_steps", "num_train_timesteps"),),
}

# The networks here have no setting for these. A file with another value is refused.
FIXED: dict[str, dict[str, Any]] = {
    "text_encoder": {"layer_norm_eps": 1e-05},
    "vae": {
        "act_fn": "silu",
        "latents_mean": None,
        "latents_std": None,
        "mid_block_add_attention": True,
        "shift_factor": None,
        "use_post_quant_conv": True,
        "use_quant_conv": True,
    },
    "unet": {
        "act_fn": "silu",
        "addition_embed_type": None,
        "center_input_sample": False,
        "class_embed_type": None,
        "downsample_padding": 1,
        "dual_cross_attention": False,
        "encoder_hid_dim": None,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "num_attention_heads": None,
        "num_class_embeds": None,
        "only_cross_attention": False,
        "resnet_time_scale_shift": "default",
    },
    "scheduler": {},
    "flow scheduler": {
        "invert_sigmas": False,
        "shift": 1.0,
        "shift_terminal": None,
        "use_dynamic_shifting": False,
    },
}
# The fields with a value for each level, or for each training step
LISTS = ("channels", "heads", "attention", "trained_betas")
FLOW_SCHEDULER = "FlowMatchEulerDiscreteScheduler"  # the only class there that has no β


# The weights


def open_folder(folder: Path, parts: Collection[str] = PARTS) -> dict[str, Stored]:
    """Opens the files with weights; returns their tensors by name, "unet.…", none of them read yet.

    parts: the subfolders. Those that the index calls null are left out.
    """
    if not (folder / "model_index.json").is_file():
        raise ModelError(f"{folder} is not a folder of diffusers: it has no model_index.json")
    index = read_json(folder / "model_index.json")
    tensors = {}
    for part in (part for part in parts if index.get(part) != [None, None]):
        stored = open_weights(folder / part)
        tensors.update({f"{part}.{inner}": tensor for inner, tensor in stored.items()})
    return tensors


def open_weights(folder: Path) -> dict[str, Stored]:
    """Opens the weights of one part, which are in one file or in several."""
    found = weight_files([path.name for path in folder.glob("*")])
    if not (found and all_shards(found)):
        raise ModelError(f"{folder.parent} lacks files with the weights of its {folder.name}")
    tensors: dict[str, Stored] = {}
    for name in found:
        tensors |= TensorFile(folder / name).tensors()
    return tensors


def weight_files(files: Collection[str], part: str = "") -> list[str]:
    """Picks the files with the weights of a part: safetensors before .bin, full precision before half.

    part: its subfolder; "" for the files of the folder itself.
    """
    names = (f"{part}/" if part else "") + "(pytorch_model|diffusion_pytorch_model|model)"
    for ending in ("safetensors", "bin"):
        for variant in ("", r"\.fp32", r"\.fp16", r"\.bf16"):
            for shard in ("", r"-\d+-of-\d+"):
                pattern = rf"{names}({variant}{shard}|{shard}{variant})\.{ending}"
                found = sorted(name for name in files if re.fullmatch(pattern, name))
                if found:
                    return found
    return []


def all_shards(files: Collection[str]) -> bool:
    """True if, of weights in several files, none is missing."""
    shards = [(re.sub(r"-\d+-of", "", name), int(total)) for name in files for total in _SHARD.findall(name)]
    return all(shards.count(one) == one[1] for one in shards)


_SHARD = re.compile(r"-of-(\d+)")


# The configs


def read_configs(folder: Path, parts: Collection[str] = PARTS) -> dict[str, dict[str, Any]]:
    """Reads the `config.json` of each part and that of the scheduler, by subfolder.

    Also "model_index" and, for models with two, "tokenizer_config": that of the second tokenizer.
    """
    jsons = {part: read_json(folder / part / "config.json") for part in parts}
    jsons["scheduler"] = read_json(folder / "scheduler" / "scheduler_config.json")
    for file in (folder / name for name in ("model_index.json", "tokenizer_2/tokenizer_config.json")):
        if file.is_file():
            jsons[file.stem] = read_json(file)
    return jsons


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise ModelError(f"{path} is missing or is not JSON")
    return content


def _tables(flow: bool) -> dict[str, str]:
    """Returns the key in `FIELDS` and `FIXED` of each part."""
    return {**dict(zip(PARTS, PARTS)), "scheduler": "flow scheduler" if flow else "scheduler"}


def config_from_diffusers(jsons: Mapping[str, Mapping[str, Any]], name: str = "diffusers") -> ModelConfig:
    """Translates the contents of the four `config.json`s, by folder, into our config."""
    return ModelConfig(name=name, **fields_from_diffusers(jsons))


def fields_from_diffusers(jsons: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Translates the contents of the four `config.json`s into the fields of our config."""
    flow = jsons["scheduler"].get("_class_name") == FLOW_SCHEDULER
    ours = {part: translated(jsons[part], table, part) for part, table in _tables(flow).items()}
    unet, blocks = ours["unet"], jsons["unet"].get("down_block_types")
    if not isinstance(blocks, list):
        raise ModelError("the config of its unet lacks down_block_types")
    for field, key in (("heads", "attention_head_dim"), ("attention", "transformer_layers_per_block")):
        value = unet[field]  # one number for all levels, or one for each
        unet[field] = value if isinstance(value, tuple) else (value,) * len(blocks)
        if len(unet[field]) != len(blocks) or not all(isinstance(n, int) for n in unet[field]):
            text = f"its unet has {key} = {short(value)}, which does not fit its {len(blocks)} levels"
            raise ModelError(text)
    kinds = {"CrossAttnDownBlock2D": "CrossAttnUpBlock2D", "DownBlock2D": "UpBlock2D"}
    mirrored = [kinds.get(block) for block in reversed(blocks)]
    if None in mirrored or jsons["unet"].get("up_block_types", mirrored) != mirrored:
        raise ModelError(
            f"its unet has down_block_types = {short(blocks)}, or up_block_types that do not fit"
        )
    if unet["middle"] not in (None, "UNetMidBlock2DCrossAttn"):
        raise ModelError(f"its unet has mid_block_type = {short(unet['middle'])}, which is not built in")
    unet["middle"] = unet["middle"] is not None
    unet["middle_attention"] = unet["attention"][-1]
    unet["attention"] = tuple(n if "CrossAttn" in block else 0 for n, block in zip(unet["attention"], blocks))
    schedule = ours["scheduler"]
    own = schedule.get("trained_betas")
    if own is not None and not _are_betas(own, schedule["num_training_steps"]):
        said = short(jsons["scheduler"]["trained_betas"])
        raise ModelError(f"its scheduler has trained_betas = {said}, which are not one for each step")
    if flow:
        schedule["prediction_type"] = "flow"
    elif jsons["scheduler"].get("timestep_spacing") == "trailing" and not schedule["zero_terminal_snr"]:
        schedule["timestep_spacing"] = (
            "trailing"  # which zero_terminal_snr implies; all others are the samplers'
        )
    vae = VAEConfig(**ours["vae"])
    return {
        "size": _side(jsons["unet"].get("sample_size")) * vae.factor,
        "clip": CLIPConfig(**ours["text_encoder"]),
        "vae": vae,
        "unet": UNetConfig(**unet),
        "schedule": ScheduleConfig(**schedule),
    }


def translated(theirs: Mapping[str, Any], table: str, part: str) -> dict[str, Any]:
    """Translates one config by a table of `FIELDS` and `FIXED`. part: its subfolder, for messages."""
    return by_fields(theirs, FIELDS[table], FIXED[table], part)


def by_fields(
    theirs: Mapping[str, Any], fields: Iterable[tuple[Any, ...]], fixed: Mapping[str, Any], part: str
) -> dict[str, Any]:
    """The same by fields, and by keys of which one value is built in."""
    ours = {}
    for field, key, *absent in fields:
        if key not in theirs and not absent:
            raise ModelError(f"the config of its {part} lacks {key}")
        ours[field] = _one(theirs.get(key, *absent), field in LISTS)
        if isinstance(ours[field], tuple) and field not in LISTS:
            raise ModelError(f"its {part} has {key} = {short(theirs[key])}, where one value is built in")
    for key, value in fixed.items():
        if _one(theirs.get(key, value)) != value:
            raise ModelError(f"its {part} has {key} = {short(theirs[key])}, which is not built in")
    return ours


def _are_betas(value: Any, steps: int) -> bool:
    """True for one number between 0 and 1 for each training step."""
    are_numbers = isinstance(value, tuple) and all(isinstance(beta, int | float) for beta in value)
    return are_numbers and len(value) == steps and min(value) > 0 and max(value) < 1


def _one(value: Any, is_list: bool = False) -> Any:
    """Makes one value of a list that repeats it, and a tuple of any other list."""
    if not isinstance(value, list):
        return value
    return value[0] if value and not is_list and value.count(value[0]) == len(value) else tuple(value)


def _side(sample_size: Any) -> int:
    """Returns the side in latents of the pictures that the U-Net was trained on, from one side or two."""
    sides = sample_size if isinstance(sample_size, list) else [sample_size or 64]
    if not sides or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ModelError(f"its unet has sample_size = {short(sample_size)}, which is no size")
    return max(sides)


def config_to_diffusers(config: ModelConfig) -> dict[str, dict[str, Any]]:
    """Translates our config into the contents of the four `config.json`s, by folder."""
    ours = {"text_encoder": config.clip, "vae": config.vae, "unet": config.unet, "scheduler": config.schedule}
    flow = config.schedule.prediction_type == "flow"
    jsons: dict[str, dict[str, Any]] = {
        part: {key: getattr(ours[part], field) for field, key, *_ in FIELDS[table]} | FIXED[table]
        for part, table in _tables(flow).items()
    }
    jsons["text_encoder"] = clip_to_diffusers(config.clip)
    levels = len(config.vae.channels)
    jsons["vae"] |= {
        "_class_name": "AutoencoderKL",
        "out_channels": config.vae.in_channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "sample_size": config.size,
    }
    jsons["unet"] |= _unet_to_diffusers(config.unet) | {"sample_size": config.size // config.vae.factor}
    if flow:
        jsons["scheduler"]["_class_name"] = FLOW_SCHEDULER
    elif config.unet.guidance_width is not None:
        jsons["scheduler"]["_class_name"] = "LCMScheduler"
    else:
        del jsons["scheduler"]["original_inference_steps"]  # LCMScheduler's alone
        jsons["scheduler"] |= {  # SD 1.x's own sampler; a pipeline can be given another
            "_class_name": "DDIMScheduler" if config.schedule.zero_terminal_snr else "PNDMScheduler",
            "set_alpha_to_one": False,
            "skip_prk_steps": True,
            "clip_sample": False,  # for the samplers that would, by default, clip x̂₀ to [−1, 1]
            "steps_offset": 1,
        }
        if config.schedule.zero_terminal_snr or config.schedule.timestep_spacing:
            jsons["scheduler"]["timestep_spacing"] = "trailing"
        if jsons["scheduler"]["_class_name"] == "PNDMScheduler" and config.schedule.timestep_spacing:
            euler(jsons["scheduler"])  # SD-Turbo's
    return jsons


def euler(scheduler: dict[str, Any], kind: str = "EulerDiscreteScheduler") -> None:
    """Names Euler's sampler in the config of a scheduler, and takes out what is not for it."""
    for key in ("set_alpha_to_one", "skip_prk_steps", "clip_sample"):
        scheduler.pop(key, None)
    scheduler["_class_name"] = kind


def clip_to_diffusers(config: CLIPConfig) -> dict[str, Any]:
    """Translates the config of a text encoder into the contents of its `config.json`."""
    return {
        **{key: getattr(config, field) for field, key, *_ in FIELDS["text_encoder"]},
        **FIXED["text_encoder"],
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "intermediate_size": 4 * config.width,
        "bos_token_id": config.vocab_size - 2,
        "eos_token_id": config.vocab_size - 1,
        "pad_token_id": config.vocab_size - 1,
    }


def model_index(config: ModelConfig) -> dict[str, Any]:
    """Returns what model_index.json says beside the parts of the model."""
    return {
        "_class_name": pipeline_class(config),
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
    }


def pipeline_class(config: ModelConfig) -> str:
    """Returns the class of diffusers that draws with the model as it was made to."""
    if config.unet.guidance_width is not None:
        return "LatentConsistencyModelPipeline"
    # Beside the noisy latents: those of a picture to change, or of a picture with a hole, and its mask.
    extra, latents = config.unet.in_channels - config.vae.latent_channels, config.vae.latent_channels
    special = {latents: "InstructPix2Pix", latents + 1: "Inpaint"}
    return f"StableDiffusion{special.get(extra, '')}Pipeline"


def _unet_to_diffusers(config: UNetConfig) -> dict[str, Any]:
    heads, attention = config.heads, config.attention
    # In diffusers, the last entry counts for the middle too, whether or not the last level has attention.
    depths = [*(depth or 1 for depth in attention[:-1]), config.middle_attention]
    if not config.middle:
        depths[-1] = attention[-1] or 1
    if attention[-1] not in (0, depths[-1]):
        raise ModelError("its middle has another depth than its last level, which diffusers cannot express")
    return {
        "_class_name": "UNet2DConditionModel",
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in attention],
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(attention)],
        "mid_block_type": "UNetMidBlock2DCrossAttn" if config.middle else None,
        "attention_head_dim": heads[0] if len(set(heads)) == 1 else list(heads),
        "transformer_layers_per_block": depths[0] if len(set(depths)) == 1 else depths,
    }
