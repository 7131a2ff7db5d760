"""Training a LoRA: the model is frozen, and beside some of its layers two thin matrices are trained.

`attach` adds the matrices, `train_lora` trains them on a few pictures, and `save_lora` writes the small file
that `reifusion generate --lora` and other programs read. Source: Hu et al. 2021, §4.
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
from ..swap import swap
from ..weights.lora import Place, places
from ..weights.writing import write_tensors
from .checkpoint import digest, unchanged
from .images import Pictures, open_pictures
from .keys import RecipeError, key
from .latents import HOLES, LatentData, Mixed, cache_latents
from .loop import LoopConfig, processes
from .progress import Seen
from .text2image import Data, TextToImage, TextToImageTraining, forward_process, optimise
from .watch import Watch

if TYPE_CHECKING:
    from ..model.encoder import Encoder
    from ..model.pipeline import StableDiffusion

# Patterns of layers' names, in our own spelling; each of several stacked projections has a name of its own,
# as in "….attention.q".
ATTENTION = "diffusion.*attention.*"  # q, k, v and out, of self-attention and cross-attention
FEED_FORWARD = "diffusion.*feed_forward.*"
CONVOLUTIONS = "diffusion.*conv*"  # of the residual blocks, and those that change the resolution
TEXT_ENCODER = "clip.*attention.*"

LAYOUTS = ("kohya", "peft")


@dataclass(frozen=True)
class LoRATraining(TextToImageTraining):
    """The settings for training the whole model, and those of the LoRA itself."""

    loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=600, lr=1e-3, warmup=30, ema=0.99))
    batch: int = key(4, "samples per step, of all processes and parts together", least=1)
    timestep_power: float = key(
        1.0, "1: all timesteps are equally frequent; below 1: noisy ones are more frequent", above=0
    )
    train_text_encoder: bool = key(False, "true: the text encoder gets a LoRA as well")
    caption: str = key("", 'of pictures without a caption of their own, as "a zork"')
    rank: int = key(8, "numbers in which a layer's change is expressed; the file grows with it", least=1)
    alpha: float = key(8.0, "the change is scaled by alpha/rank", above=0)
    targets: tuple[str, ...] = key((ATTENTION,), "patterns of the names of the layers that get a LoRA")
    layout: str = key("kohya", "names of the tensors in the file", choices=LAYOUTS)
    dropout: float = key(0.0, "share of a LoRA's inputs that is left out in each step", least=0, below=1)

    @property
    def all_targets(self) -> tuple[str, ...]:
        return self.targets + (TEXT_ENCODER,) * self.train_text_encoder


def train_lora(
    pipe: StableDiffusion,
    data: Data | Pictures | str | Path,
    training: LoRATraining,
    folder: str | Path,
    out: str | Path | None = None,
    layout: str = "kohya",
    size: int | None = None,
    mirror: bool = False,
    watch: Callable[[int, StableDiffusion], Image.Image | None] | None = None,
    prompts: Sequence[str] = (),
    validation: float | Pictures = 0.0,
    regularisation: Pictures | None = None,
    crops: int = 1,
) -> Path:
    """Trains a LoRA for a model on captioned pictures; returns its file. The model stays unchanged.

    data: pictures, a folder of them or any other source for `open_pictures`, or latents of this model.
    folder: holds the run, which resumes from there. out: the file, by default lora.safetensors in the folder;
    it is written at each checkpoint. layout: see `save_lora`. size: side in pixels of a square with the
    pictures' area; None means the model's own size. mirror: shows each picture mirrored as well. watch:
    called at each checkpoint with the model and the LoRA in it; may return a picture for TensorBoard.
    prompts: of a sheet at each checkpoint, where `watch` returns no picture. validation: other pictures, or
    the share of the pictures that is held out, on which the loss is measured at each checkpoint.
    regularisation: pictures of what must not change, learned as often as the others. crops: see
    `cache_latents`. Raises
    RecipeError for a target that names no layer, and whatever `open_pictures` and `optimise` raise.
    """
    folder, tokenizer = Path(folder), pipe.tokenizer
    path = folder / "lora.safetensors" if out is None else Path(out)
    made_of = {
        "base model": "".join(digest(pipe.models[part].state_dict()) for part in ("clip", "diffusion")),
        "prediction_type": pipe.config.schedule.prediction_type,
        "zero_terminal_snr": f"{pipe.config.schedule.zero_terminal_snr}",
        "alpha": f"{training.alpha:g}",
    }
    held_out: dict[str, Data] = {}
    if isinstance(data, str | Path | Pictures):
        made_of |= {"validation": f"{validation:g}"} if isinstance(validation, float | int) else {}
        made_of |= {"regularisation": "" if regularisation is None else regularisation.digest()}
        with processes().main_process_first():  # the others then find the encoded latents
            if not isinstance(data, Pictures):
                data = open_pictures(data, caption=training.caption)
            made_of |= {"VAE": digest(pipe.models["encoder"].state_dict()), "data": data.digest()}
            unchanged(folder / "checkpoint.pt", made_of, training.loop.allow_changes)
            encoder, side = cast("Encoder", pipe.models["encoder"]), size or pipe.config.size

            def latents(pictures: Pictures) -> LatentData:
                home = folder / "latents"
                return cache_latents(
                    encoder,
                    pictures,
                    side,
                    home,
                    tokenizer=tokenizer,
                    mirror=mirror,
                    patch=pipe.config.unet.patch,
                    crops=crops,
                    holes=HOLES if pipe.config.inpaints else 0,
                )

            data = latents(data)
            if isinstance(validation, Pictures):
                held_out = {"held_out": latents(validation), "seen": data}
            elif validation:
                data, others = data.split(validation, training.loop.seed)
                held_out = {"held_out": others, "seen": data}
            if regularisation is not None:
                data = Mixed(data, latents(regularisation))
    with torch.device("meta"):  # an empty shell, without memory, for the networks of `pipe`
        model = TextToImage(pipe.config)
    model.clip, model.diffusion = pipe.models["clip"], pipe.models["diffusion"]  # type: ignore[assignment]
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    facts = {
        "ss_sd_model_name": pipe.config.name,
        "ss_num_train_images": f"{len(data)}",
        "ss_learning_rate": f"{training.loop.lr}",
    }

    schedule, seed, every = pipe.config.schedule, training.loop.seed, training.loop.keep_every
    seen = Watch(forward_process(schedule), training.batch, seed, prompts, held_out)

    def keep(step: int, average: dict[str, Tensor]) -> None:
        with _weights(model, average):
            save_lora(model, path, layout, facts | {"ss_steps": f"{step}"})
            if every and step and step % every == 0:
                save_lora(
                    model, path.with_stem(f"{path.stem}-{step:06d}"), layout, facts | {"ss_steps": f"{step}"}
                )

    def look(step: int, average: dict[str, Tensor]) -> Seen:
        try:
            with _weights(model.eval(), average):
                picture = None if watch is None else watch(step, pipe)
                found = replace(seen, prompts=()) if picture is not None else seen
                shown = found.look(model, pipe)
        finally:
            model.train()
        return shown if picture is None else shown._replace(picture=picture)

    try:
        # Weights are trained in float32; the loop does its arithmetic in half precision by itself.
        targets = training.all_targets
        attach(model.float(), training.rank, training.alpha, targets, training.dropout, seed)
        empty = torch.tensor(tokenizer.encode(""))
        optimise(model.train(), data, empty, schedule, training, folder, look, made_of, keep=keep)
    finally:
        detach(model.eval())
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(dtypes[name])  # the same bits as before
    return path


@contextmanager
def _weights(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Gives the model these weights for a while, and then its own again."""
    before = {name: p.detach().clone() for name, p in model.named_parameters() if name in weights}
    model.load_state_dict(dict(weights), strict=False)
    try:
        yield
    finally:
        model.load_state_dict(before, strict=False)


