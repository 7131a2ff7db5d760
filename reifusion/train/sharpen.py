"""Sharpening: the decoder of a trained VAE is trained further, against a critic that finds what is blurred.

Loss = |x − x̂| + (x − x̂)² + edges + weight · critic + weight · features. The encoder stays as it is. So
latents keep their meaning, and a U-Net trained on them works with the sharper decoder as well.
Source: Esser et al. 2021, §3.1; Rombach et al. 2022, §3.1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..model.config import VAEConfig
from .critic import Critic, fool, judge
from .keys import check, key
from .loop import LoopConfig, train
from .objective import BatchPart, Drawn, Loss, normal, rng
from .progress import Seen
from .vae import VAE, PixelBatch, side_by_side, terms


@dataclass(frozen=True)
class Sharpening:
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=7_000, lr=5e-4, decay=0.5))
    batch: int = key(8, "whole pictures per step", least=1)
    edges: float = key(1.0, "weight of the error in the differences of neighbouring pixels", least=0)
    critic: float = key(0.1, "weight of the critic's opinion: sharper, at the cost of a little PSNR", least=0)
    matching: float = key(
        2.0, "weight of the distance of the critic's features: a little sharper, at no cost", least=0
    )
    critic_by: float = key(
        0.1,
        "share of the steps in which both weights rise from 0: the critic learns first",
        least=0,
        most=1,
    )

    def __post_init__(self) -> None:
        check(self)


class WithCritic(nn.Module):
    """A VAE with a frozen encoder and the critic of its decoder, as one module to train."""

    def __init__(self, vae: VAE):
        super().__init__()
        self.vae, self.critic = vae, Critic(vae.decoder.config.in_channels)
        vae.encoder.requires_grad_(False)

    def forward(self, x: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Pictures (B, 3, H, W), ε (B, 4, H/8, W/8) -> the loss's terms, the share the critic gets right."""
        y, mean, log_variance = self.vae(x, noise)
        opinion, matching = fool(self.critic, x, y)
        critic, right = judge(self.critic, x, y)
        more = {"opinion": opinion, "matching": matching, "critic": critic, "right": right}
        return terms(x, y, mean, log_variance) | more


def sharpening_objective(
    pixel_batch: PixelBatch, size: int, config: VAEConfig, training: Sharpening
) -> Drawn:
    """Returns the objective for `train`. size: the side of a picture, in pixels."""
    side = size // config.factor  # of the latents

    def draw(done: float, generator: torch.Generator, part: BatchPart) -> tuple[Tensor, Tensor, Tensor]:
        x = pixel_batch(generator, training.batch, size)
        noise = normal((training.batch, config.latent_channels, side, side), generator)
        x = part.of(x).contiguous(memory_format=torch.channels_last)
        rise = min(1.0, done / max(1 / training.loop.steps, training.critic_by))
        return x, part.of(noise), torch.full((), rise, device=x.device)

    def loss(network: Callable[..., Any], x: Tensor, noise: Tensor, rise: Tensor) -> Loss:
        term = network(x, noise)
        loss = term["l1"] + term["mse"] + training.edges * term["edges"] + term["critic"]
        # Eq. 6, Esser et al. 2021, where λ is fixed, because the critic's steepness is bounded already.
        loss = loss + rise * (training.critic * term["opinion"] + training.matching * term["matching"])
        psnr = -10 * torch.log10(term["mse"] / 4)  # pixels range over 2, so the square of the peak is 4
        figures = term | {"psnr": psnr}
        return loss, {"samples": float(len(x)), **{name: value.detach() for name, value in figures.items()}}

    return Drawn(draw, loss)


def sharpen_decoder(
    vae: VAE,
    pixel_batch: PixelBatch,
    size: int,
    training: Sharpening,
    folder: Path,
    made_of: Mapping[str, str] | None = None,
    draws_on: torch.device | str = "cpu",
) -> VAE:
    """Trains the VAE's decoder further, in place; returns the VAE with the averaged weights.

    size: the side of a picture, in pixels. Resumes from `folder/checkpoint.pt` if that exists; the VAE must
    then be the same as before. made_of: see `train`. draws_on: the device of `pixel_batch`. Raises what
    `train` raises.
    """
    torch.manual_seed(training.loop.seed)
    model = WithCritic(vae).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    shown, pictures = (
        VAE(vae.encoder.config),
        pixel_batch(rng(training.loop.seed, 0, draws_on), 8, size).cpu(),
    )
    shown.load_state_dict(vae.state_dict())

    def decoder(average: dict[str, Tensor]) -> dict[str, Tensor]:
        front = "vae.decoder."
        return {name[len(front) :]: weight for name, weight in average.items() if name.startswith(front)}

    def compare(step: int, average: dict[str, Tensor]) -> Seen:
        shown.decoder.load_state_dict(decoder(average))
        return Seen(side_by_side(pictures, shown))

    objective = sharpening_objective(pixel_batch, size, vae.encoder.config, training)
    average = train(model, objective, training.loop, folder, compare, made_of=made_of, draws_on=draws_on)
    vae.decoder.load_state_dict(decoder(average))
    vae.encoder.requires_grad_(True)
    return vae
