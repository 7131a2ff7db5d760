"""Relatives of Stable Diffusion 1.x: each is a config, a text stage and a network, handed to the pipeline."""

from __future__ import annotations

from torch import nn

from ..model import model_loader
from ..model.config import ModelConfig
from ..model.diffusion import UNet
from ..model.pipeline import StableDiffusion
from .lcm import LatentConsistency, LCMUNet
from .pix2pix import InstructPix2Pix


def build(config: ModelConfig) -> dict[str, nn.Module]:
    """The networks of a config of any family, on PyTorch's "meta" device: shapes without memory."""
    return model_loader.build(config, UNet if config.unet.guidance_width is None else LCMUNet)


def adapted(pipe: StableDiffusion) -> StableDiffusion:
    """The same networks, drawn with as their family wants it."""
    if pipe.config.unet.guidance_width is not None:
        family: type[StableDiffusion] = LatentConsistency
    elif pipe.config.edits:
        family = InstructPix2Pix
    else:
        return pipe
    return family(pipe.config, pipe.tokenizer, pipe.models, pipe.device, pipe.idle_device, pipe.around)
