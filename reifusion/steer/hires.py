"""A second pass at a larger size ("hires fix"): the picture is enlarged, noised, and drawn to its end again.

A model that was trained on 512×512 pixels composes well at that size, and at 1024×1024 draws everything
twice. So the first pass decides what is where, and the second adds what the larger size has room for.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import Any, cast

from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..model.ask import ask
from ..model.asked import Prompt
from ..model.ddpm import randn
from ..model.pictures import fit
from ..model.pipeline import StableDiffusion, Step
from ..model.request import Request

# What is enlarged: the picture, or its latents by a mode of `F.interpolate`, with antialiasing or without
LATENT = {
    "latent": ("bicubic", True),
    "latent-bicubic": ("bicubic", False),
    "latent-bilinear": ("bilinear", False),
    "latent-bilinear-antialiased": ("bilinear", True),
    "latent-nearest": ("nearest", False),
    "latent-nearest-exact": ("nearest-exact", False),
}
WAYS = ("lanczos", *LATENT)
MOST = 4.0  # times as large

Left = Callable[[int, float], tuple[int, int]]
Words = Callable[[Request, int], Request]


def generate(
    pipe: StableDiffusion,
    prompt: Prompt | Request,
    hires: float = 2.0,
    hires_strength: float = 0.5,
    hires_by: str = "lanczos",
    *,
    progress: bool = True,
    words: Words = lambda request, before: request,
    callback: Callable[[Step], Any] | None = None,
    left: Left | None = None,
    **settings: Any,
) -> list[Image.Image]:
    """Draws each picture of a request, and each once more `hires` times as large; returns the large ones.

    hires: in [1, 4]; 1 is without a second pass. hires_strength: the share of the steps that the second pass
    does, in (0, 1]. hires_by: what is enlarged, the picture ("lanczos") or its latents (LATENT; softer, and
    less like the first). settings: as for `pipe.generate`. Raises ValueError for values outside these, and
    what `pipe.generate` raises. words: applied to the request of each pass and the number of turns before it,
    to put vectors in place of texts. callback: as for `pipe.generate`, in both passes. left: (steps,
    strength) -> the steps of the second pass, in all and drawn, where a program has a rule of its own.
    """
    check(hires, hires_strength, hires_by)
    request = ask(prompt, **settings).for_model(pipe.config)
    pictures = []
    for text, negative, seed in zip(request.prompts, request.negatives, request.seeds, strict=True):
        one = replace(request, prompt=text, negative=negative, seed=seed, num=1)
        if hires == 1:
            again = one
        elif hires_by in LATENT:
            again = with_latents(pipe, one, hires, hires_strength, words, callback, left, hires_by)
        else:
            first = _one(pipe.generate(words(one, 0), progress=progress, callback=callback))
            again = with_picture(pipe, one, first, hires, hires_strength, left)
        turns = 0 if hires == 1 else len(pipe.sampler(one).timesteps)
        made = _one(pipe.generate(words(again, turns), progress=progress, callback=callback))
        pictures.append(made if hires == 1 else _with_what_is_kept(one, made))
    return pictures


def check(hires: float, strength: float, by: str) -> None:
    """Raises ValueError for what cannot be done."""
    if not 1 <= hires <= MOST:
        raise ValueError(f"hires must be between 1 and {MOST:g} times the size, not {hires:g}")
    if not 0 < strength <= 1:
        raise ValueError(f"hires_strength must be above 0 and at most 1, not {strength:g}")
    if by not in WAYS:
        raise ValueError(f"hires_by must be one of {', '.join(WAYS)}, not {by!r}")


def larger(pipe: StableDiffusion, request: Request, hires: float) -> tuple[int, int]:
    """Width and height that many times as large, in steps that the model allows."""
    step = pipe.config.multiple
    width, height = (round(hires * side / step) * step for side in cast("tuple[int, int]", request.size))
    return width, height


def strength_for(drawn: int, steps: int) -> float:
    """The strength that draws the last `drawn` of all steps, for certain: their share is rounded down."""
    return 1.0 if drawn >= steps else (drawn + 0.5) / steps


def with_picture(
    pipe: StableDiffusion,
    request: Request,
    first: Image.Image,
    hires: float,
    strength: float,
    left: Left | None = None,
) -> Request:
    """The second pass, which begins with the enlarged picture."""
    size = larger(pipe, request, hires)
    if left is not None:
        steps, drawn = left(request.steps or 1, strength)
        strength = strength_for(drawn, steps)
        request = replace(request, steps=steps)
    enlarged = first.resize(size, Image.Resampling.LANCZOS)
    return replace(_plain(request), size=size, init_image=enlarged, strength=strength)


def with_latents(
    pipe: StableDiffusion,
    request: Request,
    hires: float,
    strength: float,
    words: Words = lambda request, before: request,
    callback: Callable[[Step], Any] | None = None,
    left: Left | None = None,
    by: str = "latent",
) -> Request:
    """The second pass, which begins with the enlarged latents."""
    latents: Tensor | None = None
    with closing(pipe.denoise(words(request, 0))) as steps:
        for step in steps:
            latents = step.latents
            if callback is not None and callback(step) is False:
                break
    assert latents is not None
    factor = pipe.config.vae.factor
    size = larger(pipe, request, hires)
    shape = size[1] // factor, size[0] // factor
    mode, antialias = LATENT[by]
    enlarged = F.interpolate(latents, shape, mode=mode, antialias=antialias)  # (1, 4, h, w) -> (1, 4, h', w')
    again = replace(_plain(request), size=size)
    drawn = None
    if left is not None:
        n, drawn = left(request.steps or 1, strength)
        again = replace(again, steps=n)
    sampler = pipe.sampler(again)
    if drawn is None:
        drawn = max(1, int(sampler.num_inference_steps * strength))
    start = max(0, sampler.num_inference_steps - drawn)
    sampler.skip(start)
    noise = randn(enlarged.shape, request.generators()).to(enlarged)
    return replace(again, latents=sampler.add_noise(enlarged, sampler.timesteps[0], noise), start=start)


def _one(pictures: Image.Image | list[Image.Image]) -> Image.Image:
    return pictures[0] if isinstance(pictures, list) else pictures


def _with_what_is_kept(request: Request, drawn: Image.Image) -> Image.Image:
    """The picture with what a mask keeps put back, enlarged, as the second pass knows no mask."""
    if not (isinstance(request.init_image, Image.Image) and isinstance(request.mask, Image.Image)):
        return drawn
    known, redraw = (fit(part, *drawn.size) for part in (request.init_image, request.mask))
    made = Image.composite(drawn, known, redraw)
    made.info.update(drawn.info)
    return made


def _plain(request: Request) -> Request:
    """The request without what it begins with, which the first pass has used."""
    return replace(request, init_image=None, mask=None, noise=None, latents=None, start=0)
