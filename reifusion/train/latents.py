"""Latents on disk: each picture goes through the VAE's encoder once, instead of once per step.

All pictures of a batch must have the same size, but few pictures are square. So there is a fixed handful of
sizes with about the same area, the buckets. Each picture is fitted to the bucket nearest to its shape, and
each batch comes from a single bucket.
Source: NovelAI 2022, "NovelAI Improvements on Stable Diffusion" (aspect ratio bucketing).

    folder/<hash of the encoder>/<width>x<height>/<hash of the pictures>.safetensors

Such a file holds μ and σ of up to 64 pictures, and their fingerprints. Another encoder has another folder,
and a changed picture has another fingerprint, so the cache encodes exactly the pictures that it lacks.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageOps
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..bar import Bar
from ..files import whole
from ..model.config import VAEConfig
from ..model.encoder import Encoder, sample, scale_latents
from ..model.inpaint import latent_mask
from ..model.pictures import to_tensor
from ..model.tokenizer import Tokenizer
from ..weights.writing import write_tensors
from .images import DataError, Item, Pictures, some

Size = tuple[int, int]  # width and height in pixels
PER_FILE = 64  # pictures in a file: no more than these are encoded again after a kill
HOLES = 4  # ways in which a part of a picture is hidden, where a model learns to inpaint
HOLE = "-hole-"  # and a number come last, for a picture of which a part is hidden
CROP = "-part-"  # and a number follow the fingerprint of a picture of which a random part was encoded
MIRRORED = "-mirrored"  # follows the fingerprint of a picture that was mirrored before it was encoded


# ---- buckets ----------------------------------------------------------------------------------------------


def buckets(area_side: int, step: int = 64, most: float = 2.0) -> list[Size]:
    """Returns the sizes for pictures of about area_side² pixels, from tall to wide.

    Both sides are multiples of `step`, no size has more than area_side² pixels, and no side is longer than
    `most` times the other. A size that fits into another one is left out. Raises ValueError if none is left.
    """
    if not 0 < step <= area_side or most < 1:
        raise ValueError(
            f"no bucket has {area_side}² pixels, sides in steps of {step} and a ratio up to {most}"
        )
    highest = {
        w: min(area_side**2 // w, int(most * w)) // step * step
        for w in range(step, int(most * area_side) + 1, step)
    }
    sizes = [(w, h) for w, h in highest.items() if h and w <= most * h]
    return [(w, h) for w, h in sizes if not any(w <= x and h <= y and (w, h) != (x, y) for x, y in sizes)]


def bucket_of(width: int, height: int, sizes: Sequence[Size]) -> Size:
    """Returns the bucket nearest in shape; twice as wide and twice as high are equally far from a square."""
    return min(sizes, key=lambda size: abs(math.log(width / height) - math.log(size[0] / size[1])))


# ---- the cache --------------------------------------------------------------------------------------------


class StoredLatents(NamedTuple):
    """Where the latents of one picture are."""

    mean: Tensor  # μ of all n pictures in the file, (n, 4, h, w) fp16
    std: Tensor  # σ of the same pictures
    number: int  # of the picture in the file
    file: Path
    hidden: tuple[tuple[StoredLatents, Tensor], ...] = ()  # with a part hidden, and which, (1, h, w)


def cache_latents(
    encoder: Encoder,
    pictures: Pictures,
    size: int,
    folder: Path,
    *,
    tokenizer: Tokenizer,
    mirror: bool = False,
    step: int | None = None,
    batch: int = 8,
    patch: int = 1,
    crops: int = 1,
    holes: int = 0,
) -> LatentData:
    """Returns the latents of all pictures; encodes those that `folder` lacks, and resumes after a kill.

    A picture is scaled to cover its bucket, and cropped evenly on both sides. size: side in pixels of a
    square with the buckets' area. mirror: adds every picture mirrored. crops: if more than 1, so many parts
    of each picture are taken at random in place of its middle. holes: for models that inpaint, in how many
    ways a random part of each is hidden. step: see `buckets`; None means an
    eighth of `size`. batch: pictures to encode at a time. patch: that of the U-Net.

    One warning names the pictures that cannot be read, those that are enlarged, and those whose captions are
    cut. Raises DataError if no picture is left, the latents are not finite or the folder cannot be written.
    """
    factor = encoder.config.factor * patch
    step = max(factor, size // 8 // factor * factor) if step is None else step
    if step <= 0 or step % factor or step > size:
        raise DataError(f"the step of the buckets must be a multiple of {factor} up to {size}, not {step}")
    sizes = buckets(size, step)
    home = folder / weights_hash(encoder)
    wanted: dict[Size, list[tuple[str, int]]] = {shape: [] for shape in sizes}  # fingerprint, number
    hidden: dict[Size, dict[str, int]] = {shape: {} for shape in sizes}
    broken: set[int] = set()
    small, long = [], []
    for i, item in enumerate(pictures.items):
        shape = bucket_of(item.width, item.height, sizes)
        if item.width < shape[0] or item.height < shape[1]:
            small.append(item.name)
        if abs(math.log(item.width * shape[1] / item.height / shape[0])) > math.log(2):
            long.append(item.name)
        try:
            key = pictures.fingerprint(i)
            parts = [f"{key}{CROP}{k}" for k in range(crops)] if crops > 1 else [key]
            parts += [part + MIRRORED for part in parts] if mirror else []
            hidden[shape] |= {f"{part}{HOLE}{k}": i for part in parts for k in range(holes)}
            wanted[shape] += [(part, i) for part in parts] * item.repeats
        except DataError:
            broken.add(i)

    stored = {shape: _stored(_folder(home, shape)) for shape in sizes}
    # As a dict, so that two copies of a picture are encoded once.
    missing = {
        shape: {k: i for k, i in [*wanted[shape], *hidden[shape].items()] if k not in stored[shape]}
        for shape in sizes
    }
    count = sum(map(len, missing.values()))
    with Bar(total=count, desc="encoding", unit="picture", disable=not count) as bar:
        for shape in sizes:
            entries = iter(missing[shape].items())
            while chunk := list(islice(entries, PER_FILE)):
                _encode(encoder, pictures, chunk, shape, _folder(home, shape), batch, bar)
    for shape in sizes:
        if missing[shape]:
            stored[shape] = _stored(_folder(home, shape))
        broken |= {i for key, i in wanted[shape] if key not in stored[shape]}

    def entry(shape: Size, key: str, i: int) -> tuple[StoredLatents, int]:
        names = [f"{key}{HOLE}{k}" for k in range(holes)]
        factor = encoder.config.factor
        around = [(stored[shape][name], latent_mask(hole(name, shape), factor)[0]) for name in names]
        return stored[shape][key]._replace(hidden=tuple(around)), i

    found = {s: [entry(s, key, i) for key, i in wanted[s] if i not in broken] for s in sizes}
    if not any(found.values()):
        raise DataError(f"none of the {len(pictures)} pictures can be read")
    data = LatentData(found, pictures.items, tokenizer, encoder.config)
    problems = [
        f"{len(names)} of {len(pictures)} pictures {what}: {some(names)}"
        for names, what in (
            ([pictures.items[i].name for i in sorted(broken)], "cannot be read and are left out"),
            (small, f"are too small for an area of {size}×{size} pixels, and are enlarged"),
            (long, "are much longer than wide, so that more than half of each is cropped away"),
            (data.cut, f"have a caption of more than {tokenizer.context_length - 2} tokens, which is cut"),
        )
        if names
    ]
    if problems:
        warnings.warn("; ".join(problems), stacklevel=2)
    return data


def remove_unused(folder: Path, data: LatentData) -> int:
    """Deletes the files in `folder` that `data` does not use; returns their number."""
    unused = set(folder.glob("*/*x*/*.safetensors")) - data.files
    for file in unused:
        file.unlink()
    for path in [f.parent for f in unused] + [f.parent.parent for f in unused]:
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    return len(unused)


def weights_hash(encoder: Encoder) -> str:
    """Returns a hash of all weights, which names the encoder's folder."""
    digest = hashlib.blake2b(digest_size=8)
    for name, weight in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _folder(home: Path, shape: Size) -> Path:
    return home / f"{shape[0]}x{shape[1]}"


