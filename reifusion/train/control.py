"""Training a ControlNet from edges: the model is frozen, and a copy of its U-Net's way down is trained.

The edges are those of the pictures as the VAE shows them, so that they lie where the latents have them. They
travel as channels beside the latents, one channel for each place of a latent's square of pixels.
Source: Zhang, Rao & Agrawala 2023, §3.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from ..bar import Bar
from ..files import whole
from ..model.config import ModelConfig
from ..model.diffusion import UNet
from ..model.pictures import to_picture
from ..model.pipeline import StableDiffusion
from ..steer.control_files import save_control
from ..steer.controlnet import Control, ControlNet, controlled, steered
from ..steer.edges import HIGH, LOW, edges
from ..weights.writing import write_tensors
from .checkpoint import digest, unchanged
from .keys import RecipeError, key
from .latents import LatentData, StoredLatents
from .loop import LoopConfig, processes
from .progress import Seen
from .sheet import arranged
from .text2image import Data, Latents, TextToImage, TextToImageTraining, forward_process, optimise
from .watch import Watch


@dataclass(frozen=True)
class ControlTraining(TextToImageTraining):
    """The settings for training the whole model, and those of the ControlNet."""

    loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=1000, lr=3e-4, warmup=50, ema=0.99))
    batch: int = key(8, "samples per step, of all processes and parts together", least=1)
    timestep_power: float = key(
        1.0, "1: all timesteps are equally frequent; below 1: noisy ones are more frequent", above=0
    )
    # What the words do not say, the hint has to: so it is obeyed without a prompt, too.
    caption: str = key("", "of pictures without a caption of their own")
    caption_dropout: float = key(
        0.5, 'share of captions replaced by "", so that the hint is obeyed without them', least=0, most=1
    )
    train_text_encoder: bool = key(False, "false", trains=("text2image", "lora"))
    hint_channels: tuple[int, ...] = key(
        (), "of the hint's encoder, one for each halving of the picture's size; none: by the model's", least=1
    )
    edge_low: float = key(float(LOW), "an edge goes on while brightness changes by more than this", least=0)
    edge_high: float = key(float(HIGH), "an edge begins where brightness changes by more than this", least=0)


class TextToControl(nn.Module):
    """The frozen networks and the ControlNet, called as `TextToImage` is, with hints beside the latents."""

    def __init__(self, clip: nn.Module, diffusion: UNet, control: ControlNet, side: int):
        super().__init__()
        self.clip, self.diffusion, self.control = clip, diffusion, control
        self.side = side  # pixels along a side of a latent's square
        for frozen in (clip, diffusion):
            frozen.requires_grad_(False)

    def forward(self, x_t: Tensor, tokens: Tensor, t: Tensor) -> Tensor:
        """(B, 4 + 8·8, h, w), tokens (B, L), t (B,) -> the network's output, (B, 4, h, w)"""
        x, packed = x_t.tensor_split([x_t.shape[1] - self.side**2], dim=1)
        hint = F.pixel_shuffle(packed, self.side).expand(-1, 3, -1, -1)  # (B, 3, H, W) in [0, 1]
        words = self.clip(tokens)
        added = self.control(x, words, t, self.control.hint(hint))
        return steered(self.diffusion, added, {}, x, words, t).to(x_t.dtype)


def fresh(unet: nn.Module, config: ModelConfig, channels: Sequence[int] = ()) -> ControlNet:
    """A ControlNet for a model's U-Net, which does not steer yet: its way down is a copy of the model's.

    Raises RecipeError for a model without a U-Net of Stable Diffusion 1.x's kind, and for a number of
    channels that does not lead from pixels to the U-Net's places.
    """
    name = config.name
    if type(config) is not ModelConfig or not isinstance(unet, UNet):
        raise RecipeError(f"a ControlNet is trained for models of 1.x's and 2.x's kind, not {name}")
    if config.inpaints or config.edits:
        raise RecipeError(f"a ControlNet is trained for models that see latents alone, not {name}")
    levels = len(config.vae.channels) + (config.unet.patch.bit_length() - 1)
    channels = tuple(channels) or tuple(16 * 2 ** min(i, 4) for i in range(levels))
    if len(channels) != levels:
        raise RecipeError(f"hint_channels must be {levels} numbers for {name}, not {len(channels)}")
    whole_unet = copy.deepcopy(unet)
    del whole_unet.up, whole_unet.norm, whole_unet.conv_out
    return ControlNet(whole_unet, channels).requires_grad_()


