"""A VAE by itself: looked at, drawn through, and written in another format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..families import sdxl_files
from ..families.sdxl import BASE as SDXL
from ..files import whole
from ..model.config import MINI, SD15, ModelConfig, VAEConfig
from ..model.decoder import Decoder
from ..model.diffusers_folder import config_to_diffusers, translated
from ..model.encoder import Encoder
from ..model.model_converter import FORMATS, Rule, rules
from ..model.part import open_part
from ..model.pipeline import StableDiffusion
from ..model.tensors import ModelError, Stored
from .hub import find
from .writing import write_tensors

FORMAT = "reifusion-vae"  # the header's "format" of a VAE in our own names
PRESETS = (SD15.vae, MINI.vae)  # what shapes do not tell is taken from the one with the same shapes


def load_vae(source: str | Path, dtype: torch.dtype | None = None) -> StableDiffusion:
    """Loads the VAE of a file, a folder or a hub id: a model that can encode and decode, and no more.

    A whole model will do. dtype: None keeps the file's. Raises ModelError.
    """
    path, tensors, found, config = _open(source)
    models: dict[str, nn.Module] = {"encoder": Encoder(config), "decoder": Decoder(config)}
    for name, network in models.items():
        state = {}
        for rule in found:
            if rule.ours.startswith(f"{name}."):
                parts = [tensors[theirs].read("cpu", dtype) for theirs in rule.theirs]
                state[rule.ours.removeprefix(f"{name}.")] = rule.merge(parts)
        wanted = {key: x.shape for key, x in network.state_dict().items()}
        if wrong := [key for key in wanted if key not in state or state[key].shape != wanted[key]]:
            raise ModelError(f"the VAE of {path} does not have the sizes of its config, at {name}.{wrong[0]}")
        network.load_state_dict(state, assign=True)
        network.eval().requires_grad_(False)
    return StableDiffusion(_model(path, config), None, models)


def find_config(source: str | Path) -> ModelConfig:
    """Returns the config that `load_vae` would find, without reading weights. Raises ModelError."""
    path, _, _, config = _open(source)
    return _model(path, config)


def _open(source: str | Path) -> tuple[Path, Mapping[str, Stored], list[Rule], VAEConfig]:
    path = find(source, "vae")
    tensors, found, _, header = open_part(path, "vae")
    return path, tensors, found, _config(path, tensors, found, header)


def _model(path: Path, config: VAEConfig) -> ModelConfig:
    size = 64 * config.factor  # latents along a side, as Stable Diffusion 1.x has them
    return ModelConfig(name=path.stem, size=size, vae=config)


def save_vae(
    pipe: StableDiffusion, path: str | Path, to: str = "native", dtype: torch.dtype | None = None
) -> None:
    """Writes a VAE alone: one `.safetensors` ("native", "compvis"), or a folder ("diffusers").

    dtype: of the numbers in the file; None keeps the networks' own. Raises ModelError if there is no such
    format, and for a folder that is not empty.
    """
    if to not in FORMATS:
        raise ModelError(f"there is no format {to!r}; the formats are {', '.join(FORMATS)}")
    path, config = Path(path), pipe.config
    if path.is_dir() and (to != "diffusers" or any(path.iterdir())):
        raise ModelError(f"{path} is a folder that is there already, so it was left as it is")
    ours = {
        f"{half}.{name}": x.detach().cpu().to(dtype)
        for half in ("encoder", "decoder")
        for name, x in pipe.models[half].state_dict().items()
    }
    tensors: dict[str, Tensor] = {}
    for rule in rules(config, to):
        if rule.ours in ours:
            names = [name.removeprefix("first_stage_model.").removeprefix("vae.") for name in rule.theirs]
            tensors |= {n: x.contiguous() for n, x in zip(names, rule.split(ours[rule.ours]), strict=True)}
    with whole(path) as temporary:
        if to == "diffusers":
            temporary.mkdir()
            values = config_to_diffusers(config)["vae"]
            (temporary / "config.json").write_text(json.dumps(values, indent=2))
            temporary /= "diffusion_pytorch_model.safetensors"
        header = {"format": FORMAT if to == "native" else "pt"}
        if to == "native":
            header["config"] = json.dumps(asdict(config.vae))
        write_tensors(tensors, temporary, header)


def _config(
    path: Path, tensors: Mapping[str, Stored], found: list[Rule], header: Mapping[str, str]
) -> VAEConfig:
    """Finds the config: in a config.json, in the header, or by the shapes."""
    folder = path / "vae" if (path / "vae").is_dir() else path
    try:
        if (folder / "config.json").is_file():
            theirs = json.loads((folder / "config.json").read_text("utf-8"))
            return VAEConfig(**translated(theirs, "vae", "vae"))
        if "config" in header:
            own = json.loads(header["config"])
            own = own.get("vae", own)  # that of a whole model
            sizes: dict[str, Any] = {k: tuple(x) if isinstance(x, list) else x for k, x in own.items()}
            return VAEConfig(**sizes)
    except ModelError as error:
        raise ModelError(f"the VAE of {path} cannot be built: {error}") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ModelError(f"the config of the VAE in {path} cannot be read") from None
    shapes = {rule.ours: tensors[rule.theirs[0]].shape for rule in found}
    levels = sorted({name.split(".")[2] for name in shapes if name.startswith("encoder.down.")}, key=int)
    blocks = {name.split(".")[3] for name in shapes if name.startswith("encoder.down.0.")}
    try:
        seen: dict[str, Any] = {
            "in_channels": shapes["encoder.conv_in.weight"][1],
            "latent_channels": shapes["decoder.conv_in.weight"][1],
            "channels": tuple(shapes[f"encoder.down.{level}.0.conv_1.weight"][0] for level in levels),
            "layers": len(blocks) - 1,  # the last one halves the resolution
            "quant": "encoder.quant.weight" in shapes,
        }
    except KeyError as error:
        raise ModelError(f"the VAE of {path} lacks {error.args[0]}") from None
    for preset in (SDXL.vae,) if sdxl_files.recognises(tensors) else PRESETS:
        if replace(preset, **seen) == preset:
            return preset
    known = "it says nothing of its groups, and has the shapes of no VAE that is known here"
    raise ModelError(f"the VAE of {path} cannot be built: {known}")
