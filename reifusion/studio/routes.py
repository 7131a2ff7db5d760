"""What the page can ask of the studio, over HTTP. Long work is told as it goes, in lines of JSON."""

from __future__ import annotations

import io
import json
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastapi import Body, FastAPI
from fastapi import Request as Http
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from PIL import Image

from ..errors import sentence
from ..model.pipeline import StableDiffusion
from ..model.sentences import shown
from ..server.security import HERE, Guard
from ..settings import Settings
from . import drawing as drawing_module
from . import shelf, stages, toy, views, wishes
from .drawing import TICK, Drawing
from .excerpts import listing
from .heard import listen
from .known import EXAMPLES, known
from .training import Trainings

PAGE = Path(__file__).parent / "page"
KEPT = 6  # drawings that can be looked into: at full size, one's attention is 100 MB
BODY = 2**26  # bytes that the page may send


class Studio:
    """What all pages share: the folder for pictures, and the last drawings, by their ids."""

    def __init__(self, source: str, folder: Path, preview: str | None = None, runs: Path = Path("runs")):
        """source: the model that a page begins with. preview: a tiny VAE, which decodes the steps.

        runs: the folder of the trainings.
        """
        self.source, self.folder, self.preview = source, folder, preview
        self.drawings: OrderedDict[str, Drawing] = OrderedDict()
        self.trainings = Trainings(runs)

    def drawing(self, id: str) -> Drawing:
        """Returns a drawing. Raises ValueError for one that is not there any more."""
        if (found := self.drawings.get(id)) is None:
            raise ValueError("this drawing is no longer in memory: draw it again to look into it")
        return found

    def frame(self, id: str, place: int) -> Drawing:
        """The same, for a place that it has got to."""
        found = self.drawing(id)
        if not 0 <= place < len(found.frames):
            raise ValueError(f"the drawing has no place {place}")
        return found

    def draw(self, settings: Settings) -> Iterator[dict[str, Any]]:
        """Draws; yields what is new."""
        id, one = uuid.uuid4().hex, Drawing(settings)
        self.drawings[id] = one
        while len(self.drawings) > KEPT and self.drawings[next(iter(self.drawings))].done:
            self.drawings.popitem(last=False)
        for told in drawing_module.draw(one, self.folder, self.preview):
            yield _news(id, told)

    def load(self, source: str) -> Iterator[dict[str, Any]]:
        """Loads a model; yields how long it has taken so far, and at the end what the page needs to know."""
        found: list[Any] = []

        def work() -> None:
            try:
                found.append(drawing_module.model(Settings(model=source)))
            except Exception as error:  # not only a wrong file: a hub may be out of reach
                found.append(error)

        begun, thread = time.monotonic(), threading.Thread(target=work, daemon=True)
        thread.start()
        while thread.is_alive():
            yield {"note": f"Loading {source}: {time.monotonic() - begun:.0f} s."}
            thread.join(TICK)
        if isinstance(found[0], Exception):
            yield {"note": sentence(found[0]), "failed": True, "done": True}
        else:
            yield {"done": True, **about(source, found[0])}


def about(source: str, pipe: StableDiffusion) -> dict[str, Any]:
    """Returns what the page needs to know of a model."""
    config = pipe.config
    said = f"Loaded {config.name}, for pictures of {config.size}x{config.size}."
    mini = {"examples": EXAMPLES, **{key: value for key, value in known().items() if key != "words"}}
    return {
        "model": source,
        "name": config.name,
        "side": config.size,
        "note": said,
        "known": mini if config.name.startswith("mini") else None,
        **wishes.fields(config),
    }


def _news(id: str, one: Drawing) -> dict[str, Any]:
    news: dict[str, Any] = {
        "id": id,
        "note": one.said,
        "failed": one.failed,
        "done": one.done,
        "warnings": one.warnings,
        "places": len(one.frames),
        "newest": one.newest,
        "total": one.total,
        "size": one.request.size if one.request else None,
        "seed": one.request.seeds[0] if one.request else None,
    }
    if one.sampler is not None:
        news["curve"] = views.curve(one)
    if one.done and one.path is not None:
        news |= {
            "name": one.path.name,
            "about": shelf.about(one.settings),
            "settings": wishes.texts(one.settings),
            "command": one.settings.as_command(),
            "python": one.settings.as_python(),
        }
    return news