def train_control(
    pipe: StableDiffusion,
    data: Data,
    held_out: Mapping[str, Data],
    training: ControlTraining,
    folder: str | Path,
    out: str | Path,
    made_of: Mapping[str, str],
    spent: float = 0.0,
) -> Path:
    """Trains a ControlNet for a model; returns its file, which is written at each checkpoint.

    The model stays unchanged; it has plain layers, in float32. data, held_out: captioned latents of this
    model, without hints. made_of: what the run is made of; see `unchanged`. Raises RecipeError for a model
    that it cannot be trained for, and what `optimise` raises.
    """
    folder, out, config = Path(folder), Path(out), pipe.config
    control = fresh(pipe.models["diffusion"], config, training.hint_channels)
    thresholds = training.edge_low, training.edge_high
    made_of = dict(made_of) | {
        "base model": "".join(digest(pipe.models[part].state_dict()) for part in ("clip", "diffusion")),
        "edges": f"{thresholds[0]:g} to {thresholds[1]:g}",
    }
    unchanged(folder / "checkpoint.pt", made_of, training.loop.allow_changes)
    with processes().main_process_first():
        hinted = {
            name: with_edges(one, pipe, folder / "edges", thresholds)
            for name, one in {"": data, **held_out}.items()
        }
    data = hinted.pop("")
    unet = cast(UNet, pipe.models["diffusion"])
    model = TextToControl(pipe.models["clip"], unet, control, config.vae.factor)
    watch = Watch(forward_process(config.schedule), training.batch, training.loop.seed, (), hinted)
    shown = hinted.get("held_out", data)

    def now(average: Mapping[str, Tensor]) -> ControlNet:
        found = copy.deepcopy(control).eval()
        found.load_state_dict({name.removeprefix("control."): x for name, x in average.items()})
        return found

    def look(step: int, average: dict[str, Tensor]) -> Seen:
        found = now(average)
        seen = watch.look(TextToControl(model.clip, model.diffusion, found, config.vae.factor), pipe)
        return seen._replace(picture=sheet(pipe, found, shown, training.loop.seed))

    def keep(step: int, average: dict[str, Tensor]) -> None:
        every = training.loop.keep_every
        save_control(now(average), config, out)
        if every and step and step % every == 0:
            save_control(now(average), config, out.with_stem(f"{out.stem}-{step:06d}"))

    empty = torch.tensor(pipe.tokenizer.encode(""))
    whole_model = cast(TextToImage, model)  # which is called as that is
    try:
        optimise(whole_model, data, empty, config.schedule, training, folder, look, made_of, spent, keep)
    finally:
        for frozen in (model.clip, model.diffusion):
            frozen.requires_grad_()
    return out


SHOWN = 6  # hints on a sheet


def sheet(pipe: StableDiffusion, net: ControlNet, data: Data, seed: int) -> Image.Image:
    """Hints of the data, and below each what the model draws by it, with its caption and without words."""
    latents, tokens = data.latent_batch(torch.Generator(data.device).manual_seed(seed), 8 * SHOWN)
    packed = latents[:, latents.shape[1] - pipe.config.vae.factor**2 :]
    firsts = [i for i, one in enumerate(packed) if not any(torch.equal(one, other) for other in packed[:i])]
    packed, tokens = packed[firsts[:SHOWN]], tokens[firsts[:SHOWN]]  # a picture may be chosen several times
    hints = F.pixel_shuffle(packed, pipe.config.vae.factor).expand(-1, 3, -1, -1)  # (6, 3, H, W)
    pictures = [to_picture(2 * hint - 1) for hint in hints]
    captions = [pipe.tokenizer.decode(one.tolist()) for one in tokens]
    rows = [pictures]
    for prompts in (captions, [""] * len(captions)):
        rows.append(
            [
                cast(
                    Image.Image,
                    controlled(pipe, Control(net, hint)).generate(
                        prompt, seed=seed + k, size=hint.size, progress=False
                    ),
                )
                for k, (prompt, hint) in enumerate(zip(prompts, pictures, strict=True))
            ]
        )
    return arranged(rows, captions, SHOWN)


