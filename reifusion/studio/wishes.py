"""From what the page sends to settings, and back.

The page sends settings as texts, in the form of a command line, so each of them means here what it means
there. Pictures and masks come as data URLs and are kept in the folder, so that a command can name them.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from .. import album
from ..model.config import ModelConfig
from ..model.pictures import open_mask, open_picture
from ..model.request import Request
from ..model.samplers import SAMPLERS, samplers_for
from ..model.sentences import shown
from ..model.spacing import SCHEDULES
from ..sampling.schedules import TITLES
from ..settings import ABOUT, Settings, parsed
from ..steer import controlnet, emphasis, hires, manners

# What has a place of its own on the page; all else is under "More". A page must not run code.
OWN = ("prompt", "negative", "model", "sampler", "schedule", "steps", "cfg", "seed", "size", "strength",
       "init_image", "mask")  # fmt: skip
NEVER = ("code",)
CHOICES: dict[str, tuple[str, ...]] = {
    "emphasis": tuple(emphasis.RULES),
    "manner": tuple(manners.MANNERS),
    "rng": tuple(manners.NOISES),
    "control_mode": tuple(controlnet.MODES),
    "hires_by": hires.WAYS,
    "dtype": ("bf16", "fp16", "fp32"),
    "prediction_type": ("epsilon", "v_prediction", "flow"),
}
FAR = 4  # times the model's side: larger pictures are refused


def settings(texts: Mapping[str, Any], picture: str | None, mask: str | None, folder: Path) -> Settings:
    """Returns what the page asks for.

    texts: settings by name, each a text, or a list of texts for those that may be given several times; ""
    leaves one open. picture, mask: data URLs; the mask's opaque part is redrawn. Raises ValueError, in one
    sentence, for what no setting says.
    """
    if unknown := [name for name in texts if name not in ABOUT or name in NEVER]:
        raise ValueError(f"the page sent {unknown[0]}, which is no setting of a picture here")
    given = {name: _typed(name, text) for name, text in texts.items() if text not in ("", None, [])}
    kept: dict[str, str] = {}
    if picture is not None:
        opened = open_picture(_picture(picture))
        folder.mkdir(parents=True, exist_ok=True)
        kept["init_image"] = album.keep(opened, folder)
        if mask is not None:
            painted = open_mask(_picture(mask)).resize(opened.size)
            if painted.getbbox() is not None:
                kept["mask"] = album.keep(painted, folder)
    elif mask is not None:
        raise ValueError("a mask was painted, but there is no picture below it: open one first")
    return Settings(**{"prompt": "", **parsed(given), **kept})


def _typed(name: str, text: Any) -> Any:
    """Reads a text as the type that a command line would give; lists are of texts."""
    kind = ABOUT[name].kind
    if kind is list:
        several = [text] if isinstance(text, str) else text
        if not isinstance(several, list) or not all(isinstance(one, str) for one in several):
            raise ValueError(f"{ABOUT[name].title} is a list of texts, not {shown(text)}")
        return [one for one in several if one]
    if kind is bool:
        return text in (True, "true", "on")
    try:
        return kind(text)
    except (TypeError, ValueError, OverflowError):  # the last of an infinite number
        number = "whole number" if kind is int else "number"
        raise ValueError(f"{ABOUT[name].title} is a {number}, not {shown(str(text))}") from None


def texts(settings: Settings) -> dict[str, Any]:
    """Returns the settings as the page shows them, by name; what is as usual is left out."""
    shown: dict[str, Any] = {}
    for name, about in ABOUT.items():
        value = getattr(settings, name)
        if name in NEVER or name in ("init_image", "mask"):
            continue
        if value == about.default and name != "model":  # the page may have another model at hand
            continue
        if name == "dtype":  # a picture's file has PyTorch's name
            value = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}.get(value, value)
        if about.kind is list:
            shown[name] = [about.write(one) for one in value]
        else:
            shown[name] = value if isinstance(value, bool) else about.write(value)
    return shown


def fitting(request: Request, config: ModelConfig, times: float = 1) -> str:
    """Returns a warning for a picture that is far larger than those the model learned from, or "".

    times: what a second pass enlarges it by. Raises ValueError for one that is too large.
    """
    width, height = (round(times * (side or 0)) for side in request.size or (0, 0))
    most, share = FAR * config.size, width * height / config.size**2
    if width * height > most**2:
        raise ValueError(
            f"{width}x{height} is too large for a model of {config.size}x{config.size}: the studio draws at "
            f"most as many pixels as {most}x{most} has"
        )
    if share <= 4:
        return ""
    return (
        f"{width}x{height} has {share:.0f} times the pixels that the model learned from: each step takes "
        "about as much longer, and things may appear twice."
    )


def fields(config: ModelConfig) -> dict[str, Any]:
    """Returns what the page needs to know of the settings: titles, help, choices, and the model's own."""
    own = Request("").for_model(config)
    usual = {
        "sampler": own.sampler,
        "steps": own.steps,
        "cfg": own.cfg,
        "size": f"{config.size}x{config.size}",
    }
    samplers = {name: SAMPLERS[name].title for name in samplers_for(config.schedule.prediction_type)}
    kinds = {int: "whole", float: "number", bool: "yes", list: "several"}
    return {
        "usual": usual,
        "samplers": samplers,
        "schedules": {name: TITLES.get(name, name) for name in SCHEDULES},
        "all": {
            name: {
                "title": about.title,
                "help": about.help,
                "shown": about.shown,
                "kind": kinds.get(about.kind, "text"),
                "choices": CHOICES.get(name, ()),
                "more": name not in OWN,
            }
            for name, about in ABOUT.items()
            if name not in (*NEVER, "init_image", "mask")
        },
    }


def _picture(url: str) -> Image.Image:
    """A data URL -> a picture. Raises ValueError for anything else."""
    kind, comma, content = url.partition(",")
    try:
        if not (comma and kind.startswith("data:image/") and kind.endswith(";base64")):
            raise ValueError
        picture = Image.open(io.BytesIO(base64.b64decode(content, validate=True)))
        picture.load()
    except Exception:  # for a broken file, Pillow raises errors of nearly any type
        raise ValueError("what was opened cannot be read as a picture") from None
    return picture
