"""A request, in the words of `Request` or in those of the project's first call."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .asked import Prompt
from .request import Request

# The words of the project's first call, and the names that the same settings have here.
FIRST_WORDS = {
    "uncond_prompt": "negative",
    "input_image": "init_image",
    "cfg_scale": "cfg",
    "sampler_name": "sampler",
    "n_inference_steps": "steps",
    "num_images": "num",
}


def ask(prompt: Prompt | Request, negative: Prompt | None = None, **settings: Any) -> Request:
    """A request, in the words of `Request` or in those of the project's first call."""
    settings = {FIRST_WORDS.get(name, name): value for name, value in settings.items()}
    if negative is not None:
        settings["negative"] = negative
    if not settings.pop("do_cfg", True):
        settings["cfg"] = 1.0
    width, height = settings.pop("width", None), settings.pop("height", None)
    if (width, height) != (None, None):
        settings["size"] = (width, height)
    return replace(prompt, **settings) if isinstance(prompt, Request) else Request(prompt, **settings)
