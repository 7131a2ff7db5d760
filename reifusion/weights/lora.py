"""LoRA: a small file that changes what a big model draws (Hu et al. 2021, arXiv:2106.09685).

A LoRA holds, for some of the layers, two thin matrices whose product is added to the layer's weight; what
other files called LoRAs hold is in `lora_kinds.py`. `load_lora` reads the file, `apply` adds the LoRA to a
model, `remove` takes it out again. Layers are found by their names in checkpoints, so the table in
`model_converter.py` serves both. `train/lora.py` makes LoRAs.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import families
from ..model.config import ModelConfig
from ..model.model_converter import rules
from ..model.tensors import ModelError, TensorFile
from .inversion import Embedding, embedding_of, teach
from .lora_blocks import block_of, factors
from .lora_kinds import LYCORIS, AnyUpdate, Difference, DoRA, Update, read_update

if TYPE_CHECKING:
    from ..model.pipeline import StableDiffusion

# The ends of a tensor's name in the files of kohya, of PEFT and diffusers, of diffusers before 0.22, and of
# LyCORIS. PEFT adds the name of an adapter, "default" if it was given none.
ADAPTER = r"(?P<adapter>\.(?!weight$|bias$)[\w-]+)?"
ENDINGS = {
    "down": rf"[._]lora(_down|_A|\.down|_linear_layer\.down){ADAPTER}\.weight",
    "up": rf"[._]lora(_up|_B|\.up|_linear_layer\.up){ADAPTER}\.weight",
    "up_bias": rf"[._]lora(_up|_B){ADAPTER}\.bias",
    "mid": r"[._]lora_mid\.weight(?P<adapter>)",
    "alpha": r"(?P<adapter>)\.alpha",
    "lengths": rf"[._](dora_scale|lora_magnitude_vector{ADAPTER}(\.weight)?)",
    **{name: rf"\.{name}{ADAPTER}" for name in LYCORIS},
}

# Embeddings that were learned together with a LoRA, and that some programs write into its file.
BUNDLED = r"bundle_emb\.(?P<word>.+?)\.(?P<name>string_to_param\.\*|[^.]+)"

# Other methods whose files are called LoRAs. Read as if it were plain, such a file would draw something else.
OTHERS = {
    r"oft_|boft": "OFT",
    r"on_input": "IA³",
    r"\.[ab][12]\.weight$": "GLoRA",
    r"\.set_weight$": "a file of weights that replace the model's",
    r"\.reshape_weight$": "a LoRA that changes the shapes of weights",
}

# These replacements, in this order, make the spellings of a layer's name the same, except for . and _.
SPELLINGS = (
    (r"^lycoris_(?=text_model)", "text_encoder."),  # LyCORIS's outside of kohya's scripts, as is the next
    (r"^lycoris_(unet_|transformer_)?", "unet."),
    (r"^(unet\.|transformer\.|text_encoder\.|text_encoder_2\.)?base_model\.model\.", r"\1"),  # PEFT's
    (r"^(transformer\.|lora_transformer_)", "unet."),  # the network of Stable Diffusion 3
    (r"^(model\.)?diffusion_model\.", "unet."),  # CompVis's, and ComfyUI's
    (r"^(cond_stage_model|clip_l|text_encoders\.clip_[lh])\.transformer\.", "text_encoder."),
    (r"^(clip_g|text_encoders\.clip_g)\.transformer\.", "text_encoder_2."),
    (r"\.processor\.", "."),  # diffusers before 0.22, as are the next two
    (r"\.to_out$", ".to_out.0"),
    (r"^(text_encoder(?:_2)?\..*self_attn)\.to_(q|k|v|out)(\.0)?$", r"\1.\2_proj"),
    (r"^(?!unet\.|text_encoder|lora_)", "unet."),  # a LoRA of the U-Net alone
    (r"^lora_te1?_", "text_encoder."),  # kohya's, as are the next two
    (r"^lora_te2_", "text_encoder_2."),
    (r"^lora_te3_", "text_encoder_3."),
    (r"^lora_unet_", "unet."),
    (r"^(text_encoder(_2)?)\.(?=encoder)", r"\1.text_model."),  # transformers 5
)


@dataclass(frozen=True, eq=False)
class LoRA:
    """A LoRA that has been read: the layers that it changes, and their changes."""

    updates: Mapping[str, AnyUpdate]  # of weights, by the layer's name, as the file spells it
    metadata: dict[str, str] = field(default_factory=dict)
    path: str = "the LoRA"  # for messages
    biases: Mapping[str, Difference] = field(default_factory=dict)  # of biases, by the layer's name
    words: tuple[Embedding, ...] = ()  # that were learned with it, for `teach`

    def __deepcopy__(self, memo: Any) -> LoRA:
        """Returns itself: a copy of a model has the same LoRAs in it, and `remove` finds them."""
        return self


@dataclass(frozen=True)
class Place:
    """A layer that a LoRA can change, or one projection of a layer that stacks q, k and v in one matrix."""

    network: str  # "diffusion" or a text encoder, "clip"
    layer: str  # our name in that network, "middle.1.layers.0.self_attention.qkv"
    part: int  # the projection's number among the `parts` equal slices of the rows
    parts: int
    diffusers: str  # its name in diffusers, "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    compvis: (
        str  # its name in CompVis, "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q"
    )
    convolution: bool = False  # a 1×1 convolution in diffusers, a linear layer here

    @property
    def name(self) -> str:
        """Our name for the projection: "diffusion.middle.1.layers.0.self_attention.q"."""
        path = f"{self.network}.{self.layer}"
        if self.parts == 1:
            return path
        stacked = "qkv"[-self.parts :]  # three of them, or k and v alone
        return path.removesuffix(stacked) + stacked[self.part]


# What a folder's LoRA is called: by diffusers, by PEFT, and by PEFT with a folder for each network.
NAMES = (
    ("pytorch_lora_weights",),
    ("adapter_model",),
    ("unet/adapter_model", "text_encoder/adapter_model", "text_encoder_2/adapter_model"),
)


def lora_files(files: Collection[str]) -> list[str]:
    """Picks the files of a folder's LoRA, by `NAMES`, or its only `.safetensors`; [] if it is not clear."""
    for names in NAMES:
        for ending in ("safetensors", "bin"):
            if found := [f"{name}.{ending}" for name in names if f"{name}.{ending}" in files]:
                return found
    alone = [name for name in files if re.fullmatch(r"[^/]+\.safetensors", name)]
    return alone if len(alone) == 1 else []


