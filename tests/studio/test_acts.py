"""What the parts of the page do, without a browser: each act says what changes."""

from __future__ import annotations

import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from reifusion import album
from reifusion.settings import Settings

gr = pytest.importorskip("gradio", reason="the studio needs: pip install reifusion[studio]")

WANTED: tuple[Any, ...] = ("a cat", "a dog", "ddim", 2, 3.0, 5, "64x64", None, 0.8)
ME: Any = SimpleNamespace(session_hash="me")


@pytest.fixture
def acts(model, tmp_path) -> Any:
    from reifusion.studio import drawing
    from reifusion.studio.acts import Acts, connect
    from reifusion.studio.layout import Parts

    with gr.Blocks() as blocks:
        parts = Parts(model, drawing.model(model).config, tmp_path)
        acts = Acts(parts, tmp_path)
        connect(blocks, parts, acts)
    return acts


def drawn(acts: Any, model: str) -> dict[Any, Any]:
    *_, last = acts.draw(ME, model, *WANTED)
    return last


def test_a_drawing_ends_with_the_picture_and_what_repeats_it(acts, model):
    parts, last = acts.parts, drawn(acts, model)
    assert "Done: " in last[parts.status] and "the picture" in last[parts.canvas]
    assert "--cfg=3.0" in shlex.split(last[parts.command]) and "cfg=3.0" in last[parts.python]
    [(path, caption)] = last[parts.strip]
    assert caption == "a cat: seed 5, DDIM, 2 steps, CFG 3" and album.read(path).settings.seed == 5
    assert "step 1 of 2" in acts.look(1, ME)[parts.canvas]


def test_wrong_fields_are_one_sentence(acts, model):
    [said] = acts.draw(ME, model, *WANTED[:-3], "big", None, 0.8)
    assert "a size is width x height" in said[acts.parts.status]


def test_a_picture_of_the_gallery_gives_its_settings_back(acts, model, tmp_path):
    parts = acts.parts
    drawn(acts, model)
    Image.new("RGB", (8, 8)).save(tmp_path / "from-elsewhere.png")
    [(path, _)] = acts.open_gallery(ME)
    taken = acts.take_from_shelf(SimpleNamespace(index=0), ME)
    assert [taken[part] for part in (parts.prompt, parts.negative, parts.steps, parts.size, parts.name)] == [
        "a cat", "a dog", 2, "64x64", model,
    ]  # fmt: skip
    assert f"Settings of {path}." in taken[parts.status] and "model_hash" in taken[parts.facts]
    settings = Settings("a cat", deepcache=2, sampler="ddim", steps=2, cfg=3.0, seed=5, size=(64, 64))
    acts.tabs["me"].strip = [album.save(Image.new("RGB", (8, 8)), entry_of(settings), tmp_path / "x.png")]
    taken = acts.take_from_strip(SimpleNamespace(index=0), ME)
    assert "but without its deepcache." in taken[parts.status]


def entry_of(settings: Settings) -> album.Entry:
    return album.Entry(settings, {"model": "0123456789"})


def test_another_model_brings_its_own_settings(acts, model):
    parts, said = acts.parts, acts.load(f" {model} ")
    assert "Loaded tiny" in said[parts.status] and (said[parts.cfg], said[parts.steps]) == (7.5, 25)
    assert "nowhere" in acts.load("nowhere.safetensors")[parts.status]


def test_pages_share_nothing(acts, model):
    drawn(acts, model)
    other: Any = SimpleNamespace(session_hash="you")
    assert acts.tabs["me"].drawing is not None and acts.tabs["you"].drawing is None
    assert "draw one first" in acts.reuse(other)[acts.parts.status]
    assert acts.reuse(ME)[acts.parts.editor]["background"].size == (64, 64)
    acts.close(ME)
    assert "me" not in acts.tabs


def test_a_change_draws_anew_only_if_told_to(acts, model):
    skipped = {"__type__": "update"}
    assert list(acts.change(True, ME, model, *WANTED)) == [{acts.parts.status: skipped}]  # not drawn yet
    drawn(acts, model)
    assert list(acts.change(False, ME, model, *WANTED[:-1], 0.5)) == [{acts.parts.status: skipped}]
    assert list(acts.change(True, ME, model, *WANTED)) == [{acts.parts.status: skipped}]
    *_, last = acts.change(True, ME, model, "a dog", *WANTED[1:])
    assert Path(last[acts.parts.strip][0][0]).name == "a-dog-5.png"
