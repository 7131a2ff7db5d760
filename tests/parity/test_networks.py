"""Compares the U-Net and the VAE with diffusers's, on random weights, and tests for others' mistakes."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from reifusion.model.config import SD15, ModelConfig, UNetConfig, VAEConfig
from reifusion.model.decoder import Decoder
from reifusion.model.diffusion import ResidualBlock, UNet, sinusoids
from reifusion.model.encoder import Downsample, Encoder
from reifusion.model.model_converter import convert

diffusers = pytest.importorskip("diffusers")

# Whatever a network's size, its output agrees to this share of the largest number in it.
TOLERANCE = 1e-4  # float32
TOLERANCE_BF16 = 0.05  # bfloat16 keeps 8 bits, one part in 256, and tens of layers add to it

TINY_VAE = VAEConfig(channels=(32, 64, 96), layers=1, groups=16)
TINY_UNETS = {
    "plain": UNetConfig(
        channels=(32, 64, 96), attention=(1, 1, 0), layers=1, heads=(4, 4, 4), context_width=24, groups=8
    ),
    "linear, attention in other places": UNetConfig(
        channels=(64, 64), attention=(0, 1), layers=2, context_width=40, linear_projection=True, heads=(2, 2)
    ),
    "several transformer layers, a deep middle": UNetConfig(
        channels=(32, 32, 64),
        attention=(0, 2, 3),
        middle_attention=3,
        heads=(1, 2, 4),
        layers=1,
        context_width=24,
        groups=8,
        linear_projection=True,
    ),
    "nine channels in, one level": UNetConfig(
        in_channels=9, channels=(32,), attention=(1,), layers=2, heads=(2,), context_width=16
    ),
}


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every tensor numbers that matter: none is all zeros or ones, as fresh norms and biases are."""
    generator = torch.Generator().manual_seed(seed)
    module.to_empty(device="cpu").requires_grad_(False).eval()
    for name, x in module.named_parameters():
        if x.ndim > 1:
            x.normal_(0, x[0].numel() ** -0.5, generator=generator)
        else:
            x.normal_(float("norm" in name and name.endswith("weight")), 0.2, generator=generator)
    return module


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    scale = theirs.float().abs().max().item()
    error = (ours.float() - theirs.float()).abs().max().item()
    assert 0.05 < scale < 1e4, "the output says nothing"
    assert error <= tolerance * scale, f"off by {error / scale:.2e} of the scale"


def unet_pair(config: UNetConfig) -> tuple[nn.Module, nn.Module]:
    """Returns our U-Net, and diffusers's with the same weights."""
    with torch.device("meta"):
        ours = UNet(config)
        theirs = diffusers.UNet2DConditionModel(
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            block_out_channels=config.channels,
            layers_per_block=config.layers,
            down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in config.attention],
            up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(config.attention)],
            attention_head_dim=list(config.heads),
            transformer_layers_per_block=[depth or config.middle_attention for depth in config.attention],
            cross_attention_dim=config.context_width,
            norm_num_groups=config.groups,
            use_linear_projection=config.linear_projection,
        )
    randomize(ours)
    state = convert(
        {f"diffusion.{k}": v for k, v in ours.state_dict().items()}, "diffusers", ModelConfig(unet=config)
    )
    theirs.load_state_dict({k.removeprefix("unet."): v for k, v in state.items()}, assign=True)
    return ours, theirs.requires_grad_(False).eval()


def vae_pair(config: VAEConfig) -> tuple[Encoder, Decoder, nn.Module]:
    with torch.device("meta"):
        encoder, decoder = Encoder(config), Decoder(config)
        theirs = diffusers.AutoencoderKL(
            in_channels=config.in_channels,
            out_channels=config.in_channels,
            latent_channels=config.latent_channels,
            block_out_channels=config.channels,
            layers_per_block=config.layers,
            down_block_types=["DownEncoderBlock2D"] * len(config.channels),
            up_block_types=["UpDecoderBlock2D"] * len(config.channels),
            norm_num_groups=config.groups,
        )
    randomize(encoder, 2), randomize(decoder, 3)
    state = {f"encoder.{k}": v for k, v in encoder.state_dict().items()}
    state |= {f"decoder.{k}": v for k, v in decoder.state_dict().items()}
    state = convert(state, "diffusers", ModelConfig(vae=config))
    theirs.load_state_dict({k.removeprefix("vae."): v for k, v in state.items()}, assign=True)
    return encoder, decoder, theirs.requires_grad_(False).eval()


# The U-Net


@torch.inference_mode()
@pytest.mark.parametrize("name", TINY_UNETS)
@pytest.mark.parametrize("height, width", [(8, 8), (17, 25), (13, 6), (5, 32)])
def test_unet_agrees_at_any_size_with_a_batch_of_different_timesteps(name, height, width):
    config = TINY_UNETS[name]
    ours, theirs = unet_pair(config)
    x, context, t = (
        normal(2, config.in_channels, height, width),
        normal(2, 7, config.context_width),
        torch.tensor([3, 871]),
    )
    assert_close(ours(x, context, t), theirs(x, t, context).sample, TOLERANCE)


