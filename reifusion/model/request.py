"""What can be asked of the pipeline, checked before any work starts."""

from __future__ import annotations

import math
import operator
import os
import secrets
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from .config import ModelConfig
from .samplers import SAMPLERS, samplers_for
from .tome import MOST as MOST_MERGED

Picture = Image.Image | np.ndarray | str | os.PathLike  # arrays: uint8, (H, W), (H, W, 3) or (H, W, 4)


@dataclass
class Request:
    """Everything that decides what is drawn: the arguments of `generate` and `denoise`.

    Raises ValueError, in one sentence, for what cannot be drawn.
    """

    prompt: str | Sequence[str]  # one picture for each; may be empty
    uncond_prompt: str | Sequence[str] | None = None  # what to keep away from: one for all, or one for each
    input_image: Picture | None = None  # img2img: begin with this picture, not with noise alone
    strength: float = 0.8  # of img2img, in (0, 1]: how much noise the picture gets
    do_cfg: bool = True  # classifier-free guidance; without it, uncond_prompt is not used
    cfg_scale: float = 7.5  # s in the guidance equation; 1 is the same as none, and twice as fast
    sampler_name: str | None = None  # one of SAMPLERS; None: "ddpm", or what the model was made for
    n_inference_steps: int = 50  # 1 … 1000
    seed: int | None = None  # picture k is drawn from seed + k; None: a new one, see picture.info["seed"]
    _: KW_ONLY
    height: int | None = None  # a multiple of 8; for None see `size`
    width: int | None = None
    num_images: int = 1  # for each prompt
    mask: Picture | None = None  # inpainting: white is redrawn, black is kept; as large as input_image
    clip_skip: int = 0  # layers of the text encoder to leave out, from the end
    noise: Tensor | None = None  # what to start from, (B, 4, H/8, W/8); None: drawn from the seeds
    guidance_rescale: float = 0.0  # 0 … 1: how much of the contrast that guidance adds is taken back
    # Less work, and another picture; bench/SHORTCUTS.md says how much less, and how far another.
    guidance_interval: tuple[float, float] | None = None  # guidance where noise/signal is above … and up to …
    deepcache: int = 1  # N: the inside of the U-Net on every N-th step only, see `deepcache.py`
    tome: float = 0.0  # 0 … 0.75: the share of pixels that attend as part of another, see `tome.py`

    def __post_init__(self) -> None:
        prompts = _texts(self.prompt)
        negatives = _texts("" if self.uncond_prompt is None else self.uncond_prompt)
        if len(negatives) == 1:
            negatives = negatives * len(prompts)
        if len(negatives) != len(prompts):
            raise ValueError(
                f"{len(prompts)} prompts need as many negative ones, or one, not {len(negatives)}"
            )
        if self.sampler_name not in (None, *SAMPLERS):
            raise ValueError(f"there is no sampler {self.sampler_name!r}; there are {', '.join(SAMPLERS)}")
        if not 0 < _number(self.strength, "strength") <= 1:
            raise ValueError(f"strength must be above 0 and at most 1, not {self.strength}")
        if not math.isfinite(_number(self.cfg_scale, "cfg_scale")):
            raise ValueError(f"cfg_scale must be a finite number, not {self.cfg_scale}")
        if not 0 <= _number(self.guidance_rescale, "guidance_rescale") <= 1:
            raise ValueError(f"guidance_rescale must be between 0 and 1, not {self.guidance_rescale}")
        if self.seed is None:
            self.seed = secrets.randbelow(2**32)
        self.seed = _whole(self.seed, "the seed", 0, 2**63 - 1)
        self.n_inference_steps = _whole(self.n_inference_steps, "the number of steps", 1, 1000)
        self.num_images = _whole(self.num_images, "the number of images", 1)
        self.clip_skip = _whole(self.clip_skip, "clip_skip", 0)
        self.deepcache = _whole(self.deepcache, "deepcache", 1)
        self.tome = _number(self.tome, "tome")
        if not 0 <= self.tome <= MOST_MERGED:
            raise ValueError(f"tome must be between 0 and {MOST_MERGED}, not {self.tome}")
        self.guided_from, self.guided_to = _interval(self.guidance_interval)
        if self.mask is not None and self.input_image is None:
            raise ValueError("a mask needs an input image to keep the rest of")
        self.picture = None if self.input_image is None else open_picture(self.input_image)
        self.redraw = None if self.mask is None else open_picture(self.mask).convert("L")
        if self.picture is not None and self.redraw is not None and self.redraw.size != self.picture.size:
            sizes = [f"{width}×{height}" for width, height in (self.picture.size, self.redraw.size)]
            raise ValueError(f"the mask must be as large as the input image, {sizes[0]}, not {sizes[1]}")
        # One of each for every picture: all of the first prompt, then all of the second, …
        self.prompts = [text for text in prompts for _ in range(self.num_images)]
        self.negatives = [text for text in negatives for _ in range(self.num_images)]
        self.seeds = [self.seed + k for k in range(len(self.prompts))]

    def sampler(self, config: ModelConfig) -> str:
        """The name of the sampler, as asked, or the first one that fits what the model was trained for."""
        kind = config.schedule.prediction_type
        names = samplers_for(kind)
        distilled = config.unet.guidance_width is not None
        name = self.sampler_name or ("lcm" if distilled else next(iter(names), "ddpm"))
        if names and name not in names:
            fitting = ", ".join(names)
            raise ValueError(
                f"the sampler {name} does not fit {config.name}, trained for {kind!r}; what fits: {fitting}"
            )
        return name

    def size(self, config: ModelConfig) -> tuple[int, int]:
        """The width and height that the model is to draw.

        As asked. What was left open is the size that it was trained on, or, for an input image, the
        image's shape with that as the shorter side, and at most twice as long as wide.
        """
        width, height = (1, 1) if self.picture is None else self.picture.size
        scale, factor = config.size / min(width, height), config.vae.factor
        return (
            self._side("width", self.width, min(width * scale, 2 * config.size), factor),
            self._side("height", self.height, min(height * scale, 2 * config.size), factor),
        )

    def _side(self, name: str, asked: int | None, otherwise: float, factor: int) -> int:
        if asked is None:
            return round(otherwise / factor) * factor
        side = _whole(asked, f"the {name}", factor)
        if side % factor:
            raise ValueError(f"the {name} must be a multiple of {factor}, not {side}")
        return side


