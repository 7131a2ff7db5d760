"""Training the U-Net and the text encoder together, on latents that the VAE has encoded once.

A step takes captioned latents x₀, adds noise ε at random timesteps t, and has the U-Net predict the noise
from x_t, t and the words. Source: Ho et al. 2020, Algorithm 1; Rombach et al. 2022, Eq. 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..families.mini_mm import MiniMMDiT
from ..families.mmdit import MMDiTConfig
from ..model.clip import CLIP
from ..model.config import ModelConfig, ScheduleConfig
from ..model.ddpm import Sampler
from ..model.diffusion import AttentionBlock, ResidualBlock, UNet
from ..model.encoder import sample
from ..model.samplers import SAMPLERS, samplers_for
from .keys import check, key
from .loop import LoopConfig, train
from .objective import BatchPart, Drawn, Loss, has_dropout, normal, rng
from .progress import Seen


@dataclass(frozen=True)
class TextToImageTraining:
    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(steps=60_000, lr=7e-4, warmup=500, ema=0.9995)
    )
    batch: int = key(32, "samples per step, of all processes and parts together", least=1)
    even_from: float = key(
        1.0, "share of the training after which all timesteps are equally frequent", least=0, most=1
    )
    caption_dropout: float = key(
        0.1, 'share of captions replaced by "", for classifier-free guidance', least=0, most=1
    )
    # Timesteps are drawn as T·u^power, u uniform; a power below 1 favours the noisy ones. There the picture
    # itself tells nothing, so a model learns what the words look like: the slowest lesson for a small one.
    timestep_power: float = key(
        0.5, "1: all timesteps are equally frequent; below 1: noisy ones are more frequent", above=0
    )
    # Rectified flow has no such weights: all its timesteps count alike.
    max_snr: float | None = key(
        5.0,
        "weighs the loss as if no timestep had a higher signal-to-noise ratio (min-SNR); none: no weights",
        above=0,
    )
    offset_noise: float = key(
        0.0, "weight of noise that is the same at every pixel: darker and brighter pictures", least=0
    )
    train_text_encoder: bool = key(True, "false: the text encoder stays as it is")
    gradient_checkpointing: bool = key(False, "takes a third longer and much less memory")

    def __post_init__(self) -> None:
        check(self)


class Data(Protocol):
    """Captioned latents, as `train_text2image` takes them.

    `device` is where its latents lie and its random numbers are drawn.
    Optional are `beside`, the number of channels behind the latents' own that the U-Net is shown as they are,
    and a method `describe(generator, count)`, which names the samples of the batch that `latent_batch` would
    return, for an error message.
    """

    @property
    def device(self) -> torch.device: ...

    def __len__(self) -> int: ...

    def latent_batch(self, generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
        """Scaled latents (count, 4, h, w) float32 and tokens (count, L), decided by the generator alone.

        The generator is one of `device`.
        """
        ...


@dataclass(frozen=True)
class Latents:
    """A whole data set in memory."""

    means: Tensor  # (N, 4, h, w)
    tokens: Tensor  # of the captions, (N, L)
    stds: Tensor | None = None  # (N, 4, h, w); if given, a latent is sampled anew each time it is used
    beside: int = 0  # of the channels, those behind the latents' own

    def __len__(self) -> int:
        return len(self.means)

    @property
    def device(self) -> torch.device:
        return self.means.device

    def latent_batch(self, generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(self), (count,), generator=generator, device=self.device)
        latents = self.means[chosen].float()
        if self.stds is not None:
            noise = normal(latents.shape, generator)
            latents = sample(latents, self.stds[chosen].float(), noise)
        return latents, self.tokens[chosen]

    def describe(self, generator: torch.Generator, count: int) -> str:
        chosen = torch.randint(len(self), (count,), generator=generator, device=self.device)
        return f"samples {chosen.tolist()}"


class TextToImage(nn.Module):
    """The two networks that are trained: the text encoder, and the U-Net or the transformer in its place."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        given, latents = config.unet.in_channels, config.vae.latent_channels
        if given != latents and not config.inpaints:
            text = (
                f"is given {given} channels, as for editing, and training has {latents}, or a mask's as well"
            )
            raise ValueError(f"the U-Net of {config.name} {text}; start from another model")
        self.clip = CLIP(config.clip)
        if isinstance(config.unet, MMDiTConfig):
            self.diffusion: UNet | MiniMMDiT = MiniMMDiT(config.unet)
        else:
            self.diffusion = UNet(config.unet)
            self.diffusion.apply(_begin_as_identity)
            nn.init.zeros_(self.diffusion.conv_out.weight)

    def forward(self, x_t: Tensor, tokens: Tensor, t: Tensor) -> Tensor:
        """Noisy latents (B, 4, h, w), tokens (B, L), timesteps (B,) -> the network's output, like x_t."""
        return self.diffusion(x_t, self.clip(tokens), t).to(x_t.dtype)


