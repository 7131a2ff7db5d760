"""A1111's API, asked by webuiapi, a client of it."""

from __future__ import annotations

import base64
import io
import json
import threading
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import ExifTags, Image

from reifusion.model.samplers import SAMPLERS
from reifusion.server.a1111_request import Img2Img, _filled, inputs_of
from reifusion.server.limits import Limits
from reifusion.server.pictures import of_text

from .conftest import Running, until

webuiapi = pytest.importorskip("webuiapi", reason="a test of A1111's API needs: pip install webuiapi")

SMALL: dict[str, Any] = {"width": 64, "height": 64, "steps": 3, "sampler_name": "Euler a", "cfg_scale": 4}


def test_txt2img_draws_and_says_how(api, http):
    result = api.txt2img(prompt="a cat", negative_prompt="dog", seed=3, batch_size=2, n_iter=2, **SMALL)
    assert len(result.images) == 4 and {one.size for one in result.images} == {(64, 64)}
    info = result.info
    assert info["all_seeds"] == [3, 4, 5, 6] and info["sampler_name"] == "Euler a" and info["steps"] == 3
    assert info["infotexts"][1] == result.images[1].text["parameters"]
    assert "Negative prompt: dog" in info["infotexts"][0]
    alone = api.txt2img(prompt="a cat", negative_prompt="dog", seed=5, **SMALL)
    assert np.array_equal(alone.image, result.images[2])
    same = {"prompt": "a cat", "seed": 5, "steps": 3, "sampler": "euler_a", "cfg_scale": 4, "size": "64x64"}
    answer = http.post("/v1/images/generations", json=same | {"negative_prompt": "dog"}).json()
    assert np.array_equal(alone.image, opened(answer["data"][0]["b64_json"]))  # in the other dialect


def opened(text: str) -> Any:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def test_words_have_weights_and_name_loras(api):
    def draw(prompt: str) -> Any:
        return api.txt2img(prompt=prompt, seed=1, **SMALL).image

    pictures = [draw(text) for text in ("a cat", "a (cat:1.5)", "a cat <lora:zork:4>")]
    pictures.append(draw("a cat <lora:zork:4:lbw=0,0,0,0,0,0,0,1>"))
    assert len({one.tobytes() for one in pictures}) == 3 and pictures[3].tobytes() == pictures[0].tobytes()
    assert "<lora:zork:4>" in pictures[2].text["parameters"]
    assert draw("a cat").tobytes() == pictures[0].tobytes()


def test_variations_keep_the_seed_and_count_up_their_own(api):
    more = {"prompt": "cat", "seed": 1, "subseed": 5, "subseed_strength": 0.3, **SMALL}
    two = api.txt2img(batch_size=2, **more)
    assert (two.info["all_seeds"], two.info["all_subseeds"]) == ([1, 1], [5, 6])
    second = api.txt2img(**more | {"subseed": 6})
    assert np.array_equal(second.image, two.images[1]) and not np.array_equal(*two.images)


def test_what_is_masked_is_filled_with_the_colours_around_it():
    picture = Image.new("RGB", (64, 64), (200, 30, 30))
    picture.paste((0, 255, 0), (20, 20, 44, 44))
    mask = Image.new("L", (64, 64))
    mask.paste(255, (20, 20, 44, 44))
    assert np.abs(np.asarray(_filled(picture, mask), int) - (200, 30, 30)).max() <= 8


def test_hires_draws_once_more_larger(api):
    result = api.txt2img(
        prompt="cat", enable_hr=True, hr_scale=2, hr_upscaler="Latent", denoising_strength=0.7, **SMALL
    )
    assert result.image.size == (128, 128) and result.info["width"] == 128


def test_img2img_and_its_mask(api, http):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 24, 64))
    drawn = api.img2img(images=[photo], prompt="cat", denoising_strength=0.6, seed=1, **SMALL).image
    assert drawn.size == (64, 64) and "Denoising strength: 0.6" in drawn.text["parameters"]
    more: dict[str, Any] = {"inpaint_full_res": False, "mask_blur": 0, **SMALL}
    masked = api.img2img(images=[photo], mask_image=mask, prompt="cat", seed=1, **more).image
    assert np.array_equal(np.asarray(masked)[:, 24:], np.asarray(photo)[:, 24:])
    assert not np.array_equal(np.asarray(masked)[:, :24], np.asarray(photo)[:, :24])
    turned = api.img2img(
        images=[photo], mask_image=mask, inpainting_mask_invert=1, prompt="cat", seed=1, **more
    ).image
    assert np.array_equal(np.asarray(turned)[:, :24], np.asarray(photo)[:, :24])
    kept = api.img2img(images=[photo], mask_image=mask, prompt="cat", seed=1, inpainting_fill=1, **more).image
    assert not np.array_equal(np.asarray(kept)[:, :24], np.asarray(masked)[:, :24])
    wide = photo.resize((96, 80))
    only = api.img2img(images=[wide], mask_image=mask.resize((96, 80)), prompt="cat", seed=1, **SMALL).image
    assert only.size == (96, 80) and np.array_equal(np.asarray(only)[:, 60:], np.asarray(wide)[:, 60:])
    assert not np.array_equal(np.asarray(only)[:, :30], np.asarray(wide)[:, :30])
    answer = http.post("/sdapi/v1/img2img", json={"prompt": "cat"})
    assert answer.status_code == 404 and answer.json()["detail"] == "Init image not found"


