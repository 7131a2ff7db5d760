"""Training the U-Net and the text encoder together, on latents that the VAE made once.

A step: take captioned latents x₀, add noise ε at random timesteps t, and have the U-Net say from x_t,
t and the words what was added. Source: Ho et al. 2020, Algorithm 1; Rombach et al. 2022, Eq. 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..model.clip import CLIP
from ..model.config import ModelConfig
from ..model.ddpm import DDPMSampler
from ..model.diffusion import AttentionBlock, ResidualBlock, UNet
from .loop import LoopConfig, train


@dataclass(frozen=True)
class TextToImageTraining:
    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(steps=60_000, lr=7e-4, warmup=500, ema=0.9995)
    )
    batch: int = 32
    caption_dropout: float = 0.1  # share of empty captions: what classifier-free guidance needs
    # Timesteps are drawn as T·u^power, u uniform: below 1, noisy ones more often. What a word looks like is
    # learned there, where the picture itself tells nothing; it is also what takes a small model longest.
    timestep_power: float = 0.5
    # The loss is weighted as if no timestep's signal-to-noise ratio were above this (None: not at all).
    max_snr: float | None = 5.0


class TextToImage(nn.Module):
    """What is trained: the words' encoder and the denoiser."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.clip = CLIP(config.clip)
        self.diffusion = UNet(config.unet)
        self.diffusion.apply(_begin_as_identity)
        nn.init.zeros_(self.diffusion.conv_out.weight)


def _begin_as_identity(layer: nn.Module) -> None:
    """The last layer of every residual branch starts at zero: a deep network starts as a shallow one."""
    if isinstance(layer, ResidualBlock):
        nn.init.zeros_(layer.conv_2.weight)
    elif isinstance(layer, AttentionBlock):
        nn.init.zeros_(layer.proj_out.weight)  # type: ignore[arg-type]


def spread_timesteps(
    count: int, num_training_steps: int, generator: torch.Generator, power: float = 1.0
) -> Tensor:
    """(count,) timesteps T·u^power; u uniform in [0, 1), one in each of `count` ranges: a calmer loss."""
    u = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return (u**power * num_training_steps).long().clamp(max=num_training_steps - 1)


def loss_weights(sampler: DDPMSampler, t: Tensor, max_snr: float | None) -> Tensor:
    """One weight a timestep, (B,). Source: Hang et al. 2023 (min-SNR), with SNR + 1 for the velocity."""
    if max_snr is None:
        return torch.ones(len(t))
    # §3.4, Hang et al. 2023: SNR(t) = ᾱ_t / (1 − ᾱ_t); on x₀ the ε-loss weighs SNR, the v-loss SNR + 1.
    snr = (sampler.alphas_cumprod / (1 - sampler.alphas_cumprod)).float()[t]
    natural = snr + 1 if sampler.prediction_type == "v_prediction" else snr
    return natural.clamp(max=max_snr) / natural


def loss(
    model: TextToImage,
    sampler: DDPMSampler,
    latents: Tensor,
    tokens: Tensor,
    generator: torch.Generator,
    training: TextToImageTraining,
) -> tuple[Tensor, dict[str, float]]:
    """latents (B, 4, h, w) and the tokens of their captions (B, L) -> the loss, and its parts for the log."""
    count = len(latents)
    t = spread_timesteps(count, sampler.num_training_steps, generator, training.timestep_power)
    noise = torch.randn(latents.shape, generator=generator)
    # Algorithm 1, Ho et al. 2020: x_t = √ᾱ_t x₀ + √(1 − ᾱ_t) ε
    x_t = sampler.add_noise(latents, t, noise)
    target = sampler.velocity(latents, t, noise) if sampler.prediction_type == "v_prediction" else noise
    with torch.autocast("cpu", torch.bfloat16):
        output = model.diffusion(x_t, model.clip(tokens), t)
    error = F.mse_loss(output.float(), target, reduction="none").mean(dim=(1, 2, 3))  # (B,)
    early, late = error[t < sampler.num_training_steps // 2], error[t >= sampler.num_training_steps // 2]
    figures = {"low_noise": early.mean().item(), "high_noise": late.mean().item()}
    return (error * loss_weights(sampler, t, training.max_snr)).mean(), figures


def train_text2image(
    latents: Tensor,
    tokens: Tensor,
    empty: Tensor,
    config: ModelConfig,
    training: TextToImageTraining,
    folder: Path,
    start_from: dict[str, Tensor] | None = None,
    every_checkpoint: Callable[[int, dict[str, Tensor]], None] | None = None,
) -> TextToImage:
    """Trains on latents (N, 4, h, w) with captions' tokens (N, L); returns the averaged weights.

    empty: the tokens (L,) of no caption. start_from: weights to begin with, instead of random ones.
    Raises TrainingError when the loss is not finite.
    """
    torch.manual_seed(training.loop.seed)
    model = TextToImage(config).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if start_from is not None:
        model.load_state_dict(start_from)
    schedule = config.schedule
    sampler = DDPMSampler(
        None,
        schedule.num_training_steps,
        schedule.beta_start,
        schedule.beta_end,
        beta_schedule=schedule.beta_schedule,
        prediction_type=schedule.prediction_type,
    )

    def step_loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        chosen = torch.randint(len(latents), (training.batch,), generator=generator)
        dropped = torch.rand(training.batch, generator=generator) < training.caption_dropout
        words = torch.where(dropped[:, None], empty, tokens[chosen])
        return loss(model, sampler, latents[chosen].float(), words, generator, training)

    model.load_state_dict(train(model, step_loss, training.loop, folder, every_checkpoint))
    return model
