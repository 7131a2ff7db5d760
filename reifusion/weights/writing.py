"""Writes models: in any of the three formats, and whole or not at all."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import families
from ..files import whole
from ..model.config import ModelConfig, UNetConfig
from ..model.family import Family
from ..model.model_converter import convert
from ..model.model_loader import state_dict
from ..model.tensors import SCALE, ModelError
from ..model.tokenizer import Tokenizer
from ..shortcuts.int8 import whole_numbers


def save(
    config: ModelConfig,
    models: Mapping[str, nn.Module],
    path: str | Path,
    to: str = "native",
    tokenizer: Tokenizer | None = None,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes a model: one `.safetensors` ("native", "compvis"), or a folder ("diffusers").

    A reader sees the old content or the new, never half of it. metadata: more facts for the file's header.
    dtype: of the numbers in the file; None keeps the networks' own. torch.int8, for "native" alone, gives the
    matrices of the text encoder and the U-Net 8 bits a number, and bfloat16 to all else. Raises ModelError
    for what a format cannot hold.
    """
    path = Path(path)
    if to != "native" and isinstance(config.unet, UNetConfig) and config.unet.patch > 1:
        raise ModelError(f"the format {to} knows no U-Net that sees latents in patches; native does")
    if to != "native" and dtype == torch.int8:
        raise ModelError(f"the format {to} knows no numbers of 8 bits; native does")
    if to == "diffusers":
        ours = path.is_dir() and ((path / "model_index.json").exists() or not any(path.iterdir()))
        if path.exists() and not ours:
            raise ModelError(f"{path} exists and is not a diffusers folder, so it was left as it is")
    elif path.is_dir():
        raise ModelError(f"{path} is a folder, and the format {to} is one file")
    native = state_dict(models)
    family = families.family_of(config)
    for name, x in state_dict(family.build(config)).items():  # a file that is written must be loadable
        if name not in native or native[name].shape != x.shape:
            raise ModelError(f"the networks do not have the sizes of their config, at {name}")
    tokenizer = tokenizer or Tokenizer(context_length=config.clip.context_length)
    if tokenizer.vocab_size > config.clip.vocab_size:
        raise ModelError("the text encoder has fewer tokens than the tokenizer")
    converted = convert(native, to, config, family.layout)
    tensors = {key: x.detach().cpu().contiguous() for key, x in converted.items()}
    tensors = eight_bits(tensors) if dtype == torch.int8 else {k: x.to(dtype) for k, x in tensors.items()}
    header = {**(metadata or {}), "format": "reifusion" if to == "native" else "pt"}
    header |= {"config": json.dumps(asdict(config))}
    header |= _tokenizer_header(tokenizer) | family.header(tokenizer)
    if config.__class__ is not ModelConfig:
        header["family"] = family.name
    with whole(path) as temporary:
        if to == "diffusers":
            _write_folder(temporary, family, config, tensors, tokenizer)
        else:
            write_tensors(tensors, temporary, header)


def eight_bits(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gives the matrices of the text encoder and the U-Net 8 bits a number and a scale a row, all else bf16.

    A W (out, …) becomes whole numbers n (out, …) and, under its name and ".scale", s (out,), with W ≈ s · n.
    The decoder is left alone: its errors are seen in every picture, and it is small.
    """
    found = {}
    for name, x in tensors.items():
        if x.ndim > 1 and name.startswith(("clip.", "clip_2.", "t5.", "diffusion.")):
            found[name], scale = whole_numbers(x, tuple(range(1, x.ndim)))
            found[name + SCALE] = scale.flatten()
        else:
            found[name] = x.bfloat16()
    return found


def read_back(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns tensors as a file of that dtype would give them back, in float32."""
    if dtype != torch.int8:
        return {name: x.to(dtype).float() for name, x in tensors.items()}
    written = eight_bits(tensors)
    found = {}
    for name in tensors:
        rows, scale = written[name].float(), written.get(name + SCALE)
        found[name] = rows if scale is None else rows * scale.reshape(-1, *[1] * (rows.ndim - 1))
    return found


def write_tensors(tensors: Mapping[str, Tensor], path: Path, header: Mapping[str, str] | None = None) -> None:
    """Writes a `.safetensors` with the permissions of the user's umask."""
    path.touch()
    mode = path.stat().st_mode
    try:
        # safetensors makes its files readable by the owner only
        save_file(dict(tensors), path, None if header is None else dict(header))
    except SafetensorError as error:
        if number := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
        raise
    path.chmod(mode)


def _tokenizer_header(tokenizer: Tokenizer) -> dict[str, str]:
    """Returns what a header must hold to bring a tokenizer back; nothing for CLIP's own."""
    if tokenizer.is_standard:
        return {}
    header = {"tokenizer": tokenizer.merges_text, "pad": tokenizer._tokens[tokenizer.pad]}
    if Tokenizer(tokenizer.merges_text).vocabulary != tokenizer.vocabulary:
        header["vocabulary"] = json.dumps(tokenizer.vocabulary)
    if tokenizer.exact:
        header["exact"] = json.dumps(tokenizer.exact)
    return header


def _write_folder(
    folder: Path, family: Family, config: ModelConfig, tensors: Mapping[str, Tensor], tokenizer: Tokenizer
) -> None:
    """Writes what `diffusers.DiffusionPipeline.from_pretrained` opens."""
    folder.mkdir()
    index = {"_diffusers_version": "0.30.0", **family.index(config)}
    for part, values in family.to_diffusers(config).items():
        (folder / part).mkdir()
        theirs = part.startswith("text_encoder")
        kind = values["architectures"][0] if theirs else values["_class_name"]
        index[part] = ["transformers" if theirs else "diffusers", kind]
        if "bos_token_id" in values:
            ids = {"bos": tokenizer.start, "eos": tokenizer.end, "pad": tokenizer.pad}
            values |= {f"{name}_token_id": id for name, id in ids.items()}
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        (folder / part / name).write_text(json.dumps(values, indent=2))
        start = f"{part}."
        if own := {key.removeprefix(start): x for key, x in tensors.items() if key.startswith(start)}:
            name = "model" if theirs else "diffusion_pytorch_model"
            write_tensors(own, folder / part / f"{name}.safetensors", {"format": "pt"})
    family.write_tokenizer(tokenizer, folder, config)
    for path in folder.glob("tokenizer*"):
        kind = json.loads((path / "tokenizer_config.json").read_text("utf-8"))["tokenizer_class"]
        index[path.name] = ["transformers", kind]
    (folder / "model_index.json").write_text(json.dumps(dict(sorted(index.items())), indent=2))