def load_lora(source: str | Path) -> LoRA:
    """Reads a LoRA, `.safetensors` or a pickle, in the layout of kohya, LyCORIS, PEFT, or old diffusers.

    source: the file, or a folder of diffusers or PEFT with one. No code in the file is run. A layer without
    its α has α = r. Raises ModelError, in one sentence, for a file that is not a LoRA, is of a kind that is
    not in `lora_kinds.py`, or is damaged.
    """
    path = Path(source)
    if not path.is_dir():
        return _load_file(path)
    files = lora_files([file.relative_to(path).as_posix() for file in path.rglob("*")])
    if not files:
        raise ModelError(f"{path} does not hold one LoRA; if it holds several, name the file of one")
    updates: dict[str, AnyUpdate] = {}
    biases: dict[str, Difference] = {}
    metadata: dict[str, str] = {}
    words: tuple[Embedding, ...] = ()
    for name in files:
        part = Path(name).parent.name  # "unet", "text_encoder", or ""
        before = f"{part}." if part else ""
        lora = _load_file(path / name)
        metadata |= lora.metadata
        words += lora.words
        updates |= {before + layer: x for layer, x in lora.updates.items()}
        biases |= {before + layer: x for layer, x in lora.biases.items()}
    return LoRA(updates, metadata, str(path), biases, words)


def _load_file(file: Path) -> LoRA:
    opened = TensorFile(file)
    path, config = opened.path, _peft_config(opened)
    updates: dict[str, AnyUpdate] = {}
    biases: dict[str, Difference] = {}
    layers, words = _read(opened)
    for layer, parts in layers.items():
        if "alpha" in parts and parts["alpha"].numel() != 1:
            raise ModelError(f"{path} is damaged: {layer}.alpha is not one number")
        alpha = parts["alpha"].item() if "alpha" in parts else _peft_alpha(path, config, layer, parts)
        bias = [parts.pop(name) for name in ("diff_b", "b_norm") if name in parts]
        raised = parts.pop("up_bias", None)
        try:
            if parts.keys() - {"alpha"}:
                updates[layer] = read_update(parts, alpha)
        except ModelError as error:
            raise ModelError(f"{path} is damaged or incomplete: {layer} {error}") from None
        if raised is not None:  # B A x and this are scaled alike
            update = updates.get(layer)
            if not isinstance(update, Update):
                raise ModelError(f"{path} is damaged or incomplete: {layer} has a bias, and not its matrices")
            bias.append(update.alpha / update.rank * raised.float())
        if len({one.numel() for one in bias}) > 1:
            raise ModelError(f"{path} is damaged or incomplete: {layer} has two biases of different sizes")
        if bias:
            biases[layer] = Difference(torch.stack([one.float().flatten() for one in bias]).sum(0))
    if not updates and not biases:
        what = "nothing but learned words, as --embedding reads them" if words else "no tensors"
        raise ModelError(f"{path} is not a LoRA: it has {what}")
    return LoRA(updates, opened.metadata, str(path), biases, words)


