"""`reifusion batch --ray`: a cluster draws what one process draws, even when a worker is killed."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from reifusion.batch.on_ray import draw_on_ray
from reifusion.cli.main import main
from reifusion.weights import save
from tests.tiny import SMALL, WORDS, networks

ROWS = 8


@pytest.fixture
def table(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save(SMALL, networks(SMALL, noise=0.02), tmp_path / "model.safetensors", tokenizer=WORDS)
    rows = [f"{'cat' if k % 2 else 'dog'},{k}" for k in range(ROWS)]
    path = tmp_path / "table.csv"
    path.write_text("\n".join(["prompt,seed", *rows]), "utf-8")
    return path


def command(table: Path, out: str, *more: str) -> list[str]:
    fixed = ["--model", "model.safetensors", "--steps", "30", "--size", "64x64", "--dtype", "fp32"]
    return ["batch", str(table), "--out", out, "--device", "cpu", *fixed, *more]


def pictures(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))}


@pytest.fixture
def cluster() -> Iterator[str]:
    """Two nodes of two cores each, on this machine."""
    pytest.importorskip("ray", reason="needs: pip install reifusion[ray]")
    from ray.cluster_utils import Cluster

    node: dict[str, Any] = {"num_cpus": 2, "object_store_memory": 150 * 2**20}
    started = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    started.add_node(**node)
    yield started.address
    started.shutdown()


def _kill_one(folder: Path, killed: list[int]) -> None:
    """Kills one of the actors when some pictures are there."""
    import psutil  # type: ignore[import-untyped]

    while len(list(folder.glob("*.png"))) < 2:
        time.sleep(0.05)
    for process in psutil.process_iter(["name", "cmdline"]):
        if "MapWorker" in " ".join(process.info["cmdline"] or ()) and process.uids().real == os.getuid():
            process.send_signal(signal.SIGKILL)
            killed.append(process.pid)
            return


@pytest.mark.slow
def test_a_cluster_of_two_draws_the_same_with_a_worker_killed(table, cluster, tmp_path, capsys):
    killed: list[int] = []
    (tmp_path / "many").mkdir()
    killer = threading.Thread(target=_kill_one, args=(tmp_path / "many", killed))
    killer.start()
    assert main(command(table, "many", "--ray", cluster, "--processes", "2")) == 0
    killer.join()
    assert killed
    assert len(capsys.readouterr().out.splitlines()) == ROWS
    assert main(command(table, "one")) == 0
    many, one = pictures(tmp_path / "many"), pictures(tmp_path / "one")
    assert many.keys() == one.keys()
    for name, picture in one.items():  # an actor has other threads than this process, and rounds otherwise
        assert np.abs(many[name].astype(int) - picture).max() <= 1
    lines = [json.loads(line) for line in (tmp_path / "many" / "manifest.jsonl").read_text().splitlines()]
    assert sorted(line["row"] for line in lines) == list(range(ROWS))
    assert main(command(table, "many", "--ray", cluster)) == 0  # there is nothing left to do
    assert "8 of 8 pictures are there already" in capsys.readouterr().err


def test_a_cluster_that_is_not_there_is_said(table, capsys):
    pytest.importorskip("ray", reason="needs: pip install reifusion[ray]")
    assert main(command(table, "many", "--ray", "127.0.0.1:1")) == 1
    assert "there is no Ray cluster at 127.0.0.1:1" in capsys.readouterr().err


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1", "nowhere.invalid:6379"])
def test_an_address_that_is_none_is_said_at_once(address, tmp_path):
    with pytest.raises(RuntimeError, match="there is no Ray cluster at"):
        next(draw_on_ray([], tmp_path, address))
