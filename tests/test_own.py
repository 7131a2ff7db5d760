"""Samplers of one's own: run from a file when the user gives it, and kept in the picture's metadata."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from reifusion import album
from reifusion.cli import main
from reifusion.model.samplers import SAMPLERS, EulerSampler
from reifusion.own import _defined, run_file
from reifusion.weights import save
from tests.tiny import SMALL, WORDS, random_networks

LATE = """
from reifusion.model.samplers import EulerSampler

class Late(EulerSampler):
    name = "late"

    def _spaced(self, n):
        return super()._spaced(n) // 2
"""


@pytest.fixture(autouse=True)
def only_the_built_in():
    before = dict(SAMPLERS)
    yield
    _defined.clear()
    for name in set(SAMPLERS) - set(before):
        del SAMPLERS[name]
    assert before == SAMPLERS


@pytest.fixture
def file(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "late.py"
    path.write_text(LATE)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("models") / "small.safetensors"
    save(SMALL, random_networks(SMALL), path, tokenizer=WORDS)
    return str(path)


def drawn(model: str, *arguments: str) -> int:
    return main(["generate", "cat", "--model", model, "--steps=3", "--seed=1", "--quiet", *arguments])


def test_a_file_with_a_sampler_is_run_and_may_be_run_again(file):
    assert run_file(file) == ["late"]
    kind = SAMPLERS["late"]
    assert issubclass(kind, EulerSampler) and kind.title == "late"
    file.write_text(LATE.replace('"late"', '"later"'))
    assert run_file("late.py") == ["later"]
    assert "late" not in SAMPLERS


def test_the_command_line_draws_with_it_and_the_picture_knows(file, model, capsys):
    assert drawn(model, "--code=late.py", "--sampler=late") == 0
    path = capsys.readouterr().out.strip()
    entry = album.read(path)
    assert (entry.settings.sampler, entry.settings.code) == ("late", "late.py")
    assert entry.hashes["code"] == album.file_hash(file)
    assert "Sampler: late" in Image.open(path).text["parameters"]  # type: ignore[attr-defined]
    assert drawn(model, "--sampler=euler") == 0
    assert Image.open(capsys.readouterr().out.strip()).tobytes() != Image.open(path).tobytes()
    assert "--code=late.py" in entry.settings.as_command() and "--sampler=late" in entry.settings.as_command()
    code = entry.settings.as_python()
    scope: dict = {}
    exec(code.replace("picture.save", "picture.copy() #"), scope)
    assert scope["picture"].tobytes() == Image.open(path).tobytes()


def test_a_file_that_only_a_picture_names_is_not_run(file, model, capsys):
    assert drawn(model, "--code=late.py", "--sampler=late", "--out=one.png") == 0
    file.write_text(f"open({str(file.parent / 'ran')!r}, 'w')\n{LATE}")
    _defined.clear()
    del SAMPLERS["late"]
    capsys.readouterr()
    assert main(["generate", "--like=one.png"]) == 2
    said = capsys.readouterr().err
    assert "drawn with the sampler 'late' of late.py; if you trust that file, give it with --code" in said
    assert main(["generate", "--like=one.png", "--sampler=ddim", "--quiet", "--out=two.png"]) == 0
    assert album.read("two.png").settings.code is None
    assert not os.path.exists("ran")
    assert main(["generate", "--like=one.png", "--code=late.py", "--quiet", "--out=three.png"]) == 0
    assert os.path.exists("ran")
    assert Image.open("three.png").tobytes() == Image.open("one.png").tobytes()


def test_a_picture_says_that_its_code_has_changed(file, model, capsys):
    assert drawn(model, "--code=late.py", "--sampler=late", "--out=one.png") == 0
    file.write_text(LATE.replace("// 2", "// 3"))
    now = album.Entry(album.read("one.png").settings, {"code": album.file_hash(file)})
    with pytest.warns(UserWarning, match=r"the code late\.py is not what it was"):
        album.warn_if_changed(album.read("one.png"), now, ["code"])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x = 1", "defines no sampler"),
        (LATE.replace('"late"', '"ddim"'), "defines a sampler ddim, a name that is taken"),
        ("x = 1\n1 / 0", "late.py, line 2: ZeroDivisionError: division by zero"),
        ("x = (\n", "late.py, line 1: SyntaxError"),
        ("import sys\nsys.exit(0)", "late.py, line 2: SystemExit: 0"),
        ("import nothing_of_that_name", "line 1: ModuleNotFoundError"),
        (None, "late.py cannot be read: No such file or directory"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_in_one_sentence(file, model, capsys, text, says):
    before = dict(SAMPLERS)
    file.unlink() if text is None else file.write_text(text)
    assert drawn(model, "--code=late.py", "--sampler=late") == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1
    assert before == SAMPLERS


def test_steps_of_ones_own_schedule_are_taken(file):
    run_file(file)
    sampler = SAMPLERS["late"](torch.Generator())
    sampler.set_inference_timesteps(4)
    assert sampler.timesteps.tolist() == [375, 250, 125, 0]
