"""The VAE's encoder: a picture becomes latents an eighth of its size along each side.

Also the two blocks that the decoder shares with it. Source: Kingma & Welling 2014 (the variational
autoencoder), Rombach et al. 2022, §3.1 (this one), Esser et al. 2021 (its architecture).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import SelfAttention
from .config import VAEConfig

EPS = 1e-6  # of the VAE's GroupNorms; PyTorch's default of 1e-5 shifts colours a little


def scale_latents(z: Tensor, config: VAEConfig) -> Tensor:
    """The VAE's own z -> the latents that everything outside it speaks of (unit variance)."""
    # [scale-factor] App. G, Rombach et al. 2022: z ← z / σ̂, where the factor is 1 / σ̂. SD 3: (z - μ̂) / σ̂
    return (z - config.shift) * config.scale_factor


def unscale_latents(latents: Tensor, config: VAEConfig) -> Tensor:
    """The inverse of `scale_latents`; a new tensor, the caller's latents stay as they are."""
    return latents / config.scale_factor + config.shift


def sample(mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
    """Draws z from q(z|x) = N(μ, σ²), so that gradients reach μ and σ; ε is given."""
    # [reparameterisation] Eq. 10, Kingma & Welling 2014: z = μ + σ ⊙ ε,  ε ~ N(0, I)
    return mean + std * noise


class ResidualBlock(nn.Module):
    """x + f(x), f = two 3×3 convolutions, each behind GroupNorm and SiLU."""

    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        # [group-norm] Eq. 1, 2 and 6, Wu & He 2018: γ (x - E[x]) / √(Var[x] + ε) + β, in each group
        self.norm_1 = nn.GroupNorm(groups, in_channels, eps=EPS)
        self.conv_1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm_2 = nn.GroupNorm(groups, out_channels, eps=EPS)
        self.conv_2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H, W)"""
        h = self.conv_1(F.silu(self.norm_1(x)))
        h = self.conv_2(F.silu(self.norm_2(h)))
        return self.skip(x) + h


class AttentionBlock(nn.Module):
    """x + single-head self-attention over all positions; only at the lowest resolution."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=EPS)
        self.attention = SelfAttention(1, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)"""
        h = self.norm(x).flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, H·W, C)
        h = self.attention(h)
        return x + h.transpose(1, 2).view_as(x)  # (B, H·W, C) -> (B, C, H, W)


class Downsample(nn.Module):
    """Halves height and width."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H/2, W/2)"""
        # Zeros at the right and the bottom only; padding all four sides would shift the picture.
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Encoder(nn.Module):
    """Picture -> latents."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        channels, groups = config.channels, config.groups
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.down = nn.ModuleList()
        before = channels[0]
        for level, now in enumerate(channels):
            blocks: list[nn.Module] = [
                ResidualBlock(before if i == 0 else now, now, groups) for i in range(config.layers)
            ]
            if level < len(channels) - 1:
                blocks.append(Downsample(now))
            self.down.append(nn.Sequential(*blocks))
            before = now
        self.middle = nn.Sequential(
            ResidualBlock(before, before, groups),
            AttentionBlock(before, groups),
            ResidualBlock(before, before, groups),
        )
        self.norm = nn.GroupNorm(groups, before, eps=EPS)
        self.conv_out = nn.Conv2d(before, 2 * config.latent_channels, 3, padding=1)
        both = 2 * config.latent_channels
        self.quant = nn.Conv2d(both, both, 1) if config.quant else nn.Identity()

    def moments(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """q(z|x): image (B, 3, H, W) in [-1, 1] -> its mean and log-variance, each (B, 4, H/8, W/8).

        These are the VAE's own numbers, not yet scaled. H and W must be multiples of `config.factor`.
        """
        factor = self.config.factor
        if image.shape[-1] % factor or image.shape[-2] % factor:
            height, width = image.shape[-2:]
            raise ValueError(
                f"a picture's height and width must be multiples of {factor}, not {height}×{width}"
            )
        x = self.conv_in(image)  # (B, 3, H, W) -> (B, 128, H, W)
        for level in self.down:
            x = level(x)  # (B, C, h, w) -> (B, C', h/2, w/2); the last keeps the size
        x = self.middle(x)  # (B, 512, H/8, W/8)
        x = self.conv_out(F.silu(self.norm(x)))  # -> (B, 8, H/8, W/8)
        mean, log_variance = self.quant(x).chunk(2, dim=1)
        # Unclamped, exp() overflows on the first odd picture.
        return mean, log_variance.clamp(-30.0, 20.0)

    def forward(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """A sample of q(z|x): image (B, 3, H, W) in [-1, 1] -> scaled latents (B, 4, H/8, W/8).

        noise: ε, shaped like the latents; None stands for zeros and gives the mean.
        """
        mean, log_variance = self.moments(image)
        if noise is None:
            return scale_latents(mean, self.config)
        std = torch.exp(0.5 * log_variance)  # σ = exp(½ log σ²)
        return scale_latents(sample(mean, std, noise), self.config)
