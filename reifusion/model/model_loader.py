"""A checkpoint becomes networks: it is opened, its tensors are checked, and they are loaded one by one.

`load` is the function to read first, and `_open` finds out what a file is. A checkpoint is one file
(`.safetensors` or `.ckpt`, recognised by content, not by name) or a folder of diffusers. No code in a file is
ever run, and every complaint is a `ModelError` of one sentence.
"""

from __future__ import annotations

import json
import re
import warnings
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
from .config import MINI, SD15, SD21, CLIPConfig, ModelConfig, ScheduleConfig, UNetConfig, VAEConfig
from .decoder import Decoder
from .diffusers_folder import open_folder, read_config
from .diffusion import UNet
from .encoder import Encoder
from .model_converter import NETWORKS, Rule, match, passed_over, structure
from .part import open_part
from .prediction import Prediction, prediction_of, read_prediction
from .tensors import ModelError, Stored, TensorFile
from .tokenizer import END, Tokenizer
from .tokenizer_folder import read_tokenizer

MINI_PATH = Path(__file__).parent.parent / "data" / "mini.safetensors"
PRESETS = (SD15, SD21, MINI)  # the preset with the same shapes supplies what shapes cannot tell

# The keys in a header that belong to the model. All others are the user's.
OWN_KEYS = ("format", "config", "tokenizer", "pad", "vocabulary", "exact")

# Relatives that are recognised by the name of a tensor, to say what they are.
RELATIVES = (
    (r"conditioner\.", "Stable Diffusion XL, which is not built in"),
    (r".*(joint_blocks|double_blocks|single_transformer_blocks)\.", "a diffusion transformer, not a U-Net"),
    (r"lora_|.*\.lora[_.]", "a LoRA, which changes a model but is not a model itself"),
    (r"control_model\.|controlnet_", "a ControlNet, which guides a model but is not a model itself"),
    (r".*\.(label_emb|class_embedding|add_embedding)\.", "told more than words, which is not built in"),
    (r"(.*\.)?(scaled_fp8|scale_weight)$", "in scaled float8, which is not built in"),
)


@dataclass(frozen=True)
class Changes:
    """What is to be otherwise than in the model's own file."""

    prediction_type: str | None = None  # what the U-Net predicts, whatever the file says
    vae: str | Path | None = None  # a file, or a folder of diffusers, whose VAE is taken
    unet: str | Path | None = None  # the same for the U-Net
    ema: bool = False  # takes the moving averages of the U-Net's weights, where a file holds both


def load(
    source: str | Path = "mini",
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    config: ModelConfig | None = None,
    make: Callable[[ModelConfig], dict[str, nn.Module]] | None = None,
    changes: Changes | None = None,
) -> tuple[ModelConfig, dict[str, nn.Module], Tokenizer]:
    """Loads a model: its config, its networks ("clip", "encoder", "decoder", "diffusion") and its tokenizer.

    source: "mini", a file, or a folder of diffusers. dtype: None keeps the file's. config: None finds it; a
    file of unusual shapes that does not hold its config needs one. make: makes the networks of a config; None
    stands for `build`. Warns of tensors that are no part of the model, and passes them over.
    """
    checkpoint = _open(source, config, changes)
    models, unused = _networks(checkpoint, make or build)
    if unused:
        warnings.warn(passed_over(checkpoint.path, unused), stacklevel=2)
    for name, network in models.items():
        # The networks have shapes but no memory yet. Every tensor that is read becomes a parameter as it is.
        network.load_state_dict(checkpoint.state(name, network, device, dtype), assign=True)
        network.eval()
    return checkpoint.config, models, _tokenizer(checkpoint)


def preload_models_from_standard_weights(
    ckpt_path: str | Path, device: str | torch.device = "cpu"
) -> dict[str, nn.Module]:
    """Loads the networks of a checkpoint, by name: "clip", "encoder", "decoder", "diffusion"."""
    return load(ckpt_path, device)[1]


def find_config(source: str | Path, changes: Changes | None = None) -> ModelConfig:
    """Returns the config of a model. Whether the tensors fit it, `load` tells. May raise ModelError."""
    return _open(source, None, changes).config


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
    prediction_known_from: str = ""  # for people: how it is known what the U-Net predicts
    unused: tuple[str, ...] = ()  # the tensors that are no part of the model