def _read(file: TensorFile) -> tuple[dict[str, dict[str, Tensor]], tuple[Embedding, ...]]:
    """Reads the tensors of each layer, by `ENDINGS`, and the words that are in the file too."""
    layers: dict[str, dict[str, Tensor]] = {}
    words: dict[str, dict[str, Tensor]] = {}
    adapters, unknown = set(), []
    for name in file.shapes:
        if bundled := re.fullmatch(BUNDLED, name):
            words.setdefault(bundled["word"], {})[bundled["name"]] = file.read(name, "cpu", None)
            continue
        for pattern, kind in OTHERS.items():
            if re.search(pattern, name):
                raise ModelError(f"{file.path} is {kind}, which is not built in: see {name}")
        for part, ending in ENDINGS.items():
            if found := re.fullmatch(f"(.+?){ending}", name):
                tensor = file.read(name, "cpu", None)
                if not tensor.float().isfinite().all():
                    raise ModelError(f"{file.path} is damaged: {name} holds a number that is not finite")
                if "lora_magnitude_vector" in name:
                    tensor = tensor.reshape(-1, 1)  # PEFT's are of the rows, (out,) or (1, out, 1, 1)
                layers.setdefault(found[1], {})[part] = tensor
                adapters.add(found["adapter"]) if part in ("down", "up") else None
                break
        else:
            unknown.append(name)
    if unknown:
        several = "a tensor" if len(unknown) == 1 else f"{len(unknown)} tensors that no LoRA has,"
        raise ModelError(f"{file.path} is not a LoRA: it has {several} {_some(unknown)}")
    if len(adapters) > 1:
        names = " and ".join(sorted((name or ".(no name)")[1:] for name in adapters))
        raise ModelError(f"{file.path} holds several LoRAs, {names}; save one of them alone")
    return layers, tuple(embedding_of(tensors, file.path, word) for word, tensors in words.items())


def _peft_config(file: TensorFile) -> dict[str, Any]:
    """Reads PEFT's config, which stands beside its own files, and in the header of diffusers's."""
    beside = file.path.with_name("adapter_config.json")
    try:
        if file.path.stem == "adapter_model" and beside.is_file():
            text = beside.read_text("utf-8")
        else:
            text = file.metadata.get("lora_adapter_metadata", "{}")
        config = json.loads(text)
        if isinstance(config, dict):
            return config
    except (ValueError, RecursionError):
        pass
    raise ModelError(f"{file.path} has a config of PEFT, in its header or beside it, that is not understood")