def _encode(
    encoder: Encoder,
    pictures: Pictures,
    chunk: list[tuple[str, int]],
    shape: Size,
    folder: Path,
    batch: int,
    bar: Bar,
) -> None:
    """Writes one file with the latents of `chunk`, without the pictures that cannot be read."""
    weight = encoder.conv_in.weight
    keys, means, stds = [], [], []
    for start in range(0, len(chunk), batch):
        pixels = []
        for key, i in chunk[start : start + batch]:
            try:
                picture = ImageOps.fit(
                    pictures[i][0], shape, Image.Resampling.LANCZOS, centering=_middle(key)
                )
            except DataError:
                continue
            mirrored = key.split(HOLE)[0].endswith(MIRRORED)
            seen = to_tensor(ImageOps.mirror(picture) if mirrored else picture)  # (1, 3, H, W)
            pixels.append(seen * (1 - hole(key, shape)) if HOLE in key else seen)
            keys.append(key)
        if pixels:
            with torch.inference_mode():
                mean, log_variance = encoder.moments(torch.cat(pixels).to(weight.device, weight.dtype))
            means.append(mean.half().cpu())  # (b, 4, H/8, W/8)
            stds.append(log_variance.float().mul(0.5).exp().half().cpu())
            if not (means[-1].isfinite().all() and stds[-1].isfinite().all()):
                raise DataError(
                    f"the VAE, in {weight.dtype}, gives latents that are not finite or above 65504"
                )
        bar.update(len(chunk[start : start + batch]))
    if keys:
        path = folder / f"{hashlib.blake2b(' '.join(keys).encode(), digest_size=8).hexdigest()}.safetensors"
        try:
            with whole(path) as temporary:
                tensors = {"mean": torch.cat(means).contiguous(), "std": torch.cat(stds).contiguous()}
                write_tensors(tensors, temporary, {"fingerprints": json.dumps(keys)})
        except (OSError, SafetensorError) as error:
            raise DataError(f"latents cannot be written to {folder}: {error}") from error


