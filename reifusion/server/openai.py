"""OpenAI's images API: `/v1/images/generations`, `/v1/images/edits` and `/v1/models`.

What it has no field for is sent beside the others: `negative_prompt`, `seed`, `steps`, `cfg_scale`,
`sampler`, `strength` and `lora`. Looked up in the types of OpenAI's Python client 3.57.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any, Literal

from fastapi import APIRouter
from fastapi import Request as Http
from fastapi.exceptions import RequestValidationError
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from ..model.pictures import is_transparent, open_picture
from ..settings import Settings
from ..spelling import read_size
from .errors import Refusal
from .errors import body as error_body
from .events import event, streamed
from .pictures import of_bytes, to_bytes, to_text, transparent_parts
from .queue import Job
from .service import Service


class Lora(BaseModel):
    """A LoRA of those that `/sdapi/v1/loras` lists."""

    model_config = ConfigDict(extra="forbid")
    name: str
    weight: float = 1.0


class Generation(BaseModel):
    """What to draw. Fields without an effect here are accepted, as clients send them."""

    model_config = ConfigDict(extra="forbid")
    prompt: str = Field(min_length=1)
    model: str | None = Field(None, description="One of /v1/models.")
    n: int | None = Field(1, ge=1, description="Pictures; their seeds count up.")
    size: str | None = Field("auto", description="Width x height, as 512x768; auto: the model's own.")
    output_format: Literal["png", "jpeg", "webp"] | None = "png"
    output_compression: int | None = Field(100, ge=0, le=100, description="Of jpeg and webp; 100 is best.")
    response_format: Literal["url", "b64_json"] | None = Field(
        "b64_json", description="url: a data: URL, as nothing is stored here."
    )
    background: Literal["opaque", "auto"] | None = "auto"
    stream: bool | None = False
    partial_images: int | None = Field(0, ge=0, le=3, description="In a stream: pictures on the way.")
    negative_prompt: str = ""
    seed: int | None = Field(None, ge=0, lt=2**63, description="Left out: a new one, which is sent back.")
    steps: int | None = Field(None, ge=1)
    cfg_scale: float | None = None
    sampler: str | None = Field(None, description="One of those that `reifusion samplers` lists.")
    lora: list[Lora] = []
    quality: str | None = Field(None, description="No effect.")
    style: str | None = Field(None, description="No effect.")
    moderation: str | None = Field(None, description="No effect.")
    user: str | None = Field(None, description="No effect.")
    safety_identifier: str | None = Field(None, description="No effect.")


class Edit(Generation):
    """What to make of a picture."""

    strength: float = Field(0.8, gt=0, le=1, description="How much of the picture may change.")
    input_fidelity: str | None = Field(None, description="No effect.")


class Datum(BaseModel):
    b64_json: str | None = None
    url: str | None = None
    seed: int


class Images(BaseModel):
    """The answer."""

    created: int
    data: list[Datum]
    size: str
    output_format: str
    background: str = "opaque"


def routes(service: Service) -> APIRouter:
    """Returns the routes of this dialect."""
    router = APIRouter(prefix="/v1", tags=["OpenAI's images API"])
    catalog, begun = service.catalog, int(time.time())

    @router.get("/models")
    async def models() -> dict[str, Any]:
        """The models that can be named."""
        return {"object": "list", "data": [_model(name, begun) for name in catalog.models()]}

    @router.get("/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        catalog.model_of(name)
        return _model(name, begun)

    @router.post("/images/generations", response_model=Images, response_model_exclude_none=True)
    async def generations(asked: Generation, http: Http) -> Any:
        """Draws pictures."""
        return await _answer(service, http, asked, _settings(service, asked), {})

    @router.post(
        "/images/edits", response_model=Images, response_model_exclude_none=True, openapi_extra=_FORM
    )
    async def edits(http: Http) -> Any:
        """Draws on from a picture: all of it, or where the mask, or the picture itself, is transparent."""
        asked, inputs = await _read_form(service, http)
        settings = replace(_settings(service, asked), strength=asked.strength)
        return await _answer(service, http, asked, settings, inputs)

    return router


def _model(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "reifusion"}


def _settings(service: Service, asked: Generation) -> Settings:
    """Returns the settings that a request stands for. Raises Refusal for what is not here."""
    usual, catalog = service.usual, service.catalog
    size = None
    if asked.size not in (None, "auto"):
        try:
            size = read_size(str(asked.size))
        except ValueError as error:
            raise Refusal(400, str(error), "size") from None
    return replace(
        usual,
        prompt=asked.prompt,
        negative=asked.negative_prompt,
        model=usual.model if asked.model is None else catalog.model_of(asked.model),
        lora=tuple((catalog.lora_of(one.name), one.weight) for one in asked.lora),
        size=size,
        seed=asked.seed,
        steps=asked.steps,
        cfg=asked.cfg_scale,
        sampler=asked.sampler,
    )


async def _answer(
    service: Service, http: Http, asked: Generation, settings: Settings, inputs: dict[str, Image.Image]
) -> Any:
    kind = "image_edit" if inputs else "image_generation"
    previews = asked.partial_images or 0 if asked.stream else 0
    job = await service.begin(http, settings, asked.n or 1, inputs, dialect="openai", previews=previews)
    if asked.stream:
        return streamed(_stream(service, asked, job, kind))
    await service.finish(http, job)
    format = asked.output_format or "png"
    files = await service.encoded(job, format, _quality(asked))
    data = []
    for file, (_, entry) in zip(files, job.drawn, strict=True):
        text = to_text(file)
        is_url = asked.response_format == "url"
        where = {"url": f"data:image/{format};base64,{text}"} if is_url else {"b64_json": text}
        data.append(Datum(seed=entry.settings.seed or 0, **where))
    width, height = job.drawn[0][0].size
    return Images(created=int(time.time()), data=data, size=f"{width}x{height}", output_format=format)


def _quality(asked: Generation) -> int:
    return 100 if asked.output_compression is None else asked.output_compression


async def _stream(service: Service, asked: Generation, job: Job, kind: str) -> AsyncIterator[bytes]:
    """Yields events: some pictures on the way, each picture when it is done, or an error at last."""
    format = asked.output_format or "png"
    said = {"output_format": format, "quality": "auto", "background": "opaque"}
    shown: Image.Image | None = None
    partial = done = 0
    try:
        async for new in job.changes(heartbeat=10):
            if not new:
                yield b": still here\n\n"
            if job.partial is not None and job.partial is not shown and not job.over:
                shown = job.partial
                facts = {**said, "size": "x".join(map(str, shown.size)), "created_at": int(time.time())}
                text = to_text(to_bytes(shown, None, format, _quality(asked)))
                yield event({"type": f"{kind}.partial_image", "b64_json": text,
                             "partial_image_index": partial, **facts})  # fmt: skip
                partial += 1
        service.check(job)
        for file, (picture, entry) in zip(await service.encoded(job, format, _quality(asked)), job.drawn):
            facts = {**said, "size": "x".join(map(str, picture.size)), "created_at": int(time.time())}
            yield event({"type": f"{kind}.completed", "b64_json": to_text(file),
                         "seed": entry.settings.seed, **facts})  # fmt: skip
            done += 1
    except Refusal as refusal:
        yield event(error_body("/v1/", refusal), "error")
    finally:  # also when the client has left
        service.queue.cancel(job)


# ---- edits: a form --------------------------------------------------------------------------------------


_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image", "prompt"],
                    "properties": {
                        "image": {"type": "string", "format": "binary", "description": "PNG, JPEG or WebP."},
                        "mask": {
                            "type": "string", "format": "binary",
                            "description": "A picture of the same size; where it is transparent is drawn.",
                        },
                        **{
                            name: {key: one[key] for key in ("type", "anyOf", "description") if key in one}
                            for name, one in Edit.model_json_schema()["properties"].items()
                            if name != "lora"
                        },
                    },
                }
            }
        },
    }
}  # fmt: skip


async def _read_form(service: Service, http: Http) -> tuple[Edit, dict[str, Image.Image]]:
    """Reads the form of an edit: its fields, and the pictures by their names in `Settings`."""
    if not http.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise Refusal(415, "an edit is sent as multipart/form-data", None, "unsupported_media_type")
    try:
        async with http.form(max_files=4, max_fields=40) as form:
            fields, files = _sorted(form)
            most, inputs = service.limits.input_pixels, {}
            for name, file in files.items():
                inputs[name] = await asyncio.to_thread(of_bytes, await file.read(), name, most)
    except HTTPException as error:  # Starlette's, for a form that is broken or too large
        raise Refusal(400, str(error.detail)) from None
    if "image" not in inputs:
        raise Refusal(400, "an edit needs a picture", "image")
    try:
        asked = Edit.model_validate(fields)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None
    return asked, _as_settings(inputs)


def _sorted(form: FormData) -> tuple[dict[str, str], dict[str, UploadFile]]:
    """Returns the form's texts and its files by name; `image[]` is `image`."""
    fields: dict[str, str] = {}
    files: dict[str, UploadFile] = {}
    for key, value in form.multi_items():
        name = key.removesuffix("[]")
        if isinstance(value, str):
            fields[name] = value
        elif name in files:
            raise Refusal(400, f"one {name} is taken, and not several", name)
        elif name not in ("image", "mask"):
            raise Refusal(400, f"{name} is no file of an edit; image and mask are", name)
        else:
            files[name] = value
    return fields, files


def _as_settings(inputs: dict[str, Image.Image]) -> dict[str, Image.Image]:
    """There, what is transparent is drawn; here, what is white."""
    picture = inputs["image"]
    mask = transparent_parts(inputs.get("mask", picture))
    if "mask" in inputs and mask is None:
        raise Refusal(400, "the mask is transparent nowhere, so there is nothing to draw", "mask")
    if "mask" in inputs and inputs["mask"].size != picture.size:
        raise Refusal(400, "the mask and the picture are of different sizes", "mask")
    # What is transparent is drawn from the colours below it.
    opaque = picture.convert("RGB") if is_transparent(picture) else open_picture(picture)
    return {"init_image": opaque} if mask is None else {"init_image": opaque, "mask": mask}
