"""The page: its fields, what they do, and the server that shows it, to this machine only."""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported

import gradio as gr
from PIL import Image

from ..cli import DEFAULTS, REMEMBERED, SAMPLERS, _open, _read_settings
from ..model.samplers import samplers_for
from . import drawing as drawing_module
from .drawing import Drawing, draw
from .stages import happens
from .views import carries, says, schedule, view
from .wishes import as_command, as_python, ask

HERE = Path(__file__).parent
FONTS, MONO = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]  # the machine's: none are fetched
STRIP, SHELF = 8, 60  # at most so many pictures side by side, and in the gallery
TITLE = """<div class="head"><h1>reifusion studio</h1>
<p>Type a prompt, watch the picture form, and look into it.</p></div>"""
EMPTY = '<div class="empty">The picture will form here.</div>'
COPY = "text => { navigator.clipboard.writeText(text); return text; }"
BEYOND = ["lora", *sorted(DEFAULTS.keys() - {"negative", "model", "strength"})]  # no field for these
SHOWN: dict[str, Any] = {
    "height": "auto",
    "object_fit": "contain",
    "fit_columns": False,
    "allow_preview": False,
    "interactive": False,
    "buttons": [],
}


@dataclass
class Tab:
    """One page in a browser. Nothing of it is another one's."""

    stop: threading.Event = field(default_factory=threading.Event)  # of what it draws now
    wanted: tuple[Any, ...] = ()  # what the fields held when it was last told to draw
    drawing: Drawing | None = None  # what the slider goes through
    strip: list[Path] = field(default_factory=list)  # drawn here, newest first
    shelf: list[Path] = field(default_factory=list)  # what the gallery shows


