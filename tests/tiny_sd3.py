"""A Stable Diffusion 3 small enough for a test."""

from __future__ import annotations

from torch import nn

from reifusion.families.mmdit import MMDiTConfig
from reifusion.families.sd3 import SD3Config, Tokenizers
from reifusion.families.t5 import T5Config
from reifusion.families.unigram import Unigram
from reifusion.model.config import CLIPConfig, VAEConfig
from tests.tiny import random_networks

# Heads are 64 wide, as in all published models, so that shapes alone tell their number.
TINY = SD3Config(
    name="tiny-sd3",
    size=64,
    clip=CLIPConfig(context_length=16, width=64, layers=3, heads=1),
    clip_2=CLIPConfig(
        context_length=16, width=128, layers=2, heads=2, activation="gelu"
    ),
    pooled=(64, 96),
    t5=T5Config(vocab_size=113, width=200, layers=2, heads=4, head_width=20, hidden=60),
    vae=VAEConfig(
        latent_channels=16, channels=(32, 64), layers=1, scale_factor=1.5305, shift=0.0609,
        quant=False,
    ),
    unet=MMDiTConfig(
        layers=3, heads=2, width=128, context_width=200, pooled_width=160, positions=40, qk_norm=True,
        dual_attention=(0,),
    ),
    steps=4,
)  # fmt: skip
PIECES = ["<pad>", "</s>", "<unk>", "▁", "▁cat", "▁dog", "c", "a", "t", "d", "o", "g", "▁a"]


def tokenizers() -> Tokenizers:
    made = Tokenizers(context_length=16)
    made.t5 = Unigram([(piece, -1.5 * i) for i, piece in enumerate(PIECES)])
    return made


def networks(config: SD3Config = TINY) -> dict[str, nn.Module]:
    """The networks with fixed random weights; places differ as much as words do."""
    models = random_networks(config)
    models["diffusion"].get_parameter("position").data.normal_(0, 0.3)
    return models
