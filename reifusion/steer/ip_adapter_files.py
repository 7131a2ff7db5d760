"""IP-Adapters in files, and the image encoders that stand beside them.

The parameters in `steer/ip_adapter.py` are called as in the files, so that these need no table; the names of
the image encoder are transformers's, and `ENCODER` has them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..model.clip import ACTIVATIONS
from ..model.diffusers_folder import open_weights
from ..model.diffusion import UNet
from ..model.family import without_memory
from ..model.pipeline import StableDiffusion
from ..model.tensors import ModelError, TensorFile, _unpickle
from .clip_vision import CLIPVision, VisionConfig
from .ip_adapter import Full, IPAdapter, Plain, Plus, cross_attentions

# Layers of the image encoder: ours, and transformers's. A # stands for a number.
ENCODER = (
    ("whole", "vision_model.embeddings.class_embedding"),
    ("patch.weight", "vision_model.embeddings.patch_embedding.weight"),
    ("position", "vision_model.embeddings.position_embedding.weight"),
    ("norm_1.", "vision_model.pre_layrnorm."),  # spelled so
    ("norm_2.", "vision_model.post_layernorm."),
    ("projection.weight", "visual_projection.weight"),
    ("layers.#.norm_1.", "vision_model.encoder.layers.#.layer_norm1."),
    ("layers.#.norm_2.", "vision_model.encoder.layers.#.layer_norm2."),
    ("layers.#.attention.out.", "vision_model.encoder.layers.#.self_attn.out_proj."),
    ("layers.#.linear_1.", "vision_model.encoder.layers.#.mlp.fc1."),
    ("layers.#.linear_2.", "vision_model.encoder.layers.#.mlp.fc2."),
)
# Our fields, and those of transformers's config.json, with the values that it leaves out
SIZES = {
    "width": ("hidden_size", 768),
    "hidden": ("intermediate_size", 3072),
    "layers": ("num_hidden_layers", 12),
    "heads": ("num_attention_heads", 12),
    "size": ("image_size", 224),
    "patch": ("patch_size", 32),
    "projection": ("projection_dim", 512),
    "activation": ("hidden_act", "quick_gelu"),
    "eps": ("layer_norm_eps", 1e-5),
}


def load_ip_adapter(
    source: str | Path, pipe: StableDiffusion, image_encoder: str | Path | None = None
) -> tuple[IPAdapter, CLIPVision]:
    """Reads an IP-Adapter for a model, and its image encoder, to the model's device and dtype.

    source: a `.safetensors` file or a pickle, plain, plus or for full faces. image_encoder: transformers's
    folder of the encoder; None: the folder `image_encoder` beside the file, or in `models` beside its folder,
    as in h94/IP-Adapter. Raises ModelError, in one sentence, for a file that is no IP-Adapter, is of another
    kind, is damaged, or was made for another kind of model or encoder.
    """
    path = Path(source).expanduser()
    if not path.is_file():
        raise ModelError(f"there is no file {path}")
    tensors = _tensors(path)
    unet = pipe.models["diffusion"]
    if not isinstance(unet, UNet):
        raise ModelError(f"{path} is for models with a U-Net, which {pipe.config.name} does not have")
    outs = [layer.q.out_features for layer in cross_attentions(unet)]
    make, features, of_picture = _projection(path, tensors, unet.config.context_width)

    def empty() -> dict[str, nn.Module]:
        return {"adapter": IPAdapter(make(), unet.config.context_width, outs)}

    adapter = without_memory(empty)["adapter"]
    assert isinstance(adapter, IPAdapter)
    _fill(adapter, tensors, f"{path} is no IP-Adapter for {pipe.config.name}", pipe)
    for folder in _folders(path, image_encoder):
        config = _config(folder)
        if features == (config.projection if of_picture else config.width):
            return adapter, load_image_encoder(folder, pipe)
        seen = config.projection if of_picture else config.width
        if image_encoder is not None:
            raise ModelError(f"{path} needs {_encoder(features)}, and that of {folder} makes {seen}")
    raise ModelError(f"{path} needs {_encoder(features)}; say where it is, as its folder in h94/IP-Adapter")


def _encoder(features: int) -> str:
    known = {1024: "CLIP ViT-H/14", 1280: "CLIP ViT-H/14, or ViT-bigG/14 for the plain one for SDXL"}
    return (
        f"an image encoder that makes vectors of {features} ({known.get(features, 'not one of the usual')})"
    )


def load_image_encoder(folder: Path, pipe: StableDiffusion) -> CLIPVision:
    """Reads an image encoder from transformers's folder. Raises ModelError, in one sentence."""
    config = _config(folder)
    tensors = {
        name
        if name.startswith("visual_projection.")
        else f"vision_model.{name.removeprefix('vision_model.')}": x
        for name, x in ((name, stored.read()) for name, stored in open_weights(folder).items())
        if not name.endswith("position_ids")
    }  # transformers 5 writes them without `vision_model.`
    ours: dict[str, Tensor] = {}
    for name, theirs in ENCODER:
        for i in range(config.layers) if "#" in name else (0,):
            one, other = (text.replace("#", str(i)) for text in (name, theirs))
            for end in ("weight", "bias") if name.endswith(".") else ("",):
                if other + end in tensors:
                    ours[one + end] = tensors.pop(other + end)
    for i in range(config.layers):
        for end in ("weight", "bias"):
            names = [f"vision_model.encoder.layers.{i}.self_attn.{x}_proj.{end}" for x in "qkv"]
            if all(name in tensors for name in names):
                ours[f"layers.{i}.attention.qkv.{end}"] = torch.cat([tensors.pop(name) for name in names])
    net = without_memory(lambda: {"vision": CLIPVision(config)})["vision"]
    assert isinstance(net, CLIPVision)
    _fill(net, ours | tensors, f"{folder} does not hold an image encoder of CLIP's", pipe)
    return net