def info(
    source: str | Path,
    make: Callable[[ModelConfig], dict[str, nn.Module]] | None = None,
    changes: Changes | None = None,
) -> Info:
    """Reads the facts about a model from the headers alone. Raises ModelError whenever `load` would."""
    checkpoint = _open(source, None, changes)
    _, unused = _networks(checkpoint, make or build)
    parameters = dict.fromkeys(NETWORKS, 0)
    dtypes: Counter[torch.dtype] = Counter()
    for rule in checkpoint.rules:
        for tensor in checkpoint.parts(rule):
            parameters[rule.ours.split(".")[0]] += tensor.shape.numel()
            dtypes[tensor.dtype] += tensor.shape.numel()
    size = sum(path.stat().st_size for path in {tensor.file.path for tensor in checkpoint.tensors.values()})
    dtype = str(dtypes.most_common(1)[0][0]).removeprefix("torch.")
    metadata = {k: v for k, v in checkpoint.header.items() if k not in OWN_KEYS}
    return Info(
        checkpoint.path,
        checkpoint.format,
        checkpoint.config,
        parameters,
        dtype,
        size,
        metadata,
        checkpoint.prediction_known_from,
        tuple(unused),
    )


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
    prediction_known_from: str = ""

    def parts(self, rule: Rule) -> list[Stored]:
        """Returns the tensors that one of ours is made of."""
        return [self.tensors[name] for name in rule.theirs]

    def state(
        self, name: str, network: nn.Module, device: str | torch.device, dtype: torch.dtype | None
    ) -> dict[str, Tensor]:
        """Reads the state dict of a network, tensor by tensor."""
        wanted, state = network.state_dict().keys(), {}
        for rule in self.rules:
            ours = rule.ours.removeprefix(f"{name}.")
            if ours != rule.ours and ours in wanted:
                state[ours] = rule.merge([tensor.read(device, dtype) for tensor in self.parts(rule)])
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


def _open(
    source: str | Path, config: ModelConfig | None = None, changes: Changes | None = None
) -> _Checkpoint:
    path, changes = find(source), changes or Changes()
    if path.is_dir():
        tensors, header = open_folder(path), {}
    else:
        file = TensorFile(path)
        tensors, header = file.tensors(), file.metadata
    for pattern, what in RELATIVES:
        if any(re.match(pattern, name) for name in tensors):
            raise ModelError(f"{path} is {what}")
    known_from = "a config that was given"
    try:
        if config is None and path.is_dir():
            config, known_from = read_config(path), "its scheduler's config"
        elif config is None and "config" in header:
            config, known_from = _config_from_header(header), "the config in its header"
        format, rules, unknown = match(tensors, config)
        told = None
        if changes.prediction_type is not None:
            told = Prediction(read_prediction(changes.prediction_type), "as you say")
        elif config is None:
            told = prediction_of(path, header, tensors)
        if changes.ema:
            rules = _averages(rules, tensors)
        for part, chosen in ("vae", changes.vae), ("unet", changes.unet):
            if chosen is not None:
                theirs, own, more, its_header = open_part(find(chosen), part)
                rules = _replaced(rules, own, part)
                tensors = tensors | {f"{part}: {name}": tensor for name, tensor in theirs.items()}
                unknown = unknown + more
                if part == "unet" and changes.prediction_type is None:
                    told = prediction_of(find(chosen), its_header, theirs) or told
        networks = {rule.ours.split(".")[0] for rule in rules}
        for network in NETWORKS:
            if network not in networks:
                raise ModelError(f"there are no tensors for the {network}{_HINTS.get(network, '')}")
        shapes = {rule.ours: _stacked([tensors[name].shape for name in rule.theirs]) for rule in rules}
        if config is None:
            config, known_from = _config_from_shapes(shapes), "nothing in the file says otherwise"
            if config.name == SD21.name:
                config, known_from = _which_sd2(config, told)
        if changes.unet is not None and len(first := shapes.get(_FIRST, torch.Size())) == 4:
            channels = first[1] // config.unet.patch**2
            config = replace(config, unet=replace(config.unet, in_channels=channels))
        if told is not None:
            zero = told.zero_terminal_snr and told.type == "v_prediction"
            schedule = replace(config.schedule, prediction_type=told.type, zero_terminal_snr=zero)
            config, known_from = replace(config, schedule=schedule), told.known_from
        if config.unet.guidance_width is not None:  # as Luo et al. 2023 draw with their LCMs
            config = replace(config, sampler="lcm", steps=4, cfg=8.0)
    except ModelError as error:
        raise ModelError(f"{path} is not a model that can be loaded: {error}") from None
    return _Checkpoint(path, format, config, rules, unknown, tensors, header, known_from)


_FIRST = "diffusion.down.0.0.weight"
_HINTS = {
    **dict.fromkeys(("encoder", "decoder"), "; a file with a VAE is given with --vae"),
    "clip": "; if it is a U-Net alone, name a whole model, and this one with --unet",
}