def _middle(key: str) -> tuple[float, float]:
    """Returns where the part to be encoded lies in a picture: 0 at the left or top, 1 at the other side."""
    part = key.split(HOLE)[0].removesuffix(MIRRORED)
    if CROP not in part:
        return 0.5, 0.5
    number = random.Random(part)
    return number.random(), number.random()


def hole(key: str, size: Size) -> Tensor:
    """What is to be drawn anew of a picture, (1, 1, H, W): 1 where it is hidden. The key alone decides it.

    A quarter are hidden as a whole, as for text to image; the others behind boxes and strokes.
    """
    (width, height), number = size, random.Random(key)
    if number.random() < 0.25:
        return torch.ones(1, 1, height, width)
    mask = Image.new("L", size)
    draw = ImageDraw.Draw(mask)
    for _ in range(number.randint(1, 3)):
        (x, y), (a, b) = ([number.uniform(0, side) for side in size] for _ in range(2))
        if number.random() < 0.5:
            draw.rectangle((min(x, a), min(y, b), max(x, a), max(y, b)), 255)
        else:
            points = [(x, y), (a, b), (number.uniform(0, width), number.uniform(0, height))]
            draw.line(points, 255, round(min(size) * number.uniform(0.1, 0.3)), "curve")
    return (to_tensor(mask) > 0).float()


