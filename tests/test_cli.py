"""The command line: its pictures, its output, and one sentence with exit code 2 for wrong input."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import reifusion
from reifusion import api, cli
from reifusion.model import pipeline, samplers
from reifusion.model.config import CLIPConfig, ModelConfig, UNetConfig, VAEConfig
from reifusion.model.tokenizer import Tokenizer
from reifusion.settings import sampler_names
from reifusion.weights import save
from tests.tiny import networks

TINY = ModelConfig(
    name="tiny",
    size=64,
    clip=CLIPConfig(width=16, layers=2, heads=2),
    vae=VAEConfig(channels=(8, 8, 8, 8), layers=1, groups=4),
    unet=UNetConfig(channels=(16, 32), attention=(1, 0), layers=1, heads=(2, 2), context_width=16, groups=8),
)


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    """Writes the file of a tiny model with random weights."""
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    save(TINY, networks(TINY), path, tokenizer=Tokenizer())
    return str(path)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(capsys):
    """Runs the command line; returns exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = cli.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def draw(run, model):
    """Draws, and returns the printed paths."""

    def draw(*arguments: object) -> list[Path]:
        code, out, err = run("generate", "--model", model, "--steps", 2, *arguments)
        assert (code, err) == (0, "")
        return [Path(line) for line in out.splitlines()]

    return draw


def pixels(path: Path) -> np.ndarray:
    return np.array(Image.open(path))


def settings(path: Path) -> dict:
    return json.loads(Image.open(path).info["reifusion"])


# Drawing


def test_a_picture_is_drawn_and_its_place_is_printed(draw, here):
    (path,) = draw("A cat, stretching!", "--seed", 7)
    assert path == Path("images/a-cat-stretching-7.png")
    assert Image.open(path).size == (64, 64)
    assert os.listdir("images") == [path.name]  # no temporary file is left


def test_nothing_is_overwritten(draw):
    paths = [draw("a cat", "--seed", 7)[0] for _ in range(3)]
    assert [path.name for path in paths] == ["a-cat-7.png", "a-cat-7-2.png", "a-cat-7-3.png"]
    Path("out.png").write_text("mine")
    assert draw("a cat", "--out", "out.png") == [Path("out-2.png")]
    assert Path("out.png").read_text() == "mine"


def test_num_counts_seeds_up_and_changes_no_picture(draw):
    several = draw("a cat", "--seed", 3, "--num", 3)
    assert [settings(path)["seed"] for path in several] == [3, 4, 5]
    assert np.array_equal(pixels(several[2]), pixels(*draw("a cat", "--seed", 5)))


def test_out_is_a_file_or_a_folder(draw):
    assert draw("a cat", "--out", "a/b/cat.png") == [Path("a/b/cat.png")]
    assert draw("a cat", "--seed", 1, "--out", "c/") == [Path("c/a-cat-1.png")]
    assert draw("a cat", "--seed", 1, "--out", "d") == [Path("d/a-cat-1.png")]
    assert draw("a cat", "--num", 2, "--out", "two.png") == [Path("two.png"), Path("two-2.png")]


def test_any_prompt_makes_a_file_name(draw):
    names = {"": "picture", "../../x": "x", "日本": "日本", "a " * 40: "a-" * 24 + "a", "!": "picture"}
    for seed, (prompt, name) in enumerate(names.items()):
        assert draw(prompt, "--seed", seed) == [Path(f"images/{name}-{seed}.png")]


def test_a_prompt_that_is_not_utf_8_is_drawn(draw, run):
    (path,) = draw("caf\udce9", "--seed", 0)
    assert path.name == "caf-0.png"
    assert run("generate", "--like", path)[0] == 0


