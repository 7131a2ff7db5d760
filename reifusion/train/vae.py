"""Training the VAE from nothing: pictures in, the same pictures out, through 48 times fewer numbers.

Loss = |x − x̂| + (x − x̂)² + edges + weight · KL, first on random crops (cheap), at the end on whole pictures.
Source: Kingma & Welling 2014, Eq. 7 and Appendix B; Rombach et al. 2022, §3.1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from ..model.config import VAEConfig
from ..model.decoder import Decoder
from ..model.encoder import Encoder, sample, scale_latents
from .keys import RecipeError, check, key
from .loop import LoopConfig, train
from .objective import BatchPart, Drawn, Loss, normal, rng
from .progress import Seen

# pixel_batch(generator, count, size) -> random pictures (count, 3, size, size) in [-1, 1], decided by the
# generator alone
PixelBatch: TypeAlias = Callable[[torch.Generator, int, int], Tensor]


@dataclass(frozen=True)
class VAETraining:
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=10_000, lr=1e-3))
    batch: int = key(16, "crops per step, or half as many whole pictures", least=1)
    crop: int = key(64, "side of a crop, in pixels", least=1)
    whole_from: float = key(0.8, "share of the steps after which whole pictures are shown", least=0, most=1)
    # A weight w lets the latents' own noise cost about w / 2 of reconstruction error, which nobody sees, and
    # makes the latents as smooth as that allows.
    kl_weight: float = key(1e-3, "weight of the KL divergence, for each latent number", least=0)
    edges: float = key(1.0, "weight of the error in the differences of neighbouring pixels", least=0)
    edges_from: float = key(
        0.2, "share of the steps before it counts; earlier, it makes pictures a flat colour", least=0, most=1
    )
    normalise: bool | None = key(
        None,
        "gives the latents mean 0 and variance 1 at the end, so that no U-Net of before understands them;"
        " none: only if the VAE is trained from nothing",
    )

    def __post_init__(self) -> None:
        check(self)


class VAE(nn.Module):
    """Encoder and decoder as one module to train."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.encoder, self.decoder = Encoder(config), Decoder(config)

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures x (B, 3, H, W) and ε (B, 4, H/8, W/8) -> x̂, like x, and q(z|x)'s mean and log-variance."""
        mean, log_variance = (moment.to(x.dtype) for moment in self.encoder.moments(x))
        z = sample(mean, (0.5 * log_variance).exp(), noise)
        return self.decoder(scale_latents(z, self.encoder.config)).to(x.dtype), mean, log_variance


def kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Returns the mean of KL(N(μ, σ²) ‖ N(0, 1)) over all latent numbers."""
    # [kl] Appendix B, Kingma & Welling 2014: −D_KL = ½ (1 + log σ² − μ² − σ²)
    return -0.5 * (1 + log_variance - mean.pow(2) - log_variance.exp()).mean()


def differences(x: Tensor) -> tuple[Tensor, Tensor]:
    """Subtracts neighbouring pixels: (B, C, H, W) -> (B, C, H, W−1), (B, C, H−1, W)"""
    return x[..., :, 1:] - x[..., :, :-1], x[..., 1:, :] - x[..., :-1, :]


def terms(x: Tensor, y: Tensor, mean: Tensor, log_variance: Tensor) -> dict[str, Tensor]:
    """Returns each term of the loss, for pictures x, reconstructions y and the moments of their latents."""
    return {
        "l1": F.l1_loss(y, x),
        "mse": F.mse_loss(y, x),
        "edges": sum(
            (F.l1_loss(a, b) for a, b in zip(differences(y), differences(x), strict=True)), x.new_zeros(())
        ),
        "kl": kl(mean, log_variance),
    }


def reconstruction_loss(
    vae: Callable[..., Any], x: Tensor, noise: Tensor, training: VAETraining, edges: bool
) -> Loss:
    """Pictures x (B, 3, H, W) and the latents' noise (B, 4, H/8, W/8) -> loss, figures for the log."""
    y, mean, log_variance = vae(x, noise)
    term = terms(x, y, mean, log_variance)
    loss = term["l1"] + term["mse"] + training.kl_weight * term["kl"]
    if edges:
        loss = loss + training.edges * term["edges"]
    psnr = -10 * torch.log10(term["mse"] / 4)  # pixels range over 2, so the square of the peak is 4
    figures = {**term, "psnr": psnr, "std": mean.std()}
    return loss, {"samples": float(len(x)), **{name: value.detach() for name, value in figures.items()}}


