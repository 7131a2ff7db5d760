"""A file becomes the four networks, and back: finds the format and the sizes, checks, loads tensor by tensor.

`load` and `save` are the two to read; `_open` finds out what a file is. A model is read from one file
(`.safetensors`, `.ckpt`; recognised by content, not by name), from a folder of diffusers, or from the hub.
No code in a file is ever run, and every complaint is a `ModelError` of one sentence.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
import zipfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .clip import CLIP, Tokenizer
from .config import MINI, SD15, CLIPConfig, ModelConfig, ScheduleConfig, UNetConfig, VAEConfig
from .decoder import Decoder
from .diffusion import UNet
from .encoder import Encoder
from .model_converter import FORMATS, NETWORKS, ModelError, Rule, convert, match, structure

__all__ = ["Info", "ModelError", "info", "load", "preload_models_from_standard_weights", "read_states", "save"]

MINI_PATH = Path(__file__).parent.parent / "data" / "mini.safetensors"
PRESETS = (SD15, MINI)  # what shapes cannot tell is taken from the one with the same shapes

# Relatives that are recognised, to say so.
OTHERS = (
    (r"cond_stage_model\.model\.", "Stable Diffusion 2.x, whose text encoder (OpenCLIP) is not built in yet"),
    (r"conditioner\.|text_encoder_2\.", "Stable Diffusion XL, which is not built in yet"),
    (r".*(joint_blocks|double_blocks|single_transformer_blocks)\.", "a diffusion transformer, which is another model"),
    (r".*\.lora_|lora_|.*\.lora\.", "a LoRA, which changes a model and is none by itself"),
    (r"control_model\.|controlnet_|input_hint_block\.", "a ControlNet, which guides a model and is none by itself"),
)


def load(
    source: str | Path = "mini",
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    config: ModelConfig | None = None,
) -> tuple[ModelConfig, dict[str, nn.Module], Tokenizer]:
    """A model's config, its networks ("clip", "encoder", "decoder", "diffusion") and its tokenizer.

    source: "mini", a file, a folder of diffusers, or a hub id "owner/name". dtype: None keeps the file's.
    config: None finds it; a file of unusual shapes without a config of its own needs one.
    """
    checkpoint = _open(source, config)
    models = _networks(checkpoint.config)
    checkpoint.check(models)
    for name, module in models.items():
        # The modules have shapes but no memory yet; every tensor becomes a parameter as it is.
        module.load_state_dict(checkpoint.states(name, device, dtype), assign=True)
        module.eval()
    return checkpoint.config, models, checkpoint.tokenizer()


def preload_models_from_standard_weights(
    ckpt_path: str | Path, device: str | torch.device = "cpu"
) -> dict[str, nn.Module]:
    """The networks of a checkpoint, by name: "clip", "encoder", "decoder", "diffusion"."""
    return load(ckpt_path, device)[1]


def read_states(path: str | Path, device: str | torch.device = "cpu") -> dict[str, dict[str, Tensor]]:
    """The state dicts of a checkpoint's networks."""
    checkpoint = _open(path)
    checkpoint.check(_networks(checkpoint.config))
    return {name: checkpoint.states(name, device) for name in NETWORKS}


@dataclass(frozen=True)
class Info:
    """What a model's file says about itself."""

    path: Path
    format: str  # one of FORMATS
    config: ModelConfig
    parameters: dict[str, int]  # of each network
    dtype: str  # of most of the tensors
    size: int  # bytes on disk
    metadata: dict[str, str]