@pytest.mark.parametrize(
    ("encoding", "place"), [("ascii", b"caf?"), ("cp1252", b"caf?"), ("utf-8", b"caf\xe9")]
)
def test_what_an_encoding_lacks_is_printed_all_the_same(model, monkeypatch, encoding, place):
    out = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", out)
    assert cli.main(["samplers"]) == 0  # which has Greek letters
    asked = ["--model", model, "--steps", "1", "--seed", "0", "--out", "caf\udce9"]
    assert cli.main(["generate", "a cat", *asked]) == 0
    out.flush()
    assert out.buffer.getvalue().splitlines()[-1] == place + b"/a-cat-0.png"


def test_size_sampler_and_the_rest_reach_the_picture(draw):
    flags = ["--negative", "dog", "--sampler", "euler_a", "--cfg", 3, "--size", "72x40", "--clip-skip", 1]
    (path,) = draw("a cat", "--seed", 5, *flags, "--dtype", "fp32")
    assert Image.open(path).size == (72, 40)
    kept = settings(path)
    assert kept["negative"] == "dog"
    assert kept["sampler"] == "euler_a"
    assert kept["cfg"] == 3
    assert kept["size"] == [72, 40]
    assert kept["clip_skip"] == 1
    assert kept["dtype"] == "float32"
    assert kept["model_name"] == "tiny"
    assert re.fullmatch("[0-9a-f]{10}", kept["model_hash"])


def test_other_programs_find_the_settings_where_they_look(draw):
    (path,) = draw("a cät\non a mat", "--negative", "a dog", "--seed", 5)
    lines = Image.open(path).info["parameters"].splitlines()
    assert lines[:3] == ["a cät", "on a mat", "Negative prompt: a dog"]
    assert (
        "Steps: 2, Sampler: DPM++ 2M Karras, CFG scale: 7.5, Seed: 5, Size: 64x64, Model hash: " in lines[3]
    )


def test_an_input_image_and_a_mask(draw):
    Image.effect_noise((64, 64), 50).convert("RGB").save("photo.png")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    mask.save("mask.png")
    (path,) = draw("a cat", "--init-image", "photo.png", "--mask", "mask.png", "--strength", 1)
    assert np.array_equal(pixels(path)[:, 32:], pixels(Path("photo.png"))[:, 32:])
    assert not np.array_equal(pixels(path)[:, :32], pixels(Path("photo.png"))[:, :32])


# Repeating


def test_like_repeats_a_picture_bit_by_bit(draw, run):
    (first, second) = draw("a cat", "--negative", "dog", "--sampler", "ddpm", "--cfg", 4, "--num", 2)
    for path in (first, second):
        code, out, err = run("generate", "--like", path)
        assert (code, err) == (0, "")
        assert np.array_equal(pixels(Path(out.strip())), pixels(path))
        assert settings(Path(out.strip())) == settings(path)


def test_like_repeats_pictures_made_from_pictures(draw, run):
    Image.effect_noise((90, 64), 50).save("photo.png")
    (path,) = draw("a cat", "--init-image", "photo.png", "--strength", 0.5)
    code, out, err = run("generate", "--like", path)
    assert (code, err) == (0, "")
    assert np.array_equal(pixels(Path(out.strip())), pixels(path))


def test_a_picture_of_an_earlier_version_is_repeated(run, model):
    carried = {"prompt": "a cat", "model": model, "sampler": "ddim", "steps": 2, "cfg": 3, "seed": 5}
    carried |= {"size": [64, 64], "guidance_interval": "0.3:5", "tome": 0.5, "int8": False}
    chunks = PngInfo()
    chunks.add_text("reifusion", json.dumps(carried))
    Image.new("RGB", (8, 8)).save("old.png", pnginfo=chunks)
    code, out, err = run("generate", "--like", "old.png")
    assert (code, err) == (0, "")
    kept = settings(Path(out.strip()))
    assert kept["guidance_interval"] == [0.3, 5] and "tome" not in kept
    assert all(kept[name] == carried[name] for name in ("prompt", "sampler", "steps", "cfg", "seed", "size"))


