"""Tiny VAEs draw as in diffusers, in both spellings of their names."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from reifusion import cli
from reifusion.api import load as load_pipe
from reifusion.families.sdxl import BASE as SDXL_BASE
from reifusion.model.tensors import ModelError
from reifusion.weights import save
from tests.tiny import TINY, WORDS, random_networks
from tests.tiny_sd3 import TINY as SD3
from tests.tiny_sd3 import tokenizers as sd3_words

os.environ.setdefault("HF_HUB_OFFLINE", "1")
diffusers = pytest.importorskip("diffusers")

MODEL = replace(TINY, clip=replace(TINY.clip, vocab_size=WORDS.vocab_size, context_length=16))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "x.safetensors"
    save(MODEL, random_networks(MODEL), path, "native", WORDS)
    return path


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    return diffusers.AutoencoderTiny().eval()


@pytest.fixture(params=["a folder", "a file of diffusers", "its author's"])
def tiny(request, theirs, tmp_path) -> Path:
    if request.param == "a folder":
        theirs.save_pretrained(tmp_path / "tiny")
        return tmp_path / "tiny"
    state = theirs.state_dict()
    if request.param == "its author's":
        state = {}
        for name, x in theirs.state_dict().items():
            part, _, place, rest = name.split(".", 3)
            state[f"taesd_{part}.{int(place) + (part == 'decoder')}.{rest}"] = x
    save_file(state, tmp_path / "taesd.safetensors")
    return tmp_path / "taesd.safetensors"


@torch.inference_mode()
def test_a_tiny_vae_encodes_and_decodes_as_in_diffusers(model, tiny, theirs):
    pipe = load_pipe(model, "cpu", "fp32", vae=tiny)
    generator = torch.Generator().manual_seed(1)
    picture, latents = torch.rand(2, 3, 40, 72, generator=generator) * 2 - 1, torch.randn(2, 4, 5, 9) * 4
    encoded, decoded = theirs.encode(picture).latents, theirs.decode(latents).sample
    torch.testing.assert_close(
        pipe.encode_image(picture), encoded, rtol=0, atol=1e-4 * float(encoded.abs().max())
    )
    torch.testing.assert_close(
        pipe.decode_image(latents), decoded, rtol=0, atol=1e-4 * float(decoded.abs().max())
    )


def test_the_command_line_draws_with_a_tiny_vae(model, tiny, theirs, tmp_path):
    flags = ["--model", model, "--vae", tiny, "--seed", 1, "--steps", 2, "--device", "cpu", "--dtype", "fp32"]
    assert cli.main(["generate", "a cat", *map(str, flags), "--out", str(tmp_path / "x.png")]) == 0
    pipe = load_pipe(model, "cpu", "fp32")
    *_, last = pipe.denoise("a cat", seed=1, steps=2)
    with torch.inference_mode():
        expected = theirs.decode(last.latents).sample[0].clamp(-1, 1).permute(1, 2, 0)
    drawn = np.array(Image.open(tmp_path / "x.png")) / 127.5 - 1
    assert np.abs(drawn - expected.numpy()).max() < 1.01 / 127.5


XL = replace(
    SDXL_BASE,
    clip=replace(MODEL.clip, layers=1),
    clip_2=replace(MODEL.clip, layers=1),
    vae=MODEL.vae,
    unet=replace(
        SDXL_BASE.unet,
        channels=(16, 32),
        attention=(0, 1),
        heads=(2, 2),
        layers=1,
        context_width=32,
        groups=8,
    ),
    pooled=8,
    waves=4,
)
THREE = replace(SD3, vae=replace(SD3.vae, channels=(8, 8, 8, 8), groups=4))


@pytest.mark.parametrize(("config", "channels"), [(XL, 4), (THREE, 16)], ids=["sdxl", "sd3"])
def test_each_family_draws_with_its_tiny_vae_and_info_names_it(config, channels, tmp_path, capsys):
    save(
        config,
        random_networks(config),
        tmp_path / "x.safetensors",
        "native",
        sd3_words() if channels > 4 else WORDS,
    )
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderTiny(latent_channels=channels).eval()
    save_file(theirs.state_dict(), tmp_path / "tiny.safetensors")
    pipe = load_pipe(tmp_path / "x.safetensors", "cpu", "fp32", vae=tmp_path / "tiny.safetensors")
    *_, last = pipe.denoise("a cat", seed=1, steps=2, size=(64, 48))
    drawn = pipe.generate("a cat", seed=1, steps=2, size=(64, 48), progress=False)
    with torch.inference_mode():
        expected = theirs.decode(last.latents).sample[0].clamp(-1, 1).permute(1, 2, 0)
    assert np.abs(np.array(drawn) / 127.5 - 1 - expected.numpy()).max() < 1.01 / 127.5
    assert cli.main(["info", str(tmp_path / "tiny.safetensors")]) == 0
    said = capsys.readouterr().out
    assert f"{channels} channels" in said and f"{sum(x.numel() for x in theirs.parameters()):,}" in said
    assert ("Stable Diffusion 3" if channels == 16 else "XL") in said


@pytest.mark.parametrize("channels", [4, 16])
def test_info_names_a_whole_vae_in_a_file_of_its_own(channels, tmp_path, capsys):
    quant = channels == 4
    theirs = diffusers.AutoencoderKL(
        latent_channels=channels, norm_num_groups=4, block_out_channels=[8], use_quant_conv=quant,
        use_post_quant_conv=quant,
    )  # fmt: skip
    save_file(theirs.state_dict(), tmp_path / "x.safetensors")
    assert cli.main(["info", str(tmp_path / "x.safetensors")]) == 0
    said = capsys.readouterr().out
    assert "a VAE alone" in said and f"{sum(x.numel() for x in theirs.parameters()):,}" in said


def test_a_tiny_vae_of_another_family_is_refused(model, tmp_path):
    save_file(diffusers.AutoencoderTiny(latent_channels=16).state_dict(), tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match="a tiny VAE for latents of 16 channels at an eighth of each side"):
        load_pipe(model, "cpu", vae=tmp_path / "x.safetensors")
