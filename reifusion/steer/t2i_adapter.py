"""T2I-Adapter: a small network turns a hint into features, which are added on the U-Net's way down.

Unlike a ControlNet it does not see the latents, so that it works once for a picture and not in each step.
Mou et al. 2023, "T2I-Adapter", arXiv:2302.08453. Its files have the names of their authors or of diffusers;
the parts here are named as in diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

from ..families.sdxl import SDXLConfig
from ..model.config import ModelConfig
from ..model.diffusion import UNet
from ..model.family import without_memory
from ..model.pipeline import StableDiffusion
from ..model.tensors import ModelError, Stored

MIDDLE = -1  # stands for the middle, among the rows on the way down
MARK = r"(adapter\.)?body\.\d+\."  # how a file's names are recognised
NUMBERED = 2  # blocks of a level, in the authors' full adapters
SOFT = (0.25, 0.62, 0.825, 1.0)  # the levels' weights in A1111 where the prompt, or the hint, counts more


class Residual(nn.Module):
    """Two convolutions beside a way straight through."""

    def __init__(self, width: int, last: int):
        """last: the side of the second convolution."""
        super().__init__()
        self.block1 = nn.Conv2d(width, width, 3, padding=1)
        self.block2 = nn.Conv2d(width, width, last, padding=last // 2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)"""
        return x + self.block2(F.relu(self.block1(x)))


class Level(nn.Module):
    """One resolution of the U-Net: pooling, if it is half as large as the one before, and residual blocks."""

    def __init__(self, channels: int, out: int, blocks: int, pooled: bool, light: bool):
        super().__init__()
        self.pooled = pooled
        width = out // 4 if light else out
        self.in_conv = nn.Conv2d(channels, width, 1) if light or channels != out else None
        self.resnets = nn.Sequential(*(Residual(width, 3 if light else 1) for _ in range(blocks)))
        self.out_conv = nn.Conv2d(width, out, 1) if light else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C', h, w), or half as large"""
        x = F.avg_pool2d(x, 2, ceil_mode=True) if self.pooled else x
        x = x if self.in_conv is None else self.in_conv(x)
        x = self.resnets(x)
        return x if self.out_conv is None else self.out_conv(x)


class T2IAdapter(nn.Module):
    """A hint -> features for some rows of a U-Net."""

    def __init__(self, config: ModelConfig, channels: int, blocks: int, light: bool):
        """config: of the model. channels: of the hint, 1 or 3. blocks: in each level."""
        super().__init__()
        widths, self.rows, halved = places(config)
        # SDXL's begins half as large, and is halved once
        self.pixels = config.vae.factor * (2 if isinstance(config, SDXLConfig) else 1)
        self.channels = channels
        seen = channels * self.pixels**2
        self.conv_in = None if light else nn.Conv2d(seen, widths[0], 3, padding=1)
        before = [seen if light else widths[0], *widths]
        self.body = nn.ModuleList(
            Level(before[i], width, blocks, i in halved, light) for i, width in enumerate(widths)
        )

    def forward(self, hint: Tensor) -> dict[int, Tensor]:
        """hint (1, 3, H, W) in [0, 1] -> what is added to rows of the way down, by their numbers"""
        x = hint.mean(1, keepdim=True) if self.channels == 1 else hint
        x = F.pixel_unshuffle(x, self.pixels)  # (1, 3, H, W) -> (1, 192, H/8, W/8)
        x = x if self.conv_in is None else self.conv_in(x)
        features = {}
        for row, level in zip(self.rows, self.body):
            features[row] = x = level(x)
        return features


def places(config: ModelConfig) -> tuple[list[int], list[int], set[int]]:
    """Returns an adapter's widths, the rows to which its levels are added, and which of them are halved."""
    unet = config.unet
    last = len(unet.channels) - 1
    rows = []
    for level in range(len(unet.channels)):
        end = (unet.layers + 1) * (level + 1) - 1  # the last row of the level, before it is halved
        # Where there is no attention, the feature is added behind the halving: so do SDXL's
        rows.append(end + 1 if unet.attention[level] == 0 and level < last else end)
    if isinstance(config, SDXLConfig):
        return [*unet.channels, unet.channels[-1]], [*rows, MIDDLE], {2}
    return [*unet.channels], rows, set(range(1, last + 1))


def load_t2i_adapter(named: Mapping[str, Stored], path: Path, pipe: StableDiffusion) -> T2IAdapter:
    """Makes an adapter of a file's tensors, on the model's device, in its dtype.

    Raises ModelError, in one sentence, for a file that was made for another kind of model, or is incomplete.
    """
    if not isinstance(pipe.models["diffusion"], UNet):
        raise ModelError(f"{path} is for models with a U-Net, which {pipe.config.name} does not have")
    light = not any(re.fullmatch(r"(adapter\.)?conv_in\.weight", name) for name in named)
    blocks = _blocks(named)
    tensors = {_ours(name, blocks is None): tensor for name, tensor in named.items()}
    first = tensors.get("body.0.in_conv.weight" if light else "conv_in.weight")
    wrong = f"{path} is no T2I-Adapter for {pipe.config.name}"
    pixels = pipe.config.vae.factor * (2 if isinstance(pipe.config, SDXLConfig) else 1)
    channels, rest = divmod(first.shape[1], pixels**2) if first is not None else (0, 1)
    if rest or channels not in (1, 3):
        raise ModelError(f"{wrong}: its first layer does not look at squares of {pixels}×{pixels} pixels")
    made = without_memory(lambda: {"adapter": T2IAdapter(pipe.config, channels, blocks or NUMBERED, light)})[
        "adapter"
    ]
    assert isinstance(made, T2IAdapter)
    expected = made.state_dict()
    if missing := [name for name in expected if name not in tensors]:
        raise ModelError(f"{wrong}: it lacks {missing[0]}")
    if unknown := [name for name in tensors if name not in expected]:
        raise ModelError(f"{wrong}: it has {len(unknown)} tensors that are no part of it, first {unknown[0]}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            shapes = f"{tuple(tensor.shape)}, and not {tuple(expected[name].shape)}"
            raise ModelError(f"{wrong}: {name} has shape {shapes}")
    state = {name: tensor.read(pipe.device, pipe.dtype) for name, tensor in tensors.items()}
    made.load_state_dict(state, assign=True)
    return made.eval()


def _blocks(named: Mapping[str, Stored]) -> int | None:
    """Counts the residual blocks of a level; None where the names number those of all levels through."""
    inner = [re.match(r"(?:adapter\.)?body\.\d+\.(?:resnets|body)\.(\d+)\.", name) for name in named]
    return max((int(found[1]) for found in inner if found), default=-1) + 1 or None


def _ours(name: str, numbered: bool) -> str:
    """The name of a tensor as here, and in diffusers. numbered: each level has two blocks of the body."""
    name = re.sub(r"^(body\.\d+)\.body\.", r"\1.resnets.", name.removeprefix("adapter."))
    found = re.fullmatch(r"body\.(\d+)\.(block[12]|in_conv)\.(\w+)", name) if numbered else None
    if found is None:
        return name
    level, block = divmod(int(found[1]), NUMBERED)
    inside = found[2] if found[2] == "in_conv" else f"resnets.{block}.{found[2]}"
    return f"body.{level}.{inside}.{found[3]}"
