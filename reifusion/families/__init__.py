"""Relatives of Stable Diffusion 1.x: each is a config, a text stage and a network, handed to the pipeline.

To add a family, write a file here that holds a `Family` (see `model/family.py`, and `STABLE_DIFFUSION` there
as an example), and name it in `FAMILIES` below. That is all: `load`, `save`, `info`, `convert`, the hub and
LoRAs are handed it. It needs
- a config: a subclass of `ModelConfig`, if its sizes do not fit in there;
- its networks: `build` returns them by name. "clip", "encoder", "decoder" and "diffusion" are always there;
- the names in its files: a `Layout`, whose table has the rows of `TABLE` and those of its own kinds of block;
- a pipeline: a subclass of `StableDiffusion` that says how words become vectors (`vectors`) and how the
  network is called (`denoiser`). What a network is told besides words rides as more rows behind the words.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import nn

from ..model import family
from ..model.config import ModelConfig
from ..model.diffusion import UNet
from ..model.family import Family
from ..model.pipeline import StableDiffusion
from . import bk_sdm
from .lcm import LatentConsistency, LCMUNet
from .mini_mm import MINI_MM_FAMILY
from .pix2pix import InstructPix2Pix
from .sd3_files import SD3
from .sdxl_files import SDXL


def _networks(config: ModelConfig) -> dict[str, nn.Module]:
    return family.build(config, UNet if config.unet.guidance_width is None else LCMUNet)


def _pipeline(config: ModelConfig) -> type[StableDiffusion]:
    if config.unet.guidance_width is not None:
        return LatentConsistency
    return InstructPix2Pix if config.edits else StableDiffusion


STABLE_DIFFUSION = replace(
    family.STABLE_DIFFUSION,
    build=_networks,
    pipeline=_pipeline,
    from_shapes=partial(family.from_shapes, presets=(*family.PRESETS, *bk_sdm.PRESETS)),
    completed=bk_sdm.completed,
)
# The first that recognises a file is the file's family; the last recognises whatever is left.
FAMILIES: tuple[Family, ...] = (SD3, MINI_MM_FAMILY, SDXL, STABLE_DIFFUSION)


def family_of(config: ModelConfig) -> Family:
    """Returns the family of a config."""
    return next(family for family in FAMILIES if type(config) is family.config)


def build(config: ModelConfig) -> dict[str, nn.Module]:
    """The networks of a config of any family, on PyTorch's "meta" device: shapes without memory."""
    return family_of(config).build(config)


def adapted(pipe: StableDiffusion) -> StableDiffusion:
    """The same networks, drawn with as their family wants it."""
    kind = family_of(pipe.config).pipeline(pipe.config)
    if type(pipe) is kind:
        return pipe
    return kind(pipe.config, pipe.tokenizer, pipe.models, pipe.device, pipe.idle_device, pipe.around)
