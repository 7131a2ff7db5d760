"""What `reifusion evaluate` says of models that are known to be perfect, to copy, or to draw one thing."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from PIL import Image, ImageDraw

from reifusion.api import load
from reifusion.cli.main import main
from reifusion.model.pipeline import StableDiffusion
from reifusion.train.estimates import kid
from reifusion.train.evaluate import Evaluation, Features, evaluate
from reifusion.train.images import Pictures, open_pictures
from tests.tiny import SMALL, WORDS, networks

pytestmark = pytest.mark.slow

COLOURS = ("red", "green", "blue", "black")
KINDS = ("ellipse", "rectangle", "arc")


def drawing(colour: str, kind: str, shift: int) -> Image.Image:
    picture = Image.new("RGB", (128, 128), "white")
    draw, box = ImageDraw.Draw(picture), (20 + shift, 24, 90 + shift, 100)
    if kind == "arc":
        draw.arc(box, 0, 270, colour, 12)
    else:
        getattr(draw, kind)(box, colour)
    return picture


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("drawings")
    for colour in COLOURS:
        for kind in KINDS:
            for shift in (0, 9):
                name = f"{colour}-{kind}-{shift}"
                drawing(colour, kind, shift).save(path / f"{name}.png")
                (path / f"{name}.txt").write_text(f"a {colour} {kind}")
    return path


@pytest.fixture(scope="module")
def pictures(folder: Path) -> Pictures:
    return open_pictures(folder)


@pytest.fixture(scope="module")
def features() -> Features:
    return Features(load("mini", "cpu", "fp32"))


def draws(shift: Any) -> StableDiffusion:
    """A model that knows what a caption means; shift(seed): where the picture of a seed stands."""

    def generate(prompts: list[str], seed: int, progress: bool) -> list[Image.Image]:
        words = [prompt.split() for prompt in prompts]
        return [drawing(colour, kind, shift(seed + i)) for i, (_, colour, kind) in enumerate(words)]

    return cast(StableDiffusion, SimpleNamespace(generate=generate))


def values(found: Evaluation) -> dict[str, float]:
    return {figure.name.split(",")[0]: figure.value for figure in found.figures}


def test_kid_is_what_the_moments_of_the_distributions_say():
    # For one feature and k = (xy + 1)³, the distance is 3 (Δ E x)² + 3 (Δ E x²)² + (Δ E x³)².
    generator = torch.Generator().manual_seed(0)  # x is uniform in [0.3, 1.3], y in [0, 1]
    expected = 3 * (0.8 - 0.5) ** 2 + 3 * (0.7233 - 0.3333) ** 2 + (0.712 - 0.25) ** 2
    found = [
        kid(torch.rand(30, 1, generator=generator) + 0.3, torch.rand(40, 1, generator=generator))
        for _ in range(400)
    ]
    assert sum(value for value, *_ in found) / len(found) == pytest.approx(expected, rel=0.05)
    assert 0.85 < sum(low < expected < high for _, low, high in found) / len(found) < 0.98


def test_kid_of_the_same_distribution_is_around_nothing():
    generator = torch.Generator().manual_seed(0)
    found = [
        kid(torch.randn(9, 4, generator=generator), torch.randn(12, 4, generator=generator))
        for _ in range(200)
    ]
    middle = sum(value for value, *_ in found) / len(found)
    assert abs(middle) < 0.1 < max(value for value, *_ in found)
    assert min(value for value, *_ in found) < 0  # it is not biased upwards
    assert kid(torch.zeros(2, 4), torch.ones(2, 4))[0] > 0


def test_a_model_that_copies_is_found_out(pictures, features):
    found = evaluate(draws(lambda seed: 9 * (seed % 2)), pictures, features, count=16, seeds=2)
    assert values(found)["look like copies"] == 100
    far = evaluate(draws(lambda seed: 40 + seed % 7), pictures, features, count=16, seeds=2)
    assert values(far)["look like copies"] < 50
    assert values(found)["KID × 1000"] < values(far)["KID × 1000"]


def test_copies_are_found_although_the_data_hold_a_picture_twice(features, folder, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    for file in folder.glob("red-*"):
        shutil.copy(file, again / f"more-{file.name}")
    found = evaluate(draws(lambda seed: 9 * (seed % 2)), open_pictures(again), features, count=16, seeds=2)
    assert values(found)["look like copies"] == 100


def test_a_model_whose_seeds_draw_the_same_is_found_out(pictures, features):
    found = evaluate(draws(lambda seed: 4), pictures, features, count=16, seeds=4)
    assert values(found)["seeds differ"] == 0
    varied = evaluate(draws(lambda seed: 2 * (seed % 5)), pictures, features, count=16, seeds=4)
    assert 0.3 < values(varied)["seeds differ"] < 1.5


def test_the_nearest_sheet_shows_a_copy_above_its_original(pictures, features):
    found = evaluate(draws(lambda seed: 9), pictures, features, count=12, seeds=2)
    sheet = found.copies
    above, below = (sheet.crop((0, top, 128, top + 128)) for top in (0, 128))
    assert above.tobytes() == below.tobytes()
    assert found.drawn.size[0] == 6 * 128  # 6 prompts in a row


def test_the_same_pictures_are_the_same_points_in_any_company(pictures, features):
    some = [pictures[i][0] for i in range(11)]
    assert torch.allclose(features(some)[3], features(some[3:4])[0], atol=1e-4)


def test_only_a_plain_model_can_look_at_pictures():
    edits = replace(SMALL, unet=replace(SMALL.unet, in_channels=8))
    for config in (edits, replace(SMALL, unet=replace(SMALL.unet, middle=False))):
        with pytest.raises(ValueError, match="take other --features"):
            Features(StableDiffusion(config, WORDS, networks(config)))


def test_the_command_measures_the_mini_and_keeps_what_it_found(folder, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red apple\n\na blue fish\n")
    line = [
        "evaluate",
        "mini",
        "--data",
        str(folder),
        "--prompts",
        str(prompts),
        "--steps",
        "2",
        "--cfg",
        "1",
    ]
    assert main([*line, "--count", "4", "--seeds", "2", "--out", str(tmp_path / "out")]) == 0
    assert "look like copies" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text("utf-8"))
    assert report["prompts"] == ["a red apple", "a blue fish"] and report["pictures"] == 4
    assert report["settings"] == {"cfg": "1.0", "steps": "2"}
    assert len(report["figures"]) == 3
    for name in ("drawn.png", "nearest.png"):
        Image.open(tmp_path / "out" / name).verify()


@pytest.mark.parametrize(
    "given, said",
    [
        (["--count", "5", "--seeds", "4"], "at least twice --seeds"),
        (["--prompts", "nowhere.txt"], "nowhere.txt cannot be read"),
        (["--data", "nowhere"], "nowhere"),
        (["--steps", "0"], "steps"),
        (["--features", "nowhere.safetensors"], "nowhere.safetensors"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(given, said, folder, tmp_path, capsys):
    line = ["evaluate", "mini", "--data", str(folder), "--out", str(tmp_path / "out"), *given]
    assert main(line) in (1, 2)
    message = capsys.readouterr().err.strip()
    assert said in message and "Traceback" not in message
    assert not (tmp_path / "out").exists()
