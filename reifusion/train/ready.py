"""What would fail late in a run is found before it begins: before pictures are encoded, or steps are done."""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from .. import families
from ..files import writable
from ..model.config import ModelConfig
from .control import fresh
from .keys import RecipeError
from .loop import LoopConfig, learning_rate, processes
from .lora import chosen_layers
from .recipe import Recipe
from .text2image import TextToImage, forward_process
from .vae import normalises
from .vae_file import check_vae, is_vae
from .watch import prompts_of_sheet


def check(recipe: Recipe, config: ModelConfig, before_its_vae: bool = False) -> None:
    """Raises RecipeError if the recipe cannot be followed for a model of these sizes, or not to its end.

    before_its_vae: True if the VAE that it names is still to be trained. Raises ModelError for a VAE that
    does not fit. Warns of a learning rate that stays low.
    """
    _unused(recipe, config)
    _outputs(recipe)
    if recipe.wandb and importlib.util.find_spec("wandb") is None:
        raise RecipeError("wandb names a project, and the package is not installed: pip install wandb")
    _batch(recipe.training)
    if recipe.train in ("vae", "sharpen"):
        _vae(recipe, config)
    else:
        _network(recipe, config)
        if recipe.vae and not before_its_vae:
            check_vae(recipe.vae, config)
        prompts_of_sheet(recipe.prompts, (), config.size, 0)
    _rate(recipe.training.loop)


def _unused(recipe: Recipe, config: ModelConfig) -> None:
    """Refuses keys that are set and would have no effect."""

    def is_set(name: str, settings: Any = recipe) -> bool:
        default = next(f.default for f in fields(type(settings)) if f.name == name)
        return getattr(settings, name) != default

    emoji, flow = recipe.data == "emoji", config.schedule.prediction_type == "flow"
    ours = recipe.data in ("emoji", "shapes")
    reasons = {
        "scenes": not emoji and "only the mini's own pictures, data=emoji, are composed",
        "mirror": ours and f"the pictures of data={recipe.data} are not mirrored",
        "split": ours and f"the pictures of data={recipe.data} have no splits",
        "image_column": ours and f"the pictures of data={recipe.data} have no columns",
        "caption_column": ours and f"the pictures of data={recipe.data} have no columns",
        **dict.fromkeys(
            ("model", "channels", "vae_channels", "text_width", "patch"),
            recipe.start and not is_vae(recipe.start) and f"{recipe.start} decides the sizes",
        ),
    }
    if recipe.train in ("vae", "sharpen"):
        reasons["caption_column"] = "a VAE learns without captions"
        for name in ("channels", "text_width", "patch"):
            reasons[name] = "a VAE has neither a U-Net nor a text encoder"
    else:
        held_out = recipe.validation_data and "validation_data has the pictures that are held out"
        reasons["keep_tags"] = not recipe.shuffle_tags and "it is for shuffle_tags=true"
        for name in ("trigger", "shuffle_tags", "crops", "regularisation", "validation_data"):
            reasons[name] = emoji and "the mini's own pictures, data=emoji, are composed"
        reasons["validation"] = held_out or (emoji and "the mini's own pictures, data=emoji, are composed")
        if emoji:
            reasons["size"] = "the mini's own pictures, data=emoji, have one size"
    for name, reason in reasons.items():
        if reason and is_set(name):
            raise RecipeError(f"{name} is set but would not be used: {reason}")
    training = recipe.training
    if flow and hasattr(training, "max_snr") and training.max_snr is not None and is_set("max_snr", training):
        raise RecipeError("max_snr is set but would not be used: rectified flow has no signal-to-noise ratio")


def _outputs(recipe: Recipe) -> None:
    folder, out = Path(recipe.folder), Path(recipe.out)
    if out.is_dir():
        raise RecipeError(f"out is a folder, {out}; give the name of a .safetensors file")
    if out.suffix != ".safetensors":
        raise RecipeError(f"out must be the name of a .safetensors file, not {recipe.out}")
    for source in (recipe.start, recipe.vae):
        if source and Path(source).exists() and out.exists() and out.samefile(source):
            raise RecipeError(f"the training begins with {out} and would overwrite it; choose another out")
    for source in (recipe.data, recipe.regularisation, recipe.validation_data):
        pictures = Path(source).expanduser()
        if source not in ("", "emoji", "shapes") and folder.resolve().is_relative_to(pictures.resolve()):
            raise RecipeError(
                f"the run's folder, {folder}, lies in {source}, and its sheets would become pictures to learn"
                " from; choose another folder"
            )
    for place in (folder, out.parent):
        if place.exists() and not place.is_dir():
            raise RecipeError(f"{place} is a file where a folder is needed; choose another folder or out")
        if processes().is_main_process:
            with writable(place):
                pass


