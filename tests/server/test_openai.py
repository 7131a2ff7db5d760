"""OpenAI's images API, asked by OpenAI's own client."""

from __future__ import annotations

import base64
import io
import json
import threading
from typing import Any

import numpy as np
import pytest
from PIL import Image

from reifusion import cli
from reifusion.server.openai import _as_settings

from .conftest import Running, until

openai = pytest.importorskip("openai", reason="a test of its API needs: pip install openai")


@pytest.fixture(scope="module")
def client(running: Running):
    with openai.OpenAI(api_key="none", base_url=f"{running.address}/v1", max_retries=0) as client:
        yield client


def opened(text: str) -> Any:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def test_a_picture_has_the_bytes_of_the_command_line(client, models, tmp_path, capsys):
    answer = client.images.generate(
        prompt="a cat", size="64x64", extra_body={"seed": 7, "steps": 3, "sampler": "euler_a", "cfg_scale": 3}
    )
    command = ["generate", "--model", str(models / "tiny.safetensors"), "--size", "64x64", "--seed", "7",
               "--steps", "3", "--sampler", "euler_a", "--cfg", "3", "--dtype", "fp32", "--device", "cpu",
               "--out"]  # fmt: skip
    assert cli.main([*command, str(tmp_path / "a.png"), "--", "a cat"]) == 0
    picture: Any = opened(answer.data[0].b64_json)
    drawn: Any = Image.open(tmp_path / "a.png")
    assert np.array_equal(picture, drawn) and answer.size == "64x64"
    assert picture.text["parameters"] == drawn.text["parameters"]
    said, expected = (json.loads(one.text["reifusion"]) for one in (picture, drawn))
    assert said == expected | {"model": "tiny"}  # the path of the file stays here


def test_each_of_several_pictures_is_the_one_of_its_seed_alone(client):
    several = client.images.generate(prompt="a dog", n=3, extra_body={"seed": 5})
    alone = client.images.generate(prompt="a dog", extra_body={"seed": 7})
    assert [one.seed for one in several.data] == [5, 6, 7]
    assert several.data[2].b64_json == alone.data[0].b64_json != several.data[0].b64_json


def test_another_model_and_a_lora_by_their_names(client):
    def draw(**more) -> str:
        return client.images.generate(prompt="cat", extra_body={"seed": 1, **more}).data[0].b64_json

    assert {one.id for one in client.models.list()} == {"tiny", "other"}
    assert client.models.retrieve("other").object == "model"
    plain = draw()
    other, with_lora = draw(model="other"), draw(lora=[{"name": "zork", "weight": 4}])
    assert len({plain, other, with_lora}) == 3
    assert json.loads(opened(with_lora).text["reifusion"])["lora"] == [["zork", 4.0]]
    assert draw() == plain  # the LoRA is gone


def test_a_model_that_is_broken_is_said(client, models, running):
    broken = models / "broken.safetensors"
    broken.write_bytes(b"no tensors")
    try:
        with pytest.raises(openai.BadRequestError, match=r"broken\.safetensors") as error:
            client.images.generate(prompt="cat", model="broken")
        assert str(models) not in str(error.value)
        with running.client() as http:
            asked = {"override_settings": {"sd_model_checkpoint": "broken"}}
            assert http.post("/sdapi/v1/txt2img", json=asked).status_code == 400
    finally:
        broken.unlink()


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_formats(client, format):
    answer = client.images.generate(
        prompt="cat", output_format=format, response_format="url", extra_body={"seed": 2, "steps": 1}
    )
    head, _, text = answer.data[0].url.partition(",")
    assert head == f"data:image/{format};base64" and opened(text).format == format.upper()


def png(picture: Image.Image) -> io.BytesIO:
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    stream.name = "picture.png"
    stream.seek(0)
    return stream


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


def test_an_edit_redraws_what_is_transparent_in_the_mask_and_keeps_the_rest(client, photo):
    mask = Image.new("RGBA", (64, 64), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 32, 64))
    answer = client.images.edit(image=png(photo), mask=png(mask), prompt="a cat", size="64x64")
    before, after = np.asarray(photo), np.asarray(opened(answer.data[0].b64_json))
    assert np.array_equal(before[:, 32:], after[:, 32:]) and (before[:, :32] != after[:, :32]).mean() > 0.9
    own = photo.convert("RGBA")
    own.putalpha(mask.getchannel("A"))
    again = client.images.edit(  # as a list of one, which the client sends under another name
        image=[png(own)], prompt="a cat", size="64x64", extra_body={"seed": answer.data[0].seed}
    )
    assert np.array_equal(after, opened(again.data[0].b64_json))


def test_an_edit_without_a_mask_draws_on_from_the_whole_picture(client, photo):
    answer = client.images.edit(image=png(photo), prompt="cat", extra_body={"strength": 0.5, "seed": 3})
    assert opened(answer.data[0].b64_json).size == (64, 64)
    assert "Denoising strength: 0.5" in opened(answer.data[0].b64_json).text["parameters"]


def test_a_picture_of_16_bits_keeps_its_levels_in_an_edit():
    grey = Image.fromarray(np.full((8, 8), 257 * 100, np.uint16))
    mask = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    for inputs in ({"image": grey}, {"image": grey, "mask": mask}):
        assert _as_settings(inputs)["init_image"].getpixel((0, 0)) == (100, 100, 100)
    see_through = Image.new("RGBA", (8, 8), (7, 8, 9, 0))
    assert _as_settings({"image": see_through})["init_image"].getpixel((0, 0)) == (7, 8, 9)


