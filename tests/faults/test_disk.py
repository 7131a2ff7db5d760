"""Full disks, killed processes: what was there is whole, and what is new is whole or absent."""

from __future__ import annotations

import contextlib
import io
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reifusion import album, cli, weights
from reifusion.api import load
from reifusion.files import put, write_text
from reifusion.model.tensors import ModelError
from reifusion.train import __main__ as train
from reifusion.train.checkpoint import TrainingError
from reifusion.train.progress import Progress
from reifusion.weights import save
from reifusion.weights.vae import save_vae
from tests.tiny import SMALL, WORDS, networks

pytestmark = pytest.mark.slow

resource = pytest.importorskip("resource")  # of Unix

MANY = int(os.environ.get("REIFUSION_MANY", 1))  # times as many kills: a longer search, by hand


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    save(SMALL, networks(SMALL, noise=0.05), path, tokenizer=WORDS)
    return str(path)


def run(*arguments: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(list(arguments))
    return code, out.getvalue(), err.getvalue()


def drawing(model: str, out: Path, *more: str) -> list[str]:
    return [
        "generate",
        "--model",
        model,
        "--steps=1",
        "--seed=1",
        "--quiet",
        f"--out={out}",
        *more,
        "--",
        "a cat",
    ]


# Disks that fill up


@contextlib.contextmanager
def limited(size: int) -> Iterator[None]:
    """No file can be larger than this."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk of 64 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("only root can make a small disk")
    yield disk
    subprocess.run(["umount", disk], check=True)


def assert_one_sentence(told: tuple[int, str, str], place: Path) -> None:
    code, out, err = told
    assert (code, out) == (1, "")
    assert err.startswith(f"reifusion: {place}") and "could not be written" in err and err.count("\n") == 1


def test_a_picture_that_does_not_fit_leaves_nothing_behind(model, tmp_path):
    with limited(500):
        assert_one_sentence(run(*drawing(model, tmp_path / "new" / "a.png")), tmp_path / "new")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("to", ["native", "compvis", "diffusers"])
def test_a_model_that_does_not_fit_leaves_nothing_behind(model, tmp_path, to):
    target = tmp_path / ("new" if to == "diffusers" else "new.safetensors")
    with limited(2**15):
        assert_one_sentence(run("convert", f"--to={to}", model, str(target)), target)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_keeps_what_was_there(model, small_disk):
    first = run(*drawing(model, small_disk / "a.png"))
    assert first[0] == 0
    (small_disk / "rest").write_bytes(bytes(2**14))
    before = {path: path.read_bytes() for path in small_disk.iterdir()}
    assert_one_sentence(run("convert", "--to=native", model, f"{small_disk}/new.safetensors"), small_disk)
    with contextlib.suppress(OSError), (small_disk / "full").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(512))
    told = run(*drawing(model, small_disk / "a.png"))
    assert told[0] in (1, 2) and told[2].startswith("reifusion: ") and told[2].count("\n") == 1
    (small_disk / "full").unlink()
    assert {path: path.read_bytes() for path in small_disk.iterdir()} == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a file that is always full")
def test_curves_that_do_not_fit_end_a_training_in_one_sentence(tmp_path):
    said = rf"curves in {tmp_path} could not be written \(No space left"
    with pytest.raises(TrainingError, match=said), Progress(tmp_path, 0, 2, 1) as progress:
        progress.log.close()
        progress.log = open("/dev/full", "w")  # noqa: SIM115 (closed by Progress)
        progress.step(0, 1, {"loss": 1.0})


def test_a_thread_that_finds_the_disk_full_leaves_it_to_the_loop_to_say_so(monkeypatch, capsys):
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    assert train.main(["lora", "--keys"]) == 0
    capsys.readouterr()
    for error, lines in ((OSError(28, "No space left on device"), 0), (ZeroDivisionError(), 2)):
        threading.excepthook(threading.ExceptHookArgs((type(error), error, None, None)))
        assert len(capsys.readouterr().err.splitlines()) == lines


# Processes that are killed, and processes that meet


def begin(*arguments: str) -> int:
    """Starts a command in a copy of this process, which needs no time to import PyTorch; returns its id."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # a fork has none of the parent's other threads
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
            os._exit(cli.main(list(arguments)))
        finally:
            os._exit(70)
    return child


def killed(child: int, after: float) -> None:
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def seconds_of(*arguments: str) -> float:
    """Runs a command, which must succeed, and returns the seconds that it took."""
    start = time.monotonic()
    assert run(*arguments)[0] == 0
    return time.monotonic() - start


def seen(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def test_a_killed_generate_leaves_whole_pictures(model, tmp_path):
    number = random.Random(0)
    seconds = seconds_of(*drawing(model, tmp_path))
    for _ in range(8 * MANY):
        before = len(seen(tmp_path))
        child = begin(*drawing(model, tmp_path, "--num=100"))
        while len(seen(tmp_path)) == before and os.waitpid(child, os.WNOHANG) == (0, 0):
            time.sleep(0.001)  # a slow machine draws the first picture late
        killed(child, number.uniform(0, seconds))
    pictures = seen(tmp_path)
    assert len(pictures) > 8 * MANY
    for path in pictures:
        assert album.read(path).settings.prompt == "a cat" and Image.open(path).size == (32, 32)
    assert run(*drawing(model, tmp_path))[0] == 0


def killed_while_it_writes(size: int, *arguments: str) -> int:
    """Runs a command in a copy of this process, which the kernel kills once a file has so many bytes."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # a fork has none of the parent's other threads
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
            sys.dont_write_bytecode = True  # only the model's file is to reach the limit
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            os._exit(cli.main(list(arguments)))
        finally:
            os._exit(70)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("to", ["native", "diffusers"])
@pytest.mark.parametrize("size", [1, 30_000])
def test_a_convert_that_is_killed_while_it_writes_leaves_nothing_of_that_name(model, tmp_path, to, size):
    target = tmp_path / ("new" if to == "diffusers" else "new.safetensors")
    assert killed_while_it_writes(size, "convert", f"--to={to}", model, str(target)) == -signal.SIGXFSZ
    assert not target.exists()
    assert run("convert", f"--to={to}", model, str(target))[0] == 0
    weights.load(str(target))  # reads every tensor


def test_processes_that_draw_into_the_same_folder_lose_no_picture(model, tmp_path):
    children = [begin(*drawing(model, tmp_path / "cat.png", "--num=6")) for _ in range(3)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"cat.png", *(f"cat-{k}.png" for k in range(2, 19))}
    seeds = sorted(album.read(tmp_path / name).settings.seed or 0 for name in names)
    assert seeds == sorted([1, 2, 3, 4, 5, 6] * 3)


def test_processes_that_write_the_same_model_leave_a_whole_one(model, tmp_path):
    for to, target in (("native", tmp_path / "new.safetensors"), ("diffusers", tmp_path / "new")):
        children = [begin("convert", f"--to={to}", model, str(target)) for _ in range(3)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert 0 in codes and set(codes) <= {0, 1, 2}
        weights.load(str(target))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "new.safetensors"]


@pytest.mark.parametrize("to", ["native", "diffusers"])
def test_a_folder_with_something_in_it_is_left_alone(model, tmp_path, to):
    pipe = load(model, "cpu", "fp32")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(ModelError, match="mine is a folder that is there already"):
        save_vae(pipe, tmp_path / "mine", to)
    with pytest.raises(IsADirectoryError, match="mine is a folder, so no file was written there"):
        write_text(tmp_path / "mine", "x")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


def test_a_name_is_never_given_twice(tmp_path, monkeypatch):
    names: list[str] = []
    monkeypatch.setattr("reifusion.files.free", lambda path: path.with_name(names.pop()))
    for links in (True, False):
        names[:] = ["c.png", "b.png", "a.png"]
        (tmp_path / "a.png").write_text("taken")
        (tmp_path / "b.png").symlink_to("nowhere")
        (tmp_path / "new").write_text("new")
        if not links:
            monkeypatch.setattr(
                os, "link", lambda *_: (_ for _ in ()).throw(PermissionError(1, "no links here"))
            )
        assert put(tmp_path / "new", tmp_path / "a.png") == tmp_path / "c.png"
        assert [(tmp_path / name).read_text() for name in ("a.png", "c.png")] == ["taken", "new"]
        for path in tmp_path.iterdir():
            path.unlink()


# A home that cannot be written to


def test_a_home_and_a_cache_that_cannot_be_written_to_do_not_matter(model, tmp_path):
    (tmp_path / "file").write_text("not a folder, so that nobody, not even root, can write into it")
    nowhere = str(tmp_path / "file" / "home")
    places = ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "HF_HOME", "TORCH_HOME", "TORCHINDUCTOR_CACHE_DIR")
    done = subprocess.run(
        [sys.executable, "-m", "reifusion", *drawing(model, tmp_path / "a.png")],
        capture_output=True, text=True, env=os.environ | dict.fromkeys(places, nowhere), check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert np.asarray(Image.open(tmp_path / "a.png")).std() > 0
