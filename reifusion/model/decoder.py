"""The VAE's decoder: latents become a picture eight times their size along each side."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from .config import VAEConfig
from .encoder import EPS, AttentionBlock, ResidualBlock, unscale_latents


class Upsample(nn.Module):
    """Doubles height and width: every pixel four times, then a convolution to smooth."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 2H, 2W)"""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Decoder(nn.Module):
    """Latents -> picture."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        channels, groups = config.channels, config.groups
        before = channels[-1]
        latent = config.latent_channels
        self.post_quant = nn.Conv2d(latent, latent, 1) if config.quant else nn.Identity()
        self.conv_in = nn.Conv2d(config.latent_channels, before, 3, padding=1)
        self.middle = nn.Sequential(
            ResidualBlock(before, before, groups),
            AttentionBlock(before, groups),
            ResidualBlock(before, before, groups),
        )
        self.up = nn.ModuleList()
        for level, now in enumerate(reversed(channels)):
            blocks: list[nn.Module] = [
                ResidualBlock(before if i == 0 else now, now, groups) for i in range(config.layers + 1)
            ]
            if level < len(channels) - 1:
                blocks.append(Upsample(now))
            self.up.append(nn.Sequential(*blocks))
            before = now
        self.norm = nn.GroupNorm(groups, before, eps=EPS)
        self.conv_out = nn.Conv2d(before, config.in_channels, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, 4, h, w) -> picture (B, 3, 8h, 8w), about [-1, 1] (not clamped)."""
        x = self.post_quant(unscale_latents(latents, self.config))
        x = self.conv_in(x)  # (B, 4, h, w) -> (B, 512, h, w)
        x = self.middle(x)
        for level in self.up:
            x = level(x)  # (B, C, h, w) -> (B, C', 2h, 2w); the last keeps the size
        return self.conv_out(F.silu(self.norm(x)))  # (B, 128, 8h, 8w) -> (B, 3, 8h, 8w)
