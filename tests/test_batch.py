"""Tables of pictures: read in every form, drawn once each, whole, resumed, by several processes alike."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from reifusion import album
from reifusion.batch.rows import read_rows
from reifusion.cli.main import main
from reifusion.model.diffusion import UNet
from reifusion.settings import Settings
from reifusion.steer import control_files
from reifusion.steer.control_files import save_control
from reifusion.steer.controlnet import ControlNet
from reifusion.train.images import open_pictures
from reifusion.weights import save
from tests.tiny import SMALL, WORDS, networks


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save(SMALL, networks(SMALL, noise=0.02), path, tokenizer=WORDS)
    return path


def written(path: Path, text: str) -> Path:
    path.write_text(text, "utf-8")
    return path


def pixels(folder: Path) -> dict[str, bytes]:
    return {path.name: Image.open(path).tobytes() for path in sorted(folder.glob("*.png"))}


# Tables


def test_the_same_rows_are_read_from_every_kind_of_table(tmp_path, monkeypatch):
    csv = 'prompt,Steps,seed,size,cfg,negative,lora,int8\na cat,2,,64x32,,"dog, big",a.st:0.5; b.st,yes\n'
    csv += "dog,,7,,1.5,,,\n"
    rows = [
        {"prompt": "a cat", "steps": 2, "size": [64, 32], "negative": "dog, big", "int8": True, "seed": None,
         "lora": [["a.st", 0.5], ["b.st", 1.0]]},
        {"prompt": "dog", "seed": 7, "cfg": 1.5},
    ]  # fmt: skip
    lines = "\n".join(json.dumps(row) for row in rows)
    monkeypatch.chdir(tmp_path)
    for name in ("a.st", "b.st"):
        Path(name).touch()  # what stands behind a colon is a weight if the file is there
    one = read_rows(written(tmp_path / "t.csv", csv), Settings(sampler="ddim"))
    other = read_rows(written(tmp_path / "t.jsonl", lines), Settings(sampler="ddim"))
    assert [row.settings for row in one] == [row.settings for row in other]
    assert [row.file for row in one] == [row.file for row in other]
    assert one[0].settings.seed == 0 and one[1].settings.seed == 7
    assert one[0].settings.size == (64, 32) and one[1].settings.cfg == 1.5 and one[0].settings.int8
    table = pyarrow.table({"prompt": ["a cat", "dog"], "steps": [2.0, None], "seed": [None, 7]})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    third = read_rows(tmp_path / "t.parquet", Settings())
    assert [row.settings.steps for row in third] == [2, None] and third[1].settings.seed == 7
    text = read_rows(written(tmp_path / "t.txt", "\ufeffa cat\n\n  dog  \n"), Settings(steps=3))
    assert [(r.settings.prompt, r.settings.steps, r.settings.seed) for r in text] == [
        ("a cat", 3, 0),
        ("dog", 3, 1),
    ]


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("t.csv", "prompt,colour\na cat,red\n", "row 1 of .*: the column 'colour' is no setting"),
        ("t.csv", "prompt,steps\na cat,2\ndog,many\n", "row 2 of .*: its steps is 'many'"),
        ("t.csv", "prompt,steps\na cat,0\n", "row 1 of .*steps"),
        ("t.csv", "prompt\na cat,2\n", "more cells"),
        ("t.csv", "prompt,code\na cat,evil.py\n", "row 1 of .*: a table cannot name code"),
        ("t.csv", "steps\n2\n", "there is no prompt"),
        ("t.csv", "prompt,int8\na cat,maybe\n", "its int8 is 'maybe'"),
        ("t.jsonl", '{"prompt": "a cat"}\n[1]\n', "line 2 of .* is not an object"),
        ("t.jsonl", '{"prompt": 5}\n', "its prompt is 5"),
        ("t.csv", 'prompt\nox\n"a cat\ndog\n', "is not a table in CSV, behind row 1: unexpected end"),
        ("t.csv", f"prompt\n{'a' * 2**18}\n", "is not a table in CSV, behind row 0: field larger"),
        ("t.csv", "prompt,Prompt\na cat,dog\n", "has two columns for prompt"),
        ("t.txt", "\n\n", "has no rows"),
        ("t.parquet", "no parquet", "is not a table in parquet"),
        ("t.xlsx", "", "a table of pictures is .txt, .csv, .jsonl or .parquet"),
    ],
)
def test_what_is_wrong_in_a_table_is_said_with_its_place(name, content, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        read_rows(written(tmp_path / name, content), Settings())


def test_a_row_ends_with_its_line_and_with_no_other_letter(tmp_path):
    prompt = "a\u2028cat\x85and\x0ca dog"
    tables = {"t.txt": prompt, "t.csv": f"prompt\n{prompt}\n", "t.jsonl": '{"prompt": "a\u2028cat\x85"}'}
    for name, text in tables.items():
        [row] = read_rows(written(tmp_path / name, text), Settings())
        assert row.settings.prompt == (prompt if name != "t.jsonl" else "a\u2028cat\x85")


def test_a_row_has_the_names_of_its_manner(tmp_path):
    table = written(
        tmp_path / "t.csv", "prompt,sampler,manner\ncat,Euler a,\ncat,dpmpp_2s_ancestral,comfyui\n"
    )
    rows = read_rows(table, Settings(manner="a1111"))
    assert [row.settings.sampler for row in rows] == ["euler_a", "dpmpp_2s_a"]


def test_nothing_is_drawn_if_one_row_cannot_be(model, tmp_path, capsys):
    table = written(tmp_path / "t.csv", f"prompt,model,size\ncat,{model},\ndog,{model},33x32\n")
    assert main(["batch", str(table), f"--out={tmp_path / 'out'}"]) == 2
    assert "row 2: the width must be a multiple of" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    for line, said in (["none.csv"], "none.csv cannot be read"), ([str(table), "--model=none"], "none"):
        assert main(["batch", *line, f"--out={tmp_path / 'out'}"]) == 2
        assert said in capsys.readouterr().err or line[0] != "none.csv"


# Drawing


def test_pictures_are_those_of_generate_and_are_drawn_once(model, tmp_path, capsys):
    table = written(tmp_path / "t.csv", "prompt,steps,seed\na cat,2,5\ndog,3,\n")
    line = ["batch", str(table), f"--model={model}", f"--out={tmp_path / 'out'}"]
    assert main(line) == 0
    first = pixels(tmp_path / "out")
    assert [name[:6] for name in first] == ["000000", "000001"]
    one = tmp_path / "one.png"
    assert (
        main(["generate", "a cat", "--steps=2", "--seed=5", f"--model={model}", f"--out={one}", "--quiet"])
        == 0
    )
    assert Image.open(one).tobytes() == first[min(first)]
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.png")}
    capsys.readouterr()
    assert main(line) == 0 and "2 of 2 pictures are there already" in capsys.readouterr().err
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.png")}
    written(table, "prompt,steps,seed\na cat,2,5\ndog,4,\ncat,2,\n")  # a row changed, and a new one
    assert main(line) == 0
    second = pixels(tmp_path / "out")
    assert len(second) == 4 and first.items() < second.items()


def test_the_manifest_says_what_was_drawn_from_what(model, tmp_path):
    table, out = written(tmp_path / "t.txt", "a cat\ndog\n"), tmp_path / "out"
    assert main(["batch", str(table), f"--model={model}", "--steps=2", f"--out={out}"]) == 0
    rows = pyarrow.parquet.read_table(out / "manifest.parquet").to_pylist()
    assert [row["prompt"] for row in rows] == ["a cat", "dog"] and [row["seed"] for row in rows] == [0, 1]
    for row in rows:
        entry = album.read(out / row["file"])
        assert entry.settings.prompt == row["prompt"] and entry.hashes["model"] == row["model_hash"]
        assert row["seconds"] > 0 and row["steps"] == 2


def test_a_kill_at_any_moment_leaves_a_manifest_that_the_next_run_mends(model, tmp_path):
    table, out = written(tmp_path / "t.txt", "a cät\ndog\u2028dog\ncat\n"), tmp_path / "out"
    line = ["batch", str(table), f"--model={model}", "--steps=1", f"--out={out}"]
    assert main(line) == 0
    manifest = out / "manifest.jsonl"
    first, second, third = manifest.read_bytes().splitlines(keepends=True)
    cut = first[: first.index("ä".encode()) + 1]  # inside a letter
    for left in (first + second + third, cut, first + second[:-5], b""):
        manifest.write_bytes(left)
        (out / "manifest.parquet").unlink()
        assert main(line) == 0
        rows = pyarrow.parquet.read_table(out / "manifest.parquet").to_pylist()
        assert [row["prompt"] for row in rows] == ["a cät", "dog\u2028dog", "cat"]
    (out / rows[2]["file"]).unlink()
    manifest.write_bytes(first + second + third[:-5])
    assert main(line) == 0
    rows = pyarrow.parquet.read_table(out / "manifest.parquet").to_pylist()
    assert [row["row"] for row in rows] == [0, 1, 2] and rows[2]["seconds"] > 0


def test_what_a_killed_process_began_is_removed_when_all_is_drawn(model, tmp_path):
    table, out = written(tmp_path / "t.txt", "a cat\ndog\n"), tmp_path / "out"
    line = ["batch", str(table), f"--model={model}", "--steps=1", f"--out={out}"]
    assert main(line) == 0
    names = {path.name for path in out.iterdir()}
    drawn = min(name for name in names if name.endswith(".png"))
    for name in (f".deadbeef.{drawn}", ".deadbeef.another.png"):
        (out / name).write_bytes(b"half")
    (out / drawn).unlink()
    assert main(line) == 0
    assert {path.name for path in out.iterdir()} == {*names, ".deadbeef.another.png"}


def test_a_prompt_that_is_not_utf_8_does_not_end_the_others(model, tmp_path):
    table, out = (
        written(tmp_path / "t.jsonl", '{"prompt": "a \\ud800"}\n{"prompt": "dog"}\n'),
        tmp_path / "out",
    )
    assert main(["batch", str(table), f"--model={model}", "--steps=1", f"--out={out}"]) == 0
    assert len(pixels(out)) == 2 and len((out / "manifest.jsonl").read_bytes().splitlines()) == 2


def test_a_row_that_fails_does_not_end_the_others(model, tmp_path, capsys, monkeypatch):
    table, out = written(tmp_path / "t.txt", "a cat\ndog\ncat\n"), tmp_path / "out"
    real = album.save

    def full(picture, entry, path):
        if entry.settings.prompt == "dog":
            raise OSError(28, "No space left on device")
        return real(picture, entry, path)

    monkeypatch.setattr(album, "save", full)
    line = ["batch", str(table), f"--model={model}", "--steps=1", f"--out={out}"]
    assert main(line) == 1
    error = capsys.readouterr().err
    assert "row 2: " in error and "1 of 3 pictures could not be drawn" in error and "Traceback" not in error
    assert len(pixels(out)) == 2
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert [("error" in line) for line in lines] == [False, True, False]
    monkeypatch.setattr(album, "save", real)
    assert main(line) == 0 and len(pixels(out)) == 3


def test_rows_of_one_model_are_drawn_together(model, tmp_path, monkeypatch):
    other = tmp_path / "other.safetensors"
    save(SMALL, networks(SMALL, noise=0.04), other, tokenizer=WORDS)
    loads: list[str] = []
    real = Settings.loaded

    def counting(self, *given):
        loads.append(self.model)
        return real(self, *given)

    monkeypatch.setattr(Settings, "loaded", counting)
    rows = "".join(f"cat,{path},1\n" for path in (model, other, model, other))
    table = written(tmp_path / "t.csv", f"prompt,model,steps\n{rows}")
    assert main(["batch", str(table), f"--out={tmp_path / 'out'}"]) == 0
    assert sorted(loads) == sorted(map(str, (model, other)))
    assert len(set(pixels(tmp_path / "out").values())) == 4


def test_neither_models_nor_controlnets_are_read_again_for_the_next_hint(model, tmp_path, monkeypatch):
    net = ControlNet(copy.deepcopy(cast(UNet, networks(SMALL)["diffusion"])), (4, 8))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1, generator=torch.Generator().manual_seed(1))
    save_control(net, SMALL, tmp_path / "net.safetensors")
    reads: list[str] = []

    def counting(real: Any) -> Any:
        def call(*given: Any, **more: Any) -> Any:
            reads.append(real.__name__)
            return real(*given, **more)

        return call

    monkeypatch.setattr(Settings, "loaded", counting(Settings.loaded))
    monkeypatch.setattr(control_files, "load_control", counting(control_files.load_control))
    rows = []
    for i in range(3):
        Image.new("RGB", (32, 32), (80 * i, 0, 0)).save(tmp_path / f"{i}.png")
        control = [[str(tmp_path / "net.safetensors"), f"{tmp_path}/{i}.png", 1, 0, 1]]
        rows.append({"prompt": "cat", "control": control})
    table = written(tmp_path / "t.jsonl", "\n".join(json.dumps(row | {"seed": 1}) for row in rows))
    line = ["batch", str(table), f"--model={model}", "--steps=2", "--dtype=fp32", f"--out={tmp_path / 'out'}"]
    assert main(line) == 0
    assert sorted(reads) == ["load_control", "loaded"]
    assert len(set(pixels(tmp_path / "out").values())) == 3


@pytest.mark.slow
def test_several_processes_draw_the_same_and_a_killed_one_loses_nothing(model, tmp_path):
    table = written(tmp_path / "t.txt", "a cat\ndog\ncat\n" * 4)
    line = ["batch", str(table), f"--model={model}", "--steps=3", "--dtype=fp32"]
    assert main([*line, f"--out={tmp_path / 'one'}"]) == 0
    command = [sys.executable, "-m", "reifusion", *line, "--processes=2", f"--out={tmp_path / 'two'}"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    workers: list[int] = []
    while run.poll() is None and not (workers and list((tmp_path / "two").glob("0*.png"))):
        workers = [pid for pid in children(run.pid) if "spawn_main" in command_of(pid)] or workers
        time.sleep(0.02)
    for worker in workers[:1]:
        with contextlib.suppress(ProcessLookupError):  # which has just done its last picture
            os.kill(worker, signal.SIGKILL)
    _, error = run.communicate(timeout=120)
    if run.returncode != 0:  # unless all was done by then
        assert run.returncode == 1 and "a process ended (SIGKILL)" in error and "Traceback" not in error
    assert main([*line, "--processes=2", f"--out={tmp_path / 'two'}"]) == 0
    assert pixels(tmp_path / "one") == pixels(tmp_path / "two")
    rows = pyarrow.parquet.read_table(tmp_path / "two" / "manifest.parquet").to_pylist()
    assert len({row["file"] for row in rows}) == len(rows) >= 11  # one may not be told of


def children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [int(one) for one in task.read_text().split()]
    return found


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def test_a_folder_of_drawn_pictures_is_data_with_their_prompts(model, tmp_path):
    table, out = written(tmp_path / "t.txt", "a cat\ndog\n"), tmp_path / "out"
    assert main(["batch", str(table), f"--model={model}", "--steps=1", f"--out={out}"]) == 0
    assert (out / "manifest.parquet").exists()
    with pytest.warns(UserWarning, match="2 of 2 pictures have no caption and get the prompt"):
        pictures = open_pictures(out)
    assert [item.captions for item in pictures.items] == [("a cat",), ("dog",)]
    (out / pictures.items[0].name).with_suffix(".txt").write_text("something else")
    with pytest.warns(UserWarning, match="1 of 2 pictures have no caption and get the prompt"):
        assert open_pictures(out).items[0].captions == ("something else",)
    with pytest.warns(UserWarning, match="no caption of their own and get 'a zork'"):
        assert open_pictures(out, caption="a zork").items[1].captions == ("a zork",)
