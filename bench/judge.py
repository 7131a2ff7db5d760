"""The judge: it looks at a picture and says which of some names fits it best.

CLIP's idea at a small size: a network for pictures and one for words send what belongs together to nearby
points. It learns from the real pictures, those included that the mini is never shown, and from what generated
pictures look like: other places and sizes, dyes, backgrounds, and the blur of the mini's own VAE. And it is
judged itself: `Judge.unseen` says how well the same network names drawings that it was not trained on.

Source: Radford et al. 2021, "Learning transferable visual models from natural language supervision", §2.3.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from reifusion.model.clip import CLIP, Tokenizer
from reifusion.model.config import CLIPConfig
from reifusion.model.pipeline import StableDiffusion, load
from reifusion.train.bpe import train_bpe
from reifusion.train.data import STYLES, Picture, default_cache, held_out_pictures, pictures, prepared_path
from reifusion.train.loop import LoopConfig, Part, train
from reifusion.train.scenes import SceneConfig, Sprites, can_be_dyed, compose

from .pixels import crop


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a judge; a change trains a new one."""

    side: int = 64  # of what it looks at: a crop around the foreground
    channels: tuple[int, ...] = (32, 64, 128, 256)  # one per resolution, from side / 2 down
    width: int = 256  # of its features
    joint: int = 128  # of the space that pictures and words share
    clip: CLIPConfig = field(
        default_factory=lambda: CLIPConfig(vocab_size=2048, context_length=12, width=128, layers=2, heads=2)
    )
    scenes: int = 4  # of every picture; one of them goes through the VAE
    batch: int = 64  # subjects a step, each with one picture
    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(
            steps=1_500, lr=2e-3, warmup=100, decay=0.6, ema=0.995, weight_decay=0.05, checkpoint_minutes=2
        )
    )


# ---- the two networks -------------------------------------------------------------------------------------


