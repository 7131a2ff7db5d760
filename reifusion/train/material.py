"""The data of a recipe: pictures for a VAE, and captioned latents for a U-Net and its text encoder."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import whole, write_text
from ..model.config import SD15, ModelConfig
from ..model.tokenizer import Tokenizer
from .ahead import Ahead
from .bpe import train_bpe
from .images import Pictures, open_pictures
from .latents import HOLES, cache_latents
from .loop import processes
from .recipe import Recipe
from .text2image import Data
from .vae import VAE, PixelBatch

if TYPE_CHECKING:
    from .mini.material import Bank


def own_pictures(recipe: Recipe, caption: str | None = None, must_split: bool = True) -> Pictures:
    """Opens the pictures that a recipe names, with their captions as it wants them.

    caption: of pictures without one of their own; None: the recipe's. must_split: see `open_pictures`.
    """
    fallback = getattr(recipe.training, "caption", "") if caption is None else caption
    pictures = open_pictures(
        recipe.data,
        split=recipe.split,
        image_column=recipe.image_column or None,
        caption_column=recipe.caption_column or None,
        caption=fallback,
        must_split=must_split,
    )
    if caption is None and fallback and all(item.captions != (fallback,) for item in pictures.items):
        warnings.warn(
            f"caption is set to {fallback!r} and not used, as every picture has words of its own; `trigger`"
            " puts words before those",
            stacklevel=2,
        )
    if not (recipe.trigger or recipe.shuffle_tags):
        return pictures
    return pictures.dressed(recipe.trigger, recipe.shuffle_tags, recipe.keep_tags, recipe.training.loop.seed)


def held_out_pictures(recipe: Recipe) -> Pictures:
    """Opens the `validation_data` of a recipe, with captions as those that are learned have them."""
    caption = getattr(recipe.training, "caption", "")
    return own_pictures(replace(recipe, data=recipe.validation_data), caption, must_split=False)


def regularising_pictures(recipe: Recipe) -> Pictures:
    """Opens the pictures of what must not change: the word before the captions is not theirs."""
    return own_pictures(replace(recipe, data=recipe.regularisation, trigger=""), "", must_split=False)


def random_pixels(recipe: Recipe, pictures: Pictures | None = None) -> PixelBatch:
    """Returns the random pictures for a VAE: of these pictures, or of those that the recipe names."""
    if recipe.data == "emoji":
        from .mini import material

        return material.random_pixels(processes().device)
    pictures = pictures or own_pictures(recipe)
    return Ahead(lambda generator, count, size: pictures.pixel_batch(generator, count, size, recipe.mirror))


def captioned_pictures(recipe: Recipe) -> Pictures | Bank:
    """Returns the pictures for a U-Net and its text encoder."""
    with processes().main_process_first():
        if recipe.data != "emoji":
            return own_pictures(recipe)
        from .mini import material

        return material.bank(recipe.scenes)


def captioned_latents(
    recipe: Recipe, source: Pictures | Bank, config: ModelConfig, vae: VAE, tokenizer: Tokenizer | None
) -> tuple[Data, Tokenizer]:
    """Returns latents with the tokens of their captions, kept in the run's folder, and the tokenizer.

    On a GPU the mini's own scenes are encoded faster than they are read, so they are not kept.

    tokenizer: that of the model to train; None lets the captions decide (see `vocabulary`).
    """
    folder = Path(recipe.folder)
    folder.mkdir(parents=True, exist_ok=True)
    with processes().main_process_first():
        if not isinstance(source, Pictures):
            from .mini import material

            tokenizer = tokenizer or vocabulary(source.captions, config, folder)
            device, clock = processes().device, recipe.training.loop.minutes
            counted, first = folder / "scenes.txt", processes().is_main_process
            resumes = (folder / "checkpoint.pt").exists() and not recipe.training.loop.allow_changes
            decided = counted.exists() and (not first or resumes)
            if decided:  # a run that resumes, or another process of it, has the scenes of before
                source, clock = source.first(int(counted.read_text())), None
            means = material.encode(
                vae.encoder,
                source,
                folder / "latents" if device.type == "cpu" else None,
                device,
                None if clock is None else ENCODING * 60 * clock,
            )
            if not decided:
                write_text(counted, f"{len(means)}\n")
            return material.latents(means, source.captions, tokenizer), tokenizer
        captions = [caption for item in source.items for caption in item.captions]
        tokenizer = tokenizer or vocabulary(captions, config, folder)
        size = recipe.size or config.size
        data = cache_latents(
            vae.encoder.to(processes().device),
            source,
            size,
            folder / "latents",
            tokenizer=tokenizer,
            mirror=recipe.mirror,
            patch=config.unet.patch,
            crops=recipe.crops,
            holes=HOLES if config.inpaints else 0,
        )
    return data, tokenizer


# The share of a run's minutes in which the mini's scenes are encoded, as many as there is time for.
ENCODING = 0.15


def vocabulary(captions: list[str], config: ModelConfig, folder: Path) -> Tokenizer:
    """Returns CLIP's tokenizer if the model has room for it, or one trained on the captions' own words.

    That one is made anew for each run, except for one that resumes: its tokens have learned their meaning.
    """
    if config.clip.vocab_size == SD15.clip.vocab_size:
        return Tokenizer(context_length=config.clip.context_length)
    path = folder / "vocabulary.txt"
    if processes().is_main_process and not (path.exists() and (folder / "checkpoint.pt").exists()):
        merges = config.clip.vocab_size - 2 * 256 - 2  # bytes, bytes that end a word, start and end of text
        with whole(path) as temporary:
            temporary.write_text(
                "\n".join(" ".join(p) for p in train_bpe(captions, merges)), encoding="utf-8"
            )
    return Tokenizer.from_file(path, context_length=config.clip.context_length)
