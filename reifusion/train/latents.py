"""Latents on disk: a picture goes through the VAE's encoder once, instead of once a step.

The pictures of a batch must have one size, and few pictures are square. So a handful of sizes of about the
same area is fixed, the buckets. A picture goes into the one nearest to its shape, a batch comes from one.
Source: NovelAI 2022, "NovelAI Improvements on Stable Diffusion" (aspect ratio bucketing).

    folder/<hash of the encoder>/<width>x<height>/<hash of the pictures>.safetensors

Such a file has μ and σ of up to 64 pictures, and their fingerprints. Other weights have another folder and a
changed picture has another fingerprint, so both are encoded anew, and nothing else is.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import ImageOps
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from ..files import whole
from ..model.tokenizer import Tokenizer
from ..model.config import VAEConfig
from ..model.encoder import Encoder, scale_latents
from ..model.pictures import fit, to_tensor
from ..weights.writing import write_tensors
from .data import DataError
from .images import Item, Pictures, some

Size = tuple[int, int]  # width and height in pixels
PART = 64  # pictures in a file: what a kill can cost
MIRRORED = "-mirrored"  # after the fingerprint of a picture that was mirrored first


# ---- buckets ----------------------------------------------------------------------------------------------


def buckets(area_side: int, step: int = 64, most: float = 2.0) -> list[Size]:
    """The sizes for pictures of about area_side² pixels, from tall to wide.

    All multiples of `step` with no more pixels than that and no side longer than `most` times the other,
    except those that lie within a larger one. Raises ValueError if there are none.
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
    """The bucket nearest in shape, where twice as wide is as far as twice as high."""
    return min(sizes, key=lambda size: abs(math.log(width / height) - math.log(size[0] / size[1])))


# ---- the cache --------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """Where a picture's latents are."""

    mean: Tensor  # μ of a whole file, (n, 4, h, w) fp16
    std: Tensor  # σ of it
    number: int  # in that file
    file: Path


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
) -> LatentData:
    """The latents of all pictures, from `folder` or made now. Killed, it goes on where it was.

    A picture is scaled to cover its bucket, and cropped evenly. size: side in pixels of a square of the
    buckets' area. mirror: every picture also mirrored. step: see `buckets`; None: an eighth of `size`.
    batch: pictures to encode at a time.

    Warns once, naming them, of pictures that cannot be read, that are enlarged, or whose captions are cut.
    Raises DataError when no picture is left, the latents are not finite or the folder cannot be written.
    """
    factor = encoder.config.factor
    step = max(factor, size // 8 // factor * factor) if step is None else step
    if step <= 0 or step % factor or step > size:
        raise DataError(f"buckets need steps of a multiple of {factor} pixels, at most {size}, not {step}")
    sizes = buckets(size, step)
    home = folder / weights_hash(encoder)
    wanted: dict[Size, list[tuple[str, int]]] = {shape: [] for shape in sizes}  # fingerprint, number
    broken: set[int] = set()
    small = []
    for i, item in enumerate(pictures.items):
        shape = bucket_of(item.width, item.height, sizes)
        if item.width < shape[0] or item.height < shape[1]:
            small.append(item.name)
        try:
            key = pictures.fingerprint(i)
            wanted[shape] += [(key, i), (key + MIRRORED, i)] if mirror else [(key, i)]
        except DataError:
            broken.add(i)

    stored = {shape: _read(_folder(home, shape)) for shape in sizes}
    # As a dict, so that a picture that is there twice is encoded once.
    missing = {shape: {k: i for k, i in wanted[shape] if k not in stored[shape]} for shape in sizes}
    count = sum(map(len, missing.values()))
    with tqdm(total=count, desc="encoding", unit="picture", disable=not count) as bar:
        for shape in sizes:
            entries = iter(missing[shape].items())
            while part := list(islice(entries, PART)):
                _encode(encoder, pictures, part, shape, _folder(home, shape), batch, bar)
    for shape in sizes:
        if missing[shape]:
            stored[shape] = _read(_folder(home, shape))
        broken |= {i for key, i in wanted[shape] if key not in stored[shape]}

    found = {s: [(stored[s][key], i) for key, i in wanted[s] if i not in broken] for s in sizes}
    if not any(found.values()):
        raise DataError(f"none of the {len(pictures)} pictures can be read")
    data = LatentData(found, pictures.items, tokenizer, encoder.config)
    problems = [
        f"{len(names)} of {len(pictures)} pictures {what}: {some(names)}"
        for names, what in (
            ([pictures.items[i].name for i in sorted(broken)], "cannot be read and are left out"),
            (small, f"are smaller than what {size}×{size} pixels need, and are enlarged"),
            (data.cut, f"have a caption of more than {tokenizer.context_length - 2} tokens, which is cut"),
        )
        if names
    ]
    if problems:
        warnings.warn("; ".join(problems), stacklevel=2)
    return data


def remove_unused(folder: Path, data: LatentData) -> int:
    """Deletes the files in `folder` of which `data` uses nothing, and returns how many they were."""
    unused = set(folder.glob("*/*x*/*.safetensors")) - data.files
    for file in unused:
        file.unlink()
    for path in [f.parent for f in unused] + [f.parent.parent for f in unused]:
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    return len(unused)


def weights_hash(encoder: Encoder) -> str:
    """Changes when a weight does."""
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
    part: list[tuple[str, int]],
    shape: Size,
    folder: Path,
    batch: int,
    bar: tqdm,
) -> None:
    """Writes one file with the latents of `part`, but for pictures that cannot be read."""
    weight = encoder.conv_in.weight
    keys, means, stds = [], [], []
    for start in range(0, len(part), batch):
        pixels = []
        for key, i in part[start : start + batch]:
            try:
                picture = fit(pictures[i][0], *shape)
            except DataError:
                continue
            pixels.append(to_tensor(ImageOps.mirror(picture) if key.endswith(MIRRORED) else picture))
            keys.append(key)
        if pixels:
            with torch.inference_mode():
                mean, log_variance = encoder.moments(torch.cat(pixels).to(weight.device, weight.dtype))
            means.append(mean.half().cpu())  # (b, 4, H/8, W/8)
            stds.append(log_variance.float().mul(0.5).exp().half().cpu())
            if not (means[-1].isfinite().all() and stds[-1].isfinite().all()):
                raise DataError(
                    f"the VAE, in {weight.dtype}, gives latents that are not finite or beyond 65504"
                )
        bar.update(len(part[start : start + batch]))
    if keys:
        path = folder / f"{hashlib.blake2b(' '.join(keys).encode(), digest_size=8).hexdigest()}.safetensors"
        try:
            with whole(path) as temporary:
                tensors = {"mean": torch.cat(means).contiguous(), "std": torch.cat(stds).contiguous()}
                write_tensors(tensors, temporary, {"fingerprints": json.dumps(keys)})
        except (OSError, SafetensorError) as error:
            raise DataError(f"latents cannot be written to {folder}: {error}") from error


