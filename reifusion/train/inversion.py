"""Learning a word from a few pictures: the whole model is frozen, and only the word's vectors are trained.

`train_inversion` learns them, and `weights/inversion.py` gives them to a model. The file has a few kilobytes.
Source: Gal et al. 2022, "An Image is Worth One Word", arXiv:2208.01618, §3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..model.clip import CLIP
from ..weights import inversion
from ..weights.inversion import Embedding, save_embedding, teach
from .checkpoint import digest, unchanged
from .images import Pictures
from .keys import RecipeError, key
from .latents import HOLES, cache_latents
from .loop import LoopConfig, normal, processes, rng
from .progress import Seen
from .text2image import TextToImage, TextToImageTraining, forward_process, optimise
from .watch import Watch

if TYPE_CHECKING:
    from ..model.encoder import Encoder
    from ..model.pipeline import StableDiffusion

# For pictures whose captions do not have the word. So that it alone means what all pictures share.
TEMPLATES = ("a {}", "a picture of a {}", "an image of a {}", "a drawing of a {}", "one {}", "the {}")


@dataclass(frozen=True)
class InversionTraining(TextToImageTraining):
    """The settings for training the whole model, and those of the word."""

    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(steps=400, lr=1e-2, warmup=10, ema=0.95, weight_decay=0.0)
    )
    batch: int = key(8, "samples per step, of all processes and parts together", least=1)
    timestep_power: float = key(
        1.0, "1: all timesteps are equally frequent; below 1: noisy ones are more frequent", above=0
    )
    caption_dropout: float = key(
        0.0, 'share of captions replaced by "", for classifier-free guidance', least=0, most=1
    )
    train_text_encoder: bool = key(False, "false", trains=("text2image", "lora"))
    word: str = key("", "the new word, as it is written in prompts")
    begin: str = key("", 'what it means at first, as "cat"; "": nothing in particular')
    vectors: int = key(
        1, "how many the word has; each takes the place of a token in a prompt", least=1, most=32
    )


class Learned(nn.Module):
    """A table of vectors, of which the last rows are learned and all others are frozen."""

    def __init__(self, table: nn.Embedding, count: int):
        super().__init__()
        self.register_buffer("frozen", table.weight.detach()[:-count].clone(), persistent=False)
        self.vectors = nn.Parameter(table.weight.detach()[-count:].clone())  # (n, width)
        self.frozen: Tensor

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, L) -> (B, L, width)"""
        own = tokens - len(self.frozen)  # below 0 for the words of before
        known = F.embedding(tokens.clamp(max=len(self.frozen) - 1), self.frozen)
        return torch.where((own >= 0)[..., None], F.embedding(own.clamp(min=0), self.vectors), known)


def train_inversion(
    pipe: StableDiffusion,
    pictures: Pictures,
    training: InversionTraining,
    folder: str | Path,
    out: str | Path,
    size: int | None = None,
    mirror: bool = False,
    prompts: Sequence[str] = (),
) -> Path:
    """Learns a word for a model from pictures; returns its file, which is written at each checkpoint.

    The model knows the word afterwards. size: side in pixels of a square with the pictures' area; None means
    the model's own. mirror: shows each picture mirrored as well. prompts: of a sheet at each checkpoint.
    Raises RecipeError for a word that the model knows already, and what `optimise` raises.
    """
    folder, out, word = Path(folder), Path(out), training.word
    made_of = {
        "base model": "".join(digest(pipe.models[part].state_dict()) for part in ("clip", "diffusion")),
        "word": f"{word} {training.vectors}",
    }
    new_word(pipe.tokenizer, training)
    teach(pipe, Embedding(word, first_vectors(pipe, training), str(out)))
    pictures = Pictures(
        pictures._encoded, [replace(item, captions=with_word(item.captions, word)) for item in pictures.items]
    )
    made_of |= {"VAE": digest(pipe.models["encoder"].state_dict()), "data": pictures.digest()}
    unchanged(folder / "checkpoint.pt", made_of, training.loop.allow_changes)
    with processes().main_process_first():  # the others then find the encoded latents
        data = cache_latents(
            cast("Encoder", pipe.models["encoder"]),
            pictures,
            size or pipe.config.size,
            folder / "latents",
            tokenizer=pipe.tokenizer,
            mirror=mirror,
            patch=pipe.config.unet.patch,
            holes=HOLES if pipe.config.inpaints else 0,
        )
    with torch.device("meta"):  # an empty shell, without memory, for the networks of `pipe`
        model = TextToImage(pipe.config)
    model.clip, model.diffusion = pipe.models["clip"], pipe.models["diffusion"]  # type: ignore[assignment]
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    learned = Learned(model.float().clip.embedding.token, training.vectors)
    schedule, seed = pipe.config.schedule, training.loop.seed
    watch = Watch(forward_process(schedule), training.batch, seed, prompts)
    name = "clip.embedding.token.vectors"

    def keep(step: int, average: dict[str, Tensor]) -> None:
        every = training.loop.keep_every
        found = Embedding(word, average[name].detach().cpu())
        save_embedding(found, out)
        if every and step and step % every == 0:
            save_embedding(found, out.with_stem(f"{out.stem}-{step:06d}"))

    def look(step: int, average: dict[str, Tensor]) -> Seen:
        now = learned.vectors.data
        learned.vectors.data = average[name].to(now)
        try:
            return watch.look(model.eval(), pipe)
        finally:
            learned.vectors.data = now
            model.train()

    model.requires_grad_(False)
    model.clip.embedding.token = learned  # type: ignore[assignment]
    try:
        empty = torch.tensor(pipe.tokenizer.encode(""))
        average = optimise(model.train(), data, empty, schedule, training, folder, look, made_of, keep=keep)
        learned.vectors.data = average[name]
    finally:
        table = torch.cat([learned.frozen, learned.vectors.detach()])
        model.clip.embedding.token = nn.Embedding.from_pretrained(table, freeze=False)
        model.eval().requires_grad_(True)
        for each, parameter in model.named_parameters():
            parameter.data = parameter.data.to(dtypes[each])
    return out


def new_word(tokenizer: Any, training: InversionTraining) -> None:
    """Raises RecipeError for a word that cannot be learned, such as one that is known."""
    first = tokenizer.vocab_size
    try:
        inversion.with_word(tokenizer, training.word, range(first, first + training.vectors))
    except ValueError as error:
        raise RecipeError(f"word cannot be {training.word!r}: {error}") from None


def first_vectors(pipe: StableDiffusion, training: InversionTraining) -> Tensor:
    """The vectors before training, (n, width): those of `begin`, in turn, or of no word at all."""
    table = cast(CLIP, pipe.models["clip"]).embedding.token.weight.detach().float().cpu()
    ids = pipe.tokenizer.tokenize(training.begin)
    centre, spread = table.mean(0), table.std()
    known = table[ids] if ids else centre[None]
    vectors = known[torch.arange(training.vectors) % len(known)].clone()
    # Otherwise several that begin alike would stay alike.
    return vectors + 0.1 * spread * normal(vectors.shape, rng(training.loop.seed, 0))


def with_word(captions: Sequence[str], word: str) -> tuple[str, ...]:
    """Returns the captions that have the word, or else others that do."""
    own = tuple(caption for caption in captions if word.lower() in caption.lower())
    return own or tuple(template.format(word) for template in TEMPLATES)