class LoRALayer(nn.Module):
    """A frozen layer and the LoRA beside it; each of several stacked projections has a LoRA of its own.

    `attach` swaps layers for this kind, so that they keep their weight, and `detach` swaps them back.
    """

    weight: Tensor  # frozen
    own: Sequence[Place]  # the projections that are stacked in the weight, and that have a LoRA
    alpha: float
    dropout: nn.Dropout
    down: nn.ParameterList  # A of each, float32, whatever the model's dtype
    up: nn.ParameterList  # B of each
    kind: type[nn.Module]  # the frozen layer's

    def forward(self, x: Tensor, *given: Any) -> Tensor:
        """(B, L, in) -> (B, L, out), or (B, in, H, W) -> (B, out, h, w), as in the frozen layer."""
        axis = -1 if self.weight.ndim == 2 else 1
        pieces = list(
            super().forward(x).chunk(self.own[0].parts, dim=axis)
        )  # q, k and v, if they are stacked
        x = self.dropout(x).to(self.down[0].dtype)
        for place, down, up in zip(self.own, self.down, self.up):
            # [lora] Eq. 3, Hu et al. 2021: h = W₀x + ΔWx = W₀x + BAx; §4.1: ΔWx is scaled by α/r
            change = self.alpha / len(down) * self.low_rank(x, down, up)
            pieces[place.part] = pieces[place.part] + change.to(pieces[place.part].dtype)
        return torch.cat(pieces, dim=axis)

    def low_rank(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """Returns BAx."""
        raise NotImplementedError


class LoRALinear(LoRALayer, nn.Linear):
    """A linear layer and its LoRA."""

    def low_rank(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return F.linear(F.linear(x, down), up)  # (B, L, in) -> (B, L, r) -> (B, L, rows)


class LoRAConv2d(LoRALayer, nn.Conv2d):
    """A convolution and its LoRA: A is a convolution of the same kind, B a 1×1 convolution."""

    def low_rank(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, down, None, self.stride, self.padding), up)


def lora_beside(
    layer: nn.Linear | nn.Conv2d, own: Sequence[Place], rank: int, alpha: float, dropout: float
) -> LoRALayer:
    """Puts a LoRA that changes nothing yet beside a layer; returns the layer, now a LoRALayer."""
    weight = layer.weight
    rows, kernel = len(weight) // own[0].parts, weight.shape[2:]  # (k, k) of a convolution
    swap(
        layer,
        LoRALinear if isinstance(layer, nn.Linear) else LoRAConv2d,
        kind=type(layer),
        own=own,
        alpha=alpha,
        dropout=nn.Dropout(dropout),
        down=nn.ParameterList(weight.new_empty(rank, *weight.shape[1:], dtype=torch.float32) for _ in own),
        up=nn.ParameterList(
            weight.new_zeros(rows, rank, *(1 for _ in kernel), dtype=torch.float32) for _ in own
        ),
    )
    return cast(LoRALayer, layer)


def attach(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 8.0,
    targets: Sequence[str] = (ATTENTION,),
    dropout: float = 0.0,
    seed: int = 0,
) -> list[nn.Parameter]:
    """Freezes a model and puts a LoRA beside each layer that `targets` name; returns the LoRA's parameters.

    model: a module with a `clip` and a `diffusion`. rank: r, 1 or more. alpha: the change is scaled by α/r.
    targets: patterns of names, see above. dropout: of the input of A. The model's output does not change,
    because B = 0. Raises ValueError for a target that names no layer.
    """
    if rank < 1 or not math.isfinite(alpha) or not 0 <= dropout < 1:
        raise ValueError(f"a LoRA cannot have rank {rank}, alpha {alpha} and dropout {dropout}")
    own = chosen_layers(model, targets)
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    trained = []
    for name, own_places in own.items():
        layer = lora_beside(model.get_submodule(name), own_places, rank, alpha, dropout)  # type: ignore[arg-type]
        for down in layer.down:
            # As in the authors' own code: B = 0, and A is initialised like a linear layer.
            fresh = torch.empty(down.shape)
            nn.init.kaiming_uniform_(fresh, a=math.sqrt(5), generator=generator)
            down.data.copy_(fresh)
        trained += [*layer.down, *layer.up]
    return trained


def chosen_layers(model: nn.Module, targets: Sequence[str]) -> dict[str, list[Place]]:
    """Returns the layers that the patterns name, with their places. Raises RecipeError if there are none."""
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
            raise RecipeError(f"no layer matches {target!r}; a pattern that matches many is {ATTENTION!r}")
    if not own:
        raise RecipeError(f"targets is empty, so no layer would get a LoRA; try targets=[{ATTENTION!r}]")
    return own


def detach(model: nn.Module) -> None:
    """Removes everything that `attach` has added; the model's own weights have not changed meanwhile."""
    for layer in _layers(model):
        swap(layer, layer.kind)
        for name in ("kind", "own", "alpha", "dropout", "down", "up"):
            delattr(layer, name)
    model.requires_grad_(True)


def lora_state(model: nn.Module, layout: str = "kohya") -> dict[str, Tensor]:
    """Returns the trained matrices, in float32 on the CPU, named as in "kohya" or "peft" (diffusers)."""
    if layout not in LAYOUTS:
        raise ValueError(f"there is no layout {layout!r}; there are {', '.join(LAYOUTS)}")
    state: dict[str, Tensor] = {}
    for layer in _layers(model):
        for place, *matrices in zip(layer.own, layer.down, layer.up):
            down, up = (x.detach().float().cpu().clone() for x in matrices)
            if place.convolution:
                down, up = down[:, :, None, None], up[:, :, None, None]  # as 1×1 convolutions
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
    """Writes the LoRA that `attach` put beside a model's layers to a `.safetensors`, whole or not at all.

    layout: "kohya", which most programs read, or "peft", the layout of diffusers' own training scripts;
    `load_lora` and diffusers' `load_lora_weights` read both. metadata: more facts for the header.
    """
    state, layers = lora_state(model, layout), _layers(model)
    if not layers:
        raise ValueError("there is no LoRA beside the layers of this model; `attach` adds one")
    rank, alpha = len(layers[0].down[0]), layers[0].alpha
    header = {"format": "pt", "software": f"reifusion {__version__}"}
    if layout == "kohya":
        header |= {
            "ss_network_module": "networks.lora",
            "ss_network_dim": f"{rank}",
            "ss_network_alpha": f"{alpha}",
        }
        if any(layer.weight.shape[2:].numel() > 1 for layer in layers):
            header["ss_network_args"] = json.dumps({"conv_dim": f"{rank}", "conv_alpha": f"{alpha}"})
    else:
        config: dict[str, Any] = {}
        for place in (place for layer in layers for place in layer.own):
            network, _, name = place.diffusers.partition(".")
            config |= {f"{network}.r": rank, f"{network}.lora_alpha": alpha}
            # The text encoder's names have no `text_model.` in transformers 5; as suffixes, these match both.
            config.setdefault(f"{network}.target_modules", []).append(name.removeprefix("text_model."))
        header["lora_adapter_metadata"] = json.dumps(config)
    with whole(Path(path)) as temporary:
        write_tensors(state, temporary, header | dict(metadata or {}))


def _layers(model: nn.Module) -> list[LoRALayer]:
    return [layer for layer in model.modules() if isinstance(layer, LoRALayer)]


def _kohya(name: str) -> str:
    """unet.mid_block.attentions.0.proj_in -> lora_unet_mid_block_attentions_0_proj_in"""
    return "lora_" + re.sub("^text_encoder", "te", name).replace(".", "_")


def _config(model: nn.Module) -> ModelConfig:
    return ModelConfig(clip=model.clip.config, unet=model.diffusion.config)  # type: ignore[arg-type, union-attr]
