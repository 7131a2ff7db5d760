"""Stable Diffusion XL: networks, pictures and files agree with diffusers's."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from reifusion.api import load as load_pipe
from reifusion.families.sdxl import BASE, REFINER, SDXLConfig, StableDiffusionXL, refine, tell
from reifusion.model.config import CLIPConfig, ModelConfig, UNetConfig, VAEConfig
from reifusion.model.ddpm import randn
from reifusion.model.pipeline import StableDiffusion
from reifusion.weights import load, save
from tests.tiny import WORDS, random_networks

os.environ.setdefault("HF_HUB_OFFLINE", "1")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

FIRST = CLIPConfig(vocab_size=WORDS.vocab_size, context_length=16, width=24, layers=3, heads=4)
SECOND = replace(FIRST, width=32, layers=4, activation="gelu")
TINY = SDXLConfig(
    name="tiny-xl",
    size=64,
    clip=FIRST,
    clip_2=SECOND,
    vae=VAEConfig(channels=(16, 32, 32), layers=1, groups=8, scale_factor=0.13025),
    unet=UNetConfig(
        channels=(32, 64),
        attention=(0, 2),
        middle_attention=2,
        layers=1,
        heads=(2, 4),
        context_width=56,
        groups=16,
        linear_projection=True,
    ),
    pooled=20,
    waves=8,
)
TINY_REFINER = replace(
    TINY,
    name="tiny-refiner",
    clip=SECOND,
    clip_2=None,
    unet=replace(TINY.unet, context_width=32, channels=(32, 64, 64), attention=(0, 1, 0), heads=(2, 4, 4)),
    numbers=5,
    zeros=False,
)
PROMPTS, SEED = ["a cat!", "a dog & a cat"], 3


def write(config: SDXLConfig, path: Path, to: str = "diffusers") -> Path:
    save(config, random_networks(config), path, to, WORDS)
    return path


def read(folder: Path, kind: str = "StableDiffusionXLPipeline", dtype: torch.dtype = torch.float32) -> Any:
    """Opens a folder with diffusers's pipeline; any tensor that does not fit is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pipe = getattr(diffusers, kind).from_pretrained(folder, local_files_only=True, torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write(TINY, tmp_path_factory.mktemp("model") / "tiny-xl")


@pytest.fixture(scope="module")
def refiner(tmp_path_factory) -> Path:
    return write(TINY_REFINER, tmp_path_factory.mktemp("model") / "tiny-refiner")


def close(ours: torch.Tensor, theirs: torch.Tensor, limit: float) -> bool:
    assert theirs.std() > 0.01 and ours.shape == theirs.shape
    return bool((ours - theirs).abs().max() <= limit * theirs.abs().max())


# Networks


@torch.inference_mode()
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
@pytest.mark.parametrize("clip_skip", [0, 1])
def test_both_encoders_and_the_whole_text_are_those_of_diffusers(base, dtype, limit, clip_skip):
    ours = load_pipe(base, "cpu", dtype).encode_text(PROMPTS, clip_skip)
    theirs = read(base, dtype=dtype)
    words, _, whole, _ = theirs.encode_prompt(
        PROMPTS, do_classifier_free_guidance=False, clip_skip=clip_skip or None
    )
    assert ours.shape == (2, 17, 56)
    assert close(ours[:, :16], words, limit)
    assert close(ours[:, 16, :20], whole, limit)
    assert not ours[:, 16, 20:].any()


@torch.inference_mode()
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
def test_the_refiner_reads_as_in_diffusers(refiner, dtype, limit):
    ours = load_pipe(refiner, "cpu", dtype).encode_text(PROMPTS)
    theirs = read(refiner, "StableDiffusionXLImg2ImgPipeline", dtype)
    words, _, whole, _ = theirs.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    assert ours.shape == (2, 18, 32)
    assert close(ours[:, :16], words, limit) and close(ours[:, 16, :20], whole, limit)


@torch.inference_mode()
@pytest.mark.parametrize("config", [TINY, TINY_REFINER], ids=["base", "refiner"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
def test_the_u_net_is_that_of_diffusers(config, dtype, limit, tmp_path):
    folder = write(config, tmp_path / "model")
    unet = load(folder, dtype=dtype)[1]["diffusion"]
    theirs = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=dtype)
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    x, words, whole = drawn(2, 4, 9, 14), drawn(2, 7, config.unet.context_width), drawn(2, 20)
    numbers = torch.tensor([[1024.0, 768, 0, 64, 512, 640], [96, 1000, 8, 0, 88, 2056]])[:, : config.numbers]
    t = torch.tensor([7, 801])
    told = {"text_embeds": whole, "time_ids": numbers}
    expected = theirs(x, t, words, added_cond_kwargs=told).sample
    assert close(unet(x, words, t, tell(whole, numbers, 8)), expected, limit)
    other = unet(x, words, t, tell(whole, numbers + 100, 8))
    assert not close(other, expected, 10 * limit)  # it matters


# Pictures


def draw(pipe: StableDiffusion, **settings: Any) -> np.ndarray:
    pictures = pipe.generate(PROMPTS, seed=SEED, progress=False, **settings)
    assert isinstance(pictures, list)
    return np.stack([np.array(picture) for picture in pictures]).astype(int)


def draw_theirs(pipe: Any, **settings: Any) -> np.ndarray:
    drawn = pipe(PROMPTS, output_type="np", **settings).images
    return (drawn * 255).round().astype(int)


def noise(width: int, height: int) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(SEED + k) for k in range(2)]
    return randn((2, 4, height // 4, width // 4), generators)


def assert_same(drawn: np.ndarray, expected: np.ndarray) -> None:
    assert drawn.shape == expected.shape
    assert expected.std() > 5  # the picture is not empty
    assert (np.abs(drawn - expected) <= 1).mean() >= 0.999


@pytest.mark.parametrize(("width", "height"), [(64, 64), (72, 40)])
@pytest.mark.parametrize("negative", [None, "", "a dog"])
def test_the_picture_is_that_of_diffusers(base, width, height, negative):
    ours, theirs = load_pipe(base, "cpu", "fp32"), read(base)
    assert type(theirs.scheduler) is diffusers.EulerDiscreteScheduler
    drawn = draw(ours, width=width, height=height, steps=5, negative=negative)
    told = None if negative is None else [negative] * 2
    expected = draw_theirs(
        theirs,
        negative_prompt=told,
        latents=noise(width, height),
        width=width,
        height=height,
        num_inference_steps=5,
        guidance_scale=5.0,
    )
    assert_same(drawn, expected)


def test_no_negative_prompt_is_not_an_empty_one(base):
    pipe = load_pipe(base, "cpu", "fp32")
    without, empty = draw(pipe, steps=3), draw(pipe, steps=3, negative="")
    assert np.abs(without - empty).max() > 5
