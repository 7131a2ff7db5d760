"""Compares the whole pipeline with diffusers': the same weights, prompt and noise give the same picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reifusion.api import load
from reifusion.model.config import CLIPConfig, ModelConfig, UNetConfig, VAEConfig
from reifusion.model.ddpm import randn
from reifusion.model.pipeline import StableDiffusion
from reifusion.model.tokenizer import Tokenizer
from reifusion.weights import save
from tests.tiny import networks

diffusers = pytest.importorskip("diffusers")

TINY = ModelConfig(
    name="tiny",
    size=64,
    clip=CLIPConfig(width=32, layers=2, heads=2),
    vae=VAEConfig(channels=(16, 16, 32, 32), layers=1, groups=8),
    unet=UNetConfig(
        channels=(32, 64, 64), attention=(1, 1, 0), layers=2, heads=(4, 4, 4), context_width=32, groups=16
    ),
)
# Our name -> the class in diffusers, and its settings beyond the scheduler configuration that we wrote
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"timestep_spacing": "linspace"}),
    "dpmpp_2m_karras": (
        "DPMSolverMultistepScheduler",
        {"timestep_spacing": "linspace", "use_karras_sigmas": True},
    ),
    "euler": ("EulerDiscreteScheduler", {"timestep_spacing": "leading"}),
    "pndm": ("PNDMScheduler", {}),
}
PROMPTS = ["a photo of a cat", "The Große dog, it's 25 years old"]
NEGATIVES = ["blurry", ""]
SEED, STEPS, SCALE = 11, 10, 7.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Writes a folder in diffusers' format, with random weights."""
    path = tmp_path_factory.mktemp("diffusers") / "tiny"
    save(TINY, networks(TINY, noise=0.05), path, "diffusers", Tokenizer())
    return path


@pytest.fixture(scope="module")
def ours(folder) -> StableDiffusion:
    return load(folder, "cpu", "fp32")


@pytest.fixture(scope="module")
def theirs(folder):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.written = pipe.scheduler.config
    return pipe


def reference(theirs, sampler: str, width: int, height: int, **settings) -> np.ndarray:
    name, config = SCHEDULERS[sampler]
    theirs.scheduler = getattr(diffusers, name).from_config(theirs.written, **config)
    generators = [torch.Generator().manual_seed(SEED + k) for k in range(len(PROMPTS))]
    noise = randn((len(PROMPTS), 4, height // 8, width // 8), generators)
    drawn = theirs(
        PROMPTS,
        negative_prompt=NEGATIVES,
        latents=noise,
        width=width,
        height=height,
        num_inference_steps=STEPS,
        output_type="np",
        **{"guidance_scale": SCALE, **settings},
    ).images
    return (drawn * 255).round().astype(int)


def assert_same(pictures: list, expected: np.ndarray) -> None:
    drawn = np.stack([np.array(picture) for picture in pictures]).astype(int)
    assert drawn.shape == expected.shape
    assert expected.std() > 5  # the picture is not empty
    assert (np.abs(drawn - expected) <= 1).mean() >= 0.999


@pytest.mark.parametrize(("width", "height"), [(64, 64), (72, 40)])
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_the_picture_is_that_of_diffusers(ours, theirs, sampler, width, height):
    pictures = ours.generate(
        PROMPTS,
        negative=NEGATIVES,
        cfg=SCALE,
        sampler=sampler,
        steps=STEPS,
        seed=SEED,
        width=width,
        height=height,
        progress=False,
    )
    assert_same(pictures, reference(theirs, sampler, width, height))


def test_without_guidance_too(ours, theirs):
    pictures = ours.generate(PROMPTS, do_cfg=False, sampler="ddim", steps=STEPS, seed=SEED, progress=False)
    assert_same(pictures, reference(theirs, "ddim", 64, 64, guidance_scale=1.0))


def test_clip_skip_1_is_that_of_diffusers(ours, theirs, monkeypatch):
    # diffusers 0.42 looks for the final norm where transformers 5 no longer has it, and skips for the prompt
    # but not for the negative prompt; so without one.
    monkeypatch.setitem(theirs.text_encoder.__dict__, "text_model", theirs.text_encoder)
    pictures = ours.generate(
        PROMPTS,
        do_cfg=False,
        sampler="ddim",
        steps=STEPS,
        seed=SEED,
        clip_skip=1,
        progress=False,
    )
    assert_same(pictures, reference(theirs, "ddim", 64, 64, guidance_scale=1.0, clip_skip=1))
