"""A tiny model with random weights: its pictures mean nothing, but its promises hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from reifusion.model.config import CLIPConfig, ModelConfig, UNetConfig, VAEConfig
from reifusion.model.pipeline import StableDiffusion
from reifusion.model.tokenizer import Tokenizer
from reifusion.weights import save
from tests.tiny import networks

TOKENIZER = Tokenizer("c a\nca t</w>\nd o\ndo g</w>\no n</w>\nr o\nc k\nro ck\ne t</w>", context_length=40)
TINY = ModelConfig(
    name="tiny",
    size=64,
    clip=CLIPConfig(vocab_size=TOKENIZER.vocab_size, context_length=40, width=16, layers=2, heads=2),
    vae=VAEConfig(channels=(8, 8, 8, 8), layers=1, groups=4),
    unet=UNetConfig(channels=(16, 32), attention=(1, 1), layers=1, heads=(2, 2), context_width=16, groups=8),
)


def tiny(config: ModelConfig = TINY) -> StableDiffusion:
    return StableDiffusion(config, TOKENIZER, networks(config, noise=0.1))


@pytest.fixture(scope="session")
def pipe() -> StableDiffusion:
    return tiny()


@pytest.fixture(scope="session")
def velocity_pipe() -> StableDiffusion:
    """A tiny model that predicts the velocity, as the mini does."""
    return tiny(replace(TINY, schedule=replace(TINY.schedule, prediction_type="v_prediction")))


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    """The file of the tiny model."""
    path: Path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    save(TINY, tiny().models, path, tokenizer=TOKENIZER)
    return str(path)
