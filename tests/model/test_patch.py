"""A U-Net in patches: p×p latents are one place to it, and everything else is as without."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from reifusion import kernels, weights
from reifusion.explain import words
from reifusion.model.diffusion import UNet
from reifusion.model.pipeline import StableDiffusion
from reifusion.model.request import Request
from reifusion.model.tensors import ModelError
from reifusion.shortcuts.deepcache import deepcached
from tests.tiny import SMALL, WORDS, assert_same_networks, networks

PATCHED = replace(SMALL, unet=replace(SMALL.unet, patch=2))


def places(x: Tensor) -> Tensor:
    """(B, C, 2h, 2w) -> (B, 4C, h, w): the four latents of a patch, from the left and from the top"""
    batch, channels, height, width = x.shape
    out = torch.empty(batch, 4 * channels, height // 2, width // 2)
    for c in range(channels):
        for i in range(2):
            for j in range(2):
                out[:, 4 * c + 2 * i + j] = x[:, c, i::2, j::2]
    return out


def test_it_is_a_unet_of_more_channels_on_rearranged_latents():
    plain = UNet(replace(SMALL.unet, in_channels=16, out_channels=16)).eval()
    patched = UNet(PATCHED.unet).eval()
    patched.load_state_dict(plain.state_dict())
    x, context, t = torch.randn(2, 4, 12, 20), torch.randn(2, 7, 24), torch.tensor([3, 700])
    with torch.no_grad():
        torch.testing.assert_close(
            places(patched(x, context, t)), plain(places(x), context, t), rtol=0, atol=0
        )


def test_the_patch_is_kept_in_the_file_and_costs_a_quarter(tmp_path):
    before = networks(PATCHED)
    weights.save(PATCHED, before, tmp_path / "a.safetensors", tokenizer=WORDS)
    config, after, _ = weights.load(tmp_path / "a.safetensors")
    assert config == PATCHED and config.multiple == 2 * SMALL.multiple
    assert_same_networks(before, after)
    assert words.row_grids(config.unet, 8, 12)["down.0"] == (4, 6)


@pytest.mark.parametrize("to", ["compvis", "diffusers"])
def test_formats_without_patches_are_refused(tmp_path, to):
    with pytest.raises(ModelError, match=f"the format {to} knows no U-Net that sees latents in patches"):
        weights.save(PATCHED, networks(PATCHED), tmp_path / "a.safetensors", to, WORDS)
    assert not list(tmp_path.iterdir())


def test_sides_are_multiples_of_a_patch():
    assert Request("a cat", size=(36, 40)).for_model(PATCHED).size == (36, 40)
    with pytest.raises(ValueError, match="the width must be a multiple of 4, not 34"):
        Request("a cat", size=(34, 40)).for_model(PATCHED)


def test_it_draws_with_kernels_and_shortcuts_as_without():
    pipe = StableDiffusion(PATCHED, WORDS, networks(PATCHED, noise=0.05), torch.device("cpu"))
    asked = Request("a cat", size=(36, 44), steps=3, seed=1)

    def latents(pipe: StableDiffusion) -> Tensor:
        return [step.latents for step in pipe.denoise(asked)][-1]

    plain = latents(pipe)
    assert plain.shape == (1, 4, 22, 18)
    changed = (latents(deepcached(pipe, 2)) - plain).norm() / plain.norm()
    assert 0 < changed < 0.5
    kernels.install(pipe.models)
    torch.testing.assert_close(latents(pipe), plain, rtol=1e-3, atol=1e-3)
