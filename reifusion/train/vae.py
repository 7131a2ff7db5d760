"""Training the VAE from nothing: pictures in, the same pictures out, through 48 times fewer numbers.

Loss = |x − x̂| + (x − x̂)² + edges + weight · KL, on random crops first (cheap), whole pictures last.
Source: Kingma & Welling 2014, Eq. 7 and Appendix B; Rombach et al. 2022, §3.1.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..model.config import VAEConfig
from ..model.decoder import Decoder
from ..model.encoder import Encoder, scale_latents
from .loop import LoopConfig, train


@dataclass(frozen=True)
class VAETraining:
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=10_000, lr=1e-3))
    batch: int = 16  # crops per step; whole pictures come four times fewer at a time
    crop: int = 64
    whole_from: float = 0.8  # share of the steps after which whole pictures are shown
    # Per latent number. A weight w lets the latents' own noise cost about w / 2 of reconstruction
    # error, which nobody sees, and makes the latents as smooth as that allows.
    kl_weight: float = 1e-3
    edges: float = 1.0  # weight of the difference of neighbouring pixels, once training is under way
    edges_from: float = 0.2  # a pure edge loss from the start collapses the picture to flat colour


class VAE(nn.Module):
    """Both halves, as one thing to train."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.encoder, self.decoder = Encoder(config), Decoder(config)


def kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """The average over all latent numbers of KL(N(μ, σ²) ‖ N(0, 1))."""
    # Appendix B, Kingma & Welling 2014: −D_KL = ½ (1 + log σ² − μ² − σ²)
    return -0.5 * (1 + log_variance - mean.pow(2) - log_variance.exp()).mean()


def gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbouring pixels: (B, C, H, W) -> (B, C, H, W−1), (B, C, H−1, W)"""
    return x[..., :, 1:] - x[..., :, :-1], x[..., 1:, :] - x[..., :-1, :]


def random_pictures(sprites: Tensor, count: int, size: int, generator: torch.Generator) -> Tensor:
    """Sprites (N, 4, S, S) uint8 -> pictures (count, 3, size, size) in [-1, 1], on random backgrounds.

    Half are crops at full resolution, half are whole sprites made smaller; when size is S, all are whole.
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    chosen = sprites[torch.randint(len(sprites), (count,), generator=generator)].float() / 255  # (B, 4, S, S)
    side = sprites.shape[-1]
    # One affine map a picture: zoom, position, mirror.
    zoom = torch.where(uniform(count) < 0.5, torch.full((count,), size / side), 0.8 + 0.5 * uniform(count))
    zoom = torch.where(uniform(count) < 0.2, 2 * zoom, zoom) if size == side else zoom
    room = (1 - zoom).clamp(min=0.15)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = torch.where(uniform(count) < 0.5, zoom, -zoom)
    theta[:, 1, 1] = zoom
    theta[:, :, 2] = (2 * uniform(count, 2) - 1) * room[:, None]
    grid = F.affine_grid(theta, [count, 4, size, size], align_corners=False)
    chosen[:, :3] *= chosen[:, 3:]  # premultiplied, so that no dark rim appears at soft edges
    chosen = F.grid_sample(chosen, grid, mode="bilinear", align_corners=False)  # (B, 4, size, size)
    colour, alpha = chosen[:, :3], chosen[:, 3:]
    # A third have their colours shuffled: recoloured subjects must survive the round trip too.
    order = torch.stack([torch.randperm(3, generator=generator) for _ in range(count)])
    order = torch.where(uniform(count, 1) < 0.33, order, torch.arange(3))
    colour = torch.gather(colour, 1, order[:, :, None, None].expand_as(colour))
    background = torch.where(
        uniform(count, 1, 1, 1) < 0.5, torch.ones(count, 3, 1, 1), uniform(count, 3, 1, 1)
    )
    return (colour + (1 - alpha) * background) * 2 - 1


def loss(
    vae: VAE, x: Tensor, generator: torch.Generator, training: VAETraining, edges: bool
) -> tuple[Tensor, dict]:
    """Pictures x (B, 3, H, W) -> the loss, and its parts for the log."""
    config = vae.encoder.config
    with torch.autocast("cpu", torch.bfloat16):
        mean, log_variance = vae.encoder.moments(x)
        mean, log_variance = mean.float(), log_variance.float()
        # Eq. 10, Kingma & Welling 2014: z = μ + σ ⊙ ε
        z = mean + (0.5 * log_variance).exp() * torch.randn(mean.shape, generator=generator)
        y = vae.decoder(scale_latents(z, config)).float()
    l1, mse, divergence = F.l1_loss(y, x), F.mse_loss(y, x), kl(mean, log_variance)
    total = l1 + mse + training.kl_weight * divergence
    if edges:
        total = total + training.edges * sum(
            F.l1_loss(a, b) for a, b in zip(gradients(y), gradients(x), strict=True)
        )
    psnr = -10 * torch.log10(mse.detach() / 4)  # the range is 2, so the peak's square is 4
    return total, {"l1": l1.item(), "psnr": psnr.item(), "kl": divergence.item(), "std": mean.std().item()}


def train_vae(sprites: Tensor, config: VAEConfig, training: VAETraining, folder: Path) -> VAE:
    """sprites (N, 4, S, S) uint8 RGBA -> a trained VAE (its averaged weights), latents of unit variance."""
    torch.manual_seed(training.loop.seed)
    vae = VAE(config).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with torch.no_grad():  # little noise at first: a log-variance of −6
        vae.encoder.quant.bias.copy_(torch.tensor([0.0, -6.0]).repeat_interleave(config.latent_channels))

    def step_loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict]:
        done = step / training.loop.steps
        whole = done >= training.whole_from
        count, size = (training.batch // 2, sprites.shape[-1]) if whole else (training.batch, training.crop)
        x = random_pictures(sprites, count, size, generator).contiguous(memory_format=torch.channels_last)
        return loss(vae, x, generator, training, edges=done >= training.edges_from)

    average = train(vae, step_loss, training.loop, folder)
    vae.load_state_dict(average)
    normalise_latents(vae, sprites)
    return vae


@torch.no_grad()
def normalise_latents(vae: VAE, sprites: Tensor) -> None:
    """Gives every latent channel mean 0 and variance 1, by folding that into two 1×1 convolutions."""
    generator = torch.Generator().manual_seed(0)
    means = []
    for _ in range(16):
        x = random_pictures(sprites, 32, sprites.shape[-1], generator)
        means.append(vae.encoder.moments(x)[0])
    z = torch.cat(means).transpose(0, 1).flatten(1)  # (4, B·h·w)
    centre, spread = z.mean(1), z.std(1)
    quant, post, n = vae.encoder.quant, vae.decoder.post_quant, len(centre)
    assert quant.bias is not None and post.bias is not None
    # Encoder: μ' = (μ − centre) / spread and σ' = σ / spread. Decoder: the inverse, before its first layer.
    quant.weight[:n] /= spread[:, None, None, None]
    quant.bias[:n] = (quant.bias[:n] - centre) / spread
    quant.bias[n:] -= 2 * spread.log()
    post.bias += post.weight[:, :, 0, 0] @ centre
    post.weight *= spread[None, :, None, None]
