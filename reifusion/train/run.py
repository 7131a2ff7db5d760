"""From a recipe to a trained model: what is trained, on which pictures, and what is written at the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from ..files import whole
from ..model.tokenizer import Tokenizer
from ..model.config import MINI, SD15, ModelConfig
from ..model.pipeline import StableDiffusion
from ..api import load as load_pipeline
from ..model.tensors import ModelError
from ..weights import load, save
from ..weights.writing import write_tensors
from .bpe import train_bpe
from .checkpoint import save_atomically
from .data import DataError
from .data import pictures as emoji
from .images import open_pictures
from .latents import cache_latents
from .loop import processes
from .lora import train_lora
from .recipe import Recipe, RecipeError
from .scenes import build_bank, load_bank
from .sharpen import sharpen_decoder
from .sheet import PROMPTS, contact_sheet
from .text2image import Data, Latents, TextToImage, train_text2image
from .vae import VAE, Draw, random_pictures, train_vae

SIZES = {"mini": MINI, "sd15": SD15}


def run(recipe: Recipe) -> Path:
    """Follows a recipe to its end; returns the file that it made.

    Raises RecipeError and ModelError for what cannot be done, DataError and TrainingError for what failed.
    """
    ways = {"vae": run_vae, "sharpen": run_sharpen, "text2image": run_text2image, "lora": run_lora}
    return ways[recipe.train](recipe)


# ---- the VAE ----------------------------------------------------------------------------------------------


def run_vae(recipe: Recipe) -> Path:
    """Trains a VAE; the file has its encoder and its decoder."""
    config, start = model_config(recipe), None
    if recipe.start:
        start = load_vae(recipe.start, config).state_dict()
    draw, size = pixels(recipe), recipe.size or config.size
    vae = train_vae(draw, size, config.vae, recipe.training, Path(recipe.folder), start)
    out = Path(recipe.out)
    if processes().is_main_process:
        save_vae(vae, out)
    return out


def run_sharpen(recipe: Recipe) -> Path:
    """Trains the decoder of a VAE on; the file is what `start` was, a VAE or a whole model, but sharper."""
    if not recipe.start:
        raise RecipeError("sharpening needs a trained VAE; set start to its file, or to a whole model")
    config = model_config(recipe)
    draw, size = pixels(recipe), recipe.size or config.size
    vae = sharpen_decoder(load_vae(recipe.start, config), draw, size, recipe.training, Path(recipe.folder))
    out = Path(recipe.out)
    if processes().is_main_process:
        if is_vae(recipe.start):
            save_vae(vae, out)
        else:
            found, models, tokenizer = load(recipe.start)
            models["decoder"].load_state_dict(vae.decoder.state_dict())
            save(found, models, out, tokenizer=tokenizer)
    return out


def pixels(recipe: Recipe) -> Draw:
    """Where a VAE's pictures come from."""
    if recipe.data == "emoji":
        sprites = torch.from_numpy(emoji()[0]).permute(0, 3, 1, 2).contiguous()  # (N, 4, 128, 128)
        return lambda generator, count, size: random_pictures(sprites, generator, count, size)
    pictures = open_pictures(recipe.data)
    return lambda generator, count, size: pictures.pixel_batch(generator, count, size, recipe.mirror)


def save_vae(vae: VAE, path: Path) -> None:
    """Writes the two halves, by our names."""
    tensors = {name: x.detach().cpu().contiguous() for name, x in vae.state_dict().items()}
    with whole(path) as temporary:
        write_tensors(tensors, temporary, {"format": "reifusion-vae"})


def is_vae(source: str) -> bool:
    """Whether it is a file of `save_vae`."""
    try:
        with safe_open(source, "pt") as file:
            return (file.metadata() or {}).get("format") == "reifusion-vae"
    except (OSError, SafetensorError):  # a folder, a hub id, a .ckpt: `load` knows what to say
        return False


def load_vae(source: str, config: ModelConfig) -> VAE:
    """From a file of `save_vae`, or out of a whole model. Raises ModelError."""
    vae = VAE(config.vae)
    if is_vae(source):
        tensors, sizes = load_file(source), config.vae
    else:
        found, models, _ = load(source, dtype=torch.float32)
        halves = {half: models[half].state_dict() for half in ("encoder", "decoder")}
        tensors = {f"{half}.{name}": x for half, state in halves.items() for name, x in state.items()}
        sizes = found.vae
    wanted = {name: x.shape for name, x in vae.state_dict().items()}
    if sizes != config.vae or {name: x.shape for name, x in tensors.items()} != wanted:
        raise ModelError(f"the VAE of {source} has other sizes than that of {config.name}")
    vae.load_state_dict(tensors)
    return vae.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]


# ---- text to image ----------------------------------------------------------------------------------------


@dataclass
class Material:
    """What the U-Net learns from, and what its pictures are made with."""

    data: Data
    empty: Tensor  # the tokens (L,) of no caption
    vae: VAE
    tokenizer: Tokenizer


