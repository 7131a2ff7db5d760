"""The mini, from nothing: pictures from npm, then the VAE, then the U-Net with its text encoder.

Every stage leaves a file in `folder` and is skipped when that file is there; a stage that was stopped
goes on where its last checkpoint was. `reifusion train mini --help` lists what can be changed.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..model.clip import Tokenizer
from ..model.config import MINI
from ..model.model_loader import ModelError, load, save
from ..model.pipeline import StableDiffusion
from .bpe import train_bpe
from .data import DataError, pictures
from .loop import LoopConfig, TrainingError, save_atomically
from .scenes import build_bank, load_bank
from .sheet import contact_sheet
from .text2image import TextToImage, TextToImageTraining, train_text2image
from .vae import VAE, VAETraining, train_vae

# Times are for 2 cores of a server CPU with bf16 instructions.
VAE_RECIPE = VAETraining(  # half an hour; 28 dB on whole pictures after 2,700 steps, 29.5 dB at the end
    loop=LoopConfig(steps=4_500, lr=1e-3, decay=0.4, ema=0.998), batch=16, crop=64, whole_from=0.9
)
TEXT2IMAGE_RECIPE = TextToImageTraining(  # two hours for 8,000 steps of 32; the longer, the better
    loop=LoopConfig(steps=8_000, lr=6e-4, warmup=400, decay=0.6, ema=0.9993, checkpoint_minutes=10),
    batch=32,
    timestep_power=0.5,
)
SCENES = 60_000  # composed pictures in the bank


def make_vae(sprites: Tensor, folder: Path, training: VAETraining) -> VAE:
    """The trained VAE, from `folder/vae.pt` or by training it."""
    path, vae = folder / "vae.pt", VAE(MINI.vae)
    if not path.exists():
        save_atomically(train_vae(sprites, MINI.vae, training, folder / "vae").state_dict(), path)
    vae.load_state_dict(torch.load(path, weights_only=True))
    return vae.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def make_tokenizer(captions: list[str], folder: Path) -> Tokenizer:
    """A vocabulary of the captions' own words, from `folder/vocabulary.txt` or learned from them."""
    path = folder / "vocabulary.txt"
    merges = MINI.clip.vocab_size - 2 * 256 - 2  # bytes, bytes that end a word, start and end of text
    if not path.exists():
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(
            "\n".join(" ".join(pair) for pair in train_bpe(captions, merges)), encoding="utf-8"
        )
        os.replace(temporary, path)
    return Tokenizer.from_file(path, context_length=MINI.clip.context_length)


@torch.inference_mode()
def encode_bank(vae: VAE, images: np.ndarray, folder: Path) -> Tensor:
    """Scenes (N, 128, 128, 3) uint8 -> latents (N, 4, 16, 16) bf16, kept in `folder/latents.pt`."""
    path = folder / "latents.pt"
    if not path.exists():
        latents = []
        for start in tqdm(range(0, len(images), 64), desc="encoding", unit="64 scenes"):
            x = torch.from_numpy(images[start : start + 64].copy()).permute(0, 3, 1, 2)  # (64, 3, 128, 128)
            with torch.autocast("cpu", torch.bfloat16):
                latents.append(vae.encoder(x.float() / 127.5 - 1).bfloat16())
        save_atomically(torch.cat(latents), path)
    return torch.load(path, weights_only=True)


def as_pipeline(vae: VAE, model: TextToImage, tokenizer: Tokenizer) -> StableDiffusion:
    """The parts in training, ready to draw."""
    models: dict[str, nn.Module] = {"encoder": vae.encoder, "decoder": vae.decoder}
    models |= {"clip": model.clip, "diffusion": model.diffusion}
    return StableDiffusion(MINI, tokenizer, models)