@pytest.mark.parametrize("method", ["samplers", "schedulers", "sd_models", "loras", "upscalers", "memory"])
def test_the_client_lists_what_there_is(api, method):
    assert getattr(api, f"get_{method}")()


def test_the_listings_have_the_names_that_requests_take(api):
    assert {one["model_name"] for one in api.get_sd_models()} == {"tiny", "other"}
    assert [one["name"] for one in api.get_loras()] == ["zork"]
    assert [one["aliases"] for one in api.get_samplers()] == [[name] for name in SAMPLERS]
    assert api.util_get_model_names() and api.get_scripts() == {"txt2img": [], "img2img": []}


@pytest.mark.parametrize(
    ("sampler", "scheduler", "said"),
    [
        ("DPM++ 2M Karras", "automatic", "Sampler: DPM++ 2M Karras"),
        ("DPM++ 2M", "Karras", "Sampler: DPM++ 2M Karras"),
        ("DPM++ 3M SDE Exponential", None, "Schedule type: Exponential"),
        ("Euler", "SGM Uniform", "Schedule type: SGM Uniform"),
        ("euler_a", "karras", "Sampler: Euler a, Schedule type: Karras"),
        (None, None, "Sampler: "),
    ],
)
def test_samplers_and_schedulers_go_by_their_names_there(http, sampler, scheduler, said):
    asked = {"prompt": "cat", "steps": 2, "sampler_name": sampler, "scheduler": scheduler}
    answer = http.post("/sdapi/v1/txt2img", json=asked)
    assert said in json.loads(answer.json()["info"])["infotexts"][0]


WRONG = [
    ({"sampler_name": "Euler zz"}, 400, "Euler a"),
    ({"scheduler": "zz"}, 400, "karras"),
    ({"steps": "many"}, 422, "steps"),
    ({"steps": 0}, 400, "steps"),
    ({"batch_size": 5, "n_iter": 5}, 400, "25 pictures"),
    ({"width": 8192, "height": 64}, 400, "8,192"),
    ({"width": 64}, 422, "height"),
    ({"width": -8, "height": 64}, 422, "width: "),
    ({"prompt": "cat \ud800"}, 422, "lone surrogate"),
    ({"unknown": {"a": "\ud800"}}, 422, "lone surrogate"),
    ({"styles": ["anime"]}, 422, "styles"),
    ({"tiling": True}, 422, "tiling"),
    ({"script_name": "x/y/z plot"}, 422, "script_name"),
    ({"alwayson_scripts": {"ADetailer": {"args": [1]}}}, 422, "ADetailer"),
    ({"prompt": "<lora:../zork:1>"}, 404, "there are: zork"),
    ({"prompt": "<lora:zork:much>"}, 422, "no number"),
    ({"prompt": "<lora:zork:1:step=5>"}, 422, "lbw="),
    ({"override_settings": {"sd_model_checkpoint": "../tiny"}}, 404, "tiny"),
    ({"override_settings": {"outdir_samples": "/"}}, 400, "outdir_samples"),
    ({"save_images": True}, 422, "save_images"),
    ({"enable_hr": True, "hr_upscaler": "ESRGAN"}, 422, "ESRGAN"),
]


