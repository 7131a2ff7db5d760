"""Three checks before a long training run: its cost, the gradients, and whether the model can learn at all.

`check_gradients` and `overfit_one` take a recipe and need none of its data; `price.py` asks what it costs.
They are built on functions for a model and an objective of your own: `cost`, `compare_gradients` and
`overfit`.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..families.mini_mm import MiniMMDiT
from ..kernels.training import in_training
from ..model.config import ModelConfig, ScheduleConfig, UNetConfig
from ..model.diffusion import UNet
from ..weights import load
from . import critic as critics
from . import text2image
from . import vae as vaes
from .checkpoint import TrainingError
from .control import TextToControl, fresh
from .inversion import Learned, new_word
from .loop import (
    BatchPart,
    LoopConfig,
    Objective,
    accumulate_gradients,
    in_mixed_precision,
    make_optimizers,
    processes,
    rng,
)
from .lora import attach
from .recipe import Recipe, RecipeError
from .sharpen import WithCritic, sharpening_objective
from .sizes import model_config
from .text2image import Latents, TextToImage, forward_process, recomputed, rows_of
from .vae import VAE

# ---- cost -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """The cost of a training run in each process; memory in bytes."""

    parameters: int
    trained: int
    memory: dict[str, int]
    seconds: float  # per step
    steps: int
    samples: float  # per step, of all processes together
    minutes: float | None = None  # after which the run ends; None: after its steps
    before: float = 0.0  # seconds in which pictures are encoded
    sheet: float = 0.0  # seconds in which what a checkpoint shows is drawn
    checkpoint_minutes: float = 5.0

    def __str__(self) -> str:
        rows = {
            "parameters": f"{self.parameters:,}, of which {self.trained:,} are trained",
            **{name: f"{size / 2**20:,.1f} MiB" for name, size in self.memory.items()},
            "in all": f"{sum(self.memory.values()) / 2**20:,.1f} MiB, without PyTorch itself",
            "a step": f"{self.seconds:.3g} s, {self.samples / self.seconds:,.1f} samples/s",
        }
        if self.before:
            rows["encoding"] = f"{self.before:.3g} s, once"
        if self.sheet:
            rows["a sheet"] = f"{self.sheet:.3g} s, at each checkpoint"
        between = max(60 * self.checkpoint_minutes, self.seconds)
        longer = 1 + self.sheet / between  # than the steps alone take
        steps = self.steps
        if self.minutes is not None and 60 * self.minutes < self.before + steps * self.seconds * longer:
            steps = max(1, int((60 * self.minutes - self.before) / (self.seconds * longer)))
            rows[f"{self.minutes:g} minutes"] = f"{steps:,} steps, {steps * self.samples:,.0f} samples"
        else:
            working = steps * self.seconds
            sheets = 1 + max(0, 1 + (working - between / 5) // between)  # the first soon, the last at the end
            all_in_all = self.before + working + sheets * self.sheet
            rows[f"{steps:,} steps"] = f"{all_in_all / 3600:,.2f} hours"
        return "\n".join(f"{name:14} {value}" for name, value in rows.items())


def cost(
    model: nn.Module,
    objective: Objective,
    config: LoopConfig,
    unet: UNet | MiniMMDiT | None = None,
    steps: int = 2,
    moments: Sequence[tuple[float, float]] = ((0.0, 1.0),),
) -> Cost:
    """Does one step to warm up and measures `steps` more; the model's weights do not change.

    unet: the part of the model whose rows are `recomputed`, for gradient checkpointing. moments: when to
    measure, as the share of the training that lies behind, and the share of it that is like that.
    """
    accelerator = processes()
    wrapped = accelerator.prepare_model(model)
    network = in_mixed_precision(wrapped, config, accelerator.device)
    optimizers = make_optimizers(model, config)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 0.0  # all the work, without any change
    scaler = torch.amp.GradScaler(accelerator.device.type, enabled=False)

    def measured(done: float) -> tuple[float, float]:
        """The seconds of a step, and its samples."""
        for step in range(1 + steps):
            if step == 1:
                start = time.perf_counter()
            model.zero_grad()
            figures = accumulate_gradients(
                network, wrapped, objective, step, done, config, accelerator, scaler
            )
            for optimizer in optimizers:
                optimizer.step()
        samples = figures["samples"].item()  # which waits for a GPU
        return (time.perf_counter() - start) / steps, samples

    with in_training(model), nullcontext() if unet is None else recomputed(unet):
        found = [(done, share, *measured(done)) for done, share in moments]
    # The shares are of the steps, or against the clock of the time.
    if config.minutes is None:
        seconds = sum(share * took for _, share, took, _ in found)
        samples = sum(share * count for _, share, _, count in found)
    else:
        seconds = 1 / sum(share / took for _, share, took, _ in found)
        samples = seconds * sum(share / took * count for _, share, took, count in found)
    model.zero_grad()
    trained = [p for p in model.parameters() if p.requires_grad]
    state = [x for o in optimizers for s in o.state.values() for x in s.values() if isinstance(x, Tensor)]
    alone = in_mixed_precision(model, config, accelerator.device)

    def activations(done: float, samples: float) -> int:
        share = samples / (config.accumulate * accelerator.num_processes)  # samples in a part of the batch
        # Nothing is recomputed while `kept` measures, so a whole part may not fit; a sample does.
        some = 1.0 if unet is not None else share
        part = BatchPart(0, round(samples / some), accelerator.device)
        rows = [] if unet is None else rows_of(unet)
        one = kept(model, lambda: objective(alone, done, rng(config.seed, 0), part)[0], rows)
        return round(one * share / some)

    with in_training(model):
        most = max(activations(done, count) for done, _, _, count in found)
    memory = {
        "weights": in_bytes(model.parameters()),
        "gradients": in_bytes(trained),
        "optimizer": in_bytes(state),
        "average": in_bytes(trained),
        "activations": most,
    }
    return Cost(
        sum(p.numel() for p in model.parameters()),
        sum(p.numel() for p in trained),
        memory,
        seconds,
        config.steps,
        samples,
        config.minutes,
        checkpoint_minutes=config.checkpoint_minutes,
    )


def kept(model: nn.Module, forward: Callable[[], Tensor], rows: Sequence[nn.Module] = ()) -> int:
    """Returns the bytes that a forward pass keeps for the backward pass, without the weights.

    rows: modules that will be recomputed one at a time. Of these, all inputs count, and besides only the
    activations of the largest one.
    """
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(storages: dict[int, int], x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return x

    def noting(storages: dict[int, int]) -> torch.autograd.graph.saved_tensors_hooks:
        return torch.autograd.graph.saved_tensors_hooks(partial(note, storages), lambda x: x)

    outside: dict[int, int] = {}
    inside: list[dict[int, int]] = []

    def watched(row: Callable[..., Tensor], x: Tensor, *given: Sequence[Any]) -> Tensor:
        inside.append({})
        for tensor in (x, *itertools.chain(*given)):
            if isinstance(tensor, Tensor):
                note(outside, tensor)
        with noting(inside[-1]):
            return row(x, *given)

    for row in rows:
        row.forward = partial(watched, row.forward)
    try:
        with noting(outside):
            value = forward()
    finally:
        for row in rows:
            del row.forward
    del value  # held until here, so that no memory was freed and then counted under the same address
    return sum(outside.values()) + max((sum(row.values()) for row in inside), default=0)


def in_bytes(tensors: Iterable[Tensor]) -> int:
    """Returns the size of all tensors together."""
    return sum(x.numel() * x.element_size() for x in tensors)


# ---- gradients --------------------------------------------------------------------------------------------


def check_gradients(recipe: Recipe) -> str:
    """Checks each term of the recipe's loss on a narrow model of the same plan. Raises TrainingError."""
    errors = compare_gradients(*narrow_subject(recipe))
    table = "\n".join(f"{name:14} {error:.1e}" for name, error in errors.items())
    wrong = [name for name, error in errors.items() if not error < 1e-4]
    if wrong:
        raise TrainingError(
            f"the gradients of {', '.join(wrong)} are not those of finite differences:\n{table}"
        )
    return f"gradients against finite differences, relative errors:\n{table}"


