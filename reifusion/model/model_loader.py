"""A checkpoint becomes networks: it is opened, its tensors are checked, and they are loaded one by one.

`load` is the function to read first, and `_open` finds out what a file is. A checkpoint is one file
(`.safetensors` or `.ckpt`, recognised by content, not by name) or a folder of diffusers. No code in a file is
ever run, and every complaint is a `ModelError` of one sentence.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .clip import CLIP
from .config import MINI, SD15, CLIPConfig, ModelConfig, ScheduleConfig, UNetConfig, VAEConfig
from .decoder import Decoder
from .diffusers_folder import open_folder, read_config
from .diffusion import UNet
from .encoder import Encoder
from .model_converter import NETWORKS, Rule, match, structure
from .tensors import ModelError, Stored, TensorFile
from .tokenizer import END, Tokenizer

MINI_PATH = Path(__file__).parent.parent / "data" / "mini.safetensors"
PRESETS = (SD15, MINI)  # the preset with the same shapes supplies what shapes cannot tell

# The keys in a header that belong to the model. All others are the user's.
OWN_KEYS = ("format", "config", "tokenizer", "pad", "vocabulary")

# Relatives that are recognised by the name of a tensor, to say what they are.
RELATIVES = (
    (r"cond_stage_model\.model\.", "Stable Diffusion 2.x in one file, which is read only from a folder"),
    (r"conditioner\.", "Stable Diffusion XL, which is not built in"),
    (r".*(joint_blocks|double_blocks|single_transformer_blocks)\.", "a diffusion transformer, not a U-Net"),
    (r"lora_|.*\.lora[_.]", "a LoRA, which changes a model but is not a model itself"),
    (r"control_model\.|controlnet_", "a ControlNet, which guides a model but is not a model itself"),
)


def load(
    source: str | Path = "mini",
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    config: ModelConfig | None = None,
    make: Callable[[ModelConfig], dict[str, nn.Module]] | None = None,
) -> tuple[ModelConfig, dict[str, nn.Module], Tokenizer]:
    """Loads a model: its config, its networks ("clip", "encoder", "decoder", "diffusion") and its tokenizer.

    source: "mini", a file, or a folder of diffusers. dtype: None keeps the file's. config: None finds it; a
    file of unusual shapes that does not hold its config needs one. make: makes the networks of a config; None
    stands for `build`.
    """
    checkpoint = _open(source, config)
    models = _networks(checkpoint, make or build)
    for name, network in models.items():
        # The networks have shapes but no memory yet. Every tensor that is read becomes a parameter as it is.
        network.load_state_dict(checkpoint.state(name, device, dtype), assign=True)
        network.eval()
    return checkpoint.config, models, _tokenizer(checkpoint)


def preload_models_from_standard_weights(
    ckpt_path: str | Path, device: str | torch.device = "cpu"
) -> dict[str, nn.Module]:
    """Loads the networks of a checkpoint, by name: "clip", "encoder", "decoder", "diffusion"."""
    return load(ckpt_path, device)[1]


@dataclass(frozen=True)
class Info:
    """The facts in a model's file."""

    path: Path
    format: str  # one of FORMATS
    config: ModelConfig
    parameters: dict[str, int]  # of each network
    dtype: str  # of most parameters
    size: int  # of the files with weights, in bytes
    metadata: dict[str, str]


def info(source: str | Path) -> Info:
    """Reads the facts about a model from the headers alone."""
    checkpoint = _open(source)
    parameters = dict.fromkeys(NETWORKS, 0)
    dtypes: Counter[torch.dtype] = Counter()
    for rule in checkpoint.rules:
        for tensor in checkpoint.parts(rule):
            parameters[rule.ours.split(".")[0]] += tensor.shape.numel()
            dtypes[tensor.dtype] += tensor.shape.numel()
    size = sum(path.stat().st_size for path in {tensor.file.path for tensor in checkpoint.tensors.values()})
    dtype = str(dtypes.most_common(1)[0][0]).removeprefix("torch.")
    metadata = {k: v for k, v in checkpoint.header.items() if k not in OWN_KEYS}
    return Info(checkpoint.path, checkpoint.format, checkpoint.config, parameters, dtype, size, metadata)


# From a source to a checkpoint, none of whose tensors has been read yet


