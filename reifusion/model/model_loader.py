"""A file becomes the four networks, and back: finds the format and the sizes, checks, loads tensor by tensor.

`load` and `save` are the two to read; `_open` finds out what a file is. A model is read from one file
(`.safetensors`, `.ckpt`; recognised by content, not by name), from a folder of diffusers, or from the hub.
No code in a file is ever run, and every complaint is a `ModelError` of one sentence.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..files import whole
from .clip import CLIP
from .config import MINI, SD15, CLIPConfig, ModelConfig, ScheduleConfig, UNetConfig, VAEConfig
from .decoder import Decoder
from .diffusion import UNet
from .encoder import Encoder
from .model_converter import (
    NETWORKS,
    Rule,
    config_from_diffusers,
    config_to_diffusers,
    convert,
    match,
    structure,
)
from .tensors import ModelError, TensorFile, write_tensors
from .tokenizer import END, Tokenizer

MINI_PATH = Path(__file__).parent.parent / "data" / "mini.safetensors"
PRESETS = (SD15, MINI)  # what shapes cannot tell is taken from the one with the same shapes

# What `save` writes in a header; the rest of it is the user's.
_OWN_KEYS = ("format", "config", "tokenizer", "pad", "vocabulary")

# Relatives that are recognised, to say so.
OTHERS = (
    (r"cond_stage_model\.model\.", "Stable Diffusion 2.x in one file, which is read only from a folder"),
    (r"conditioner\.", "Stable Diffusion XL, which is not built in"),
    (r".*(joint_blocks|double_blocks|single_transformer_blocks)\.", "a diffusion transformer, not a U-Net"),
    (r"lora_|.*\.lora[_.]", "a LoRA, which changes a model and is none by itself"),
    (r"control_model\.|controlnet_", "a ControlNet, which guides a model and is none by itself"),
)


def load(
    source: str | Path = "mini",
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    config: ModelConfig | None = None,
    make: Callable[[ModelConfig], dict[str, nn.Module]] | None = None,
) -> tuple[ModelConfig, dict[str, nn.Module], Tokenizer]:
    """A model's config, its networks ("clip", "encoder", "decoder", "diffusion") and its tokenizer.

    source: "mini", a file, a folder of diffusers, or a hub id "owner/name". dtype: None keeps the file's.
    config: None finds it; a file of unusual shapes that does not hold its config needs one. make: makes the
    networks of a config; None for `build`.
    """
    checkpoint = _open(source, config)
    models = _networks(checkpoint, make or build)
    for name, module in models.items():
        # The modules have shapes but no memory yet; every tensor read becomes a parameter as it is.
        module.load_state_dict(checkpoint.state(name, device, dtype), assign=True)
        module.eval()
    return checkpoint.config, models, _tokenizer(checkpoint)


def preload_models_from_standard_weights(
    ckpt_path: str | Path, device: str | torch.device = "cpu"
) -> dict[str, nn.Module]:
    """The networks of a checkpoint, by name: "clip", "encoder", "decoder", "diffusion"."""
    return load(ckpt_path, device)[1]


def read_states(source: str | Path, device: str | torch.device = "cpu") -> dict[str, dict[str, Tensor]]:
    """The state dicts of a checkpoint's networks."""
    checkpoint = _open(source)
    return {name: checkpoint.state(name, device) for name in _networks(checkpoint, build)}


@dataclass(frozen=True)
class Info:
    """What a model's file says about itself."""

    path: Path
    format: str  # one of FORMATS
    config: ModelConfig
    parameters: dict[str, int]  # of each network
    dtype: str  # of most of them
    size: int  # of the files with weights, in bytes
    metadata: dict[str, str]