def compare_gradients(
    model: nn.Module, terms: Mapping[str, Callable[[nn.Module], Tensor]], directions: int = 3
) -> dict[str, float]:
    """Returns for each term the largest relative error of autograd's slope along some random directions.

    terms: name -> a function from the model to the loss, in float64; it gets a copy of the model. Weights
    without a gradient are moved as well, so a term that cuts off their gradient by mistake is found.
    """
    model = copy.deepcopy(model).double().eval()
    weights: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    generator, h = torch.Generator().manual_seed(0), 1e-6
    errors = {}
    for name, term in terms.items():
        found = torch.autograd.grad(term(model), weights, allow_unused=True, materialize_grads=True)
        errors[name] = 0.0
        for _ in range(directions):
            direction = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in weights]
            length = torch.stack([d.norm() for d in direction]).norm()
            direction = [(d / length).to(p.device) for d, p in zip(direction, weights, strict=True)]
            ours = sum((g * d).sum().item() for g, d in zip(found, direction, strict=True))
            # The central difference: f'(w)·d ≈ (f(w + hd) − f(w − hd)) / 2h
            with torch.no_grad():
                torch._foreach_add_(weights, direction, alpha=h)
                above = term(model).item()
                torch._foreach_add_(weights, direction, alpha=-2 * h)
                below = term(model).item()
                torch._foreach_add_(weights, direction, alpha=h)
            theirs = (above - below) / (2 * h)
            error = abs(ours - theirs) / max(abs(ours), abs(theirs), 1e-12)
            errors[name] = max(errors[name], error)
    return errors


