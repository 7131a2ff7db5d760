"""To draw as another program does: its noise, its weights of words, its steps, and its last rounding.

With the same weights and settings, programs draw different pictures, each for a few small reasons. `MANNERS`
lists them, one program a `Manner`, and the functions below put them into a request. Read in diffusers 0.42,
A1111's web UI 1.10, ComfyUI and stable-diffusion.cpp of 2026. What is not repeated: stable-diffusion.cpp's
own Brownian paths, and the sampling of the VAE's encoder, which takes its mean here.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..families.sdxl import SDXLConfig
from ..model.config import ModelConfig
from ..model.ddpm import Sampler
from ..model.pipeline import StableDiffusion
from ..model.request import Request
from ..model.samplers import SAMPLERS
from ..model.sentences import shown
from ..sampling.elsewhere import AUTOMATIC, ELSEWHERE, SCHEDULES_ELSEWHERE, sampler_of
from . import brownian
from .hires import strength_for
from .noises import NOISES, First, Then
from .variations import slerp, slerp_of_columns, varied


@dataclass(frozen=True)
class Manner:
    """What a program does that decides a picture, and that no setting says."""

    title: str = "reifusion"
    rng: str = "cpu"  # one of NOISES
    emphasis: str | None = None  # how prompts are read, as in `emphasis.RULES`; None: brackets are text
    schedule: str | None = None  # of k-diffusion's samplers, where none is asked for; None: our own
    automatic: bool = False  # True if some samplers have another for it, as in `AUTOMATIC`
    sides: str = ""  # to what a side is rounded: "" (nothing), "down to 8" or "up to 64"
    img2img: str = "share"  # which steps a strength leaves, one of STEPS
    again: str | None = None  # the same for the second pass of a larger drawing; None: ours
    sigma: bool = False  # True if the first noise is multiplied by σ alone, and not by √(σ² + 1)
    cut: bool = False  # True if pixels are cut off to whole levels, and not rounded
    columns: bool = False  # True if variations have an angle for each column
    path: str = ""  # what draws the Brownian paths of DPM++ SDE samplers: "" (there are none), "rng" or "cpu"
    drops: tuple[str, ...] = ()  # samplers that leave out the last σ but one, of n + 1 steps
    language: str = "a1111"  # of prompts, one of `grammar.LANGUAGES`
    from_two: str = ""  # "" if layers are counted as here; see `left_out`
    whole: bool = False  # True if the ends of a path are those of all steps, whatever a strength leaves out


MANNERS = {
    "diffusers": Manner("diffusers"),
    "a1111": Manner(
        "A1111", "philox", "a1111", "normal", True, "down to 8", "one more", "all", sigma=True, cut=True,
        columns=True, path="rng", drops=("dpm2", "dpm2_a", "dpmpp_3m_sde"), whole=True, from_two="never",
    ),
    "comfyui": Manner(
        "ComfyUI", "comfyui", "comfyui", "normal", False, "down to 8", "all", "all", cut=True, path="cpu",
        drops=("dpm2", "dpm2_a", "unipc"), language="comfyui", from_two="from it",
    ),
    "sdcpp": Manner(
        "stable-diffusion.cpp", "philox", "a1111", "normal", False, "up to 64", "one more", sigma=True,
        from_two="from it",
    ),
}  # fmt: skip

K_DIFFUSION = (
    "euler", "euler_churn", "euler_a", "heun", "lms", "dpm2", "dpm2_a", "dpmpp_2s_a", "dpmpp_2s_sde",
    "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde",
)  # fmt: skip
UNSCALED = ("ddim", "pndm", "unipc")  # which A1111 has from others than k-diffusion


def check(manner: str | None, rng: str | None, sampler: str | None = None) -> None:
    """Raises ValueError for what is not known, and for our sampler if its name means another there."""
    if manner not in (None, *MANNERS):
        raise ValueError(f"there is no manner {shown(manner)}; there are {', '.join(MANNERS)}")
    if rng not in (None, *NOISES):
        raise ValueError(f"there is no rng {shown(rng)}; there are {', '.join(NOISES)}")
    if manner is not None and sampler in SAMPLERS and names_here(manner, str(sampler), None)[0] != sampler:
        raise ValueError(f"{sampler} is another sampler in {MANNERS[manner].title}; take dpmpp_2m_sde")


def left_out(clip_skip: int, config: ModelConfig, manner: Manner) -> int:
    """The layers of the text encoder that are left out where a program is told `clip_skip` + 1.

    Stable Diffusion 2 and XL leave out the last layer anyway. There, A1111 has nothing to say in it, and
    others count from that layer, which is their 2.
    """
    if not (isinstance(config, SDXLConfig) or config.clip.width == 1024):
        return clip_skip
    return {"never": 0, "from it": max(0, clip_skip - 1)}.get(manner.from_two, clip_skip)


# Image-to-image: the steps that are left of n for a strength, as (steps in all, steps that are drawn)


def _share(n: int, strength: float) -> tuple[int, int]:
    return n, max(1, int(n * strength))


def _one_more(n: int, strength: float) -> tuple[int, int]:
    return n, int(min(strength, 0.999) * n) + 1


def _all(n: int, strength: float) -> tuple[int, int]:
    whole = n if strength > 0.9999 else int(n / strength)
    if whole > 1000:
        said = f"for a strength of {strength:g}, {n} steps are the last of {whole}, and 1000 is the most"
        raise ValueError(f"{said}; take more strength or fewer steps")
    return whole, n


STEPS: dict[str, Callable[[int, float], tuple[int, int]]] = {
    "share": _share,  # diffusers and we
    "one more": _one_more,  # A1111 and stable-diffusion.cpp
    "all": _all,  # ComfyUI: as many as asked for, out of more
}


def rounded(size: tuple[int, int], manner: Manner) -> tuple[int, int]:
    """Returns width and height as the program rounds them."""
    if manner.sides == "down to 8":
        return max(8, size[0] // 8 * 8), max(8, size[1] // 8 * 8)
    if manner.sides == "up to 64":
        return -(-size[0] // 64) * 64, -(-size[1] // 64) * 64
    return size


def sampled(sampler: str, schedule: str | None, manner: Manner) -> tuple[str, str | None]:
    """Returns a sampler and its schedule as the program has them where no schedule is asked for."""
    if schedule is not None or manner.schedule is None:
        return sampler, schedule
    if sampler == "dpmpp_2m_karras":  # which rounds timesteps, as diffusers does and the others do not
        return "dpmpp_2m", "karras"
    if sampler not in K_DIFFUSION:
        return sampler, None
    return sampler, AUTOMATIC.get(sampler, manner.schedule) if manner.automatic else manner.schedule


def asked(
    request: Request, manner: Manner, variation: float = 0.0, variation_seed: int = 0, ensd: int = 0
) -> Request:
    """The request with the noise and the steps of a program. The request is one that a model has completed.

    variation: how far the first noise is on the way to that of variation_seed, in [0, 1].
    ensd: the noise in the steps is that of a seed so much higher. Warns of a sampler whose noise cannot be
    repeated.
    """
    if manner.title == MANNERS["sdcpp"].title and request.sampler in brownian.SAMPLERS:
        warnings.warn(
            f"the noise of {request.sampler} comes from a Brownian path in {manner.title}, which is not"
            " repeated here, so the picture will differ",
            stacklevel=2,
        )
    source: Any = NOISES[manner.rng]
    if variation:
        mix = slerp_of_columns if manner.columns else slerp
        source = varied(variation_seed, variation, source, mix)
    if ensd:
        first, later = source, NOISES[manner.rng]
        source = lambda seed: Then(first(seed), later(seed + ensd))  # noqa: E731
    request = replace(request, source=source)
    if request.init_image is None or manner.img2img == "share":
        return request
    steps, drawn = STEPS[manner.img2img](request.steps or 1, request.strength)
    return replace(request, steps=steps, strength=strength_for(drawn, steps))


def begun(pipe: StableDiffusion, request: Request, manner: Manner) -> Request:
    """The request for one pass of the loop: its noise as the program has it, at first and in the steps."""
    make = request.source
    if make is None:
        return request
    sampler = pipe.sampler(request)
    if sampler.prediction_type == "flow":
        return request
    if manner.path and sampler.name in brownian.SAMPLERS:
        all_steps = replace(request, init_image=None, mask=None, latents=None, start=0)
        whole = pipe.sampler(all_steps) if manner.whole else sampler
        draw = NOISES["cpu" if manner.path == "cpu" else manner.rng]
        make = brownian.on_a_path(make, sampler, whole, draw)
        request = replace(request, source=make)
    loud = manner.sigma and sampler.name not in UNSCALED
    if not loud or request.init_image is not None or request.latents is not None:
        return request
    sigma = sampler.sigma(sampler.timesteps[0])
    factor = sigma / (sigma**2 + 1) ** 0.5 if sigma < float("inf") else 1.0
    return replace(request, source=lambda seed: First(make(seed), lambda noise: factor * noise))


def stepped(pipe: StableDiffusion, manner: Manner) -> StableDiffusion:
    """The pipe, whose steps go to the σ that the program has, where it leaves out the last but one."""
    if not manner.drops:
        return pipe
    pipe = copy.copy(pipe)
    plain = pipe.sampler

    def sampler(request: Request, generators: Any = None) -> Sampler:
        request = request.for_model(pipe.config)
        if request.sampler not in manner.drops or request.schedule is None:
            return plain(request, generators)
        steps = (request.steps or 1) + 1
        more = replace(request, steps=steps, init_image=None, mask=None, latents=None, start=0)
        found = plain(more, generators)
        found._every = found._every[:-1]
        found.num_inference_steps = len(found._every)
        if request.latents is not None:
            found.skip(request.start)
        else:
            found.set_strength(request.strength if request.init_image is not None else 1.0)
        return found

    pipe.sampler = sampler  # type: ignore[method-assign]
    return pipe


def cut(pipe: StableDiffusion) -> StableDiffusion:
    """The pipe, whose pixels are cut off to whole levels: on average, pictures are half a level darker."""
    pipe = copy.copy(pipe)
    decoded = pipe.decode_image

    def decode(latents: Tensor) -> list[Image.Image]:
        return [_cut(pixels) for pixels in decoded(latents)]

    pipe.decode = decode  # type: ignore[method-assign]
    return pipe


def _cut(pixels: Tensor) -> Image.Image:
    """(3, H, W), about [-1, 1] -> RGB"""
    levels = ((pixels.float() + 1) / 2).clamp(0, 1) * 255
    return Image.fromarray(levels.to(torch.uint8).permute(1, 2, 0).cpu().numpy())


# Names


def names_here(manner: str, sampler: str, schedule: str | None) -> tuple[str, str | None]:
    """Returns our names for a program's sampler and schedule; other names remain as they are."""
    if schedule is not None:
        column = {"diffusers": 0, "a1111": 1, "comfyui": 2, "sdcpp": 3}[manner]
        theirs: dict[str, str] = {}
        for name, row in SCHEDULES_ELSEWHERE.items():  # "Normal, Uniform", or "Beta (over σ there)"
            for title in filter(None, row[column].partition(" (")[0].lower().split(", ")):
                theirs.setdefault(title, name)
        schedule = theirs.get(schedule.lower(), schedule)
    if manner == "a1111" and sampler not in SAMPLERS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found, its = sampler_of({"Sampler": sampler, "Schedule type": "" if schedule else "Automatic"})
        return (found or sampler), (schedule or its)
    return _theirs(manner).get(sampler.lower().removesuffix("_gpu"), sampler), schedule


def _theirs(manner: str) -> dict[str, str]:
    """Returns our names by a program's, in small letters."""
    found: dict[str, str] = {}
    for name, row in ELSEWHERE.items():
        title = {"diffusers": row.diffusers, "comfyui": row.comfyui, "sdcpp": row.sdcpp}.get(manner, "")
        if manner == "diffusers":  # a class, with what it is given
            title = title.lower().partition("(")[0]
        if title and "," not in title and not name.startswith("flow") and name != "dpmpp_sde":
            found.setdefault(title, name)
            if manner == "diffusers":
                found.setdefault(f"{title}scheduler", name)
    return found