def info(source: str | Path) -> Info:
    """The facts about a model, from the headers alone."""
    checkpoint = _open(source)
    parameters = dict.fromkeys(NETWORKS, 0)
    dtypes: Counter[torch.dtype] = Counter()
    for rule in checkpoint.rules:
        for name in rule.theirs:
            file, inner = checkpoint.where[name]
            parameters[rule.ours.split(".")[0]] += file.shapes[inner].numel()
            dtypes[file.dtypes[inner]] += file.shapes[inner].numel()
    size = sum(path.stat().st_size for path in {file.path for file, _ in checkpoint.where.values()})
    dtype = str(dtypes.most_common(1)[0][0]).removeprefix("torch.")
    metadata = {key: value for key, value in checkpoint.metadata.items() if key not in ("config", "tokenizer")}
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
    if to not in FORMATS:
        raise ModelError(f"there is no format {to!r}; the formats are {', '.join(FORMATS)}")
    path = Path(path)
    native = {f"{net}.{name}": tensor for net in NETWORKS for name, tensor in models[net].state_dict().items()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in convert(native, to, config).items()}
    if to == "diffusers":
        if path.exists() and not (path / "model_index.json").is_file() and not (path.is_dir() and not any(path.iterdir())):
            raise ModelError(f"{path} exists and is not a diffusers folder, so it was left as it is")
        with _replacing(path) as temporary:
            _write_folder(temporary, config, tensors, tokenizer or Tokenizer())
        return
    if path.is_dir():
        raise ModelError(f"{path} is a folder, and the format {to} is one file")
    header = {**(metadata or {}), "format": "reifusion" if to == "native" else "pt", "config": json.dumps(asdict(config))}
    if tokenizer is not None and not tokenizer.is_standard:
        header["tokenizer"] = tokenizer.merges_text()
    with _replacing(path) as temporary:
        save_file(tensors, temporary, header)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when all went well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.{kind}") for kind in ("new", "old"))
    try:
        yield temporary
        if path.is_dir():  # a folder cannot be replaced in one step
            path.rename(old)
        os.replace(temporary, path)
    finally:
        for rest in (temporary, old):
            shutil.rmtree(rest) if rest.is_dir() else rest.unlink(missing_ok=True)


# Opening