def _read(folder: Path) -> dict[str, Row]:
    """Fingerprint -> latents. The tensors are windows into the files, read when they are used."""
    rows: dict[str, Row] = {}
    for path in sorted(folder.glob("[!.]*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                mean, std = file.get_tensor("mean"), file.get_tensor("std")
                keys = json.loads(file.metadata()["fingerprints"])
        except (SafetensorError, OSError):  # a damaged file counts as none
            continue
        rows |= {key: Row(mean, std, number, path) for number, key in enumerate(keys)}
    return rows


# ---- batches ----------------------------------------------------------------------------------------------


class LatentData:
    """Captioned latents to train on, in buckets; `len` counts pictures.

    `.sizes`: width and height of a bucket in pixels -> how many latents it has. `.empty`: tokens (L,) of "".
    """

    def __init__(
        self,
        rows: dict[Size, list[tuple[Row, int]]],
        items: Sequence[Item],
        tokenizer: Tokenizer,
        config: VAEConfig,
    ):
        self._buckets = [found for found in rows.values() if found]
        self._config, self._items = config, items
        self.sizes = {shape: len(found) for shape, found in rows.items() if found}
        self.files = {row.file for row, _ in self._all()}
        used = sorted({i for _, i in self._all()})
        room = tokenizer.context_length - 2
        # Names of the pictures whose captions are too long for the model.
        self.cut = [
            items[i].name
            for i in used
            if any(len(tokenizer.tokenize(caption)) > room for caption in items[i].captions)
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one for each long caption
            self._tokens = {i: torch.tensor([tokenizer.encode(c) for c in items[i].captions]) for i in used}
            self.empty = torch.tensor(tokenizer.encode(""))

    def __len__(self) -> int:
        return len(self._tokens)

    def draw(self, generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
        """Latents (count, 4, h, w) float32, scaled, and tokens (count, L), of random pictures.

        All are of one bucket; a bucket comes as often as it has pictures. Of a picture, the latents are a new
        sample of q(z|x) each time, and the caption is any of its own.
        """
        chosen = self._choose(generator, count)
        mean = torch.stack([row.mean[row.number] for row, _ in chosen]).float()  # (count, 4, h, w)
        std = torch.stack([row.std[row.number] for row, _ in chosen]).float()
        noise = torch.randn(mean.shape, generator=generator)
        # Eq. 10, Kingma & Welling 2014: z = μ + σ ⊙ ε,  ε ~ N(0, I)
        latents = scale_latents(mean + std * noise, self._config)
        which = torch.rand(count, generator=generator).tolist()
        captions = [self._tokens[i] for _, i in chosen]  # each (captions, L)
        tokens = torch.stack([each[int(u * len(each))] for each, u in zip(captions, which)])
        return latents, tokens

    def describe(self, generator: torch.Generator, count: int) -> str:
        """Which pictures `draw` would take, for an error message."""
        return f"pictures {', '.join(self._items[i].name for _, i in self._choose(generator, count))}"

    def _choose(self, generator: torch.Generator, count: int) -> list[tuple[Row, int]]:
        weights = torch.tensor([len(bucket) for bucket in self._buckets], dtype=torch.float64)
        bucket = self._buckets[int(torch.multinomial(weights, 1, generator=generator))]
        return [bucket[i] for i in torch.randint(len(bucket), (count,), generator=generator).tolist()]

    def _all(self) -> Iterator[tuple[Row, int]]:
        return (entry for bucket in self._buckets for entry in bucket)
