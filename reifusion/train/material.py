"""The data of a recipe: pictures for a VAE, and captioned latents for a U-Net and its text encoder."""

from __future__ import annotations

from pathlib import Path

from ..files import whole
from ..model.config import SD15, ModelConfig
from ..model.tokenizer import Tokenizer
from .bpe import train_bpe
from .images import open_pictures
from .latents import cache_latents
from .loop import processes
from .recipe import Recipe
from .text2image import Data
from .vae import VAE, PixelBatch


def random_pixels(recipe: Recipe) -> PixelBatch:
    """Returns the random pictures for a VAE."""
    if recipe.data == "emoji":
        from .mini import material

        return material.random_pixels()
    pictures = open_pictures(recipe.data)
    return lambda generator, count, size: pictures.pixel_batch(generator, count, size, recipe.mirror)


def captioned_latents(
    recipe: Recipe, config: ModelConfig, vae: VAE, tokenizer: Tokenizer | None
) -> tuple[Data, Tokenizer]:
    """Returns latents with the tokens of their captions, kept in the run's folder, and the tokenizer.

    tokenizer: that of the model to train; None lets the captions decide (see `vocabulary`).
    """
    folder = Path(recipe.folder)
    folder.mkdir(parents=True, exist_ok=True)
    if recipe.data == "emoji":
        from .mini import material

        with processes().main_process_first():
            images, captions = material.scenes(recipe.scenes, folder / "bank")
            tokenizer = tokenizer or vocabulary(captions, config, folder)
            means = material.encode(vae, images, folder / "latents.pt")
        return material.latents(means, captions, tokenizer), tokenizer
    with processes().main_process_first():
        pictures = open_pictures(recipe.data)
        captions = [caption for item in pictures.items for caption in item.captions]
        tokenizer = tokenizer or vocabulary(captions, config, folder)
        size = recipe.size or config.size
        data = cache_latents(
            vae.encoder, pictures, size, folder / "latents", tokenizer=tokenizer, mirror=recipe.mirror
        )
    return data, tokenizer


def vocabulary(captions: list[str], config: ModelConfig, folder: Path) -> Tokenizer:
    """Returns CLIP's tokenizer if the model has room for it, or one trained on the captions' own words."""
    if config.clip.vocab_size == SD15.clip.vocab_size:
        return Tokenizer(context_length=config.clip.context_length)
    path = folder / "vocabulary.txt"
    if not path.exists():
        merges = config.clip.vocab_size - 2 * 256 - 2  # bytes, bytes that end a word, start and end of text
        with whole(path) as temporary:
            temporary.write_text(
                "\n".join(" ".join(p) for p in train_bpe(captions, merges)), encoding="utf-8"
            )
    return Tokenizer.from_file(path, context_length=config.clip.context_length)
