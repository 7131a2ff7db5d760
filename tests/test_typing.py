"""Types for users: a script of theirs under `mypy --strict`, with what must pass and what must not."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import reifusion
from reifusion.model.ask import FIRST_WORDS
from reifusion.model.asked import Asked, Rest, Several
from reifusion.model.request import Request

SCRIPT = """
from typing import Any

import reifusion
from PIL import Image
from reifusion.model.pipeline import Step, StableDiffusion, Turn
from torch import Tensor
from typing_extensions import assert_type

Either = Image.Image | list[Image.Image]

pipe = reifusion.load("mini", dtype="fp32")
assert_type(pipe, StableDiffusion)
assert_type(reifusion.generate("a cat"), Image.Image)
assert_type(reifusion.generate("a cat", "a dog", None, 0.5, True, 4.0, "ddim", 10), Image.Image)
assert_type(reifusion.generate(["a cat"], seed=1, deepcache=2), list[Image.Image])
assert_type(reifusion.generate("a cat", num_images=4, noise=None, size=(128, 64)), Either)
assert_type(pipe.generate("a cat", steps=3, seed=1, sampler="ddim", callback=print), Image.Image)
assert_type(pipe.generate(["a cat", "a dog"], ["a hat", ""], cfg=3), list[Image.Image])
assert_type(pipe.generate("a cat", num=2), Either)
pipe.generate("a cat").save("cat.png")
for picture in pipe.generate(["a cat"]):
    picture.save("cat.png")


def guide(cond: Tensor, uncond: Tensor | None, turn: Turn) -> Tensor:
    return cond if uncond is None else uncond + 2 * (cond - uncond)


steps = pipe.denoise("a cat", guide=guide, grad=True, latents=None, start=0, n_inference_steps=4)
for step in steps:
    assert_type(step, Step)
    assert_type(step.x0, Tensor)
    steps.send(step.latents * 0.9)

pipe.generate("a cat", stepz=3)  # wrong
pipe.generate("a cat", steps="three")  # wrong
pipe.generate("a cat", num=2).save("cat.png")  # wrong
pipe.generate(["a cat"]).save("cat.png")  # wrong
reifusion.generate("a cat", strength="much")  # wrong
reifusion.load(3)  # wrong
pipe.denoise("a cat", guide=print, seed=1.5)  # wrong
"""


@pytest.mark.slow
def test_a_clients_script_passes_mypy_strict_and_its_mistakes_do_not(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    # What PyTorch and NumPy contain is not the question, and takes mypy half a minute.
    options = "[mypy]\nstrict = True\n[mypy-torch.*,numpy.*]\nfollow_imports = skip\n"
    (tmp_path / "mypy.ini").write_text(options)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", script.name],
        cwd=tmp_path, capture_output=True, text=True,
        env={"MYPYPATH": str(Path(reifusion.__file__).parents[1]), "PATH": ""},
    )  # fmt: skip
    complaints = {int(line) for line in re.findall(r"^script\.py:(\d+): error", done.stdout, re.M)}
    wrong = {i for i, line in enumerate(SCRIPT.splitlines(), 1) if line.endswith("# wrong")}
    assert complaints == wrong, done.stdout
    assert "reifusion/" not in done.stdout


@pytest.mark.parametrize("kind", [Rest, Asked, Several])
def test_the_types_of_settings_are_those_of_a_request(kind):
    known = {one.name: one.type for one in dataclasses.fields(Request) if one.init}
    sides: dict[str, Any] = {"width": "int | None", "height": "int | None", "do_cfg": "bool"}
    for name, said in kind.__annotations__.items():
        said = getattr(said, "__forward_arg__", said)
        expected = {**known, **sides}[FIRST_WORDS.get(name, name)]
        assert said in (expected, f"{expected} | None"), name


def test_no_setting_of_a_request_is_without_a_type():
    named = {FIRST_WORDS.get(name, name) for name in Several.__annotations__}
    assert {one.name for one in dataclasses.fields(Request) if one.init} <= named | {"prompt"}
