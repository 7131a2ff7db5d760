"""The judge: it looks at a picture and says which of several names fits it best, how it is drawn, and where.

It is CLIP's idea at a small size: a network for pictures and one for words map things that belong together to
nearby points. The judge learns from all the real drawings, by all hands, those that the mini never sees
included, in every style and place; and from parts of them, for an eye, a wheel or a string should be as it is
in drawings. It is judged itself: it first learns without one drawing of every subject, and `Judge.unseen`
counts those it can name.

Source: Radford et al. 2021, "Learning transferable visual models from natural language supervision", §2.3.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
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

from reifusion.files import whole
from reifusion.train.loop import BatchPart, LoopConfig, train
from reifusion.train.mini.captions import MEDIA, Scene
from reifusion.train.mini.compose import Specs, compose_scenes
from reifusion.train.mini.library import Library, Sprite, default_cache, read_library
from reifusion.train.mini.places import PLACES
from reifusion.train.mini.render import render
from reifusion.train.mini.styles import STYLES, premultiply

from .pixels import crop, middle, on_white, parts, to_images

MANNERS = (*MEDIA, *STYLES)  # how a picture may be drawn: by a hand, or in a style
NOWHERE = len(PLACES)  # the number of a picture that is in no place


@dataclass(frozen=True)
class JudgeTraining:
    """Everything that decides a judge, beside the pictures; a change trains a new one."""

    side: int = 96  # of the crop around the foreground, its input
    channels: tuple[int, ...] = (64, 128, 256)  # one per resolution, from side / 4 down
    width: int = 256  # of its features
    joint: int = 128  # the width of the space that pictures and words share
    scenes: int = 3  # for every drawing
    batch: int = 64  # subjects per step, each with one picture
    parts: int = 32  # further subjects per step, each with a part of a drawing; there are 4 of every drawing
    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(
            steps=3_000, lr=2e-3, warmup=100, decay=0.6, ema=0.995, weight_decay=0.05, checkpoint_minutes=2
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


class Touch(nn.Module):
    """Pictures (B, 3, side, side) -> a score for each of MANNERS. They show in small, anywhere: lines, rims, squares."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(nn.Conv2d(3, 32, 5, stride=2, padding=2), Block(32, 64), Block(64, 96))
        self.out = nn.Linear(96, len(MANNERS))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.silu(self.stages(x)).mean((2, 3)))