def _stored(folder: Path) -> dict[str, StoredLatents]:
    """Fingerprint -> latents. The tensors are memory-mapped: they are read only when they are used."""
    found: dict[str, StoredLatents] = {}
    for path in sorted(folder.glob("[!.]*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                mean, std = file.get_tensor("mean"), file.get_tensor("std")
                keys = json.loads(file.metadata()["fingerprints"])
        except (SafetensorError, OSError):  # a damaged file is treated as missing
            continue
        found |= {key: StoredLatents(mean, std, number, path) for number, key in enumerate(keys)}
    return found


# ---- batches ----------------------------------------------------------------------------------------------


class LatentData:
    """Captioned latents to train on, in buckets; `len` counts pictures.

    found: for each bucket, its latents and the number of their picture in `items`.
    `.sizes`: width and height of a bucket in pixels -> its number of latents. `.empty`: tokens (L,) of "".
    """

    def __init__(
        self,
        found: dict[Size, list[tuple[StoredLatents, int]]],
        items: Sequence[Item],
        tokenizer: Tokenizer,
        config: VAEConfig,
    ):
        self._found, self._tokenizer = found, tokenizer
        self._buckets = [entries for entries in found.values() if entries]
        self._config, self._items = config, items
        self.device = torch.device("cpu")
        # Behind the latents' own channels: the mask, and what is left of the picture.
        self.beside = config.latent_channels + 1 if any(x.hidden for x, _ in self._all()) else 0
        self.sizes = {shape: len(entries) for shape, entries in found.items() if entries}
        self.files = {latents.file for latents, _ in self._all()}
        used = sorted({i for _, i in self._all()})
        room = tokenizer.context_length - 2
        # The names of the pictures whose captions are too long for the model.
        self.cut = [
            items[i].name
            for i in used
            if any(len(tokenizer.tokenize(caption)) > room for caption in items[i].captions)
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tokenizer's own, one for each long caption
            self._tokens = {i: torch.tensor([tokenizer.encode(c) for c in items[i].captions]) for i in used}
            self.empty = torch.tensor(tokenizer.encode(""))

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def captions(self) -> list[str]:
        """The captions of all pictures."""
        return [caption for i in self._tokens for caption in self._items[i].captions]

    def split(self, share: float, seed: int) -> tuple[LatentData, LatentData]:
        """Returns the data without some pictures, and these: a share of all, at least one, by the seed alone.

        Raises DataError if none would be left.
        """
        numbers = sorted(self._tokens)
        if len(numbers) < 2:
            raise DataError("there is only one picture, so none can be held out; set validation=0")
        count = min(len(numbers) - 1, max(1, round(share * len(numbers))))
        out = set(random.Random(seed).sample(numbers, count))

        def those(wanted: Callable[[int], bool]) -> LatentData:
            found = {shape: [e for e in entries if wanted(e[1])] for shape, entries in self._found.items()}
            return LatentData(found, self._items, self._tokenizer, self._config)

        return those(lambda i: i not in out), those(lambda i: i in out)

    def latent_batch(self, generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
        """Scaled latents (count, 4, h, w) float32 and tokens (count, L) of random pictures from one bucket.

        A bucket is chosen in proportion to its pictures. Each time a picture is chosen, its latents are a new
        sample of q(z|x), and its caption is one of its own at random.
        """
        chosen = self._choose(generator, count)
        mean = torch.stack([x.mean[x.number] for x, _ in chosen]).float()  # (count, 4, h, w)
        std = torch.stack([x.std[x.number] for x, _ in chosen]).float()
        noise = torch.randn(mean.shape, generator=generator)
        latents = scale_latents(sample(mean, std, noise), self._config)
        which = torch.rand(count, generator=generator).tolist()
        captions = [self._tokens[i] for _, i in chosen]  # each (captions, L)
        tokens = torch.stack([each[int(u * len(each))] for each, u in zip(captions, which)])
        if self.beside:
            latents = torch.cat([latents, self._hidden([x for x, _ in chosen], generator)], dim=1)
        return latents, tokens

    def _hidden(self, chosen: Sequence[StoredLatents], generator: torch.Generator) -> Tensor:
        """For each picture, one of its masks, and what is left of it: (count, 5, h, w)."""
        which = torch.rand(len(chosen), generator=generator).tolist()
        both = [x.hidden[int(u * len(x.hidden))] for x, u in zip(chosen, which)]
        left = torch.stack([x.mean[x.number] for x, _ in both]).float()  # (count, 4, h, w)
        return torch.cat([torch.stack([mask for _, mask in both]), scale_latents(left, self._config)], dim=1)

    def describe(self, generator: torch.Generator, count: int) -> str:
        """Names the pictures of the batch that `latent_batch` would return, for an error message."""
        return f"pictures {', '.join(self._items[i].name for _, i in self._choose(generator, count))}"

    def _choose(self, generator: torch.Generator, count: int) -> list[tuple[StoredLatents, int]]:
        weights = torch.tensor([len(bucket) for bucket in self._buckets], dtype=torch.float64)
        bucket = self._buckets[int(torch.multinomial(weights, 1, generator=generator))]
        return [bucket[i] for i in torch.randint(len(bucket), (count,), generator=generator).tolist()]

    def _all(self) -> Iterator[tuple[StoredLatents, int]]:
        return (entry for bucket in self._buckets for entry in bucket)


class Mixed:
    """Two sets of latents: each batch is of one of them, of both equally often on average.

    Source: Ruiz et al. 2023 (DreamBooth), §3.2: pictures of what must not change are learned beside new ones.
    """

    def __init__(self, own: LatentData, others: LatentData):
        self.own, self.others, self.device = own, others, own.device
        self.captions, self.beside = own.captions, own.beside

    def __len__(self) -> int:
        return len(self.own) + len(self.others)

    def latent_batch(self, generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
        """As `LatentData.latent_batch`."""
        return self._turn(generator).latent_batch(generator, count)

    def describe(self, generator: torch.Generator, count: int) -> str:
        """Names the pictures of a batch, for an error message."""
        return self._turn(generator).describe(generator, count)

    def _turn(self, generator: torch.Generator) -> LatentData:
        return self.own if torch.rand(1, generator=generator).item() < 0.5 else self.others
