"""Training the VAE from nothing: pictures in, the same pictures out, through 48 times fewer numbers.

Loss = |x − x̂| + (x − x̂)² + edges + weight · KL, on random crops first (cheap), whole pictures last.
Source: Kingma & Welling 2014, Eq. 7 and Appendix B; Rombach et al. 2022, §3.1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from ..model.config import VAEConfig
from ..model.decoder import Decoder
from ..model.encoder import Encoder, scale_latents
from .loop import LoopConfig, Loss, Part, rng, train

# draw(generator, count, size) -> pictures (count, 3, size, size) in [-1, 1], decided by the generator alone
Draw: TypeAlias = Callable[[torch.Generator, int, int], Tensor]


@dataclass(frozen=True)
class VAETraining:
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=10_000, lr=1e-3))
    batch: int = 16  # crops per step; of whole pictures, half as many
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

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures x (B, 3, H, W) and ε (B, 4, H/8, W/8) -> x̂, like x, and q(z|x)'s mean and log-variance."""
        mean, log_variance = (moment.to(x.dtype) for moment in self.encoder.moments(x))
        # Eq. 10, Kingma & Welling 2014: z = μ + σ ⊙ ε
        z = mean + (0.5 * log_variance).exp() * noise
        return self.decoder(scale_latents(z, self.encoder.config)).to(x.dtype), mean, log_variance


def kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """The average over all latent numbers of KL(N(μ, σ²) ‖ N(0, 1))."""
    # [kl] Appendix B, Kingma & Welling 2014: −D_KL = ½ (1 + log σ² − μ² − σ²)
    return -0.5 * (1 + log_variance - mean.pow(2) - log_variance.exp()).mean()


def gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbouring pixels: (B, C, H, W) -> (B, C, H, W−1), (B, C, H−1, W)"""
    return x[..., :, 1:] - x[..., :, :-1], x[..., 1:, :] - x[..., :-1, :]


def random_pictures(sprites: Tensor, generator: torch.Generator, count: int, size: int) -> Tensor:
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


def terms(x: Tensor, y: Tensor, mean: Tensor, log_variance: Tensor) -> dict[str, Tensor]:
    """Each term of the loss, for pictures x, their reconstructions y and the moments of their latents."""
    return {
        "l1": F.l1_loss(y, x),
        "mse": F.mse_loss(y, x),
        "edges": sum(
            (F.l1_loss(a, b) for a, b in zip(gradients(y), gradients(x), strict=True)), x.new_zeros(())
        ),
        "kl": kl(mean, log_variance),
    }


def loss(
    vae: Callable[..., Any], x: Tensor, noise: Tensor, training: VAETraining, edges: bool
) -> tuple[Tensor, dict[str, float]]:
    """Pictures x (B, 3, H, W) and the latents' noise (B, 4, H/8, W/8) -> the loss, and its figures."""
    y, mean, log_variance = vae(x, noise)
    part = terms(x, y, mean, log_variance)
    total = part["l1"] + part["mse"] + training.kl_weight * part["kl"]
    if edges:
        total = total + training.edges * part["edges"]
    psnr = -10 * torch.log10(part["mse"] / 4)  # the range is 2, so the peak's square is 4
    figures = {**part, "psnr": psnr, "std": mean.std()}
    return total, {"samples": float(len(x)), **{name: value.item() for name, value in figures.items()}}


def training_loss(draw: Draw, size: int, config: VAEConfig, training: VAETraining) -> Loss:
    """The loss of a step, for `train`. size: the side of a whole picture."""

    def step_loss(
        vae: Callable[..., Any], step: int, generator: torch.Generator, part: Part
    ) -> tuple[Tensor, dict[str, float]]:
        done = step / training.loop.steps
        whole = done >= training.whole_from
        count, side = (training.batch // 2, size) if whole else (training.batch, training.crop)
        x = draw(generator, count, side)
        noise = torch.randn(
            count, config.latent_channels, side // config.factor, side // config.factor, generator=generator
        )
        x = part.of(x).contiguous(memory_format=torch.channels_last)
        return loss(vae, x, part.of(noise), training, edges=done >= training.edges_from)

    return step_loss


def train_vae(
    draw: Draw,
    size: int,
    config: VAEConfig,
    training: VAETraining,
    folder: Path,
    start_from: dict[str, Tensor] | None = None,
) -> VAE:
    """A VAE trained on what `draw` draws (its averaged weights), with scaled latents of unit variance.

    size: the side of a whole picture, in pixels. start_from: weights to begin with, instead of random ones.
    Raises what `train` raises.
    """
    torch.manual_seed(training.loop.seed)
    vae = VAE(config).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if start_from is None:
        with torch.no_grad():  # little noise at first: a log-variance of −6
            vae.encoder.quant.bias.copy_(torch.tensor([0.0, -6.0]).repeat_interleave(config.latent_channels))
    else:
        vae.load_state_dict(start_from)
    shown, pictures = VAE(config), draw(rng(training.loop.seed, 0), 8, size)

    def compare(step: int, average: dict[str, Tensor]) -> Image.Image:
        shown.load_state_dict(average)
        return side_by_side(pictures, shown)

    loss = training_loss(draw, size, config, training)
    vae.load_state_dict(train(vae, loss, training.loop, folder, compare))
    normalise_latents(vae, draw, size)
    return vae


@torch.no_grad()
def side_by_side(x: Tensor, vae: VAE) -> Image.Image:
    """Pictures (B, 3, H, W), each with its reconstruction below."""
    y = vae.decoder(vae.encoder(x))
    rows = torch.cat([torch.cat(list(row), dim=-1) for row in (x, y)], dim=-2)  # (3, 2H, B·W)
    return Image.fromarray(((rows.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())


@torch.no_grad()
def normalise_latents(vae: VAE, draw: Draw, size: int) -> None:
    """Gives each channel of the scaled latents mean 0 and variance 1, by changing two 1×1 convolutions."""
    generator = torch.Generator().manual_seed(0)
    quant, post = vae.encoder.quant, vae.decoder.post_quant
    means = []
    for _ in range(16):
        means.append(vae.encoder.moments(draw(generator, 32, size).to(quant.weight.device))[0])
    z = torch.cat(means).transpose(0, 1).flatten(1)  # (4, B·h·w)
    centre, spread, n = z.mean(1), z.std(1) * vae.encoder.config.scale_factor, len(z)
    assert quant.bias is not None and post.bias is not None
    # Encoder: μ' = (μ − centre) / spread and σ' = σ / spread. Decoder: the inverse, before its first layer.
    quant.weight[:n] /= spread[:, None, None, None]
    quant.bias[:n] = (quant.bias[:n] - centre) / spread
    quant.bias[n:] -= 2 * spread.log()
    post.bias += post.weight[:, :, 0, 0] @ centre
    post.weight *= spread[None, :, None, None]
