"""Following a recipe, from its data to the file of a trained model."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..api import load as load_pipeline
from ..model.config import ModelConfig
from ..model.pipeline import StableDiffusion
from ..model.tokenizer import Tokenizer
from ..weights import info, load, read_back, save
from . import ready
from .checkpoint import alone, digest, unchanged
from .control import train_control
from .images import Pictures, some
from .inversion import train_inversion, with_word
from .latents import LatentData, Mixed
from .loop import processes
from .lora import train_lora
from .material import (
    captioned_latents,
    captioned_pictures,
    held_out_pictures,
    own_pictures,
    random_pixels,
    regularising_pictures,
)
from .progress import Seen
from .recipe import Recipe
from .sharpen import sharpen_decoder
from .sizes import model_config
from .text2image import Data, TextToImage, forward_process, train_text2image
from .vae import VAE, PixelBatch, train_vae
from .vae_file import is_vae, load_vae, save_vae
from .watch import Watch, prompts_of_sheet

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}
MOST_OF_A_LORA = 8  # captions on its sheets


def run(recipe: Recipe) -> Path:
    """Follows a recipe to its end; returns the file of the trained model.

    Raises RecipeError or ModelError if the recipe cannot be followed, and DataError or TrainingError if
    something fails on the way, or if another run is in its folder.
    """
    config = model_config(recipe)
    ready.check(recipe, config)
    torch.backends.cudnn.benchmark = True  # on a GPU, the fastest convolution is found by trying
    ways = {
        "vae": run_vae,
        "sharpen": run_sharpen,
        "text2image": run_text2image,
        "lora": run_lora,
        "inversion": run_inversion,
        "control": run_control,
    }
    with alone(Path(recipe.folder)) if processes().is_main_process else nullcontext(), told_elsewhere(recipe):
        return ways[recipe.train](recipe, config)


def told_elsewhere(recipe: Recipe) -> AbstractContextManager[Any]:
    """Sends what TensorBoard gets to Weights & Biases too, if the recipe names a project there."""
    if not recipe.wandb or not processes().is_main_process:
        return nullcontext()
    import wandb

    folder = Path(recipe.folder)
    folder.mkdir(parents=True, exist_ok=True)
    name = hashlib.blake2b(str(folder.resolve()).encode(), digest_size=8).hexdigest()
    return wandb.init(  # a run that is resumed goes on there as well
        project=recipe.wandb,
        name=folder.name,
        id=name,
        resume="allow",
        dir=folder,
        config=asdict(recipe),
        sync_tensorboard=True,
    )


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
    side = size
    if recipe.train == "vae":  # it sees parts of them, and at last whole pictures
        crop, whole = recipe.training.crop, recipe.training.whole_from < 1
        side = max(crop, size) if whole else crop
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
    vae = load_vae(recipe.vae or recipe.start, config)
    folder, out, source = Path(recipe.folder), Path(recipe.out), captioned_pictures(recipe)
    with processes().main_process_first():
        others = regularising_pictures(recipe) if recipe.regularisation else None
    made_of = {
        "start": digest(weights or {}),
        "VAE": digest(vae.encoder.state_dict()),
        "prediction_type": config.schedule.prediction_type,
        "zero_terminal_snr": f"{config.schedule.zero_terminal_snr}",
        "beta_end": f"{config.schedule.beta_end:g}",
        "data": source.digest(),
        "validation": f"{recipe.validation:g}",
        "regularisation": "" if others is None else others.digest(),
    }
    unchanged(folder / "checkpoint.pt", made_of, recipe.training.loop.allow_changes)
    data, tokenizer = captioned_latents(recipe, source, config, vae, tokenizer)
    training, tokens = recipe.training, tokenizer
    own = data.captions if isinstance(data, LatentData) else None  # of those held out as well
    data, held_out = validation(recipe, data, config, vae, tokenizer)
    if others is not None and isinstance(data, LatentData):
        data = Mixed(data, cast(LatentData, captioned_latents(recipe, others, config, vae, tokenizer)[0]))

    def pipeline(model: TextToImage) -> StableDiffusion:
        networks = {"encoder": vae.encoder, "decoder": vae.decoder}
        networks |= {"clip": model.clip, "diffusion": model.diffusion}
        return StableDiffusion(config, tokens, networks, processes().device)

    def write(networks: Mapping[str, nn.Module], path: Path) -> None:
        save(config, networks, path, tokenizer=tokens, dtype=dtype)

    dtype = dtype_of(recipe)
    shown = TextToImage(config).eval().to(processes().device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    watch = Watch(
        forward_process(config.schedule),
        training.batch,
        training.loop.seed,
        prompts_of_sheet(recipe.prompts, own, recipe.size or config.size, training.loop.seed),
        held_out,
    )

    def look(step: int, weights: dict[str, Tensor]) -> Seen:
        shown.load_state_dict(read_back(weights, dtype))  # what the file will hold
        return watch.look(shown, pipeline(shown))

    def keep(step: int, weights: dict[str, Tensor]) -> None:
        if training.loop.keep_every and step % training.loop.keep_every == 0 and step:
            shown.load_state_dict(weights)
            write(pipeline(shown).models, folder / f"model-{step:06d}.safetensors")

    empty, spent = torch.tensor(tokenizer.encode("")), time.monotonic() - begun
    trained = train_text2image(data, empty, config, training, folder, weights, look, made_of, spent, keep)
    if processes().is_main_process:
        write(pipeline(trained).models, out)
        if weights is not None:
            warn_of_rounding(weights, trained.state_dict(), dtype)
    return out


def warn_of_rounding(before: Mapping[str, Tensor], after: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Warns if much of what was learned is lost in the file, whose numbers are of that dtype."""
    changed, lost = 0.0, 0.0
    for name, found in read_back(after, dtype).items():
        exact = after[name].cpu().double()
        changed += (exact - before[name].cpu().double()).square().sum().item()
        lost += (exact - found.cpu().double()).square().sum().item()
    if lost > 0.2**2 * changed > 0:
        warnings.warn(
            f"the changes are so small that rounding to {dtype} loses much of them: its error is"
            f" {(lost / changed) ** 0.5:.0%} of the change; dtype=fp32 loses nothing",
            stacklevel=3,
        )