@pytest.mark.parametrize("edit", [False, True])
def test_a_stream_has_pictures_on_the_way_and_ends_with_the_same_bytes(client, photo, edit):
    kind = "image_edit" if edit else "image_generation"
    more: dict[str, Any] = {"prompt": "a cat", "size": "64x64", "extra_body": {"seed": 4, "steps": 4}}
    call = client.images.generate
    if edit:
        more["image"], call = png(photo), client.images.edit
    events = list(call(stream=True, partial_images=2, **more))
    assert [one.type for one in events] == 2 * [f"{kind}.partial_image"] + [f"{kind}.completed"]
    assert [one.partial_image_index for one in events[:2]] == [0, 1]
    assert len({one.b64_json for one in events}) == 3
    if edit:
        more["image"] = png(photo)
    assert call(**more).data[0].b64_json == events[2].b64_json


WRONG = [
    ({"prompt": ""}, "prompt", 400),
    ({"n": 11}, "n", 400),
    ({"n": 0}, "n", 400),
    ({"size": "64"}, "size", 400),
    ({"size": "60x64"}, None, 400),
    ({"size": "4096x64"}, "size", 400),
    ({"size": "2000x2000"}, "size", 400),
    ({"model": "../tiny"}, "model", 404),
    ({"model": "/etc/passwd"}, "model", 404),
    ({"model": "tiny\x00"}, "model", 404),
    ({"background": "transparent"}, "background", 400),
    ({"extra_body": {"steps": 151}}, "steps", 400),
    ({"extra_body": {"sampler": "none"}}, None, 400),
    ({"extra_body": {"cfg_scale": "many"}}, "cfg_scale", 400),
    ({"extra_body": {"lora": [{"name": "..\\zork"}]}}, "lora", 404),
    ({"extra_body": {"unknown": 1}}, "unknown", 400),
    ({"prompt": 9000 * "a"}, "prompt", 400),
]


@pytest.mark.parametrize(("asked", "param", "status"), WRONG, ids=[str(one)[:40] for one, *_ in WRONG])
def test_what_cannot_be_drawn_is_refused_with_the_field(client, asked, param, status):
    with pytest.raises(openai.APIStatusError) as error:
        client.images.generate(**{"prompt": "cat", **asked})
    assert (error.value.status_code, error.value.param) == (status, param)
    assert error.value.type and len(error.value.message) > 10 and "\n" not in error.value.body["message"]


def test_seeds_that_count_too_far_are_refused_before_anything_is_drawn(client, running, monkeypatch):
    monkeypatch.setattr(running.queue, "put", lambda job: pytest.fail("it was taken"))
    with pytest.raises(openai.BadRequestError, match="the seed of picture 2 must be between 0 and"):
        client.images.generate(prompt="cat", n=2, extra_body={"seed": 2**63 - 1})


def test_pictures_that_are_none_are_refused(client, photo, running):
    def refused(param: str, **more) -> str:
        with pytest.raises(openai.APIStatusError) as error:
            client.images.edit(**{"prompt": "cat", **more})
        assert error.value.status_code == 400 and error.value.param == param
        return error.value.body["message"]

    refused("image", image=b"no picture")
    refused("image", image=[png(photo), png(photo)])
    refused("mask", image=png(photo), mask=png(photo))  # which is transparent nowhere
    bomb = png(Image.new("1", (8192, 8192)))
    assert len(bomb.getvalue()) < 20_000 and "8192×8192" in refused("image", image=bomb)
    with running.client() as http:
        answer = http.post("/v1/images/edits", json={"prompt": "cat"})
        assert answer.status_code == 415 and answer.json()["error"]["message"]
        assert http.post("/v1/images/variations").json()["error"]["type"] == "not_found_error"


def test_a_job_can_be_watched_and_cancelled_by_its_id(running: Running):
    events: list[Any] = []
    with running.client() as client:

        def ask() -> None:
            body = {"prompt": "cat", "steps": 150, "n": 10, "size": "256x256"}
            headers = {"X-Request-ID": "watched-1"}
            events.append(client.post("/v1/images/generations", json=body, headers=headers))

        thread = threading.Thread(target=ask)
        thread.start()
        until(lambda: "watched-1" in running.queue)
        said: list[dict] = []
        told: list[int] = []
        with client.stream("GET", "/jobs/watched-1") as stream:
            for line in stream.iter_lines():
                if line:
                    said.append(json.loads(line.removeprefix("data: ")))
                    if said[-1]["step"] >= 3 and not told:
                        told.append(client.delete("/jobs/watched-1").status_code)
        thread.join()
    assert told == [202] and said[-1]["state"] == "cancelled" and said[-1]["steps"] == 150
    assert [one["step"] for one in said] == sorted(one["step"] for one in said)
    (answer,) = events
    assert answer.status_code == 410 and answer.headers["X-Request-ID"] == "watched-1"
    with running.client() as client:
        assert client.delete("/jobs/watched-1").status_code == 404


def test_nothing_is_left_of_what_was_sent(running: Running, client, photo):
    client.images.edit(image=png(photo), prompt="cat")
    scratch = running.server._app.state.service.scratch
    until(lambda: not list(scratch.iterdir()))
    assert scratch.is_dir()
