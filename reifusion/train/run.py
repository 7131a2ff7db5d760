"""Following a recipe, from its data to the file of a trained model."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..api import load as load_pipeline
from ..model.config import MINI, SD15, ModelConfig
from ..model.pipeline import StableDiffusion
from ..weights import find_config, load, save
from . import ready
from .checkpoint import digest, unchanged
from .images import DataError, some
from .loop import processes
from .lora import train_lora
from .material import captioned_latents, captioned_pictures, own_pictures, random_pixels
from .recipe import Recipe, RecipeError
from .sharpen import sharpen_decoder
from .sheet import PROMPTS, contact_sheet
from .text2image import TextToImage, train_text2image
from .vae import PixelBatch, train_vae
from .vae_file import is_vae, load_vae, save_vae

SIZES = {"mini": MINI, "sd15": SD15}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}


def run(recipe: Recipe) -> Path:
    """Follows a recipe to its end; returns the file of the trained model.

    Raises RecipeError or ModelError if the recipe cannot be followed, and DataError or TrainingError if
    something fails on the way.
    """
    config = model_config(recipe)
    ready.check(recipe, config)
    ways = {"vae": run_vae, "sharpen": run_sharpen, "text2image": run_text2image, "lora": run_lora}
    return ways[recipe.train](recipe, config)


def run_vae(recipe: Recipe, config: ModelConfig) -> Path:
    """Trains a VAE; the file holds its encoder and its decoder."""
    start = load_vae(recipe.start, config).state_dict() if recipe.start else None
    if start is not None:
        warnings.warn(
            f"the encoder is trained as well, so the latents move away from those that a U-Net trained with"
            f" {recipe.start} understands; `train sharpen` keeps them",
            stacklevel=2,
        )
    begun = time.monotonic()
    pixels, size, made_of = random_pictures(recipe, config, start)
    vae = train_vae(
        pixels,
        size,
        config.vae,
        recipe.training,
        Path(recipe.folder),
        start,
        made_of,
        draws_on=processes().device,
        spent=time.monotonic() - begun,
    )
    out = Path(recipe.out)
    if processes().is_main_process:
        save_vae(vae, out)
    return out


def run_sharpen(recipe: Recipe, config: ModelConfig) -> Path:
    """Trains the decoder of a VAE further; the file is a VAE or a whole model, whichever `start` is."""
    if not recipe.start:
        raise RecipeError("sharpening needs a trained VAE; set start to its file, or to a whole model")
    vae = load_vae(recipe.start, config)
    pixels, size, made_of = random_pictures(recipe, config, vae.state_dict())
    device = processes().device
    vae = sharpen_decoder(vae, pixels, size, recipe.training, Path(recipe.folder), made_of, device)
    out = Path(recipe.out)
    if not processes().is_main_process:
        return out
    if is_vae(recipe.start):
        save_vae(vae, out)
    else:
        found, models, tokenizer = load(recipe.start)
        models["decoder"] = vae.decoder  # in float32, so that nothing of what it has learned is rounded away
        save(found, models, out, tokenizer=tokenizer)
    return out


def random_pictures(
    recipe: Recipe, config: ModelConfig, start: Mapping[str, Tensor] | None
) -> tuple[PixelBatch, int, dict[str, str]]:
    """Returns the random pictures for a VAE, their side in pixels, and what the run is made of."""
    size, made_of = recipe.size or config.size, {"start": digest(start or {})}
    if recipe.data == "emoji":
        with processes().main_process_first():
            return random_pixels(recipe), size, made_of | {"data": "emoji"}
    with processes().main_process_first():
        pictures = own_pictures(recipe)
    side = recipe.training.crop if recipe.train == "vae" else size
    small = [item.name for item in pictures.items if min(item.width, item.height) < side]
    if small:
        warnings.warn(
            f"{len(small)} of {len(pictures)} pictures are smaller than {side}×{side} pixels, and are"
            f" enlarged: {some(small)}",
            stacklevel=3,
        )
    return random_pixels(recipe, pictures), size, made_of | {"data": pictures.digest()}


def run_text2image(recipe: Recipe, config: ModelConfig) -> Path:
    """Trains a U-Net and its text encoder; the file is a whole model."""
    begun = time.monotonic()
    weights, tokenizer = None, None
    if recipe.start:
        found, models, tokenizer = load(recipe.start, dtype=torch.float32)
        config = replace(found, schedule=config.schedule)
        model = TextToImage(config)
        model.clip.load_state_dict(models["clip"].state_dict())
        model.diffusion.load_state_dict(models["diffusion"].state_dict())
        weights = model.state_dict()
    if not (recipe.vae or recipe.start):
        raise RecipeError("text2image needs a VAE; set vae to a trained one, or start to a whole model")
    vae = load_vae(recipe.vae or recipe.start, config)
    folder, out, source = Path(recipe.folder), Path(recipe.out), captioned_pictures(recipe)
    made_of = {
        "start": digest(weights or {}),
        "VAE": digest(vae.encoder.state_dict()),
        "prediction_type": config.schedule.prediction_type,
        "zero_terminal_snr": f"{config.schedule.zero_terminal_snr}",
        "data": source.digest(),
    }
    unchanged(folder / "checkpoint.pt", made_of, recipe.training.loop.allow_changes)
    data, tokenizer = captioned_latents(recipe, source, config, vae, tokenizer)
    empty = torch.tensor(tokenizer.encode(""))

    def pipeline(model: TextToImage) -> StableDiffusion:
        networks = {"encoder": vae.encoder, "decoder": vae.decoder}
        networks |= {"clip": model.clip, "diffusion": model.diffusion}
        return StableDiffusion(config, tokenizer, networks, processes().device)

    watch = sheets(config, pipeline, folder)
    spent = time.monotonic() - begun
    trained = train_text2image(data, empty, config, recipe.training, folder, weights, watch, made_of, spent)
    if processes().is_main_process:
        save(config, pipeline(trained).models, out, tokenizer=tokenizer, dtype=DTYPES[recipe.dtype])
    return out


def sheets(
    config: ModelConfig, pipeline: Callable[[TextToImage], StableDiffusion], folder: Path
) -> Callable[[int, dict[str, Tensor]], Image.Image]:
    """Returns a function that draws a contact sheet at a checkpoint, from the model's weights."""
    shown = TextToImage(config).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def watch(step: int, weights: dict[str, Tensor]) -> Image.Image:
        shown.load_state_dict(weights)
        prompts = PROMPTS if config.size <= 128 else PROMPTS[:4]  # large pictures take their time
        sheet = contact_sheet(pipeline(shown), prompts, seeds=1)
        sheet.save(folder / f"sheet-{step:06d}.png")
        return sheet

    return watch