def _batch(training: Any) -> None:
    parts = processes().num_processes * training.loop.accumulate
    if training.batch % parts:
        raise RecipeError(
            f"a batch of {training.batch} cannot be cut into {parts} equal parts (processes times"
            " `accumulate`); choose another batch"
        )


def _vae(recipe: Recipe, config: ModelConfig) -> None:
    """Checks what only matters for a VAE."""
    if recipe.start:
        check_vae(recipe.start, config)
    elif recipe.train == "sharpen":
        raise RecipeError("sharpening needs a trained VAE; set start to its file, or to a whole model")
    if recipe.train == "vae":
        normalises(recipe.training, config.vae, not recipe.start)
    factor = config.vae.factor
    sides = {"size": recipe.size or config.size}
    if recipe.train == "vae":
        sides["crop"] = recipe.training.crop
    for name, side in sides.items():
        if side % factor:
            raise RecipeError(f"{name} must be a multiple of {factor} for this VAE, not {side}")


def _network(recipe: Recipe, config: ModelConfig) -> None:
    """Checks what only matters for a U-Net and its text encoder."""
    if (kind := families.family_of(config).name) in ("sdxl", "sd3"):
        raise RecipeError(
            f"{recipe.start} is of the family {kind}, whose training is not built in; what can be trained is"
            " Stable Diffusion 1.x and 2.x"
        )
    forward_process(config.schedule)
    if 0 < recipe.size < config.multiple:
        raise RecipeError(f"size must be {config.multiple} or more for this VAE, not {recipe.size}")
    channels, latents = config.unet.in_channels, config.vae.latent_channels
    if channels != latents and (recipe.data == "emoji" or not config.inpaints):
        raise RecipeError(
            f"the U-Net of {recipe.start} has {channels} input channels, and is shown more than {latents}"
            " channels of latents; of such models, those for inpainting can be trained, on your own pictures"
        )
    if getattr(config.unet, "guidance_width", None) is not None:
        raise RecipeError(
            f"{recipe.start} is a distilled model (LCM), and this training would undo the distillation; start"
            " from the model that it was distilled from"
        )
    if recipe.train == "inversion":
        if not recipe.training.word.strip():
            raise RecipeError('the word to learn is missing; set word, as in word="zork"')
        if recipe.data == "emoji":
            raise RecipeError("a word is learned from your own pictures; set data to their folder")
    elif recipe.train == "lora":
        if recipe.data == "emoji":
            raise RecipeError("a LoRA learns from your own pictures; set data to their folder")
        with torch.device("meta"):  # an empty shell, without memory
            model = TextToImage(config)
        layers = map(model.get_submodule, chosen_layers(model, recipe.training.all_targets))
        shapes = [layer.weight.shape for layer in layers if isinstance(layer.weight, torch.Tensor)]
        most = max(min(shape[0], shape[1:].numel()) for shape in shapes)
        if recipe.training.rank > most:
            raise RecipeError(
                f"rank must be at most {most}, the size of the largest layer, not {recipe.training.rank}"
            )
    elif recipe.train == "control":
        if recipe.data == "emoji":
            raise RecipeError(
                "a ControlNet learns from a folder of pictures; set data to it, or let the model draw some"
                " with `reifusion batch`"
            )
        low, high = recipe.training.edge_low, recipe.training.edge_high
        if low > high:
            raise RecipeError(f"edge_low must be at most edge_high, and not {low:g} and {high:g}")
        if importlib.util.find_spec("cv2") is None:
            raise RecipeError("edges are found by OpenCV: pip install 'reifusion[control]'")
        fresh(families.build(config)["diffusion"], config, recipe.training.hint_channels)
    elif not recipe.training.train_text_encoder and not recipe.start:
        raise RecipeError(
            "train_text_encoder=false would leave the text encoder's random weights as they are; set start"
            " to a trained model"
        )
    elif not (recipe.vae or recipe.start):
        raise RecipeError("text2image needs a VAE; set vae to a trained one, or start to a whole model")


def _rate(loop: LoopConfig) -> None:
    if not loop.lr:
        warnings.warn("lr is 0, so nothing is learned", stacklevel=4)
        return
    highest = max(
        learning_rate(step, step / loop.steps, loop) for step in range(min(loop.steps, loop.warmup + 1))
    )
    if highest < 0.9 * loop.lr:
        warnings.warn(
            f"with warmup={loop.warmup} and decay={loop.decay:g}, the learning rate reaches only"
            f" {highest:.2g} of {loop.lr:g} in {loop.steps} steps; a short run needs a shorter warmup",
            stacklevel=4,
        )