@dataclass
class _Checkpoint:
    """An opened model: what is in it and where, no tensor read yet."""

    path: Path
    format: str
    config: ModelConfig
    rules: list[Rule]  # from the file's tensors to ours
    unknown: list[str]  # tensors that no rule knows
    where: dict[str, tuple[_File, str]]  # name of a tensor -> its file and its name there
    metadata: dict[str, str]

    def states(self, network: str, device: str | torch.device, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The state dict of a network, read tensor by tensor."""
        state = {}
        for rule in self.rules:
            if rule.ours.startswith(f"{network}."):
                parts = [file.read(name, device, dtype) for file, name in map(self.where.__getitem__, rule.theirs)]
                state[rule.ours.removeprefix(f"{network}.")] = rule.merge(parts)
        return state

    def check(self, models: Mapping[str, nn.Module]) -> None:
        """Every tensor that the networks have is here with the same shape, and nothing else."""
        expected = {f"{net}.{name}": x.shape for net in models for name, x in models[net].state_dict().items()}
        missing = sorted(expected.keys() - {rule.ours for rule in self.rules})
        if missing:
            raise ModelError(f"{self.path} lacks {len(missing)} tensors that the model needs, first {missing[0]}")
        extra = self.unknown + [rule.theirs[0] for rule in self.rules if rule.ours not in expected]
        if extra:
            raise ModelError(f"{self.path} has {len(extra)} tensors that the model has no place for, first {extra[0]}")
        for rule in self.rules:
            rows, *rest = expected[rule.ours]
            want = (rows // len(rule.theirs), *rest)
            for name in rule.theirs:
                file, inner = self.where[name]
                shape = tuple(file.shapes[inner])
                if shape != want and not (rule.pointwise and shape == (*want, 1, 1)):
                    raise ModelError(f"tensor {name} in {file.path} has the shape {shape}, but the model needs {want}")

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the model was trained with."""
        length = self.config.clip.context_length
        if self.format == "diffusers":
            return Tokenizer.from_folder(self.path / "tokenizer", context_length=length)
        return Tokenizer(self.metadata.get("tokenizer"), context_length=length)


def _open(source: str | Path, config: ModelConfig | None = None) -> _Checkpoint:
    path = _find(source)
    metadata: dict[str, str] = {}
    if path.is_dir():
        where = _open_folder(path)
    else:
        file = _File(path)
        metadata = file.metadata
        where = {name: (file, name) for name in file.shapes}
    for pattern, what in OTHERS:
        if any(re.match(pattern, name) for name in where):
            raise ModelError(f"{path} is {what}")
    if config is None and "config" in metadata:
        config = _config_from_json(metadata["config"], path)
    elif config is None and path.is_dir():
        config = _config_from_folder(path)
    try:
        format, rules, unknown = match(where, config)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    networks = {rule.ours.split(".")[0] for rule in rules}
    for network in NETWORKS:
        if network not in networks:
            raise ModelError(f"{path} has no tensors for the network {network!r}, so it is not a whole model")
    if config is None:
        config = _config_from_shapes(path, {rule.ours: _shape(rule, where) for rule in rules})
    return _Checkpoint(path, format, config, rules, unknown, where, metadata)


def _shape(rule: Rule, where: Mapping[str, tuple[_File, str]]) -> torch.Size:
    """The shape that our tensor will have."""
    parts = [file.shapes[name] for file, name in map(where.__getitem__, rule.theirs)]
    return torch.Size((sum(part[0] for part in parts), *parts[0][1:])) if parts[0] else parts[0]


def _find(source: str | Path) -> Path:
    """What `load` was given -> a path that exists."""
    path = MINI_PATH if source == "mini" else Path(source).expanduser()
    if path.exists():
        return path
    if source == "mini":
        raise ModelError(f"the mini's weights are not part of this installation: there is no {path}")
    if isinstance(source, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) and not _is_weights(source):
        return _download(source)
    raise ModelError(f"there is no file or folder {path}")


def _download(repository: str) -> Path:
    """A model of the hub -> the folder of its files here; only those that are read, and only once."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        try:
            files = HfApi().list_repo_files(repository)
        except (RepositoryNotFoundError, HfHubHTTPError) as error:
            if getattr(error.response, "status_code", 500) in (401, 403, 404):
                raise ModelError(f"there is no public model {repository} on the hub, nor a folder of that name") from None
            raise
        wanted = [name for part in PARTS for name in _component(files, part)]
        wanted += ["model_index.json", *(f"{part}/*.json" for part in PARTS), "scheduler/*.json", "tokenizer/*"]
        return Path(snapshot_download(repository, allow_patterns=wanted))
    except ModelError:
        raise
    except Exception:  # no network, a proxy, a timeout: each client has its own exceptions
        try:
            return Path(snapshot_download(repository, local_files_only=True))
        except (LocalEntryNotFoundError, OSError, ValueError):
            raise ModelError(f"the model {repository} could not be fetched: the hub was not reached") from None


# One file


class _File:
    """A file of tensors. Opening reads the header; `read` reads one tensor."""

    def __init__(self, path: Path):
        self.path = path
        self.metadata: dict[str, str] = {}
        self.shapes: dict[str, torch.Size] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._get: Callable[[str], Tensor] | None = None
        self._mapped = 0
        with open(path, "rb") as stream:
            start = stream.read(64)
        header = int.from_bytes(start[:8], "little")
        if start[8:9] == b"{":
            self._open = self._open_safetensors
            if header + 8 > path.stat().st_size:
                raise ModelError(f"{path} is cut off or damaged; fetch it again")
        elif start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
            self._open = self._open_pickle
        elif start.startswith(b"version https://git-lfs"):
            raise ModelError(f"{path} is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`")
        elif not start:
            raise ModelError(f"{path} is empty")
        else:
            raise ModelError(f"{path} is not a checkpoint")
        self._get = self._open()

    def read(self, name: str, device: str | torch.device, dtype: torch.dtype | None) -> Tensor:
        """One tensor, converted."""
        # The file is mapped into memory, and what was read of it counts as ours until the mapping is closed.
        if self._get is None or self._mapped > self.path.stat().st_size // 32:
            self._get, self._mapped = None, 0
            self._get = self._open()
        tensor = self._get(name)
        self._mapped += tensor.nbytes
        return tensor.to(device, dtype or tensor.dtype, copy=True)

    def _open_safetensors(self) -> Callable[[str], Tensor]:
        try:
            handle = safe_open(self.path, "pt")
        except (SafetensorError, OSError):
            raise ModelError(f"{self.path} is cut off or damaged; fetch it again") from None
        if not self.shapes:
            self.metadata = handle.metadata() or {}
            for name in handle.keys():
                part = handle.get_slice(name)
                self.shapes[name] = torch.Size(part.get_shape())
                self.dtypes[name] = _DTYPES.get(part.get_dtype(), torch.uint8)
        return handle.get_tensor

    def _open_pickle(self) -> Callable[[str], Tensor]:
        tensors = {name: x for name, x in _unpickle(self.path).items() if isinstance(x, Tensor)}
        self.shapes = {name: x.shape for name, x in tensors.items()}
        self.dtypes = {name: x.dtype for name, x in tensors.items()}
        return tensors.__getitem__


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPES |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32}


class _Inert:
    """Stands in for the objects that PyTorch Lightning leaves in its checkpoints; does nothing."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass


def _unpickle(path: Path) -> dict[str, Any]:
    """A `.ckpt`, `.pt` or `.bin` -> its tensors by name, on disk until used. Nothing in the file is run."""
    zipped = zipfile.is_zipfile(path)  # the format of PyTorch ≥ 1.6, which can be mapped into memory
    inert: list[Any] = []
    try:
        if zipped:
            for name in torch.serialization.get_unsafe_globals_in_checkpoint(path):
                if not name.startswith(("pytorch_lightning.", "lightning.")):
                    raise ModelError(f"{path} holds code ({name}), not only tensors, and was not opened")
                inert.append((_Inert, name))
        with torch.serialization.safe_globals(inert):
            content = torch.load(path, map_location="cpu", mmap=zipped, weights_only=True)
    except UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            raise ModelError(f"{path} holds code ({code[1]}), not only tensors, and was not opened") from None
        raise ModelError(f"{path} is not a checkpoint, or is damaged") from None
    except (RuntimeError, EOFError, OSError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is cut off or damaged; fetch it again") from error
    content = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(content, Mapping):
        raise ModelError(f"{path} holds no dictionary of tensors")
    return dict(content)


# A folder of diffusers

PARTS = ("text_encoder", "vae", "unet")


def _is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".ckpt", ".pt", ".pth", ".bin"))