def run_text2image(recipe: Recipe) -> Path:
    """Trains U-Net and text encoder; the file is a whole model."""
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
    material = prepare(recipe, config, vae, tokenizer)
    watch = sheets(config, material, Path(recipe.folder))
    trained = train_text2image(
        material.data, material.empty, config, recipe.training, Path(recipe.folder), weights, watch
    )
    out = Path(recipe.out)
    if processes().is_main_process:
        half = pipeline(config, material, trained)
        save(
            config,
            {k: m.to(torch.bfloat16) for k, m in half.models.items()},
            out,
            tokenizer=material.tokenizer,
        )
    return out


def model_config(recipe: Recipe) -> ModelConfig:
    """The sizes that the recipe names, with its way of adding noise."""
    if recipe.start and not is_vae(recipe.start):
        base = load_config(recipe.start)
    elif recipe.model in SIZES:
        base = SIZES[recipe.model]
    else:
        raise RecipeError(f"there is no model {recipe.model!r} to begin; there are {', '.join(SIZES)}")
    schedule = base.schedule
    if recipe.prediction_type:
        schedule = replace(schedule, prediction_type=recipe.prediction_type)
    if recipe.zero_terminal_snr:
        schedule = replace(schedule, zero_terminal_snr=True)
    return replace(base, schedule=schedule)


def load_config(source: str) -> ModelConfig:
    from ..weights import info

    return info(source).config


def prepare(recipe: Recipe, config: ModelConfig, vae: VAE, tokenizer: Tokenizer | None) -> Material:
    """Captioned latents, made once and kept in the run's folder."""
    folder, first = Path(recipe.folder), processes().main_process_first
    folder.mkdir(parents=True, exist_ok=True)
    if recipe.data == "emoji":
        with first():
            images, captions = bank(recipe.scenes, folder / "bank")
            tokenizer = tokenizer or vocabulary(captions, config, folder)
            latents = encode_bank(vae, images, folder / "latents.pt")
        tokens = torch.tensor([tokenizer.encode(caption) for caption in captions])
        return Material(Latents(latents, tokens), torch.tensor(tokenizer.encode("")), vae, tokenizer)
    with first():
        pictures = open_pictures(recipe.data)
        tokenizer = tokenizer or vocabulary(
            [c for item in pictures.items for c in item.captions], config, folder
        )
        size = recipe.size or config.size
        data = cache_latents(
            vae.encoder, pictures, size, folder / "latents", tokenizer=tokenizer, mirror=recipe.mirror
        )
    return Material(data, data.empty, vae, tokenizer)


def bank(count: int, folder: Path) -> tuple[np.ndarray, list[str]]:
    """The mini's scenes and their captions, composed once."""
    if not (folder / "scenes.json").exists():
        build_bank(count, seed=1, out=folder)
    return load_bank(folder)


@torch.inference_mode()
def encode_bank(vae: VAE, images: np.ndarray, path: Path) -> Tensor:
    """Scenes (N, 128, 128, 3) uint8 -> latents (N, 4, 16, 16) bf16, kept at `path`."""
    if not path.exists():
        latents = []
        for start in tqdm(range(0, len(images), 64), desc="encoding", unit="64 scenes"):
            x = torch.from_numpy(images[start : start + 64].copy()).permute(0, 3, 1, 2)  # (64, 3, 128, 128)
            with torch.autocast("cpu", torch.bfloat16):
                latents.append(vae.encoder(x.float() / 127.5 - 1).bfloat16())
        save_atomically(torch.cat(latents), path)
    return torch.load(path, weights_only=True)


def vocabulary(captions: list[str], config: ModelConfig, folder: Path) -> Tokenizer:
    """CLIP's where there is room for it, and otherwise one of the captions' own words, kept in the folder."""
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


def pipeline(config: ModelConfig, material: Material, model: TextToImage) -> StableDiffusion:
    """The parts in training, ready to draw."""
    models: dict[str, nn.Module] = {"encoder": material.vae.encoder, "decoder": material.vae.decoder}
    models |= {"clip": model.clip, "diffusion": model.diffusion}
    return StableDiffusion(config, material.tokenizer, models)


def sheets(
    config: ModelConfig, material: Material, folder: Path
) -> Callable[[int, dict[str, Tensor]], Image.Image | None]:
    """Draws a contact sheet at every checkpoint; for large models, of four prompts only."""
    shown = TextToImage(config).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def watch(step: int, average: dict[str, Tensor]) -> Image.Image:
        shown.load_state_dict(average, strict=False)
        prompts = PROMPTS if config.size <= 128 else PROMPTS[:4]  # large pictures take their time
        sheet = contact_sheet(pipeline(config, material, shown), prompts, seeds=1)
        sheet.save(folder / f"sheet-{step:06d}.png")
        return sheet

    return watch


# ---- LoRA -------------------------------------------------------------------------------------------------


def run_lora(recipe: Recipe) -> Path:
    """Trains a LoRA for the model in `start`."""
    if recipe.data == "emoji":
        raise DataError("a LoRA learns from your own pictures; set data to their folder")
    pipe = load_pipeline(recipe.start or "mini", "cpu" if not torch.cuda.is_available() else None)
    out = Path(recipe.out)
    return train_lora(
        pipe,
        recipe.data,
        recipe.training,
        Path(recipe.folder),
        out,
        size=recipe.size or None,
        mirror=recipe.mirror,
    )
