"""Experiments: one thing varies, everything else stays, and the pictures stand side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..bar import Bar
from ..model.ddpm import randn
from ..model.pipeline import StableDiffusion
from ..model.request import Request
from ..model.samplers import SAMPLERS, samplers_for
from .figures import Exhibit, picture_grid, plain
from .guide import GUIDE, one_line
from .steer import rewritten
from .trajectory import describe


def draw(pipe: StableDiffusion, request: Request) -> Image.Image:
    return cast(Image.Image, pipe.generate(request, progress=False))


def draw_all(pipe: StableDiffusion, requests: Iterable[Request]) -> list[Image.Image]:
    """Draws one picture after the other, so that none depends on its neighbours; shows how far it is."""
    return [draw(pipe, request) for request in Bar(list(requests), unit="picture", leave=False)]


def distance(one: Image.Image, other: Image.Image) -> float:
    """Returns the root mean square of the difference between two pictures, in levels of 0 … 255."""
    difference = np.asarray(one, dtype=float) - np.asarray(other, dtype=float)
    return float(np.sqrt(np.mean(difference**2)))


def contrast(picture: Image.Image) -> float:
    """Returns the standard deviation of a picture's brightness, in levels."""
    return float(np.asarray(picture.convert("L"), dtype=float).std())


def difference(one: Image.Image, other: Image.Image, times: float = 8) -> Image.Image:
    """Returns how far apart two pictures are, pixel by pixel and enlarged: black where they are equal."""
    apart = np.abs(np.asarray(one, dtype=float) - np.asarray(other, dtype=float))
    return Image.fromarray((times * apart).clip(0, 255).round().astype(np.uint8))


def saturation(picture: Image.Image) -> float:
    """Returns how colourful a picture is on average: from 0, grey, to 1, pure colours."""
    return float(np.asarray(picture.convert("HSV"))[..., 1].mean() / 255)


# ---- guidance, steps, samplers ----------------------------------------------------------------------------


def cfg(
    pipe: StableDiffusion, request: Request, scales: Sequence[float] = (1, 2, 4, 7.5, 12, 20), seeds: int = 2
) -> Exhibit:
    """Draws a row for each of `seeds` seeds, with a column for each guidance scale."""
    request = request.for_model(pipe.config)
    first = request.seeds[0]
    rows = [
        draw_all(pipe, (replace(request, seed=first + k, cfg=scale) for scale in scales))
        for k in range(seeds)
    ]
    saturations = [[saturation(picture) for picture in row] for row in rows]
    apart = [distance(rows[0][k], rows[-1][k]) for k in range(len(scales))]
    figure = picture_grid(
        rows,
        "How much the words decide",
        describe(request, "cfg", "seed"),
        columns=[f"s = {scale:g}" for scale in scales],
        rows=[f"seed {first + k}" for k in range(seeds)],
        captions=[[f"saturation {value:.2f}" for value in row] for row in saturations],
    )
    listed = ", ".join(f"{scale:g}" for scale in scales)
    alt = (
        f"“{request.prompts[0]}” drawn from {seeds} seeds, with guidance scales {listed} from left to right."
    )
    numbers = {"scales": list(scales), "saturation": saturations, "apart": apart}
    low, high = (sum(row[k] for row in saturations) / seeds for k in (0, -1))
    found = f"From s = {scales[0]:g} to s = {scales[-1]:g} the saturation goes from {low:.2f} to {high:.2f}"
    found += ", which is hardly a change" * (abs(high - low) < 0.05)
    if seeds > 1:
        found += f", and two seeds are {apart[0]:.0f} and then {apart[-1]:.0f} levels apart"
    return Exhibit(figure, "How much the words decide", alt, f"{found}. {GUIDE['cfg']}", numbers)


