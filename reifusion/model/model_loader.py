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
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

import torch
from torch import Tensor, nn

from .config import ModelConfig
from .diffusers_folder import open_folder, read_configs
from .family import GUIDANCE_WEIGHT, STABLE_DIFFUSION, Family, size_of
from .family import build as build
from .model_converter import NETWORKS, Rule, match, passed_over
from .part import open_part
from .prediction import Prediction, prediction_of, read_prediction, trained_for
from .tensors import ModelError, Stored, TensorFile
from .tokenizer import Tokenizer

FAMILIES = (STABLE_DIFFUSION,)
MINI_PATH = Path(__file__).parent.parent / "data" / "mini.safetensors"

# The keys in a header that belong to the model. All others are the user's.
OWN_KEYS = ("format", "family", "config", "tokenizer", "pad", "vocabulary", "exact", "t5")

# Relatives that are recognised by the name of a tensor, to say what they are.
RELATIVES = (
    (r"lora_|lycoris_|.*\.(lora[_.]|hada_|lokr_)", "a LoRA, which changes a model but is not a model itself"),
    (r"control_model\.|controlnet_", "a ControlNet, which guides a model but is not a model itself"),
    (r"(adapter\.)?body\.\d+\.", "a T2I-Adapter, which guides a model but is not a model itself"),
    (r"(image_proj|ip_adapter)\.", "an IP-Adapter, which prompts a model but is not a model itself"),
    (r"(string_to_param\..*|emb_params|clip_[lg])$", "a learned word, which --embedding takes"),
    (
        r"edm_(mean|std)$|edm_vpred\.",
        "trained with EDM's noise, as Playground 2.5 was, which is not built in",
    ),
)
# The same for a model that would otherwise count as Stable Diffusion 1.x or 2.x.
STRANGERS = (
    (r"conditioner\.|text_encoder_2/|clip_2\.", "Stable Diffusion XL, which only reifusion.load opens"),
    (r".*(joint_blocks|double_blocks|single_transformer_blocks)\.", "a diffusion transformer, not a U-Net"),
    (r"embedder\.|noise_augmentor\.|image_encoder/", "unCLIP, told a picture, which is not built in"),
    (
        r"(model\.diffusion_model\.label_emb\.0\.0|unet\.add_embedding\.linear_1)\.",
        "a U-Net of Stable Diffusion XL alone; name a whole model, and this one with --unet",
    ),
    (r".*\.(label_emb|class_embedding|add_embedding)\.", "told more than words, which is not built in"),
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
    families: Sequence[Family] = FAMILIES,
    changes: Changes | None = None,
) -> tuple[ModelConfig, dict[str, nn.Module], Tokenizer]:
    """Loads a model: its config, its networks ("clip", "encoder", "decoder", "diffusion") and its tokenizer.

    source: "mini", a file, or a folder of diffusers. dtype: None keeps the file's. config: None finds it; a
    file of unusual shapes that does not hold its config needs one. families: the first that recognises the
    model is its own. Warns of tensors that are no part of the model, and passes them over.
    """
    checkpoint = _open(source, config, families, changes)
    models, unused = _networks(checkpoint)
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


def find_config(
    source: str | Path, families: Sequence[Family] = FAMILIES, changes: Changes | None = None
) -> ModelConfig:
    """Returns the config of a model. Whether the tensors fit it, `load` tells. May raise ModelError."""
    return _open(source, None, families, changes).config


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


def info(source: str | Path, families: Sequence[Family] = FAMILIES, changes: Changes | None = None) -> Info:
    """Reads the facts about a model from the headers alone. Raises ModelError whenever `load` would."""
    checkpoint = _open(source, None, families, changes)
    models, unused = _networks(checkpoint)
    parameters = dict.fromkeys(models, 0)
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
    family: Family
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


def family_of(names: Collection[str], header: Mapping[str, str], families: Sequence[Family]) -> Family:
    """Returns the family that a header names, or else the first that recognises the names."""
    if said := header.get("family"):
        for family in families:
            if family.name == said:
                return family
        raise ModelError(f"it is of the family {said}, which is not built in")
    return next(family for family in families if family.recognises(names))