@torch.inference_mode()
@pytest.mark.parametrize("name", TINY_UNETS)
def test_unet_agrees_in_bfloat16(name):
    config = TINY_UNETS[name]
    ours, theirs = unet_pair(config)
    x, context, t = (
        normal(2, config.in_channels, 16, 24),
        normal(2, 7, config.context_width),
        torch.tensor([0, 999]),
    )
    exact = ours(x, context, t)
    ours, theirs = ours.bfloat16(), theirs.bfloat16()
    result = ours(x.bfloat16(), context.bfloat16(), t)
    assert_close(result, theirs(x.bfloat16(), t, context.bfloat16()).sample, TOLERANCE_BF16)
    assert_close(result.float(), exact, TOLERANCE_BF16)


@pytest.mark.slow
@torch.inference_mode()
def test_unet_of_sd15_agrees():
    ours, theirs = unet_pair(SD15.unet)
    assert sum(p.numel() for p in ours.parameters()) == 859_520_964
    x, context, t = normal(2, 4, 17, 25), normal(2, 77, 768), torch.tensor([981, 1])
    assert_close(ours(x, context, t), theirs(x, t, context).sample, TOLERANCE)
    del ours, theirs
    gc.collect()


@torch.inference_mode()
def test_unet_gives_a_picture_the_same_alone_and_in_a_batch():
    config = TINY_UNETS["plain"]
    with torch.device("meta"):
        unet = UNet(config)
    randomize(unet)
    x, context, t = normal(3, 4, 8, 12), normal(3, 7, 24), torch.tensor([1, 500, 999])
    together = unet(x, context, t)
    for i in range(3):
        torch.testing.assert_close(
            unet(x[i : i + 1], context[i : i + 1], t[i : i + 1]), together[i : i + 1], rtol=1e-4, atol=1e-5
        )


# The VAE


@torch.inference_mode()
@pytest.mark.parametrize("height, width", [(32, 32), (20, 44)])
def test_vae_agrees(height, width):
    encoder, decoder, theirs = vae_pair(TINY_VAE)
    image = normal(2, 3, height, width)
    mean, log_variance = encoder.moments(image)
    reference = theirs.encode(image).latent_dist
    assert_close(mean, reference.mean, TOLERANCE)
    assert_close(log_variance, reference.logvar, TOLERANCE)

    noise = normal(*mean.shape, seed=5)
    latents = encoder(image, noise)
    assert_close(latents, (reference.mean + reference.std * noise) * 0.18215, TOLERANCE)
    assert_close(decoder(latents), theirs.decode(latents / 0.18215).sample, TOLERANCE)


@torch.inference_mode()
def test_vae_of_sd15_agrees():
    encoder, decoder, theirs = vae_pair(SD15.vae)
    image = normal(2, 3, 72, 40)
    mean, log_variance = encoder.moments(image)
    reference = theirs.encode(image).latent_dist
    assert mean.shape == (2, 4, 9, 5)
    assert_close(mean, reference.mean, TOLERANCE)
    assert_close(log_variance, reference.logvar, TOLERANCE)
    latents = normal(2, 4, 9, 5)
    assert_close(decoder(latents), theirs.decode(latents / 0.18215).sample, TOLERANCE)


@torch.inference_mode()
def test_vae_agrees_in_bfloat16():
    encoder, decoder, theirs = vae_pair(TINY_VAE)
    encoder, decoder, theirs = encoder.bfloat16(), decoder.bfloat16(), theirs.bfloat16()
    image = normal(2, 3, 32, 48).bfloat16()
    assert_close(encoder.moments(image)[0], theirs.encode(image).latent_dist.mean, TOLERANCE_BF16)
    latents = normal(2, 4, 8, 12).bfloat16()
    assert_close(decoder(latents), theirs.decode(latents / 0.18215).sample, TOLERANCE_BF16)


# Mistakes that others made


def norms(module: nn.Module) -> dict[str, float]:
    return {name: m.eps for name, m in module.named_modules() if isinstance(m, nn.GroupNorm)}


def test_group_norm_has_the_eps_it_was_trained_with():
    with torch.device("meta"):
        encoder, decoder, unet = Encoder(SD15.vae), Decoder(SD15.vae), UNet(SD15.unet)
        theirs = diffusers.UNet2DConditionModel(cross_attention_dim=768)
    assert set(norms(encoder).values()) == set(norms(decoder).values()) == {1e-6}
    for name, eps in norms(unet).items():
        in_transformer = name.endswith(".1.norm")
        assert eps == (1e-6 if in_transformer else 1e-5), name
    assert sorted(norms(unet).values()) == sorted(norms(theirs).values())