def _component(files: Collection[str], part: str) -> list[str]:
    """Of all files of a model, those with the weights of a part: safetensors before .bin, full before fp16."""
    base = rf"{part}/(pytorch_model|diffusion_pytorch_model|model)"
    for kind in ("safetensors", "bin"):
        for variant in ("", r"\.fp16"):
            shard = rf"(-\d+-of-\d+)?{variant}(-\d+-of-\d+)?\.{kind}"
            found = [name for name in files if re.fullmatch(base + shard, name)]
            if found:
                whole = [name for name in found if "-of-" not in name]
                return whole[:1] or sorted(found)
    return []


def _open_folder(folder: Path) -> dict[str, tuple[_File, str]]:
    index = _read_json(folder / "model_index.json", f"{folder} is not a diffusers model: it has no model_index.json")
    if "text_encoder_2" in index:
        raise ModelError(f"{folder} is Stable Diffusion XL, which is not built in yet")
    files = [path.relative_to(folder).as_posix() for path in folder.glob("*/*")]
    where = {}
    for part in PARTS:
        chosen = _component(files, part)
        shards = re.search(r"-of-0*(\d+)", chosen[0]) if chosen else None
        if not chosen or (shards and len(chosen) != int(shards[1])):
            raise ModelError(f"{folder} has not all files with the weights of its {part}")
        for name in chosen:
            file = _File(folder / name)
            where.update({f"{part}.{inner}": (file, inner) for inner in file.shapes})
    return where


def _read_json(path: Path, otherwise: str | None = None) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ModelError(otherwise or f"{path} is missing") from None
    except (OSError, ValueError):
        raise ModelError(f"{path} cannot be read as JSON") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} is not a JSON object")
    return content


# Configs

