"""The second pass at a larger size: image-to-image of the enlarged first picture, or of its latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from reifusion.album import read
from reifusion.cli.main import main
from reifusion.model.pipeline import StableDiffusion
from reifusion.steer import hires
from reifusion.weights import save
from tests.tiny import SMALL, WORDS, networks

ASKED: dict[str, Any] = {"steps": 4, "cfg": 2.0, "seed": 5, "progress": False}


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion:
    return StableDiffusion(SMALL, WORDS, networks(SMALL, noise=0.02))


def test_the_second_pass_is_image_to_image_of_the_enlarged_picture(pipe):
    first = pipe.generate("a cat", size=(32, 48), **ASKED)
    enlarged = first.resize((64, 96), Image.Resampling.LANCZOS)
    expected = pipe.generate("a cat", init_image=enlarged, size=(64, 96), strength=0.5, **ASKED)
    (found,) = hires.generate(pipe, "a cat", 2.0, 0.5, size=(32, 48), **ASKED)
    assert found.size == (64, 96) and found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp_2m"])
def test_latents_are_enlarged_and_noised_to_where_the_second_pass_begins(pipe, sampler):
    seen: list[Any] = []

    def look(self, *given, **more):
        for step in real(self, *given, **more):
            seen.append(step)
            yield step

    real = StableDiffusion.denoise
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StableDiffusion, "denoise", look)
        (found,) = hires.generate(pipe, "a cat", 2.0, 0.5, "latent", sampler=sampler, size=(32, 32), **ASKED)
    assert found.size == (64, 64)
    first, second = seen[:4], seen[4:]
    assert [step.t for step in second] == [step.t for step in first[2:]]  # the last half of the same steps
    small, begun = first[-1].latents, second[0]
    wide = torch.nn.functional.interpolate(small, (32, 32), mode="bicubic", antialias=True)
    signal, noise = begun.sampler.predict(begun.t, begun.x_t, torch.zeros_like(wide))[0], begun.x_t
    assert signal.shape == noise.shape == wide.shape
    # What was put in is still in it: more like the enlarged latents than like chance.
    alike = torch.corrcoef(torch.stack([begun.x_t.flatten(), wide.flatten()]))[0, 1]
    assert alike > 0.2
    again = hires.generate(pipe, "a cat", 2.0, 0.5, "latent", sampler=sampler, size=(32, 32), **ASKED)[0]
    assert again.tobytes() == found.tobytes()


def test_every_picture_of_a_request_is_the_same_alone(pipe):
    both = hires.generate(pipe, ["a cat", "dog"], 1.5, 0.5, size=(32, 32), **ASKED)
    assert [picture.size for picture in both] == [(48, 48)] * 2
    (alone,) = hires.generate(pipe, "dog", 1.5, 0.5, size=(32, 32), **(ASKED | {"seed": 6}))
    assert both[1].tobytes() == alone.tobytes()
    (plain,) = hires.generate(pipe, "dog", 1.0, size=(32, 32), **ASKED)
    assert plain.tobytes() == pipe.generate("dog", size=(32, 32), **ASKED).tobytes()


def test_the_command_draws_it_and_repeats_it(tmp_path: Path, pipe):
    save(SMALL, pipe.models, tmp_path / "model.safetensors", tokenizer=WORDS)
    line = [
        "generate",
        "a cat",
        f"--model={tmp_path / 'model.safetensors'}",
        "--steps=4",
        "--seed=5",
        "--dtype=fp32",
    ]
    line += ["--hires=2", "--hires-strength=0.6", "--hires-by=latent", "--quiet"]
    assert main([*line, f"--out={tmp_path / 'one.png'}"]) == 0
    entry = read(tmp_path / "one.png").settings
    assert (entry.hires, entry.hires_strength, entry.hires_by, entry.size) == (2.0, 0.6, "latent", (32, 32))
    again = tmp_path / "two.png"
    assert main(["generate", f"--like={tmp_path / 'one.png'}", f"--out={again}", "--quiet"]) == 0
    assert Image.open(again).size == (64, 64)
    assert Image.open(again).tobytes() == Image.open(tmp_path / "one.png").tobytes()
    names: dict[str, object] = {}
    exec(entry.as_python().replace('picture.save("picture.png")', ""), names)
    assert names["picture"].tobytes() == Image.open(again).tobytes()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "given, said",
    [
        ("--hires=5", "between 1 and 4"),
        ("--hires=0.5", "between 1 and 4"),
        ("--hires=nan", "between 1 and 4"),
        ("--hires-strength=0", "hires_strength must be above 0"),
        ("--hires-by=esrgan", "one of lanczos, latent, latent-bicubic"),
    ],
)
def test_bad_values_are_refused_before_anything_is_loaded(given, said, tmp_path, capsys):
    line = ["generate", "a cat", "--hires=2", given, f"--out={tmp_path / 'out'}"]
    assert main(line) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()