def _texts(value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else list(value) if isinstance(value, Sequence) else []
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"a prompt is a text, or a list with at least one text, not {value!r}")
    return texts


def _number(value: Any, name: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number, not {value!r}") from None


def _interval(value: Any) -> tuple[float, float]:
    low, high = (-math.inf, math.inf) if value is None else _pair(value)
    if not low < high:
        raise ValueError(f"guidance_interval must begin below its end, and not {low:g} to {high:g}")
    return low, high


def _pair(value: Any) -> tuple[float, float]:
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
        raise ValueError(f"guidance_interval must be two numbers, like (0.3, 5), not {value!r}")
    low, high = (_number(end, "an end of guidance_interval") for end in value)
    return low, high


def _whole(value: Any, name: str, low: int, high: float = math.inf) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, not {value!r}") from None
    if not low <= number <= high:
        limits = f"at least {low}" if high == math.inf else f"between {low} and {high}"
        raise ValueError(f"{name} must be {limits}, not {number}")
    return number


def open_picture(picture: Picture) -> Image.Image:
    """Any picture -> 8-bit RGB, upright; what is transparent becomes white."""
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8:
            raise ValueError(f"a picture's array must hold uint8, not {picture.dtype}")
        picture = Image.fromarray(picture)
    elif not isinstance(picture, Image.Image):
        picture = Image.open(picture)
    picture = ImageOps.exif_transpose(picture)  # cameras write sideways and say so
    if picture.mode.startswith("I"):  # 16-bit grey, which Pillow would clip, not scale
        levels = np.asarray(picture).clip(0, 65535) / 257
        picture = Image.fromarray(levels.round().astype(np.uint8))
    if picture.mode == "La":  # the one mode that does not convert by itself
        picture = picture.convert("LA")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")
