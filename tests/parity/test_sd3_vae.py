"""Compares the VAE of Stable Diffusion 3, with 16 channels and a shift, with diffusers's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from reifusion.model.config import SD15, ModelConfig, VAEConfig
from reifusion.model.decoder import Decoder
from reifusion.model.encoder import Encoder, scale_latents, unscale_latents
from reifusion.model.model_converter import convert
from tests.parity.test_sd3_networks import assert_close, normal, randomize

diffusers = pytest.importorskip("diffusers")

VAE = VAEConfig(
    latent_channels=16, channels=(16, 32), layers=1, groups=8, scale_factor=1.5305, shift=0.0609, quant=False
)


@pytest.mark.parametrize("dtype, within", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_vae_without_quant_convolutions_equals_the_reference(dtype, within):
    encoder, decoder = randomize(Encoder(VAE)), randomize(Decoder(VAE))
    theirs = diffusers.AutoencoderKL(
        latent_channels=16,
        block_out_channels=VAE.channels,
        layers_per_block=VAE.layers,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        norm_num_groups=VAE.groups,
        scaling_factor=VAE.scale_factor,
        shift_factor=VAE.shift,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    state = {f"encoder.{name}": x for name, x in encoder.state_dict().items()}
    state |= {f"decoder.{name}": x for name, x in decoder.state_dict().items()}
    assert not any("quant" in name for name in state)
    whole = convert(state | {"clip.embedding.position": torch.zeros(1)}, "diffusers", ModelConfig(vae=VAE))
    theirs.load_state_dict({x.removeprefix("vae."): y for x, y in whole.items() if x.startswith("vae.")})
    encoder, decoder, theirs = (network.to(dtype) for network in (encoder, decoder, theirs.eval()))
    for batch, height, width in (2, 12, 8), (1, 6, 22):
        picture = normal(batch, 3, height, width, dtype=dtype)
        mean = theirs.encode(picture).latent_dist.mean
        # as diffusers's pipelines for SD 3 scale
        expected = (mean - 0.0609) * 1.5305
        assert_close(encoder(picture), expected.detach(), within)
        latents = normal(batch, 16, height // 2, width // 2, dtype=dtype)
        z = latents / 1.5305 + 0.0609
        assert_close(decoder(latents), theirs.decode(z).sample.detach(), within)


def test_scaling_is_undone_and_centres_latents():
    z = normal(2, 16, 3, 5) + VAE.shift
    assert scale_latents(z, VAE).mean().abs() < (scale_latents(z, replace(VAE, shift=0.0))).mean().abs()
    torch.testing.assert_close(unscale_latents(scale_latents(z, VAE), VAE), z)


def test_without_a_shift_nothing_is_changed_to_the_bit():
    z = normal(2, 4, 3, 5, dtype=torch.float32)
    assert torch.equal(scale_latents(z, SD15.vae), z * 0.18215)
    assert torch.equal(unscale_latents(z, SD15.vae), z / 0.18215)
