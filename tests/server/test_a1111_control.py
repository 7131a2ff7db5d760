"""ControlNets through A1111's API, asked by webuiapi and by hand."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from reifusion.album import read

from .conftest import settings

webuiapi = pytest.importorskip("webuiapi", reason="a test of A1111's API needs: pip install webuiapi")

# The client keeps scripts from one call to the next, unless it is told which.
SMALL: dict[str, Any] = {"width": 64, "height": 64, "steps": 3, "sampler_name": "Euler a", "cfg_scale": 4}


def drawn_by(api: Any, **asked: Any) -> Any:
    return api.txt2img(alwayson_scripts={}, **asked)


def hint(size: tuple[int, int] = (64, 64)) -> Image.Image:
    picture = Image.new("RGB", size)
    ImageDraw.Draw(picture).ellipse((10, 10, 40, 50), outline="white", width=2)
    return picture


def in_base64(picture: Image.Image) -> str:
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def alike(a: Image.Image, b: Image.Image) -> bool:
    return np.array_equal(np.asarray(a), np.asarray(b))


def test_a_unit_is_a_controlnet_of_the_settings(api, models, controls, tmp_path):
    unit = webuiapi.ControlNetUnit(image=hint(), model="canny [0123abcd]", weight=0.8, guidance_end=0.7)
    asked = {"prompt": "a cat", "seed": 3, **SMALL}
    result = drawn_by(api, controlnet_units=[unit], **asked)
    assert len(result.images) == 2  # the picture, and its hint behind it
    assert alike(result.images[1], hint())
    hint().save(tmp_path / "hint.png")
    same = replace(
        settings(models), prompt="a cat", seed=3, sampler="euler_a", cfg=4.0, size=(64, 64),
        control=((str(controls / "canny.safetensors"), str(tmp_path / "hint.png"), 0.8, 0.0, 0.7),),
    )  # fmt: skip
    drawn = same.draw(same.pipe("cpu"), same.request())
    assert alike(result.images[0], drawn)
    plain = drawn_by(api, **asked)
    assert len(plain.images) == 1 and not alike(plain.image, drawn)
    text = result.images[0].text["parameters"]
    assert 'ControlNet 0: "Module: none, Model: canny, Weight: 0.8,' in text and str(controls) not in text
    result.images[0].save(tmp_path / "a.png", pnginfo=_kept(result.images[0]))
    said = read(tmp_path / "a.png").settings.control[0]
    assert said[0] == "canny" and "/" not in said[1]


def _kept(picture: Image.Image) -> Any:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for name, text in picture.text.items():  # type: ignore[attr-defined]
        info.add_itxt(name, text)
    return info


def test_the_units_of_one_request_do_not_stay_for_the_next(api):
    unit = webuiapi.ControlNetUnit(image=hint(), model="canny")
    before = drawn_by(api, prompt="cat", seed=1, **SMALL).image
    drawn_by(api, prompt="cat", seed=1, controlnet_units=[unit], **SMALL)
    assert alike(drawn_by(api, prompt="cat", seed=1, **SMALL).image, before)


def test_edges_are_found_at_the_size_that_is_drawn(api, http):
    pytest.importorskip("cv2")
    large = hint((64, 64)).resize((400, 400))
    unit = webuiapi.ControlNetUnit(
        image=large, model="canny", module="canny", threshold_a=50, threshold_b=100
    )
    found = np.asarray(drawn_by(api, prompt="cat", seed=1, controlnet_units=[unit], **SMALL).images[1])
    assert found.shape == (64, 64, 3) and set(np.unique(found)) == {0, 255}
    stream = io.BytesIO()
    hint().save(stream, "PNG")
    sent = {
        "controlnet_module": "canny",
        "controlnet_input_images": [base64.b64encode(stream.getvalue()).decode()],
    }
    (made,) = http.post("/controlnet/detect", json=sent).json()["images"]
    assert Image.open(io.BytesIO(base64.b64decode(made))).size == (64, 64)


def test_a_unit_without_a_picture_takes_the_init_image(api, http):
    picture = hint()
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    sent = {
        "prompt": "cat",
        "seed": 1,
        "init_images": [base64.b64encode(stream.getvalue()).decode()],
        **SMALL,
    }
    unit = {"model": "canny", "module": "invert (from white bg & black line)", "resize_mode": 0}
    answer = http.post(
        "/sdapi/v1/img2img", json=sent | {"alwayson_scripts": {"ControlNet": {"args": [unit]}}}
    )
    assert answer.status_code == 200, answer.text
    shown = Image.open(io.BytesIO(base64.b64decode(answer.json()["images"][1])))
    assert np.array_equal(np.asarray(shown.convert("RGB")), 255 - np.asarray(picture))


def test_what_is_there_is_listed(http):
    assert http.get("/controlnet/model_list").json() == {"model_list": ["canny"]}
    assert "canny" in http.get("/controlnet/module_list").json()["module_list"]
    assert http.get("/controlnet/version").json()["version"] > 0


@pytest.mark.parametrize(
    "script, said",
    [
        ({"controlnet": {"args": [{"model": "depth", "image": "x"}]}}, "there is no ControlNet 'depth'"),
        ({"controlnet": {"args": [{"model": "canny"}]}}, "the unit of 'canny' has no image"),
        ({"controlnet": {"args": [{"model": "canny", "image": "http://a/b.png"}]}}, "no address is fetched"),
        ({"controlnet": {"args": [{"model": "canny", "weight": 7}]}}, "weight: Input should be less"),
        ({"controlnet": {"args": [{"model": "canny", "control_mode": "loud"}]}}, "no control_mode 'loud'"),
        ({"controlnet": {"args": ["canny"]}}, "a unit of controlnet is an object"),
        ({"dynamic prompts": {"args": [True]}}, "there is no script 'dynamic prompts'"),
    ],
)
def test_what_is_not_here_is_refused_by_name(http, script, said):
    answer = http.post("/sdapi/v1/txt2img", json={"prompt": "cat", "alwayson_scripts": script, **SMALL})
    assert answer.status_code in (400, 404, 422) and said in answer.text, answer.text


def test_the_ratio_of_a_hint_is_kept_or_not_as_is_asked(http):
    image = in_base64(hint((128, 64)))
    made = {}
    for mode in ("Just Resize", "Crop and Resize", "Resize and Fill"):
        unit = {"model": "canny", "image": image, "resize_mode": mode}
        script = {"controlnet": {"args": [unit, {"enabled": False, "model": "gone"}]}}
        answer = http.post("/sdapi/v1/txt2img", json={"prompt": "cat", "alwayson_scripts": script, **SMALL})
        assert answer.status_code == 200, answer.text
        made[mode] = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer.json()["images"][1]))))
    assert {one.shape for one in made.values()} == {(64, 64, 3)}
    assert made["Resize and Fill"][:15].max() == 0 and made["Crop and Resize"][:15].max() > 0
    assert made["Just Resize"][:, 32:].max() == 0  # the ellipse is in the left third


def test_an_unknown_folder_is_refused(capsys, tmp_path: Path):
    from reifusion.cli.main import main

    assert main(["serve", "--controls", str(tmp_path / "none")]) == 2
    assert "there is no folder" in capsys.readouterr().err