@pytest.mark.parametrize(("asked", "status", "said"), WRONG, ids=[str(one)[:40] for one, *_ in WRONG])
def test_what_cannot_be_drawn_is_refused_in_the_shape_of_this_api(http, asked, status, said):
    said_in_json = json.dumps({"prompt": "cat", **asked})  # in ASCII, as httpx's own is not
    answer = http.post(
        "/sdapi/v1/txt2img", content=said_in_json, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == status and said in answer.json()["detail"]
    assert set(answer.json()) == {"error", "detail", "body", "errors"}


@pytest.mark.parametrize(
    "picture", ["no base64!", "aGVsbG8=", "http://169.254.169.254/latest", "file:///etc/passwd", 7]
)
def test_a_picture_that_is_none_is_refused_and_no_address_is_fetched(http, picture):
    answer = http.post("/sdapi/v1/img2img", json={"prompt": "cat", "init_images": [picture]})
    assert answer.status_code in (400, 422) and "init_images" in answer.json()["detail"]
    assert http.post("/sdapi/v1/png-info", json={"image": picture}).status_code == 400


def test_pictures_are_read_upright_at_8_bits_and_with_line_breaks():
    def sent(picture: Image.Image, format: str = "PNG", **more: Any) -> str:
        stream = io.BytesIO()
        picture.save(stream, format, **more)
        return base64.encodebytes(stream.getvalue()).decode()

    wide, sideways = Image.new("RGB", (16, 8)), Image.Exif()
    sideways[ExifTags.Base.Orientation] = 6
    upright = of_text(sent(wide, "JPEG", exif=sideways), "image", 10**6)
    assert upright.size == (8, 16)
    grey = sent(Image.fromarray(np.full((8, 8), 257 * 100, np.uint16)))
    said = {"init_images": [grey], "mask": grey, "inpainting_fill": 1, "width": 8, "height": 8}
    asked = Img2Img.model_validate(said)
    service: Any = SimpleNamespace(limits=Limits())
    for one in inputs_of(service, asked).values():
        assert one.getpixel((0, 0)) in (100, (100, 100, 100))


def test_a_model_is_chosen_for_all_requests_or_for_one(api, http):
    def model(**more) -> str:
        return api.txt2img(prompt="cat", seed=1, **more, **SMALL).image.tobytes()

    tiny, once = model(), model(override_settings={"sd_model_checkpoint": "other"})
    assert tiny == model() != once
    assert http.post("/sdapi/v1/options", json={"sd_model_checkpoint": "none"}).status_code == 404
    assert http.post("/sdapi/v1/options", json={"outdir_samples": "/"}).status_code == 400
    try:
        api.util_set_model("other")
        assert api.util_get_current_model() == "other" and model() == once
        skipped = model(override_settings={"CLIP_stop_at_last_layers": 2})
        assert skipped != once == model()
    finally:
        api.set_options({"sd_model_checkpoint": "tiny"})
    assert model() == tiny


def test_progress_and_an_interrupt_that_keeps_what_there_is(api, http, running: Running):
    assert api.get_progress()["progress"] == 0 and api.get_progress()["state"]["job_count"] == 0
    results: list[Any] = []
    long: dict[str, Any] = {**SMALL, "steps": 150, "width": 128, "height": 128, "batch_size": 5}
    thread = threading.Thread(target=lambda: results.append(api.txt2img(prompt="cat", **long)))
    thread.start()
    until(lambda: api.get_progress()["state"]["sampling_step"] > 3)
    until(lambda: api.get_progress()["current_image"])
    said = api.get_progress()
    assert 0 < said["progress"] < 1 and said["state"]["job_count"] == 5 and said["eta_relative"] > 0
    assert http.post("/sdapi/v1/interrupt", params={"task": "another"}).status_code == 404
    api.skip()
    until(lambda: api.get_progress()["state"]["job_no"] == 1)
    api.interrupt()
    thread.join()
    assert len(results[0].images) in (2, 3) and results[0].images[0].size == (128, 128)
    api.util_wait_for_ready()


def test_an_interrupt_does_not_end_the_pictures_of_the_other_dialect(api, http, running: Running):
    answers: list[httpx.Response] = []

    def ask() -> None:
        with running.client() as client:
            body = {"prompt": "cat", "steps": 60, "size": "128x128"}
            answers.append(client.post("/v1/images/generations", json=body))

    thread = threading.Thread(target=ask)
    thread.start()
    until(lambda: running.queue.current is not None and running.queue.current.step > 3)
    job = running.queue.current
    api.interrupt()
    for way in ("interrupt", "skip"):
        answer = http.post(f"/sdapi/v1/{way}", params={"task": job.id})
        assert answer.status_code == 404 and f"DELETE /jobs/{job.id} ends it" in answer.json()["detail"]
    thread.join()
    assert answers[0].status_code == 200 and not (job.interrupted or job.skipped) and job.step == 0


def test_png_info(api, http):
    image = api.txt2img(prompt="a cat", seed=9, **SMALL).image
    said = api.png_info(image)
    assert said.info == image.text["parameters"] and "Seed: 9" in said.info
