"""What may be asked through A1111's API, and the settings that it stands for.

A field that is left out is the model's own, and not that program's 512×512 and 50 steps. Fields that would
change the picture there and cannot here are refused by name; unknown ones are ignored, as there.
Looked up in AUTOMATIC1111/stable-diffusion-webui 1.7 to 1.10, and in what the client webuiapi 0.9.17 sends.
"""

from __future__ import annotations

import json
import math
import re
import secrets
from dataclasses import replace
from typing import Any

from PIL import Image, ImageFilter, ImageOps
from pydantic import BaseModel, ConfigDict, Field

from ..a1111 import LATENT, sampler_of
from ..model.pictures import open_mask, open_picture
from ..model.samplers import SAMPLERS
from ..model.sentences import shown
from ..model.spacing import SCHEDULES
from ..sampling.schedules import TITLES
from ..settings import Settings
from ..spelling import LoRA
from .errors import Refusal
from .pictures import of_text
from .service import Service

# What is not here, with the values that mean nothing.
WITHOUT: dict[str, tuple[Any, ...]] = {
    "styles": (None, []), "tiling": (None, False), "restore_faces": (None, False),
    "seed_resize_from_h": (-1, 0), "seed_resize_from_w": (-1, 0), "s_min_uncond": (None, 0),
    "s_tmin": (None, 0), "s_tmax": (None, 0, math.inf), "refiner_checkpoint": (None, "", "None"),
    "script_name": (None, ""), "save_images": (False,), "hr_second_pass_steps": (0,), "hr_resize_x": (0,),
    "hr_resize_y": (0,), "hr_checkpoint_name": (None, "", "Use same checkpoint"),
    "hr_sampler_name": (None, "", "Use same sampler"), "hr_prompt": ("",), "hr_negative_prompt": ("",),
    "initial_noise_multiplier": (None, 1), "include_init_images": (False,),
}  # fmt: skip
UPSCALERS: dict[Any, str] = {**LATENT, **dict.fromkeys(("Lanczos", None, "", "None"), "lanczos")}
OPTIONS = ("sd_model_checkpoint", "CLIP_stop_at_last_layers")