def _begin_as_identity(layer: nn.Module) -> None:
    """Zeroes the last layer of every residual branch, so that a deep network starts as a shallow one."""
    if isinstance(layer, ResidualBlock):
        nn.init.zeros_(layer.conv_2.weight)
    elif isinstance(layer, AttentionBlock):
        nn.init.zeros_(layer.proj_out.weight)


def forward_process(schedule: ScheduleConfig) -> Sampler:
    """Returns a sampler that adds the noise which the network learns to remove."""
    # Samplers for the same prediction type differ only in the reverse process.
    kind = SAMPLERS[samplers_for(schedule.prediction_type)[0]]
    return kind(**asdict(schedule))


def spread_timesteps(count: int, sampler: Sampler, generator: torch.Generator, power: float = 1.0) -> Tensor:
    """Draws timesteps T·u^power, (count,), with one uniform u in each of `count` equal ranges of (0, 1].

    A batch that covers all ranges has a steadier loss. The timesteps are whole numbers below T, or for
    rectified flow, whose time is continuous, floats in (0, T].
    """
    device = generator.device
    u = torch.arange(1, count + 1, device=device) - torch.rand(count, generator=generator, device=device)
    u = u / count
    t = u**power * sampler.num_training_steps
    return t if sampler.prediction_type == "flow" else t.ceil().long() - 1


def loss_weights(sampler: Sampler, t: Tensor, max_snr: float | None) -> Tensor:
    """Returns a weight for each timestep, (B,).

    Source: Hang et al. 2023 (min-SNR). For the velocity, they have min(SNR, γ) / (SNR + 1). Here the cap is
    on SNR + 1, so that the noisiest timesteps count, where a small model learns what words look like.
    """
    if max_snr is None or sampler.prediction_type == "flow":
        return torch.ones(len(t), device=t.device)
    # [snr] §3.4, Hang et al. 2023: SNR(t) = ᾱ_t / (1 − ᾱ_t); on x₀ the ε-loss weighs SNR, the v-loss SNR + 1.
    snr = (sampler.alphas_cumprod / (1 - sampler.alphas_cumprod)).float().to(t.device)[t]
    natural = snr + 1 if sampler.prediction_type == "v_prediction" else snr
    # [min-snr] §3.4, Hang et al. 2023: min(SNR, γ) / SNR; for v not theirs, but min(SNR + 1, γ) / (SNR + 1)
    return natural.clamp(max=max_snr) / natural


def add_offset(noise: Tensor, weight: float, generator: torch.Generator) -> Tensor:
    """Adds to noise (B, C, h, w) a part that is the same at every pixel, so that brightness is noised too.

    Source: Guttenberg 2023, "Diffusion with offset noise".
    """
    # [offset-noise] Guttenberg 2023: ε + w·n, n ~ N(0, 1) for each picture and channel
    return noise + weight * normal((*noise.shape[:2], 1, 1), generator)


def denoising_loss(
    network: Callable[..., Any],
    sampler: Sampler,
    latents: Tensor,
    tokens: Tensor,
    t: Tensor,
    noise: Tensor,
    weights: Tensor,
) -> Loss:
    """Latents (B, 4, h, w), tokens (B, L), t (B,), ε (B, 4, h, w), weights (B,) -> loss, figures to log.

    The latents may have more channels than ε: what the network sees beside x_t.
    """
    # Algorithm 1, Ho et al. 2020: x_t = √ᾱ_t x₀ + √(1 − ᾱ_t) ε
    x0, beside = latents.tensor_split([noise.shape[1]], dim=1)  # without or, for inpainting, with channels
    x_t = torch.cat([sampler.add_noise(x0, t, noise), beside], dim=1)
    error = (network(x_t, tokens, t) - sampler.target(x0, t, noise)).pow(2).mean(dim=(1, 2, 3))  # (B,)
    early, errors = (t < sampler.num_training_steps / 2).float(), error.detach().float()
    # NaN if there is none
    figures = {
        "low_noise": (errors * early).sum() / early.sum(),
        "high_noise": (errors * (1 - early)).sum() / (1 - early).sum(),
    }
    # [ddpm-loss] Eq. 14, Ho et al. 2020: E ‖ε − ε_θ(x_t, t)‖², here with weights
    return (error * weights).mean(), {"samples": float(len(t)), **figures}


