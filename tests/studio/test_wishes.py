"""From the fields of the page to a request, to a picture, and to the code that repeats the picture."""

from __future__ import annotations

import shlex
from typing import Any

import numpy as np
import pytest
from PIL import Image

from reifusion import cli
from reifusion.studio.drawing import Drawing
from reifusion.studio.wishes import ask

FIELDS: dict[str, Any] = {
    "prompt": "a cat", "negative": "", "sampler": "ddim", "steps": 3, "cfg": 2.5, "seed": 5, "size": "",
    "start": None, "strength": 0.8,
}  # fmt: skip


def editor(size=(64, 64), painted=(16, 16, 48, 48)) -> dict:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    layer = Image.new("RGBA", size, (255, 255, 255, 0))
    if painted:
        layer.paste((255, 255, 255, 255), painted)
    return {"background": Image.fromarray(noise).convert("RGBA"), "layers": [layer], "composite": None}


def test_the_fields_make_the_request():
    request = ask(**FIELDS | {"negative": "dog", "size": " 64x96 "})
    assert (request.prompts, request.negatives, request.seeds) == (["a cat"], ["dog"], [5])
    assert (request.sampler, request.steps, request.cfg) == ("ddim", 3, 2.5)
    assert (request.size, request.init_image, request.mask) == ((64, 96), None, None)


def test_a_schedule_is_asked_for_or_left_to_the_sampler():
    asked = ask(**FIELDS | {"sampler": "euler", "schedule": "karras"})
    assert asked.schedule == "karras" and ask(**FIELDS | {"schedule": ""}).schedule is None
    with pytest.raises(ValueError, match="the sampler restart has a schedule of its own"):
        ask(**FIELDS | {"sampler": "restart", "schedule": "karras"})


def test_no_seed_is_a_new_one_each_time():
    assert len({ask(**FIELDS | {"seed": None}).seeds[0] for _ in range(5)}) > 1


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"size": "big"}, "a size is width x height, like 512x768, not 'big'"),
        ({"steps": 0}, "the number of steps must be between 1 and 1000, not 0"),
        ({"seed": -1}, "the seed must be between 0 and"),
        ({"sampler": "magic"}, "there is no sampler 'magic'"),
        ({"start": {"background": None, "layers": editor()["layers"]}}, "there is no picture below it"),
    ],
)
def test_a_request_that_cannot_be_drawn_is_refused_in_one_sentence(wrong, says):
    with pytest.raises(ValueError, match=r".") as error:
        ask(**FIELDS | wrong)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_what_is_painted_is_redrawn_and_without_paint_all_is():
    redraw = np.asarray(ask(**FIELDS | {"start": editor()}).mask)
    assert redraw[16:48, 16:48].min() == 255 and redraw.sum() == 255 * 32 * 32
    request = ask(**FIELDS | {"start": editor(painted=None)})
    assert request.init_image is not None and request.mask is None


@pytest.mark.parametrize("empty", [None, {"background": Image.new("RGBA", (8, 8)), "layers": []}, {}])
def test_an_empty_editor_is_no_picture(empty):
    assert ask(**FIELDS | {"start": empty}).init_image is None


@pytest.mark.parametrize("start", [None, editor(), editor(painted=None)], ids=["words", "inpaint", "img2img"])
def test_the_command_and_the_python_repeat_the_picture_exactly(start, model, finish, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    drawing: Drawing = finish(ask(**FIELDS | {"start": start, "negative": "-dog", "prompt": "-a cat's"}))
    drawn = np.asarray(drawing.frames[-1].picture)
    assert drawing.settings is not None
    words = shlex.split(drawing.settings.as_command())
    assert words[0] == "reifusion" and cli.main([*words[1:2], "--out=again.png", *words[2:]]) == 0
    assert np.array_equal(np.asarray(Image.open("again.png")), drawn)
    exec(compile(drawing.settings.as_python(), "copied", "exec"), {})
    assert np.array_equal(np.asarray(Image.open("picture.png")), drawn)
    assert np.array_equal(np.asarray(Image.open(drawing.path or "")), drawn)
