"""AUTOMATIC1111's API, `/sdapi/v1`, as its clients use it.

What may be asked is in `a1111_request.py`; here are the routes and the answers. Looked up in the same places.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import time
from typing import Any

import torch
from fastapi import APIRouter
from fastapi import Request as Http
from PIL import Image
from pydantic import BaseModel

from .. import __version__
from ..a1111 import LATENT, read
from ..model.samplers import SAMPLERS
from ..model.spacing import SCHEDULES
from ..sampling.schedules import TITLES
from ..settings import Settings
from .a1111_control import Steering, steer, steering_of, units_of
from .a1111_request import Img2Img, Options, Txt2Img, inputs_of, settings_of
from .errors import Refusal
from .pictures import infotext, of_text, to_bytes, to_text, without_paths
from .queue import Job
from .service import Service


class Drawn(BaseModel):
    """The answer."""

    images: list[str]
    parameters: dict[str, Any]
    info: str


def routes(service: Service) -> APIRouter:
    """Returns the routes of this dialect."""
    router = APIRouter(prefix="/sdapi/v1", tags=["A1111's API"])
    catalog, queue, options = service.catalog, service.queue, Options(service)

    @router.post("/txt2img")
    async def txt2img(asked: Txt2Img, http: Http) -> Drawn:
        """Draws pictures."""
        return await _draw(service, http, asked, settings_of(service, options, asked), {})

    @router.post("/img2img")
    async def img2img(asked: Img2Img, http: Http) -> Drawn:
        """Draws on from a picture."""
        settings = settings_of(service, options, asked)
        inputs = await asyncio.to_thread(inputs_of, service, asked)
        return await _draw(service, http, asked, settings, inputs)

    @router.get("/progress")
    async def progress(skip_current_image: bool = False) -> dict[str, Any]:
        """How far the job is that is being drawn, whoever asked for it."""
        job = queue.current
        if job is not None and not skip_current_image:
            job.wants_preview = True  # after the next step; here is what the last one gave
        return _progress(job, skip_current_image)

    @router.post("/interrupt")
    async def interrupt(task: str | None = None) -> None:
        """Ends what is being drawn for this API, or the job of that id; its request gets what is there."""
        for job in _meant(service, task):
            job.interrupted = True
            if job is not queue.current:
                queue.cancel(job)

    @router.post("/skip")
    async def skip(task: str | None = None) -> None:
        """Ends the picture that is being drawn; the request's next one follows."""
        for job in _meant(service, task):
            job.skipped = True

    @router.get("/options")
    async def get_options() -> dict[str, Any]:
        return options.values

    @router.post("/options")
    async def set_options(changes: dict[str, Any]) -> None:
        """Sets what requests leave open: the model, and how many layers of the text encoder are used."""
        options.values = options.with_(changes, "options")

    @router.get("/samplers")
    async def samplers() -> list[dict[str, Any]]:
        return [{"name": one.title, "aliases": [name], "options": {}} for name, one in SAMPLERS.items()]

    @router.get("/schedulers")
    async def schedulers() -> list[dict[str, Any]]:
        said = {"default_rho": -1, "need_inner_model": False, "aliases": None}
        return [
            {"name": "automatic", "label": "Automatic", **said},
            *({"name": name, "label": TITLES.get(name, name), **said} for name in SCHEDULES),
        ]

    @router.get("/sd-models")
    async def models() -> list[dict[str, Any]]:
        nothing = {"hash": None, "sha256": None, "config": None}
        return [{"title": name, "model_name": name, "filename": name, **nothing} for name in catalog.models()]

    @router.get("/loras")
    async def loras() -> list[dict[str, Any]]:
        return [{"name": name, "alias": name, "path": name, "metadata": {}} for name in catalog.loras()]

    @router.get("/upscalers")
    async def upscalers() -> list[dict[str, Any]]:
        nothing = {"model_name": None, "model_path": None, "model_url": None, "scale": 4}
        return [{"name": name, **nothing} for name in ("None", "Lanczos")]

    @router.get("/latent-upscale-modes")
    async def latent_upscale_modes() -> list[dict[str, Any]]:
        return [{"name": name} for name in LATENT]

    @router.get("/memory")
    async def memory() -> dict[str, Any]:
        return _memory()

    @router.post("/png-info")
    async def png_info(asked: dict[str, Any]) -> dict[str, Any]:
        """The text that a picture carries."""
        picture = of_text(asked.get("image"), "image", service.limits.input_pixels)
        texts = {name: text for name, text in picture.info.items() if isinstance(text, str)}
        facts: dict[str, str] = {}
        if "parameters" in texts:
            try:
                facts = read(texts["parameters"])[1]
            except ValueError:
                facts = {}
        return {"info": texts.get("parameters", ""), "items": texts, "parameters": facts}

    def always(path: str, value: Any, method: str = "GET") -> None:
        """A route about what is not here, or has nothing to do."""
        router.add_api_route(path, lambda: value, methods=[method], name=path.strip("/"))

    for name in ("sd-vae", "hypernetworks", "face-restorers", "realesrgan-models", "prompt-styles",
                 "script-info", "extensions"):  # fmt: skip
        always(f"/{name}", [])
    always("/embeddings", {"loaded": {}, "skipped": {}})
    always("/scripts", {"txt2img": [], "img2img": []})
    always("/cmd-flags", {})
    for name in ("checkpoints", "vae", "embeddings", "loras"):  # which are listed anew each time
        always(f"/refresh-{name}", None, "POST")
    return router