class Txt2Img(BaseModel):
    """What to draw. There are more fields there; those that would change the picture are refused by name."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())
    prompt: str = Field("", description="May have (word:1.2) and <lora:name:0.8>.")
    negative_prompt: str | None = ""
    seed: int | None = Field(-1, description="-1: a new one.")
    subseed: int | None = Field(-1, description="Of a variation; -1: a new one.")
    subseed_strength: float = Field(0, ge=0, le=1, description="How far a variation goes.")
    steps: int | None = None
    cfg_scale: float | None = None
    width: int | None = Field(None, ge=1)
    height: int | None = Field(None, ge=1)
    batch_size: int = Field(1, ge=1)
    n_iter: int = Field(1, ge=1)
    sampler_name: str | None = None
    sampler_index: str | None = None
    scheduler: str | None = None
    eta: float | None = None
    s_churn: float | None = None
    s_noise: float | None = None
    denoising_strength: float | None = None
    enable_hr: bool = False
    hr_scale: float = 2.0
    hr_upscaler: str | None = None
    override_settings: dict[str, Any] | None = None
    alwayson_scripts: dict[str, Any] | None = None
    send_images: bool = True
    force_task_id: str | None = None


class Img2Img(Txt2Img):
    """What to make of a picture."""

    init_images: list[str] | None = Field(None, description="One picture, in base64.")
    mask: str | None = Field(None, description="White is redrawn.")
    mask_blur: float = Field(4, ge=0, le=64)
    mask_blur_x: float | None = Field(None, description="If it is given, as mask_blur.")
    mask_blur_y: float | None = None
    inpainting_mask_invert: int = 0
    inpaint_full_res: bool = Field(True, description="Only the masked part, at the size that is asked for.")
    inpaint_full_res_padding: int = Field(0, ge=0, description="Pixels around it.")
    inpainting_fill: int = Field(0, description="Begin with 0, colours from around, or 1, what was there.")
    resize_mode: int = Field(0, description="0 stretches the picture, 1 crops it.")
    image_cfg_scale: float | None = None


class Options:
    """What can be set with `/sdapi/v1/options`, for all requests that do not say otherwise."""

    def __init__(self, service: Service) -> None:
        self._catalog = service.catalog
        self.values: dict[str, Any] = {
            "sd_model_checkpoint": service.catalog.usual,
            "CLIP_stop_at_last_layers": service.usual.clip_skip + 1,
        }

    def with_(self, changes: dict[str, Any], field: str) -> dict[str, Any]:
        """Returns the options with changes. Raises Refusal for an option, or a value, that is not here."""
        for name, value in changes.items():
            if name not in OPTIONS:
                raise Refusal(400, f"there is no option {shown(name)}; there are {', '.join(OPTIONS)}", field)
            if name == "sd_model_checkpoint":
                if not isinstance(value, str):
                    raise Refusal(400, f"{name} must be the name of a model, not {shown(value)}", name)
                self._catalog.model_of(value)
            elif not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 12:
                raise Refusal(400, f"{name} must be between 1 and 12, not {shown(value)}", name)
        return self.values | changes


def settings_of(service: Service, options: Options, asked: Txt2Img) -> Settings:
    """Returns the settings that a request stands for. Raises Refusal for what is not here."""
    settings = _common(service, options, asked)
    strength = 0.75 if asked.denoising_strength is None else asked.denoising_strength
    if isinstance(asked, Img2Img):
        return _with_picture(replace(settings, strength=strength), asked)
    if not asked.enable_hr:
        return settings
    by = _one_of("hr_upscaler", asked.hr_upscaler, UPSCALERS)
    return replace(settings, hires=asked.hr_scale, hires_by=by, hires_strength=strength)


def _with_picture(settings: Settings, asked: Img2Img) -> Settings:
    settings = replace(settings, image_guidance=asked.image_cfg_scale)
    if not asked.mask:
        return settings
    blurs = {one for one in (asked.mask_blur_x, asked.mask_blur_y) if one is not None}
    if blurs - {asked.mask_blur}:
        raise Refusal(422, "mask_blur_x and mask_blur_y cannot differ from mask_blur here", "mask_blur_x")
    padding = asked.inpaint_full_res_padding if asked.inpaint_full_res else None
    return replace(settings, mask_blur=asked.mask_blur, only_masked=padding)


def _common(service: Service, options: Options, asked: Txt2Img) -> Settings:
    """Returns the settings of both kinds of request. Raises Refusal for what is not here."""
    for name, value in (asked.model_extra or {}).items():
        if name in WITHOUT and value not in WITHOUT[name]:
            raise Refusal(422, f"{name} cannot be {shown(value)} here", name)
    echoed = json.dumps(asked.model_dump(exclude={"init_images", "mask"}), ensure_ascii=False)
    if re.search("[\ud800-\udfff]", echoed):
        raise Refusal(422, "the request has a lone surrogate, as \\ud83d, which is no letter")
    said = options.with_(asked.override_settings or {}, "override_settings")
    prompt, loras = _loras(service, asked.prompt)
    negative = asked.negative_prompt or ""
    if (asked.width is None) != (asked.height is None):
        raise Refusal(422, "width and height are given together, or not at all", "width")
    sampler, schedule = _sampler(asked)
    tuning: dict[str, Any] = {"eta": asked.eta, "s_noise": asked.s_noise, "churn": asked.s_churn or None}
    kind = SAMPLERS.get(sampler or "")
    return replace(
        service.usual,
        prompt=prompt,
        negative=negative,
        model=service.catalog.model_of(said["sd_model_checkpoint"]),
        lora=loras,
        clip_skip=said["CLIP_stop_at_last_layers"] - 1,
        seed=None if asked.seed in (None, -1) else asked.seed,
        variation=asked.subseed_strength,
        variation_seed=secrets.randbelow(2**32) if asked.subseed in (None, -1) else asked.subseed,
        steps=asked.steps,
        cfg=asked.cfg_scale,
        size=None if asked.width is None or asked.height is None else (asked.width, asked.height),
        sampler=sampler,
        schedule=schedule,
        # Clients send these whatever the sampler is.
        **{key: value for key, value in tuning.items() if getattr(kind, key, None) is not None},
        emphasis="a1111" if re.search(r"[()\[\]\\]|\bBREAK\b|\bAND\b", prompt + negative) else None,
    )


def _loras(service: Service, prompt: str) -> tuple[str, tuple[LoRA, ...]]:
    """'a cat <lora:zork:0.8:lbw=MIDD>' -> 'a cat', and the file with its weight and block weights"""
    loras: list[LoRA] = []
    for name, *rest in (text.split(":") for text in re.findall(r"<lora:([^<>]*)>", prompt)):
        weight, blocks = (rest or ["1"])[0], rest[1:]
        try:
            number = float(weight)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            said = f"the weight of the LoRA {shown(name)} is {shown(weight)}, and no number"
            raise Refusal(422, said, "prompt")
        if blocks and not (len(blocks) == 1 and blocks[0].startswith("lbw=")):
            raise Refusal(422, f"of the LoRA {shown(name)}, a weight and lbw= are read here", "prompt")
        file = service.catalog.lora_of(name)
        loras.append((file, number, blocks[0].removeprefix("lbw=")) if blocks else (file, number))
    return re.sub(r"\s*<lora:[^<>]*>", "", prompt).strip(), tuple(loras)


def _sampler(asked: Txt2Img) -> tuple[str | None, str | None]:
    """Returns our names of the sampler and the schedule. Raises Refusal, with all names, for others."""
    name, label = asked.sampler_name or asked.sampler_index, (asked.scheduler or "Automatic").lower()
    schedules = {ours: ours for ours in SCHEDULES} | {title.lower(): ours for ours, title in TITLES.items()}
    schedules |= {"uniform": "normal"}
    if label != "automatic" and label not in schedules:
        there = ", ".join(SCHEDULES)
        raise Refusal(400, f"there is no scheduler {shown(label)}; there are {there}", "scheduler")
    if name is None:
        return None, schedules.get(label)
    titles = {title: one.title for ours, one in SAMPLERS.items() for title in (ours, one.title.lower())}
    # Before version 1.9 the schedule was a part of the sampler's name.
    plain, old = re.fullmatch(r"(.*?)( karras| exponential)?", name.lower()).groups("")  # type: ignore[union-attr]
    title = titles.get(name.lower()) or (titles[plain] + old.title() if plain in titles else "")
    if not title:
        there = ", ".join(one.title for one in SAMPLERS.values())
        raise Refusal(400, f"there is no sampler {shown(name)}; there are {there}", "sampler_name")
    facts = {"Sampler": title}
    if label != "automatic":
        facts["Schedule type"] = TITLES.get(schedules[label], schedules[label])
    elif not old:
        facts["Schedule type"] = "Automatic"
    return sampler_of(facts, bool(asked.s_churn))


def _one_of(field: str, value: Any, known: dict[Any, str]) -> str:
    if value not in known:
        there = ", ".join(name for name in known if name)
        raise Refusal(422, f"there is no {field} {shown(value)}; there are {there}", field)
    return known[value]


def inputs_of(service: Service, asked: Img2Img) -> dict[str, Image.Image]:
    """Returns the pictures that were sent, by their settings."""
    if not asked.init_images:
        raise Refusal(404, "Init image not found", "init_images")
    if len(asked.init_images) > 1:
        raise Refusal(422, "one picture is taken, and not several", "init_images")
    if asked.resize_mode not in (0, 1):
        raise Refusal(422, "resize_mode can only be 0, stretch, or 1, crop, here", "resize_mode")
    picture = of_text(asked.init_images[0], "init_images", service.limits.input_pixels)
    inputs = {"init_image": open_picture(picture)}
    if asked.mask:
        mask = of_text(asked.mask, "mask", service.limits.input_pixels)
        alpha = mask.getchannel("A") if mask.mode == "RGBA" else None
        has_shape = alpha is not None and alpha.getextrema() != (255, 255)
        if alpha and has_shape:
            mask = alpha.point(lambda a: 255 * (a > 128))
        else:
            mask = open_mask(mask) if mask.mode.startswith("I") else mask.convert("L")  # 16 bits are scaled
        if mask.size != picture.size:
            mask = mask.resize(picture.size, Image.Resampling.LANCZOS)
        inputs["mask"] = ImageOps.invert(mask) if asked.inpainting_mask_invert else mask
        if asked.inpainting_fill == 0:
            inputs["init_image"] = _filled(inputs["init_image"], inputs["mask"])
        elif asked.inpainting_fill != 1:
            raise Refusal(422, "inpainting_fill can only be 0 or 1 here", "inpainting_fill")
    only_masked = asked.mask and asked.inpaint_full_res
    if asked.width and asked.height and asked.resize_mode == 0 and not only_masked:
        size = min(asked.width, service.limits.side), min(asked.height, service.limits.side)
        inputs = {name: one.resize(size, Image.Resampling.LANCZOS) for name, one in inputs.items()}
    return inputs


def _filled(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """The picture with colours from around the mask where the mask is white.

    As there: what is not masked is blurred in several widths, and the narrower lie over the wider ones.
    """
    kept = picture.convert("RGBA")
    kept.putalpha(ImageOps.invert(mask))
    made = Image.new("RGBA", picture.size)
    for width, layers in ((256, 1), (64, 1), (16, 2), (4, 4), (2, 2), (0, 1)):
        blurred = kept.convert("RGBa").filter(ImageFilter.GaussianBlur(width)).convert("RGBA")
        for _ in range(layers):
            made.alpha_composite(blurred)
    return made.convert("RGB")