def page(source: str = "mini", folder: str | os.PathLike = "images") -> gr.Blocks:
    """The page; it draws with the model `source` until told otherwise, and writes pictures to the folder."""
    folder = Path(folder)
    best = drawing_module.model(source).config.best
    tabs: defaultdict[str | None, Tab] = defaultdict(Tab)

    with gr.Blocks(title="reifusion studio", analytics_enabled=False, delete_cache=(3600, 86400)) as blocks:
        gr.HTML(TITLE)
        with gr.Row(equal_height=True):
            prompt = gr.Textbox("a red apple", label="Prompt", scale=6, min_width=240, elem_id="prompt")
            start = gr.Button("Draw", variant="primary", scale=1, min_width=100, elem_id="draw")
            cancel = gr.Button("Cancel", scale=1, min_width=100, elem_id="cancel")
        status = gr.HTML(says("Nothing drawn yet."), elem_id="status")
        with gr.Row():
            with gr.Column(scale=3, min_width=280):
                canvas = gr.HTML(EMPTY, elem_id="view")
                place = gr.Slider(
                    0, 1, 0, step=1, label="Step, from noise to picture", interactive=False, buttons=[],
                    elem_id="place",
                )  # fmt: skip
                curves = gr.HTML(elem_id="schedule")
            with gr.Column(scale=2, min_width=280):
                negative = gr.Textbox(label="Negative prompt: what to keep away from", elem_id="negative")
                cfg = gr.Slider(
                    1, 20, best["cfg"], step=0.5, label="CFG: how closely to follow the prompt", buttons=[],
                    elem_id="cfg",
                )  # fmt: skip
                steps = gr.Slider(1, 100, best["steps"], step=1, label="Steps", buttons=[], elem_id="steps")
                sampler = gr.Dropdown(
                    _fitting(source), value=best["sampler"], label="Sampler", elem_id="sampler"
                )
                with gr.Row():
                    seed = gr.Number(0, precision=0, label="Seed", min_width=120, elem_id="seed",
                                     placeholder="a new one each time")  # fmt: skip
                    size = gr.Textbox(label="Width x height", min_width=120, elem_id="size",
                                      placeholder="the model's")  # fmt: skip
                live = gr.Checkbox(label="Draw anew when one of these changes", elem_id="live")
                with gr.Accordion("Begin with a picture, paint what is to change", open=False):
                    gr.HTML("<p>What you paint white is redrawn; if nothing is, all of it.</p>")
                    editor = gr.ImageEditor(
                        type="pil", image_mode="RGBA", format="png", sources=("upload", "clipboard"),
                        transforms=(), layers=False, brush=gr.Brush(colors=["#ffffff"], color_mode="fixed"),
                        buttons=[], elem_id="editor", label="Picture",
                    )  # fmt: skip
                    reuse = gr.Button("Begin with the last picture", size="sm", elem_id="reuse")
                    strength = gr.Slider(
                        0.05, 1, DEFAULTS["strength"], step=0.05, label="Strength: how much may change",
                        buttons=[], elem_id="strength",
                    )  # fmt: skip
                with gr.Accordion("Another model", open=False):
                    name = gr.Textbox(
                        source, label="A .safetensors or .ckpt file, a diffusers folder, or owner/name",
                        elem_id="model",
                    )  # fmt: skip
                    load = gr.Button("Load", size="sm", elem_id="load")
        strip = gr.Gallery(
            label="Your last pictures; choose one to take over its settings", elem_id="strip", columns=STRIP,
            **SHOWN,
        )  # fmt: skip
        with gr.Accordion("What happens here", elem_id="happens"):
            panel = gr.HTML("<p>Draw something, then move the step slider.</p>")
        with gr.Accordion("Repeat this picture exactly", elem_id="repeat"), gr.Row():
            with gr.Column(min_width=280):
                command = gr.Textbox(label="As command", lines=3, elem_id="command")
                copy_command = gr.Button("Copy as command", size="sm", elem_id="copy-command")
            with gr.Column(min_width=280):
                python = gr.Textbox(label="As Python", lines=3, elem_id="python")
                copy_python = gr.Button("Copy as Python", size="sm", elem_id="copy-python")
        with gr.Accordion(f"Gallery: {folder}", open=False, elem_id="gallery") as gallery:
            shelf = gr.Gallery(
                label="Choose one to take over its settings", elem_id="shelf", columns=STRIP, **SHOWN
            )
            facts = gr.HTML(elem_id="facts")

        fields = [prompt, negative, sampler, steps, cfg, seed, size, editor, strength]

        def looks(tab: Tab, at: int) -> dict[Any, Any]:
            """What is shown at a place of the slider."""
            if tab.drawing is None or not tab.drawing.done or not tab.drawing.frames:
                return {canvas: gr.skip()}
            at = min(int(at), len(tab.drawing.frames) - 1)
            return {
                canvas: view(tab.drawing, at),
                curves: schedule(tab.drawing, at),
                panel: happens(tab.drawing, at),
            }

        def on_draw(request: gr.Request, model: str, *wanted: Any) -> Iterator[dict[Any, Any]]:
            tab = tabs[request.session_hash]
            try:
                asked = ask(*wanted)
            except ValueError as error:
                yield {status: says(str(error), failed=True)}
                return
            tab.stop.set()  # a tab draws one picture at a time: the newest
            tab.stop, tab.wanted, shown = (stop := threading.Event()), (model, *wanted), 0
            for drawing in draw(asked, model.strip(), folder, stop):
                if drawing.done or tab.stop is not stop:
                    break
                update: dict[Any, Any] = {status: says(drawing.note), place: gr.update(interactive=False)}
                if len(drawing.frames) > shown:
                    shown = len(drawing.frames)
                    update[canvas] = view(drawing, shown - 1)
                yield update
            if tab.stop is not stop:
                return
            if drawing.frames:
                tab.drawing, end = drawing, len(drawing.frames) - 1
                update = looks(tab, end)
                update[place] = gr.update(maximum=max(end, 1), value=end, interactive=True)
                update[command] = as_command(drawing.settings) if drawing.path else ""
                update[python] = as_python(drawing.settings) if drawing.path else ""
            else:
                update = {place: gr.update(interactive=tab.drawing is not None)}
            if drawing.path is not None:
                tab.strip = [drawing.path, *tab.strip][:STRIP]
                update[strip] = [_item(path) for path in tab.strip]
            yield update | {status: says(drawing.note, drawing.failed)}

        def on_change(on: bool, request: gr.Request, *wanted: Any) -> Iterator[dict[Any, Any]]:
            tab = tabs[request.session_hash]
            if on and tab.wanted and wanted != tab.wanted:
                yield from on_draw(request, *wanted)
            else:
                yield {status: gr.skip()}

        def on_cancel(request: gr.Request) -> None:
            tabs[request.session_hash].stop.set()

        def on_place(at: int, request: gr.Request) -> dict[Any, Any]:
            return looks(tabs[request.session_hash], at)

        def on_reuse(request: gr.Request) -> dict[Any, Any]:
            drawing = tabs[request.session_hash].drawing
            if drawing is None or not drawing.frames:
                return {status: says("There is no last picture yet: draw one first.", failed=True)}
            return {editor: _edited(drawing.frames[-1].picture)}

        def on_load(model: str) -> dict[Any, Any]:
            try:
                config = drawing_module.model(model.strip()).config
            except Exception as error:  # not only what is no model: a hub may be out of reach
                return {status: says(str(error).strip().splitlines()[0], failed=True)}
            best = config.best
            return {
                status: says(f"Loaded {config.name}, for pictures of {config.size}x{config.size}."),
                cfg: best["cfg"],
                steps: best["steps"],
                sampler: gr.update(choices=_fitting(model.strip()), value=best["sampler"]),
            }

        def on_copy(text: str) -> str:
            return (
                says("Copied.") if text else says("Nothing to copy yet: draw a picture first.", failed=True)
            )

        def on_open(request: gr.Request) -> list[tuple[str, str]]:
            tab, shown = tabs[request.session_hash], []
            tab.shelf = []
            for path in sorted(folder.glob("*.png"), key=lambda path: path.stat().st_mtime, reverse=True):
                try:
                    shown.append(_item(path))
                except ValueError:  # a picture of something else
                    continue
                tab.shelf.append(path)
                if len(shown) == SHELF:
                    break
            return shown

        def recall(paths: list[Path], index: int) -> dict[Any, Any]:
            """Takes a picture's settings over into the fields."""
            try:
                settings = _settings(paths[index])
                begin = _edited(_open(settings.get("init_image")), _open(settings.get("mask")))
            except (ValueError, IndexError) as error:
                return {status: says(str(error), failed=True)}
            told = {one: settings[one] for one in REMEMBERED if settings.get(one)}
            lost = [one for one in BEYOND if settings.get(one) not in (None, DEFAULTS.get(one))]
            said = f"Settings of {paths[index]}" + (f", but without its {', '.join(lost)}." if lost else ".")
            return {
                prompt: settings["prompt"], negative: settings["negative"], sampler: settings["sampler"],
                steps: settings["steps"], cfg: settings["cfg"], seed: settings["seed"],
                size: "x".join(map(str, settings["size"])), strength: settings["strength"], editor: begin,
                name: settings["model"], facts: carries(told), status: says(said),
            }  # fmt: skip

        def on_strip(event: gr.SelectData, request: gr.Request) -> dict[Any, Any]:
            return recall(tabs[request.session_hash].strip, event.index)

        def on_shelf(event: gr.SelectData, request: gr.Request) -> dict[Any, Any]:
            return recall(tabs[request.session_hash].shelf, event.index)

        def on_close(request: gr.Request) -> None:
            if (tab := tabs.pop(request.session_hash, None)) is not None:
                tab.stop.set()

        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        at_once: dict[str, Any] = quiet | {"queue": False}
        seen = [canvas, curves, panel]
        all_of_it = [*seen, status, place, strip, command, python]
        gr.on([start.click, prompt.submit], on_draw, [name, *fields], all_of_it, concurrency_limit=None,
              trigger_mode="multiple", **quiet)  # fmt: skip
        gr.on([cfg.release, steps.release, sampler.input, seed.submit, seed.blur], on_change,
              [live, name, *fields], all_of_it, concurrency_limit=None, trigger_mode="multiple",
              **quiet)  # fmt: skip
        cancel.click(on_cancel, **at_once)
        for button, text in ((copy_command, command), (copy_python, python)):
            button.click(on_copy, text, status, js=COPY, **at_once)
        place.input(on_place, place, seen, trigger_mode="always_last", **at_once)
        reuse.click(on_reuse, None, [editor, status], **at_once)
        gr.on([load.click, name.submit], on_load, name, [status, cfg, steps, sampler], **quiet)
        gallery.expand(on_open, None, shelf, **at_once)
        taken = [*fields, name, facts, status]
        strip.select(on_strip, None, taken, **at_once)
        shelf.select(on_shelf, None, taken, **at_once)
        blocks.unload(on_close)
    return blocks


