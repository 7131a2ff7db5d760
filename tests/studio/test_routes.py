"""What the page can ask of the studio, without a browser."""

from __future__ import annotations

import io
import json
import shlex
from typing import Any

import numpy as np
import pytest
from PIL import Image

from reifusion import album
from reifusion.settings import Settings

pytest.importorskip("fastapi", reason="the studio needs: pip install reifusion[studio]")
pytest.importorskip("httpx")


@pytest.fixture
def page(model, tmp_path) -> Any:
    from fastapi.testclient import TestClient

    from reifusion.studio.routes import Studio, build

    return TestClient(build(Studio(model, tmp_path)), base_url="http://127.0.0.1")


def draw(page, **more) -> list[dict[str, Any]]:
    texts = {"prompt": "a cat", "negative": "a dog", "sampler": "ddim", "steps": "2", "cfg": "3", "seed": "5"}
    body = {"settings": texts | {"model": page.get("/api/page").json()["model"]}}
    body["settings"] |= more.pop("settings", {})
    sent = {"content": json.dumps(body | more), "headers": {"Content-Type": "application/json"}}
    answer = page.post("/api/draw", **sent)
    return [json.loads(line) for line in answer.text.splitlines()]


def picture(page, path: str) -> Image.Image:
    return Image.open(io.BytesIO(page.get(path).content))


def test_a_drawing_ends_with_the_picture_and_what_repeats_it(page, tmp_path):
    *_, last = draw(page)
    assert last["done"] and last["name"] == "a-cat-5.png" and last["size"] == [64, 64] and last["seed"] == 5
    assert last["about"] == "a cat: seed 5, DDIM, 2 steps, CFG 3"
    assert "--cfg=3.0" in shlex.split(last["command"]) and "cfg=3.0" in last["python"]
    assert album.read(tmp_path / last["name"]).settings.seed == 5
    file, shown = (
        picture(page, "/pictures/a-cat-5.png"),
        picture(page, f"/api/drawings/{last['id']}/3/seen.png"),
    )
    assert np.array_equal(np.asarray(file), np.asarray(shown))
    told = page.get(f"/api/drawings/{last['id']}/1").json()
    assert told["caption"].startswith("step 1 of 2") and len(told["heats"]["words"]) == 2
    for name, station in told["stations"].items():
        for one in station["tensors"]:
            tile = picture(page, f"/api/drawings/{last['id']}/1/{one['name']}.png")
            numbers = np.prod([int(side) for side in one["shape"].split(" × ")])
            assert tile.width * tile.height == numbers, (name, one)  # a pixel for each number


def test_several_pictures_have_seeds_that_count_up(page):
    assert [draw(page, k=k)[-1]["seed"] for k in (0, 2)] == [5, 7]
    *_, last = draw(page, k=3, settings={"variation": "0.5", "variation_seed": "8"})
    assert (last["seed"], last["settings"]["variation_seed"]) == (5, "11")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"settings": {"size": "big"}}, "a size is width x height"),
        ({"settings": {"size": "13x13"}}, "the width must be a multiple of 8, not 13"),
        ({"settings": {"size": "4096x4096"}}, "4096x4096 is too large for a model of 64x64"),
        ({"settings": {"model": "nowhere.safetensors"}}, "nowhere.safetensors"),
        ({"settings": {"lora": 5}}, "LoRA is a list of texts, not 5"),
        ({"settings": {"lora": [5]}}, "LoRA is a list of texts, not [5]"),
        ({"settings": {"seed": float("inf")}}, "Seed is a whole number, not 'inf'"),
        ({"settings": {"seed": str(2**63 - 1)}, "k": 1}, "the seed of picture 2 must be between 0 and"),
        ({"mask": "data:image/png;base64,"}, "there is no picture below it"),
    ],
)
def test_what_is_wrong_is_one_sentence(page, wrong, says):
    *_, last = draw(page, **wrong)
    assert last["failed"] and last["done"] and says in last["note"] and "\n" not in last["note"]


def test_a_large_picture_is_warned_of(page):
    *_, last = draw(page, settings={"size": "128x192"})
    assert last["name"] and last["warnings"][0].startswith("128x192 has 6 times the pixels")


def test_the_page_hears_what_the_model_warns_of(page):
    """A word on a LoRA is no LoRA, and a negative prompt may be too long; each is said once."""
    *_, last = draw(page, settings={"prompt": "a cat <lora:zork:1>", "negative": "dog " * 50})
    assert last["name"] and len(last["warnings"]) == len(set(last["warnings"])) == 2
    assert any("<lora:zork:1> counts as plain words" in said for said in last["warnings"])
    assert any(said.startswith("The prompt has 50 tokens") for said in last["warnings"])
    *_, last = draw(page)
    assert last["warnings"] == []


def test_what_is_no_longer_there_is_one_sentence(page):
    for path in ("/api/drawings/nothing/0", "/api/drawings/nothing/0/seen.png", "/pictures/no.png"):
        answer = page.get(path)
        assert answer.status_code == 400 and answer.json()["failed"]
    *_, last = draw(page)
    assert page.get(f"/api/drawings/{last['id']}/9").status_code == 400
    assert page.get(f"/api/drawings/{last['id']}/1/secrets.png").status_code == 400
    assert page.get(f"/api/drawings/{last['id']}/0/scaled.png").status_code == 400


