"""Making a LoRA: the model is frozen, and beside some of its layers two thin matrices are trained.

`attach` puts them there, `train_lora` trains them on a few pictures, `save_lora` writes the small file that
`reifusion generate --lora` and others read. Source: Hu et al. 2021, §4.
"""

from __future__ import annotations

import fnmatch
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from .. import __version__
from ..files import whole
from ..model.config import ModelConfig
from ..weights.lora import Place, places
from ..weights.writing import write_tensors
from .images import open_pictures
from .latents import cache_latents
from .loop import LoopConfig, processes
from .text2image import Data, TextToImage, TextToImageTraining, fit

if TYPE_CHECKING:
    from ..model.encoder import Encoder
    from ..model.pipeline import StableDiffusion

# Which layers, as patterns of our names; a projection of stacked ones is named alone, as in "….attention.q".
ATTENTION = "diffusion.*attention.*"  # q, k, v and out, towards the pixels and towards the words
FEED_FORWARD = "diffusion.*feed_forward.*"
CONVOLUTIONS = "diffusion.*conv*"  # of the residual blocks, and where the resolution changes
TEXT_ENCODER = "clip.*attention.*"

LAYOUTS = ("kohya", "peft")


@dataclass(frozen=True)
class LoRATraining(TextToImageTraining):
    """As the training of the whole model; and what the LoRA is like."""

    loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=600, lr=1e-3, warmup=30, ema=0.99))
    batch: int = 4
    timestep_power: float = 1.0
    train_text_encoder: bool = False  # adds TEXT_ENCODER to the targets
    caption: str = ""  # of pictures that have none, "a zork"
    rank: int = 8  # r; the file grows with it
    alpha: float = 8.0  # the change is scaled by α/r
    targets: tuple[str, ...] = (ATTENTION,)  # patterns of layers' names, see above
    dropout: float = 0.0  # of the input of A


def train_lora(
    pipe: StableDiffusion,
    data: Data | str | Path,
    training: LoRATraining,
    folder: str | Path,
    out: str | Path | None = None,
    layout: str = "kohya",
    size: int | None = None,
    mirror: bool = False,
    watch: Callable[[int, StableDiffusion], Image.Image | None] | None = None,
) -> Path:
    """Trains a LoRA for a model on captioned pictures; returns its file. The model is left as it was.

    data: a folder of pictures or what else `open_pictures` takes, or latents of this model. folder: keeps the
    run, which goes on there when it was stopped. out: the file, by default lora.safetensors in the folder; it
    is there from the first checkpoint on. layout: see `save_lora`. size: the pictures' area is that of a
    square with this side, in pixels; None: the model's. mirror: shows each picture mirrored too. watch:
    called at each checkpoint with a model that has the LoRA in it; may return a picture for TensorBoard.
    Raises ValueError for a target that names no layer, and what `open_pictures` and `fit` raise.
    """
    folder, tokenizer = Path(folder), pipe.tokenizer
    path = folder / "lora.safetensors" if out is None else Path(out)
    if isinstance(data, str | Path):
        with processes().main_process_first():  # the others then find what it has encoded
            data = _latents(pipe, data, training.caption, folder / "latents", size, mirror)
    with torch.device("meta"):  # a shell, without memory, for the networks that are there
        model = TextToImage(pipe.config)
    model.clip, model.diffusion = pipe.models["clip"], pipe.models["diffusion"]  # type: ignore[assignment]
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    targets = training.targets + (TEXT_ENCODER,) * training.train_text_encoder
    facts = {
        "ss_sd_model_name": pipe.config.name,
        "ss_num_train_images": f"{len(data)}",
        "ss_learning_rate": f"{training.loop.lr}",
    }

    def keep(step: int, average: dict[str, Tensor]) -> Image.Image | None:
        with _weights(model.eval(), average):
            save_lora(model, path, layout, facts | {"ss_steps": f"{step}"})
            picture = None if watch is None else watch(step, pipe)
        model.train()
        return picture

    try:
        # The loop has its own half precision, and wants the weights in float32.
        attach(model.float(), training.rank, training.alpha, targets, training.dropout, training.loop.seed)
        empty = torch.tensor(tokenizer.encode(""))
        fit(model.train(), data, empty, pipe.config.schedule, training, folder, keep)
    finally:
        detach(model.eval())
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(dtypes[name])  # to the bit as it was
    return path