def _fill(net: nn.Module, tensors: Mapping[str, Tensor], wrong: str, pipe: StableDiffusion) -> None:
    """Puts the tensors into a network without memory. Raises ModelError unless they are all that it needs."""
    expected = net.state_dict()
    for name, empty in expected.items():
        if name not in tensors:
            raise ModelError(f"{wrong}: it lacks {name}")
        if tensors[name].shape != empty.shape:
            shapes = f"{tuple(tensors[name].shape)}, and not {tuple(empty.shape)}"
            raise ModelError(f"{wrong}: {name} has shape {shapes}")
    if unknown := [name for name in tensors if name not in expected]:
        raise ModelError(f"{wrong}: it has {len(unknown)} tensors more, first {unknown[0]}")
    state = {name: tensors[name].to(pipe.device, pipe.dtype) for name in expected}
    net.load_state_dict(state, assign=True)
    net.eval().requires_grad_(False)


class _Parts(TensorFile):
    """A file whose tensors a pickle has in two dicts, and a `.safetensors` in one."""

    def _pickle(self) -> Callable[[str], Tensor]:
        content = _unpickle(self.path)
        parts = {part: content.get(part) for part in ("image_proj", "ip_adapter")}
        tensors = {
            f"{part}.{name}": x
            for part, inside in parts.items()
            if isinstance(inside, Mapping)
            for name, x in inside.items()
            if isinstance(x, Tensor)
        }
        self.shapes = {name: x.shape for name, x in tensors.items()}
        self.dtypes = {name: x.dtype for name, x in tensors.items()}
        return tensors.__getitem__


def _tensors(path: Path) -> dict[str, Tensor]:
    """Reads the tensors. Raises ModelError for a file that is not an IP-Adapter, or one for FaceID."""
    tensors = {name: x.read() for name, x in _Parts(path).tensors().items()}
    if not all(any(name.startswith(part) for name in tensors) for part in ("image_proj.", "ip_adapter.")):
        raise ModelError(f"{path} is not an IP-Adapter: it has no tensors of image_proj and ip_adapter")
    faces = r"image_proj\.perceiver_resampler\.|ip_adapter\..*_lora\."
    of_id = "image_proj.norm.weight" in tensors and "image_proj.proj.0.weight" in tensors
    if of_id or any(re.match(faces, name) for name in tensors):
        raise ModelError(
            f"{path} is an IP-Adapter for faces by their identity (FaceID), which is not built in"
        )
    return tensors


def _projection(
    path: Path, tensors: Mapping[str, Tensor], width: int
) -> tuple[Callable[[], Plain | Plus | Full], int, bool]:
    """Tells the kind by its names: how to make it, the width of what it reads, and True if that is of the
    picture as a whole.
    """
    sizes = {name.removeprefix("image_proj."): x.shape for name, x in tensors.items()}
    try:
        if "proj.weight" in sizes:
            rows, features = sizes["proj.weight"]
            return lambda: Plain(features, rows // width, width), features, True
        if "latents" in sizes:
            _, count, inner = sizes["latents"]
            features, heads = sizes["proj_in.weight"][1], sizes["layers.0.0.to_q.weight"][0] // 64
            layers = len({name.split(".")[1] for name in sizes if name.startswith("layers.")})
            return lambda: Plus(features, count, inner, heads, layers, width), features, False
        if "proj.3.weight" in sizes:
            features = sizes["proj.0.weight"][1]
            return lambda: Full(features, width), features, False
    except (KeyError, ValueError, IndexError):
        pass
    raise ModelError(f"{path} is an IP-Adapter of a kind that is not built in")


def _folders(path: Path, given: str | Path | None) -> list[Path]:
    """Returns where the image encoder may be."""
    if given is not None:
        folder = Path(given).expanduser()
        if not (folder / "config.json").is_file():
            raise ModelError(f"{folder} is not the folder of an image encoder: it has no config.json")
        return [folder]
    beside = (path.parent / "image_encoder", path.parent.parent / "models" / "image_encoder")
    return [folder for folder in beside if (folder / "config.json").is_file()]


def _config(folder: Path) -> VisionConfig:
    try:
        read: Any = json.loads((folder / "config.json").read_text("utf-8"))
        read = read.get("vision_config") or read
        config = VisionConfig(**{ours: read.get(theirs, usual) for ours, (theirs, usual) in SIZES.items()})
        whole = [config.width, config.hidden, config.layers, config.heads, config.size, config.patch]
        positive = all(isinstance(x, int) and x > 0 for x in (*whole, config.projection))
        fits = positive and config.width % config.heads == 0 and config.patch <= config.size
        if fits and config.activation in ACTIVATIONS and 0 < config.eps < 1:
            return config
    except (OSError, ValueError, AttributeError, TypeError):
        pass
    raise ModelError(f"{folder}/config.json is not the config of an image encoder of CLIP's")