class Block(nn.Module):
    """Half the resolution, then one residual block: (B, C, H, W) -> (B, C', H/2, W/2)"""

    def __init__(self, before: int, now: int):
        super().__init__()
        self.down = nn.Conv2d(before, now, 3, stride=2, padding=1)
        self.norm_1, self.norm_2 = nn.GroupNorm(8, now), nn.GroupNorm(8, now)
        self.conv_1, self.conv_2 = nn.Conv2d(now, now, 3, padding=1), nn.Conv2d(now, now, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        h = self.conv_1(F.silu(self.norm_1(x)))
        return x + self.conv_2(F.silu(self.norm_2(h)))


class Eye(nn.Module):
    """Pictures (B, 3, side, side) in [-1, 1] -> features (B, width), each with mean 0 and variance 1."""

    def __init__(self, recipe: Recipe):
        super().__init__()
        pairs = zip((3, *recipe.channels), recipe.channels)
        self.blocks = nn.ModuleList(Block(before, now) for before, now in pairs)
        left = recipe.side // 2 ** len(recipe.channels)
        self.layout = nn.Linear(recipe.channels[-1] * left * left, recipe.width)
        self.texture = nn.Linear(sum(recipe.channels), recipe.width)

    def forward(self, x: Tensor) -> Tensor:
        means = []
        for block in self.blocks:
            x = block(x)  # (B, C, H, W) -> (B, C', H/2, W/2)
            means.append(F.silu(x).mean((2, 3)))
        # What a thing is shows in where its parts are, as crops are centred; a style is the same all over.
        features = self.layout(F.silu(x).flatten(1)) + self.texture(torch.cat(means, 1))  # (B, width)
        return F.layer_norm(features.float(), features.shape[-1:])


class DualEncoder(nn.Module):
    """Pictures and names into one space, once for what is shown and once for the style it is drawn in."""

    def __init__(self, recipe: Recipe):
        super().__init__()
        self.eye, self.clip = Eye(recipe), CLIP(recipe.clip)
        self.subject = nn.Linear(recipe.width, recipe.joint)
        self.style = nn.Linear(recipe.width, recipe.joint)
        self.name = nn.Linear(recipe.clip.width, recipe.joint)
        self.log_scale = nn.Parameter(torch.tensor(np.log(1 / 0.07), dtype=torch.float32))  # as in CLIP

    def forward(self, x: Tensor, tokens: Tensor, ends: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures x (B, 3, side, side) and N names, see `names` -> two times (B, joint), and (N, joint).

        The pictures' vectors, for subject and style, have the length s = 1 / temperature, the names' have 1.
        """
        features, scale = self.eye(x), self.log_scale.exp().clamp(max=100)
        shown, drawn = (_unit(project(features)) for project in (self.subject, self.style))
        return scale * shown, scale * drawn, self.names(tokens, ends)

    def names(self, tokens: Tensor, ends: Tensor) -> Tensor:
        """Tokens (N, L) -> unit vectors (N, joint), read where the text ends (N,), as CLIP does."""
        words = self.clip(tokens)  # (N, L) -> (N, L, width)
        return _unit(self.name(words[torch.arange(len(tokens), device=tokens.device), ends]))


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x.float(), dim=-1)


def loss(shown: Tensor, drawn: Tensor, names: Tensor, styles: Tensor) -> tuple[Tensor, dict[str, float]]:
    """What `DualEncoder` makes of B pictures of different subjects, of their B names and all names of styles.

    styles: (B,), the number of each picture's style. Returns the loss, and its parts for the log.
    """
    count = len(shown)
    right = torch.arange(count, device=shown.device)
    # Figure 3, Radford et al. 2021: s · I Tᵀ, right pairs on its diagonal, compared by rows and columns
    logits = shown @ names[:count].T  # (B, B)
    # [infonce] Figure 3, Radford et al. 2021: the mean of −log softmax by rows and by columns
    subject = (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2
    # A style is that of many pictures at once, so only from picture to word.
    style = F.cross_entropy(drawn @ names[count:].T, styles)
    hits = (logits.argmax(1) == right).float().mean()
    figures = {"subject": subject.item(), "style": style.item(), "hits": hits.item(), "samples": count}
    return subject + style, figures


# ---- the judge --------------------------------------------------------------------------------------------


class Seen(NamedTuple):
    """What the judge makes of N pictures."""

    features: Tensor  # (N, width)
    subjects: Tensor  # (N, subjects): the cosine to each name
    styles: Tensor  # (N, styles)


@dataclass
class Judge:
    """A trained dual encoder and the names that it chooses from."""

    model: DualEncoder
    tokenizer: Tokenizer
    subjects: list[str]
    styles: list[str]
    side: int
    unseen: dict[str, tuple[int, int]]  # "subject", "style" -> right, of: on drawings it was not trained on
    id: str

    @torch.inference_mode()
    def see(self, images: Sequence[np.ndarray]) -> Seen:
        """Pictures (H, W, 3) uint8 of any size -> features and cosines. It looks at the foreground only."""
        names = self.model.names(*_tokens(self.tokenizer, self.subjects + self.styles))
        parts = []
        for start in range(0, len(images), 64):
            crops = np.stack([crop(image, self.side) for image in images[start : start + 64]])
            parts.append(self.model.eye(_as_input(torch.from_numpy(crops))))
        features = torch.cat(parts)
        shown, drawn = _unit(self.model.subject(features)), _unit(self.model.style(features))
        count = len(self.subjects)
        return Seen(features, shown @ names[:count].T, drawn @ names[count:].T)


def _tokens(tokenizer: Tokenizer, names: list[str]) -> tuple[Tensor, Tensor]:
    """N names -> their tokens (N, L), and where each ends (N,): at the first end token."""
    tokens = torch.tensor([tokenizer.encode(name) for name in names])
    return tokens, (tokens == tokenizer.end).int().argmax(1)


def _as_input(pixels: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) in [-1, 1]"""
    return (pixels.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def fingerprint(*modules: nn.Module) -> str:
    """SHA-256 of the networks' weights, in float32."""
    sha = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            sha.update(name.encode())
            sha.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return sha.hexdigest()


def through_vae(
    pipe: StableDiffusion, images: Sequence[np.ndarray], noise: float = 0.0, seed: int = 0
) -> list[np.ndarray]:
    """Pictures (H, W, 3) uint8, encoded and decoded again.

    noise: in between, each one's latents get Gaussian noise of up to this standard deviation.
    """
    back = []
    for start in tqdm(range(0, len(images), 16), desc="through the VAE", unit="16 pictures", mininterval=10):
        x = _as_input(torch.from_numpy(np.stack(images[start : start + 16])))
        z = pipe.encode_image(x)  # (16, 3, H, W) -> (16, 4, H/8, W/8)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + start)
        strength = noise * torch.rand((len(z), 1, 1, 1), generator=generator)
        z = z + strength * torch.randn(z.shape, generator=generator)
        back += [np.asarray(picture) for picture in pipe.decode(z)]
    return back


# ---- training ---------------------------------------------------------------------------------------------


def get_judge(recipe: Recipe = Recipe(), cache_dir: Path | None = None) -> Judge:
    """The judge, from the cache or, once, by training it: about a quarter of an hour on 2 cores.

    Training that was stopped goes on. Raises DataError where the pictures cannot be had.
    """
    cache = cache_dir or default_cache()
    pipe = load("mini")
    vae = fingerprint(pipe.models["encoder"], pipe.models["decoder"])
    made_of = [asdict(recipe), prepared_path(cache).name, vae]
    id = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:8]
    path = cache.parent / f"judge-{id}.safetensors"
    if not path.exists():
        print(f"training the judge, once; it will be kept in {path}", file=sys.stderr)
        folder = path.with_suffix("")
        judge = train_judge(*_all_pictures(cache_dir), pipe, recipe, folder, id)
        save_judge(judge, path)
        shutil.rmtree(folder)
    return load_judge(path, recipe)


def _all_pictures(cache_dir: Path | None) -> tuple[np.ndarray, list[Picture]]:
    trained, held_out = pictures(cache_dir), held_out_pictures(cache_dir)
    return np.concatenate([trained[0], held_out[0]]), trained[1] + held_out[1]


def train_judge(
    pixels: np.ndarray, records: list[Picture], pipe: StableDiffusion, recipe: Recipe, folder: Path, id: str
) -> Judge:
    """Sprites (N, 128, 128, 4) uint8 and what they show -> a judge trained on all of them.

    A second one is trained without one drawing of every subject, to learn what `Judge.unseen` says.
    """
    subjects, styles = list(dict.fromkeys(p.subject for p in records)), list(STYLES)
    merges = train_bpe(subjects + styles, recipe.clip.vocab_size - 2 * 256 - 2)
    tokenizer = Tokenizer(merges, recipe.clip.context_length)
    bank = _bank(pixels, records, pipe, recipe, folder)
    rows = [[subjects.index(p.subject), styles.index(p.style)] for p in records]
    labels = torch.tensor(rows)  # (N, 2)
    left_out = _one_of_each(records)
    few = _train(bank, labels, ~left_out, subjects, styles, tokenizer, recipe, folder / "without")
    judge = Judge(few, tokenizer, subjects, styles, recipe.side, {}, id)
    chosen = left_out.nonzero()[:, 0]
    seen = judge.see(list(bank[chosen, 0].numpy()))
    rng = np.random.default_rng(0)
    hits = [
        retrieved(seen.subjects[i], int(labels[n, 0]), choices(rng, len(subjects), [int(labels[n, 0])]))
        for i, n in enumerate(chosen)
    ]
    style_hits = seen.styles.argmax(1) == labels[chosen, 1]
    judge.unseen = {"subject": (sum(hits), len(hits)), "style": (int(style_hits.sum()), len(chosen))}
    everything = torch.ones(len(records), dtype=torch.bool)
    judge.model = _train(bank, labels, everything, subjects, styles, tokenizer, recipe, folder / "all")
    return judge


def choices(rng: np.random.Generator, subjects: int, right: list[int], among: int = 20) -> list[int]:
    """The numbers of `among` subjects to choose from: the right ones, and others at random."""
    others = [i for i in rng.permutation(subjects).tolist() if i not in right]
    return sorted(right + others[: among - len(right)])


def retrieved(scores: Tensor, right: int, among: list[int]) -> bool:
    """Whether, of the subjects in `among`, the right one has the highest of the scores (subjects,)."""
    return among[int(scores[among].argmax())] == right


def _one_of_each(records: list[Picture]) -> Tensor:
    """(N,) bool: one picture of every subject that has several, in a style that its name decides."""
    of: dict[str, list[int]] = {}
    for i, picture in enumerate(records):
        of.setdefault(picture.subject, []).append(i)
    chosen = torch.zeros(len(records), dtype=torch.bool)
    for subject, places in of.items():
        if len(places) > 1:
            chosen[places[hashlib.sha256(f"judge/{subject}".encode()).digest()[0] % len(places)]] = True
    return chosen


def _bank(
    pixels: np.ndarray, records: list[Picture], pipe: StableDiffusion, recipe: Recipe, folder: Path
) -> Tensor:
    """N sprites -> (N, scenes, s, s, 3) uint8: the foregrounds of scenes, scene 0 through the VAE.

    s is an eighth more than the judge looks at, to leave room for shifts. Kept in the folder.
    """
    path, side = folder / "bank.safetensors", recipe.side * 9 // 8
    if path.exists():
        return load_file(path)["bank"]
    folder.mkdir(parents=True, exist_ok=True)
    rows, whole = [], []
    for i, picture in enumerate(tqdm(records, desc="composing", unit="picture", mininterval=10)):
        one, dyed = Sprites(pixels[i : i + 1], [picture]), 0.3 * can_be_dyed(picture)
        shares = {"plain": 0.55 - dyed, "background": 0.25, "dyed": dyed, "placed": 0.2, "two": 0.0}
        config = SceneConfig(**shares, combine=0.1, name_style=1, mirror=0.3)
        images = [compose(np.random.default_rng([4, i, k]), one, config).image for k in range(recipe.scenes)]
        whole.append(images[0])
        rows.append(np.stack([crop(image, side) for image in images]))
    bank = np.stack(rows)
    for i, image in enumerate(through_vae(pipe, whole, noise=0.3)):
        bank[i, 0] = crop(image, side)
    temporary = folder / f".bank.{os.getpid()}"
    save_file({"bank": torch.from_numpy(bank)}, temporary)
    os.replace(temporary, path)
    return torch.from_numpy(bank)


def _train(
    bank: Tensor,
    labels: Tensor,
    taken: Tensor,
    subjects: list[str],
    styles: list[str],
    tokenizer: Tokenizer,
    recipe: Recipe,
    folder: Path,
) -> DualEncoder:
    """On the pictures that are `taken` (N,) bool; labels (N, 2) are their subjects' and styles' numbers."""
    torch.manual_seed(recipe.loop.seed)
    model = DualEncoder(recipe).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    tokens, ends = _tokens(tokenizer, subjects + styles)
    style_names = torch.arange(len(subjects), len(tokens))
    of: list[list[int]] = [[] for _ in subjects]
    for n in taken.nonzero()[:, 0].tolist():
        of[int(labels[n, 0])].append(n)
    some = torch.tensor([s for s, places in enumerate(of) if places])  # subjects to train on

    def step_loss(
        network: Callable[..., Any], step: int, generator: torch.Generator, part: Part
    ) -> tuple[Tensor, dict[str, float]]:
        # Different subjects, so that every other name in the batch is a wrong one.
        shown = some[torch.randperm(len(some), generator=generator)[: recipe.batch]]
        which = torch.rand(len(shown), generator=generator)
        places = torch.tensor([of[s][int(u * len(of[s]))] for s, u in zip(shown.tolist(), which.tolist())])
        scenes = torch.randint(recipe.scenes, (len(shown),), generator=generator)
        x = augment(_as_input(bank[places, scenes]), recipe.side, generator)
        names = torch.cat([part.of(shown), style_names.to(part.device)]).cpu()
        words = tokens[names].to(part.device), ends[names].to(part.device)
        seen, drawn, named = network(part.of(x), *words)
        return loss(seen, drawn, named, part.of(labels[places, 1]))

    model.load_state_dict(train(model, step_loss, recipe.loop, folder))
    return model.cpu().eval()


def augment(x: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """(B, 3, s, s) -> (B, 3, side, side): moved, turned, zoomed, lit; some blurred, some noisy."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(x), generator=generator)

    zoom, turn = uniform(0.85, 1.15), uniform(-0.12, 0.12)  # 0.12: 7 degrees
    theta = torch.stack([zoom * turn.cos(), -zoom * turn.sin(), uniform(-0.1, 0.1),
                         zoom * turn.sin(), zoom * turn.cos(), uniform(-0.1, 0.1)], 1)  # fmt: skip
    grid = F.affine_grid(theta.view(-1, 2, 3), [len(x), 3, side, side], align_corners=False)
    x = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
    coarse = F.interpolate(F.avg_pool2d(x, 2), size=(side, side), mode="bilinear", align_corners=False)
    blur = uniform(-1, 0.7).clamp(min=0)[:, None, None, None]  # most stay sharp
    x = torch.lerp(x, coarse, blur)
    x = x * uniform(0.85, 1.1)[:, None, None, None] + uniform(-0.1, 0.1)[:, None, None, None]
    noise = uniform(-0.1, 0.1).clamp(min=0)[:, None, None, None]
    return x + noise * torch.randn(x.shape, generator=generator)


# ---- on disk ----------------------------------------------------------------------------------------------


def save_judge(judge: Judge, path: Path) -> None:
    """Writes the weights, with all else that a judge is in the file's header."""
    about = {"subjects": judge.subjects, "styles": judge.styles, "merges": judge.tokenizer.merges_text}
    about |= {"unseen": judge.unseen, "id": judge.id}  # type: ignore[dict-item]
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    weights = {name: weight.contiguous() for name, weight in judge.model.state_dict().items()}
    save_file(weights, temporary, metadata={"judge": json.dumps(about)})
    os.replace(temporary, path)


def load_judge(path: Path, recipe: Recipe) -> Judge:
    """What `save_judge` wrote, of the same recipe."""
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["judge"])
    model = DualEncoder(recipe)
    model.load_state_dict(load_file(path))
    tokenizer = Tokenizer(about["merges"], recipe.clip.context_length)
    unseen = {name: (right, of) for name, (right, of) in about["unseen"].items()}
    names = about["subjects"], about["styles"]
    return Judge(model.eval(), tokenizer, *names, recipe.side, unseen, about["id"])