def _fitting(source: str) -> list[tuple[str, str]]:
    """The samplers that a model can be used with, each with its title."""
    kind = drawing_module.model(source).config.schedule.prediction_type
    return [(SAMPLERS[one], one) for one in samplers_for(kind)]


def _settings(path: Path) -> dict[str, Any]:
    """What a picture's file says of it. Raises ValueError if that is not enough to draw it again."""
    settings = DEFAULTS | _read_settings(str(path))
    if missing := {"prompt", "sampler", "steps", "cfg", "seed", "size"} - settings.keys():
        raise ValueError(f"{path} does not say its {', '.join(sorted(missing))}")
    return settings


def _item(path: Path) -> tuple[str, str]:
    """A picture in a gallery, with what its file says of it."""
    told = _settings(path)
    how = f"seed {told['seed']}, {SAMPLERS.get(told['sampler'], told['sampler'])}"
    return str(path), f"{told['prompt']}: {how}, {told['steps']} steps, CFG {told['cfg']:g}"


def _edited(picture: Image.Image | None, mask: Image.Image | None = None) -> dict[str, Any] | None:
    """What the editor shows: the picture, and white over it where the mask is."""
    if picture is None:
        return None
    layer = Image.new("RGBA", picture.size, (255, 255, 255, 0))
    if mask is not None:
        layer.putalpha(mask.convert("L"))
    composite = Image.alpha_composite(picture.convert("RGBA"), layer)
    return {"background": picture.convert("RGBA"), "layers": [layer], "composite": composite}