def train_mini(
    folder: Path,
    vae_recipe: VAETraining,
    recipe: TextToImageTraining,
    scenes: int,
    out: Path,
    start: str | None = None,
) -> None:
    """All stages; the model ends up in `out`. start: a mini to go on from, whose VAE stays as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "bank" / "scenes.json").exists():
        build_bank(scenes, seed=1, out=folder / "bank")
    images, captions = load_bank(folder / "bank")
    weights = None
    if start is None:
        sprites = torch.from_numpy(pictures()[0]).permute(0, 3, 1, 2).contiguous()  # (N, 4, 128, 128)
        vae, tokenizer = make_vae(sprites, folder, vae_recipe), make_tokenizer(captions, folder)
    else:
        config, models, tokenizer = load(start, dtype=torch.float32)
        if config != MINI:
            raise ModelError(f"{start} has not the sizes of the mini, so its training cannot go on here")
        vae, text2image = VAE(MINI.vae).eval(), TextToImage(MINI)
        vae.encoder.load_state_dict(models["encoder"].state_dict())
        vae.decoder.load_state_dict(models["decoder"].state_dict())
        text2image.clip.load_state_dict(models["clip"].state_dict())
        text2image.diffusion.load_state_dict(models["diffusion"].state_dict())
        weights = text2image.state_dict()
    tokens = torch.tensor([tokenizer.encode(caption) for caption in captions])  # (N, 32)
    empty = torch.tensor(tokenizer.encode(""))
    latents = encode_bank(vae, images, folder)
    shown = TextToImage(MINI).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def watch(step: int, average: dict[str, Tensor]) -> None:
        shown.load_state_dict(average)
        contact_sheet(as_pipeline(vae, shown, tokenizer), seeds=1).save(folder / f"sheet-{step:06d}.png")

    model = train_text2image(
        latents, tokens, empty, MINI, recipe, folder / "text2image", weights, every_checkpoint=watch
    )
    pipe = as_pipeline(vae, model, tokenizer)
    half = {name: network.to(torch.bfloat16) for name, network in pipe.models.items()}
    save(MINI, half, out, tokenizer=tokenizer)
    print(f"the model is in {out}; the last contact sheet is in {folder}")


def main(arguments: list[str]) -> int:
    """`reifusion train mini …`; returns the exit code."""
    parser = argparse.ArgumentParser("reifusion train mini", description=__doc__)
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/mini"), help="where all is kept (%(default)s)"
    )
    parser.add_argument("--start", help="a mini to go on from (a file, or mini), instead of from nothing")
    parser.add_argument("--vae-steps", type=int, default=VAE_RECIPE.loop.steps, help="(%(default)s)")
    steps, lr = TEXT2IMAGE_RECIPE.loop.steps, TEXT2IMAGE_RECIPE.loop.lr
    parser.add_argument("--steps", type=int, default=steps, help="of the U-Net (%(default)s)")
    parser.add_argument(
        "--lr", type=float, default=lr, help="highest learning rate of the U-Net (%(default)s)"
    )
    parser.add_argument("--scenes", type=int, default=SCENES, help="pictures in the bank (%(default)s)")
    threads = torch.get_num_threads()
    parser.add_argument("--threads", type=int, default=threads, help="CPU threads (%(default)s)")
    parser.add_argument("--out", type=Path, help="the model's file (FOLDER/mini.safetensors)")
    given = parser.parse_args(arguments)
    for name in ("vae_steps", "steps", "scenes", "threads", "lr"):
        if not 0 < getattr(given, name) < float("inf"):
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    torch.set_num_threads(given.threads)
    vae_recipe = replace(VAE_RECIPE, loop=replace(VAE_RECIPE.loop, steps=given.vae_steps))
    recipe = replace(TEXT2IMAGE_RECIPE, loop=replace(TEXT2IMAGE_RECIPE.loop, steps=given.steps, lr=given.lr))
    out = given.out or given.folder / "mini.safetensors"
    try:
        train_mini(given.folder, vae_recipe, recipe, given.scenes, out, given.start)
    except ModelError as error:
        print(f"reifusion: {error}", file=sys.stderr)
        return 2
    except (DataError, TrainingError, OSError) as error:
        print(f"reifusion: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("reifusion: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0
