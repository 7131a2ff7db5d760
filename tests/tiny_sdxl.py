"""An SDXL small enough for a test, and beside it a Stable Diffusion 1 with the same words and VAE."""

from __future__ import annotations

from dataclasses import replace

from reifusion.families.sdxl import SDXLConfig
from reifusion.families.sdxl_unet import SDXLUNetConfig
from reifusion.model.config import CLIPConfig, ModelConfig, UNetConfig, VAEConfig
from tests.tiny import WORDS

FIRST = CLIPConfig(vocab_size=WORDS.vocab_size, context_length=16, width=24, layers=3, heads=4)
SECOND = replace(FIRST, width=32, layers=4, activation="gelu")
TINY = SDXLConfig(
    name="tiny-xl",
    size=64,
    clip=FIRST,
    clip_2=SECOND,
    vae=VAEConfig(channels=(16, 32, 32), layers=1, groups=8, scale_factor=0.13025),
    unet=SDXLUNetConfig(
        channels=(32, 64), attention=(0, 2), middle_attention=2, layers=1, heads=(2, 4), context_width=56,
        groups=16,
    ),
    pooled=20,
    waves=8,
)  # fmt: skip
TINY_REFINER = replace(
    TINY,
    name="tiny-refiner",
    clip=SECOND,
    clip_2=None,
    unet=replace(TINY.unet, context_width=32, channels=(32, 64, 64), attention=(0, 1, 0), heads=(2, 4, 4)),
    numbers=5,
    zeros=False,
)
TINY_SD = ModelConfig(
    name="tiny",
    size=64,
    clip=FIRST,
    vae=replace(TINY.vae, scale_factor=0.18215),
    unet=UNetConfig(channels=(32, 64), attention=(1, 1), layers=1, heads=(4, 4), context_width=24, groups=16),
)
