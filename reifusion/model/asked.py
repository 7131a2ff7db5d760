"""The types of what may be asked of a model, for type checkers. `Request` says what the settings mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias, TypedDict

from torch import Tensor

from .noise import Source
from .pictures import Picture

if TYPE_CHECKING:
    from .step import Turn

# A text or several; or vectors in place of what the text encoder would make of texts, (B, 77, 768), of one
# picture each; or vectors for each turn of the loop, (turns, B, 77, 768).
Prompt: TypeAlias = str | Sequence[str] | Tensor
# Takes the network's output with the prompt and with the negative one, each (B, 4, H/8, W/8), the second None
# in a turn without guidance, and returns the output to go by.
Guide: TypeAlias = Callable[[Tensor, Tensor | None, "Turn"], Tensor]


class Rest(TypedDict, total=False):
    """The types of the settings that `generate` takes by name only; `Request` says what they mean."""

    init_image: Picture | None
    mask: Picture | None
    cfg: float | None
    sampler: str | None
    schedule: str | None
    eta: float | None
    s_noise: float | None
    churn: float | None
    steps: int | None
    size: tuple[int | None, int | None] | None
    clip_skip: int
    source: Callable[[int], Source] | None
    noise: Tensor | None
    latents: Tensor | None
    start: int
    guide: Guide | None
    guidance_rescale: float
    guidance_interval: tuple[float, float] | None
    image_guidance: float | None
    width: int | None
    height: int | None


class Asked(Rest, total=False):
    """The types of all settings but the prompts and their number, also in the words of the first call."""

    seed: int | None
    strength: float
    uncond_prompt: Prompt | None
    input_image: Picture | None
    do_cfg: bool
    cfg_scale: float | None
    sampler_name: str | None
    n_inference_steps: int | None


class Several(Asked, total=False):
    """… and the number."""

    num: int
    num_images: int