def steps(
    pipe: StableDiffusion,
    request: Request,
    counts: Sequence[int] = (1, 2, 4, 8, 16, 32, 64),
    samplers: Sequence[str] | None = None,
) -> Exhibit:
    """A row for each sampler, a column for each number of steps; None: three that differ, if they suit."""
    request = request.for_model(pipe.config)
    suitable = suiting(pipe)
    samplers = samplers or [name for name in ("ddim", "dpmpp_2m", "euler_a") if name in suitable] or suitable
    rows = [
        draw_all(pipe, (replace(request, sampler=name, steps=count) for count in counts)) for name in samplers
    ]
    away = [[distance(picture, row[-1]) for picture in row] for row in rows]
    figure = picture_grid(
        rows,
        "How many steps are enough",
        describe(request, "steps", "sampler"),
        columns=[f"{count} step" + "s" * (count > 1) for count in counts],
        rows=samplers,
        captions=[[f"{value:.0f} away" for value in row[:-1]] for row in away],
    )
    alt = one_line(f"""
        “{request.prompts[0]}” drawn from one noise with {", ".join(map(str, counts))} steps from left to
        right, a row each for {", ".join(samplers)}.""")
    numbers = {"samplers": list(samplers), "steps": list(counts), "distance_to_last": away}
    return Exhibit(figure, "How many steps are enough", alt, GUIDE["steps"], numbers)


def suiting(pipe: StableDiffusion) -> list[str]:
    """Returns the samplers that suit the model, except lcm, which needs a network distilled for it.

    Of those beyond the book's, in `sampling/`, an exhibit shows the ones that it is asked for.
    """
    names = samplers_for(pipe.config.schedule.prediction_type)
    beyond = "reifusion.sampling"
    return [name for name in names if name != "lcm" and not SAMPLERS[name].__module__.startswith(beyond)]


def adds_noise(name: str) -> bool:
    """True for a sampler that adds fresh noise on its way."""
    return SAMPLERS[name].s_noise is not None and SAMPLERS[name].eta != 0


def samplers(pipe: StableDiffusion, request: Request, names: Sequence[str] | None = None) -> Exhibit:
    """Every sampler, with the same noise and number of steps; None: all that suit the model."""
    request = request.for_model(pipe.config)
    names = names or suiting(pipe)
    pictures, calls = [], []
    for name in Bar(names, unit="picture", leave=False):
        turns = list(pipe.denoise(replace(request, sampler=name)))
        pictures += pipe.decode(turns[-1].latents)
        calls.append(len(turns))
    calm = next((k for k, name in enumerate(names) if not adds_noise(name)), 0)
    away = [distance(picture, pictures[calm]) for picture in pictures]
    captions = [f"{name}\n{count} calls, {far:.0f} away" for name, count, far in zip(names, calls, away)]
    farthest = max(range(len(names)), key=lambda k: away[k])
    found = f"Of all, {names[farthest]} is farthest from {names[calm]}: {away[farthest]:.0f} levels."
    lines = [slice(i, i + 6) for i in range(0, len(names), 6)]
    figure = picture_grid(
        [pictures[line] for line in lines],
        "Every way back from the same noise",
        describe(request, "sampler"),
        captions=[captions[line] for line in lines],
    )
    alt = f"“{request.prompts[0]}” drawn from one noise by {len(names)} samplers: {', '.join(names)}."
    return Exhibit(
        figure,
        "Every way back from the same noise",
        alt,
        f"{found} {GUIDE['samplers']}",
        dict(zip(names, calls)),
    )


# ---- walks ------------------------------------------------------------------------------------------------


def slerp(one: Tensor, other: Tensor, u: float) -> Tensor:
    """Returns the point at the fraction u, 0 to 1, of the great circle from one to the other; any shape."""
    cosine = (one * other).sum() / (one.norm() * other.norm())
    angle = math.acos(cosine.clamp(-1, 1).item())
    if math.sin(angle) < 1e-6:  # the same direction, or the opposite one: no circle, or too many
        return lerp(one, other, u)
    # Shoemake 1985, §3.3: Slerp(q₁, q₂; u) = sin((1 - u) θ) / sin θ q₁ + sin(u θ) / sin θ q₂
    return (math.sin((1 - u) * angle) * one + math.sin(u * angle) * other) / math.sin(angle)


def lerp(one: Tensor, other: Tensor, u: float) -> Tensor:
    return (1 - u) * one + u * other


