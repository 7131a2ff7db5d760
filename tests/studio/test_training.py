"""The studio's page of trainings: what it tells of a run, and the one that it starts."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="the studio needs: pip install reifusion[studio]")
from fastapi.testclient import TestClient

from reifusion.studio import training
from reifusion.studio.routes import Studio, build
from reifusion.studio.training import POINTS


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder with a run of 2,000 steps, logged in every second."""
    run = tmp_path / "runs" / "mine" / "tiny"
    run.mkdir(parents=True)
    rows: list[dict[str, Any]] = [
        {"step": n, "time": 50.0 + n, "loss": 1 / (1 + n)} for n in range(0, 2000, 2)
    ]
    rows[500:500] = [{"step": 1000, "time": 1049.0, "held_out": 0.25, "seen": 0.2}]
    log = "".join(json.dumps(row) + "\n" for row in rows)
    (run / "training.jsonl").write_text(log + '{"step": 2000, "ti')  # it is writing
    for step in (0, 1000):
        Image.new("RGB", (8, 8), "red").save(run / f"sheet-{step:06d}.png")
    (run / "lora.safetensors").write_bytes(b"no model")
    return tmp_path / "runs"


def page(runs: Path) -> TestClient:
    return TestClient(build(Studio("mini", runs / "images", runs=runs)), base_url="http://127.0.0.1")


def test_a_run_is_told_as_its_log_has_it(runs):
    client = page(runs)
    assert client.get("/api/training").json() == {
        "runs": ["mine/tiny"], "going": False, "said": "", "failed": False
    }  # fmt: skip
    found = client.get("/api/training/run", params={"name": "mine/tiny"}).json()
    assert found["steps"] == 1998 and found["sheets"] == [0, 1000] and found["model"] is None
    assert found["held_out"] == [[1000, 0.25]] and found["seen"] == [[1000, 0.2]]
    assert found["loss"][0] == [0, 1.0] and POINTS <= len(found["loss"]) <= 2 * POINTS
    assert all(b[1] <= a[1] for a, b in zip(found["smooth"], found["smooth"][1:]))
    assert found["minutes"] == round(1998 / 60, 1)
    picture = client.get("/api/training/sheet", params={"name": "mine/tiny", "step": 1000})
    assert picture.headers["content-type"] == "image/png" and len(picture.content) > 50
    assert "training.js" in client.get("/training").text and '"/training"' in client.get("/").text


def test_a_log_is_read_again_only_when_it_was_written(runs, monkeypatch):
    client = page(runs)
    read: list[Path] = []
    curves = training._curves

    def kept(run: Path) -> dict[str, Any]:
        read.append(run)
        return curves(run)

    monkeypatch.setattr(training, "_curves", kept)
    name = "mine/tiny"
    first = [client.get("/api/training/run", params={"name": name}).json() for _ in range(3)][-1]
    assert len(read) == 1
    log = runs / name / "training.jsonl"
    log.write_text(log.read_text() + "\n" + json.dumps({"step": 10_000, "loss": 0.5, "time": 1e9}) + "\n")
    os.utime(log, (2e9, 2e9))
    assert client.get("/api/training/run", params={"name": name}).json()["steps"] == 10_000 > first["steps"]
    assert len(read) == 2
    log.unlink()  # while somebody looks at it
    answer = client.get("/api/training/run", params={"name": name})
    assert answer.status_code == 400 and "there is no run" in answer.json()["note"]


def test_a_run_that_has_only_begun_is_told(runs):
    run = runs / "new"
    run.mkdir()
    (run / "training.jsonl").write_text("")
    found = page(runs).get("/api/training/run", params={"name": "new"}).json()
    assert found["steps"] == 0 and found["loss"] == [] and found["sheets"] == []


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("run?name=other", "there is no run 'other'"),
        ("run?name=../runs/mine/tiny", "there is no run '../runs/mine/tiny'"),
        ("sheet?name=mine/tiny&step=7", "has no sheet of step 7"),
    ],
)
def test_what_is_not_there_is_said(runs, path, said):
    answer = page(runs).get(f"/api/training/{path}")
    assert answer.status_code == 400 and said in answer.json()["note"]


@pytest.mark.parametrize("minutes", [0, -1, 1e9, "nan"])
def test_a_time_must_be_one(runs, minutes):
    answer = page(runs).post("/api/training/start", json={"minutes": minutes})
    assert answer.status_code == 400 and "above 0 and at most 1440 minutes" in answer.json()["note"]


def test_another_page_cannot_start_one(runs):
    answer = page(runs).post(
        "/api/training/start", json={"minutes": 1}, headers={"Origin": "http://elsewhere"}
    )
    assert answer.status_code == 403


def until(true: Any, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.2)


@pytest.mark.slow
def test_one_is_started_stopped_gone_on_with_and_complete(tmp_path):
    client = page(tmp_path)

    def state() -> dict[str, Any]:
        return client.get("/api/training").json()

    def seen(name: str) -> int:
        return client.get("/api/training/run", params={"name": name}).json()["steps"]

    client.post("/api/training/start", json={"minutes": 60})
    second = client.post("/api/training/start", json={"minutes": 1})
    assert second.status_code == 400 and "going on already" in second.json()["note"]
    until(lambda: state()["runs"] == ["studio-1/tiny-vae"] and seen("studio-1/tiny-vae") > 0)
    client.post("/api/training/stop", json={})
    assert not state()["going"] and not state()["failed"]
    assert (tmp_path / "studio-1" / "tiny-vae" / "checkpoint.pt").exists()

    client.post("/api/training/start", json={"minutes": 0.2})
    until(lambda: not state()["going"])
    assert state()["said"] == "Done." and not (tmp_path / "studio-2").exists()
    found = client.get("/api/training/run", params={"name": "studio-1/tiny"}).json()
    assert found["sheets"] and Path(found["model"]) == tmp_path / "studio-1" / "tiny" / "tiny.safetensors"


@pytest.mark.slow
@pytest.mark.browser
def test_the_page_shows_curve_and_sheets_and_follows_the_log(runs, browser, artifacts):
    from reifusion.studio.serve import serve

    running = serve("mini", None, False, str(runs / "images"))
    running.studio.trainings.folder = runs
    view = browser.new_page(viewport={"width": 360, "height": 800})
    wrong: list[str] = []
    view.on("pageerror", lambda error: wrong.append(str(error)))
    try:
        view.goto(f"{running.address}training")
        view.wait_for_selector("#losses polyline.noise", state="attached")
        assert "1,998 steps, 33.3 minutes" in view.inner_text("#about")
        assert view.inner_text("#caption") == "after 1,000 steps, 2 of 2"
        view.wait_for_function("document.querySelector('#sheet img').naturalWidth === 8")
        assert view.evaluate("document.documentElement.scrollWidth") == 360
        run = runs / "mine" / "tiny"
        Image.new("RGB", (16, 8), "blue").save(run / "sheet-002000.png")
        with (run / "training.jsonl").open("a") as log:
            log.write('me": 1}\n' + json.dumps({"step": 2000, "time": 2051.0, "loss": 0.001}) + "\n")
        view.wait_for_function(
            "document.querySelector('#caption').textContent === 'after 2,000 steps, 3 of 3'"
        )
        view.wait_for_function("document.querySelector('#sheet img').naturalWidth === 16")
        view.fill("#place", "0")
        view.wait_for_function("document.querySelector('#sheet img').src.endsWith('step=0')")
        view.screenshot(path=artifacts / "training.png", full_page=True)
        assert wrong == []
    finally:
        view.close()
        running.close()
