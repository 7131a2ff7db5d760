"""Models small enough for a test: the real networks at toy sizes, with random weights."""

from __future__ import annotations

import torch
from torch import nn

from reifusion import families
from reifusion.model.clip import CLIP
from reifusion.model.config import CLIPConfig, ModelConfig, UNetConfig, VAEConfig
from reifusion.model.decoder import Decoder
from reifusion.model.diffusion import UNet
from reifusion.model.encoder import Encoder
from reifusion.model.tokenizer import Tokenizer

TINY = ModelConfig(
    name="tiny",
    size=64,
    clip=CLIPConfig(vocab_size=256, context_length=8, width=16, layers=2, heads=2),
    vae=VAEConfig(channels=(8, 8, 8, 8), layers=1, groups=4),
    unet=UNetConfig(channels=(16, 32), attention=(1, 0), layers=1, heads=(2, 2), context_width=16, groups=8),
)

# For comparisons with diffusers: a tokenizer that knows "cat" and "dog", and a model that goes with it.
WORDS = Tokenizer("c a\nca t</w>\nd o\ndo g</w>\n", context_length=16)
SMALL = ModelConfig(
    name="small",
    size=32,
    clip=CLIPConfig(vocab_size=WORDS.vocab_size, context_length=16, width=24, layers=2, heads=4),
    vae=VAEConfig(channels=(16, 32), layers=1, groups=8),
    unet=UNetConfig(channels=(32, 64), attention=(1, 0), layers=1, heads=(4, 4), context_width=24, groups=16),
)


class Bytes:
    """A tokenizer: UTF-8, cut and padded to 8."""

    def encode(self, text: str) -> list[int]:
        return (list(text.encode()) + 8 * [0])[:8]


def networks(config: ModelConfig = TINY, noise: float = 0.0) -> dict[str, nn.Module]:
    """The four networks with fixed weights. noise is added, as fresh ones hardly tell prompts apart."""
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


def random_networks(config: ModelConfig, dtype: torch.dtype = torch.float32) -> dict[str, nn.Module]:
    """The networks of any family, every weight random, of a spread that keeps activations in bounds."""
    torch.manual_seed(0)
    models = families.build(config)
    for network in models.values():
        network.to(dtype).to_empty(device="cpu").eval()
        for name, x in network.named_parameters():
            norm = "norm" in name and name.endswith("weight")
            nn.init.normal_(x, float(norm and x.ndim == 1), (x[0].numel() if x.ndim > 1 else 25) ** -0.5)
    return models


def native_state(models: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    return {f"{net}.{name}": x for net, module in models.items() for name, x in module.state_dict().items()}


def assert_same_networks(a: dict[str, nn.Module], b: dict[str, nn.Module]) -> None:
    a_state, b_state = native_state(a), native_state(b)
    assert a_state.keys() == b_state.keys()
    for name in a_state:
        assert a_state[name].dtype == b_state[name].dtype and torch.equal(a_state[name], b_state[name]), name