def test_what_an_address_lacks_is_one_sentence(page):
    where = "/api/toy?world=moons&sampler=ddim&guidance=1&seed=0&steps="
    assert page.get(where + "20").status_code == 200
    for steps in "", "2.5":
        answer = page.get(where + steps)
        assert answer.status_code == 400 and answer.json()["note"].startswith(
            "steps: input should be a valid"
        )


def test_a_body_that_is_none_is_one_sentence(page):
    def note(body: str) -> str:
        kind = {"Content-Type": "application/json"}
        return page.post("/api/notes", content=body, headers=kind).json()["note"]

    said = [note(body) for body in ("{", '{"prompt": "a"}')]
    assert said == ["the body is no valid JSON", "model is missing"]


def test_notes_load_no_model(page, model, monkeypatch):
    monkeypatch.setattr("reifusion.in_memory.Models.pipe", lambda *_: pytest.fail("a model was loaded"))
    other = {"model": str(model) + "-other", "prompt": "a cat " * 90}
    assert page.post("/api/notes", json=other).json() == []


def test_old_drawings_are_forgotten(page):
    from reifusion.studio.routes import KEPT

    first, *_ = [draw(page)[-1]["id"] for _ in range(KEPT + 1)]
    assert "draw it again" in page.get(f"/api/drawings/{first}/0").json()["note"]


def test_a_picture_of_the_gallery_gives_its_settings_back(page, tmp_path):
    draw(page, settings={"hires": "1.5", "size": "64x64"})
    Image.new("RGB", (8, 8)).save(tmp_path / "from-elsewhere.png")
    (tmp_path / "of-a-file-that-is-gone.png").symlink_to(tmp_path / "gone.png")
    [one] = page.get("/api/pictures").json()
    taken = page.get(f"/api/pictures/{one['name']}").json()
    names = ("prompt", "negative", "steps", "size", "hires")
    assert [taken["settings"].get(name) for name in names] == ["a cat", "a dog", "2", "64x64", "1.5"]
    assert taken["said"].startswith("Settings of ") and "model_hash" in taken["facts"]
    own = Settings("a cat", code="mine.py", sampler="ddim", steps=2, cfg=3.0, seed=5, size=(64, 64))
    album.save(Image.new("RGB", (8, 8)), album.Entry(own, {"model": "0123456789"}), tmp_path / "x.png")
    taken = page.get("/api/pictures/x.png").json()
    assert "but without its mine.py" in taken["said"] and not {"code", "sampler"} & taken["settings"].keys()


def test_only_pictures_of_the_folder_are_served(page, tmp_path, model):
    (tmp_path / "secret.txt").write_text("x")
    for name in ("secret.txt", "..%2Fsecret.png", "%2Fetc%2Fpasswd"):
        assert page.get(f"/pictures/{name}").status_code in (400, 404)


def test_a_line_of_code_leads_to_its_file(page):
    html = page.get("/source/reifusion/model/guidance.py").text
    assert '<span id="L42"><b>  42</b> ' in html and "<script" not in html
    for name in ("reifusion/../pyproject.toml", "tests/conftest.py", "reifusion/data/mini.safetensors"):
        assert page.get(f"/source/{name}").status_code in (400, 404)


def test_another_model_brings_its_own_settings_and_what_it_knows(page, model):
    def last(name: str) -> dict[str, Any]:
        return json.loads(page.post("/api/model", json={"model": name}).text.splitlines()[-1])

    told = last(f" {model} ")
    assert told["note"] == "Loaded tiny, for pictures of 64x64." and told["known"] is None
    assert (told["usual"]["cfg"], told["usual"]["steps"]) == (7.5, 25) and "ddim" in told["samplers"]
    assert last("nowhere.safetensors")["failed"] and "nowhere" in last("nowhere.safetensors")["note"]
    assert len(last("mini")["known"]["subjects"]) == 934
    said = page.post("/api/notes", json={"model": "mini", "prompt": "un chat"}).json()
    assert said == ["The mini has never read these words: un, chat."]


def test_a_page_of_another_origin_and_another_name_of_this_machine_are_refused(page):
    elsewhere = {"Origin": "http://evil.example"}
    assert page.post("/api/draw", json={"settings": {}}, headers=elsewhere).status_code == 403
    assert page.get("/api/page", headers={"Host": "evil.example"}).status_code == 403
    assert page.get("/api/page", headers={"Origin": "http://["}).status_code == 403
    other = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}  # a picture in another page
    framed = other | {"Sec-Fetch-Mode": "navigate"}  # a frame there, or a link
    for headers in (other, framed):
        assert page.get("/api/page", headers=headers).status_code == 403
    assert page.get("/", headers=framed).status_code == 200


def test_no_address_makes_the_studio_load_a_model(page, model):
    assert page.get("/api/page?model=someone/else").json()["model"] == model


def test_the_page_is_whole_without_a_network(page):
    from reifusion.studio.routes import PAGE

    assert "text/html" in page.get("/").headers["content-type"]
    for path in PAGE.iterdir():
        content = page.get(f"/page/{path.name}").text
        assert content == path.read_text("utf-8") and "http://" not in content and "https://" not in content
