"""The mini for the browser: its networks as ONNX without weights, and what the page needs beside them.

The weights stay where they are, in mini.safetensors: the page reads that file, and gives each network its
tensors as ONNX's external data, float32, in the order of mini.json. onnxruntime-web comes from npm, in the
version and with the hash below. Both are kept in the build's cache.
"""

from __future__ import annotations

import base64
import hashlib
import io
import logging
import shutil
import subprocess
import tarfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

import reifusion
from docs import execute
from reifusion.files import write_json
from reifusion.model.attention import CrossAttention, SelfAttention, softmax_attention

MINI = Path(reifusion.__file__).parent / "data" / "mini.safetensors"
RUNTIME = "onnxruntime-web@1.30.0"
# SHA-512
INTEGRITY = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
PARTS = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")


class Watched(nn.Module):
    """The U-Net, with what each word's places are: the mean of all maps of cross-attention, as in DAAM."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet

    def forward(self, latents: Tensor, context: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """latents (2, 4, h, w), context (2, S, width), t (1,) -> (2, 4, h, w), first maps (S, h, w)"""
        height, width = latents.shape[-2:]
        maps: list[Tensor] = []

        def watch(weights: Tensor) -> None:  # (2, heads, L, S)
            of_words = weights[0].sum(0).T  # (S, L): over the heads
            wide = round((of_words.shape[1] * width / height) ** 0.5)
            grid = of_words.unflatten(1, (-1, wide))[None]  # (1, S, h', w')
            maps.append(F.interpolate(grid, size=(height, width), mode="bicubic")[0])

        layers = [layer for layer in self.unet.modules() if isinstance(layer, CrossAttention)]
        for layer in layers:
            layer.hook = watch
        try:
            output = self.unet(latents, context, t)
        finally:
            for layer in layers:
                layer.hook = None
        return output, torch.stack(maps).sum(0) / sum(layer.heads for layer in layers)


@contextmanager
def written_out(module: nn.Module) -> Iterator[None]:
    """Attention is softmax(Q Kᵀ / √d) V, in operations that ONNX has."""
    layers = [layer for layer in module.modules() if isinstance(layer, (SelfAttention, CrossAttention))]
    kernels = [layer.kernel for layer in layers]
    for layer in layers:
        layer.kernel = lambda q, k, v, causal: softmax_attention(q, k, v, causal)[0]
    try:
        yield
    finally:
        for layer, kernel in zip(layers, kernels):
            layer.kernel = kernel


def export(module: nn.Module, inputs: dict[str, Tensor], outputs: list[str]) -> tuple[bytes, list[str]]:
    """Returns the network as ONNX whose weights are elsewhere, and the names of these weights in order."""
    from onnx.external_data_helper import set_external_data

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it tells of packages that are not needed
    with written_out(module), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module, tuple(inputs.values()), input_names=list(inputs), output_names=outputs, dynamo=True,
            optimize=False, verbose=False,
        )  # fmt: skip
    model = program.model_proto  # type: ignore[union-attr]
    weights, order, offset = module.state_dict(), [], 0
    for tensor in model.graph.initializer:
        if tensor.name in weights:
            size = 4 * weights[tensor.name].numel()
            tensor.raw_data = b""  # what external data needs to be set
            set_external_data(tensor, "weights", offset, size)
            tensor.ClearField("raw_data")
            tensor.ClearField("float_data")
            order.append(tensor.name)
            offset += size
    for node in [*model.graph.node, *model.graph.value_info, *(n for f in model.functions for n in f.node)]:
        node.ClearField("metadata_props")  # where it was in Python: nine tenths of the file
        node.ClearField("doc_string")
    return model.SerializeToString(), order


def write(folder: Path) -> None:
    """Writes the networks and onnxruntime-web into the folder, from the cache if nothing has changed."""
    kept = execute.CACHE / "live"
    note = kept / "made-of"
    made_of = hashlib.sha256(execute.surroundings().encode() + Path(__file__).read_bytes()).hexdigest()
    if not note.is_file() or note.read_text() != made_of:
        kept.mkdir(parents=True, exist_ok=True)
        export_all(kept)
        note.write_text(made_of)
    try:
        fetch(kept)
    except OSError as error:
        print(
            f"nothing will draw in the browser, as onnxruntime-web could not be fetched: {error}", flush=True
        )
        return
    shutil.copytree(kept, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.tgz", "made-of"))


def export_all(folder: Path) -> None:
    """Writes each network without its weights, and mini.json."""
    pipe = reifusion.load(dtype="fp32", device="cpu")
    config, tokenizer = pipe.config, pipe.tokenizer
    length, side = config.clip.context_length, config.size // config.vae.factor
    latents = torch.zeros(2, 4, side, side)
    networks: dict[str, tuple[nn.Module, dict[str, Tensor], list[str]]] = {
        "clip": (pipe.models["clip"], {"tokens": torch.zeros(2, length, dtype=torch.long)}, ["words"]),
        "diffusion": (
            Watched(pipe.models["diffusion"]),
            {"latents": latents, "context": torch.zeros(2, length, config.clip.width), "t": torch.zeros(1)},
            ["output", "maps"],
        ),
        "decoder": (pipe.models["decoder"], {"latents": latents[:1]}, ["pixels"]),
    }
    order = {}
    with safe_open(MINI, "pt") as file:
        stored = set(file.keys())
    for name, (module, inputs, outputs) in networks.items():
        model, names = export(module.eval(), inputs, outputs)
        order[name] = [_in_file(f"{name}.{weight.removeprefix('unet.')}", stored) for weight in names]
        (folder / f"{name}.onnx").write_bytes(model)
    schedule = config.schedule
    write_json(folder / "mini.json", {
        "size": config.size, "side": side, "length": length, "sampler": config.sampler, "cfg": config.cfg,
        "beta_start": schedule.beta_start, "beta_end": schedule.beta_end,
        "prediction": schedule.prediction_type, "scale_factor": config.vae.scale_factor,
        "merges": tokenizer.merges_text, "weights": order,
        "start": tokenizer.start, "end": tokenizer.end, "pad": tokenizer.pad,
    })  # fmt: skip


def _in_file(name: str, stored: set[str]) -> str:
    """Returns a weight's name in the mini's file, where a block's only transformer layer has no number."""
    found = next((known for known in (name, name.replace(".layers.0.", ".")) if known in stored), None)
    if found is None:
        raise ValueError(f"{MINI.name} has no tensor {name}; docs/live.py has to learn its names")
    return found


def fetch(folder: Path) -> None:
    """Puts onnxruntime-web into the folder, from npm if need be.

    Raises OSError if it cannot be fetched, and ValueError for other bytes.
    """
    archive = folder / f"{RUNTIME.replace('@', '-')}.tgz"
    if not archive.is_file():
        if (npm := shutil.which("npm")) is None:
            raise OSError("it is fetched with npm, and that command was not found")
        done = subprocess.run([npm, "pack", "--silent", RUNTIME], cwd=folder, capture_output=True, text=True)
        if done.returncode != 0 or not archive.is_file():
            raise OSError((done.stderr.strip().splitlines() or ["npm gave no reason"])[-1])
    content = archive.read_bytes()
    if base64.b64encode(hashlib.sha512(content).digest()).decode() != INTEGRITY:
        archive.unlink()
        raise ValueError(f"{RUNTIME} is not what it was when this version was chosen")
    with tarfile.open(fileobj=io.BytesIO(content)) as files:
        for part in PARTS:
            found: Any = files.extractfile(f"package/dist/{part}")
            (folder / part).write_bytes(found.read())