def info(source: str | Path) -> Info:
    """The facts about a model, from the headers alone."""
    checkpoint = _open(source)
    parameters = dict.fromkeys(NETWORKS, 0)
    dtypes: Counter[torch.dtype] = Counter()
    for rule in checkpoint.rules:
        for file, name in map(checkpoint.where.__getitem__, rule.theirs):
            parameters[rule.ours.split(".")[0]] += file.shapes[name].numel()
            dtypes[file.dtypes[name]] += file.shapes[name].numel()
    size = sum(path.stat().st_size for path in {file.path for file, _ in checkpoint.where.values()})
    dtype = str(dtypes.most_common(1)[0][0]).removeprefix("torch.")
    metadata = {k: v for k, v in checkpoint.metadata.items() if k not in _OWN_KEYS}
    return Info(checkpoint.path, checkpoint.format, checkpoint.config, parameters, dtype, size, metadata)


def save(
    config: ModelConfig,
    models: Mapping[str, nn.Module],
    path: str | Path,
    to: str = "native",
    tokenizer: Tokenizer | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a model: one `.safetensors` ("native", "compvis"), or a folder ("diffusers").

    A reader sees the old content or the new, never half of it. metadata: more facts for the file's header.
    """
    path = Path(path)
    if to == "diffusers":
        ours = path.is_dir() and ((path / "model_index.json").exists() or not any(path.iterdir()))
        if path.exists() and not ours:
            raise ModelError(f"{path} exists and is not a diffusers folder, so it was left as it is")
    elif path.is_dir():
        raise ModelError(f"{path} is a folder, and the format {to} is one file")
    native = _state(models)
    for name, x in _state(build(config)).items():  # a file that could not be loaded again must not be written
        if name not in native or native[name].shape != x.shape:
            raise ModelError(f"the networks do not have the sizes of their config, at {name}")
    tokenizer = tokenizer or Tokenizer(context_length=config.clip.context_length)
    if tokenizer.vocab_size > config.clip.vocab_size:
        raise ModelError("the text encoder has fewer tokens than the tokenizer")
    tensors = {key: x.detach().cpu().contiguous() for key, x in convert(native, to, config).items()}
    header = {**(metadata or {}), "format": "reifusion" if to == "native" else "pt"}
    header |= {"config": json.dumps(asdict(config)), **_tokenizer_header(tokenizer)}
    with whole(path) as temporary:
        if to == "diffusers":
            _write_folder(temporary, config, tensors)
            tokenizer.save_folder(temporary / "tokenizer")
        else:
            write_tensors(tensors, temporary, header)


# From a source to an opened checkpoint, of which no tensor has been read yet


@dataclass
class _Checkpoint:
    path: Path
    format: str
    config: ModelConfig
    rules: list[Rule]  # from the tensors here to ours
    unknown: list[str]  # the tensors here that no rule knows
    where: dict[str, tuple[TensorFile, str]]  # of each tensor: its file, and its name in there
    metadata: dict[str, str]

    def state(
        self, network: str, device: str | torch.device, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """The state dict of a network, read tensor by tensor."""
        state = {}
        for rule in self.rules:
            if rule.ours.startswith(f"{network}."):
                places = map(self.where.__getitem__, rule.theirs)
                parts = [file.read(name, device, dtype) for file, name in places]
                state[rule.ours.removeprefix(f"{network}.")] = rule.merge(parts)
        return state


def _open(source: str | Path, config: ModelConfig | None = None) -> _Checkpoint:
    path = _find(source)
    if path.is_dir():
        where, metadata = _open_folder(path), {}
    else:
        file = TensorFile(path)
        where, metadata = {name: (file, name) for name in file.shapes}, file.metadata
    for pattern, what in OTHERS:
        if any(re.match(pattern, name) for name in where):
            raise ModelError(f"{path} is {what}")
    try:
        if config is None and path.is_dir():
            config = _config_from_folder(path)
        elif config is None and "config" in metadata:
            config = _config_from_header(metadata)
        format, rules, unknown = match(where, config)
        networks = {rule.ours.split(".")[0] for rule in rules}
        for network in NETWORKS:
            if network not in networks:
                raise ModelError(f"there are no tensors for the {network}")
        if config is None:
            config = _config_from_shapes({rule.ours: _shape(rule, where) for rule in rules})
        if config.unet.guidance_width is not None:  # as Luo et al. 2023 draw with their LCMs
            config = replace(config, sampler="lcm", steps=4, cfg=8.0)
    except ModelError as error:
        raise ModelError(f"{path} is not a model that can be loaded: {error}") from None
    return _Checkpoint(path, format, config, rules, unknown, where, metadata)


def _shape(rule: Rule, where: Mapping[str, tuple[TensorFile, str]]) -> torch.Size:
    """The shape that our tensor will have."""
    parts = [file.shapes[name] for file, name in map(where.__getitem__, rule.theirs)]
    return torch.Size((sum(part[0] for part in parts), *parts[0][1:])) if all(parts) else torch.Size()


def _networks(
    checkpoint: _Checkpoint, make: Callable[[ModelConfig], dict[str, nn.Module]]
) -> dict[str, nn.Module]:
    """The networks, without memory for their parameters, after a check that all tensors are there and fit."""
    path = checkpoint.path
    try:
        models = make(checkpoint.config)
    except (ValueError, TypeError, ArithmeticError, LookupError, RuntimeError) as error:
        raise ModelError(f"the config of {path} makes no model: {error}") from error
    expected = {name: tuple(x.shape) for name, x in _state(models).items()}
    missing = sorted(expected.keys() - {rule.ours for rule in checkpoint.rules})
    if missing:
        raise ModelError(f"{path} lacks {len(missing)} tensors that the model needs, first {missing[0]}")
    extra = [rule.theirs[0] for rule in checkpoint.rules if rule.ours not in expected] + checkpoint.unknown
    if extra:
        raise ModelError(f"{path} has {len(extra)} tensors without a place in the model, first {extra[0]}")
    for rule in checkpoint.rules:
        rows, *rest = expected[rule.ours]
        need = (rows // len(rule.theirs), *rest)
        for name in rule.theirs:
            file, inner = checkpoint.where[name]
            shape = tuple(file.shapes[inner])
            if shape != need and not (rule.pointwise and shape == (*need, 1, 1)):
                raise ModelError(f"tensor {inner} in {file.path} has shape {shape}, but needs {need}")
            if not file.dtypes[inner].is_floating_point:
                raise ModelError(f"tensor {inner} in {file.path} holds no floating-point numbers")
    return models


class _Unfilled(TorchFunctionMode):
    """Nothing is drawn for parameters without memory; on "meta", PyTorch would import its compiler for it."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__module__", None) != "torch.nn.init":
            return function(*args, **(kwargs or {}))
        return None