def test_flags_override_what_is_repeated(draw, run):
    (path,) = draw("a cat", "--sampler", "ddim", "--seed", 4)
    code, out, _ = run("generate", "a dog", "--like", path, "--steps", 3)
    kept = settings(Path(out.strip()))
    assert code == 0
    assert (kept["prompt"], kept["steps"], kept["sampler"], kept["seed"]) == ("a dog", 3, "ddim", 4)


def test_like_says_when_the_input_image_has_changed(draw, run):
    Image.new("RGB", (64, 64), "red").save("photo.png")
    (path,) = draw("a cat", "--init-image", "photo.png")
    Image.new("RGB", (64, 64), "blue").save("photo.png")
    code, _, err = run("generate", "--like", path)
    assert code == 0
    assert err == "reifusion: the init image photo.png is not what it was, so the picture will differ\n"


@pytest.mark.slow
def test_python_and_the_command_line_draw_the_same_picture(run):
    picture = reifusion.generate("a red apple", seed=3, progress=False)
    code, out, err = run("generate", "a red apple", "--seed", 3)
    assert (code, err) == (0, "")
    assert np.array_equal(pixels(Path(out.strip())), np.array(picture))


# Looking and converting


def test_info_says_what_a_model_is(run, model):
    code, out, _ = run("info", model)
    assert code == 0
    for fact in ("native", "tiny", "64x64", "float32", "49,408", "epsilon"):
        assert fact in out


def test_info_says_how_a_picture_was_made(draw, run):
    (path,) = draw("a cat", "--seed", 12)
    code, out, _ = run("info", path)
    assert code == 0
    assert re.search(r"^prompt +a cat$", out, re.MULTILINE)
    assert re.search(r"^seed +12$", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("to", "name"), [("native", "x.safetensors"), ("compvis", "x.safetensors"), ("diffusers", "x")]
)
def test_a_converted_model_draws_the_same_picture(draw, run, model, to, name):
    assert run("convert", model, name, "--to", to) == (0, f"{name}\n", "")
    (first,) = draw("a cat", "--seed", 1)
    (second,) = draw("a cat", "--seed", 1, "--model", name)
    assert np.array_equal(pixels(first), pixels(second))


def test_train_passes_everything_on(run, monkeypatch):
    seen = []

    def train(arguments: list[str]) -> int:
        seen.append(arguments)
        return 1

    monkeypatch.setattr("reifusion.train.__main__.main", train)
    assert run("train", "mini", "--help", "--steps", 3, "-x")[0] == 1
    assert seen == [["mini", "--help", "--steps", "3", "-x"]]


# Wrong input