def narrow_subject(recipe: Recipe) -> tuple[nn.Module, dict[str, Callable[[nn.Module], Tensor]]]:
    """Returns a narrow model of a recipe's plan, and the terms of its loss."""
    config, generator = narrow(model_config(recipe)), torch.Generator().manual_seed(0)
    torch.manual_seed(0)  # otherwise, an error of finite differences at a kink would come and go
    if recipe.train in ("vae", "sharpen"):
        x = blots(generator, 2, 4 * config.vae.factor).double()
        noise = torch.randn(2, config.vae.latent_channels, 4, 4, generator=generator, dtype=torch.float64)
        if recipe.train == "sharpen":
            both = WithCritic(VAE(config.vae))
            awake(both)
            return sharpening_terms(both, x, noise)
        return awake(VAE(config.vae)), {
            name: lambda vae, name=name: vaes.terms(x, *vae(x, noise))[name]  # type: ignore[misc]
            for name in ("l1", "mse", "edges", "kl")
        }
    # two pixels at the bottom of the U, or two patches
    side = 2 ** len(config.unet.channels) if isinstance(config.unet, UNetConfig) else 2 * config.unet.patch
    latents = blots(generator, 2, side, config.unet.in_channels).double()
    noise = torch.randn(latents.shape, generator=generator, dtype=torch.float64)
    noise = noise[:, : config.vae.latent_channels]  # an inpainting model is given more than latents
    tokens = torch.randint(config.clip.vocab_size, (2, config.clip.context_length), generator=generator)
    t, weights = torch.tensor([100, 700]), torch.tensor([1.0, 0.5], dtype=torch.float64)

    def term(prediction: str) -> Callable[[nn.Module], Tensor]:
        sampler = forward_process(ScheduleConfig(prediction_type=prediction))
        return lambda model: text2image.denoising_loss(model, sampler, latents, tokens, t, noise, weights)[0]

    model = TextToImage(config)
    terms = {prediction: term(prediction) for prediction in ("epsilon", "v_prediction", "flow")}
    if recipe.train == "control":
        hints = (torch.rand(2, config.vae.factor**2, side, side, generator=generator) < 0.2).double()
        latents = torch.cat([latents, hints], dim=1)
        return awake(_with_control(model, config, recipe)), terms
    if recipe.train == "lora":
        _attach(model, recipe)
    elif recipe.train == "inversion":
        model.clip.embedding.token = Learned(model.clip.embedding.token, 3)  # type: ignore[assignment]
    return awake(model), terms


def sharpening_terms(
    model: WithCritic, x: Tensor, noise: Tensor
) -> tuple[nn.Module, dict[str, Callable[[nn.Module], Tensor]]]:
    """Returns a VAE with its critic, and the terms of each while the other stays as it is."""
    now = copy.deepcopy(model).double()
    made = now.vae(x, noise)[0].detach()  # (B, 3, H, W)
    terms: dict[str, Callable[[Any], Tensor]] = {
        name: lambda model, name=name: vaes.terms(x, *model.vae(x, noise))[name]  # type: ignore[misc]
        for name in ("l1", "mse", "edges")
    }
    terms["opinion"] = lambda model: critics.fool(now.critic, x, model.vae(x, noise)[0])[0]
    terms["matching"] = lambda model: critics.fool(now.critic, x, model.vae(x, noise)[0])[1]
    terms["critic"] = torch.enable_grad()(lambda model: critics.judge(model.critic, x, made)[0])
    return model, terms


def narrow(config: ModelConfig) -> ModelConfig:
    """Returns the config of the same layers with few channels: many passes in float64 take their time."""
    unet, vae = config.unet, config.vae
    if isinstance(unet, UNetConfig):
        few: dict[str, Any] = {
            "channels": (unet.groups,) * len(unet.channels),
            "heads": (2,) * len(unet.channels),
        }
    else:
        few = {"width": 16, "heads": 2, "layers": 2, "pooled_width": 16, "positions": 4}
    return replace(
        config,
        clip=replace(config.clip, vocab_size=64, width=16, layers=2, heads=2),
        unet=replace(unet, **few, context_width=16),
        vae=replace(vae, channels=(vae.groups,) * len(vae.channels)),
    )


