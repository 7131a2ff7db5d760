"""From what the page sends to settings, to a picture, and to the code that repeats the picture."""

from __future__ import annotations

import base64
import io
import shlex
from typing import Any

import numpy as np
import pytest
from PIL import Image

from reifusion import cli
from reifusion.model.request import Request
from reifusion.settings import ABOUT, Settings
from reifusion.studio import wishes
from tests.explain.conftest import TINY

# The head of a QOI without its pixels, for which Pillow raises an IndexError.
CUT_OFF = "data:image/qoi;base64," + base64.b64encode(b"qoif\0\0\0\2\0\0\0\2\3\0").decode()
TEXTS: dict[str, Any] = {"prompt": "a cat", "sampler": "ddim", "steps": "3", "cfg": "2.5", "seed": "5"}


def as_url(picture: Image.Image) -> str:
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def noise(size=(64, 64)) -> str:
    return as_url(Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)))


def paint(size=(64, 64), opacity=255) -> str:
    layer = Image.new("RGBA", size, (255, 255, 255, 0))
    layer.paste((255, 255, 255, opacity), (16, 16, 48, 48))
    return as_url(layer)


def test_the_fields_make_the_settings(tmp_path):
    made = wishes.settings(TEXTS | {"negative": "dog", "size": "64x96", "schedule": ""}, None, None, tmp_path)
    assert made == Settings("a cat", "dog", sampler="ddim", steps=3, cfg=2.5, seed=5, size=(64, 96))


def test_every_setting_of_the_command_line_is_on_the_page_and_is_read_as_there(tmp_path):
    fields = wishes.fields(TINY)["all"]
    assert set(fields) == set(ABOUT) - {"code", "init_image", "mask"}
    (tmp_path / "zork.safetensors").touch()
    given = {
        "lora": [f"{tmp_path}/zork.safetensors:0.5"],
        "emphasis": "a1111", "int8": "true", "hires": "1.5", "eta": "0.25",
        "clip_skip": "1", "guidance_interval": "0.3:5", "control": ["net=hint.png:0.8"],
        "outpaint": "right=64", "schedule": "karras", "variation": "0.5",
    }  # fmt: skip
    made = wishes.settings(TEXTS | given, None, None, tmp_path)
    assert made.lora == ((f"{tmp_path}/zork.safetensors", 0.5),)
    assert (made.int8, made.hires, made.eta, made.clip_skip) == (True, 1.5, 0.25, 1)
    assert made.guidance_interval == (0.3, 5.0) and made.control == (("net", "hint.png", 0.8, 0.0, 1.0),)
    assert made.outpaint == (0, 0, 64, 0) and made.schedule == "karras"
    again = wishes.settings(wishes.texts(made), None, None, tmp_path)
    assert again == made  # what the page is given back draws the same


def test_the_model_and_the_dtype_of_a_picture_are_told():
    assert wishes.texts(Settings("x", model="mini")) == {"prompt": "x", "model": "mini"}
    assert wishes.texts(Settings("x", dtype="float16"))["dtype"] == "fp16"
    assert wishes.texts(Settings("x", strength=0.33))["strength"] == "0.33"


def test_names_are_read_in_the_manner_of_the_program(tmp_path):
    made = wishes.settings({"prompt": "x", "manner": "a1111", "sampler": "DPM++ 2M"}, None, None, tmp_path)
    assert made.sampler == "dpmpp_2m_karras"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"size": "big"}, "a size is width x height, like 512x768, not 'big'"),
        ({"steps": "0"}, "the number of steps must be between 1 and 1000, not 0"),
        ({"steps": "2.5"}, "Steps is a whole number, not '2.5'"),
        ({"cfg": "much"}, "CFG scale is a number, not 'much'"),
        ({"seed": "-1"}, "the seed must be between 0 and"),
        ({"sampler": "magic"}, "there is no sampler 'magic'"),
        ({"sampler": "restart", "schedule": "karras"}, "the sampler restart has a schedule of its own"),
        ({"code": "mine.py"}, "which is no setting of a picture here"),
        ({"init_image": "/etc/passwd"}, "cannot be read as a picture"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_sentence(wrong, says, tmp_path):
    with pytest.raises(ValueError, match=r".") as error:
        wishes.settings(TEXTS | wrong, None, None, tmp_path).request().for_model(TINY)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_what_is_painted_is_redrawn_softly_and_without_paint_all_is(tmp_path):
    made = wishes.settings(TEXTS, noise(), paint(), tmp_path)
    mask = np.asarray(Image.open(str(made.mask)))
    assert mask[16:48, 16:48].min() == 255 and mask.sum() == 255 * 32 * 32
    soft = wishes.settings(TEXTS, noise(), paint(opacity=100), tmp_path)
    assert np.asarray(Image.open(str(soft.mask))).max() == 100
    for empty in (None, paint(opacity=0)):
        assert wishes.settings(TEXTS, noise(), empty, tmp_path).mask is None


@pytest.mark.parametrize(
    ("picture", "mask", "says"),
    [
        (None, paint(), "there is no picture below it"),
        ("data:image/png;base64,AAAA", None, "cannot be read as a picture"),
        ("file:///etc/passwd", None, "cannot be read as a picture"),
        (noise(), "data:image/png;base64,!", "cannot be read as a picture"),
        (CUT_OFF, None, "cannot be read as a picture"),
    ],
)
def test_a_wrong_picture_is_one_sentence(picture, mask, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        wishes.settings(TEXTS, picture, mask, tmp_path)


def test_sizes_far_from_the_model_s_are_warned_of_and_too_large_ones_refused():
    def told(width: int, height: int, times: float = 1) -> str:
        return wishes.fitting(Request("", size=(width, height)), TINY, times)

    assert told(64, 64) == told(128, 128) == ""
    assert told(128, 192).startswith("128x192 has 6 times the pixels that the model learned from")
    assert told(256, 256) != "" and told(64, 64, 3).startswith("192x192 has 9 times")
    for size in ((256, 264, 1), (4096, 4096, 1), (128, 128, 4)):
        with pytest.raises(ValueError, match="too large for a model of 64x64"):
            told(*size)


@pytest.mark.parametrize(
    ("picture", "mask"),
    [(None, None), (noise(), paint()), (noise(), paint(opacity=150)), (noise(), None)],
    ids=["words", "inpaint", "softly", "img2img"],
)
def test_the_command_and_the_python_repeat_the_picture_exactly(
    picture, mask, model, finish, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    texts = TEXTS | {"negative": "-dog", "prompt": "-a cat's", "model": model}
    drawing = finish(wishes.settings(texts, picture, mask, tmp_path / "out"))
    drawn = np.asarray(drawing.picture)
    words = shlex.split(drawing.settings.as_command())
    assert words[0] == "reifusion" and cli.main([*words[1:2], "--out=again.png", *words[2:]]) == 0
    assert np.array_equal(np.asarray(Image.open("again.png")), drawn)
    exec(compile(drawing.settings.as_python(), "copied", "exec"), {})
    assert np.array_equal(np.asarray(Image.open("picture.png")), drawn)
    assert np.array_equal(np.asarray(Image.open(drawing.path or "")), drawn)