async def _draw(
    service: Service, http: Http, asked: Txt2Img, settings: Settings, inputs: dict[str, Image.Image]
) -> Drawn:
    steering = Steering()
    if units := units_of(asked.alwayson_scripts):
        usual = inputs.get("init_image")
        size = await asyncio.to_thread(service.size_of, settings)
        steering = await asyncio.to_thread(steering_of, service, units, usual, size)
    settings, hints = steer(settings, steering)
    count = asked.batch_size * asked.n_iter
    job = await service.begin(http, settings, count, inputs | hints, dialect="a1111")
    await service.finish(http, job)
    files = await service.encoded(job) if asked.send_images else []
    if asked.send_images:
        files += [to_bytes(hint, None) for hint in steering.shown]  # behind the pictures, as there
    info = _info(service, job, asked)
    said = asked.model_dump(exclude={"init_images", "mask"})
    return Drawn(images=list(map(to_text, files)), parameters=_as_json(said), info=json.dumps(info))


def _as_json(values: dict[str, Any]) -> dict[str, Any]:
    """Numbers that JSON has no form for become null."""
    return {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in values.items()}


def _info(service: Service, job: Job, asked: Txt2Img) -> dict[str, Any]:
    entries = [without_paths(entry, service.catalog) for _, entry in job.drawn]
    if not entries:  # interrupted before the first picture
        return {"prompt": asked.prompt, "all_prompts": [], "all_seeds": [], "infotexts": []}
    first, many = entries[0].settings, len(entries)
    width, height = job.drawn[0][0].size
    seeds = [entry.settings.seed for entry in entries]
    subseeds = [entry.settings.variation_seed for entry in entries]
    return {
        "prompt": asked.prompt, "all_prompts": [asked.prompt] * many,
        "negative_prompt": first.negative, "all_negative_prompts": [first.negative] * many,
        "seed": seeds[0], "all_seeds": seeds, "subseed": subseeds[0],
        "all_subseeds": subseeds, "subseed_strength": first.variation, "width": width, "height": height,
        "sampler_name": SAMPLERS[str(first.sampler)].title, "cfg_scale": first.cfg, "steps": first.steps,
        "batch_size": asked.batch_size, "restore_faces": False, "face_restoration_model": None,
        "sd_model_name": entries[0].model_name, "sd_model_hash": entries[0].hashes["model"],
        "sd_vae_name": None, "sd_vae_hash": None, "seed_resize_from_w": -1, "seed_resize_from_h": -1,
        "denoising_strength": asked.denoising_strength, "extra_generation_params": {},
        "index_of_first_image": 0, "infotexts": list(map(infotext, entries)), "styles": [],
        "job_timestamp": time.strftime("%Y%m%d%H%M%S"), "clip_skip": first.clip_skip + 1,
        "is_using_inpainting_conditioning": False, "version": f"reifusion {__version__}",
    }  # fmt: skip


def _meant(service: Service, task: str | None) -> list[Job]:
    """Returns the job of an id, or else the one that is drawn, if this dialect asked for it.

    Raises Refusal for the id of a job of the other dialect, whose request waits for whole pictures.
    """
    job = service.queue.current if task is None else service.queue.find(task)
    if job is not None and job.dialect == "a1111":
        return [job]
    if task is None:
        return []
    raise Refusal(404, f"the job {task} is not of this API; DELETE /jobs/{task} ends it", "task")


def _progress(job: Job | None, without_image: bool) -> dict[str, Any]:
    state: dict[str, Any] = {
        "skipped": False, "interrupted": False, "stopping_generation": False, "job": "", "job_count": 0,
        "job_timestamp": "0", "job_no": 0, "sampling_step": 0, "sampling_steps": 0,
    }  # fmt: skip
    if job is None:
        return {"progress": 0.0, "eta_relative": 0.0, "state": state, "current_image": None, "textinfo": None}
    passed, progress = time.monotonic() - job.since, job.progress
    state |= {
        "skipped": job.skipped, "interrupted": job.interrupted, "job": job.id, "job_count": job.pictures,
        "job_no": job.picture, "sampling_step": job.step, "sampling_steps": job.steps,
    }  # fmt: skip
    preview = None if without_image else job.preview
    return {
        "progress": progress,
        "eta_relative": passed / progress - passed if progress else 0.0,
        "state": state,
        "current_image": None if preview is None else to_text(to_bytes(preview, None)),
        "textinfo": job.state,
    }


def _memory() -> dict[str, Any]:
    pages = {name: os.sysconf(f"SC_{name}_PAGES") * os.sysconf("SC_PAGE_SIZE") for name in ("AVPHYS", "PHYS")}
    ram = {"free": pages["AVPHYS"], "used": pages["PHYS"] - pages["AVPHYS"], "total": pages["PHYS"]}
    if not torch.cuda.is_available():
        return {"ram": ram, "cuda": {"error": "there is no CUDA device"}}
    free, total = torch.cuda.mem_get_info()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    def both(value: int) -> dict[str, int]:
        return {"current": value, "peak": value}

    cuda = {"system": {"free": free, "used": total - free, "total": total},
            "allocated": both(allocated), "reserved": both(reserved)}  # fmt: skip
    return {"ram": ram, "cuda": cuda}
