"""Settings survive the shell, Python and a picture's metadata; an album notices what has changed."""

from __future__ import annotations

import json
import shlex
import string
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from typer.main import get_command

from reifusion import album
from reifusion.cli.main import app
from reifusion.model.request import Request
from reifusion.settings import ABOUT, BY_SETTINGS, Settings, from_carried, of_request, parsed, requested

SETTINGS = Settings("", sampler="ddim", steps=3, cfg=7.5, seed=1, size=(64, 64), dtype="float32")
OTHERS = Settings(
    "a cat", "a dog", "x.safetensors", (("zork.safetensors", 0.5), ("blot.safetensors", -1.0, "MIDD")),
    (("blob.pt", "blob"), ("e.bin", "")), "euler_a", 3, 2.5, 7, (64, 96), "photo.png", "mask.png", 0.7, 1,
    (0.3, 5.0), 0.25, 1.2, 2, True, True, "float32", "v.pt", "u.pt", "r.pt", "v_prediction", "late.py",
    2.0, 0.25, "latent", "a1111", "karras", 0.5, 1.1, 4.0,
    (("net.safetensors", "edges.png", 0.5, 0.0, 0.75),), "guess",
    (("ip.bin", "cat.png", 0.5),), "encoder", "comfyui", "philox", 0.5, 9, 31337, 4.0, 32,
    (0, 64, 128, 0), True,
)  # fmt: skip
NOT_BY_NAME = (
    "prompt", "model", "lora", "embedding", "code", "deepcache", "int8", "fp8", "refiner", "emphasis",
    "control", "control_mode", "ip_adapter", "image_encoder",
)  # fmt: skip


@given(st.text(string.printable + "é“💡", max_size=30), st.floats(-1e6, 1e6))
def test_any_text_and_number_survive_the_shell_and_python(text, cfg):
    settings = replace(SETTINGS, prompt=text, negative=text, cfg=cfg)
    words = shlex.split(settings.as_command())
    assert words[-2:] == ["--", text] and f"--cfg={cfg}" in words
    assert (f"--negative={text}" in words) == (text != "")
    compile(settings.as_python(), "copied", "exec")
    assert repr(text) in settings.as_python() and f"cfg={cfg!r}" in settings.as_python()


def test_strength_is_said_only_where_it_counts():
    assert "strength" not in SETTINGS.as_command() + SETTINGS.as_python()
    begun = replace(SETTINGS, init_image="a b.png")
    assert "--strength=0.8" in begun.as_command() and "'--init-image=a b.png'" in begun.as_command()
    assert "strength=0.8" in begun.as_python() and "init_image='a b.png'" in begun.as_python()


def test_every_setting_is_said_in_the_shell_in_python_and_in_metadata():
    command, carried = OTHERS.as_command(), OTHERS.carried()
    usual = {name: ABOUT[name].default for name in BY_SETTINGS}
    python = replace(OTHERS, **usual).as_python()
    compile(python, "copied", "exec")
    for name, about in ABOUT.items():
        assert getattr(OTHERS, name) != about.default
        assert name == "prompt" or f"--{name.replace('_', '-')}" in command
        assert name in carried
        assert f"{name}=" in python or name in (*NOT_BY_NAME, *BY_SETTINGS)
    whole: dict[str, Any] = {}
    said = OTHERS.as_python()
    assert said.index("run_file('late.py')") < said.index("settings = ")
    exec(said.partition("pipe =")[0].replace("run_file('late.py')", ""), whole)  # the settings themselves
    assert whole["settings"] == OTHERS
    assert "teach(pipe, load_embedding(find('blob.pt'), 'blob'))" in python
    assert "refiner = reifusion.load('r.pt', dtype='float32')" in python
    assert python.index("quantize(refiner)") < python.index("with_refiner(pipe, refiner)")
    net = "load_control(find('net.safetensors', \"control\"), pipe)"
    assert f"    Control({net}, 'edges.png', 0.5, 0.0, 0.75, 'guess')," in python
    assert "--control=net.safetensors=edges.png:0.5:0.0-0.75" in command
    adapter = "*load_ip_adapter(find_adapter('ip.bin'), pipe, 'encoder')"
    assert f"    ImagePrompt({adapter}, 'cat.png', 0.5)," in python
    assert "--ip-adapter=ip.bin=cat.png:0.5" in command
    blot = "attach(pipe, 'blot.safetensors', -1.0, blocks='MIDD')"
    assert "--lora=blot.safetensors:-1.0:lbw=MIDD" in command and blot in python
    assert "deepcached(pipe, 2)" in python and "attach(pipe, 'zork.safetensors', 0.5)" in python