@dataclass(frozen=True)
class _Checkpoint:
    path: Path
    format: str
    config: ModelConfig
    rules: list[Rule]  # from the checkpoint's tensors to ours
    unknown: list[str]  # the names that no rule knows
    tensors: dict[str, Stored]
    header: dict[str, str]

    def parts(self, rule: Rule) -> list[Stored]:
        """Returns the tensors that one of ours is made of."""
        return [self.tensors[name] for name in rule.theirs]

    def state(self, network: str, device: str | torch.device, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """Reads the state dict of a network, tensor by tensor."""
        start, state = f"{network}.", {}
        for rule in self.rules:
            if rule.ours.startswith(start):
                parts = [tensor.read(device, dtype) for tensor in self.parts(rule)]
                state[rule.ours.removeprefix(start)] = rule.merge(parts)
        return state


def find(source: str | Path) -> Path:
    """Returns the path of "mini", or of a file or folder that exists."""
    path = MINI_PATH if source == "mini" else Path(source).expanduser()
    with suppress(OSError, ValueError):  # from texts that cannot be a path
        if path.exists():
            return path
    if source == "mini":
        raise ModelError(f"the mini's weights are not part of this installation: there is no {path}")
    raise ModelError(f"there is no file or folder {path}")


def _open(source: str | Path, config: ModelConfig | None = None) -> _Checkpoint:
    path = find(source)
    if path.is_dir():
        tensors, header = open_folder(path), {}
    else:
        file = TensorFile(path)
        tensors, header = file.tensors(), file.metadata
    for pattern, what in RELATIVES:
        if any(re.match(pattern, name) for name in tensors):
            raise ModelError(f"{path} is {what}")
    try:
        if config is None and path.is_dir():
            config = read_config(path)
        elif config is None and "config" in header:
            config = _config_from_header(header)
        format, rules, unknown = match(tensors, config)
        networks = {rule.ours.split(".")[0] for rule in rules}
        for network in NETWORKS:
            if network not in networks:
                raise ModelError(f"there are no tensors for the {network}")
        if config is None:
            parts = {rule.ours: [tensors[name].shape for name in rule.theirs] for rule in rules}
            config = _config_from_shapes({name: _stacked(shapes) for name, shapes in parts.items()})
        if config.unet.guidance_width is not None:  # as Luo et al. 2023 draw with their LCMs
            config = replace(config, sampler="lcm", steps=4, cfg=8.0)
    except ModelError as error:
        raise ModelError(f"{path} is not a model that can be loaded: {error}") from None
    return _Checkpoint(path, format, config, rules, unknown, tensors, header)


def _stacked(shapes: list[torch.Size]) -> torch.Size:
    """Returns the shape of a stack of tensors of these shapes, or () if one of them has no rows."""
    return torch.Size((sum(shape[0] for shape in shapes), *shapes[0][1:])) if all(shapes) else torch.Size()


# Networks without memory, and the check that a checkpoint's tensors fit them


class _Unfilled(TorchFunctionMode):
    """Skips `torch.nn.init`, which on "meta" would fill nothing and yet import PyTorch's compiler."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__module__", None) != "torch.nn.init":
            return function(*args, **(kwargs or {}))
        return None


def build(config: ModelConfig, unet: type[UNet] = UNet) -> dict[str, nn.Module]:
    """Returns the networks of a config on PyTorch's "meta" device: shapes without memory."""
    with _Unfilled(), torch.device("meta"):
        return {
            "clip": CLIP(config.clip),
            "encoder": Encoder(config.vae),
            "decoder": Decoder(config.vae),
            "diffusion": unet(config.unet),
        }


def state_dict(models: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Returns all tensors of the networks, under our names."""
    return {f"{net}.{name}": x for net in NETWORKS for name, x in models[net].state_dict().items()}


def _networks(
    checkpoint: _Checkpoint, make: Callable[[ModelConfig], dict[str, nn.Module]]
) -> dict[str, nn.Module]:
    """Makes the networks, without memory, after a check that every tensor is there and fits."""
    path = checkpoint.path
    try:
        models = make(checkpoint.config)
    except (ValueError, TypeError, ArithmeticError, LookupError, RuntimeError) as error:
        raise ModelError(f"the config of {path} describes no possible model: {error}") from error
    expected = {name: tuple(x.shape) for name, x in state_dict(models).items()}
    missing = sorted(expected.keys() - {rule.ours for rule in checkpoint.rules})
    if missing:
        raise ModelError(f"{path} lacks {len(missing)} tensors that the model needs, first {missing[0]}")
    extra = [rule.theirs[0] for rule in checkpoint.rules if rule.ours not in expected] + checkpoint.unknown
    if extra:
        raise ModelError(f"{path} has {len(extra)} tensors without a place in the model, first {extra[0]}")
    for rule in checkpoint.rules:
        rows, *rest = expected[rule.ours]
        need = (rows // len(rule.theirs), *rest)
        for tensor in checkpoint.parts(rule):
            shape, named = tuple(tensor.shape), f"tensor {tensor.name} in {tensor.file.path}"
            if shape != need and not (rule.pointwise and shape == (*need, 1, 1)):
                raise ModelError(f"{named} has shape {shape}, but needs {need}")
            if not tensor.dtype.is_floating_point:
                raise ModelError(f"{named} holds no floating-point numbers")
    return models


# Configs and tokenizers


def _config_from_header(header: Mapping[str, str]) -> ModelConfig | None:
    """Reads the config that `save` wrote. Returns None for another program's config."""
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
    """Translates the config of an older version, which had one number of heads for all levels."""
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
    """Finds the config of a file by its shapes. The preset with the same shapes supplies the rest."""

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
        # A vocabulary may have grown. A U-Net may be given more than latents (9 channels: inpainting, 8:
        # editing by words), or the guidance scale.
        same_clip = replace(config.clip, vocab_size=preset.clip.vocab_size) == preset.clip
        usual = replace(config.unet, in_channels=preset.unet.in_channels, guidance_width=None)
        same_unet = usual == preset.unet
        if same_clip and same_unet and config.vae == preset.vae and config.unet.in_channels in (4, 8, 9):
            return config
    raise ModelError(
        "it has the shapes of no known model, and shapes alone are not enough: it needs a config"
    )


def _tokenizer(checkpoint: _Checkpoint) -> Tokenizer:
    """Reads the tokenizer that the model was trained with."""
    path, header, clip = checkpoint.path, checkpoint.header, checkpoint.config.clip
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
