"""The benchmark's own promises: it compares comparable things, and survives contenders that fail."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from bench import contenders, report, speed, weights
from bench.contenders import CONTENDERS
from bench.rows import (
    AS_IS,
    BUSY,
    DECODE,
    IMPORT,
    KEPT,
    LOAD,
    MEMORY,
    PHASES,
    REFERENCE,
    ROWS,
    SHELL,
    STEP,
    Result,
    Row,
)
from bench.speed import Bench, Worker, measure

LIMITS = {
    "matmul bfloat16, TFLOP/s": 1.0,
    "convolution bfloat16, TFLOP/s": 2.0,
    "matmul float32, TFLOP/s": 0.5,
    "convolution float32, TFLOP/s": 0.25,
    "bandwidth, GB/s": 20.0,
}
MACHINE = {
    "cpu": "a CPU",
    "threads": 2,
    "abilities": ["AMX"],
    "accelerator": "none used",
    "python": "3",
    "versions": {},
}
FACTS = {
    "date": "2026-01-01",
    "load": 0.1,
    "quick": False,
    "machine": MACHINE,
    "limits": LIMITS,
    "missing": [],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "CACHE", tmp_path_factory.mktemp("cache"))
        made = weights.make_weights(quick=True)
        assert weights.make_weights(quick=True) == made  # made once
    return made


class Fake:
    """A contender whose first call takes one second, the next two; some contenders fail, and some die."""

    started: ClassVar[list[str]] = []
    closed: ClassVar[list[str]] = []

    def __init__(self, name: str, folder: Path, device: str, environment: dict[str, str]):
        self.name, self.calls, self.folder = name, 0, folder
        self.hello = {"loaded": 1.0, "peak": 9.0}
        Fake.started.append(name)

    def do(self, request: dict) -> dict:
        self.calls += 1
        if self.name == "diffusers bf16":
            return {"error": "RuntimeError: no"}
        if self.name == "OpenVINO bf16" and self.calls > 2:
            return {"error": "its process ended with -9"}
        path = self.folder / f"{self.name}.npy"
        np.save(path, np.ones(3) + 0.5 * self.name.startswith("reifusion"))
        return {"seconds": float(self.calls), "peak": 5.0, "before": 3.0, "output": str(path)}

    def alive(self) -> bool:
        return self.name != "OpenVINO bf16" or self.calls <= 2

    def close(self) -> None:
        Fake.closed.append(self.name)


@pytest.fixture
def bench(tmp_path, monkeypatch) -> Bench:
    Fake.started, Fake.closed = [], []
    monkeypatch.setattr(speed, "Worker", Fake)
    monkeypatch.setattr(speed, "count_flops", lambda *_: 1000.0)
    monkeypatch.setattr(speed, "context_width", lambda folder: 64)
    return Bench(tmp_path, tmp_path / "out", FACTS, "cpu", rounds=3, minutes=60)


def cells(text: str) -> dict[str, list[str]]:
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {first: rest for first, *rest in rows}


def saved(bench: Bench) -> dict[str, Result]:
    written = json.loads((bench.out / "results.json").read_text())["results"]
    return {result["contender"]: Result(**result) for result in written}


def test_contenders_take_turns_and_a_failure_does_not_stop_the_others(bench):
    row = Row("a", "unet")
    names = [REFERENCE, "diffusers bf16", "OpenVINO bf16", "reifusion bf16"]
    speed.prepare(bench, [row])
    measure(bench, [row], names, KEPT)
    found = saved(bench)
    assert found[REFERENCE].seconds == [2, 3, 4] and found[REFERENCE].error == 0  # the first warms up
    assert found["reifusion bf16"].error == pytest.approx(0.5) and found["reifusion bf16"].added == 2
    assert found["diffusers bf16"].note == "RuntimeError: no" and not found["diffusers bf16"].seconds
    assert found["OpenVINO bf16"].note == "its process ended with -9"
    assert sorted(Fake.started) == sorted(Fake.closed)


def test_a_dead_contender_gets_another_process_for_the_next_row(bench):
    measure(bench, [Row("a", "unet"), Row("b", "unet", warm_up=False, patience=0)], ["OpenVINO bf16"], KEPT)
    assert Fake.started == 2 * ["OpenVINO bf16"]
    assert bench.results["b", "OpenVINO bf16", KEPT].seconds == [1]


def test_a_row_that_takes_long_has_fewer_rounds_but_at_least_one(bench):
    rows = [Row("a", "unet", patience=0), Row("b", "picture", warm_up=False, patience=0), Row("c", "vae")]
    measure(bench, rows, ["reifusion bf16"], KEPT)
    assert [len(result.seconds) for result in bench.results.values()] == [1, 1, 3]


def test_the_first_of_many_pictures_is_compared_with_the_only_one(bench):
    exact = speed.exact_file(bench, Row(STEP, "unet"))
    exact.parent.mkdir()
    np.save(exact, np.array([1.5, 7.0]))
    measure(bench, [Row("a", "unet", batch=3)], ["reifusion bf16"], KEPT)
    assert bench.results["a", "reifusion bf16", KEPT].error == 0


def test_a_contender_leaves_when_nothing_is_left_for_it(bench):
    rows = [Row("a", "unet"), Row("b", "unet", contenders=("reifusion bf16",))]
    measure(bench, rows, ["reifusion fp32", "reifusion bf16"], KEPT)
    assert Fake.started == ["reifusion fp32", "reifusion bf16"] and Fake.closed == Fake.started
    assert ("b", "reifusion fp32", KEPT) not in bench.results


def test_existing_results_are_not_measured_again_and_nothing_begins_too_late(bench):
    measure(bench, [Row("a", "unet")], ["reifusion bf16"], KEPT)
    measure(bench, [Row("a", "unet")], ["reifusion bf16"], KEPT)
    assert len(Fake.started) == 1
    bench.end = 0
    measure(bench, [Row("b", "unet")], ["reifusion bf16"], KEPT)
    speed.measure_memory(bench, MEMORY[0], ["reifusion bf16"], AS_IS)
    assert len(Fake.started) == len(bench.results) == 1


def test_memory_counts_from_the_start_of_the_process(bench):
    speed.measure_memory(bench, MEMORY[1], ["reifusion bf16", "diffusers bf16"], AS_IS)
    found = saved(bench)
    assert (found["reifusion bf16"].peak, found["reifusion bf16"].added) == (9, 2)
    assert found["diffusers bf16"].note == "RuntimeError: no"


def test_every_row_has_exact_numbers_from_one_reference_and_a_contender():
    rows = {row.name: row for _, _, rows in PHASES for row in rows} | {row.name: row for row in MEMORY}
    for row in rows.values():
        assert row.contenders and set(row.contenders) <= set(CONTENDERS)
        assert row.kind in ("text", "unet", "vae", "picture")
    assert len(rows) == sum(len(group) for group in (ROWS, speed.SCALING, MEMORY))
    assert speed.plain(STEP) == "unet step with guidance, 512x512"


def test_other_pictures_are_not_compared():
    x = np.ones((2, 3), np.float32)
    assert speed.relative_error(x, x) == 0
    assert speed.relative_error(1.5 * x, x) == pytest.approx(0.5)
    assert speed.relative_error(x, None) is None
    assert speed.relative_error(x, x[:1]) is None


def test_the_median_counts_and_each_side_has_its_better_allocator():
    results = [
        Result(STEP, REFERENCE, AS_IS, [8.0, 9.0, 40.0], 0.0, gflop=1000),
        Result(STEP, REFERENCE, KEPT, [6.0, 5.0, 4.0], 0.0, gflop=1000),
        Result(STEP, "reifusion bf16", AS_IS, [3.0], 0.01, gflop=1000),
        Result(STEP, "reifusion bf16", KEPT, [2.5, 2.5], 0.01, gflop=1000),
        Result(STEP, "OpenVINO bf16", KEPT, note="RuntimeError: no"),
    ]
    text = report.report(FACTS | {"missing": ["stable-diffusion.cpp f16"]}, results, plotted=False)
    found = cells(text)
    assert found[REFERENCE][:5] == ["9.000", "5.000", "2.00", "40%", "0.0e+00"]  # 1 TFLOP in 5 s of 0.5
    assert found["reifusion bf16"][:5] == ["3.000", "2.500", "1.00", "20%", "1.0e-02"]  # in 2.5 s of 2
    assert found["OpenVINO bf16"][0] == "RuntimeError: no"
    assert "Not installed, so not here: stable-diffusion.cpp f16." in text


def test_aims_are_met_not_met_or_not_measured():
    results = [
        Result(STEP, "diffusers bf16", KEPT, [3.0]),
        Result(STEP, "reifusion bf16", KEPT, [2.0]),
        Result(DECODE, "diffusers bf16", KEPT, [3.0]),
        Result(DECODE, "reifusion bf16", KEPT, [2.0]),
        Result(LOAD, "diffusers bf16", AS_IS, [4.0]),
        Result(LOAD, "reifusion bf16", AS_IS, [1.0]),
        *(
            Result(IMPORT, name, AS_IS, [s])
            for name, s in (("torch", 2.0), ("diffusers", 4.0), ("reifusion", 2.0))
        ),
        Result(SHELL, "reifusion", KEPT, [5.0]),
        Result(SHELL, "reifusion, threads that wait long", KEPT, [4.0]),
        Result(BUSY, "reifusion", KEPT, [10.0]),
        Result(MEMORY[0].name, "reifusion bf16", AS_IS, [1.0], peak=6, added=2),
        Result(MEMORY[0].name, "diffusers bf16 channels-last", AS_IS, [1.0], peak=10, added=8),
    ]
    verdicts = [(found, verdict) for _, _, found, verdict in report.targets(results)]
    assert verdicts == [
        ("1.50", "met"),
        ("not measured", ""),
        ("1.50", "**not met**"),
        ("0.25", "met"),
        ("not measured", ""),
        ("0.25", "met"),
        ("0.50", "**not met**"),
        ("3.00", "met"),
        ("2.00", "met"),
        ("1.25", "**not met**"),
    ]


def test_the_report_is_made_of_the_file_alone(tmp_path, capsys):
    results = [
        Result(row.name, "reifusion bf16", KEPT, [1.0], 0.01, 5, 2, 1000) for row in (*ROWS, *speed.SCALING)
    ]
    (tmp_path / "results.json").write_text(json.dumps(FACTS | {"results": [asdict(r) for r in results]}))
    assert speed.main(["--render", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "RESULTS.md").read_text()
    assert all(f"## {row.name}" in text for row in ROWS) and "| 8 × 512×512 | 1.000 | 0.125 |" in text
    assert "speed.svg" in text and "<svg" in (tmp_path / "speed.svg").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["RESULTS.md", "results.json", "speed.svg"]


@pytest.mark.slow
def test_flops_are_those_of_the_plain_arithmetic(folder):
    def count(kind: str = "unet", width: int = 256, batch: int = 1) -> float:
        return weights.count_flops(folder, kind, width, 256, batch, steps=3)

    step, vae, text = count(), count("vae"), count("text")
    assert min(step, vae, text) > 0
    assert count(batch=2) == pytest.approx(2 * step)
    assert count("picture") == pytest.approx(text + 3 * step + vae)
    assert count(width=512) > 2 * step  # attention grows faster than the picture


def test_a_contender_answers_with_seconds_memory_and_numbers(folder, monkeypatch):
    """The contender runs in this process; the next test gives it a process of its own."""
    request = {**asdict(Row("a", "unet", 64, 64)), "context_width": weights.context_width(folder)}
    asked = [
        request,
        request,
        request | {"name": "b", "kind": "picture", "width": 65},
        request | {"name": "c", "kind": "vae"},
    ]
    answers = io.StringIO()
    monkeypatch.setattr(sys, "argv", ["", "reifusion fp32", str(folder), "cpu"])
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(json.dumps(one) + "\n" for one in asked)))
    monkeypatch.setattr(contenders, "own_stdout", lambda: answers)
    with torch.enable_grad():  # the contender switches gradients off; this restores them
        contenders.main()
    assert torch.is_grad_enabled()
    hello, first, second, failed, decoded = map(json.loads, answers.getvalue().splitlines())
    assert hello["loaded"] > 0
    output = speed.take(first["output"])
    assert output.shape == (2, 4, 8, 8) and np.isfinite(output).all() and output.std() > 0
    assert second["seconds"] > 0 and second["peak"] >= second["before"] > 0 and "output" not in second
    assert "ValueError" in failed["error"]
    assert speed.take(decoded["output"]).shape == (1, 3, 64, 64)  # and it goes on


def test_a_contender_that_cannot_start_or_hangs_is_a_note(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    worker = Worker("reifusion fp32", tmp_path, "cpu", {})
    assert "ended with 1" in worker.hello["error"]
    assert "error" in worker.do({"name": "a"})
    worker.close()
    hanging = tmp_path / "hanging"
    hanging.write_text("#!/bin/sh\nexec sleep 60\n")
    hanging.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(hanging))
    worker = Worker("reifusion fp32", tmp_path, "cpu", {}, limit=0.2)
    assert "ended with -9" in worker.hello["error"]
    worker.close()


def test_wrong_options_are_refused_before_anything_runs(capsys, tmp_path):
    wrong = (
        ["--rows", "no such row"],
        ["--contenders", "nobody"],
        ["--rounds", "0"],
        ["--render", "--out", str(tmp_path)],
    )
    for options in wrong:
        with pytest.raises(SystemExit) as ended:
            speed.main(options)
        assert ended.value.code == 2
    assert "no row has 'no such row'" in capsys.readouterr().err


def test_a_run_goes_on_where_it_stopped(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "Worker", Fake)
    monkeypatch.setattr(speed, "make_weights", lambda quick: folder)
    monkeypatch.setattr(speed, "count_flops", lambda *_: 1000.0)
    monkeypatch.setattr("bench.limits.measure_limits", lambda device: LIMITS)
    options = ["--quick", "--contenders", "reifusion bf16", "--rounds", "1", "--out", str(tmp_path)]

    def rows() -> list[str]:
        return [result["row"] for result in json.loads((tmp_path / "results.json").read_text())["results"]]

    assert speed.main([*options, "--rows", "vae,384"]) == 0
    assert rows() == [DECODE, ROWS[5].name, speed.SCALING[0].name, DECODE]  # the last as it is
    before, Fake.started = rows(), []
    assert speed.main([*options, "--rows", "vae,768x512", "--resume"]) == 0
    assert len(rows()) == 5 and rows()[:4] == before and Fake.started == ["reifusion bf16"]
    assert f"## {DECODE}" in (tmp_path / "RESULTS.md").read_text()