def build(studio: Studio) -> FastAPI:
    """Returns the application."""
    listen()
    app = FastAPI(title="reifusion studio", docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(ValueError)
    async def refused(http: Http, error: ValueError) -> Response:
        return JSONResponse({"note": sentence(error), "failed": True, "done": True}, 400)

    @app.exception_handler(RequestValidationError)
    async def wrong(http: Http, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        kind, name, why = first["type"], first["loc"][-1], first["msg"][:1].lower() + first["msg"][1:]
        said = f"{name}: {why}, not {shown(first['input'])}"
        said = {"json_invalid": "the body is no valid JSON", "missing": f"{name} is missing"}.get(kind, said)
        return JSONResponse({"note": said, "failed": True, "done": True}, 400)

    @app.get("/")
    def page() -> Response:
        return FileResponse(PAGE / "index.html")

    @app.get("/api/page")
    def first() -> dict[str, Any]:
        pipe = drawing_module.model(Settings(model=studio.source))
        return about(studio.source, pipe) | {"folder": str(studio.folder)}

    @app.get("/toy")
    def toy_page() -> Response:
        return FileResponse(PAGE / "toy.html")

    @app.get("/api/toy")
    def toy_journey(world: str, sampler: str, steps: int, guidance: float, seed: int) -> dict[str, Any]:
        return toy.journey(world, sampler, steps, guidance, seed)

    @app.get("/training")
    def training_page() -> Response:
        return FileResponse(PAGE / "training.html")

    @app.get("/api/training")
    def trainings() -> dict[str, Any]:
        return studio.trainings.state()

    @app.post("/api/training/start")
    def train(minutes: float = Body(embed=True)) -> None:
        studio.trainings.start(minutes)

    @app.post("/api/training/stop")
    def stop_training() -> None:
        studio.trainings.stop()

    @app.get("/api/training/run")
    def run(name: str) -> dict[str, Any]:
        return studio.trainings.news(name)

    @app.get("/api/training/sheet")
    def sheet(name: str, step: int) -> Response:
        return FileResponse(studio.trainings.sheet(name, step))

    @app.post("/api/model")
    def load(model: str = Body(embed=True)) -> Response:
        return _lines(studio.load(model.strip()))

    @app.post("/api/notes")
    def notes(prompt: str = Body(), model: str = Body()) -> list[str]:
        # Loading one would take minutes, and push another out, while somebody types.
        pipe = drawing_module.in_memory(Settings(model=model))
        return [] if pipe is None else views.notes(pipe, prompt)

    @app.post("/api/draw")
    def draw(
        settings: dict[str, Any] = Body(),  # noqa: B008  # FastAPI's way to say where it is
        picture: str | None = Body(None),
        mask: str | None = Body(None),
        k: int = Body(0, ge=0, le=1000),
    ) -> Response:
        """k: the number of this picture among several, from 0."""
        asked = wishes.settings(settings, picture, mask, studio.folder)
        first = asked.request()  # a wrong setting is found before a model is loaded
        return _lines(studio.draw(asked.nth(first.seeds[0], k)))

    @app.post("/api/drawings/{id}/stop")
    def stop(id: str) -> None:
        studio.drawing(id).stop.set()

    @app.get("/api/drawings/{id}/{place}")
    def look(id: str, place: int) -> dict[str, Any]:
        return stages.facts(studio.frame(id, place), place)

    @app.get("/api/drawings/{id}/{place}/{what}.png")
    def picture(id: str, place: int, what: str) -> Response:
        one = studio.frame(id, place)
        if what in ("given", "seen"):
            return _png(one.look(place, what))
        if (values := views.tensor(one, place, what)) is None:
            raise ValueError(f"there is no {what} at this place")
        return _png(views.tensor_picture(values))

    @app.get("/api/pictures")
    def pictures() -> list[dict[str, str]]:
        return shelf.listed(studio.folder)

    @app.get("/api/pictures/{name}")
    def taken(name: str) -> dict[str, Any]:
        shelf.path_of(studio.folder, name)
        return shelf.taken(studio.folder, name)

    @app.get("/pictures/{name}")
    def file(name: str) -> Response:
        return FileResponse(shelf.path_of(studio.folder, name))

    @app.get("/source/{name:path}")
    def source(name: str) -> Response:
        return HTMLResponse(listing(name))

    app.mount("/page", StaticFiles(directory=PAGE))
    if stages.BOOK is not None:
        app.mount("/book", StaticFiles(directory=stages.BOOK))
    app.add_middleware(Guard, token=None, hosts=HERE, most=BODY)
    return app


def _lines(news: Iterator[dict[str, Any]]) -> Response:
    """Returns a line of JSON for each news, as soon as there is one."""
    return StreamingResponse((json.dumps(one) + "\n" for one in news), media_type="application/x-ndjson")


def _png(picture: Image.Image) -> Response:
    stream = io.BytesIO()
    picture.save(stream, "PNG", compress_level=1)
    return Response(stream.getvalue(), media_type="image/png", headers={"Cache-Control": "max-age=3600"})
