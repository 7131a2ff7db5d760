"""ControlNets through A1111's API, as clients of its extension ask for them in `alwayson_scripts`.

Looked up in Mikubill/sd-webui-controlnet 1.1. What would change the picture there and cannot here is refused
by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from fastapi import APIRouter
from PIL import Image, ImageOps
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..model.pictures import fit, open_picture
from ..model.sentences import shown
from ..settings import Settings
from ..steer.edges import HIGH, LOW, edges
from .errors import Refusal
from .pictures import of_text, to_bytes, to_text
from .service import Service

MODES: dict[Any, str] = {
    "balanced": "balanced", "my prompt is more important": "prompt",
    "controlnet is more important": "control", "0": "balanced", "1": "prompt", "2": "control",
}  # fmt: skip
FITS = {
    "0": "stretch", "just resize": "stretch", "1": "crop", "crop and resize": "crop", "2": "fill",
    "resize and fill": "fill",
}  # fmt: skip
WITHOUT: dict[str, tuple[Any, ...]] = {
    "mask": (None, ""), "mask_image": (None, ""), "effective_region_mask": (None, ""),
    "advanced_weighting": (None, []), "inpaint_crop_input_image": (None, False, True),
    "hr_option": (None, "Both", "HiResFixOption.BOTH", 0), "input_mode": (None, "simple", "InputMode.SIMPLE"),
    "ipadapter_input": (None, []), "union_control_type": (None, "Unknown"),
}  # fmt: skip


class Unit(BaseModel):
    """One ControlNet with its picture."""

    model_config = ConfigDict(extra="allow")
    enabled: bool = True
    module: str | None = "none"
    model: str | None = None
    weight: float = Field(1.0, ge=0, le=2)
    image: str | dict[str, Any] | None = None
    input_image: str | dict[str, Any] | None = None  # its name before
    resize_mode: int | str = 1
    processor_res: float = -1
    threshold_a: float = -1
    threshold_b: float = -1
    guidance_start: float = Field(0.0, ge=0, le=1)
    guidance_end: float = Field(1.0, ge=0, le=1)
    pixel_perfect: bool = False
    control_mode: int | str = 0
    save_detected_map: bool = True


@dataclass(frozen=True)
class Steering:
    """What the units of a request say."""

    nets: tuple[tuple[str, float, float, float], ...] = ()  # of each: its file, weight, start and end
    mode: str = "balanced"
    hints: tuple[Image.Image, ...] = ()
    shown: tuple[Image.Image, ...] = ()  # hints that the client wants to see


def units_of(scripts: Mapping[str, Any] | None) -> list[Unit]:
    """Returns the units that are switched on. Raises Refusal for scripts of another kind."""
    units: list[Unit] = []
    for name, script in (scripts or {}).items():
        given = script.get("args") if isinstance(script, dict) else script
        if not given:
            continue
        if name.lower() != "controlnet" or not isinstance(given, list):
            raise Refusal(422, f"there is no script {shown(name)}; there is controlnet", "alwayson_scripts")
        for one in given:
            if not isinstance(one, dict):
                raise Refusal(422, "a unit of controlnet is an object of named values", "alwayson_scripts")
            try:
                units.append(Unit.model_validate(one))
            except ValidationError as error:
                first = error.errors()[0]
                wrong = f"controlnet: {'.'.join(map(str, first['loc']))}: {first['msg']}"
                raise Refusal(422, wrong, "alwayson_scripts") from None
    return [unit for unit in units if unit.enabled and unit.model not in (None, "", "None")]


def steering_of(
    service: Service, units: list[Unit], usual: Image.Image | None, size: tuple[int, int] | None
) -> Steering:
    """Reads the units' pictures and prepares their hints. usual: the picture of a unit without one."""
    modes = {_one_of("control_mode", unit.control_mode, MODES) for unit in units}
    if len(modes) > 1:
        raise Refusal(422, "all units have one control_mode here", "alwayson_scripts")
    nets, hints, wanted = [], [], []
    for unit in units:
        for name, value in (unit.model_extra or {}).items():
            if name in WITHOUT and value not in WITHOUT[name]:
                raise Refusal(422, f"controlnet: {name} cannot be {shown(value)} here", "alwayson_scripts")
        file = service.catalog.control_of(str(unit.model))
        hint = _hint(unit, _picture(service, unit, usual), size)
        nets.append((file, unit.weight, unit.guidance_start, unit.guidance_end))
        hints.append(hint)
        wanted += [hint] if unit.save_detected_map else []
    return Steering(tuple(nets), modes.pop(), tuple(hints), tuple(wanted))


