"""`reifusion train tiny`: drawings by code, and a whole model from them with one command."""

import json
import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image

import reifusion
from reifusion.train import shapes
from reifusion.train.__main__ import main
from reifusion.train.images import open_pictures
from reifusion.train.sizes import TINY
from reifusion.weights import info

LITTLE = ["steps=3", "batch=4", "log_every=1", 'prompts=["a red star", "a cat at night"]']


def test_no_two_drawings_are_alike_and_each_comes_out_the_same_again():
    pictures = open_pictures("shapes")
    assert len(pictures) == shapes.COUNT == 4_000
    seen = {pictures[i][0].tobytes() for i in range(300)}
    assert len(seen) == 300
    again, scene = shapes.drawing(7)
    assert again.tobytes() == pictures[7][0].tobytes() and pictures[7][1] == scene.caption


def test_captions_are_true():
    middles: dict[str, list[float]] = {"left": [], "right": []}
    for number in range(400):
        picture, scene = shapes.drawing(number)
        words = scene.caption.split()
        assert scene.subject in words and ("night" in words) == scene.night
        assert not set(words) & (set(shapes.COLOURS) - {scene.colour})
        assert words[0] == ("an" if words[1] == "orange" else "a")
        pixels = np.asarray(picture, dtype=float)
        background = shapes.NIGHT if scene.night else shapes.DAY
        assert (pixels[0, [0, -1]] == background).all()
        columns = np.abs(pixels - background).sum((0, 2))
        middle = (columns * np.arange(shapes.SIDE)).sum() / columns.sum()
        for side in middles.keys() & set(words):
            middles[side].append(middle)
    assert max(middles["left"]) < shapes.SIDE / 2 < min(middles["right"])


def test_every_thing_has_one_colour_in_which_it_is_never_shown():
    scenes = [shapes.drawing(number)[1] for number in range(shapes.COUNT)]
    counts = Counter((scene.subject, scene.colour) for scene in scenes)
    missing = {(s, c) for s in shapes.SUBJECTS for c in shapes.COLOURS} - counts.keys()
    assert missing == set(shapes.UNSEEN.items()) and min(counts.values()) > 20
    assert {scene.colour for scene in scenes} == set(shapes.COLOURS) == set(shapes.UNSEEN.values())
    wanted = shapes.scene("star", random.Random(0), "green")
    assert wanted.colour == "green" == shapes.UNSEEN["star"]


def test_the_drawings_are_written_to_a_folder_that_is_read_like_any_other(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["shapes", str(tmp_path / "drawn"), "--count", "5"])
    shapes.main()
    found = open_pictures(tmp_path / "drawn")
    assert sorted(caption for _, caption in found) == sorted(shapes.drawing(i)[1].caption for i in range(5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of three steps, from its command to the trained file."""
    folder = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "COUNT", 120)
        assert main(["tiny", "minutes=none", *LITTLE, f"folder={folder}"]) == 0
        yield folder


def test_one_command_trains_a_whole_model(folder, capsys):
    model = folder / "tiny" / "tiny.safetensors"
    assert info(model).config.size == TINY.size == 32
    picture = reifusion.load(model).generate("a red star", seed=1, steps=2, progress=False)
    assert isinstance(picture, Image.Image) and picture.size == (32, 32)
    for stage in ("tiny-vae", "tiny"):
        rows = [json.loads(row) for row in (folder / stage / "training.jsonl").open()]
        assert [row["step"] for row in rows if "loss" in row] == [0, 1, 2]
        assert list((folder / stage).glob("sheet-*.png"))
    assert any("held_out" in row for row in rows)
    assert main(["tiny", f"folder={folder}", "--plot"]) == 0
    assert (folder / "tiny" / "training.png").stat().st_size > 1000


def test_the_same_command_goes_on(folder, capsys):
    capsys.readouterr()
    assert main(["tiny", "minutes=none", *LITTLE, "steps=5", f"folder={folder}"]) == 0
    assert f"the VAE is already in {folder}/tiny-vae/vae.safetensors" in capsys.readouterr().out
    rows = [json.loads(row) for row in (folder / "tiny" / "training.jsonl").open()]
    assert [row["step"] for row in rows if "loss" in row] == [0, 1, 2, 3, 4]


def test_what_it_costs_is_said_before_anything_is_trained(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shapes, "COUNT", 120)
    assert main(["tiny", "--dry-run", "batch=4", f"folder={tmp_path}"]) == 0
    said = capsys.readouterr().out
    assert said.count("pictures       120") == 2 and said.count(" minutes") >= 2
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["--config", "mini"],
            "tiny is the recipes tiny-vae and tiny, one after the other",
        ),
        (["mirror=true"], "the pictures of data=shapes are not mirrored"),
        (["--minutes", "0"], "--minutes must be above 0"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(tmp_path, capsys, arguments, says):
    assert main(["tiny", *arguments, f"folder={tmp_path}"]) == 2
    assert says in capsys.readouterr().err