def wrong(run, *arguments: object) -> str:
    """Runs a command that must be refused without a traceback, and returns the one sentence that it says."""
    before = sorted(Path().rglob("*"))
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert re.fullmatch(r"reifusion: [^\n]+\n", err), err
    assert "Traceback" not in err
    assert sorted(Path().rglob("*")) == before
    return err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate"], "say what to draw"),
        (["generate", "a cat", "--sampler", "magic"], "there are ddpm, "),
        (["generate", "a cat", "--steps", "0"], "between 1 and 1000"),
        (["generate", "a cat", "--steps", "1001"], "between 1 and 1000"),
        (["generate", "a cat", "--steps", "many"], "--steps"),
        (["generate", "a cat", "--strength", "0"], "strength"),
        (["generate", "a cat", "--strength", "2"], "strength"),
        (["generate", "a cat", "--cfg", "nan"], "finite"),
        (["generate", "a cat", "--cfg", "inf"], "finite"),
        (["generate", "a cat", "--num", "0"], "number of images"),
        (["generate", "a cat", "--num", "-1"], "number of images"),
        (["generate", "a cat", "--seed", "-1"], "seed"),
        (["generate", "a cat", "--seed", "x"], "--seed"),
        (["generate", "a cat", "--seed", str(2**63)], "seed"),
        (["generate", "a cat", "--seed", str(2**63 - 1), "--num", "2"], "seed"),
        (["generate", "a cat", "--variation=.5", f"--variation-seed={2**63 - 1}", "--num=2"], "picture 2"),
        (["generate", "a cat", "--clip-skip", "99"], "clip_skip"),
        (["generate", "a cat", "--size", "big"], "512x768"),
        (["generate", "a cat", "--size", "100x100"], "multiple of 8"),
        (["generate", "a cat", "--size", "0x64"], "width"),
        (["generate", "a cat", "--dtype", "int4"], "bf16"),
        (["generate", "a cat", "--device", "toaster"], "cpu"),
        (["generate", "a cat", "--init-image", "missing.png"], "no picture at missing.png"),
        (["generate", "a cat", "--init-image", "."], "cannot be read"),
        (["generate", "a cat", "--mask", "missing.png"], "missing.png"),
        (["generate", "--like", "missing.png"], "missing.png"),
        (["generate", "a cat", "--out", "cat.jpg"], ".png"),
        (["generate", "a cat", "--out", f"{'a' * 300}.png"], "too long"),
        (["generate", "a cat", "--init-image", "a" * 300], "too long"),
        (["generate", "a cat", "--lora", f"{'a' * 300}:0.5"], "no file or folder"),
        (["generate", "a cat", "--embedding", f"{'a' * 300}:x"], "no file or folder"),
        (["edges", "missing.png", "--out", f"{'a' * 300}.png"], "the name aaaaaaaaaaaaaaaaaaaa… is too long"),
        (["generate", "a cat", "--out", "/proc/nothing/cat.png"], "cannot write"),
        (["generate", "a cat", "--colour", "red"], "--colour"),
        (["generate", "a cat", "a dog"], "a dog"),
        (["paint", "a cat"], "paint"),
        (["info"], "FILE"),
        (["info", "missing.safetensors"], "missing.safetensors"),
        (["info", "missing.png"], "missing.png"),
        (["convert", "missing.safetensors", "x", "--to", "diffusers"], "missing.safetensors"),
        (["convert", "missing.safetensors", "x.safetensors"], "--to"),
        (["convert", "missing.safetensors", "x.safetensors", "--to", "gguf"], "native, compvis, diffusers"),
        (["convert", "missing.safetensors", "x.ckpt", "--to", "compvis"], ".safetensors"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_code_2(run, model, arguments, says):
    if arguments[0] == "generate":
        arguments = ["generate", "--model", model, *arguments[1:]]
    assert says.lower() in wrong(run, *arguments).lower()


def test_a_file_that_is_no_model_is_refused(run, model):
    whole = Path(model).read_bytes()
    Path("empty.safetensors").touch()
    Path("cut.safetensors").write_bytes(whole[: len(whole) // 2])
    Path("noise.ckpt").write_bytes(os.urandom(1000))
    Path("text.safetensors").write_text("hello")
    torch.save({"state_dict": {"x": torch.ones(1)}}, "other.ckpt")
    torch.save({"state_dict": os.system}, "code.ckpt")
    for name in ["missing.ckpt", "empty.safetensors", "cut.safetensors", "noise.ckpt", "text.safetensors"]:
        assert name in wrong(run, "generate", "a cat", "--model", name)
    for name in ["other.ckpt", "code.ckpt", "."]:
        wrong(run, "generate", "a cat", "--model", name)


def test_a_broken_picture_is_refused(run, model):
    Image.effect_noise((64, 64), 50).save("whole.png")
    Path("cut.png").write_bytes(Path("whole.png").read_bytes()[:1000])
    Path("text.png").write_text("hello")
    for name in ("cut.png", "text.png"):
        assert name in wrong(run, "generate", "a cat", "--model", model, "--init-image", name)
    assert "no settings" in wrong(run, "generate", "--model", model, "--like", "whole.png")


@pytest.mark.parametrize(
    "carried",
    ["{", "[]", "7", '{"prompt": ["a"]}', '{"prompt": "a", "steps": "x"}', '{"prompt": "a", "size": [1]}'],
)
def test_a_picture_with_odd_settings_is_refused(run, model, carried):
    chunks = PngInfo()
    chunks.add_text("reifusion", carried)
    Image.new("RGB", (8, 8)).save("odd.png", pnginfo=chunks)
    wrong(run, "generate", "--model", model, "--like", "odd.png")


def test_an_unwritable_output_is_found_before_the_work_starts(run, model, monkeypatch):
    monkeypatch.setattr(api, "load", lambda *_: pytest.fail("the work has started"))
    Path("file").touch()
    for out in ("file/cat.png", "file", "/proc/x"):
        assert "cannot write" in wrong(run, "generate", "a cat", "--model", model, "--out", out)


def test_convert_overwrites_nothing(run, model):
    Path("x.safetensors").write_text("mine")
    wrong(run, "convert", model, "x.safetensors", "--to", "compvis")
    assert Path("x.safetensors").read_text() == "mine"


# Failures


def test_a_failure_of_the_work_is_exit_code_1_and_leaves_nothing(run, model, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("the roof is on fire\nwe do not need no water")

    monkeypatch.setattr(pipeline.StableDiffusion, "generate", fail)
    assert run("generate", "a cat", "--model", model) == (1, "", "reifusion: the roof is on fire\n")
    assert not list(Path().iterdir())
    monkeypatch.setenv("REIFUSION_DEBUG", "1")
    assert "Traceback" in run("generate", "a cat", "--model", model)[2]


def test_a_full_disk_leaves_nothing_half_written(run, model, monkeypatch):
    def full(self, path, **_):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    code, out, err = run("generate", "a cat", "--model", model, "--steps", 1)
    assert (code, out) == (1, "")
    assert "No space left" in err
    assert not list(Path().rglob("*"))


def test_running_out_of_memory_is_told_in_plain_words(run, model, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:120] err == 0. DefaultCPUAllocator: can't allocate memory"
        )

    monkeypatch.setattr(pipeline.StableDiffusion, "generate", fail)
    assert run("generate", "a cat", "--model", model)[::2] == (
        1,
        "reifusion: out of memory; try a smaller --size\n",
    )


# As a program


def start(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "reifusion", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what `&` has switched off
        env=os.environ | {"PYTHONPATH": str(Path(reifusion.__file__).parents[1])},  # installed or not
    )


def program(*arguments: str) -> tuple[int, str, str]:
    """Runs the program as a process of its own; returns exit code, stdout and stderr."""
    process = start(*arguments)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.mark.slow
def test_the_program_draws(model):
    arguments = ["generate", "a cat", "--model", model, "--steps", "1", "--seed", "1"]
    assert program(*arguments) == (0, "images/a-cat-1.png\n", "")
    assert program(*arguments, "--quiet") == (0, "images/a-cat-1-2.png\n", "")


@pytest.mark.slow
def test_the_program_refuses_with_exit_code_2():
    code, out, err = program("generate", "a cat", "--model", "missing.ckpt")
    assert (code, out) == (2, "")
    assert re.fullmatch(r"reifusion: [^\n]*missing\.ckpt[^\n]*\n", err)


@pytest.mark.slow
def test_ctrl_c_is_exit_code_130_without_a_traceback(model):
    process = start("generate", "a cat", "--model", model, "--steps", "1000")
    while not Path("images").exists():  # until it begins
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=120) == ("", "reifusion: stopped\n")
    # If the signal met Python within an exec of a string (in an import, say), Python itself ends by that
    # signal even though the interrupt was caught; a shell shows 130 for it all the same.
    assert process.returncode in (130, -signal.SIGINT)
    assert not Path("images").exists()


def test_version_and_help():
    assert program("--version") == (0, f"reifusion {reifusion.__version__}\n", "")
    for arguments in ([], ["--help"]):
        code, out, err = program(*arguments)
        assert (code, err) == (0, "")
        assert "generate" in out


def test_the_help_knows_every_sampler():
    assert sorted(sampler_names()) == sorted(samplers.SAMPLERS)
