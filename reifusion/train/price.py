"""What a recipe costs on this machine, before it begins: `reifusion train … --dry-run`."""

from __future__ import annotations

import glob
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch

from ..model.config import ModelConfig, UNetConfig
from ..model.pipeline import StableDiffusion
from ..weights.hub import is_id
from . import ready
from .checks import Cost, blots, cost, in_bytes, subject
from .control import SHOWN, TextToControl
from .images import Pictures
from .latents import HOLES
from .material import ENCODING, held_out_pictures, own_pictures, regularising_pictures
from .recipe import Recipe, RecipeError
from .run import MOST_OF_A_LORA
from .sizes import model_config
from .text2image import TextToImage
from .vae import VAE
from .vae_file import load_vae
from .watch import prompts_of_sheet


def dry_run(recipe: Recipe, before_its_vae: bool = False) -> str:
    """Returns a table of a recipe's cost: a few real steps, a sheet and the encoding are measured here.

    The steps are done on made-up data, but the recipe's own is looked at, if it lies on this machine.
    before_its_vae: True if the VAE that it names is still to be trained. Raises RecipeError, ModelError or
    DataError for what would end the training.
    """
    config = model_config(recipe)
    ready.check(recipe, config, before_its_vae)
    found = pictures(recipe)
    model, objective = subject(recipe)
    saving = getattr(recipe.training, "gradient_checkpointing", False)
    unet = model.diffusion if saving and isinstance(model, TextToImage) else None
    price = cost(model, objective, recipe.training.loop, unet, moments=moments(recipe))
    if isinstance(model, TextToControl):
        clip, diffusion = model.clip, model.diffusion
        model = TextToImage(config)
        model.clip, model.diffusion = clip, diffusion  # type: ignore[assignment]
    if not isinstance(model, TextToImage):
        return _table(price, found)
    vae = VAE(config.vae) if before_its_vae else load_vae(recipe.vae or recipe.start or "mini", config)
    side = recipe.size or config.size
    if found:
        parts = (2 if recipe.mirror else 1) * recipe.crops * (1 + HOLES * config.inpaints)
        price = replace(price, before=sum(map(len, found.values())) * parts * encoding(vae, side))
    elif recipe.data == "emoji" and recipe.training.loop.minutes is not None:
        price = replace(price, before=60 * ENCODING * recipe.training.loop.minutes)  # and no longer
    if recipe.train == "text2image":  # a second copy of the networks, which draws the sheets
        sheets = in_bytes([*model.parameters(), *vae.parameters()])
        price = replace(price, memory=price.memory | {"for sheets": sheets})
    if isinstance(config.unet, UNetConfig):
        price = replace(price, sheet=sheet(model, vae, config, _prompts(recipe, found, side), side))
    return _table(price, found)


def pictures(recipe: Recipe) -> dict[str, Pictures]:
    """Opens the pictures of a recipe that lie on this machine; "" names those that it learns."""
    found = {}
    if _is_here(recipe.data):
        found[""] = own_pictures(recipe)
        if recipe.validation and len(found[""]) < 2:
            raise RecipeError("there is only one picture, so none can be held out; set validation=0")
    if recipe.validation_data and _is_here(recipe.validation_data):
        found["held out"] = held_out_pictures(recipe)
    if recipe.regularisation and _is_here(recipe.regularisation):
        found["regularisation"] = regularising_pictures(recipe)
    return found


def _is_here(source: str) -> bool:
    """True if pictures lie in a folder or in files, or should; False for the mini's own and for a hub id."""
    path = Path(source).expanduser()
    there = path.exists() or bool(glob.glob(str(path), recursive=True))
    return source != "emoji" and (there or not is_id(source.partition(":")[0]))


def moments(recipe: Recipe) -> tuple[tuple[float, float], ...]:
    """Returns when, from 0 to 1, steps are measured, and the share of the training that is like them."""
    if recipe.train != "vae":
        return ((0.0, 1.0),)
    whole = recipe.training.whole_from
    stages = ((min(recipe.training.edges_from, whole), whole), (1.0, 1 - whole))
    return tuple((when, share) for when, share in stages if share)


def encoding(vae: VAE, side: int) -> float:
    """Returns the seconds in which a picture of side × side pixels is encoded."""
    pixels = blots(torch.Generator().manual_seed(0), 2, side // vae.encoder.config.factor)
    pixels = pixels.repeat_interleave(vae.encoder.config.factor, 2)
    pixels = pixels.repeat_interleave(vae.encoder.config.factor, 3)
    with torch.inference_mode():
        return _seconds(lambda: vae.encoder.moments(pixels)) / len(pixels)


def sheet(model: TextToImage, vae: VAE, config: ModelConfig, prompts: int, side: int) -> float:
    """Returns the seconds in which a sheet of so many prompts is drawn."""
    networks = {"clip": model.clip, "diffusion": model.diffusion, **dict(vae.named_children())}
    padding = SimpleNamespace(encode=lambda text: [0] * config.clip.context_length)  # in place of a tokenizer
    # Small pictures are drawn sooner together; a large one takes its time, and fills a machine by itself.
    pipe, few = StableDiffusion(config, padding, networks), min(prompts, max(1, 8 * 128**2 // side**2))
    side = side // config.multiple * config.multiple

    def draw(steps: int) -> None:
        pipe.generate([""] * few, steps=steps, size=(side, side), seed=0, progress=False)

    two, four = _seconds(lambda: draw(2)), _seconds(lambda: draw(4))
    step = max(0.0, four - two) / 2
    return prompts / few * (two + (config.steps - 2) * step)


def _prompts(recipe: Recipe, found: dict[str, Pictures], side: int) -> int:
    """Returns how many prompts are on a sheet."""
    captions = [text for item in found[""].items for text in item.captions] if found.get("") else None
    if recipe.train == "control":
        return 2 * SHOWN  # with words, and without
    if recipe.train == "inversion":
        return len(prompts_of_sheet(recipe.prompts or ("",) * 4, None, side, 0))
    many = len(prompts_of_sheet(recipe.prompts, captions, side, recipe.training.loop.seed))
    return min(many, MOST_OF_A_LORA) if recipe.train == "lora" and not recipe.prompts else many


def _seconds(work: Callable[[], object]) -> float:
    """Returns how long some work takes the second time."""
    work()
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def _table(price: Cost, found: dict[str, Pictures]) -> str:
    rows = [
        f"{f'pictures, {name}' if name else 'pictures':14} {len(pictures):,}"
        for name, pictures in found.items()
    ]
    return "\n".join([*rows, str(price)])
