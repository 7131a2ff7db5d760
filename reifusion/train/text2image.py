"""Training the U-Net and the text encoder together, on latents that the VAE made once.

A step: take captioned latents x₀, add noise ε at random timesteps t, and have the U-Net say from x_t,
t and the words what was added. Source: Ho et al. 2020, Algorithm 1; Rombach et al. 2022, Eq. 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..model.clip import CLIP
from ..model.config import ModelConfig, ScheduleConfig
from ..model.ddpm import Sampler
from ..model.diffusion import AttentionBlock, ResidualBlock, UNet
from ..model.samplers import SAMPLERS, samplers_for
from .loop import LoopConfig, Loss, Part, rng, train


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
    # Rectified flow has no such weights: there, all timesteps count alike.
    max_snr: float | None = 5.0
    offset_noise: float = 0.0  # see `add_offset`; 0.1 lets pictures be darker and brighter
    train_text_encoder: bool = True  # or leave it as it begins
    gradient_checkpointing: bool = False  # a third more time for much less memory, see `recomputed`


class Data(Protocol):
    """Captioned latents, as `train_text2image` takes them.

    A `describe(generator, count)`, where there is one, says for an error message what `draw` would draw.
    """

    def __len__(self) -> int: ...

    def draw(self, generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
        """Scaled latents (count, 4, h, w) float32 and tokens (count, L), decided by the generator alone."""
        ...


@dataclass(frozen=True)
class Latents:
    """All of a data set, in memory: (N, 4, h, w), the captions' tokens (N, L), and how the latents spread."""

    means: Tensor
    tokens: Tensor
    stds: Tensor | None = None  # like means; where the VAE is not sure, each use gets another sample

    def __len__(self) -> int:
        return len(self.means)

    def draw(self, generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(self), (count,), generator=generator)
        latents = self.means[chosen].float()
        if self.stds is not None:
            # Eq. 10, Kingma & Welling 2014: z = μ + σ ⊙ ε
            latents = latents + self.stds[chosen].float() * torch.randn(latents.shape, generator=generator)
        return latents, self.tokens[chosen]

    def describe(self, generator: torch.Generator, count: int) -> str:
        return f"samples {torch.randint(len(self), (count,), generator=generator).tolist()}"


class TextToImage(nn.Module):
    """What is trained: the words' encoder and the denoiser."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.clip = CLIP(config.clip)
        self.diffusion = UNet(config.unet)
        self.diffusion.apply(_begin_as_identity)
        nn.init.zeros_(self.diffusion.conv_out.weight)

    def forward(self, x_t: Tensor, tokens: Tensor, t: Tensor) -> Tensor:
        """Noisy latents (B, 4, h, w), tokens (B, L), timesteps (B,) -> the network's output, like x_t."""
        return self.diffusion(x_t, self.clip(tokens), t).to(x_t.dtype)


def _begin_as_identity(layer: nn.Module) -> None:
    """The last layer of every residual branch starts at zero: a deep network starts as a shallow one."""
    if isinstance(layer, ResidualBlock):
        nn.init.zeros_(layer.conv_2.weight)
    elif isinstance(layer, AttentionBlock):
        nn.init.zeros_(layer.proj_out.weight)  # type: ignore[arg-type]


def forward_process(schedule: ScheduleConfig) -> Sampler:
    """The way pictures are noised, which the network learns to undo."""
    # Samplers of a kind differ in the way back only.
    kind = SAMPLERS[samplers_for(schedule.prediction_type)[0]]
    return kind(**asdict(schedule))


def spread_timesteps(count: int, sampler: Sampler, generator: torch.Generator, power: float = 1.0) -> Tensor:
    """(count,) timesteps T·u^power; u uniform in (0, 1], one in each of `count` ranges: a calmer loss.

    Whole numbers below T, or for rectified flow, whose time is continuous, floats in (0, T].
    """
    u = (torch.arange(1, count + 1) - torch.rand(count, generator=generator)) / count
    t = u**power * sampler.num_training_steps
    return t if sampler.prediction_type == "flow" else t.ceil().long() - 1


def loss_weights(sampler: Sampler, t: Tensor, max_snr: float | None) -> Tensor:
    """One weight a timestep, (B,). Source: Hang et al. 2023 (min-SNR), with SNR + 1 for the velocity."""
    if max_snr is None or sampler.prediction_type == "flow":
        return torch.ones(len(t))
    # [snr] §3.4, Hang et al. 2023: SNR(t) = ᾱ_t / (1 − ᾱ_t); on x₀ the ε-loss weighs SNR, the v-loss SNR + 1.
    snr = (sampler.alphas_cumprod / (1 - sampler.alphas_cumprod)).float()[t]
    natural = snr + 1 if sampler.prediction_type == "v_prediction" else snr
    # [min-snr] §3.4, Hang et al. 2023: min(SNR, γ) / SNR
    return natural.clamp(max=max_snr) / natural


