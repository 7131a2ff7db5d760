"""How a model draws what a data set has, in three figures and two sheets of pictures.

`reifusion evaluate MODEL --data FOLDER` draws some captions of the data, several seeds of each, and compares
these pictures with the data's, by what a network of our own sees in both:

- KID: how far apart the two sets are; 0 if nobody could tell which is which;
- how much the seeds of a caption differ, beside how much the data's pictures differ;
- how many pictures look like copies: nearer to one of the data than its own pictures are to one another.

Source for the features: Tang et al. 2023, "Emergent Correspondence from Image Diffusion", §4: the inside of a
denoiser knows what is to be seen in a picture.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..bar import Bar
from ..files import whole
from ..model.diffusion import UNet
from ..model.pictures import fit, to_tensor
from ..model.pipeline import StableDiffusion
from .checkpoint import digest
from .estimates import kid, mean, nearest, spread, wilson
from .images import DataError, Pictures
from .loop import normal
from .sheet import arranged
from .text2image import forward_process

TIMESTEP = 200  # of 1000: a little noise; of 0 to 350, those around here find the same subject most often
BATCH = 8  # pictures at a time
MOST = 1000  # pictures of the data that are looked at
CHANCE = 0.05  # the share of the data's own pictures that count as copies of others
SHOWN = 16  # pictures on the sheet of the nearest
KID_TIMES = 1000  # as it is usually printed


class Features:
    """Pictures -> points: what the middle of a U-Net makes of each, whatever its place in the picture.

    Raises ValueError for a model that is no Stable Diffusion 1.x or 2.x, or is given more than latents.
    """

    def __init__(self, pipe: StableDiffusion):
        plain = type(pipe).denoiser is StableDiffusion.denoiser and not pipe.config.edits
        if not plain or pipe.config.inpaints or not pipe.config.unet.middle:
            raise ValueError(f"{pipe.config.name} has no plain U-Net with a middle; take other --features")
        self.pipe, self.sampler = pipe, forward_process(pipe.config.schedule)
        self.words = pipe.encode_text([""])
        self.name = f"{pipe.config.name} {digest(pipe.models['diffusion'].state_dict())[:9]}"

    @torch.no_grad()
    def __call__(self, pictures: Iterable[Image.Image]) -> Tensor:
        """N pictures of any size -> (N, C), float32"""
        size = self.pipe.config.size
        found: list[Tensor] = []

        def keep(module: Any, inputs: Any, middle: Tensor) -> None:
            found.append(middle.float().mean(dim=(2, 3)).cpu())  # (B, C, h/8, w/8) -> (B, C)

        for some in _batches(pictures, BATCH):
            pixels = torch.cat([to_tensor(fit(picture, size, size)) for picture in some])
            x0 = self.pipe.encode_image(pixels)  # (B, 4, h, w)
            noise = normal(x0.shape[1:], torch.Generator().manual_seed(0)).to(x0)  # the same for all
            t = torch.full((len(x0),), float(TIMESTEP), device=x0.device)
            unet = self.pipe.models["diffusion"].to(self.pipe.device)
            hook = cast("UNet", unet).middle.register_forward_hook(keep)
            try:
                x_t = self.sampler.add_noise(x0, t, noise.expand_as(x0)).to(self.pipe.dtype)
                unet(x_t, self.words.expand(len(x0), -1, -1), t)
            finally:
                hook.remove()
        return torch.cat(found)


@dataclass(frozen=True)
class Figure:
    """A number with its 95 % interval, and the same number for the data alone."""

    name: str
    value: float
    low: float | None
    high: float | None
    data: float | None
    unit: str = ""

    def __str__(self) -> str:
        def text(value: float | None) -> str:
            return "" if value is None else f"{value:.3g}{self.unit}"

        interval = "" if self.low is None else f"{text(self.low)} … {text(self.high)}"
        return f"{self.name:34} {text(self.value):>8}   {interval:18} {text(self.data):>8}"


@dataclass(frozen=True)
class Evaluation:
    """What was measured, and the sheets."""

    figures: list[Figure]
    about: dict[str, Any]
    drawn: Image.Image  # each prompt's seeds, one above the other
    copies: Image.Image  # the drawn pictures that are nearest to one of the data, above that one

    def __str__(self) -> str:
        head = f"{'':34} {'model':>8}   {'95 % interval':18} {'data':>8}"
        return "\n".join([head, *map(str, self.figures)])

    def write(self, folder: Path) -> list[Path]:
        """Writes the sheets and the figures; returns the files."""
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / name for name in ("drawn.png", "nearest.png", "evaluation.json")]
        for file, sheet in zip(files, (self.drawn, self.copies)):
            with whole(file) as temporary:
                sheet.save(temporary, "PNG")
        with whole(files[2]) as temporary:
            report = {"figures": [asdict(figure) for figure in self.figures], **self.about}
            temporary.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", "utf-8")
        return files


def evaluate(
    pipe: StableDiffusion,
    pictures: Pictures,
    features: Features,
    prompts: Sequence[str] = (),
    count: int = 64,
    seeds: int = 4,
    **settings: Any,
) -> Evaluation:
    """Draws `count` pictures, `seeds` of each prompt, and compares them with the data's.

    prompts: at most count / seeds of them count; (): captions of the data. settings: as for `pipe.generate`.
    Raises ValueError for numbers too small to compare, and DataError if the data has too few pictures.
    """
    if seeds < 2 or count < 2 * seeds:
        raise ValueError(
            f"there must be 2 seeds or more, and twice as many pictures, not {seeds} and {count}"
        )
    chosen = _data(pictures)
    captions = [pictures.items[i].captions[0] for i, _ in chosen]
    prompts = list(prompts) or _some(captions, count // seeds)
    prompts = prompts[: count // seeds]
    rows = []
    for k in Bar(range(seeds), desc="drawing", unit=f"× {len(prompts)} pictures"):
        row: list[Image.Image] = []
        for first in range(0, len(prompts), BATCH):
            some = prompts[first : first + BATCH]
            row += pipe.generate(some, seed=k * len(prompts) + first, progress=False, **settings)
        rows.append(row)
    real = features(Bar((picture for _, picture in chosen), desc="looking", total=len(chosen)))  # (M, C)
    ours = features(picture for row in rows for picture in row)  # (seeds · prompts, C)
    centre, scale = real.mean(0), real.std(0).clamp(min=1e-6)
    # Each feature counts alike, and of each picture only the direction, so that none is far off all others.
    real, ours = (F.normalize((x - centre) / scale, dim=1) * x.shape[1] ** 0.5 for x in (real, ours))

    away, which = nearest(ours, real)
    figures = [
        _kid(ours, real),
        _spread(ours.unflatten(0, (seeds, len(prompts))), real, captions),
        _copies(away, real),
    ]
    drawn = [picture for row in rows for picture in row]
    order = away.argsort().tolist()[:SHOWN]
    side = rows[0][0].size
    pairs = [[drawn[i] for i in order], [fit(chosen[int(which[i])][1], *side) for i in order]]
    about = {
        "features": features.name,
        "pictures": len(ours),
        "prompts": prompts,
        "seeds": seeds,
        "data": len(real),
        "settings": {name: str(value) for name, value in settings.items()},
    }
    names = [pictures.items[chosen[int(which[i])][0]].name for i in order]
    return Evaluation(figures, about, arranged(rows, prompts), arranged(pairs, names))


def _kid(ours: Tensor, real: Tensor) -> Figure:
    """KID between the model's pictures and the data's, and between two halves of the data."""
    found = [KID_TIMES * value for value in kid(ours, real)]
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
    one, other = real[order].chunk(2)
    return Figure("KID × 1000", found[0], found[1], found[2], KID_TIMES * kid(one, other)[0])


def _spread(ours: Tensor, real: Tensor, captions: Sequence[str]) -> Figure:
    """How much seeds differ, ours (seeds, prompts, C), beside pictures of the data, real (M, C).

    Those with the same caption are compared, if there are enough of them; otherwise all.
    """
    of: dict[str, list[int]] = {}
    for i, caption in enumerate(captions):
        of.setdefault(caption, []).append(i)
    alike = [spread(real[same]) for same in of.values() if len(same) > 1]
    usual = sum(alike) / len(alike) if len(alike) >= 10 else spread(real)
    each = torch.tensor([spread(one) for one in ours.unbind(1)]) / usual  # (prompts,)
    middle = each.mean().item()
    name = "seeds differ, ÷ the data's " + ("of one caption" if len(alike) >= 10 else "pictures")
    if len(each) < 2:
        return Figure(name, middle, None, None, 1.0)
    return Figure(name, *mean(each), 1.0)


def _copies(away: Tensor, real: Tensor) -> Figure:
    """The share of pictures that are nearer to one of the data than nearly all of these are to another.

    away (N,): the distance to the nearest of the data. The data may hold a picture twice.
    """
    apart = torch.cdist(real, real, compute_mode="donot_use_mm_for_euclid_dist")  # exact, as in `nearest`
    apart[apart <= 1e-3 * apart.max()] = float("inf")  # a picture, and itself once more
    limit = apart.min(1).values.quantile(CHANCE)
    many = int((away < limit).sum())
    low, high = wilson(many, len(away))
    return Figure("look like copies", 100 * many / len(away), 100 * low, 100 * high, 100 * CHANCE, " %")


def _data(pictures: Pictures) -> list[tuple[int, Image.Image]]:
    """Reads pictures of the data, at random if there are many, each with its number."""
    numbers, found = list(range(len(pictures))), []
    random.Random(0).shuffle(numbers)
    for i in numbers[:MOST]:
        try:
            found.append((i, pictures[i][0]))
        except DataError:  # `open_pictures` has warned of it
            continue
    if len(found) < 4:
        raise DataError(f"{len(found)} pictures are too few to compare with; there must be 4 or more")
    return found


def _some(captions: Sequence[str], count: int) -> list[str]:
    """Returns so many captions, no two of them equal while there are others."""
    distinct = sorted(set(captions))
    random.Random(0).shuffle(distinct)
    return [distinct[i % len(distinct)] for i in range(count)]


def _batches(pictures: Iterable[Image.Image], size: int) -> Iterable[list[Image.Image]]:
    some: list[Image.Image] = []
    for picture in pictures:
        some.append(picture)
        if len(some) == size:
            yield some
            some = []
    if some:
        yield some
