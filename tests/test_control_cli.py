"""ControlNets from the command line: edges of a picture, a training on them, and pictures drawn by them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from reifusion import album
from reifusion.cli import main
from reifusion.weights import save
from tests.tiny import TINY, WORDS, random_networks

pytest.importorskip("cv2")
SMALL = replace(
    TINY, clip=replace(TINY.clip, vocab_size=WORDS.vocab_size, context_length=16), size=32, steps=3, cfg=3.0
)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A model, four pictures with captions, and a ControlNet that was trained on them by the command."""
    home = tmp_path_factory.mktemp("home")
    save(SMALL, random_networks(SMALL), home / "model.safetensors", tokenizer=WORDS)
    (home / "pictures").mkdir()
    for i in range(4):
        picture = Image.new("RGB", (32, 32), (40 * i, 20, 90))
        ImageDraw.Draw(picture).ellipse((4 + i, 4, 20 + 2 * i, 26), "white")
        picture.save(home / "pictures" / f"{i}.png")
        (home / "pictures" / f"{i}.txt").write_text("cat")
    command = [
        "train", "control", f"start={home}/model.safetensors", f"data={home}/pictures", "steps=4", "batch=2",
        "warmup=1", f"folder={home}/run", f"out={home}/net.safetensors", "mixed_precision=no", "edge_low=20",
        "edge_high=40", "lr=0.01",
    ]  # fmt: skip
    assert main(command) == 0
    assert (home / "run" / "sheet-000004.png").exists()
    assert main(["edges", str(home / "pictures" / "3.png"), "--out", str(home / "edges.png")]) == 0
    assert np.asarray(Image.open(home / "edges.png")).max() == 255
    return home


def draw(home: Path, capsys: pytest.CaptureFixture[str], *more: str) -> Path:
    command = ["generate", "cat", f"--model={home}/model.safetensors", "--seed=1", "--quiet", "--dtype=fp32"]
    code = main([*command, f"--out={home}/out", *more])
    out, error = capsys.readouterr()
    assert code == 0, error
    return Path(out.strip())


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_a_picture_is_steered_and_carries_how(home, capsys):
    control = f"{home}/net.safetensors={home}/edges.png"
    plain, steered = draw(home, capsys), draw(home, capsys, f"--control={control}:50")
    assert np.abs(pixels(steered) - pixels(plain)).max() > 0
    nothing = draw(home, capsys, f"--control={control}:0:0-0.5")
    assert np.array_equal(pixels(nothing), pixels(plain))
    settings = album.read(steered).settings
    assert settings.control == ((f"{home}/net.safetensors", f"{home}/edges.png", 50.0, 0.0, 1.0),)
    again = draw(home, capsys, "--like", str(steered))
    assert np.array_equal(pixels(again), pixels(steered))
    words = settings.as_command().split()
    assert f"--control={control}:50.0:0.0-1.0" in words


def test_the_lines_of_python_draw_the_same(home, capsys, tmp_path, monkeypatch):
    control = f"--control={home}/net.safetensors={home}/edges.png:50:0-0.7"
    drawn = draw(home, capsys, control, "--control-mode=prompt")
    monkeypatch.chdir(tmp_path)
    exec(compile(album.read(drawn).settings.as_python(), "lines", "exec"), {})
    assert np.array_equal(pixels(Path("picture.png")), pixels(drawn))


def test_a_hint_that_changed_is_noticed(home, capsys, tmp_path):
    hint = tmp_path / "hint.png"
    Image.open(home / "edges.png").save(hint)
    drawn = draw(home, capsys, f"--control={home}/net.safetensors={hint}:50")
    Image.new("RGB", (32, 32), "white").save(hint)
    assert main(["generate", "--like", str(drawn), "--quiet", f"--out={home}/out"]) == 0
    assert "ControlNet or the hint of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--control=net.safetensors"], "are written like"),
        (["--control={home}/net.safetensors={home}/missing.png"], "there is no picture"),
        (["--control={home}/missing.safetensors={home}/edges.png"], "there is no file"),
        (["--control={home}/model.safetensors={home}/edges.png"], "is not a ControlNet"),
        (["--control={home}/net.safetensors={home}/edges.png:1:0.5-0.2"], "to a later one"),
        (["--control={home}/net.safetensors={home}/edges.png", "--control-mode=much"], "is one of"),
        (["--control={home}/net.safetensors={home}/edges.png", "--deepcache=2"], "leaves out"),
    ],
)
def test_bad_input_gets_one_sentence(home, capsys, more, said):
    given = [text.replace("{home}", str(home)) for text in more]
    code = main(["generate", "cat", f"--model={home}/model.safetensors", f"--out={home}/out", *given])
    error = capsys.readouterr().err
    assert code == 2 and said in error and error.count("\n") == 1


def test_a_training_that_cannot_be_is_refused_before_it_begins(home, capsys):
    command = [
        "train",
        "control",
        f"start={home}/model.safetensors",
        f"data={home}/pictures",
        f"folder={home}/x",
    ]
    for more, said in (
        (["edge_low=300"], "edge_low must be at most edge_high"),
        (["hint_channels=[8,8]"], "hint_channels must be 4 numbers"),
        (["regularisation=x"], "regularisation"),
        (["data=emoji"], "a folder of pictures"),
    ):
        assert main([*command, *more]) == 2
        assert said in capsys.readouterr().err
    assert main([*command, "--dry-run"]) == 0
    assert "pictures" in capsys.readouterr().out
    assert not (home / "x" / "training.jsonl").exists()


def test_metadata_with_odd_controls_is_refused(home, capsys):
    drawn = draw(home, capsys, f"--control={home}/net.safetensors={home}/edges.png")
    carried = json.loads(Image.open(drawn).text["reifusion"])  # type: ignore[attr-defined]
    for odd in ("x", [["a", "b"]], [["a", "b", 1, 0, "1"]], [[1, "b", 1.0, 0.0, 1.0]]):
        with pytest.raises(ValueError, match="its control is"):
            album.from_carried(carried | {"control": odd})


def test_of_the_masked_part_alone_the_hint_is_that_part(home, capsys):
    """Drawn alone, a part sees the same hint as a picture of that part would."""
    size = (64, 64)
    picture, mask, whole = (Image.new(mode, size, "black") for mode in ("RGB", "L", "RGB"))
    mask.paste(255, (32, 32, 64, 64))
    ImageDraw.Draw(whole).line((32, 40, 64, 60), "white", 2)
    ImageDraw.Draw(whole).line((0, 5, 30, 25), "white", 2)  # where nothing is drawn
    for name, one in ("picture", picture), ("mask", mask), ("hint", whole):
        one.save(home / f"{name}.png")
    for name, one in ("picture", picture), ("mask", mask), ("hint", whole):
        one.crop((32, 32, 64, 64)).save(home / f"part-{name}.png")

    def drawn(prefix: str, *more: str) -> np.ndarray:
        files = [f"--init-image={home}/{prefix}picture.png", f"--mask={home}/{prefix}mask.png"]
        control = f"--control={home}/net.safetensors={home}/{prefix}hint.png:3"
        return pixels(draw(home, capsys, *files, control, "--size=32x32", "--strength=1", *more))

    part = drawn("", "--only-masked=0")[32:, 32:]
    assert np.array_equal(part, drawn("part-"))
    assert not np.array_equal(part, pixels(draw(home, capsys, *[
        f"--init-image={home}/picture.png", f"--mask={home}/mask.png", "--size=32x32", "--strength=1",
        "--only-masked=0",
    ]))[32:, 32:])  # fmt: skip