def build(config: ModelConfig, unet: type[UNet] = UNet) -> dict[str, nn.Module]:
    """The networks of a config, on PyTorch's "meta" device: shapes without memory."""
    with _Unfilled(), torch.device("meta"):
        return {
            "clip": CLIP(config.clip),
            "encoder": Encoder(config.vae),
            "decoder": Decoder(config.vae),
            "diffusion": unet(config.unet),
        }


def _state(models: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    return {f"{net}.{name}": x for net in NETWORKS for name, x in models[net].state_dict().items()}


def _find(source: str | Path) -> Path:
    """What `load` was given -> a path that exists."""
    path = MINI_PATH if source == "mini" else Path(source).expanduser()
    with suppress(OSError, ValueError):  # what cannot be a path
        if path.exists():
            return path
    if source == "mini":
        raise ModelError(f"the mini's weights are not part of this installation: there is no {path}")
    is_file = path.suffix in (".safetensors", ".ckpt", ".pt", ".bin")
    if isinstance(source, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) and not is_file:
        return _download(source)
    raise ModelError(f"there is no file or folder {path}")


def _download(repository: str) -> Path:
    """A model of the hub -> its folder in the local cache, with the files that are needed and no others."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        files = HfApi().list_repo_files(repository)
        wanted = [name for part in PARTS for name in _component(files, part)]
        return Path(snapshot_download(repository, allow_patterns=[*wanted, "*.json", "tokenizer/*"]))
    except RepositoryNotFoundError:
        raise ModelError(f"there is no file or folder {repository}, and no public model on the hub") from None
    except Exception as error:  # no network, a proxy, a time-out: what is raised depends on versions
        try:
            return Path(snapshot_download(repository, local_files_only=True))
        except Exception:
            why = f"the hub was not reached ({type(error).__name__}) and the model is not in the local cache"
            raise ModelError(f"there is no file or folder {repository}; {why}") from None


# A folder of diffusers

PARTS = ("text_encoder", "vae", "unet")


def _component(files: Collection[str], part: str) -> list[str]:
    """Of a model's files, those with the weights of a part: safetensors before .bin, full before fp16."""
    names = rf"{part}/(pytorch_model|diffusion_pytorch_model|model)"
    for ending in ("safetensors", "bin"):
        for variant in ("", r"\.fp16"):
            for shard in ("", r"-\d+-of-\d+"):
                pattern = rf"{names}({variant}{shard}|{shard}{variant})\.{ending}"
                found = sorted(name for name in files if re.fullmatch(pattern, name))
                if found:
                    return found
    return []


def _open_folder(folder: Path) -> dict[str, tuple[TensorFile, str]]:
    if not (folder / "model_index.json").is_file():
        raise ModelError(f"{folder} is not a folder of diffusers: it has no model_index.json")
    if "text_encoder_2" in _read_json(folder / "model_index.json"):
        raise ModelError(f"{folder} is Stable Diffusion XL, which is not built in")
    files = [path.relative_to(folder).as_posix() for path in folder.glob("*/*")]
    where = {}
    for part in PARTS:
        found = _component(files, part)
        total = re.search(r"-of-(\d+)", found[0]) if found else None
        if len(found) != (int(total[1]) if total else 1):
            raise ModelError(f"{folder} has not all files with the weights of its {part}")
        for name in found:
            file = TensorFile(folder / name)
            where.update({f"{part}.{inner}": (file, inner) for inner in file.shapes})
    return where


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise ModelError(f"{path} is missing or is not JSON")
    return content


def _write_folder(folder: Path, config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
    """All but the tokenizer of what `diffusers.StableDiffusionPipeline.from_pretrained` opens."""
    configs = config_to_diffusers(config)
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.30.0",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", configs["scheduler"]["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    for part, values in configs.items():
        (folder / part).mkdir()
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        (folder / part / name).write_text(json.dumps(values, indent=2))
        if part in PARTS:
            name = "model" if part == "text_encoder" else "diffusion_pytorch_model"
            start = f"{part}."
            own = {key.removeprefix(start): x for key, x in tensors.items() if key.startswith(start)}
            write_tensors(own, folder / part / f"{name}.safetensors", {"format": "pt"})


# Configs and tokenizers


def _config_from_folder(folder: Path) -> ModelConfig:
    jsons = {part: _read_json(folder / part / "config.json") for part in PARTS}
    jsons["scheduler"] = _read_json(folder / "scheduler" / "scheduler_config.json")
    return config_from_diffusers(jsons, folder.resolve().name)


def _config_from_header(header: Mapping[str, str]) -> ModelConfig | None:
    """The config that `save` wrote; None for a config of some other program."""
    parts = {"clip": CLIPConfig, "vae": VAEConfig, "unet": UNetConfig, "schedule": ScheduleConfig}
    try:
        given = _up_to_date(json.loads(header["config"]))
        for name, part in parts.items():
            fields = {key: tuple(x) if isinstance(x, list) else x for key, x in given[name].items()}
            given[name] = part(**fields)
        return ModelConfig(**given)
    except (ValueError, TypeError, KeyError, AttributeError):
        if header.get("format") != "reifusion":
            return None
        raise ModelError("its header has a config that this version does not understand") from None


def _up_to_date(given: dict[str, Any]) -> dict[str, Any]:
    """Translates an older header's config, which had one number of heads for all levels."""
    unet = given["unet"]
    width = unet.pop("head_width", None)
    if isinstance(unet["heads"], int):
        unet["heads"] = [unet["heads"] if width is None else c // width for c in unet["channels"]]
    unet["attention"] = [int(depth) for depth in unet["attention"]]
    for old, new in (("sampler_name", "sampler"), ("n_inference_steps", "steps"), ("cfg_scale", "cfg")):
        if old in given:
            given[new] = given.pop(old)
    return given


_GUIDANCE = "diffusion.time_embedding.guidance.weight"


def _config_from_shapes(shapes: Mapping[str, torch.Size]) -> ModelConfig:
    """What shapes cannot tell is taken from the preset that looks the same."""

    def size(name: str, axis: int) -> int:
        if len(shapes.get(name, ())) <= axis:
            raise ModelError(f"it lacks {name}")
        return shapes[name][axis]

    kind = structure(shapes, "native")
    vae_levels, unet_levels = range(len(kind.vae.channels)), range(len(kind.unet.channels))
    rows = [1 + level * (kind.unet.layers + 1) for level in unet_levels]
    clip: dict[str, Any] = {
        "vocab_size": size("clip.embedding.token.weight", 0),
        "context_length": size("clip.embedding.position", 0),
        "width": size("clip.embedding.position", 1),
        "layers": kind.clip.layers,
    }
    vae: dict[str, Any] = {
        "in_channels": size("encoder.conv_in.weight", 1),
        "latent_channels": size("decoder.post_quant.weight", 0),
        "channels": tuple(size(f"encoder.down.{i}.0.conv_1.weight", 0) for i in vae_levels),
        "layers": kind.vae.layers,
    }
    unet: dict[str, Any] = {
        "in_channels": size("diffusion.down.0.0.weight", 1),
        "out_channels": size("diffusion.conv_out.weight", 0),
        "channels": tuple(size(f"diffusion.down.{row}.0.conv_1.weight", 0) for row in rows),
        "attention": kind.unet.attention,
        "middle_attention": kind.unet.middle_attention,
        "layers": kind.unet.layers,
        "context_width": size("diffusion.middle.1.layers.0.cross_attention.kv.weight", 1),
        "guidance_width": None if kind.unet.guidance_width is None else size(_GUIDANCE, 1),
    }
    for preset in PRESETS:
        config = replace(
            preset,
            clip=replace(preset.clip, **clip),
            vae=replace(preset.vae, **vae),
            unet=replace(preset.unet, **unet),
        )
        # A vocabulary may have grown; a U-Net may see more than latents (9: inpainting, 8: editing by words),
        # or be told the guidance.
        same_clip = replace(config.clip, vocab_size=preset.clip.vocab_size) == preset.clip
        usual = replace(config.unet, in_channels=preset.unet.in_channels, guidance_width=None)
        same_unet = usual == preset.unet
        if same_clip and same_unet and config.vae == preset.vae and config.unet.in_channels in (4, 8, 9):
            return config
    raise ModelError("it has the shapes of no known model, and as they do not tell all, it needs its config")


def _tokenizer(checkpoint: _Checkpoint) -> Tokenizer:
    """The tokenizer that the model was trained with."""
    path, header, clip = checkpoint.path, checkpoint.metadata, checkpoint.config.clip
    try:
        if path.is_dir():
            tokenizer = Tokenizer.from_folder(path / "tokenizer", clip.context_length)
        else:
            vocabulary = json.loads(header.get("vocabulary", "null"))
            pad = header.get("pad", END)
            merges = header.get("tokenizer")
            tokenizer = Tokenizer(merges, clip.context_length, vocabulary=vocabulary, pad=pad)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"the tokenizer of {path} cannot be read: {error}") from None
    known = tokenizer.vocab_size
    if known > clip.vocab_size:
        raise ModelError(f"the tokenizer of {path} knows {known} tokens, its text encoder {clip.vocab_size}")
    return tokenizer


def _tokenizer_header(tokenizer: Tokenizer) -> dict[str, str]:
    """What a file's header must say about its tokenizer; nothing, if it is CLIP's own."""
    if tokenizer.is_standard:
        return {}
    header = {"tokenizer": tokenizer.merges_text, "pad": tokenizer._tokens[tokenizer.pad]}
    if Tokenizer(tokenizer.merges_text)._ids != tokenizer._ids:
        header["vocabulary"] = json.dumps(tokenizer._ids)
    return header