def _open(
    source: str | Path, config: ModelConfig | None, families: Sequence[Family], changes: Changes | None
) -> _Checkpoint:
    path, changes = find(source), changes or Changes()
    header: dict[str, str] = {}
    if path.is_dir():
        files = [file.relative_to(path).as_posix() for file in path.glob("*/*")]
        family = family_of(files, {}, families)
        tensors = open_folder(path, family.folders)
        names = [*tensors, *files]
    else:
        file = TensorFile(path)
        tensors, header = file.tensors(), file.metadata
        family, names = family_of(tensors, header, families), list(tensors)
    tensors = family.completed(path, tensors)
    for pattern, what in RELATIVES + (STRANGERS if family is families[-1] else ()):
        if any(re.match(pattern, name) for name in names):
            raise ModelError(f"{path} is {what}")
    known_from = "a config that was given"
    try:
        if config is None and path.is_dir():
            jsons = read_configs(path, {name.split(".")[0] for name in tensors})
            config, known_from = family.from_diffusers(jsons, path.resolve().name), _FOLDER
        elif config is None and "config" in header:
            config, known_from = _config_from_header(header, family.config), "the config in its header"
        settled = config is not None and known_from != _FOLDER  # with settings of its own
        format, rules, unknown = match(tensors, config, family.layout)
        told = None
        if changes.prediction_type is not None:
            told = Prediction(read_prediction(changes.prediction_type), "as you say")
        elif config is None:
            told = prediction_of(path, header, tensors)
        if changes.ema:
            rules = _averages(rules, tensors)
        for part, chosen in ("vae", changes.vae), ("unet", changes.unet):
            if chosen is not None:
                theirs, own, more, its_header = open_part(find(chosen), part, family.layout)
                rules = _replaced(rules, own, part)
                tensors = tensors | {f"{part}: {name}": tensor for name, tensor in theirs.items()}
                unknown = unknown + more
                if part == "unet" and changes.prediction_type is None:
                    signs = prediction_of(find(chosen), its_header, theirs)
                    told = signs or trained_for(find(chosen), its_header) or told
        networks = {rule.ours.split(".")[0] for rule in rules}
        for network in NETWORKS:
            if network not in networks:
                raise ModelError(f"there are no tensors for the {network}{_HINTS.get(network, '')}")
        if config is None:
            shapes = {rule.ours: _shape(rule, [tensors[name] for name in rule.theirs]) for rule in rules}
            config, known_from = family.from_shapes(shapes, told)
        sizes = {rule.ours: tensors[rule.theirs[0]].shape for rule in rules}
        if changes.unet is not None and _FIRST in sizes:
            channels = size_of(sizes, _FIRST, 1) // config.unet.patch**2
            guidance = size_of(sizes, GUIDANCE_WEIGHT, 1) if GUIDANCE_WEIGHT in sizes else None
            unet = replace(config.unet, in_channels=channels, guidance_width=guidance)
            config = replace(config, unet=unet)
        if told is not None:
            zero = told.zero_terminal_snr and told.type == "v_prediction"
            schedule = replace(config.schedule, prediction_type=told.type, zero_terminal_snr=zero)
            config, known_from = replace(config, schedule=schedule), told.known_from
        if not settled or changes.unet is not None:
            config = family.suited(config)
    except ModelError as error:
        raise ModelError(f"{path} is not a model that can be loaded: {error}") from None
    return _Checkpoint(path, family, format, config, rules, unknown, tensors, header, known_from)


def _shape(rule: Rule, parts: list[Stored]) -> torch.Size:
    """Returns the shape of the tensor that a rule makes; () if theirs do not fit together."""
    try:
        return rule.merge([torch.empty(x.shape, device="meta") for x in parts]).shape
    except RuntimeError:
        return torch.Size()


_FOLDER = "its scheduler's config"
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


# Networks without memory, and the check that a checkpoint's tensors fit them


def state_dict(models: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Returns all tensors of the networks, under our names."""
    whole = {net: getattr(model, "_orig_mod", model) for net, model in models.items()}  # as before compiling
    return {f"{net}.{name}": x for net, model in whole.items() for name, x in model.state_dict().items()}


def _networks(checkpoint: _Checkpoint) -> tuple[dict[str, nn.Module], list[str]]:
    """Makes the networks, without memory, after a check that every tensor is there and fits.

    Returns also the names of the tensors that have no place in them.
    """
    path = checkpoint.path
    try:
        models = checkpoint.family.build(checkpoint.config)
    except (ValueError, TypeError, ArithmeticError, LookupError, RuntimeError) as error:
        raise ModelError(f"the config of {path} describes no possible model: {error}") from error
    expected = state_dict(models)
    missing = sorted(expected.keys() - {rule.ours for rule in checkpoint.rules})
    if missing:
        raise ModelError(f"{path} lacks {len(missing)} tensors that the model needs, first {missing[0]}")
    without = [name for rule in checkpoint.rules if rule.ours not in expected for name in rule.theirs]
    for rule in (rule for rule in checkpoint.rules if rule.ours in expected):
        needs = replace(rule, convolution=False).split(expected[rule.ours])
        for tensor, need in zip(checkpoint.parts(rule), (tuple(x.shape) for x in needs)):
            shape, named = tuple(tensor.shape), f"tensor {tensor.name} in {tensor.file.path}"
            if shape != need and not (rule.pointwise and shape == (*need, 1, 1)):
                raise ModelError(f"{named} has shape {shape}, but needs {need}")
            if not tensor.is_floating_point:
                raise ModelError(f"{named} holds no floating-point numbers")
    return models, without + checkpoint.unknown


# Configs and tokenizers


def _config_from_header(header: Mapping[str, str], kind: type[ModelConfig]) -> ModelConfig | None:
    """Reads the config that `save` wrote. Returns None for another program's config."""
    try:
        given = json.loads(header["config"])
        given = _up_to_date(given) if kind is ModelConfig else given
        for name, hint in get_type_hints(kind).items():
            kinds = get_args(hint) or (hint,)  # of `X | None`, both
            if is_dataclass(kinds[0]) and not (given[name] is None and type(None) in kinds):
                fields = {key: tuple(x) if isinstance(x, list) else x for key, x in given[name].items()}
                given[name] = cast(Any, kinds[0])(**fields)
        values: dict[str, Any] = {key: tuple(x) if isinstance(x, list) else x for key, x in given.items()}
        return kind(**values)
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


def _tokenizer(checkpoint: _Checkpoint) -> Any:
    """Reads the tokenizer that the model was trained with."""
    path, config = checkpoint.path, checkpoint.config
    try:
        tokenizer = checkpoint.family.read_tokenizer(path, checkpoint.header, config)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"the tokenizer of {path} cannot be read: {error}") from None
    known, most = tokenizer.vocab_size, config.clip.vocab_size
    if known > most:
        raise ModelError(f"the tokenizer of {path} knows {known} tokens, its text encoder {most}")
    return tokenizer