def add_offset(noise: Tensor, weight: float, generator: torch.Generator) -> Tensor:
    """Noise (B, C, h, w), a share of it the same at every pixel, so that brightness is noised too.

    Source: Guttenberg 2023, "Diffusion with offset noise".
    """
    # [offset-noise] Guttenberg 2023: ε + w·n, n ~ N(0, 1) for each picture and channel
    return noise + weight * torch.randn(*noise.shape[:2], 1, 1, generator=generator)


def loss(
    network: Callable[..., Any],
    sampler: Sampler,
    latents: Tensor,
    tokens: Tensor,
    t: Tensor,
    noise: Tensor,
    weights: Tensor,
) -> tuple[Tensor, dict[str, float]]:
    """Latents (B, 4, h, w), tokens (B, L), t (B,), ε (B, 4, h, w), weights (B,) -> the loss, its figures."""
    # Algorithm 1, Ho et al. 2020: x_t = √ᾱ_t x₀ + √(1 − ᾱ_t) ε
    x_t = sampler.add_noise(latents, t, noise)
    error = (network(x_t, tokens, t) - sampler.target(latents, t, noise)).pow(2).mean(dim=(1, 2, 3))  # (B,)
    early = t < sampler.num_training_steps / 2
    figures = {"low_noise": error[early].mean().item(), "high_noise": error[~early].mean().item()}
    # [ddpm-loss] Eq. 14, Ho et al. 2020: E ‖ε − ε_θ(x_t, t)‖², here with weights
    return (error * weights).mean(), {"samples": float(len(t)), **figures}


def training_loss(data: Data, empty: Tensor, sampler: Sampler, training: TextToImageTraining) -> Loss:
    """The loss of a step, for `train`: on data, with captions dropped, at random timesteps."""

    def step_loss(
        network: Callable[..., Any], step: int, generator: torch.Generator, part: Part
    ) -> tuple[Tensor, dict[str, float]]:
        latents, tokens = data.draw(generator, training.batch)
        dropped = torch.rand(training.batch, generator=generator) < training.caption_dropout
        tokens = torch.where(dropped[:, None], empty, tokens)
        t = spread_timesteps(training.batch, sampler, generator, training.timestep_power)
        noise = torch.randn(latents.shape, generator=generator)
        if training.offset_noise:
            noise = add_offset(noise, training.offset_noise, generator)
        weights = loss_weights(sampler, t, training.max_snr)
        return loss(network, sampler, *(part.of(x) for x in (latents, tokens, t, noise, weights)))

    return step_loss


@contextmanager
def recomputed(unet: UNet) -> Iterator[None]:
    """While open, a row of the U keeps its input only, and computes the rest again on the way back.

    Source: Chen et al. 2016, "Training deep nets with sublinear memory cost".
    """
    rows = [*unet.down, unet.middle, *unet.up]
    for row in rows:
        row.forward = partial(checkpoint, row.forward, use_reentrant=False)
    try:
        yield
    finally:
        for row in rows:
            del row.forward


def fit(
    model: TextToImage,
    data: Data,
    empty: Tensor,
    schedule: ScheduleConfig,
    training: TextToImageTraining,
    folder: Path,
    every_checkpoint: Callable[[int, dict[str, Tensor]], Image.Image | None] | None = None,
) -> dict[str, Tensor]:
    """Trains those parameters of a model that require gradients; returns their moving average."""
    step_loss = training_loss(data, empty, forward_process(schedule), training)
    describe = getattr(data, "describe", lambda _, count: f"a batch of {count}")

    def names(step: int) -> str:
        return describe(rng(training.loop.seed, step), training.batch)

    with recomputed(model.diffusion) if training.gradient_checkpointing else nullcontext():
        return train(model, step_loss, training.loop, folder, every_checkpoint, names)


def train_text2image(
    data: Data,
    empty: Tensor,
    config: ModelConfig,
    training: TextToImageTraining,
    folder: Path,
    start_from: dict[str, Tensor] | None = None,
    every_checkpoint: Callable[[int, dict[str, Tensor]], Image.Image | None] | None = None,
) -> TextToImage:
    """Trains a model of these sizes on captioned latents; returns it with the averaged weights.

    empty: the tokens (L,) of no caption. start_from: weights to begin with, instead of random ones.
    every_checkpoint: as in `train`; the average has the weights that are trained. Raises what `train` raises.
    """
    torch.manual_seed(training.loop.seed)
    model = TextToImage(config).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if start_from is not None:
        model.load_state_dict(start_from)
    model.clip.requires_grad_(training.train_text_encoder)
    average = fit(model, data, empty, config.schedule, training, folder, every_checkpoint)
    model.load_state_dict(average, strict=False)
    return model
