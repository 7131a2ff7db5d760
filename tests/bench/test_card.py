"""What is brought home from ten minutes of a GPU, even if they do not end well; nothing is trained."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load, save_file

ROOT = Path(__file__).parent.parent.parent
# Stands for python3: what is said of a training is done in its place.
PYTHON = """#!/bin/bash
if [ "$2" = reifusion.train ] || [ "$2" = pytest ]; then
  echo "$@" >> "$ASKED"
  folder=$(tr ' ' '\\n' <<< "$*" | sed -n 's/^folder=//p')
  {does}
fi
exec {python} "$@"
"""


@pytest.fixture
def card(tmp_path: Path):
    """Runs the script with a training that does something else; returns its folder and what was asked."""

    def run(does: str, *arguments: str) -> tuple[Path, list[str]]:
        (tmp_path / "bin").mkdir()
        python = tmp_path / "bin" / "python3"
        python.write_text(PYTHON.replace("{does}", does).replace("{python}", sys.executable))
        python.chmod(0o755)
        (tmp_path / "sprites").mkdir()
        (tmp_path / "sprites" / "sprites-1.zip").touch()
        what, *more = arguments
        environment = {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "TMPDIR": f"{tmp_path / 'tmp'}",
            "ASKED": f"{tmp_path / 'asked'}",
            "OMP_NUM_THREADS": "1",
        }
        command = ["bash", "bench/card.sh", what, f"{tmp_path / 'sprites'}", f"{tmp_path / 'out'}", *more]
        subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=100)
        assert (tmp_path / "tmp" / "reifusion-cache" / "mini" / "sprites-1.zip").exists()
        return tmp_path / "out", (tmp_path / "asked").read_text().splitlines()

    return run


def parts(out: Path) -> bytes:
    files = sorted(out.glob("w?"))
    assert len(files) <= 6 and all(file.stat().st_size <= 16 * 2**20 for file in files)
    return b"".join(file.read_bytes() for file in files)


def ended(tmp_path: Path) -> str:
    """A training's files, ready to be copied to where it writes."""
    made = tmp_path / "made"
    for name in ("mini-vae", "mini"):
        (made / name).mkdir(parents=True)
        (made / name / "training.jsonl").write_text('{"step": 0}\n')
        Image.new("RGB", (8, 8)).save(made / name / "sheet-000001.png")
    save_file({"encoder.x": torch.ones(3)}, made / "mini-vae" / "vae.safetensors")
    torch.save({"ema": {"clip.x": torch.zeros(2)}}, made / "mini" / "checkpoint.pt")
    (made / "mini" / "vocabulary.txt").write_text("a b\n")
    return f'mkdir -p "$folder" && cp -r {made}/* "$folder"'


def test_a_model_comes_home_in_parts(card, tmp_path):
    does = ended(tmp_path)
    save_file({"x": torch.rand(5_000_000)}, tmp_path / "made" / "mini" / "mini.safetensors")
    out, asked = card(f"{does}; exit 0", "train", "1", "start=x")
    assert len(asked) == 1 and asked[0].endswith("dtype=bf16 compile=true start=x")
    assert parts(out) == (tmp_path / "made" / "mini" / "mini.safetensors").read_bytes()
    assert len(list(out.glob("w?"))) == 2
    with tarfile.open(out / "run.tar") as tar:
        names = {name.rpartition("/")[2] for name in tar.getnames()}
    assert names == {"training.jsonl", "vocabulary.txt", "sheet-000001.jpg"}


def test_of_a_run_that_fails_twice_all_that_was_learned_comes_home(card, tmp_path):
    out, asked = card(f"{ended(tmp_path)}; exit 1", "train", "1")
    assert ["compile=true" in line for line in asked] == [True, False]
    found = load(parts(out))
    assert found.keys() == {"encoder.x", "clip.x"}
    assert found["encoder.x"].dtype == torch.bfloat16 and found["encoder.x"].sum() == 3


@pytest.mark.slow
def test_a_run_that_hangs_is_ended_and_packed(card, tmp_path):
    out, asked = card(f"{ended(tmp_path)}; exec sleep 60", "train", "-0.3")
    assert len(asked) == 1 and load(parts(out)).keys() == {"encoder.x", "clip.x"}


def test_a_trial_brings_no_model(card, tmp_path):
    out, asked = card(f"{ended(tmp_path)}; exit 0", "trial")
    assert len(asked) == 2 and {file.name for file in out.iterdir()} == {"train.log", "tests.log", "run.tar"}
    where = [ROOT / word for word in asked[1].split() if word.startswith("tests")]
    assert all(place.exists() for place in where)
    marked = [file for file in (ROOT / "tests").rglob("test_*.py") if "@pytest.mark.gpu" in file.read_text()]
    assert all(
        any(file.is_relative_to(place) for place in where) for file in marked if file != Path(__file__)
    )