# Hints beside latents


def with_edges(
    data: Data, pipe: StableDiffusion, folder: Path, thresholds: tuple[float, float]
) -> Latents | Hinted:
    """Returns captioned latents with edges beside them: (B, 4 + 8·8, h, w), the edges 0 or 1.

    folder: where the edges are kept, so that a run that is resumed finds them.
    """
    if isinstance(data, LatentData):
        return Hinted(data, pipe, folder, thresholds)
    if isinstance(data, Latents):
        found = edges_of(data.means, pipe, folder, thresholds)
        stds = data.stds
        if stds is not None:
            stds = torch.cat([stds, torch.zeros_like(found, dtype=stds.dtype)], dim=1)
        return Latents(
            torch.cat([data.means, found.to(data.means)], dim=1), data.tokens, stds, found.shape[1]
        )
    raise RecipeError("a ControlNet learns from pictures of one kind; leave regularisation away")


class Hinted(LatentData):
    """Captioned latents in buckets, with edges beside them."""

    def __init__(
        self, data: LatentData, pipe: StableDiffusion, folder: Path, thresholds: tuple[float, float]
    ):
        self.__dict__ |= data.__dict__
        self._hints: dict[tuple[Path, int], Tensor] = {}
        for entries in self._buckets:
            means = torch.stack([x.mean[x.number] for x, _ in entries]).float()
            scaled = (means - pipe.config.vae.shift) * pipe.config.vae.scale_factor
            found = edges_of(scaled, pipe, folder, thresholds)
            self._hints |= {_place(x): one for (x, _), one in zip(entries, found, strict=True)}
        self.beside = pipe.config.vae.factor**2

    def latent_batch(self, generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
        before = generator.get_state()
        chosen = self._choose(generator, count)
        generator.set_state(before)  # the same are chosen again
        beside, self.beside = self.beside, 0
        try:
            latents, tokens = super().latent_batch(generator, count)
        finally:
            self.beside = beside
        hints = torch.stack([self._hints[_place(x)] for x, _ in chosen])
        return torch.cat([latents, hints.to(latents)], dim=1), tokens


def _place(latents: StoredLatents) -> tuple[Path, int]:
    return latents.file, latents.number


def edges_of(latents: Tensor, pipe: StableDiffusion, folder: Path, thresholds: tuple[float, float]) -> Tensor:
    """Scaled latents (N, 4, h, w) -> the edges of their pictures, (N, 8·8, h, w), uint8, 0 or 1"""
    made_of = hashlib.blake2b(digest_size=8)
    made_of.update(latents.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    made_of.update(f"{digest(pipe.models['decoder'].state_dict())} {thresholds}".encode())
    path, factor = folder / f"{made_of.hexdigest()}.safetensors", pipe.config.vae.factor
    shape = len(latents), latents.shape[2] * factor, latents.shape[3] * factor
    if path.exists():
        with safe_open(path, "pt") as file:
            bits = file.get_tensor("edges").numpy()
    else:
        found = []
        for z in Bar(latents.split(1), desc="edges", unit="picture"):
            picture = to_picture(pipe.decode_image(z.float())[0])
            found.append(np.asarray(edges(picture, *thresholds).convert("L")) > 0)  # (H, W)
        bits = np.packbits(np.stack(found))
        folder.mkdir(parents=True, exist_ok=True)
        with whole(path) as temporary:
            write_tensors({"edges": torch.from_numpy(bits)}, temporary)
    pixels = torch.from_numpy(np.unpackbits(bits, count=int(np.prod(shape))).reshape(shape))
    return F.pixel_unshuffle(pixels[:, None], factor)  # (N, 1, H, W) -> (N, 64, h, w)