def _replaced(rules: list[Rule], own: list[Rule], part: str) -> list[Rule]:
    """Returns the rules with a part's own in the place of those for the same networks."""
    networks = {rule.ours.split(".")[0] for rule in own}
    kept = [rule for rule in rules if rule.ours.split(".")[0] not in networks]
    return kept + [replace(rule, theirs=tuple(f"{part}: {x}" for x in rule.theirs)) for rule in own]


def _which_sd2(config: ModelConfig, told: Prediction | None) -> tuple[ModelConfig, str]:
    """Tells the models of 2.x for 512x512, which predict the noise, from those for 768x768, and says how."""
    if config.unet.in_channels == config.vae.latent_channels and not (told and told.type == "epsilon"):
        return config, "usual for 2.x; the models for 512x512 need --prediction-type epsilon"
    schedule = replace(config.schedule, prediction_type="epsilon")
    return replace(config, size=512, schedule=schedule), "usual for inpainting"


def _averages(rules: list[Rule], names: Mapping[str, Stored]) -> list[Rule]:
    """Returns the rules with the moving averages of a CompVis file in the place of its U-Net's weights."""

    def average(name: str) -> str:
        # Their class for averages took the points out of the names.
        found = "model_ema." + name.removeprefix("model.").replace(".", "")
        if found not in names:
            raise ModelError(f"it has no moving average of {name}")
        return found

    return [
        replace(rule, theirs=tuple(map(average, rule.theirs))) if rule.ours.startswith("diffusion.") else rule
        for rule in rules
    ]


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
    whole = {net: getattr(models[net], "_orig_mod", models[net]) for net in NETWORKS}  # as before compiling
    return {f"{net}.{name}": x for net in NETWORKS for name, x in whole[net].state_dict().items()}


def _networks(
    checkpoint: _Checkpoint, make: Callable[[ModelConfig], dict[str, nn.Module]]
) -> tuple[dict[str, nn.Module], list[str]]:
    """Makes the networks, without memory, after a check that every tensor is there and fits.

    Returns also the names of the tensors that have no place in them.
    """
    path = checkpoint.path
    try:
        models = make(checkpoint.config)
    except (ValueError, TypeError, ArithmeticError, LookupError, RuntimeError) as error:
        raise ModelError(f"the config of {path} describes no possible model: {error}") from error
    expected = {name: tuple(x.shape) for name, x in state_dict(models).items()}
    missing = sorted(expected.keys() - {rule.ours for rule in checkpoint.rules})
    if missing:
        raise ModelError(f"{path} lacks {len(missing)} tensors that the model needs, first {missing[0]}")
    without = [name for rule in checkpoint.rules if rule.ours not in expected for name in rule.theirs]
    for rule in (rule for rule in checkpoint.rules if rule.ours in expected):
        rows, *rest = expected[rule.ours]
        need = (rows // len(rule.theirs), *rest)
        for tensor in checkpoint.parts(rule):
            shape, named = tuple(tensor.shape), f"tensor {tensor.name} in {tensor.file.path}"
            if shape != need and not (rule.pointwise and shape == (*need, 1, 1)):
                raise ModelError(f"{named} has shape {shape}, but needs {need}")
            if not tensor.is_floating_point:
                raise ModelError(f"{named} holds no floating-point numbers")
    return models, without + checkpoint.unknown


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
        "channels": tuple(size(f"diffusion.down.{row}.0.conv_1.weight", 0) for row in rows),
        "attention": kind.unet.attention,
        "middle_attention": kind.unet.middle_attention,
        "layers": kind.unet.layers,
        "context_width": size("diffusion.middle.1.layers.0.cross_attention.kv.weight", 1),
        "guidance_width": None if kind.unet.guidance_width is None else size(_GUIDANCE, 1),
    }
    for preset in PRESETS:
        places = preset.unet.patch**2
        unet["in_channels"] = size("diffusion.down.0.0.weight", 1) // places
        unet["out_channels"] = size("diffusion.conv_out.weight", 0) // places
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
            tokenizer = read_tokenizer(path / "tokenizer", clip.context_length)
        else:
            vocabulary = json.loads(header.get("vocabulary", "null"))
            open_clip = clip.activation == "gelu" and "config" not in header
            pad = header.get("pad", "!" if open_clip else END)  # as 2.x was trained
            merges, exact = header.get("tokenizer"), json.loads(header.get("exact", "[]"))
            tokenizer = Tokenizer(merges, clip.context_length, vocabulary=vocabulary, pad=pad, exact=exact)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"the tokenizer of {path} cannot be read: {error}") from None
    known = tokenizer.vocab_size
    if known > clip.vocab_size:
        raise ModelError(f"the tokenizer of {path} knows {known} tokens, its text encoder {clip.vocab_size}")
    return tokenizer
