"""Famous bugs of Stable Diffusion XL, to switch on as those in `bugs.py`."""

from __future__ import annotations

from dataclasses import replace
from typing import cast
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..families.pooled_text import TextEncoder
from ..families.sdxl import SDXLConfig
from ..model import decoder
from ..model.ask import ask
from ..model.pipeline import StableDiffusion
from ..model.request import Request
from .bugs import Bug, Patches, mistake, with_methods
from .bugs_sd3 import both_with_the_last_layer

SDXL_BUGS: dict[str, Bug] = {}
_SAYS = "a cat on a rocket"
OLD_SCALE = 0.18215  # of Stable Diffusion 1.x


def _words(pipe: StableDiffusion) -> float:
    return pipe.encode_text([_SAYS])[0, : pipe.config.clip.context_length].float().std().item()


def _whole_text(pipe: StableDiffusion) -> float:
    """Returns the first number of the whole text's vector."""
    return pipe.encode_text([_SAYS])[0, pipe.config.clip.context_length, 0].float().item()


def _absence(pipe: StableDiffusion) -> float:
    """Returns the size of the vectors that stand for no negative prompt."""
    _, negative = pipe.encode_words(ask(_SAYS, cfg=4.0).for_model(pipe.config))
    return cast(Tensor, negative).float().norm().item()


def _noise(pipe: StableDiffusion) -> float:
    """Returns the mean of the first channel of the U-Net's output for fixed noise, words and time."""
    config = cast(SDXLConfig, pipe.config)
    size = (16 * config.vae.factor, 8 * config.vae.factor)
    noise = torch.randn(1, config.unet.in_channels, 8, 16, generator=torch.Generator().manual_seed(0))
    network = pipe.denoiser(pipe.models["diffusion"], Request(_SAYS, size=size).for_model(config))
    with torch.inference_mode():
        made = network(noise.to(pipe.device), pipe.encode_text([_SAYS]), torch.tensor([500.0]))
    return made[0, 0].float().mean().item()


def _decoder_input(pipe: StableDiffusion) -> float:
    """Returns the spread of what the decoder's first layer sees of latents whose spread is 1."""
    seen: dict[str, float] = {}
    layer = pipe.models["decoder"].get_submodule("conv_in")
    handle = layer.register_forward_pre_hook(lambda _, args: seen.update(std=args[0].float().std().item()))
    noise = torch.randn(1, pipe.config.vae.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    try:
        pipe.decode(noise)
    finally:
        handle.remove()
    return seen["std"]


@mistake(
    "The words are those of CLIP's last layer, not of the last but one",
    "The last layer is bent towards comparing texts with pictures. Pictures still fit the words, less well.",
    "standard deviation of the words' vectors",
    _words,
    "tests/parity/test_sdxl.py::test_both_encoders_and_the_whole_text_are_those_of_diffusers",
    sampler="euler",
    into=SDXL_BUGS,
)
def xl_last_layer(pipe: StableDiffusion) -> Patches:
    for name in {"clip", "clip_2"} & pipe.models.keys():
        yield from with_methods(pipe.models[name], TextEncoder, both=both_with_the_last_layer)


@mistake(
    "The projection of the whole text is not transposed",
    "Stability's file has the matrix that is multiplied from the right. It is square, so nothing complains; "
    "pictures are good, and a little beside the point.",
    "first number of the whole text's vector",
    _whole_text,
    "tests/parity/test_sdxl.py::test_diffusers_converters_understand_our_single_file",
    sampler="euler",
    into=SDXL_BUGS,
)
def projection_not_transposed(pipe: StableDiffusion) -> Patches:
    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.T)

    last = pipe.models["clip_2" if "clip_2" in pipe.models else "clip"]
    yield from with_methods(last.get_submodule("projection"), nn.Linear, forward=forward)


@mistake(
    "No negative prompt is an empty one",
    "SDXL was trained with zeros for the absence of words, and is guided away from something else then.",
    "size of the vectors for no negative prompt",
    _absence,
    "tests/parity/test_sdxl.py::test_no_negative_prompt_is_not_an_empty_one",
    sampler="euler",
    into=SDXL_BUGS,
)
def empty_for_none(pipe: StableDiffusion) -> Patches:
    yield patch.object(pipe, "config", replace(cast(SDXLConfig, pipe.config), zeros=False))


@mistake(
    "The U-Net is told sizes of 0",
    "It then draws as it learned from the smallest pictures: blurred, as if enlarged.",
    "mean of the U-Net's output in the first channel",
    _noise,
    "tests/parity/test_sdxl.py::test_the_picture_is_that_of_diffusers",
    sampler="euler",
    into=SDXL_BUGS,
)
def sizes_of_zero(pipe: StableDiffusion) -> Patches:
    from ..families import sdxl

    right = sdxl.tell

    def tell(pooled: Tensor, numbers: Tensor, waves: int) -> Tensor:
        return right(pooled, torch.zeros_like(numbers), waves)

    yield patch.object(sdxl, "tell", tell)


@mistake(
    "Latents are scaled as in Stable Diffusion 1.x",
    "0.18215 in place of 0.13025: the decoder sees too little contrast, and so do you.",
    "standard deviation of the decoder's input for latents of 1",
    _decoder_input,
    "tests/parity/test_sdxl.py::test_the_picture_is_that_of_diffusers",
    sampler="euler",
    into=SDXL_BUGS,
)
def old_scale(pipe: StableDiffusion) -> Patches:
    right = type(pipe.models["decoder"]).forward

    def forward(self: decoder.Decoder, latents: Tensor) -> Tensor:
        return right(self, latents * (self.config.scale_factor / OLD_SCALE))

    yield from with_methods(pipe.models["decoder"], decoder.Decoder, forward=forward)
