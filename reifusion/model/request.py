"""What may be asked of a model, checked before any work starts."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field, replace

import torch
from PIL import Image
from torch import Tensor

from .asked import Guide, Prompt
from .config import ModelConfig
from .limits import (
    finite_number,
    interval,
    is_pair,
    latents_or_none,
    number,
    side,
    texts_of,
    whole_number,
)
from .noise import Source
from .pictures import Picture, open_both
from .sentences import shown
from .tuning import check, sampler_of


@dataclass
class Request:
    """Everything that decides what is drawn: the settings of `generate` and `denoise`.

    None leaves a setting open: `for_model` fills it in with the model's own. Raises ValueError, in one
    sentence, for a request that cannot be drawn.
    """

    prompt: Prompt  # one picture for each; may be empty
    negative: Prompt | None = None  # what to keep away from: one for all prompts, or one for each
    _: KW_ONLY
    init_image: Picture | None = None  # img2img: begin with this picture, not with noise alone
    mask: Picture | None = None  # inpainting: white is redrawn; black and transparent parts are kept
    strength: float = 0.8  # of img2img, in (0, 1]: how much noise the picture gets
    cfg: float | None = None  # the guidance scale, s in the guidance equation; 1 is none, and twice as fast
    sampler: str | None = None  # one of SAMPLERS
    schedule: str | None = None  # one of SCHEDULES: which noise levels it visits; None: the sampler's own
    eta: float | None = None  # of some samplers, 0 … 1: how much of a step is fresh noise
    s_noise: float | None = None  # of samplers that add noise: a factor of it
    churn: float | None = None  # of euler_churn: how far it goes back up, in all
    steps: int | None = None  # 1 … 1000
    seed: int | None = None  # picture k is drawn from seed + k; None: a new one, see picture.info["seed"]
    size: tuple[int | None, int | None] | None = None  # width and height, multiples of 8
    num: int = 1  # pictures for each prompt
    clip_skip: int = 0  # layers of the text encoder to leave out, from the end
    source: Callable[[int], Source] | None = None  # of a seed: what noise is drawn from; None: a generator
    noise: Tensor | None = None  # the noise to begin with, (B, 4, H/8, W/8); None: drawn from the seeds
    latents: Tensor | None = None  # the latents to begin with, as the sampler scales them, (B, 4, H/8, W/8)
    # The step to begin at, with these latents, from 0 on. Samplers that call the network twice in a step have
    # another `Step.index`, and those that add noise draw that of the first steps again: give another seed.
    start: int = 0
    guide: Guide | None = None  # stands in for guidance
    guidance_rescale: float = 0.0  # 0 … 1: how much of the contrast that guidance adds is taken back
    guidance_interval: tuple[float, float] | None = None  # guidance only for `Step.sigma` between the two
    image_guidance: float | None = None  # of models that edit: how closely to follow init_image; 1 is none

    # One of each for every picture: all of the first prompt, then all of the second, …
    prompts: list[str] = field(init=False, repr=False)
    negatives: list[str] = field(init=False, repr=False)
    seeds: list[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        prompts, negatives = texts_of(self.prompt), texts_of("" if self.negative is None else self.negative)
        negatives = negatives * len(prompts) if len(negatives) == 1 else negatives
        if len(negatives) != len(prompts):
            raise ValueError(
                f"{len(prompts)} prompts need as many negative ones, or one, not {len(negatives)}"
            )
        check(self)
        if not 0 < number(self.strength, "strength") <= 1:
            raise ValueError(f"strength must be above 0 and at most 1, not {self.strength}")
        if not 0 <= number(self.guidance_rescale, "guidance_rescale") <= 1:
            raise ValueError(f"guidance_rescale must be between 0 and 1, not {self.guidance_rescale}")
        finite_number(self.cfg, "cfg")
        finite_number(self.image_guidance, "image_guidance")
        self.seed = secrets.randbelow(2**32) if self.seed is None else self.seed
        self.seed = whole_number(self.seed, "the seed", 0, 2**63 - 1)
        self.steps = None if self.steps is None else whole_number(self.steps, "the number of steps", 1, 1000)
        self.num = whole_number(self.num, "the number of images", 1)
        self.clip_skip = whole_number(self.clip_skip, "clip_skip", 0)
        self.start = whole_number(self.start, "start", 0)
        if self.start and self.latents is None:
            raise ValueError("start needs the latents to start from")
        if self.guidance_interval is not None:
            self.guidance_interval = interval(self.guidance_interval)
        if self.size is not None and not is_pair(self.size):
            raise ValueError(f"a size is a width and a height, like (512, 768), not {shown(self.size)}")
        latents_or_none(self.noise, "noise")
        latents_or_none(self.latents, "latents")
        self.init_image, self.mask = open_both(self.init_image, self.mask)
        self.prompts = [text for text in prompts for _ in range(self.num)]
        self.negatives = [text for text in negatives for _ in range(self.num)]
        self.seeds = [self.seed + k for k in range(len(self.prompts))]
        whole_number(self.seeds[-1], "the last picture's seed", 0, 2**63 - 1)

    @property
    def guidance(self) -> tuple[float, float, tuple[float, float]]:
        """Scale, rescale and interval, as `Guidance` takes them; without guidance the scale is 1."""
        scale = 1.0 if self.cfg is None else self.cfg
        return scale, self.guidance_rescale, self.guidance_interval or (-math.inf, math.inf)

    def generators(self) -> list[torch.Generator | Source]:
        """What the noise of each picture is drawn from, begun anew."""
        return [(self.source or torch.Generator().manual_seed)(seed) for seed in self.seeds]

    def for_model(self, config: ModelConfig) -> Request:
        """This request with everything that it leaves open filled in with the model's own settings.

        A size that was left open is that of the noise or latents that were given, or else the size that the
        model was trained on, or, for an input image, the image's shape with that as the shorter side, and at
        most twice as long as wide. A model that edits its input image begins with noise alone, which is a
        strength of 1, and follows that image as in Brooks et al. 2023. Raises ValueError for a sampler, size
        or image_guidance that does not fit the model.
        """
        if self.image_guidance is not None and not config.edits:
            raise ValueError(f"image_guidance is for models that edit pictures, which {config.name} does not")
        width, height = self.init_image.size if isinstance(self.init_image, Image.Image) else (1, 1)
        scale, factor = config.size / min(width, height), config.multiple
        given = self.noise if self.latents is None else self.latents
        asked_width, asked_height = self.size or (None, None)
        if given is not None and self.size is None:
            asked_height, asked_width = (places * config.vae.factor for places in given.shape[2:])
        steps = config.steps if self.steps is None else self.steps
        if self.start >= steps:
            raise ValueError(f"start must be below the number of steps, {steps}, and not {self.start}")
        size = (
            side("width", asked_width, min(width * scale, 2 * config.size), factor),
            side("height", asked_height, min(height * scale, 2 * config.size), factor),
        )
        return replace(
            self,
            sampler=sampler_of(self, config),
            steps=steps,
            cfg=config.cfg if self.cfg is None else self.cfg,
            size=size,
            strength=1.0 if config.edits else self.strength,
            image_guidance=1.5 if config.edits and self.image_guidance is None else self.image_guidance,
        )
