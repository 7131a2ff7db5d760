"""The judge: it looks at a picture and says which of several names fits it best.

It is CLIP's idea at a small size: a network for pictures and one for words map things that belong together to
nearby points. The judge learns from the real pictures, including those that the mini never sees, and from
the look of generated pictures: other places and sizes, dyes, backgrounds, and the blur of a VAE. It is judged
itself: it first learns without one drawing of every subject, and `Judge.unseen` counts those it can name.

Source: Radford et al. 2021, "Learning transferable visual models from natural language supervision", §2.3.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from reifusion.api import load
from reifusion.model.pipeline import StableDiffusion
from reifusion.train.loop import BatchPart, LoopConfig, train
from reifusion.train.mini.scenes import SceneConfig, Sprites, can_be_dyed, compose
from reifusion.train.mini.sprites import (
    STYLES,
    SpriteRecord,
    default_cache,
    held_out_sprites,
    sprites_path,
    training_sprites,
)

from . import others
from .pixels import crop, on_white


@dataclass(frozen=True)
class JudgeTraining:
    """Everything that decides a judge, beside the pictures; a change trains a new one."""

    side: int = 64  # of the crop around the foreground, its input
    channels: tuple[int, ...] = (64, 128, 256)  # one per resolution, from side / 4 down
    width: int = 256  # of its features
    joint: int = 128  # the width of the space that pictures and words share
    scenes: int = 4  # scenes for every picture; one of them goes through the VAE
    batch: int = 64  # subjects per step, each with one picture
    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(
            steps=2_400, lr=2e-3, warmup=100, decay=0.6, ema=0.995, weight_decay=0.05, checkpoint_minutes=2
        )
    )
    more: float = 0.25  # a share of these steps follows at half the rate, with the drawings left out before


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

    def __init__(self, training: JudgeTraining):
        super().__init__()
        first, *_ = channels = training.channels
        stem = nn.Conv2d(3, first, 7, stride=4, padding=3)
        self.stages = nn.Sequential(stem, *(Block(*pair) for pair in pairwise(channels)))
        left = training.side // 2 ** (len(channels) + 1)
        self.layout = nn.Linear(channels[-1] * left * left, training.width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(x)  # (B, 3, side, side) -> (B, C, left, left)
        features = self.layout(F.silu(x).flatten(1))  # crops are centred, so a part's place means something
        return F.layer_norm(features.float(), features.shape[1:])


class DualEncoder(nn.Module):
    """Maps pictures and names into one space."""

    def __init__(self, training: JudgeTraining, words: int):
        super().__init__()
        self.eye = Eye(training)
        self.shown = nn.Linear(training.width, training.joint)
        self.words = nn.Linear(words, training.joint, bias=False)  # a vector for each
        self.log_scale = nn.Parameter(torch.tensor(np.log(1 / 0.07), dtype=torch.float32))  # as in CLIP

    def forward(self, x: Tensor, names: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures x (B, 3, side, side), N names as in `bags` -> (B, joint), (N, joint).

        The pictures' vectors have the length s = 1 / temperature, and the names' vectors have length 1.
        """
        return self.log_scale.exp().clamp(max=100) * self.look(x)[1], self.read(names)

    def look(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures (B, 3, side, side) -> features (B, width), unit vectors (B, joint)"""
        features = self.eye(x)
        return features, F.normalize(self.shown(features).float(), dim=-1)

    def read(self, names: Tensor) -> Tensor:
        """Names (N, words) -> unit vectors (N, joint): the sum of a name's words, since names are short."""
        return F.normalize(self.words(names).float(), dim=-1)


def bags(names: list[str]) -> Tensor:
    """N names -> (N, words) float32: how often each name contains each of the words that occur in them."""
    words = sorted({word for name in names for word in name.split()})
    return torch.tensor([[name.split().count(word) for word in words] for name in names]).float()


def contrastive_loss(shown: Tensor, names: Tensor) -> tuple[Tensor, dict[str, float]]:
    """The outputs of `DualEncoder` for B pictures of different subjects and of their names, (B, joint) both.

    Returns the loss, and figures for the log.
    """
    right = torch.arange(len(shown), device=shown.device)
    # Figure 3, Radford et al. 2021: s · I Tᵀ, right pairs on its diagonal, compared by rows and columns
    logits = shown @ names.T  # (B, B)
    # [infonce] Figure 3, Radford et al. 2021: the mean of −log softmax by rows and by columns
    value = (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2
    return value, {"right": (logits.argmax(1) == right).float().mean().item(), "samples": len(shown)}


# ---- the judge --------------------------------------------------------------------------------------------


class Seen(NamedTuple):
    """The judge's view of N pictures."""

    features: Tensor  # (N, width)
    subjects: Tensor  # (N, subjects): the cosine to each name


@dataclass
class Judge:
    """A trained dual encoder and the names that it chooses from."""

    model: DualEncoder
    side: int
    subjects: list[str]
    id: str
    vae: str  # the fingerprint of the VAE whose blur it has seen
    # Style -> how many unseen drawings the judge named right among 20, and how many there were.
    unseen: dict[str, tuple[int, int]] = field(default_factory=dict)

    @torch.inference_mode()
    def see(self, images: Sequence[np.ndarray]) -> Seen:
        """Pictures (H, W, 3) uint8 of any size -> features and cosines. Only the foreground counts."""
        parts = []
        for start in range(0, len(images), 64):
            crops = np.stack([crop(image, self.side) for image in images[start : start + 64]])
            parts.append(self.model.look(_as_input(torch.from_numpy(crops))))
        features, shown = (torch.cat(part) for part in zip(*parts))
        return Seen(features, shown @ self.model.read(bags(self.subjects)).T)


def choices(rng: np.random.Generator, subjects: int, right: list[int], among: int = 20) -> list[int]:
    """Draws the numbers of `among` subjects to choose from: the right ones, and others at random."""
    others = [i for i in rng.permutation(subjects).tolist() if i not in right]
    return sorted(right + others[: among - len(right)])


def retrieved(scores: Tensor, right: int, among: list[int]) -> bool:
    """True if the right subject has the highest of the scores (subjects,) among the subjects in `among`."""
    return among[int(scores[among].argmax())] == right


def _as_input(pixels: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) in [-1, 1]"""
    return (pixels.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


# ---- the VAE ----------------------------------------------------------------------------------------------


def fingerprint(*modules: nn.Module) -> str:
    """Returns the SHA-256 of the networks' weights in float32."""
    sha = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            sha.update(name.encode())
            sha.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return sha.hexdigest()


def through_vae(
    pipe: StableDiffusion, images: Sequence[np.ndarray], noise: float = 0.0, seed: int = 0
) -> list[np.ndarray]:
    """Encodes and decodes pictures (H, W, 3) uint8.

    noise: in between, the latents of each picture get Gaussian noise of up to this standard deviation.
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


def get_judge(training: JudgeTraining = JudgeTraining(), cache_dir: Path | None = None) -> Judge:
    """The judge, from the cache or, once, by training it: ten minutes on 2 cores.

    Training that was stopped is resumed. Another VAE needs no other judge. Raises DataError if the pictures
    are not available.
    """
    cache = cache_dir or default_cache()
    made_of = json.dumps([asdict(training), sprites_path(cache).name, others.PACKAGES])
    id = hashlib.sha256(made_of.encode()).hexdigest()[:8]
    path = cache.parent / f"judge-{id}.safetensors"
    if not path.exists():
        print(f"training the judge, once; it will be kept in {path}", file=sys.stderr)
        folder = path.with_suffix("")
        pixels, records = all_pictures(cache_dir)
        more = others.other_pictures([picture.subject for picture in records], cache_dir)
        pixels, records = np.concatenate([pixels, more[0]]), records + more[1]
        save_judge(train_judge(pixels, records, load("mini"), training, folder, id), path)
        shutil.rmtree(folder)
    return load_judge(path, training)


def all_pictures(cache_dir: Path | None = None) -> tuple[np.ndarray, list[SpriteRecord]]:
    """Those to train on, and then those held out."""
    trained, held_out = training_sprites(cache_dir), held_out_sprites(cache_dir)
    return np.concatenate([trained[0], held_out[0]]), trained[1] + held_out[1]


def train_judge(
    pixels: np.ndarray,
    records: list[SpriteRecord],
    pipe: StableDiffusion,
    training: JudgeTraining,
    folder: Path,
    id: str,
) -> Judge:
    """Trains a judge on sprites (N, 128, 128, 4) uint8 and the records of what they show.

    It first learns without one drawing of every subject, names these drawings, and then learns them too.
    """
    subjects = list(dict.fromkeys(p.subject for p in records))
    labels = torch.tensor([subjects.index(p.subject) for p in records])  # (N,)
    bank = _bank(pixels, records, pipe, training, folder)
    torch.manual_seed(training.loop.seed)
    model = DualEncoder(training, bags(subjects).shape[1]).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    vae = fingerprint(pipe.models["encoder"], pipe.models["decoder"])
    judge = Judge(model, training.side, subjects, id, vae)

    left_out = _one_of_each(records)
    _train(judge, bank, labels, ~left_out, training, folder / "without")
    chosen = left_out.nonzero()[:, 0].tolist()
    seen, rng = judge.see([on_white(pixels[n]) for n in chosen]), np.random.default_rng(0)
    for scores, n in zip(seen.subjects, chosen, strict=True):
        subject, style = int(labels[n]), records[n].style
        right, of = judge.unseen.get(style, (0, 0))
        hit = retrieved(scores, subject, choices(rng, len(subjects), [subject]))
        judge.unseen[style] = right + hit, of + 1

    steps = round(training.more * training.loop.steps)
    rest = replace(training.loop, steps=steps, lr=training.loop.lr / 2, seed=training.loop.seed + 1)
    _train(judge, bank, labels, torch.ones_like(left_out), replace(training, loop=rest), folder / "all")
    return judge


def _one_of_each(records: list[SpriteRecord]) -> Tensor:
    """(N,) bool: of every subject that has several drawings in the mini's styles, one that its name decides."""
    of: dict[str, list[int]] = {}
    for i, picture in enumerate(records):
        if picture.style in STYLES:
            of.setdefault(picture.subject, []).append(i)
    chosen = torch.zeros(len(records), dtype=torch.bool)
    for subject, places in of.items():
        if len(places) > 1:
            chosen[places[hashlib.sha256(f"judge/{subject}".encode()).digest()[0] % len(places)]] = True
    return chosen


def _bank(
    pixels: np.ndarray,
    records: list[SpriteRecord],
    pipe: StableDiffusion,
    training: JudgeTraining,
    folder: Path,
) -> Tensor:
    """N sprites -> (N, scenes, s, s, 3) uint8: the foregrounds of scenes, scene 0 through the VAE.

    s is an eighth more than the judge's input, to leave room for shifts. The result is kept in the folder.
    """
    path, side = folder / "bank.safetensors", training.side * 9 // 8
    if path.exists():
        return load_file(path)["bank"]
    folder.mkdir(parents=True, exist_ok=True)
    rows, whole = [], []
    for i, picture in enumerate(tqdm(records, desc="composing", unit="picture", mininterval=10)):
        # `compose` knows the mini's styles only; the caption, which names the style, is not used.
        one = Sprites(pixels[i : i + 1], [replace(picture, style="3d")])
        dyed = 0.3 * can_be_dyed(picture)
        shares = {"plain": 0.55 - dyed, "background": 0.25, "dyed": dyed, "placed": 0.2, "two": 0.0}
        config = SceneConfig(**shares, combine=0.1, name_style=1, mirror=0.3)
        images = [
            compose(np.random.default_rng([4, i, k]), one, config).image for k in range(training.scenes)
        ]
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
    judge: Judge, bank: Tensor, labels: Tensor, taken: Tensor, training: JudgeTraining, folder: Path
) -> None:
    """On the pictures that are `taken` (N,) bool; labels (N,) are the numbers of their subjects."""
    of: dict[int, list[int]] = {}  # subject -> its pictures
    for n in taken.nonzero()[:, 0].tolist():
        of.setdefault(int(labels[n]), []).append(n)
    some, names = torch.tensor(list(of)), bags(judge.subjects)

    def objective(
        network: Callable[..., Any], step: int, generator: torch.Generator, part: BatchPart
    ) -> tuple[Tensor, dict[str, float]]:
        # Different subjects, so that every other name in the batch is a wrong one.
        shown = some[torch.randperm(len(some), generator=generator)[: training.batch]]
        which = torch.rand(len(shown), generator=generator)
        places = torch.tensor([of[s][int(u * len(of[s]))] for s, u in zip(shown.tolist(), which.tolist())])
        scenes = torch.randint(training.scenes, (len(shown),), generator=generator)
        x = augment(_as_input(bank[places, scenes]), training.side, generator)
        return contrastive_loss(*network(part.of(x), part.of(names[shown])))

    judge.model.load_state_dict(train(judge.model, objective, training.loop, folder))
    judge.model.cpu().eval()


def augment(x: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """(B, 3, s, s) -> (B, 3, side, side): moved, turned, zoomed and lit; some also blurred, some noisy."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(x), generator=generator)

    zoom, turn = uniform(0.85, 1.15), uniform(-0.12, 0.12)  # 0.12: 7 degrees
    theta = torch.stack([zoom * turn.cos(), -zoom * turn.sin(), uniform(-0.1, 0.1),
                         zoom * turn.sin(), zoom * turn.cos(), uniform(-0.1, 0.1)], 1)  # fmt: skip
    grid = F.affine_grid(theta.view(-1, 2, 3), [len(x), 3, side, side], align_corners=False)
    x = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
    coarse = F.interpolate(F.avg_pool2d(x, 2), size=(side, side), mode="bilinear", align_corners=False)
    blur = uniform(-1, 0.6).clamp(min=0)[:, None, None, None]  # most stay sharp
    x = torch.lerp(x, coarse, blur)
    x = x * uniform(0.9, 1.1)[:, None, None, None] + uniform(-0.05, 0.05)[:, None, None, None]
    noise = uniform(-0.05, 0.05).clamp(min=0)[:, None, None, None]
    return x + noise * torch.randn(x.shape, generator=generator)


# ---- on disk ----------------------------------------------------------------------------------------------


def save_judge(judge: Judge, path: Path) -> None:
    """Writes the weights, with everything else that belongs to a judge in the file's header."""
    about = {name: getattr(judge, name) for name in ("subjects", "id", "vae", "unseen")}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    weights = {name: weight.contiguous() for name, weight in judge.model.state_dict().items()}
    save_file(weights, temporary, metadata={"judge": json.dumps(about)})
    os.replace(temporary, path)


def load_judge(path: Path, training: JudgeTraining) -> Judge:
    """Reads the judge that `save_judge` wrote, if its training was the same."""
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["judge"])
    about["unseen"] = {style: (right, of) for style, (right, of) in about["unseen"].items()}
    model = DualEncoder(training, bags(about["subjects"]).shape[1])
    model.load_state_dict(load_file(path))
    return Judge(model.eval(), training.side, **about)
