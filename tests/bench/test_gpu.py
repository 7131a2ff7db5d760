"""The benchmark on a GPU, tried on a CPU: it runs to its end whatever fails, and says what it has found."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu
from bench.gpu import Bench, Part, main, report

pytestmark = pytest.mark.slow


@pytest.fixture
def without_diffusers(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        gpu.importlib.util, "find_spec", lambda name: None if name == "diffusers" else found(name)
    )


@pytest.mark.slow
def test_the_whole_script_runs_in_a_small_way(without_diffusers, tmp_path):
    assert main(["--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    facts = json.loads((tmp_path / "gpu.json").read_text())
    assert list(facts) == [part.work.__name__ for part in gpu.PARTS]
    assert all("failed" not in found for found in facts.values())
    assert facts["parity"]["reifusion float32"]["U-Net"] < 1e-4
    assert facts["played"]["U-Net"] is facts["played"]["DeepCache"] is facts["played"]["LCM"] is True
    assert facts["mini"]["failed to draw"] == {} and facts["mini"]["drew"] > 4
    assert facts["training"]["exit code"] == 0 and facts["training"]["last lines"]
    assert "not installed" in facts["compiled_theirs"]["left out"] == facts["eager_theirs"]["left out"]
    text = (tmp_path / "GPU.md").read_text()
    assert "Only a trial of the script" in text and text == report(facts)
    assert "| a U-Net's step, of compiled diffusers's | 0.8 |  | not measured |" in text


def test_parity_is_measured_beside_diffusers(tmp_path):
    assert main(["--quick", "--device", "cpu", "--out", str(tmp_path), "--only", "parity"]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())["parity"]
    assert found["reifusion float32"]["decoder"] < 1e-4
    for name, ours in found["reifusion bfloat16"].items():
        assert 0 < ours < 1.5 * found["diffusers bfloat16"][name]


def test_a_part_that_fails_or_has_no_time_does_not_stop_the_next(tmp_path, capsys):
    def fails(bench: Bench, found: dict[str, Any]) -> None:
        found["so far"] = 1
        raise RuntimeError("no room")

    def works(bench: Bench, found: dict[str, Any]) -> None:
        found["figure"] = 2

    def late(bench: Bench, found: dict[str, Any]) -> None:
        raise AssertionError("there was no time for it")

    bench = Bench(tmp_path, "cpu", minutes=1, quick=False)
    bench.run([Part(fails, 10), Part(works, 10), Part(late, 61)])
    facts = json.loads((tmp_path / "gpu.json").read_text())
    assert facts["fails"]["so far"] == 1 and facts["fails"]["failed"] == "RuntimeError: no room"
    assert "were left" in facts["late"]["left out"] and facts["works"]["figure"] == 2


def test_where_diffusers_cannot_be_loaded_our_own_figures_are_not_lost(tmp_path, monkeypatch):
    def versions(bench: Bench, dtype: Any) -> Any:
        raise ImportError("cannot import name")

    monkeypatch.setattr(Bench, "_load_theirs", versions)
    assert (
        main(["--quick", "--device", "cpu", "--out", str(tmp_path), "--only", "parity", "eager_theirs"]) == 1
    )
    facts = json.loads((tmp_path / "gpu.json").read_text())
    assert facts["parity"]["reifusion float32"]["U-Net"] < 1e-4
    assert "could not be loaded" in facts["eager_theirs"]["left out"]
    assert facts["diffusers"]["failed"] == "ImportError: cannot import name"


def test_a_step_of_diffusers_is_called_as_its_pipeline_does_it(tmp_path, monkeypatch):
    """Any other call is compiled anew, for a minute."""
    bench, seen = Bench(tmp_path, "cpu", 1, quick=True), []
    their = bench.load_theirs(bench.half)
    forward = type(their.unet).forward

    def kind(x: Any) -> Any:
        return (x.shape, x.stride(), x.dtype, x.device) if isinstance(x, torch.Tensor) else x

    def called(self: Any, *inputs: Any, **more: Any) -> Any:
        seen.append(({name: kind(x) for name, x in more.items()}, [kind(x) for x in inputs]))
        return forward(self, *inputs, **more)

    monkeypatch.setattr(type(their.unet), "forward", called)
    width = their.unet.config.cross_attention_dim
    with torch.inference_mode():
        gpu.step_of(bench, their.unet, bench.latents(2), bench.words(2, width))()
        gpu.their_picture(bench, their)()
    assert len(seen) == 3 and seen[0] == seen[1] == seen[2]


def test_of_a_training_its_course_is_told(tmp_path, monkeypatch):
    def trained(bench: Bench, found: Any, module: list[str], folder: Path, most: float) -> None:
        (folder / "runs" / "mini").mkdir(parents=True)
        rows = [
            {"step": k, "loss": 1.0, "smoothed": 1 / (k + 1), "samples_per_second": 6e3} for k in range(9)
        ]
        lines = [json.dumps(row) for row in (*rows, {"step": 9, "held_out": 0.3})]
        (folder / "runs" / "mini" / "training.jsonl").write_text("\n".join(lines))

    monkeypatch.setattr(gpu, "tell", trained)
    found: dict[str, Any] = {}
    gpu.training(Bench(tmp_path, "cuda", minutes=1, quick=False), found)
    assert found["mini, step 3"] == {"smoothed": "0.25", "samples_per_second": "6e+03"} and len(found) == 9


def test_what_a_program_says_of_its_own_is_kept_though_it_is_stopped(tmp_path):
    (tmp_path / "says.py").write_text(
        "import sys, time\nprint('reifusion: slower', file=sys.stderr, flush=True)\n"
        "print(*range(40), sep='\\n', flush=True)\ntime.sleep(60)"
    )
    found: dict[str, Any] = {}
    gpu.tell(Bench(tmp_path, "cpu", minutes=1, quick=True), found, ["says"], tmp_path, most=5)
    assert found["exit code"] == "stopped after 5 s"
    assert found["last lines"][0] == "reifusion: slower" and "39" in found["last lines"]


def test_goals_are_judged_by_the_figures():
    step, picture = "ms a step of 1", "ms a picture"
    facts: dict[str, Any] = {
        "speed": {f"{step}: reifusion as it comes": 5.0, f"{picture}: reifusion as it comes": 300.0},
        "compiled_theirs": {f"{step}: diffusers compiled": 6.9, f"{picture}: diffusers compiled": 400.0},
        "first": {"seconds to the first picture: mini": [7.5, 3.0]},
        "mini": {"ms a picture": 60},
    }
    lines = report(facts).splitlines()
    assert "| a U-Net's step, of compiled diffusers's | 0.8 | 0.725 | met |" in lines
    assert "| a picture of 20 steps, of compiled diffusers's | 0.55 | 0.75 | **not met** |" in lines
    assert "| a picture of 20 steps, of eager diffusers's | 0.3 |  | not measured |" in lines
    assert "| the mini's picture, ms | 60 | 60 | met |" in lines
    assert "| first picture of the mini after start, s | 5 | 7.5 | **not met** |" in lines


def test_the_page_in_the_repository_is_that_of_the_figures_in_it():
    figures = gpu.HERE / "gpu.json"
    facts = json.loads(figures.read_text()) if figures.exists() else {}
    text = (gpu.HERE / "GPU.md").read_text()
    assert text == report(facts)
    assert ("has not been run to its end on a GPU yet" in text) == (not facts)
    assert not facts.get("about", {}).get("quick")


def test_without_a_gpu_it_says_so_in_one_sentence(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        main([])
    assert "PyTorch finds no CUDA device on this machine" in capsys.readouterr().err