def awake(model: nn.Module) -> nn.Module:
    """Makes all weights random: those that begin at zero would hide the influence of others."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


# ---- learning ---------------------------------------------------------------------------------------------


def overfit_one(recipe: Recipe) -> str:
    """Trains the recipe's model on one batch of made-up data. Raises TrainingError if it cannot learn."""
    if recipe.train == "sharpen":
        raise RecipeError("a decoder and its critic work against each other, so their loss does not go to 0")
    training = replace(recipe.training, batch=2)
    if recipe.train != "vae":
        training = replace(training, caption_dropout=0.0)
    curve = overfit(*subject(replace(recipe, training=training)))
    course = f"the loss on one batch went from {curve[0]:.3g} to {curve[-1]:.3g} in {len(curve)} steps"
    if curve[-1] > curve[0] / 20:
        raise TrainingError(f"{course}, not to nearly 0: something keeps this model from learning")
    return f"{course}: it can learn"


def overfit(model: nn.Module, objective: Objective, steps: int = 500, lr: float = 1e-3) -> list[float]:
    """Trains the model on the first batch, always with the same noise, in float32; returns the losses.

    Ends after `steps` steps, or before when the loss is a twentieth of the first.
    """
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr, weight_decay=0.0)
    curve: list[float] = []
    while len(curve) < steps and (not curve or curve[-1] > curve[0] / 20):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (len(curve) + 1) / 20, 2 - 2 * len(curve) / steps)
        optimizer.zero_grad()
        loss, _ = objective(model, 0.0, rng(0, 0), BatchPart())
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return curve


# ---- models and made-up data ------------------------------------------------------------------------------


def subject(recipe: Recipe) -> tuple[nn.Module, Objective]:
    """Returns the untrained model of a recipe, and its objective on made-up data of the right size."""
    config, training = model_config(recipe), recipe.training
    torch.manual_seed(training.loop.seed)
    pixels = recipe.size or config.size
    if recipe.train == "vae":
        vae = VAE(config.vae).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return vae, vaes.reconstruction_objective(blots, pixels, config.vae, training)
    if recipe.train == "sharpen":
        both = WithCritic(VAE(config.vae)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return both, sharpening_objective(blots, pixels, config.vae, training)
    model = TextToImage(config)
    if recipe.start or recipe.train in ("lora", "inversion", "control"):
        _, models, tokenizer = load(recipe.start or "mini", dtype=torch.float32)
        if recipe.train == "inversion":
            new_word(tokenizer, training)
        model.clip, model.diffusion = models["clip"], models["diffusion"]  # type: ignore[assignment]
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if recipe.train == "lora":
        _attach(model, recipe)
    elif recipe.train == "inversion":
        model.requires_grad_(False).clip.embedding.token = Learned(  # type: ignore[assignment]
            model.clip.embedding.token, recipe.training.vectors
        )
    else:
        model.clip.requires_grad_(training.train_text_encoder)
    generator = torch.Generator().manual_seed(0)
    latents = blots(generator, 64, pixels // config.vae.factor, config.unet.in_channels)
    tokens = torch.randint(config.clip.vocab_size, (64, config.clip.context_length), generator=generator)
    sampler = forward_process(config.schedule)
    beside, trained = config.unet.in_channels - config.vae.latent_channels, cast(nn.Module, model)
    if recipe.train == "control":
        beside, trained = config.vae.factor**2, _with_control(model, config, recipe)
        hints = torch.rand(64, beside, *latents.shape[2:], generator=generator) < 0.2
        latents = torch.cat([latents, hints.float()], dim=1)
    data = Latents(latents, tokens, beside=beside)
    return trained, text2image.denoising_objective(data, tokens[0], sampler, training)


def blots(generator: torch.Generator, count: int, size: int, channels: int = 3) -> Tensor:
    """Makes up pictures or latents (count, channels, size, size) in [-1, 1], of 4×4 coloured patches each."""
    patches = 2 * torch.rand(count, channels, 4, 4, generator=generator) - 1
    return F.interpolate(patches, size=(size, size), mode="nearest")


def _attach(model: nn.Module, recipe: Recipe) -> None:
    training = recipe.training
    attach(model, training.rank, training.alpha, training.all_targets, training.dropout)


def _with_control(model: TextToImage, config: ModelConfig, recipe: Recipe) -> TextToControl:
    control = fresh(model.diffusion, config, recipe.training.hint_channels)
    return TextToControl(model.clip, cast(UNet, model.diffusion), control, config.vae.factor)
