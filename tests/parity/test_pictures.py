"""Compares editing and inpainting with diffusers': the same weights, words, pictures and noise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from reifusion.api import load
from reifusion.families.pix2pix import InstructPix2Pix
from reifusion.weights import save
from tests.marks import often
from tests.tiny import SMALL, WORDS, networks

diffusers = pytest.importorskip("diffusers")

SEED, STEPS, NEGATIVE = 5, 6, "dog"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[int, Path]:
    """Writes folders with random weights, by the number of the U-Net's input channels."""
    written = {}
    for channels in (4, 8, 9):
        config = replace(SMALL, unet=replace(SMALL.unet, in_channels=channels))
        written[channels] = tmp_path_factory.mktemp("models") / f"channels-{channels}"
        save(config, networks(config, noise=0.05), written[channels], "diffusers", WORDS)
    return written


def reference(kind: str, folder: Path, prompt: str, scheduler: str = "DDIMScheduler", **settings: Any) -> Any:
    pipe = getattr(diffusers, kind).from_pretrained(folder, torch_dtype=torch.float32, safety_checker=None)
    pipe.scheduler = getattr(diffusers, scheduler).from_config(
        pipe.scheduler.config, timestep_spacing="leading"
    )
    pipe.set_progress_bar_config(disable=True)
    # Theirs draws from the VAE's distribution when it inpaints; ours takes the mean.
    pipe._encode_vae_image = lambda image, generator: (
        pipe.vae.encode(image).latent_dist.mode() * pipe.vae.config.scaling_factor
    )
    return pipe(
        prompt, negative_prompt=NEGATIVE, num_inference_steps=STEPS, output_type="latent",
        generator=[torch.Generator().manual_seed(SEED)], **settings,
    ).images  # fmt: skip


def ours(source: Path, prompt: str, **settings: Any) -> torch.Tensor:
    steps = load(source, "cpu", "fp32").denoise(
        prompt, negative=NEGATIVE, steps=STEPS, seed=SEED, size=(32, 48), **settings
    )
    return list(steps)[-1].latents


def assert_close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.shape == b.shape and b.std() > 0.1
    assert (a - b).abs().max() < 1e-4 * b.abs().max()


def photo(width: int = 32, height: int = 48) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def mask() -> Image.Image:
    """White from the middle to the right, along the borders of the latents."""
    found = Image.new("L", (32, 48))
    found.paste(255, (16, 0, 32, 48))
    return found


@pytest.mark.parametrize(("cfg", "image_guidance"), [(7.5, 1.5), (3.0, 1.0), (1.5, 4.0)])
@pytest.mark.parametrize(
    ("sampler", "theirs"), [("ddim", "DDIMScheduler"), ("euler", "EulerDiscreteScheduler")]
)
def test_a_picture_is_edited_as_diffusers_edits_it(models, cfg, image_guidance, sampler, theirs):
    latents = ours(
        models[8], "cat", init_image=photo(), cfg=cfg, image_guidance=image_guidance, sampler=sampler
    )
    expected = reference(
        "StableDiffusionInstructPix2PixPipeline", models[8], "cat", theirs, image=photo(),
        guidance_scale=cfg, image_guidance_scale=image_guidance,
    )  # fmt: skip
    assert_close(latents, expected)


def test_a_single_file_is_edited_with_as_the_folder_is(models, tmp_path):
    pipe = load(models[8], "cpu", "fp32")
    assert isinstance(pipe, InstructPix2Pix)
    folder = ours(models[8], "cat", init_image=photo())
    for to in ("native", "compvis"):
        save(pipe.config, pipe.models, tmp_path / f"{to}.safetensors", to, WORDS)
        assert torch.equal(ours(tmp_path / f"{to}.safetensors", "cat", init_image=photo()), folder)


@pytest.mark.parametrize("strength", often([0.34, 0.7, 1.0], [0.7, 1.0]))
@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize(
    ("sampler", "theirs"), [("ddim", "DDIMScheduler"), ("euler", "EulerDiscreteScheduler")]
)
def test_inpainting_is_that_of_diffusers(models, channels, strength, sampler, theirs):
    latents = ours(
        models[channels], "cat", init_image=photo(), mask=mask(), strength=strength, cfg=4.0, sampler=sampler
    )
    expected = reference(
        "StableDiffusionInpaintPipeline", models[channels], "cat", theirs, image=photo(), mask_image=mask(),
        strength=strength, guidance_scale=4.0, width=32, height=48,
    )  # fmt: skip
    assert_close(latents, expected)