def _latents(
    pipe: StableDiffusion, source: str | Path, caption: str, cache: Path, size: int | None, mirror: bool
) -> Data:
    pictures = open_pictures(source)
    pictures.items = [
        item if any(item.captions) else replace(item, captions=(caption,)) for item in pictures.items
    ]
    encoder, size = cast("Encoder", pipe.models["encoder"]), size or pipe.config.size
    return cache_latents(encoder, pictures, size, cache, tokenizer=pipe.tokenizer, mirror=mirror)


@contextmanager
def _weights(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """While open, the model has these weights."""
    own = {name: parameter for name, parameter in model.named_parameters() if name in weights}
    before = {name: parameter.detach().clone() for name, parameter in own.items()}
    for values in (weights, before):
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(values[name])
        if values is weights:
            yield


class LoRALayer(nn.Module):
    """A frozen layer, and what is learned beside it. Stacked projections have one LoRA each."""

    def __init__(
        self, base: nn.Linear | nn.Conv2d, own: Sequence[Place], rank: int, alpha: float, dropout: float
    ):
        super().__init__()
        self.base, self.own, self.alpha = base, own, alpha
        self.dropout = nn.Dropout(dropout)
        rows = len(base.weight) // own[0].parts
        kernel = base.weight.shape[2:]  # (k, k) of a convolution
        # In float32, whatever the model's dtype.
        self.down = nn.ParameterList(torch.empty(rank, *base.weight.shape[1:]) for _ in own)
        self.up = nn.ParameterList(torch.zeros(rows, rank, *(1 for _ in kernel)) for _ in own)
        self.to(base.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        """As the frozen layer's: (B, L, in) -> (B, L, out), or (B, in, H, W) -> (B, out, h, w)."""
        axis = -1 if isinstance(self.base, nn.Linear) else 1
        pieces = list(self.base(x).chunk(self.own[0].parts, dim=axis))  # q, k and v, where they are stacked
        x = self.dropout(x).to(self.down[0].dtype)
        for place, down, up in zip(self.own, self.down, self.up):
            # [lora] Eq. 3, Hu et al. 2021: h = W₀x + ΔWx = W₀x + BAx; §4.1: ΔWx is scaled by α/r
            change = self.alpha / len(down) * self._low_rank(x, down, up)
            pieces[place.part] = pieces[place.part] + change.to(pieces[place.part].dtype)
        return torch.cat(pieces, dim=axis)

    @property
    def weight(self) -> Tensor:
        """The frozen one."""
        return self.base.weight

    def _low_rank(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """BAx; for a convolution, A is one of the same kind and B a 1×1 convolution."""
        if isinstance(self.base, nn.Linear):
            return F.linear(F.linear(x, down), up)  # (B, L, in) -> (B, L, r) -> (B, L, rows)
        return F.conv2d(F.conv2d(x, down, None, self.base.stride, self.base.padding), up)


def attach(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 8.0,
    targets: Sequence[str] = (ATTENTION,),
    dropout: float = 0.0,
    seed: int = 0,
) -> list[nn.Parameter]:
    """Freezes a model and puts a LoRA beside each layer that `targets` name; returns what is to be trained.

    model: a module with a `clip` and a `diffusion`. rank: r, 1 or more. alpha: the change is scaled by α/r.
    targets: patterns of names, see above. dropout: of the input of A. The model's output is the same as
    before, because B = 0. Raises ValueError for a target that names no layer.
    """
    if rank < 1 or not math.isfinite(alpha) or not 0 <= dropout < 1:
        raise ValueError(f"rank {rank}, alpha {alpha} and dropout {dropout} make no LoRA")
    own: dict[str, list[Place]] = {}
    named = set()
    for place in places(_config(model)):
        name = f"{place.network}.{place.layer}"
        found = {target for target in targets if fnmatch.fnmatchcase(place.name, target)}
        if found and isinstance(model.get_submodule(name), nn.Linear | nn.Conv2d):
            own.setdefault(name, []).append(place)
            named |= found
    for target in targets:
        if target not in named:
            raise ValueError(f"no layer is named like {target!r}; most of a U-Net's are like {ATTENTION!r}")
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    trained = []
    for name, own_places in own.items():
        layer = LoRALayer(model.get_submodule(name), own_places, rank, alpha, dropout)  # type: ignore[arg-type]
        for down in layer.down:
            # As in the authors' own code: B = 0, and A as a linear layer begins.
            fresh = torch.empty(down.shape)
            nn.init.kaiming_uniform_(fresh, a=math.sqrt(5), generator=generator)
            down.data.copy_(fresh)
        _put(model, name, layer)
        trained += [*layer.down, *layer.up]
    return trained


def detach(model: nn.Module) -> None:
    """Takes all that `attach` put there out again; the model's own weights were never touched."""
    for name, layer in _layers(model):
        _put(model, name, layer.base)
    model.requires_grad_(True)


def lora_state(model: nn.Module, layout: str = "kohya") -> dict[str, Tensor]:
    """The trained matrices by the names of a layout, "kohya" or "peft" (diffusers's): float32, on the CPU."""
    if layout not in LAYOUTS:
        raise ValueError(f"there is no layout {layout!r}; there are {', '.join(LAYOUTS)}")
    state: dict[str, Tensor] = {}
    for _, layer in _layers(model):
        for place, *matrices in zip(layer.own, layer.down, layer.up):
            down, up = (x.detach().float().cpu().clone() for x in matrices)
            if layout == "kohya":
                name = _kohya(place.diffusers)
                new = {
                    ".lora_down.weight": down,
                    ".lora_up.weight": up,
                    ".alpha": torch.tensor(float(layer.alpha)),
                }
            else:
                name, new = place.diffusers, {".lora_A.weight": down, ".lora_B.weight": up}
            state |= {name + ending: x for ending, x in new.items()}
    return state


def save_lora(
    model: nn.Module, path: str | Path, layout: str = "kohya", metadata: Mapping[str, str] | None = None
) -> None:
    """Writes the LoRA that `attach` put beside a model's layers: a `.safetensors`, whole or not at all.

    layout: "kohya", which most programs read, or "peft", that of diffusers's own training scripts. metadata:
    more facts for the header. Both are read by `load_lora` and by diffusers's `load_lora_weights`.
    """
    state, layers = lora_state(model, layout), [layer for _, layer in _layers(model)]
    if not layers:
        raise ValueError("there is no LoRA beside the layers of this model; `attach` makes one")
    rank, alpha = len(layers[0].down[0]), layers[0].alpha
    header = {"format": "pt", "software": f"reifusion {__version__}"}
    if layout == "kohya":
        header |= {
            "ss_network_module": "networks.lora",
            "ss_network_dim": f"{rank}",
            "ss_network_alpha": f"{alpha}",
        }
        if any(layer.base.weight.shape[2:].numel() > 1 for layer in layers):
            header["ss_network_args"] = json.dumps({"conv_dim": f"{rank}", "conv_alpha": f"{alpha}"})
    else:
        config: dict[str, Any] = {}
        for place in (place for layer in layers for place in layer.own):
            network, _, name = place.diffusers.partition(".")
            config |= {f"{network}.r": rank, f"{network}.lora_alpha": alpha}
            # In transformers 5 the text encoder's names have no `text_model.`; as endings these fit both.
            config.setdefault(f"{network}.target_modules", []).append(name.removeprefix("text_model."))
        header["lora_adapter_metadata"] = json.dumps(config)
    with whole(Path(path)) as temporary:
        write_tensors(state, temporary, header | dict(metadata or {}))


def _layers(model: nn.Module) -> list[tuple[str, LoRALayer]]:
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, LoRALayer)]


def _put(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def _kohya(name: str) -> str:
    """unet.mid_block.attentions.0.proj_in -> lora_unet_mid_block_attentions_0_proj_in"""
    return "lora_" + re.sub("^text_encoder", "te", name).replace(".", "_")


def _config(model: nn.Module) -> ModelConfig:
    return ModelConfig(clip=model.clip.config, unet=model.diffusion.config)  # type: ignore[arg-type, union-attr]