def steer(settings: Settings, steering: Steering) -> tuple[Settings, dict[str, Image.Image]]:
    """Returns the settings with the ControlNets, and their hints by the names that the settings have."""
    if not steering.nets:
        return settings, {}
    names = [f"control {k}" for k in range(len(steering.nets))]
    control = tuple(
        (file, name, weight, start, end) for name, (file, weight, start, end) in zip(names, steering.nets)
    )
    settings = replace(settings, control=control, control_mode=steering.mode)
    return settings, dict(zip(names, steering.hints))


def _picture(service: Service, unit: Unit, usual: Image.Image | None) -> Image.Image:
    given = unit.image or unit.input_image
    if isinstance(given, dict):
        if given.get("mask"):
            raise Refusal(422, "controlnet: mask cannot be given here", "alwayson_scripts")
        given = given.get("image")
    if given:
        return open_picture(of_text(given, "controlnet: image", service.limits.input_pixels))
    if usual is None:
        raise Refusal(422, f"controlnet: the unit of {shown(unit.model)} has no image", "alwayson_scripts")
    return usual


def _hint(unit: Unit, picture: Image.Image, size: tuple[int, int] | None) -> Image.Image:
    """The hint at the picture's size, so that edges are as thin as what is drawn needs them."""
    how = _one_of("resize_mode", unit.resize_mode, FITS)
    if size is not None:
        picture = _fitted(picture, size, how)
    module = (unit.module or "none").lower()
    if module == "none":
        return picture
    if module.startswith("invert"):
        return ImageOps.invert(picture.convert("RGB"))
    if module == "canny":
        low, high = unit.threshold_a, unit.threshold_b
        try:
            return edges(picture, low if low >= 0 else LOW, high if high >= 0 else HIGH)
        except ValueError as error:
            raise Refusal(422, f"controlnet: {error}", "alwayson_scripts") from None
    raise Refusal(
        422, f"controlnet: there is no module {shown(unit.module)}; there are none, canny, invert",
        "alwayson_scripts",
    )  # fmt: skip


def _fitted(picture: Image.Image, size: tuple[int, int], how: str) -> Image.Image:
    if how == "stretch":
        return picture.resize(size, Image.Resampling.LANCZOS)
    if how == "crop":
        return fit(picture, *size)
    # As there: whole, on a ground of what is commonest at its border
    pixels = np.asarray(picture.convert("RGB"))
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = tuple(int(level) for level in np.median(border, axis=0))
    return ImageOps.pad(picture.convert("RGB"), size, Image.Resampling.LANCZOS, ground)


def _one_of(field: str, value: Any, known: Mapping[str, str]) -> str:
    said = re.sub(r"^(controlmode|resizemode)\.", "", str(value).lower()).replace("_", " ")
    if said not in known:
        there = ", ".join(name for name in known if not name.isdigit())
        raise Refusal(
            422, f"controlnet: there is no {field} {shown(value)}; there are {there}", "alwayson_scripts"
        )
    return known[said]


class Detection(BaseModel):
    """What is to be made into hints."""

    controlnet_module: str = "none"
    controlnet_input_images: list[str]
    controlnet_threshold_a: float = -1
    controlnet_threshold_b: float = -1


def routes(service: Service) -> APIRouter:
    """Returns the routes of the extension that its clients ask before they draw."""
    router = APIRouter(prefix="/controlnet", tags=["A1111's API"])

    @router.get("/version")
    async def version() -> dict[str, int]:
        return {"version": 3}

    @router.get("/model_list")
    async def model_list() -> dict[str, list[str]]:
        return {"model_list": list(service.catalog.controls())}

    @router.get("/module_list")
    async def module_list() -> dict[str, Any]:
        return {"module_list": ["none", "canny", "invert"], "module_detail": {}}

    @router.get("/settings")
    async def settings() -> dict[str, int]:
        return {"control_net_unit_count": 10}

    @router.post("/detect")
    def detect(asked: Detection) -> dict[str, Any]:
        """Makes hints of pictures."""
        low, high = asked.controlnet_threshold_a, asked.controlnet_threshold_b
        unit = Unit.model_validate(
            {"module": asked.controlnet_module, "threshold_a": low, "threshold_b": high}
        )
        pixels = service.limits.input_pixels
        pictures = [of_text(one, "controlnet_input_images", pixels) for one in asked.controlnet_input_images]
        made = [_hint(unit, open_picture(picture), None) for picture in pictures]
        return {"images": [to_text(to_bytes(one, None)) for one in made], "info": "Success"}

    return router
