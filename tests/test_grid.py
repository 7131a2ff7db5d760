"""A table of pictures: each cell is the picture that `generate` draws with its settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from reifusion.cli.main import main
from reifusion.grid import NOTHING, Axis, cells, table
from reifusion.settings import Settings
from reifusion.weights import save
from tests.tiny import SMALL, WORDS, networks


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save(SMALL, networks(SMALL, noise=0.02), path, tokenizer=WORDS)
    return path


def test_an_axis_is_a_setting_with_values_of_its_kind():
    assert Axis.read("cfg=3, 5.5").values == (3.0, 5.5)
    assert Axis.read("size=32x64,64x32").values == ((32, 64), (64, 32))
    assert Axis.read("prompt=a cat, running|a dog").values == ("a cat, running", "a dog")
    assert Axis.read("guidance-rescale=0,1").name == "guidance_rescale"
    assert Axis.read("int8=true,False").values == (True, False)
    assert Axis.read("seed=1,2").texts == ("1", "2")


def test_every_cell_is_the_picture_of_its_settings(model, tmp_path):
    line = ["grid", "a cat", f"--model={model}", "--dtype=fp32", "--x=steps=1,2,3", "--y=cfg=1,4", "--keep"]
    assert main([*line, f"--out={tmp_path / 'grid.png'}"]) == 0
    sheet = Image.open(tmp_path / "grid.png")
    single = tmp_path / "one.png"
    for row, cfg in enumerate((1, 4)):
        for column, steps in enumerate((1, 2, 3)):
            options = [
                f"--model={model}",
                "--dtype=fp32",
                f"--steps={steps}",
                f"--cfg={cfg}",
                "--seed=0",
                "--quiet",
            ]
            single.unlink(missing_ok=True)
            assert main(["generate", "a cat", *options, f"--out={single}"]) == 0
            kept = Image.open(tmp_path / f"grid-{steps}-{cfg}-0.png")
            assert kept.tobytes() == Image.open(single).tobytes() and kept.info == Image.open(single).info
            left, top = sheet.width - (3 - column) * 40, sheet.height - (2 - row) * 40
            assert sheet.crop((left, top, left + 32, top + 32)).tobytes() == kept.tobytes()


def test_of_one_axis_the_names_have_one_value(model, tmp_path):
    line = ["grid", "a cat", f"--model={model}", "--x=steps=1", "--keep", f"--out={tmp_path / 'grid.png'}"]
    assert main(line) == 0
    assert {path.name for path in tmp_path.glob("*.png")} == {"grid.png", "grid-1.png"}


def test_an_axis_has_the_names_of_the_manner(model):
    usual = Settings("a cat", model=str(model), manner="a1111")
    [row] = cells(usual, Axis.read("sampler=Euler a,heun"), NOTHING)
    assert [one.sampler for one in row] == ["euler_a", "heun"]
    [row] = cells(replace(usual, sampler="dpmpp_2m"), Axis.read("schedule=Exponential"), NOTHING)
    assert row[0].schedule == "exponential"


def test_where_the_manner_is_an_axis_the_sampler_has_the_name_of_that_program(model):
    usual = Settings("a cat", model=str(model), sampler="DPM++ 2M", steps=2)
    ((one,),) = cells(usual, Axis.read("manner=a1111"), NOTHING)
    assert (one.manner, one.sampler) == ("a1111", "dpmpp_2m_karras")  # its automatic schedule
    with pytest.raises(ValueError, match=r"with manner='diffusers': .*'DPM\+\+ 2M'"):
        cells(usual, Axis.read("manner=a1111,diffusers"), NOTHING)


def test_pictures_of_several_sizes_and_long_values_have_room():
    x, y = Axis.read("prompt=a cat|" + "word " * 30), Axis.read("size=32x64,64x32")
    pictures = [[Image.new("RGB", size, "red") for _ in x.values] for size in y.values]
    sheet = table(pictures, x, y)
    places = [(i, j) for i in range(sheet.width) for j in range(sheet.height)]
    red = [place for place in places if sheet.getpixel(place) == (255, 0, 0)]
    assert len(red) == 4 * 32 * 64
    assert max(i for i, _ in red) < sheet.width and max(j for _, j in red) < sheet.height


@pytest.mark.parametrize(
    "given, said",
    [
        (["--x=cfg"], "like cfg=3,5,7"),
        (["--x=colour=red"], "'colour' is no setting"),
        (["--x=cfg=low,high"], "cfg cannot be 'low'"),
        (["--x=cfg=1,2", "--y=cfg=3"], "both axes are cfg"),
        (["--x=steps=1,0"], "with steps=0: "),
        (["--x=size=32x33"], "with size="),
        (["--x=code=a.py,b.py"], "cannot change in a table"),
        (["--x=int8=perhaps"], "int8 is true or false"),
        (["--x=seed=" + ",".join(map(str, range(50))), "--y=cfg=1,2,3,4,5,6,7,8,9"], "too large"),
    ],
)
def test_what_cannot_be_drawn_is_said_before_anything_is_loaded(
    given, said, model, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(Settings, "pipe", lambda *_: pytest.fail("it was loaded"))
    assert main(["grid", "a cat", f"--model={model}", *given, f"--out={tmp_path / 'out'}"]) == 2
    message = capsys.readouterr().err
    assert said in message and "Traceback" not in message
    assert not (tmp_path / "out").exists()


def test_an_open_seed_is_the_same_in_every_cell(model):
    rows = cells(Settings("a cat", model=str(model)), Axis.read("steps=1,2"), Axis.read("cfg=1,2"))
    assert {settings.seed for row in rows for settings in row} == {0}
    assert [[s.steps for s in row] for row in rows] == [[1, 2], [1, 2]]