# Our fields and the keys of diffusers's `config.json`s; read in one direction by `load`, in the other by `save`.
KEYS: dict[str, dict[str, str]] = {
    "text_encoder": {
        "vocab_size": "vocab_size",
        "context_length": "max_position_embeddings",
        "width": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "activation": "hidden_act",
    },
    "vae": {
        "in_channels": "in_channels",
        "latent_channels": "latent_channels",
        "channels": "block_out_channels",
        "layers": "layers_per_block",
        "groups": "norm_num_groups",
        "scale_factor": "scaling_factor",
    },
    "unet": {
        "in_channels": "in_channels",
        "out_channels": "out_channels",
        "channels": "block_out_channels",
        "layers": "layers_per_block",
        "heads": "attention_head_dim",  # misnamed there: it is the number of heads, or a list of one for each level
        "context_width": "cross_attention_dim",
        "groups": "norm_num_groups",
        "linear_projection": "use_linear_projection",
    },
    "scheduler": {
        "num_training_steps": "num_train_timesteps",
        "beta_start": "beta_start",
        "beta_end": "beta_end",
        "beta_schedule": "beta_schedule",
        "prediction_type": "prediction_type",
    },
}
# What old folders leave out.
DEFAULTS: dict[str, dict[str, Any]] = {
    "text_encoder": {"hidden_act": "quick_gelu", "max_position_embeddings": 77},
    "vae": {"scaling_factor": 0.18215, "norm_num_groups": 32},
    "unet": {"attention_head_dim": 8, "norm_num_groups": 32, "use_linear_projection": False},
    "scheduler": {"prediction_type": "epsilon"},
}
# What diffusers can vary and this project cannot: anything but these would silently draw something else.
ONLY: dict[str, dict[str, Any]] = {
    "text_encoder": {"layer_norm_eps": 1e-5},
    "vae": {"act_fn": "silu", "mid_block_add_attention": True, "shift_factor": None, "use_quant_conv": True},
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
        "norm_eps": 1e-5,
        "num_attention_heads": None,
        "num_class_embeds": None,
        "only_cross_attention": False,
        "resnet_time_scale_shift": "default",
        "time_cond_proj_dim": None,
        "transformer_layers_per_block": 1,
    },
    "scheduler": {"rescale_betas_zero_snr": False, "trained_betas": None},
}


