"""`reifusion explain`: its files, its output, and one sentence with exit code 2 for wrong input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import reifusion
from reifusion import cli
from reifusion.explain import folder as folder_module
from reifusion.explain.guide import GUIDE

from .test_trace import Page


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(capsys):
    """Runs `reifusion explain`; returns exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = cli.main(["explain", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


@pytest.mark.slow
def test_a_prompt_gives_a_folder_with_everything_to_see(run, model):
    code, out, err = run("A cat on a rocket", "--model", model, "--steps", 2, "--seed", 3, "--pixel", "10,20")
    assert (code, err) == (0, "") and out.splitlines()[0] == "explain/a-cat-on-a-rocket-3/index.html"
    folder = Path("explain/a-cat-on-a-rocket-3")
    assert os.listdir("explain") == [folder.name]  # no half-built folder is left
    assert {path.name for path in folder.iterdir()} == {
        "index.html", "picture.png", "film-strip.png", "curves.png", "pixel.png", "trajectory.gif",
        "trajectory.json", "trajectory.safetensors", "words", "words.png", "words-by-step.png",
        "words-by-layer.png", "words-by-head.png", "words.json", "words.safetensors", "trace.html",
        "trace.json", "trace.txt",
    }  # fmt: skip
    page = Page((folder / "index.html").read_text("utf-8"))
    assert page.open == [] and all((folder / link).exists() for link in page.links)
    assert len(os.listdir(folder / "words")) == 5  # a, cat, on, a, rocket
    for name in ("film-strip", "words", "pixel"):
        with Image.open(folder / f"{name}.png") as picture:
            assert picture.info["Description"] and picture.info["Comment"].endswith(
                GUIDE[{"film-strip": "strip"}.get(name, name)]
            )

    # and a second time, beside it; the picture is the one that generate draws
    assert run("A cat on a rocket", "--model", model, "--steps", 2, "--seed", 3)[0] == 0
    assert sorted(os.listdir("explain")) == [folder.name, folder.name + "-2"]
    assert cli.main(["generate", "--like", str(folder / "picture.png"), "--out", "again.png"]) == 0
    assert Image.open("again.png").tobytes() == Image.open(folder / "picture.png").tobytes()


EXPERIMENTS = {
    "words": ["a cat", "--special"],
    "cfg": ["a cat", "--scales", "1,3"],
    "steps": ["a cat", "--counts", "1,2", "--samplers", "ddim"],
    "samplers": ["a cat", "--steps", 1],
    "seeds": ["a cat", "--to", 2, "--stops", 2],
    "prompts": ["a cat", "a dog", "--stops", 2],
    "swap": ["a cat", "--words", "a,cat", "--seeds", 1, "--steps", 1],
    "ablate": ["a cat", "--steps", 1],
    "latents": ["a cat"],
    "vae": [],
    "schedule": ["--steps", 3],
    "tokens": ["a cat"],
    "halves": ["--num", 1],
}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_gives_a_picture_and_says_what_to_look_for(run, model, name):
    arguments = list(EXPERIMENTS[name])
    if name not in ("vae", "schedule", "tokens", "steps", "samplers", "ablate"):
        arguments += ["--steps", 2]
    code, out, err = run(name, *arguments, "--model", model)
    assert (code, err) == (0, "")
    (path,) = Path("explain").iterdir()
    assert str(path) in out.splitlines() and path.name.startswith(name)
    guide = GUIDE[name]
    assert guide.split(".")[0] in " ".join(out.split())
    with Image.open(path) as picture:
        assert picture.info["Comment"].endswith(guide)
        assert picture.info["Title"] and picture.info["Description"]
        assert json.loads(picture.info["reifusion-explain"])


@pytest.mark.parametrize("by", [["step"], ["layer"], ["head", "--word", "cat"], ["pixel", "--pixel", "3,4"]])
def test_words_can_be_looked_at_in_other_ways(run, model, by):
    code, out, _ = run("words", "a cat", "--by", *by, "--steps", 1, "--model", model, "--quiet")
    assert code == 0 and out == f"explain/words-by-{by[0]}-a-cat-0.png\n"


def test_trace_prints_its_table(run, model):
    code, out, _ = run("trace", "a cat", "--model", model)
    assert code == 0 and "down.1.1.layers.0.cross_attention (CrossAttention)" in out
    assert out.splitlines()[-1] == "explain/trace-a-cat-0/trace.html"


def test_a_prompt_may_have_the_name_of_an_experiment(run, model):
    assert "explain/vae-0/index.html" in run("picture", "vae", "--model", model, "--steps", 1)[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a cat", "--steps", "0"], "the number of steps must be between 1 and 1000, not 0"),
        (["a cat", "--sampler", "magic"], "there is no sampler 'magic'"),
        (["a cat", "--pixel", "1"], "--pixel takes two whole numbers, x,y, not '1'"),
        (["a cat", "--size", "big"], "a size is width x height"),
        (["a cat", "--bogus"], "No such option"),
        (["cfg", "a cat", "--scales", "1,x"], "--scales takes numbers with commas between, not '1,x'"),
        (["steps", "a cat", "--counts", "1,2.5"], "--counts takes whole numbers"),
        (["steps", "a cat", "--samplers", "ddim,magic"], "there is no sampler 'magic'"),
        (["words", "a cat", "--by", "magic"], "--by is word, step, layer, head or pixel, not 'magic'"),
        (["words", "a cat", "--by", "pixel"], "--by pixel and --pixel x,y belong together"),
        (["prompts", "a cat"], "Missing argument"),
        (["vae", "nowhere.png"], "there is no picture at nowhere.png"),
        (["seeds", "a cat", "--stops", "1"], "--stops"),
    ],
)
def test_wrong_input_is_one_sentence_before_work_begins(run, here, arguments, words):
    code, out, err = run(*arguments)
    assert code == 2 and out == "" and words in err and err.count("\n") == 1
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a cat", "--pixel", "64,0"], "the pixel 64,0 is outside the picture of 64x64"),
        (["words", "a cat", "--word", "dog"], "the prompt has no word 'dog'; its words are a, cat"),
        (["seeds", "a cat", "--to", "0"], "a walk needs two seeds, not 0 twice"),
        (["cfg", "a cat", "--sampler", "flow"], "the sampler flow does not fit"),
    ],
)
def test_an_error_that_only_the_model_reveals_is_one_sentence_too(run, here, model, arguments, words):
    code, out, err = run(*arguments, "--model", model, "--steps", 1)
    assert code == 2 and out == "" and words in err and err.count("\n") == 1
    assert list(here.iterdir()) == []


def test_a_failure_half_way_leaves_nothing(run, here, model, monkeypatch):
    def fail(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(folder_module, "page", fail)
    assert run("a cat", "--model", model, "--steps", 1) == (1, "", "reifusion: the disk is full\n")
    assert list(here.iterdir()) == []


def test_help_is_instant_and_names_every_experiment():
    code = "import sys; from reifusion.cli import main; main(['explain', '--help'])"
    code += "; assert not {'torch', 'matplotlib', 'numpy'} & set(sys.modules)"
    env = os.environ | {"PYTHONPATH": str(Path(reifusion.__file__).parents[1]), "COLUMNS": "200"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert all(name in done.stdout for name in (*EXPERIMENTS, "picture", "trace"))


def test_without_matplotlib_it_says_what_to_install(run, model, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = run("tokens", "a cat", "--model", model)
    assert code == 2 and 'pip install "reifusion[explain]"' in err
