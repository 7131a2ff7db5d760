"""Models small enough for a test: the real networks at toy sizes, with random weights."""

from __future__ import annotations

import torch
from torch import nn

from reifusion.model.clip import CLIP
from reifusion.model.config import CLIPConfig, ModelConfig, UNetConfig, VAEConfig
from reifusion.model.decoder import Decoder
from reifusion.model.diffusion import UNet
from reifusion.model.encoder import Encoder

TINY = ModelConfig(
    name="tiny",
    size=64,
    clip=CLIPConfig(vocab_size=256, context_length=8, width=16, layers=2, heads=2),
    vae=VAEConfig(channels=(8, 8, 8, 8), layers=1, groups=4),
    unet=UNetConfig(channels=(16, 32), attention=(1, 0), layers=1, heads=(2, 2), context_width=16, groups=8),
)


class Bytes:
    """A tokenizer: UTF-8, cut and padded to 8."""

    def encode(self, text: str) -> list[int]:
        return (list(text.encode()) + 8 * [0])[:8]


def networks(config: ModelConfig = TINY, noise: float = 0.0) -> dict[str, nn.Module]:
    """The four, always with the same weights. noise: is added, as fresh ones hardly tell prompts apart."""
    torch.manual_seed(0)
    models: dict[str, nn.Module] = {
        "clip": CLIP(config.clip),
        "encoder": Encoder(config.vae),
        "decoder": Decoder(config.vae),
        "diffusion": UNet(config.unet),
    }
    for network in models.values():
        network.eval()
        for parameter in network.parameters():
            parameter.data += noise * torch.randn_like(parameter)
    return models