def reconstruction_objective(
    pixel_batch: PixelBatch, size: int, config: VAEConfig, training: VAETraining
) -> Drawn:
    """Returns the objective for `train`. size: the side of a whole picture, in pixels."""

    def draw(done: float, generator: torch.Generator, part: BatchPart) -> tuple[Tensor, Tensor, bool]:
        whole = done >= training.whole_from
        count, side = (half(training.batch, part.count), size) if whole else (training.batch, training.crop)
        x = pixel_batch(generator, count, side)
        shape = (count, config.latent_channels, side // config.factor, side // config.factor)
        noise = normal(shape, generator)
        x = part.of(x).contiguous(memory_format=torch.channels_last)
        return x, part.of(noise), done >= training.edges_from

    def loss(vae: Callable[..., Any], x: Tensor, noise: Tensor, edges: bool) -> Loss:
        return reconstruction_loss(vae, x, noise, training, edges)

    return Drawn(draw, loss)


def half(batch: int, parts: int) -> int:
    """Returns about half of a batch that can be cut into parts: as many samples as that in each of them."""
    return max(1, batch // 2 // parts) * parts


def train_vae(
    pixel_batch: PixelBatch,
    size: int,
    config: VAEConfig,
    training: VAETraining,
    folder: Path,
    start_from: dict[str, Tensor] | None = None,
    made_of: Mapping[str, str] | None = None,
    draws_on: torch.device | str = "cpu",
    spent: float = 0.0,
) -> VAE:
    """Trains a VAE on random pictures; returns it with the averaged weights.

    From nothing, its latents have unit variance; otherwise they stay as near to those of before as training
    lets them. size: the side of a whole picture, in pixels. start_from: weights to begin with, instead of
    random ones. made_of, spent: see `train`. draws_on: the device of `pixel_batch`. Raises what `train`
    raises, and RecipeError for latents that cannot be normalised.
    """
    normalise = normalises(training, config, start_from is None)
    torch.manual_seed(training.loop.seed)
    vae = VAE(config).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if start_from is None:
        last = vae.encoder.quant if isinstance(vae.encoder.quant, nn.Conv2d) else vae.encoder.conv_out
        assert last.bias is not None
        with torch.no_grad():  # a log-variance of −6 at first: little noise
            last.bias.copy_(torch.tensor([0.0, -6.0]).repeat_interleave(config.latent_channels))
    else:
        vae.load_state_dict(start_from)
    shown, pictures = VAE(config), pixel_batch(rng(training.loop.seed, 0, draws_on), 8, size).cpu()

    def compare(step: int, average: dict[str, Tensor]) -> Seen:
        shown.load_state_dict(average)
        return Seen(side_by_side(pictures, shown))

    objective = reconstruction_objective(pixel_batch, size, config, training)
    average = train(
        vae, objective, training.loop, folder, compare, made_of=made_of, draws_on=draws_on, spent=spent
    )
    vae.load_state_dict(average)
    if normalise:
        normalise_latents(vae, pixel_batch, size, draws_on)
    return vae


def normalises(training: VAETraining, config: VAEConfig, from_nothing: bool) -> bool:
    """True if the latents are normalised in the end. Raises RecipeError if that cannot be done."""
    normalise = from_nothing if training.normalise is None else training.normalise
    if normalise and not config.quant:
        raise RecipeError("latents are normalised in convolutions that this VAE lacks; set normalise=false")
    return normalise


@torch.no_grad()
def side_by_side(x: Tensor, vae: VAE) -> Image.Image:
    """Shows pictures (B, 3, H, W) in a row, each with its reconstruction below."""
    y = vae.decoder(vae.encoder(x))
    rows = torch.cat([torch.cat(list(row), dim=-1) for row in (x, y)], dim=-2)  # (3, 2H, B·W)
    return Image.fromarray(((rows.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())


@torch.no_grad()
def normalise_latents(
    vae: VAE, pixel_batch: PixelBatch, size: int, draws_on: torch.device | str = "cpu"
) -> None:
    """Gives each channel of the scaled latents mean 0 and variance 1, by changing two 1×1 convolutions."""
    generator = torch.Generator(draws_on).manual_seed(0)
    quant, post, config = vae.encoder.quant, vae.decoder.post_quant, vae.encoder.config
    assert isinstance(quant, nn.Conv2d) and isinstance(post, nn.Conv2d)
    means = []
    for _ in range(16):
        means.append(vae.encoder.moments(pixel_batch(generator, 32, size).to(quant.weight.device))[0])
    z = torch.cat(means).transpose(0, 1).flatten(1)  # (4, B·h·w)
    centre, spread, n = z.mean(1), z.std(1) * config.scale_factor, len(z)
    assert quant.bias is not None and post.bias is not None
    # Encoder: μ′ = (μ − centre) / spread + shift, σ′ = σ / spread. Decoder: the inverse, before its first.
    quant.weight[:n] /= spread[:, None, None, None]
    quant.bias[:n] = (quant.bias[:n] - centre) / spread + config.shift
    quant.bias[n:] -= 2 * spread.log()
    post.bias += post.weight[:, :, 0, 0] @ (centre - spread * config.shift)
    post.weight *= spread[None, :, None, None]