def denoising_objective(data: Data, empty: Tensor, sampler: Sampler, training: TextToImageTraining) -> Drawn:
    """Returns the objective for `train`: random samples at random timesteps, some captions dropped."""
    none, beside = empty.to(data.device), getattr(data, "beside", 0)

    def draw(done: float, generator: torch.Generator, part: BatchPart) -> tuple[Tensor, ...]:
        latents, tokens = data.latent_batch(generator, training.batch)
        chances = torch.rand(training.batch, generator=generator, device=generator.device)
        dropped = chances < training.caption_dropout
        tokens = torch.where(dropped[:, None], none, tokens)
        power = training.timestep_power if done < training.even_from else 1.0
        t = spread_timesteps(training.batch, sampler, generator, power)
        noise = normal(latents[:, : latents.shape[1] - beside].shape, generator)
        if training.offset_noise:
            noise = add_offset(noise, training.offset_noise, generator)
        weights = loss_weights(sampler, t, training.max_snr)
        return tuple(part.of(x) for x in (latents, tokens, t, noise, weights))

    return Drawn(draw, lambda network, *batch: denoising_loss(network, sampler, *batch))


def rows_of(network: UNet | MiniMMDiT) -> list[nn.Module]:
    """The rows of a U-Net, or the blocks of a transformer."""
    return [*network.down, network.middle, *network.up] if isinstance(network, UNet) else [*network.blocks]


@contextmanager
def recomputed(unet: UNet | MiniMMDiT) -> Iterator[None]:
    """Makes each row of the U-Net keep only its input and recompute the rest in the backward pass.

    Source: Chen et al. 2016, "Training deep nets with sublinear memory cost".
    """
    rows = rows_of(unet)
    for row in rows:
        # Only dropout's generator has a state to remember. While a GPU's work is recorded, none may be asked.
        row.forward = partial(
            checkpoint, row.forward, use_reentrant=False, preserve_rng_state=has_dropout(row)
        )
    try:
        yield
    finally:
        for row in rows:
            del row.forward


def optimise(
    model: TextToImage,
    data: Data,
    empty: Tensor,
    schedule: ScheduleConfig,
    training: TextToImageTraining,
    folder: Path,
    every_checkpoint: Callable[[int, dict[str, Tensor]], Seen] | None = None,
    made_of: Mapping[str, str] | None = None,
    spent: float = 0.0,
    keep: Callable[[int, dict[str, Tensor]], None] | None = None,
) -> dict[str, Tensor]:
    """Trains the parameters that require gradients, on captioned latents; returns their moving average."""
    objective = denoising_objective(data, empty, forward_process(schedule), training)
    describe = getattr(data, "describe", lambda _, count: f"a batch of {count}")

    def names(step: int) -> str:
        return describe(rng(training.loop.seed, step, data.device), training.batch)

    with recomputed(model.diffusion) if training.gradient_checkpointing else nullcontext():
        return train(
            model,
            objective,
            training.loop,
            folder,
            every_checkpoint,
            names,
            made_of,
            draws_on=data.device,
            spent=spent,
            keep=keep,
        )


def train_text2image(
    data: Data,
    empty: Tensor,
    config: ModelConfig,
    training: TextToImageTraining,
    folder: Path,
    start_from: dict[str, Tensor] | None = None,
    every_checkpoint: Callable[[int, dict[str, Tensor]], Seen] | None = None,
    made_of: Mapping[str, str] | None = None,
    spent: float = 0.0,
    keep: Callable[[int, dict[str, Tensor]], None] | None = None,
) -> TextToImage:
    """Trains a model of these sizes on captioned latents; returns it with the averaged weights.

    empty: the tokens (L,) of the empty caption. start_from: weights to begin with, instead of random ones.
    every_checkpoint, keep: as in `train`, but with all weights of the model, the frozen ones as well.
    made_of, spent: see `train`. Raises what `train` raises.
    """
    torch.manual_seed(training.loop.seed)
    model = TextToImage(config).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if start_from is not None:
        model.load_state_dict(start_from)
    model.clip.requires_grad_(training.train_text_encoder)

    def whole(then: Callable[[int, dict[str, Tensor]], Any] | None) -> Any:
        return None if then is None else lambda step, average: then(step, model.state_dict() | average)

    look, keep = whole(every_checkpoint), whole(keep)
    average = optimise(model, data, empty, config.schedule, training, folder, look, made_of, spent, keep)
    model.load_state_dict(average, strict=False)
    return model