class DualEncoder(nn.Module):
    """Maps pictures and names into one space, and says of pictures how they are drawn and where."""

    def __init__(self, training: JudgeTraining, words: int):
        super().__init__()
        self.eye = Eye(training)
        self.shown = nn.Linear(training.width, training.joint)
        self.words = nn.Linear(words, training.joint, bias=False)  # a vector for each
        self.log_scale = nn.Parameter(torch.tensor(np.log(1 / 0.07), dtype=torch.float32))  # as in CLIP
        self.manner = Touch()
        self.place = nn.Linear(training.width, len(PLACES) + 1)

    def forward(self, x: Tensor, names: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pictures x (B, 3, side, side), N names as in `bags` -> (B, joint), (N, joint), and two scores.

        The pictures' vectors have the length s = 1 / temperature, and the names' vectors have length 1.
        """
        features, shown = self.look(x)
        scale = self.log_scale.exp().clamp(max=100)
        return scale * shown, self.read(names), self.manner(x), self.place(features)

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


def contrastive_loss(shown: Tensor, names: Tensor) -> tuple[Tensor, dict[str, float | Tensor]]:
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
    manners: list[str]  # one of MANNERS
    places: list[str]  # one of PLACES, or ""


@dataclass
class Judge:
    """A trained dual encoder and the names that it chooses from."""

    model: DualEncoder
    side: int
    subjects: list[str]
    id: str
    # Look -> how many unseen drawings the judge named right among 20, and how many there were.
    unseen: dict[str, tuple[int, int]] = field(default_factory=dict)

    def see(self, images: Sequence[np.ndarray], outside: bool = False) -> Seen:
        """Looks at pictures (H, W, 3) uint8 of any size: at the foreground, or in a place, at the middle."""
        return self._see([(middle if outside else crop)(image, self.side) for image in images])

    def see_parts(self, images: Sequence[np.ndarray], count: int = 4) -> Tensor:
        """Looks at the parts of each picture with most to see -> cosines (N, count, subjects)."""
        windows = [part for image in images for part in parts(image, self.side, count)]
        return self._see(windows).subjects.view(len(images), count, -1)

    @torch.inference_mode()
    def _see(self, views: Sequence[np.ndarray]) -> Seen:
        x = as_input(np.stack(views))
        looked = [(*self.model.look(some), self.model.manner(some)) for some in x.split(64)]
        features, shown, manner = (torch.cat(part) for part in zip(*looked, strict=True))
        places = [*PLACES, ""]
        return Seen(
            features,
            shown @ self.model.read(bags(self.subjects)).T,
            [MANNERS[i] for i in manner.argmax(1).tolist()],
            [places[i] for i in self.model.place(features).argmax(1).tolist()],
        )


def choices(rng: np.random.Generator, subjects: int, right: list[int], among: int = 20) -> list[int]:
    """Draws the numbers of `among` subjects to choose from: the right ones, and others at random."""
    others = [i for i in rng.permutation(subjects).tolist() if i not in right]
    return sorted(right + others[: among - len(right)])


def retrieved(scores: Tensor, right: int, among: list[int]) -> bool:
    """True if the right subject has the highest of the scores (subjects,) among the subjects in `among`."""
    return among[int(scores[among].argmax())] == right


def as_input(images: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) in [-1, 1]"""
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    return (x.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def fingerprint(*modules: nn.Module) -> str:
    """Returns the SHA-256 of the networks' weights in float32."""
    sha = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            sha.update(name.encode())
            sha.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return sha.hexdigest()


# ---- training ---------------------------------------------------------------------------------------------


def get_judge(training: JudgeTraining = JudgeTraining(), cache_dir: Path | None = None) -> Judge:
    """The judge, from the cache or, once, by training it: twenty minutes of one core, and five to compose scenes.

    Training that was stopped is resumed. Raises DataError if the pictures are not available.
    """
    cache = cache_dir or default_cache()
    drawings = [(sprite.subject, sprite.hand) for sprite in read_library(pixels=False).sprites]
    made_of = json.dumps([asdict(training), drawings, MANNERS, list(PLACES)])
    id = hashlib.sha256(made_of.encode()).hexdigest()[:8]
    path = cache.parent / f"judge-{id}.safetensors"
    if not path.exists():
        print(f"training the judge, once; it will be kept in {path}", file=sys.stderr)
        folder = path.with_suffix("")
        save_judge(train_judge(read_library(), training, folder, id), path)
        shutil.rmtree(folder)
    return load_judge(path, training)


class Bank(NamedTuple):
    """What the judge learns from: N sprites, each in K scenes."""

    views: Tensor  # (N, K, s, s, 3) uint8: foregrounds, or the middles of pictures of places
    manners: Tensor  # (N, K)
    places: Tensor  # (N, K)
    parts: Tensor  # (N, 4, s, s, 3) uint8: parts of the drawings


def train_judge(library: Library, training: JudgeTraining, folder: Path, id: str) -> Judge:
    """Trains a judge on a library.

    It first learns without one drawing of every subject, names these drawings, and then learns them too.
    """
    sprites, subjects = library.sprites, library.subjects
    labels = torch.tensor([subjects.index(sprite.subject) for sprite in sprites])  # (N,)
    bank = _bank(library, training, folder)
    torch.manual_seed(training.loop.seed)
    model = DualEncoder(training, bags(subjects).shape[1]).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    judge = Judge(model, training.side, subjects, id)

    left_out = _one_of_each(sprites)
    _train(judge, bank, labels, ~left_out, training, folder / "without")
    chosen = left_out.nonzero()[:, 0]
    seen, rng = judge.see(on_white(library.pixels[chosen])), np.random.default_rng(0)
    for scores, n in zip(seen.subjects, chosen.tolist(), strict=True):
        subject, look = int(labels[n]), sprites[n].look
        right, of = judge.unseen.get(look, (0, 0))
        hit = retrieved(scores, subject, choices(rng, len(subjects), [subject]))
        judge.unseen[look] = right + hit, of + 1

    steps = round(training.more * training.loop.steps)
    rest = replace(training.loop, steps=steps, lr=training.loop.lr / 2, seed=training.loop.seed + 1)
    everything = torch.ones_like(left_out)
    _train(judge, bank, labels, everything, replace(training, loop=rest), folder / "all")
    return judge


def _one_of_each(sprites: Sequence[Sprite]) -> Tensor:
    """(N,) bool: of every subject with more than two drawings, one that its name decides."""
    of: dict[str, list[int]] = {}
    for i, sprite in enumerate(sprites):
        of.setdefault(sprite.subject, []).append(i)
    chosen = torch.zeros(len(sprites), dtype=torch.bool)
    for subject, places in of.items():
        if len(places) > 2:
            chosen[places[hashlib.sha256(f"judge/{subject}".encode()).digest()[0] % len(places)]] = True
    return chosen


def _bank(library: Library, training: JudgeTraining, folder: Path) -> Bank:
    """Composes scenes of every sprite, an eighth larger than the judge's input to leave room for shifts.

    The result is kept in the folder.
    """
    path, side, count = folder / "bank.safetensors", training.side * 9 // 8, training.scenes
    if path.exists():
        return Bank(**load_file(path))
    kinds = ("plain", "background", "dyed", "placed", "style", "style", "place")
    views, manners, places, pieces = [], [], [], []
    generator = torch.Generator().manual_seed(training.loop.seed)
    for start in tqdm(
        range(0, len(library.sprites), 16), desc="composing", unit="16 drawings", mininterval=10
    ):
        made: list[tuple[Specs, list[Scene]]] = []
        for i in range(start, min(start + 16, len(library.sprites))):
            for k in range(count):
                kind = kinds[(3 * i + k) % len(kinds)]
                specs, scenes = compose_scenes([library.sprites[i]], 4, [i * count + k], kind, "all")
                made.append((replace(specs, sprite=torch.tensor([[i, -1]])), scenes))
        specs = Specs(*(torch.cat([getattr(one, f.name) for one, _ in made]) for f in fields(Specs)))
        images = to_images(render(library.pixels, specs))
        for image, (_, (scene,)) in zip(images, made, strict=True):
            views.append((middle if scene.place else crop)(image, side))
            manners.append(MANNERS.index(scene.style or scene.look))
            places.append(list(PLACES).index(scene.place) if scene.place else NOWHERE)
        sprites = library.pixels[start : start + 16].repeat_interleave(4, 0)
        pieces += to_images(random_parts(sprites, side, generator))
    bank = Bank(
        torch.from_numpy(np.stack(views)).unflatten(0, (-1, count)),
        torch.tensor(manners).view(-1, count),
        torch.tensor(places).view(-1, count),
        torch.from_numpy(np.stack(pieces)).unflatten(0, (-1, 4)),
    )
    with whole(path) as temporary:
        save_file({name: x.contiguous() for name, x in bank._asdict().items()}, temporary)
    return bank


def _train(
    judge: Judge,
    bank: Bank,
    labels: Tensor,
    taken: Tensor,
    training: JudgeTraining,
    folder: Path,
) -> None:
    """On the drawings that are `taken` (N,) bool; labels (N,) are the numbers of their subjects."""
    of: dict[int, list[int]] = {}  # subject -> its drawings
    for n in taken.nonzero()[:, 0].tolist():
        of.setdefault(int(labels[n]), []).append(n)
    some, names = torch.tensor(list(of)), bags(judge.subjects)

    def objective(
        network: Callable[..., Any], done: float, generator: torch.Generator, part: BatchPart
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        # Different subjects, so that every other name in the batch is a wrong one.
        shown = some[torch.randperm(len(some), generator=generator)[: training.batch + training.parts]]
        which = torch.rand(len(shown), generator=generator).tolist()
        drawings = torch.tensor(
            [of[s][int(u * len(of[s]))] for s, u in zip(shown.tolist(), which, strict=True)]
        )
        entire, pieces = drawings[: training.batch], drawings[training.batch :]
        scenes = torch.randint(training.scenes, (len(entire),), generator=generator)
        which_part = torch.randint(4, (len(pieces),), generator=generator)
        seen = torch.cat([bank.views[entire, scenes], bank.parts[pieces, which_part]])
        x = augment(as_input(seen.numpy()), training.side, generator)
        unknown = torch.full((len(pieces),), -100)  # of a part, only the subject is asked
        manners, places = (
            torch.cat([numbers[entire, scenes], unknown]) for numbers in (bank.manners, bank.places)
        )
        pictures, of_batch, manner, place = network(part.of(x), part.of(names[shown]))
        loss, figures = contrastive_loss(pictures, of_batch)
        # All other names are wrong, too. That is more than CLIP could ask, and teaches faster.
        loss = loss + F.cross_entropy(pictures @ judge.model.read(names).T, part.of(shown))
        loss = loss + F.cross_entropy(manner.float(), part.of(manners))
        return loss + F.cross_entropy(place.float(), part.of(places)), figures

    judge.model.load_state_dict(train(judge.model, objective, training.loop, folder))
    judge.model.cpu().eval()


def augment(x: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """(B, 3, s, s) -> (B, 3, side, side): moved, turned, zoomed, recoloured; some blurred, some noisy."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(x), generator=generator)

    zoom, turn = uniform(0.85, 1.15), uniform(-0.12, 0.12)  # 0.12: 7 degrees
    theta = torch.stack([zoom * turn.cos(), -zoom * turn.sin(), uniform(-0.1, 0.1),
                         zoom * turn.sin(), zoom * turn.cos(), uniform(-0.1, 0.1)], 1)  # fmt: skip
    grid = F.affine_grid(theta.view(-1, 2, 3), [len(x), 3, side, side], align_corners=False)
    x = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
    # A third get their colour channels shuffled: dyed subjects must be known as well.
    order = torch.rand(len(x), 3, generator=generator).argsort(1)
    order = torch.where(uniform(0, 1)[:, None] < 0.33, order, torch.arange(3))
    x = torch.gather(x, 1, order[:, :, None, None].expand_as(x))
    coarse = F.interpolate(F.avg_pool2d(x, 2), size=(side, side), mode="bilinear", align_corners=False)
    x = torch.lerp(x, coarse, uniform(-1, 0.6).clamp(min=0)[:, None, None, None])  # most stay sharp
    x = x * uniform(0.9, 1.1)[:, None, None, None] + uniform(-0.05, 0.05)[:, None, None, None]
    noise = uniform(-0.05, 0.05).clamp(min=0)[:, None, None, None]
    return x + noise * torch.randn(x.shape, generator=generator)


def random_parts(sprites: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Sprites (B, 4, S, S) uint8 -> (B, 3, side, side) in [-1, 1]: a part of each on white, like `parts`."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(sprites), generator=generator)

    x = premultiply(sprites.float() / 255)
    x = x[:, :3] + 1 - x[:, 3:]  # (B, 3, S, S) on white
    zoom = uniform(0.33, 0.45)
    theta = torch.zeros(len(x), 2, 3)
    theta[:, 0, 0] = torch.where(uniform(0, 1) < 0.25, -zoom, zoom)  # mirrored, as in scenes
    theta[:, 1, 1] = zoom
    theta[:, :, 2] = torch.stack([uniform(-0.55, 0.55), uniform(-0.55, 0.55)], 1)
    grid = F.affine_grid(theta, [len(x), 3, side, side], align_corners=False)
    return F.grid_sample(x * 2 - 1, grid, padding_mode="border", align_corners=False)


# ---- on disk ----------------------------------------------------------------------------------------------


def save_judge(judge: Judge, path: Path) -> None:
    """Writes the weights, with everything else that belongs to a judge in the file's header."""
    about = {name: getattr(judge, name) for name in ("subjects", "id", "unseen")}
    weights = {name: weight.contiguous() for name, weight in judge.model.state_dict().items()}
    with whole(path) as temporary:
        save_file(weights, temporary, metadata={"judge": json.dumps(about)})


def load_judge(path: Path, training: JudgeTraining) -> Judge:
    """Reads the judge that `save_judge` wrote, if its training was the same."""
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["judge"])
    about["unseen"] = {look: (right, of) for look, (right, of) in about["unseen"].items()}
    model = DualEncoder(training, bags(about["subjects"]).shape[1])
    model.load_state_dict(load_file(path))
    return Judge(model.eval(), training.side, **about)
