"""Following a recipe, from its data to the file of a trained model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..api import load as load_pipeline
from ..model.config import MINI, SD15, ModelConfig
from ..model.pipeline import StableDiffusion
from ..weights import info, load, save
from .images import DataError
from .loop import processes
from .lora import train_lora
from .material import captioned_latents, random_pixels
from .recipe import Recipe, RecipeError
from .sharpen import sharpen_decoder
from .sheet import PROMPTS, contact_sheet
from .text2image import TextToImage, train_text2image
from .vae import train_vae
from .vae_file import is_vae, load_vae, save_vae

SIZES = {"mini": MINI, "sd15": SD15}


def run(recipe: Recipe) -> Path:
    """Follows a recipe to its end; returns the file of the trained model.

    Raises RecipeError or ModelError if the recipe cannot be followed, and DataError or TrainingError if
    something fails on the way.
    """
    ways = {"vae": run_vae, "sharpen": run_sharpen, "text2image": run_text2image, "lora": run_lora}
    return ways[recipe.train](recipe)


def run_vae(recipe: Recipe) -> Path:
    """Trains a VAE; the file holds its encoder and its decoder."""
    config = model_config(recipe)
    start = load_vae(recipe.start, config).state_dict() if recipe.start else None
    pixels, size = random_pixels(recipe), recipe.size or config.size
    vae = train_vae(pixels, size, config.vae, recipe.training, Path(recipe.folder), start)
    out = Path(recipe.out)
    if processes().is_main_process:
        save_vae(vae, out)
    return out


def run_sharpen(recipe: Recipe) -> Path:
    """Trains the decoder of a VAE further; the file is a VAE or a whole model, whichever `start` is."""
    if not recipe.start:
        raise RecipeError("sharpening needs a trained VAE; set start to its file, or to a whole model")
    config = model_config(recipe)
    vae = load_vae(recipe.start, config)
    pixels, size = random_pixels(recipe), recipe.size or config.size
    vae = sharpen_decoder(vae, pixels, size, recipe.training, Path(recipe.folder))
    out = Path(recipe.out)
    if not processes().is_main_process:
        return out
    if is_vae(recipe.start):
        save_vae(vae, out)
    else:
        found, models, tokenizer = load(recipe.start)
        models["decoder"].load_state_dict(vae.decoder.state_dict())
        save(found, models, out, tokenizer=tokenizer)
    return out


def run_text2image(recipe: Recipe) -> Path:
    """Trains a U-Net and its text encoder; the file is a whole model."""
    config, weights, tokenizer = model_config(recipe), None, None
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
    data, tokenizer = captioned_latents(recipe, config, vae, tokenizer)
    empty, folder, out = torch.tensor(tokenizer.encode("")), Path(recipe.folder), Path(recipe.out)

    def pipeline(model: TextToImage) -> StableDiffusion:
        networks = {"encoder": vae.encoder, "decoder": vae.decoder}
        return StableDiffusion(
            config, tokenizer, networks | {"clip": model.clip, "diffusion": model.diffusion}
        )

    watch = sheets(config, pipeline, folder)
    trained = train_text2image(data, empty, config, recipe.training, folder, weights, watch)
    if processes().is_main_process:
        networks = {name: network.to(torch.bfloat16) for name, network in pipeline(trained).models.items()}
        save(config, networks, out, tokenizer=tokenizer)
    return out


def sheets(
    config: ModelConfig, pipeline: Callable[[TextToImage], StableDiffusion], folder: Path
) -> Callable[[int, dict[str, Tensor]], Image.Image]:
    """Returns a function that draws a contact sheet at a checkpoint, from the averaged weights."""
    shown = TextToImage(config).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def watch(step: int, average: dict[str, Tensor]) -> Image.Image:
        shown.load_state_dict(average, strict=False)
        prompts = PROMPTS if config.size <= 128 else PROMPTS[:4]  # large pictures take their time
        sheet = contact_sheet(pipeline(shown), prompts, seeds=1)
        sheet.save(folder / f"sheet-{step:06d}.png")
        return sheet

    return watch


def run_lora(recipe: Recipe) -> Path:
    """Trains a LoRA for the model in `start`; the file holds the LoRA alone."""
    if recipe.data == "emoji":
        raise DataError("a LoRA learns from your own pictures; set data to their folder")
    pipe = load_pipeline(recipe.start or "mini", "cpu" if not torch.cuda.is_available() else None)
    return train_lora(
        pipe,
        recipe.data,
        recipe.training,
        Path(recipe.folder),
        Path(recipe.out),
        size=recipe.size or None,
        mirror=recipe.mirror,
    )


def model_config(recipe: Recipe) -> ModelConfig:
    """Returns the sizes that the recipe names, with the recipe's way of adding noise."""
    if recipe.start and not is_vae(recipe.start):
        base = info(recipe.start).config
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
