"""Famous bugs of Stable Diffusion 3, to switch on as those in `bugs.py`."""

from __future__ import annotations

from typing import cast
from unittest.mock import patch

import torch
from torch import Tensor, nn

from ..families import t5
from ..families.mmdit import MMDiT
from ..families.pooled_text import TextEncoder
from ..families.sd3 import SD3Config
from ..model import decoder, flow
from ..model.pipeline import StableDiffusion
from ..model.request import Request
from .bugs import Bug, Patches, mistake, with_methods

SD3_BUGS: dict[str, Bug] = {}
_SAYS = "a cat on a rocket"


def _velocity(pipe: StableDiffusion) -> Tensor:
    """The network's output for fixed noise, words and time: (1, 16, 8, 12)"""
    config = cast(SD3Config, pipe.config)
    noise = torch.randn(1, config.unet.in_channels, 8, 12, generator=torch.Generator().manual_seed(0))
    network = pipe.denoiser(pipe.models["diffusion"], Request(_SAYS))
    with torch.inference_mode():
        return network(noise.to(pipe.device), pipe.encode_text([_SAYS]), torch.tensor([500.0])).float()


def _spread(pipe: StableDiffusion) -> float:
    return _velocity(pipe).std().item()


def _corner(pipe: StableDiffusion) -> float:
    return _velocity(pipe)[0, :, :2, :2].mean().item()


def _words(pipe: StableDiffusion) -> float:
    length = pipe.config.clip.context_length
    return pipe.encode_text([_SAYS])[0, :length].float().std().item()


def _t5_word(pipe: StableDiffusion) -> float:
    """Returns the size of T5's vector of the first word."""
    return pipe.encode_text([_SAYS])[0, pipe.config.clip.context_length].float().norm().item()


def _decoder_input(pipe: StableDiffusion) -> float:
    """Returns the mean of what the decoder's first layer sees of latents whose mean is 0."""
    seen: dict[str, float] = {}
    layer = pipe.models["decoder"].get_submodule("conv_in")
    handle = layer.register_forward_pre_hook(lambda _, args: seen.update(mean=args[0].float().mean().item()))
    try:
        pipe.decode(torch.zeros(1, pipe.config.vae.latent_channels, 4, 4))
    finally:
        handle.remove()
    return seen["mean"]


def _middle_timestep(pipe: StableDiffusion) -> float:
    sampler = flow.FlowSampler(None, pipe.config.schedule)
    sampler.set_inference_timesteps(28)
    return sampler.timesteps[14].item()


@mistake(
    "Shift and scale of the last norm are taken for each other",
    "Stability's files have the shift first, diffusers's have the scale; who converts without a swap gets "
    "pictures without contrast, or noise.",
    "standard deviation of the velocity",
    _spread,
    "tests/parity/test_sd3_networks.py::test_mmdit_equals_the_reference",
    sampler="flow",
    into=SD3_BUGS,
)
def scale_shift_swapped(pipe: StableDiffusion) -> Patches:
    layer = pipe.models["diffusion"].get_submodule("modulation")
    right = type(layer).forward

    def forward(self: nn.Module, condition: Tensor) -> Tensor:
        shift, scale = right(self, condition).chunk(2, dim=-1)
        return torch.cat([scale, shift], dim=-1)

    yield from with_methods(layer, nn.Linear, forward=forward)


@mistake(
    "The words are those of CLIP's last layer, not of the last but one",
    "The last layer is bent towards comparing texts with pictures. Pictures still fit the words, less well.",
    "standard deviation of CLIP's vectors",
    _words,
    "tests/parity/test_sd3.py::test_words_and_pooled_vector_are_the_reference_s",
    sampler="flow",
    into=SD3_BUGS,
)
def last_layer(pipe: StableDiffusion) -> Patches:
    for name in ("clip", "clip_2"):
        yield from with_methods(pipe.models[name], TextEncoder, both=both_with_the_last_layer)


def both_with_the_last_layer(self: TextEncoder, tokens: Tensor, ends: Tensor, skip: int = 0) -> tuple:
    """In place of `TextEncoder.both`: the words come from the last layer."""
    words = self.embedding(tokens)
    for layer in self.layers:
        words = layer(words)
    return words, TextEncoder.both(self, tokens, ends, skip)[1]


@mistake(
    "The VAE's shift is forgotten",
    "All latents are off by a little, and colours by a shade, which passes for a matter of taste.",
    "mean of the decoder's input for latents of mean 0",
    _decoder_input,
    "tests/parity/test_sd3_vae.py::test_vae_without_quant_convolutions_equals_the_reference",
    sampler="flow",
    into=SD3_BUGS,
)
def forgotten_shift(pipe: StableDiffusion) -> Patches:
    right = type(pipe.models["decoder"]).forward

    def forward(self: decoder.Decoder, latents: Tensor) -> Tensor:
        return right(self, latents - self.config.shift * self.config.scale_factor)

    yield from with_methods(pipe.models["decoder"], decoder.Decoder, forward=forward)


@mistake(
    "T5 does not look at its padding",
    "That is how T5 is mostly used, and how SD3 was not trained. Short prompts suffer most.",
    "size of T5's vector of the first word",
    _t5_word,
    "tests/parity/test_sd3.py::test_words_and_pooled_vector_are_the_reference_s",
    sampler="flow",
    into=SD3_BUGS,
)
def masked_t5(pipe: StableDiffusion) -> Patches:
    seen: dict[str, Tensor] = {}
    pad = pipe.tokenizer.t5.pad

    def encode(self: t5.T5, tokens: Tensor) -> Tensor:
        seen["mask"] = torch.zeros(tokens.shape, device=tokens.device).masked_fill(tokens == pad, -torch.inf)
        return t5.T5.forward(self, tokens)

    def attend(self: t5.BiasedAttention, x: Tensor, bias: Tensor) -> Tensor:
        masked = bias + seen["mask"][:, None, None].to(bias.dtype)  # (heads, L, L) -> (B, heads, L, L)
        return t5.BiasedAttention.forward(self, x, masked)

    yield from with_methods(pipe.models["t5"], t5.T5, forward=encode)
    yield from with_methods(pipe.models["t5"], t5.BiasedAttention, forward=attend)


@mistake(
    "Positions are cut out of the corner of the table, not of its middle",
    "Every place takes itself for one near the upper left corner: at sizes other than the largest, pictures "
    "look cut off at the right and below.",
    "mean of the velocity in the upper left corner",
    _corner,
    "tests/parity/test_sd3_networks.py::test_mmdit_equals_the_reference",
    sampler="flow",
    into=SD3_BUGS,
)
def cornered(pipe: StableDiffusion) -> Patches:
    def places(self: MMDiT, height: int, width: int) -> Tensor:
        patch_, side = self.config.patch, self.config.positions
        table = self.position[0].unflatten(0, (side, side))
        return table[: height // patch_, : width // patch_].flatten(0, 1)

    yield from with_methods(pipe.models["diffusion"], MMDiT, places=places)


@mistake(
    "The timesteps are not shifted towards noise",
    "A large picture's outlines are decided in fewer steps: limbs too many, and halves that do not fit.",
    "the 15th of 28 timesteps",
    _middle_timestep,
    "tests/parity/test_sd3_samplers.py::test_timesteps_are_those_of_the_reference",
    sampler="flow",
    into=SD3_BUGS,
)
def unshifted(pipe: StableDiffusion) -> Patches:
    yield patch.object(flow, "shifted", lambda sigma, s: sigma)
