"""What the parts of the page do: draw, cancel, show a step, take over the settings of a picture."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from .. import album
from ..errors import sentence
from ..model.pictures import read_picture
from ..model.request import Request
from ..model.samplers import SAMPLERS
from ..settings import ABOUT, Settings
from . import drawing as drawing_module
from .drawing import Drawing, draw
from .layout import STRIP, Parts, gr, samplers
from .stages import happens
from .views import carries, says, schedule, view
from .wishes import ask

SHELF = 60  # the most pictures in the gallery
COPY = "text => { navigator.clipboard.writeText(text); return text; }"
NEEDED = ("prompt", "sampler", "steps", "cfg", "seed", "size")  # to draw a picture again
# The settings that have no field on the page; a picture is drawn again without them.
BEYOND = (
    "lora", "embedding", "code", "clip_skip", "guidance_interval", "guidance_rescale", "deepcache", "int8",
    "refiner", "hires", "emphasis", "eta", "s_noise", "churn", "control", "ip_adapter",
)  # fmt: skip


@dataclass
class Tab:
    """One page in a browser. Pages share nothing."""

    stop: threading.Event = field(default_factory=threading.Event)  # ends the drawing that is going on
    wanted: tuple[Any, ...] = ()  # the content of the fields when drawing last began
    drawing: Drawing | None = None  # the drawing on view
    strip: list[Path] = field(default_factory=list)  # pictures drawn here, newest first
    shelf: list[Path] = field(default_factory=list)  # pictures in the gallery


@dataclass
class Acts:
    """What happens when a part of the page is used. Each act returns, or yields, what changes on the page."""

    parts: Parts
    folder: Path  # where pictures are written
    preview: str | None = None  # a tiny VAE for the steps
    tabs: defaultdict[str | None, Tab] = field(default_factory=lambda: defaultdict(Tab))

    # Drawing

    def draw(self, request: gr.Request, model: str, *wanted: Any) -> Iterator[dict[Any, Any]]:
        parts, tab = self.parts, self.tabs[request.session_hash]
        try:
            asked = ask(*wanted)
        except ValueError as error:
            yield {parts.status: says(str(error), failed=True)}
            return
        tab.stop.set()  # a tab draws one picture at a time: the newest
        tab.stop, tab.wanted, shown = (stop := threading.Event()), (model, *wanted), 0
        for drawing in draw(asked, model.strip(), self.folder, stop, self.preview):
            if drawing.done or tab.stop is not stop:
                break
            update: dict[Any, Any] = {
                parts.status: says(drawing.note),
                parts.place: gr.update(interactive=False),
            }
            if len(drawing.frames) > shown:
                shown = len(drawing.frames)
                update[parts.canvas] = view(drawing, shown - 1)
            yield update
        if tab.stop is stop:
            yield self._ended(tab, drawing)

    def _ended(self, tab: Tab, drawing: Drawing) -> dict[Any, Any]:
        parts = self.parts
        update: dict[Any, Any] = {parts.status: says(drawing.note, drawing.failed)}
        if drawing.frames:
            tab.drawing, end = drawing, len(drawing.frames) - 1
            update |= self._look(tab, end)
            update[parts.place] = gr.update(maximum=max(end, 1), value=end, interactive=True)
            update[parts.command] = drawing.settings.as_command() if drawing.settings else ""
            update[parts.python] = drawing.settings.as_python() if drawing.settings else ""
        else:
            update[parts.place] = gr.update(interactive=tab.drawing is not None)
        if drawing.path is not None:
            tab.strip = [drawing.path, *tab.strip][:STRIP]
            update[parts.strip] = [_item(path) for path in tab.strip]
        return update

    def change(self, on: bool, request: gr.Request, *wanted: Any) -> Iterator[dict[Any, Any]]:
        tab = self.tabs[request.session_hash]
        if on and tab.wanted and wanted != tab.wanted:
            yield from self.draw(request, *wanted)
        else:
            yield {self.parts.status: gr.skip()}

    def cancel(self, request: gr.Request) -> None:
        self.tabs[request.session_hash].stop.set()

    def close(self, request: gr.Request) -> None:
        if (tab := self.tabs.pop(request.session_hash, None)) is not None:
            tab.stop.set()

    # Looking

    def look(self, at: int, request: gr.Request) -> dict[Any, Any]:
        return self._look(self.tabs[request.session_hash], at)

    def _look(self, tab: Tab, at: int) -> dict[Any, Any]:
        """Shows a place of the slider."""
        if tab.drawing is None or not tab.drawing.done or not tab.drawing.frames:
            return {self.parts.canvas: gr.skip()}
        at = min(int(at), len(tab.drawing.frames) - 1)
        return {
            self.parts.canvas: view(tab.drawing, at),
            self.parts.curves: schedule(tab.drawing, at),
            self.parts.panel: happens(tab.drawing, at),
        }

    def copy(self, text: str) -> str:
        return says("Copied.") if text else says("Nothing to copy yet: draw a picture first.", failed=True)

    # Another model, another picture

    def load(self, model: str) -> dict[Any, Any]:
        parts = self.parts
        try:
            config = drawing_module.model(model.strip()).config
        except Exception as error:  # not only a wrong file: a hub may be out of reach
            return {parts.status: says(sentence(error), failed=True)}
        own = Request("").for_model(config)
        return {
            parts.status: says(f"Loaded {config.name}, for pictures of {config.size}x{config.size}."),
            parts.cfg: own.cfg,
            parts.steps: own.steps,
            parts.sampler: gr.update(choices=samplers(config), value=own.sampler),
        }

    def reuse(self, request: gr.Request) -> dict[Any, Any]:
        drawing = self.tabs[request.session_hash].drawing
        if drawing is None or not drawing.frames:
            return {self.parts.status: says("There is no last picture yet: draw one first.", failed=True)}
        return {self.parts.editor: _edited(drawing.frames[-1].picture)}

    def open_gallery(self, request: gr.Request) -> list[tuple[str, str]]:
        tab, shown = self.tabs[request.session_hash], []
        tab.shelf = []
        newest_first = sorted(self.folder.glob("*.png"), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in newest_first:
            try:
                shown.append(_item(path))
            except ValueError:  # a picture from elsewhere
                continue
            tab.shelf.append(path)
            if len(shown) == SHELF:
                break
        return shown

    def take_from_strip(self, event: gr.SelectData, request: gr.Request) -> dict[Any, Any]:
        return self._take(self.tabs[request.session_hash].strip, event.index)

    def take_from_shelf(self, event: gr.SelectData, request: gr.Request) -> dict[Any, Any]:
        return self._take(self.tabs[request.session_hash].shelf, event.index)

    def _take(self, paths: list[Path], index: int) -> dict[Any, Any]:
        """Fills the fields with the settings of a picture."""
        parts = self.parts
        try:
            entry = _entry(paths[index])
            settings = entry.settings
            if settings.code:
                settings = replace(settings, sampler=None, schedule=None)
            begin, mask = (
                None if path is None else read_picture(path) for path in (settings.init_image, settings.mask)
            )
        except (ValueError, IndexError) as error:
            return {parts.status: says(str(error), failed=True)}
        lost = [name for name in BEYOND if getattr(settings, name) != ABOUT[name].default]
        said = f"Settings of {paths[index]}" + (f", but without its {', '.join(lost)}." if lost else ".")
        taken = ("prompt", "negative", "sampler", "steps", "cfg", "seed", "strength")
        return {getattr(parts, name): getattr(settings, name) for name in taken} | {
            parts.size: ABOUT["size"].write(settings.size),
            parts.schedule: settings.schedule or "",
            parts.editor: _edited(begin, mask),
            parts.name: settings.model,
            parts.facts: carries({name: value for name, value in entry.carried().items() if value}),
            parts.status: says(said),
        }


def connect(blocks: gr.Blocks, parts: Parts, acts: Acts) -> None:
    """Tells each part of the page what happens when it is used."""
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    at_once: dict[str, Any] = quiet | {"queue": False}
    seen = [parts.canvas, parts.curves, parts.panel]
    drawn = [*seen, parts.status, parts.place, parts.strip, parts.command, parts.python]
    asked = [parts.name, *parts.fields]
    gr.on([parts.start.click, parts.prompt.submit], acts.draw, asked, drawn, concurrency_limit=None,
          trigger_mode="multiple", **quiet)  # fmt: skip
    changes = [
        parts.cfg.release,
        parts.steps.release,
        parts.sampler.input,
        parts.schedule.input,
        parts.seed.submit,
        parts.seed.blur,
    ]
    gr.on(changes, acts.change, [parts.live, *asked], drawn, concurrency_limit=None, trigger_mode="multiple",
          **quiet)  # fmt: skip
    parts.cancel.click(acts.cancel, **at_once)
    for button, text in ((parts.copy_command, parts.command), (parts.copy_python, parts.python)):
        button.click(acts.copy, text, parts.status, js=COPY, **at_once)
    parts.place.input(acts.look, parts.place, seen, trigger_mode="always_last", **at_once)
    parts.reuse.click(acts.reuse, None, [parts.editor, parts.status], **at_once)
    loaded = [parts.status, parts.cfg, parts.steps, parts.sampler]
    gr.on([parts.load.click, parts.name.submit], acts.load, parts.name, loaded, **quiet)
    parts.gallery.expand(acts.open_gallery, None, parts.shelf, **at_once)
    taken = [*parts.fields, parts.name, parts.facts, parts.status]
    parts.strip.select(acts.take_from_strip, None, taken, **at_once)
    parts.shelf.select(acts.take_from_shelf, None, taken, **at_once)
    blocks.unload(acts.close)


def _entry(path: Path) -> album.Entry:
    """Reads what a picture's file says. Raises ValueError if that is not enough to draw the picture again."""
    entry = album.read(path)
    if not entry.ours:
        raise ValueError(f"{path} was drawn by another program")
    if missing := sorted(name for name in NEEDED if getattr(entry.settings, name) is None):
        raise ValueError(f"{path} does not say its {', '.join(missing)}")
    return entry


def _item(path: Path) -> tuple[str, str]:
    """Returns a picture for a gallery, with a line about it."""
    told: Settings = _entry(path).settings
    sampler = SAMPLERS[told.sampler].title if told.sampler in SAMPLERS else told.sampler
    return str(path), f"{told.prompt}: seed {told.seed}, {sampler}, {told.steps} steps, CFG {told.cfg:g}"


def _edited(picture: Image.Image | None, mask: Image.Image | None = None) -> dict[str, Any] | None:
    """Returns the editor's content: the picture, and white over it where the mask is white."""
    if picture is None:
        return None
    layer = Image.new("RGBA", picture.size, (255, 255, 255, 0))
    if mask is not None:
        layer.putalpha(mask.convert("L"))
    composite = Image.alpha_composite(picture.convert("RGBA"), layer)
    return {"background": picture.convert("RGBA"), "layers": [layer], "composite": composite}
