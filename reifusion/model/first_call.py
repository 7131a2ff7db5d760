"""`generate` as the project's first version had it: one function, a dict of networks, and its own words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from PIL import Image
from torch import nn

from .asked import Prompt
from .config import MINI, SD15
from .model_converter import NETWORKS
from .model_loader import load
from .pictures import Picture
from .pipeline import StableDiffusion
from .tokenizer import Tokenizer

Networks: TypeAlias = Mapping[str, nn.Module] | StableDiffusion  # by name: clip, encoder, decoder, diffusion


def generate(
    prompt: Prompt,
    uncond_prompt: Prompt | None = None,
    input_image: Picture | None = None,
    strength: float = 0.8,
    do_cfg: bool = True,
    cfg_scale: float | None = None,
    sampler_name: str | None = None,
    n_inference_steps: int | None = None,
    models: Networks | None = None,
    seed: int | None = None,
    device: torch.device | str | None = None,
    idle_device: torch.device | str | None = None,
    tokenizer: Any = None,
    **settings: Any,
) -> Image.Image | list[Image.Image]:
    """Draws with a dict of networks: the project's first call, in its own words.

    do_cfg: False is cfg_scale = 1. cfg_scale, sampler_name, n_inference_steps: None for the model's own.
    models: networks by name (clip, encoder, decoder, diffusion), a `StableDiffusion`, or None for the mini.
    device: None for the device that they are on. idle_device: where networks wait while idle. tokenizer: None
    for the models' own, which for a dict is CLIP's. settings: height, width, num_images, and the other
    arguments of `StableDiffusion.generate`.
    """
    pipe = models if isinstance(models, StableDiffusion) else of_networks(models, tokenizer)
    return replace(
        pipe,
        tokenizer=tokenizer or pipe.tokenizer,
        device=pipe.device if device is None else device,
        idle_device=idle_device or pipe.idle_device,
    ).generate(
        prompt,
        uncond_prompt=uncond_prompt,
        input_image=input_image,
        strength=strength,
        do_cfg=do_cfg,
        cfg_scale=cfg_scale,
        sampler_name=sampler_name,
        n_inference_steps=n_inference_steps,
        seed=seed,
        **settings,
    )


def of_networks(models: Mapping[str, Any] | None, tokenizer: Any = None) -> StableDiffusion:
    """A model of networks that are there already, by name; None: of the mini.

    Networks know their sizes; their schedule and their size of picture are taken from the preset that has the
    same sizes. Raises ValueError for networks that need another tokenizer than CLIP's.
    """
    if models is None:
        config, networks, mini_tokenizer = load("mini")
        return StableDiffusion(config, tokenizer or mini_tokenizer, networks)
    clip, vae, unet = (models[name].config for name in ("clip", "decoder", "diffusion"))
    if more := [name for name in models if name not in NETWORKS]:
        raise ValueError(f"networks with a {more[0]} are drawn with by the model that `load` returned")
    preset = next((known for known in (SD15, MINI) if (known.clip, known.unet) == (clip, unet)), SD15)
    if tokenizer is None and clip.vocab_size != SD15.clip.vocab_size:
        raise ValueError("these networks do not speak CLIP's vocabulary, so they need their own tokenizer")
    tokenizer = tokenizer or Tokenizer(context_length=clip.context_length)
    device = next(models["diffusion"].parameters()).device
    return StableDiffusion(replace(preset, clip=clip, vae=vae, unet=unet), tokenizer, dict(models), device)