@torch.inference_mode()
def test_flat_pictures_reveal_a_wrong_eps():
    """On a grey picture the variance is near eps, so 1e-5 instead of 1e-6 gives another picture."""
    encoder, decoder, theirs = vae_pair(TINY_VAE)
    for module in encoder, decoder, theirs:
        for name, x in module.named_parameters():
            if "conv_in" in name:
                x.mul_(1e-3)
    image = torch.full((1, 3, 32, 32), 0.5) + 0.1 * normal(1, 3, 32, 32)
    assert_close(encoder.moments(image)[0], theirs.encode(image).latent_dist.mean, TOLERANCE)
    right = encoder.moments(image)[0]
    for module in encoder.modules():
        if isinstance(module, nn.GroupNorm):
            module.eps = 1e-5
    assert (encoder.moments(image)[0] - right).abs().max() > TOLERANCE * right.abs().max()


@torch.inference_mode()
def test_encoder_pads_right_and_bottom_only():
    down = Downsample(3)
    x = normal(1, 3, 8, 8)
    assert down(x).shape == (1, 3, 4, 4)
    torch.testing.assert_close(down(x)[..., :3, :3], F.conv2d(x, down.conv.weight, down.conv.bias, stride=2))
    assert (down(x) - F.conv2d(x, down.conv.weight, down.conv.bias, stride=2, padding=1)).abs().max() > 0.01


@torch.inference_mode()
def test_decoder_leaves_the_callers_latents_alone():
    with torch.device("meta"):
        decoder = Decoder(TINY_VAE)
    randomize(decoder)
    latents = normal(1, 4, 4, 4)
    before = latents.clone()
    first = decoder(latents)
    assert torch.equal(latents, before)
    assert torch.equal(decoder(latents), first)


@torch.inference_mode()
def test_log_variance_stays_where_exp_is_finite():
    with torch.device("meta"):
        encoder = Encoder(TINY_VAE)
    randomize(encoder)
    encoder.quant.weight.mul_(1e6)
    _, log_variance = encoder.moments(normal(1, 3, 16, 16))
    assert log_variance.min() >= -30 and log_variance.max() <= 20
    assert encoder(normal(1, 3, 16, 16), normal(1, 4, 4, 4)).isfinite().all()


def test_encoder_says_which_sizes_it_takes():
    with torch.device("meta"):
        encoder = Encoder(TINY_VAE)
        with pytest.raises(ValueError, match="multiples of 4, not 30×32"):
            encoder.moments(torch.empty(1, 3, 30, 32))


def test_time_is_cosines_then_sines():
    t = torch.tensor([0, 1, 500, 999])
    theirs = diffusers.models.embeddings.get_timestep_embedding(
        t, 320, flip_sin_to_cos=True, downscale_freq_shift=0
    )
    torch.testing.assert_close(sinusoids(t, 320), theirs, rtol=1e-5, atol=1e-5)
    assert sinusoids(t[:1], 320)[0].tolist() == [1.0] * 160 + [0.0] * 160


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("time_dtype", [torch.int64, torch.float32])
def test_unet_takes_times_of_any_dtype(dtype, time_dtype):
    config = replace(TINY_UNETS["plain"], attention=(0, 1, 0))
    with torch.device("meta"):
        unet = UNet(config)
    randomize(unet).to(dtype)
    out = unet(
        normal(2, 4, 8, 8).to(dtype), normal(2, 5, 24).to(dtype), torch.tensor([7, 901]).to(time_dtype)
    )
    assert out.dtype == dtype and out.isfinite().all()


def test_unet_can_be_trained_through_every_parameter():
    config = TINY_UNETS["plain"]
    with torch.device("meta"):
        unet = UNet(config)
    randomize(unet).requires_grad_(True)
    unet(normal(2, 4, 8, 8), normal(2, 5, 24), torch.tensor([7, 901])).square().mean().backward()
    assert [name for name, p in unet.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


@torch.inference_mode()
def test_guidance_halves_do_not_mix():
    """Swapping the prompts of a batch swaps its outputs, and a prompt does change the output."""
    config = TINY_UNETS["plain"]
    with torch.device("meta"):
        unet = UNet(config)
    randomize(unet)
    x, t = normal(1, 4, 8, 8).repeat(2, 1, 1, 1), torch.tensor([10, 10])
    context = normal(2, 7, 24)
    a, b = unet(x, context, t)
    c, d = unet(x, context.flip(0), t)
    torch.testing.assert_close(a, d), torch.testing.assert_close(b, c)
    assert (a - b).abs().max() > 0.01


def test_residual_blocks_narrow_by_a_convolution_only_where_needed():
    assert isinstance(ResidualBlock(32, 32, 64, 8).skip, nn.Identity)
    assert isinstance(ResidualBlock(32, 64, 64, 8).skip, nn.Conv2d)