def run_lora(recipe: Recipe, config: ModelConfig) -> Path:
    """Trains a LoRA for the model in `start`; the file holds the LoRA alone."""
    if recipe.data == "emoji":
        raise DataError("a LoRA learns from your own pictures; set data to their folder")
    pipe = load_pipeline(recipe.start or "mini", "cpu" if not torch.cuda.is_available() else None)
    with processes().main_process_first():
        pictures = own_pictures(recipe)
    return train_lora(
        replace(pipe, config=config),
        pictures,
        recipe.training,
        Path(recipe.folder),
        Path(recipe.out),
        size=recipe.size or None,
        mirror=recipe.mirror,
    )


def model_config(recipe: Recipe) -> ModelConfig:
    """Returns the sizes that the recipe names, with the recipe's way of adding noise."""
    start = recipe.start or ("mini" if recipe.train == "lora" else "")  # a LoRA is for the mini unless told
    if start and not is_vae(start):
        base = find_config(start)
    elif recipe.model in SIZES:
        base = SIZES[recipe.model]
    else:
        raise RecipeError(f"there is no model {recipe.model!r} to train; there are {', '.join(SIZES)}")
    schedule = base.schedule
    if recipe.prediction_type:
        schedule = replace(schedule, prediction_type=recipe.prediction_type)
    if recipe.zero_terminal_snr:
        schedule = replace(schedule, zero_terminal_snr=True)
    return replace(base, schedule=schedule)
