"""What the command does with variations, folders of pictures, and films."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from reifusion import album, film
from reifusion.cli.main import main
from reifusion.model.pipeline import StableDiffusion
from reifusion.settings import pictures_of
from reifusion.weights import save
from tests.tiny import SMALL, WORDS, networks


@pytest.fixture(scope="module")
def usual(tmp_path_factory) -> list[str]:
    path = tmp_path_factory.mktemp("doing") / "small.safetensors"
    save(SMALL, networks(SMALL, noise=0.02), path, tokenizer=WORDS)
    return ["generate", "a cat", "--model", str(path), "--steps", "2", "--dtype", "fp32", "--quiet"]


def drawn(capsys) -> list[Path]:
    return [Path(line) for line in capsys.readouterr().out.split()]


def levels(one: Path, other: Path) -> float:
    pictures = [np.asarray(Image.open(path)).astype(float) for path in (one, other)]
    return float(np.abs(pictures[0] - pictures[1]).mean())


def test_variations_are_near_the_picture_and_say_what_they_are(usual, tmp_path, capsys):
    more = ["--seed", "7", "--sampler", "ddim", "--out"]
    assert main([*usual, *more, str(tmp_path / "first.png")]) == 0
    assert (
        main(
            [*usual, "--variation", "0.1", "--variation-seed", "3", "--num", "2", *more, str(tmp_path / "v")]
        )
        == 0
    )
    assert main([*usual, "--seed", "8", "--sampler", "ddim", "--out", str(tmp_path / "other.png")]) == 0
    first, one, two, other = drawn(capsys)
    entries = [album.read(path).settings for path in (one, two)]
    assert [(e.seed, e.variation, e.variation_seed) for e in entries] == [(7, 0.1, 3), (7, 0.1, 4)]
    assert 0 < max(levels(first, one), levels(first, two)) < 0.5 * levels(first, other)
    assert main(["generate", "--like", str(two), "--quiet", "--out", str(tmp_path / "again.png")]) == 0
    assert levels(two, drawn(capsys)[0]) == 0
    text = Image.open(two).info["parameters"]
    assert "Variation seed: 4, Variation seed strength: 0.1" in text


def test_a_folder_of_pictures_is_drawn_picture_by_picture(usual, tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    for k, size in enumerate([(40, 32), (32, 56)]):
        Image.effect_noise(size, 40 + 20 * k).convert("RGB").save(folder / f"{'ba'[k]}.PNG")
    (folder / "notes.txt").write_text("not a picture")
    (folder / "._a.png").write_bytes(b"what macOS keeps beside a.PNG")
    more = ["--strength", "0.5", "--seed", "3"]
    assert main([*usual, *more, "--init-image", str(folder), "--out", str(tmp_path / "out")]) == 0
    paths = drawn(capsys)
    assert [path.name for path in paths] == ["a-a-cat-3.png", "b-a-cat-3.png"]
    for name, path in zip("ab", paths):
        alone = tmp_path / f"{name}.png"
        photo = str(folder / f"{name}.PNG")
        assert main([*usual, *more, "--init-image", photo, "--out", str(alone)]) == 0
        assert levels(alone, path) == 0 and album.read(path).settings.init_image == photo
    capsys.readouterr()
    assert main([*usual, "--init-image", str(folder), "--out", str(tmp_path / "one.png")]) == 2
    assert "is a folder, so --out must be one too" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main([*usual, "--init-image", str(tmp_path / "empty"), "--out", str(tmp_path)]) == 2
    assert "a folder, and has none in it" in capsys.readouterr().err
    assert pictures_of(None) == [None] and pictures_of("x.png") == ["x.png"]


@pytest.mark.parametrize("ending", ["webp", "gif", "png"])
def test_a_film_has_every_step_and_ends_with_the_picture(usual, tmp_path, capsys, ending):
    path = tmp_path / "new" / f"steps.{ending}"
    assert (
        main([*usual, "--steps", "3", "--seed", "3", "--film", str(path), "--out", str(tmp_path / "a.png")])
        == 0
    )
    assert drawn(capsys) == [tmp_path / "a.png", path]
    with Image.open(path) as found:
        assert getattr(found, "n_frames", 1) == 3 and found.size == (32, 32)
        found.seek(2)
        last = found.convert("RGB")
    picture, grey = Image.open(tmp_path / "a.png"), ending != "png"  # the others lose some of the colours
    both = [np.asarray(one.convert("L" if grey else "RGB")).astype(float) for one in (last, picture)]
    assert np.abs(both[0] - both[1]).mean() < (8 if grey else 0.1)


def test_a_film_shows_what_the_network_sees(usual, tmp_path):
    pipe = StableDiffusion(SMALL, WORDS, networks(SMALL, noise=0.02))
    reel, seen = film.Film(pipe), []

    def look(step) -> None:
        reel(step)
        seen.append(pipe.decode(step.x0)[0].tobytes())

    picture = pipe.generate("a cat", steps=3, seed=1, size=(32, 24), progress=False, callback=look)
    assert [frame.tobytes() for frame in reel.frames] == seen[:2] and len(seen) == 3
    assert reel.save(tmp_path / "a.gif", picture) == tmp_path / "a.gif"
    assert reel.save(tmp_path / "a.gif", picture) == tmp_path / "a-2.gif"  # nothing is overwritten
    assert main([*usual, "--film", "a.mp4", "--out", str(tmp_path)]) == 2


def test_a_film_that_cannot_be_written_is_said_before_anything_is_drawn(usual, tmp_path, capsys):
    (tmp_path / "file").touch()
    asked = ["--film", str(tmp_path / "file" / "a.gif"), "--out", str(tmp_path / "out")]
    assert main([*usual, *asked]) == 2
    assert "cannot write to" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_moving_averages_are_taken_where_they_are_asked_for(tmp_path, capsys):
    models, others = networks(SMALL, noise=0.02), networks(SMALL, noise=0.03)
    plain, averages, both = (tmp_path / f"{name}.safetensors" for name in ("plain", "averages", "both"))
    save(SMALL, models, plain, "compvis", tokenizer=WORDS)
    save(SMALL, {**models, "diffusion": others["diffusion"]}, averages, "compvis", tokenizer=WORDS)
    state, theirs = load_file(plain), load_file(averages)
    for name, value in theirs.items():
        if name.startswith("model.diffusion_model."):
            state["model_ema." + name.removeprefix("model.").replace(".", "")] = value
    with safe_open(plain, "pt") as file:
        save_file(state, both, file.metadata())
    asked = ["generate", "a cat", "--steps", "2", "--seed", "1", "--dtype", "fp32", "--quiet"]
    made: dict[str, Path] = {}
    for name, more in {
        "plain": [plain],
        "averages": [averages],
        "both": [both],
        "ema": [both, "--ema"],
    }.items():
        made[name] = tmp_path / f"{name}.png"
        assert main([*asked, "--out", str(made[name]), "--model", *map(str, more)]) == 0
    assert levels(made["ema"], made["averages"]) == 0 == levels(made["both"], made["plain"])
    assert levels(made["ema"], made["both"]) > 1
    assert album.read(made["ema"]).settings.ema and not album.read(made["both"]).settings.ema
    capsys.readouterr()
    assert main([*asked, "--ema", "--model", str(plain), "--out", str(tmp_path)]) == 2
    assert "has no moving average of" in capsys.readouterr().err


def test_another_programs_picture_is_repeated_in_its_manner(usual, tmp_path, capsys):
    facts = "Steps: 2, Sampler: Euler a, CFG scale: 2, Seed: 5, Size: 40x36, Model: sd"
    model = usual[usual.index("--model") + 1]
    seen = {}
    for name, version in {
        "a1111": "v1.10.1",
        "sdcpp": "stable-diffusion.cpp",
        "reifusion": "reifusion 1",
    }.items():
        texts = PngInfo()
        texts.add_text("parameters", f"a (cat:1.2)\n{facts}, Version: {version}")
        path = tmp_path / f"{name}.png"
        Image.new("RGB", (8, 8)).save(path, pnginfo=texts)
        again = ["generate", "--like", str(path), "--model", model, "--dtype", "fp32", "--quiet"]
        assert main([*again, "--out", str(tmp_path / f"{name}-again.png")]) == 0
        seen[name] = album.read(tmp_path / f"{name}-again.png").settings
        assert main([*again, "--manner", "diffusers", "--out", str(tmp_path / f"{name}-ours.png")]) == 0
    capsys.readouterr()
    assert {name: one.manner for name, one in seen.items()} == {
        "a1111": "a1111",
        "sdcpp": "sdcpp",
        "reifusion": None,
    }
    assert seen["a1111"].size == (40, 32) and seen["sdcpp"].size == (64, 64)
    assert seen["a1111"].schedule == "normal" and seen["reifusion"].schedule is None
    # Said in words for a shell, it is the same picture.
    line = shlex.split(seen["a1111"].as_command())[1:]
    assert main([*line[:-2], "--quiet", "--out", str(tmp_path / "said.png"), *line[-2:]]) == 0
    assert levels(tmp_path / "said.png", tmp_path / "a1111-again.png") == 0
    own: dict[str, Any] = {}
    exec(seen["a1111"].as_python().replace('picture.save("picture.png")', ""), own)
    assert own["picture"].tobytes() == Image.open(tmp_path / "said.png").tobytes()