def _theme() -> gr.themes.Base:
    """Large enough for a wall; white on blue, where orange would be too pale for white."""
    theme = gr.themes.Default(
        primary_hue="blue", neutral_hue="slate", text_size="lg", font=FONTS, font_mono=MONO
    )
    return theme.set(
        button_primary_background_fill="*primary_600", button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_hover_dark="*primary_700",
        body_text_color_subdued="*neutral_500", body_text_color_subdued_dark="*neutral_400",
        slider_color="*primary_600", slider_color_dark="*primary_500",
        block_title_text_color="*neutral_700", block_title_text_color_dark="*neutral_200",
        block_label_text_color="*neutral_700", block_label_text_color_dark="*neutral_200",
        input_placeholder_color="*neutral_500", input_placeholder_color_dark="*neutral_400",
    )  # fmt: skip


def serve(
    source: str = "mini", port: int | None = None, browser: bool = True, folder: str = "images"
) -> tuple[gr.Blocks, str]:
    """Starts the page at 127.0.0.1, in threads of its own -> the page and its address.

    port: None for the first free one from 7860. Raises ValueError for what is no model, and for a port that
    is taken.
    """
    drawing_module.model(source)  # what is no model is found before the page opens
    blocks = page(source, folder)
    blocks.queue(default_concurrency_limit=4)
    script = f"<script>{(HERE / 'studio.js').read_text('utf-8')}</script>"
    try:
        _, address, _ = blocks.launch(
            server_name="127.0.0.1",
            server_port=port,
            inbrowser=browser,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,
            footer_links=[],
            allowed_paths=[os.path.abspath(folder)],
            theme=_theme(),
            css_paths=HERE / "studio.css",
            head=script,
        )
    except OSError:
        raise ValueError(f"port {port} is taken, or no port is free: try another --port") from None
    return blocks, address


def run(source: str, port: int | None, browser: bool, folder: str) -> None:
    """Serves the page until Ctrl-C."""
    blocks, address = serve(source, port, browser, folder)
    print(f"The studio is at {address}  (Ctrl-C ends it)", flush=True)
    try:
        threading.Event().wait()
    finally:
        blocks.close(verbose=False)