def seeds(pipe: StableDiffusion, request: Request, to: int, stops: int = 7) -> Exhibit:
    """A walk from the noise of the request's seed to that of another: on the sphere, and straight through.

    Source: Shoemake 1985, "Animating rotation with quaternion curves". Raises ValueError for the same seed.
    """
    begin = request.seeds[0]
    if to == begin:
        raise ValueError(f"a walk needs two seeds, not {begin} twice")
    request, vae = request.for_model(pipe.config), pipe.config.vae
    width, height = request.size  # type: ignore[misc]
    shape = (1, vae.latent_channels, height // vae.factor, width // vae.factor)  # type: ignore[operator]
    one, other = (randn(shape, torch.Generator().manual_seed(seed)) for seed in (begin, to))
    way = [k / (stops - 1) for k in range(stops)]
    noises = [[walk(one, other, u) for u in way] for walk in (slerp, lerp)]
    lengths = [[noise.square().mean().sqrt().item() for noise in row] for row in noises]
    rows = [draw_all(pipe, (replace(request, noise=noise) for noise in row)) for row in noises]
    contrasts = [[contrast(picture) for picture in row] for row in rows]
    half, ends = stops // 2, distance(rows[0][0], rows[0][-1])
    found = one_line(f"""
        The pictures of the two noises are {ends:.0f} level{"s" * (round(ends) != 1)} apart. Half-way the
        contrast is {contrasts[0][half]:.0f} on the sphere, and {contrasts[1][half]:.0f} straight through,
        where the noise has length {lengths[1][half]:.2f}.""")
    assert request.sampler is not None
    if adds_noise(request.sampler):
        found = one_line(f"""
            {found} The fresh noise of {request.sampler} is that of seed {begin} at every stop, so the last
            picture is not the one that seed {to} draws; with a sampler that adds none it is.""")
    figure = picture_grid(
        rows,
        f"From seed {begin} to seed {to}",
        describe(request, "seed"),
        columns=[f"noise {begin}", *(f"{u:.0%}" for u in way[1:-1]), f"noise {to}"],
        rows=["on the\nsphere", "straight"],
        captions=[
            [f"length {long:.2f}\ncontrast {value:.0f}" for long, value in zip(*row)]
            for row in zip(lengths, contrasts)
        ],
    )
    alt = one_line(f"""
        Two rows of {stops} pictures of “{request.prompts[0]}”, which go from seed {begin} to seed {to}.
        Above, the noise is turned; below, it is mixed.""")
    numbers = {"at": way, "lengths": lengths, "contrasts": contrasts, "ends": ends}
    return Exhibit(figure, f"From seed {begin} to seed {to}", alt, f"{found} {GUIDE['seeds']}", numbers)


def prompts(pipe: StableDiffusion, request: Request, to: str, stops: int = 7, seeds: int = 2) -> Exhibit:
    """Walks from the vectors of one prompt to those of another, with a row for each of `seeds` seeds."""
    request = request.for_model(pipe.config)
    begin = request.prompts[0]
    context = pipe.encode_text([begin, to], request.clip_skip).float()  # (2, S, width)
    way = [k / (stops - 1) for k in range(stops)]
    rows = []
    for k in range(seeds):
        row = []
        for u in Bar(way, unit="picture", leave=False):
            steered = rewritten(pipe, _replacing_prompt(lerp(context[:1], context[1:], u)))
            row.append(draw(steered, replace(request, seed=request.seeds[0] + k)))
        rows.append(row)
    title = "From one prompt to another"
    figure = picture_grid(
        rows,
        title,
        f"from “{begin}” to “{to}” · " + describe(request, "prompt", "seed"),
        columns=[plain(begin, 22), *(f"{u:.0%}" for u in way[1:-1]), plain(to, 22)],
        rows=[f"seed {request.seeds[0] + k}" for k in range(seeds)],
    )
    alt = f"{seeds} rows of {stops} pictures, which go from “{begin}” on the left to “{to}” on the right."
    changes = [[distance(one, other) for one, other in pairwise(row)] for row in rows]
    return Exhibit(figure, title, alt, GUIDE["prompts"], {"at": way, "changes": changes})


def _replacing_prompt(vectors: Tensor) -> Callable[[Tensor], Tensor]:
    """Returns an edit for `rewritten` that replaces the prompt's vectors by these (1, S, width)."""
    return lambda context: torch.cat([vectors.to(context.dtype), context[1:]])
