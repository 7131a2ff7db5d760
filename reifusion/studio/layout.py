"""What stands where on the page. What the parts do is in `acts.py`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported

import gradio as gr

from ..model.config import ModelConfig
from ..model.request import Request
from ..model.samplers import SAMPLERS, samplers_for
from ..model.spacing import SCHEDULES
from ..sampling.schedules import TITLES
from ..settings import ABOUT
from .views import says

FONTS, MONO = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]  # the machine's: none are fetched
STRIP = 8  # the most pictures side by side
TITLE = """<div class="head"><h1>reifusion studio</h1>
<p>Type a prompt, watch the picture form, and look into it.</p></div>"""
EMPTY = '<div class="empty">The picture will form here.</div>'
SHOWN: dict[str, Any] = {
    "height": "auto",
    "object_fit": "contain",
    "fit_columns": False,
    "allow_preview": False,
    "interactive": False,
    "buttons": [],
}


class Parts:
    """The parts of the page, at their places; made inside a `gr.Blocks`."""

    def __init__(self, source: str, config: ModelConfig, folder: Path):
        """The fields begin with the model's own settings."""
        own = Request("").for_model(config)
        gr.HTML(TITLE)
        with gr.Row(equal_height=True):
            self.prompt = gr.Textbox(
                "a red apple", label=_title("prompt"), scale=6, min_width=240, elem_id="prompt"
            )
            self.start = gr.Button("Draw", variant="primary", scale=1, min_width=100, elem_id="draw")
            self.cancel = gr.Button("Cancel", scale=1, min_width=100, elem_id="cancel")
        self.status = gr.HTML(says("Nothing drawn yet."), elem_id="status")
        with gr.Row():
            with gr.Column(scale=3, min_width=280):
                self.canvas = gr.HTML(EMPTY, elem_id="view")
                self.place = gr.Slider(
                    0, 1, 0, step=1, label="Step, from noise to picture", interactive=False, buttons=[],
                    elem_id="place",
                )  # fmt: skip
                self.curves = gr.HTML(elem_id="schedule")
            with gr.Column(scale=2, min_width=280):
                self.negative = gr.Textbox(label=_title("negative", True), elem_id="negative")
                self.cfg = gr.Slider(
                    1, 20, own.cfg, step=0.5, label=_title("cfg", True), buttons=[],
                    elem_id="cfg",
                )  # fmt: skip
                self.steps = gr.Slider(
                    1, 100, own.steps, step=1, label=_title("steps"), buttons=[], elem_id="steps"
                )
                self.sampler = gr.Dropdown(
                    samplers(config), value=own.sampler, label=_title("sampler"), elem_id="sampler"
                )
                self.schedule = gr.Dropdown(
                    schedules(), value="", label=_title("schedule"), elem_id="schedule-type"
                )
                with gr.Row():
                    self.seed = gr.Number(
                        0, precision=0, label=_title("seed"), min_width=120, elem_id="seed",
                        placeholder="a new one each time",
                    )  # fmt: skip
                    self.size = gr.Textbox(
                        label="Width x height", min_width=120, elem_id="size", placeholder="the model's"
                    )
                self.live = gr.Checkbox(label="Draw anew when one of these changes", elem_id="live")
                with gr.Accordion("Begin with a picture, paint what is to change", open=False):
                    gr.HTML(
                        "<p>What you paint white is redrawn; without any paint, the whole picture is.</p>"
                    )
                    self.editor = gr.ImageEditor(
                        type="pil", image_mode="RGBA", format="png", sources=("upload", "clipboard"),
                        transforms=(), layers=False, brush=gr.Brush(colors=["#ffffff"], color_mode="fixed"),
                        buttons=[], elem_id="editor", label="Picture",
                    )  # fmt: skip
                    self.reuse = gr.Button("Begin with the last picture", size="sm", elem_id="reuse")
                    self.strength = gr.Slider(
                        0.05, 1, ABOUT["strength"].default, step=0.05, label=_title("strength", True),
                        buttons=[], elem_id="strength",
                    )  # fmt: skip
                with gr.Accordion("Another model", open=False):
                    self.name = gr.Textbox(
                        source, label=ABOUT["model"].help.rstrip("."),
                        elem_id="model",
                    )  # fmt: skip
                    self.load = gr.Button("Load", size="sm", elem_id="load")
        self.strip = gr.Gallery(
            label="Your last pictures; choose one to take over its settings", elem_id="strip", columns=STRIP,
            **SHOWN,
        )  # fmt: skip
        with gr.Accordion("What happens here", elem_id="happens"):
            self.panel = gr.HTML("<p>Draw something, then move the step slider.</p>")
        with gr.Accordion("Repeat this picture exactly", elem_id="repeat"), gr.Row():
            with gr.Column(min_width=280):
                self.command = gr.Textbox(label="As command", lines=3, elem_id="command")
                self.copy_command = gr.Button("Copy as command", size="sm", elem_id="copy-command")
            with gr.Column(min_width=280):
                self.python = gr.Textbox(label="As Python", lines=3, elem_id="python")
                self.copy_python = gr.Button("Copy as Python", size="sm", elem_id="copy-python")
        with gr.Accordion(f"Gallery: {folder}", open=False, elem_id="gallery") as self.gallery:
            self.shelf = gr.Gallery(
                label="Choose one to take over its settings", elem_id="shelf", columns=STRIP, **SHOWN
            )
            self.facts = gr.HTML(elem_id="facts")
        # What is asked for, in the order of `wishes.ask`.
        self.fields = [
            self.prompt, self.negative, self.sampler, self.steps, self.cfg, self.seed, self.size, self.editor,
            self.strength, self.schedule,
        ]  # fmt: skip


def _title(name: str, explained: bool = False) -> str:
    """Returns a setting's title, and with `explained` the first part of its help."""
    title, help = ABOUT[name].title, re.split("[;.,]", ABOUT[name].help)[0]
    return f"{title}: {help[0].lower()}{help[1:]}" if explained else title


def samplers(config: ModelConfig) -> list[tuple[str, str]]:
    """Returns the titles and names of the samplers that fit a model."""
    return [(SAMPLERS[name].title, name) for name in samplers_for(config.schedule.prediction_type)]


def schedules() -> list[tuple[str, str]]:
    """Returns the titles and names of the schedules."""
    return [("the sampler's own", ""), *((TITLES.get(name, name), name) for name in SCHEDULES)]


def theme() -> gr.themes.Base:
    """Returns type that is large enough for a wall, and blue behind white, as orange is too pale for that."""
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
