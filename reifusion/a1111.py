"""Settings as text, in the form that AUTOMATIC1111's web UI established and other programs read.

a cat <lora:zork:0.8>
Negative prompt: a dog
Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 1, Size: 512x768, Model: "one, two"
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from . import __version__
from .model.samplers import SAMPLERS
from .model.sentences import shown
from .model.spacing import SCHEDULES
from .sampling.elsewhere import sampler_of as sampler_of
from .sampling.schedules import TITLES
from .settings import ABOUT, Settings
from .spelling import Control, read_size

RNG = {"philox": "NV", "cpu": "CPU"}  # theirs, for ours; without it, theirs is a GPU's
MODES = {
    "balanced": "Balanced", "prompt": "My prompt is more important", "control": "ControlNet is more important"
}  # fmt: skip
NEGATIVE = "Negative prompt: "
# Its upscalers of latents -> ours
LATENT = {
    "Latent": "latent-bilinear", "Latent (antialiased)": "latent-bilinear-antialiased",
    "Latent (bicubic)": "latent-bicubic", "Latent (bicubic antialiased)": "latent",
    "Latent (nearest)": "latent-nearest", "Latent (nearest-exact)": "latent-nearest-exact",
}  # fmt: skip
TITLES_OF_LATENT = {name: title for title, name in LATENT.items()} | {"latent-bilinear": "Latent (bilinear)"}
# Facts that decide a picture, and that are not built in
LOST = (
    "Refiner", "Seed resize from", "Hires sampler", "Hires prompt", "Tiling", "Face restoration", "Pad conds",
    "Skip layers",
)  # fmt: skip
TAG = re.compile(r"\s*<lora:([^<>:]+)((?::[^<>:]*)*)>")  # <lora:name:0.8:lbw=MIDD>
FACT = re.compile(r'([^:,"]+):\s*("(?:[^"\\]|\\.)*"|[^,]*)(?:,|$)')


def write(settings: Settings, model: str, model_hash: str, lora_hashes: Sequence[str] = ()) -> str:
    """Returns the settings as text. model: its name."""
    loras = [(Path(file).stem, weight, *blocks) for file, weight, *blocks in settings.lora]
    hashes = [f"{name}: {digest}" for (name, *_), digest in zip(loras, lora_hashes)]
    facts = {
        "Steps": settings.steps,
        "Sampler": SAMPLERS[str(settings.sampler)].title,
        "Schedule type": TITLES.get(settings.schedule, settings.schedule) if settings.schedule else None,
        "CFG scale": settings.cfg,
        "Image CFG scale": settings.image_guidance,
        "Seed": settings.seed,
        "Size": ABOUT["size"].write(settings.size),
        "Model hash": model_hash,
        "Model": model,
        "Lora hashes": ", ".join(hashes) if loras else None,
        "Denoising strength": _strength(settings),
        "Hires upscale": settings.hires if _twice(settings) else None,
        "Hires upscaler": TITLES_OF_LATENT.get(settings.hires_by, "Lanczos") if _twice(settings) else None,
        "Emphasis": "No norm" if settings.emphasis == "plain" else None,
        "Clip skip": settings.clip_skip + 1 if settings.clip_skip else None,  # they count from 1
        "Eta DDIM" if settings.sampler == "ddim" else "Eta": settings.eta,
        "Sigma noise": settings.s_noise,
        "Sigma churn": settings.churn,
        "Variation seed": settings.variation_seed if settings.variation else None,
        "Variation seed strength": settings.variation or None,
        "ENSD": settings.ensd or None,
        "RNG": RNG.get(settings.there().rng) if settings.rng or settings.manner else None,
        "Mask blur": settings.mask_blur or None,
        "Masked area padding": settings.only_masked,
        **{f"ControlNet {k}": _unit(one, settings.control_mode) for k, one in enumerate(settings.control)},
        "Version": f"reifusion {__version__}",
    }
    written = [
        f"<lora:{name}:{weight:g}{''.join(f':lbw={one}' for one in blocks)}>"
        for name, weight, *blocks in loras
    ]
    lines = [" ".join([settings.prompt or "", *written])]
    if settings.negative:
        lines.append(NEGATIVE + settings.negative)
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in facts.items() if value is not None))
    return "\n".join(lines)


def _twice(settings: Settings) -> bool:
    return settings.hires != 1 and not settings.init_image  # they have a second pass for words alone


def _strength(settings: Settings) -> float | None:
    if settings.init_image:
        return settings.strength
    return settings.hires_strength if _twice(settings) else None


def _unit(control: Control, mode: str) -> str:
    """A ControlNet as its extension there writes it, with our names."""
    file, _, weight, start, end = control
    facts = {
        "Module": "none", "Model": Path(file).stem, "Weight": weight, "Resize Mode": "Crop and Resize",
        "Guidance Start": start, "Guidance End": end, "Control Mode": MODES.get(mode, mode),
    }  # fmt: skip
    return ", ".join(f"{name}: {value}" for name, value in facts.items())


def _quoted(value: Any) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,:"\n\r]', text) else text


def read(text: str) -> tuple[Settings, dict[str, str]]:
    """Reads such a text: the settings, and all facts of its last line by their names there.

    A LoRA is the file of its name, `.safetensors`. Warns of what is not built in, a sampler, a schedule or an
    upscaler, and leaves it open. Raises ValueError, in one sentence, for a
    text without a line of facts, and for a fact that must be a number and is none.
    """
    from .steer.manners import K_DIFFUSION

    lines = text.strip().split("\n")
    last = max((k for k, line in enumerate(lines) if line.startswith("Steps: ")), default=None)
    if last is None:
        raise ValueError("it has no line that begins with Steps")
    begin = next((k for k, line in enumerate(lines[:last]) if line.startswith(NEGATIVE.strip())), last)
    facts = _facts(lines[last].partition(", SDCPP: ")[0])  # behind which stable-diffusion.cpp has JSON
    twice = "Hires upscale" in facts or "Hires resize" in facts
    numbers: dict[str, tuple[str, Callable[[str], Any]]] = {
        "Steps": ("steps", int),
        "CFG scale": ("cfg", float),
        "Image CFG scale": ("image_guidance", float),
        "Seed": ("seed", int),
        "Size": ("size", read_size),
        "Denoising strength": ("hires_strength" if twice else "strength", float),
        "Hires upscale": ("hires", float),
        "Hires resize": ("resized", read_size),
        "Clip skip": ("clip_skip", lambda value: max(0, int(value) - 1)),
        "Eta": ("eta", float),
        "Eta DDIM": ("eta", float),
        "Sigma noise": ("s_noise", float),
        "Sigma churn": ("churn", float),
        "Variation seed": ("variation_seed", int),
        "Variation seed strength": ("variation", float),
        "ENSD": ("ensd", lambda value: int(value) if value != "None" else 0),
    }
    values = {}
    for title, (name, kind) in numbers.items():
        if title in facts:
            try:
                values[name] = kind(facts[title])
            except ValueError:
                raise ValueError(f"its {title} is {shown(facts[title])}") from None
    negative = "\n".join(lines[begin:last]).removeprefix(NEGATIVE.strip()).strip()
    prompt, values["lora"] = _loras("\n".join(lines[:begin]).strip())
    resized, size = values.pop("resized", None), values.get("size")
    if resized and "hires" not in values and size and all(size):
        ratios = [to / side for to, side in zip(resized, size) if to]  # 0: the side that follows the other
        if ratios and max(ratios) - min(ratios) < 0.02 and 1 <= ratios[0] <= 4:
            values["hires"] = ratios[0]
        elif ratios:
            warnings.warn("not repeated here: Hires resize", stacklevel=2)
    if ".cpp" in facts.get("Version", "") and values.get("eta") in (0.0, math.inf):
        del values["eta"]  # its default, old or new: what the sampler has
    if "hires" in values:
        values["hires_by"] = _upscaler(facts.get("Hires upscaler", "Latent"))
        if facts.get("Hires upscaler") == "Latent" and "reifusion" in facts.get("Version", ""):
            values["hires_by"] = "latent"  # which is what we wrote for it before there were others
    sampler, schedule = (
        _cpp(facts) if ".cpp" in facts.get("Version", "") else sampler_of(facts, bool(values.get("churn")))
    )
    for option in ("eta", "s_noise", "churn"):
        if getattr(SAMPLERS.get(sampler or ""), option, None) is None:
            values.pop(option, None)  # which other programs write for samplers that do not use it
    old = "Schedule type" not in facts and not re.search(r"reifusion|\.cpp", facts.get("Version", ""))
    if old and schedule is None and sampler in K_DIFFUSION:
        schedule = "normal"  # before version 1.9, what its name did not say
    _tell(facts, values)
    rng = {"NV": "philox", "cuda": "philox", "CPU": "cpu", "cpu": "cpu"}.get(facts.get("RNG", ""))
    return Settings(prompt, negative, sampler=sampler, schedule=schedule, rng=rng, **values), facts


def _loras(prompt: str) -> tuple[str, tuple[Any, ...]]:
    """'a cat <lora:zork:0.8:lbw=MIDD>' -> 'a cat', (("zork.safetensors", 0.8, "MIDD"),)"""
    loras: list[tuple[Any, ...]] = []
    for name, more in TAG.findall(prompt):
        weight, *rest = more[1:].split(":") if more else ["1"]
        try:
            number = float(weight)
        except ValueError:
            raise ValueError(f"the weight of its LoRA {shown(name)} is {shown(weight)}") from None
        blocks = [one.removeprefix("lbw=") for one in rest if one.startswith("lbw=")]
        if other := [one for one in rest if not one.startswith("lbw=")]:
            warnings.warn(f"of its LoRA {shown(name)}, {', '.join(other)} is not repeated", stacklevel=3)
        file = re.split(r"[/\\]", name)[-1] + ".safetensors"  # a name, and no place
        loras.append((file, number, *blocks[:1]))
    return TAG.sub("", prompt).strip(), tuple(loras)


def _tell(facts: Mapping[str, str], values: dict[str, Any]) -> None:
    """Warns of facts that decided the picture and are not repeated."""
    rule = facts.get("Emphasis", "Original")
    if rule == "No norm":
        values["emphasis"] = "plain"
    lost = [name for name in facts if name in LOST or name.startswith("ControlNet ")]
    if facts.get("Hires steps", facts.get("Steps")) not in (facts.get("Steps"), "0"):
        lost.append("Hires steps")
    if rule not in ("Original", "No norm"):
        lost.append("Emphasis")
    if lost:
        warnings.warn(f"not repeated here: {', '.join(lost)}", stacklevel=3)


def _upscaler(title: str) -> str:
    if title == "Latent (bilinear)":  # ours
        return "latent-bilinear"
    if title in LATENT:
        return LATENT[title]
    if title != "Lanczos":
        warnings.warn(f"the upscaler {shown(title)} is not built in; it is Lanczos here", stacklevel=3)
    return "lanczos"


def _cpp(facts: dict[str, str]) -> tuple[str | None, str | None]:
    """Our sampler and schedule of stable-diffusion.cpp's "Sampler: dpm++2m karras"."""
    from .steer.manners import names_here

    asked, _, label = facts.get("Sampler", "").partition(" ")
    sampler, schedule = names_here("sdcpp", asked, label or None)
    if sampler not in SAMPLERS:
        return sampler_of(facts)  # which knows titles, or warns
    if schedule not in (None, *SCHEDULES):
        warnings.warn(f"{asked} is used without the schedule {shown(label)}, not built in", stacklevel=3)
        schedule = None
    own = SAMPLERS[sampler].own_schedule
    return sampler, None if own else schedule


def _facts(line: str) -> dict[str, str]:
    """'Steps: 20, Model: "one, two"' -> {"Steps": "20", "Model": "one, two"}"""
    facts: dict[str, str] = {}
    at = 0
    while at < len(line):
        found = FACT.match(line, at)
        if found is None:  # no fact, as the 8 in "Skip layers: [7, 8, 9, ]"
            at = line.find(",", at) + 1 or len(line)
            continue
        name, value = found[1].strip(), found[2].strip()
        if value.startswith('"'):
            with suppress(ValueError):  # from a quotation mark that means itself
                value = str(json.loads(value))
        facts[name], at = value, found.end()
    return facts