@pytest.mark.parametrize("weight", [1e-05, -0.5, 1e22])
def test_every_weight_that_is_written_is_read(weight):
    for name, value in (
        ("control", ("net", "hint.png", weight, 1e-05, 0.5)),
        ("ip_adapter", ("adapter", "x.png", weight)),
    ):
        about = ABOUT[name]
        assert about.read(about.write(value)) == value


def test_every_flag_that_is_said_exists():
    group: Any = get_command(app)
    known = {flag for option in group.commands["generate"].params for flag in option.opts}
    said = {word.partition("=")[0] for word in shlex.split(OTHERS.as_command()) if word.startswith("--")}
    assert said - {"--"} <= known and len(said) == len(ABOUT)


def test_what_a_picture_carries_is_read_back():
    assert from_carried(json.loads(json.dumps(OTHERS.carried()))) == OTHERS
    assert from_carried(json.loads(json.dumps(SETTINGS.carried()))) == SETTINGS
    assert from_carried({"prompt": "a", "tome": 0.5, "steps": None}) == Settings("a")


@pytest.mark.parametrize(
    "name", [name for name in ABOUT if name not in ("lora", "embedding", "control", "ip_adapter")]
)
def test_a_value_of_the_wrong_type_is_named(name):
    with pytest.raises(ValueError, match=f"its {name} is"):
        from_carried({name: {"odd": 1}})


def test_what_the_shell_is_told_is_what_was_meant():
    texts: dict[str, Any] = {"size": "64x96", "guidance_interval": "0.3:5.0", "steps": 3}
    assert parsed(texts) == {"size": (64, 96), "guidance_interval": (0.3, 5.0), "steps": 3}
    for name in ("size", "guidance_interval"):
        assert ABOUT[name].write(parsed(texts)[name]) == texts[name]


def test_settings_and_requests_speak_the_same_words():
    only_requests = {"num", "source", "noise", "latents", "start", "guide"}
    derived = {"prompts", "negatives", "seeds"}
    asked = {one.name for one in fields(Request)} - derived - only_requests
    assert set(requested()) == asked
    assert Settings().filled(SETTINGS.request()) == replace(SETTINGS, dtype=None)
    assert "init_image" not in of_request(SETTINGS.request())


# The album


def test_an_input_picture_is_kept_once_and_bit_by_bit(tmp_path):
    picture = Image.effect_noise((64, 64), 50).convert("RGB")
    path = album.keep(picture, tmp_path)
    assert album.keep(picture, tmp_path) == path and [str(one) for one in tmp_path.iterdir()] == [path]
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(picture))


def test_an_entry_comes_back_and_nothing_is_overwritten(tmp_path):
    entry = album.Entry(SETTINGS, {"model": "0123456789"}, "tiny")
    paths = [album.save(Image.new("RGB", (8, 8)), entry, tmp_path / "a.png") for _ in range(2)]
    assert [path.name for path in paths] == ["a.png", "a-2.png"]
    assert album.read(paths[1]) == entry


def test_a_file_that_has_changed_is_noticed_and_one_that_nobody_hashed_is_not():
    before, now = (album.Entry(OTHERS, {"lora": [digest], "mask": digest}) for digest in ("one", "two"))
    with pytest.warns(UserWarning) as told:
        album.warn_if_changed(before, now)
    assert sorted(str(one.message) for one in told) == [
        "the LoRA zork.safetensors or blot.safetensors is not what it was, so the picture will differ",
        "the mask mask.png is not what it was, so the picture will differ",
    ]
    album.warn_if_changed(before, now, ["model", "init_image"])
    album.warn_if_changed(album.Entry(OTHERS, {}), now)


@pytest.mark.parametrize("hashes", [{"model_hash": 7}, {"lora_hash": "x"}])
def test_odd_hashes_are_refused(hashes, tmp_path):
    chunks = PngInfo()
    chunks.add_text("reifusion", json.dumps({"prompt": "a cat", **hashes}))
    Image.new("RGB", (8, 8)).save(tmp_path / "odd.png", pnginfo=chunks)
    with pytest.raises(ValueError, match=f"its {next(iter(hashes))} is"):
        album.read(tmp_path / "odd.png")