def _config_from_folder(folder: Path) -> ModelConfig:
    """The `config.json`s of diffusers -> a config."""
    theirs, ours = {}, {}
    for part, keys in KEYS.items():
        path = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        theirs[part] = DEFAULTS[part] | _read_json(path)
        for key, only in ONLY[part].items():
            if theirs[part].get(key, only) != only:
                raise ModelError(f"{path} has {key} = {theirs[part][key]!r}, which is not built in")
        lacking = [key for key in keys.values() if key not in theirs[part]]
        if lacking:
            raise ModelError(f"{path} lacks {lacking[0]}")
        ours[part] = {field: theirs[part][key] for field, key in keys.items()}
    unet = ours["unet"]
    unet["attention"] = ["CrossAttn" in kind for kind in theirs["unet"].get("down_block_types", ())]
    if isinstance(unet["heads"], list):
        widths = {channels // heads for channels, heads in zip(unet["channels"], unet["heads"])}
        if len(widths) > 1:
            raise ModelError(f"{folder}/unet has attention heads of several widths, which is not built in")
        unet["heads"], unet["head_width"] = UNetConfig.heads, widths.pop()
    vae = VAEConfig(**_tuples(ours["vae"]))
    return ModelConfig(
        name=folder.resolve().name,
        size=(theirs["unet"].get("sample_size") or 64) * vae.factor,
        clip=CLIPConfig(**ours["text_encoder"]),
        vae=vae,
        unet=UNetConfig(**_tuples(unet)),
        schedule=ScheduleConfig(**ours["scheduler"]),
    )


def _config_from_json(text: str, path: Path) -> ModelConfig:
    """The config that `save` put into a file's header."""
    try:
        given = json.loads(text)
        parts = {"clip": CLIPConfig, "vae": VAEConfig, "unet": UNetConfig, "schedule": ScheduleConfig}
        return ModelConfig(**given | {key: make(**_tuples(given[key])) for key, make in parts.items()})
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ModelError(f"{path} was written by another version of reifusion: its config is not understood") from None


def _config_from_shapes(path: Path, shapes: Mapping[str, torch.Size]) -> ModelConfig:
    """The shapes of our tensors -> a config; what they cannot tell is taken from the preset that looks the same."""

    def size(name: str, axis: int) -> int:
        if name not in shapes or len(shapes[name]) <= axis:
            raise ModelError(f"{path} lacks tensors that the model needs, first {name}")
        return shapes[name][axis]

    kind = structure(shapes, "native")
    unet_rows = range(1, len(kind.unet.channels) * (kind.unet.layers + 1), kind.unet.layers + 1)
    for preset in PRESETS:
        clip = replace(
            preset.clip,
            vocab_size=size("clip.embedding.token.weight", 0),
            context_length=size("clip.embedding.position", 0),
            width=size("clip.embedding.position", 1),
            layers=kind.clip.layers,
        )
        vae = replace(
            preset.vae,
            in_channels=size("encoder.conv_in.weight", 1),
            latent_channels=size("decoder.post_quant.weight", 0),
            channels=tuple(size(f"encoder.down.{i}.0.conv_1.weight", 0) for i in range(len(kind.vae.channels))),
            layers=kind.vae.layers,
        )
        unet = replace(
            preset.unet,
            in_channels=size("diffusion.down.0.0.weight", 1),
            out_channels=size("diffusion.conv_out.weight", 0),
            channels=tuple(size(f"diffusion.down.{row}.0.conv_1.weight", 0) for row in unet_rows),
            attention=kind.unet.attention,
            layers=kind.unet.layers,
            context_width=size("diffusion.middle.1.cross_attention.kv.weight", 1),
            linear_projection=len(shapes["diffusion.middle.1.proj_in.weight"]) == 2,
        )
        # A vocabulary may have grown, and the U-Net may read more than latents (9: inpainting, 8: edit instructions).
        same = replace(clip, vocab_size=preset.clip.vocab_size), vae, replace(unet, in_channels=preset.unet.in_channels)
        if same == (preset.clip, preset.vae, preset.unet) and unet.in_channels in (4, 8, 9):
            return replace(preset, clip=clip, vae=vae, unet=unet)
    raise ModelError(
        f"{path} has the shapes of no known model, and shapes do not tell everything: give its config as well"
    )


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _networks(config: ModelConfig) -> dict[str, nn.Module]:
    """The networks without memory for their parameters."""
    with torch.device("meta"):
        return {
            "clip": CLIP(config.clip),
            "encoder": Encoder(config.vae),
            "decoder": Decoder(config.vae),
            "diffusion": UNet(config.unet),
        }


def _write_folder(folder: Path, config: ModelConfig, tensors: dict[str, Tensor], tokenizer: Tokenizer) -> None:
    """A folder that `diffusers.StableDiffusionPipeline.from_pretrained` opens."""
    ours = {"text_encoder": config.clip, "vae": config.vae, "unet": config.unet, "scheduler": config.schedule}
    theirs: dict[str, dict[str, Any]] = {
        part: ONLY[part] | {key: getattr(ours[part], field) for field, key in keys.items()}
        for part, keys in KEYS.items()
    }
    attention, levels = config.unet.attention, len(config.vae.channels)
    theirs["text_encoder"] |= {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "intermediate_size": 4 * config.clip.width,
        "bos_token_id": tokenizer.start,
        "eos_token_id": tokenizer.end,
        "pad_token_id": tokenizer.end,
    }
    theirs["vae"] |= {
        "_class_name": "AutoencoderKL",
        "out_channels": config.vae.in_channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "sample_size": config.size,
    }
    theirs["unet"] |= {
        "_class_name": "UNet2DConditionModel",
        "attention_head_dim": [config.unet.heads_at(c) for c in config.unet.channels]
        if config.unet.head_width
        else config.unet.heads,
        "down_block_types": ["CrossAttnDownBlock2D" if here else "DownBlock2D" for here in attention],
        "up_block_types": ["CrossAttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attention)],
        "sample_size": config.size // config.vae.factor,
    }
    # SD 1.x's own sampler; a pipeline can be given another.
    theirs["scheduler"] = {
        "_class_name": "PNDMScheduler",
        **{key: getattr(config.schedule, field) for field, key in KEYS["scheduler"].items()},
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
    }
    index: dict[str, Any] = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"), [None, None])
    index |= {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.30.0", "requires_safety_checker": False}
    index |= {"scheduler": ["diffusers", "PNDMScheduler"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    index |= {"text_encoder": ["transformers", "CLIPTextModel"]}
    index |= {"vae": ["diffusers", "AutoencoderKL"], "unet": ["diffusers", "UNet2DConditionModel"]}
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    for part, values in theirs.items():
        (folder / part).mkdir()
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        (folder / part / name).write_text(json.dumps(values, indent=2))
        if part in PARTS:
            name = "model.safetensors" if part == "text_encoder" else "diffusion_pytorch_model.safetensors"
            own = {key.removeprefix(f"{part}."): x for key, x in tensors.items() if key.startswith(f"{part}.")}
            save_file(own, folder / part / name, {"format": "pt"})
    tokenizer.save_folder(folder / "tokenizer")