def _some(names: Sequence[str]) -> str:
    """Lists some names: "a, b, c and 7 more"."""
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def _peft_alpha(
    path: Path, config: Mapping[str, Any], layer: str, parts: Mapping[str, Tensor]
) -> float | None:
    """Returns α by the config of PEFT, or None where there is none."""
    if not config:
        return None
    thin = [parts[name] for name in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b") if name in parts]
    try:
        network, _, inner = layer.partition(".")
        if network not in ("unet", "transformer", "text_encoder", "text_encoder_2"):
            network, inner = "", layer
        given = {key.removeprefix(f"{network}."): value for key, value in config.items()}

        def said(name: str, patterns: str, other: float) -> float:
            for pattern, value in (given.get(patterns) or {}).items():  # exceptions, by the layer's name
                if re.fullmatch(rf"(.*\.)?({pattern})", inner):
                    return float(value)
            return float(given.get(name, other))

        # A LoKr whose sides are whole has a rank in the config alone, and its α is returned over that.
        rank = len(thin[0]) if thin else said("r", "rank_pattern", 1)
        alpha = said("lora_alpha" if "lora_alpha" in given else "alpha", "alpha_pattern", rank)
        alpha = alpha if thin else alpha / rank
        # Kalajdzievski 2023 scales by α/√r.
        alpha = alpha * math.sqrt(rank) if given.get("use_rslora") else alpha
        if not math.isfinite(alpha):
            raise ValueError
        return alpha
    except (ValueError, TypeError, AttributeError, ZeroDivisionError, re.error):
        raise ModelError(
            f"{path} has a config of PEFT, in its header or beside it, that is not understood"
        ) from None


def places(config: ModelConfig, whole: bool = False) -> list[Place]:
    """Returns the places of all weights in a model's U-Net and text encoders.

    whole: those of q, k and v together too, for models whose files have them in one layer.
    """
    found, layout = [], families.family_of(config).layout
    formats = (rules(config, format, layout=layout) for format in ("diffusers", "compvis"))
    for one, other in zip(*formats):
        network, _, inner = one.ours.partition(".")
        if network not in ("encoder", "decoder") and inner.endswith(".weight"):
            layer, parts = inner.removesuffix(".weight"), len(one.theirs)
            # A layer that a format turns around is known by its name in the other alone.
            ones = other.theirs if one.turn else one.theirs
            others = one.theirs if other.turn else other.theirs
            if len(others) < parts:
                if whole:  # as in Stable Diffusion 3
                    name = others[0].removesuffix(".weight")
                    found.append(Place(network, layer, 0, 1, name, name, one.convolution))
                others = ones
            for part, names in enumerate(zip(ones, others)):
                diffusers, compvis = (name.removesuffix(".weight") for name in names)
                found.append(Place(network, layer, part, parts, diffusers, compvis, one.convolution))
    return found


def attach(
    pipe: StableDiffusion,
    source: str | Path | LoRA,
    weight: float = 1.0,
    blocks: str | Sequence[float] | None = None,
) -> None:
    """Adds a LoRA to a model, and teaches the model the words in its file, unless it knows such words.

    source: a file, a folder, a hub id, or a LoRA that was read. weight, blocks: as for `apply`. Raises what
    `load_lora`, `apply` and `teach` raise.
    """
    from .hub import find

    lora = source if isinstance(source, LoRA) else load_lora(find(source, "lora"))
    apply(pipe, lora, weight, blocks=blocks)
    for word in lora.words:
        if word.word not in pipe.tokenizer.vocabulary:
            teach(pipe, word)


def apply(
    pipe: StableDiffusion | Mapping[str, nn.Module],
    lora: LoRA,
    weight: float = 1.0,
    config: ModelConfig | None = None,
    blocks: str | Sequence[float] | None = None,
) -> None:
    """Adds weight · ΔW to the weights of a model, or of a dict of its networks, "clip" and "diffusion".

    weight: 1 for the LoRA as it was made, less for a weaker effect, below 0 for the opposite. LoRAs add up,
    and so does the same LoRA twice. The sum is computed in float32 or the model's dtype, whichever is finer,
    and rounded once. config: of the networks in a dict, which all but Stable Diffusion 1.x and 2.x need.
    blocks: what the weight is multiplied by in each block of the model, see `lora_blocks.factors`. Raises
    ModelError for a LoRA that does not fit the model, and ValueError for a weight that is not finite and for
    blocks that are not the model's; then the model is left as it was.
    """
    if not math.isfinite(weight):
        raise ValueError(f"the weight of a LoRA must be a finite number, not {weight}")
    models = _models(pipe)
    factor = factors(blocks, models["diffusion"]) if blocks is not None else {}
    changes = _find(lora, models, config or getattr(pipe, "config", None))
    for name in models:
        own = [
            (change, weight * factor.get(block_of(change.place.network, change.place.layer), 1.0))
            for change in changes
            if change.place.network == name
        ]
        if own:
            merged = _merged(models[name])
            merged.added.append((lora, own))
            _merge(models[name], merged)


def remove(pipe: StableDiffusion | Mapping[str, nn.Module], lora: LoRA | None = None) -> None:
    """Takes one LoRA, or all, out again. Without LoRAs, the model is bit for bit what it was before.

    Raises ValueError, and changes nothing, if that LoRA is not in the model.
    """
    networks = list(_models(pipe).values())
    if lora is not None and not any(one is lora for x in networks for one, _ in _merged(x).added):
        raise ValueError(f"{lora.path} is not in this model")
    for network in networks:
        merged = _merged(network)
        merged.added = [entry for entry in merged.added if lora is not None and entry[0] is not lora]
        _merge(network, merged)


@dataclass(frozen=True)
class _Change:
    """An update, and where in the model it goes."""

    place: Place
    tensor: str  # "weight" or "bias"
    inputs: int | None  # of a weight: only the first so many inputs are changed
    update: AnyUpdate

    def rows(self, tensor: Tensor) -> Tensor:
        """Returns a view of what is changed, of the whole weight or bias."""
        rows = tensor.chunk(self.place.parts)[self.place.part]
        return rows if self.inputs is None else rows[:, : self.inputs]


@dataclass
class _Merged:
    """The LoRAs in a network, and the weights that they replaced."""

    originals: dict[str, Tensor] = field(default_factory=dict)  # the changed weights before, by name
    added: list[tuple[LoRA, list[tuple[_Change, float]]]] = field(default_factory=list)


def _merged(network: nn.Module) -> _Merged:
    return network.__dict__.setdefault("_merged_loras", _Merged())


@torch.no_grad()
def _merge(network: nn.Module, merged: _Merged) -> None:
    """Sets the weights to the originals plus all changes that remain, each a change of the originals."""
    totals: dict[str, Tensor] = {}
    for change, weight in (pair for _, pairs in merged.added for pair in pairs):
        name = f"{change.place.layer}.{change.tensor}"
        parameter = network.get_parameter(name)
        if name not in merged.originals:
            merged.originals[name] = parameter.detach().clone()
        before = merged.originals[name]
        wide = parameter.device, torch.promote_types(parameter.dtype, torch.float32)
        if name not in totals:
            totals[name] = before.to(*wide, copy=True)
        if weight:
            rows = change.rows(totals[name])  # a view
            rows += weight * change.update.delta(change.rows(before).to(*wide))
    for name in list(merged.originals):
        if name in totals:
            network.get_parameter(name).copy_(totals[name])
        else:
            network.get_parameter(name).copy_(merged.originals.pop(name))


def _models(pipe: StableDiffusion | Mapping[str, nn.Module]) -> Mapping[str, nn.Module]:
    models = pipe if isinstance(pipe, Mapping) else pipe.models
    return {name: getattr(network, "_orig_mod", network) for name, network in models.items()}  # not compiled


FIRST = "down.0.0"  # the U-Net's first layer


def _find(lora: LoRA, models: Mapping[str, Any], config: ModelConfig | None) -> list[_Change]:
    """Returns the place of each update. Raises ModelError for an update that has no place or does not fit."""
    config = config or ModelConfig(clip=models["clip"].config, unet=models["diffusion"].config)
    known = {
        _flat(name): place
        for place in places(config, whole=True)
        for name in (place.diffusers, place.compvis)
    }
    found: dict[tuple[Place, str], _Change] = {}
    unknown = []
    every: list[tuple[str, str, AnyUpdate]] = [("weight", *item) for item in lora.updates.items()]
    every += [("bias", *item) for item in lora.biases.items()]
    for tensor, layer, update in every:
        place = known.get(_flat(layer))
        module = None if place is None else models[place.network].get_submodule(place.layer)
        changed = isinstance(module, nn.Linear | nn.Conv2d) or (
            isinstance(module, nn.LayerNorm | nn.GroupNorm) and isinstance(update, Difference)
        )
        if place is None or not changed:
            unknown.append(layer)
            continue
        if (place, tensor) in found:
            raise ModelError(f"{lora.path} changes the same layer twice, the second time as {layer}")
        whole = getattr(module, tensor)
        if whole is None:
            raise ModelError(f"{lora.path} does not fit this model, where {layer} has no bias")
        if not isinstance(whole, nn.Parameter):
            raise ModelError(f"{lora.path} comes too late: {layer} has weights of 8 bits; add LoRAs before")
        rows, *rest = _four(whole.shape)
        given = update.shape
        inputs = math.prod(given[1:]) // math.prod(rest[1:]) if whole.ndim > 1 else 1
        # A U-Net for inpainting or editing is given the latents first, and a plain one nothing else.
        narrow = place.layer == FIRST and len(given) in (2, 4) and 0 < inputs < rest[0]
        shape = (rows // place.parts, inputs if narrow else rest[0], *rest[1:])
        if _four(given) != shape and given != (shape[0], math.prod(shape[1:])):  # stored flat by some
            text = f"{layer} changes a {tensor} of shape {_four(given)}, and the model's is {shape}"
            raise ModelError(f"{lora.path} does not fit this model: {text}")
        if isinstance(update, DoRA) and update.lengths.shape not in ((shape[0], 1), (1, shape[1])):
            text = f"{layer} has {update.lengths.numel()} lengths for a weight of shape {shape}"
            raise ModelError(f"{lora.path} does not fit this model: {text}")
        found[place, tensor] = _Change(place, tensor, inputs if narrow else None, update)
    if unknown:
        raise ModelError(f"{lora.path} does not fit this model, which has no layer for {_some(unknown)}")
    return list(found.values())


def _flat(layer: str) -> str:
    """Returns the spelling that all spellings of a layer's name have in common."""
    for pattern, new in SPELLINGS:
        layer = re.sub(pattern, new, layer)
    return layer.replace(".", "_")


def _four(shape: Sequence[int]) -> tuple[int, ...]:
    """Treats a linear layer as the 1×1 convolution that it is: (out, in) -> (out, in, 1, 1)"""
    return (*shape, 1, 1, 1)[:4]