def dtype_of(recipe: Recipe) -> torch.dtype:
    """Returns the number format of the model that a recipe writes: by default that of its start."""
    if recipe.dtype:
        return DTYPES[recipe.dtype]
    found = info(recipe.start).dtype if recipe.start else "float32"
    return next((dtype for dtype in DTYPES.values() if str(dtype) == f"torch.{found}"), torch.float32)


def validation(
    recipe: Recipe, data: Data, config: ModelConfig, vae: VAE, tokenizer: Tokenizer
) -> tuple[Data, dict[str, Data]]:
    """Returns the data to train on and, if the recipe wants it, what to measure: "held_out" and "seen"."""
    if recipe.validation_data:
        pictures = held_out_pictures(recipe)
        found, _ = captioned_latents(recipe, pictures, config, vae, tokenizer)
        return data, {"held_out": found, "seen": data}
    if recipe.validation and isinstance(data, LatentData):
        data, found = data.split(recipe.validation, recipe.training.loop.seed)
        return data, {"held_out": found, "seen": data}
    return data, {}


def run_lora(recipe: Recipe, config: ModelConfig) -> Path:
    """Trains a LoRA for the model in `start`; the file holds the LoRA alone."""
    pipe = load_pipeline(recipe.start or "mini", "cpu" if not torch.cuda.is_available() else None)
    with processes().main_process_first():
        pictures = own_pictures(recipe)
        held_out: float | Pictures = recipe.validation
        if recipe.validation_data:
            held_out = held_out_pictures(recipe)
        others = regularising_pictures(recipe) if recipe.regularisation else None
    captions = [caption for item in pictures.items for caption in item.captions]
    prompts = prompts_of_sheet(
        recipe.prompts, captions, recipe.size or config.size, recipe.training.loop.seed
    )
    return train_lora(
        replace(pipe, config=config),
        pictures,
        recipe.training,
        Path(recipe.folder),
        Path(recipe.out),
        recipe.training.layout,
        size=recipe.size or None,
        mirror=recipe.mirror,
        prompts=prompts if recipe.prompts else prompts[:MOST_OF_A_LORA],
        validation=held_out,
        regularisation=others,
        crops=recipe.crops,
    )


def run_inversion(recipe: Recipe, config: ModelConfig) -> Path:
    """Learns a word; the file holds its vectors alone."""
    pipe = load_pipeline(recipe.start or "mini", "cpu" if not torch.cuda.is_available() else None)
    with processes().main_process_first():
        pictures = own_pictures(recipe)
    word, side = recipe.training.word, recipe.size or config.size
    return train_inversion(
        replace(pipe, config=config),
        pictures,
        recipe.training,
        Path(recipe.folder),
        Path(recipe.out),
        size=recipe.size or None,
        mirror=recipe.mirror,
        prompts=prompts_of_sheet(recipe.prompts or with_word((), word)[:4], None, side, 0),
    )


def run_control(recipe: Recipe, config: ModelConfig) -> Path:
    """Trains a ControlNet from edges for the model in `start`; the file holds the ControlNet alone."""
    begun, start = time.monotonic(), recipe.start or "mini"
    _, models, tokenizer = load(start, dtype=torch.float32)
    vae = load_vae(start, config)
    pipe = StableDiffusion(config, tokenizer, models, processes().device)
    for network in models.values():
        network.to(processes().device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    source = captioned_pictures(recipe)
    made_of = {
        "VAE": digest(vae.encoder.state_dict()),
        "data": source.digest(),
        "validation": f"{recipe.validation:g}",
    }
    folder = Path(recipe.folder)
    unchanged(folder / "checkpoint.pt", made_of, recipe.training.loop.allow_changes)
    data, _ = captioned_latents(recipe, source, config, vae, tokenizer)
    data, held_out = validation(recipe, data, config, vae, tokenizer)
    held_out.pop("seen", None)
    spent = time.monotonic() - begun
    return train_control(pipe, data, held_out, recipe.training, folder, recipe.out, made_of, spent)
