"""Measures speed: all contenders in one run, in turns, on the same weights and inputs: `make bench`.

A row is a piece of work: one step of the U-Net, or a decoded picture. In each round every contender does the
row once, so that other work on the machine slows all of them alike; the median of the rounds counts. Every
output is compared with that of diffusers in float32: a fast wrong answer is no result.

Each contender is a process, so its crash cannot stop the others. Results are written to `results.json` at
once: `--resume` continues a run that stopped, and `--render` only writes the report again.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bench import report
from bench.contenders import CONTENDERS, STEPS, installed
from bench.rows import (
    ALLOCATORS,
    AS_IS,
    BEST,
    BUSY,
    IMPORT,
    KEPT,
    LOAD,
    MEMORY,
    OURS,
    PHASES,
    PROCESSES,
    REFERENCE,
    ROWS,
    SCALING,
    SHELL,
    STEP,
    THREADS,
    WAITING,
    Result,
    Row,
)
from bench.weights import CACHE, context_width, count_flops, make_weights
from reifusion.files import whole, write_json

HERE = Path(__file__).parent


class Worker:
    """A contender's process. Even if it crashes, it answers: with figures, or with the error."""

    def __init__(self, name: str, folder: Path, device: str, environment: dict[str, str], limit: float = 600):
        command = [sys.executable, "-m", "bench.contenders", name, str(folder), device]
        self.limit = limit  # seconds for an answer
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=HERE.parent,
            # Keeps the compiled contenders' code.
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(CACHE / "inductor"), **environment},
        )
        self.hello = self._read()

    def do(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except OSError:
            return {"error": "its process has ended"}
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        timer = threading.Timer(self.limit, self.process.kill)
        timer.start()
        line = self.process.stdout.readline()
        timer.cancel()
        return json.loads(line) if line else {"error": f"its process ended with {self.process.wait()}"}

    def alive(self) -> bool:
        return self.process.poll() is None

    def close(self) -> None:
        try:
            self.process.communicate(timeout=20)
        except (subprocess.TimeoutExpired, OSError):
            self.process.kill()
            self.process.wait()


class Bench:
    """The settings of a run, and its results so far."""

    def __init__(
        self, folder: Path, out: Path, facts: dict[str, Any], device: str, rounds: int, minutes: float
    ):
        self.folder, self.out, self.facts, self.device, self.rounds = folder, out, facts, device, rounds
        self.end = time.monotonic() + 60 * minutes
        self.results: dict[tuple[str, str, str], Result] = {}

    def late(self) -> bool:
        return time.monotonic() > self.end

    def lacks(self, row: str, names: Sequence[str], allocator: str) -> bool:
        return any((row, name, allocator) not in self.results for name in names)

    def keep(self, *results: Result) -> None:
        for result in results:
            self.results[result.row, result.contender, result.allocator] = result
            print(result, flush=True)
        write_json(
            self.out / "results.json", self.facts | {"results": [asdict(r) for r in self.results.values()]}
        )

    def worker(self, name: str, allocator: str) -> Worker:
        return Worker(name, self.folder, self.device, ALLOCATORS[allocator])

    def request(self, row: Row) -> dict[str, Any]:
        return asdict(row) | {"context_width": context_width(self.folder)}


def measure(bench: Bench, rows: Sequence[Row], names: Sequence[str], allocator: str) -> None:
    """Measures the rows; their contenders take turns. A process lives as long as there is work for it."""
    workers: dict[str, Worker] = {}
    todo = [(row, who) for row in rows if (who := [name for name in names if name in row.contenders])]
    todo = [(row, who) for row, who in todo if bench.lacks(row.name, who, allocator)]
    try:
        for i, (row, who) in enumerate(todo):
            if bench.late():
                return
            for name in who:
                if name not in workers or not workers[name].alive():
                    workers[name] = bench.worker(name, allocator)
            bench.keep(*_in_turns(bench, row, {name: workers[name] for name in who}, allocator))
            needed = {name for _, later in todo[i + 1 :] for name in later}
            for name in workers.keys() - needed:
                workers.pop(name).close()
    finally:
        for worker in workers.values():
            worker.close()


def _in_turns(bench: Bench, row: Row, workers: dict[str, Worker], allocator: str) -> list[Result]:
    shape = (row.kind, row.width, row.height, row.batch, row.steps)
    gflop = count_flops(bench.folder, *shape)
    results = {name: Result(row.name, name, allocator, gflop=gflop) for name in workers}
    exact, request, start = exact_numbers(bench, row), bench.request(row), 0.0
    for turn in range(row.warm_up + bench.rounds):
        if turn == row.warm_up:
            start = time.monotonic()
        elif turn > row.warm_up and time.monotonic() - start > row.patience:
            break
        for name, result in results.items():
            if result.note:
                continue
            answer = workers[name].do(request)
            if answer.get("seconds") is None:
                result.note = answer.get("error", "cannot be asked for this")
                continue
            if turn == 0:
                output = take(answer["output"])
                result.error = relative_error(output[:1] if row.batch > 1 else output, exact)
            if turn >= row.warm_up:
                result.seconds.append(answer["seconds"])
                result.peak = max(result.peak, answer["peak"])
                result.added = max(result.added, answer["peak"] - answer["before"])
    return list(results.values())


# The reference's output


def exact_file(bench: Bench, row: Row) -> Path:
    name = STEP if row.batch > 1 else row.name  # the first of many pictures is the same as alone
    return bench.folder / "exact" / (re.sub(r"\W+", "-", name) + ".npy")


def exact_numbers(bench: Bench, row: Row) -> np.ndarray | None:
    path = exact_file(bench, row)
    if not path.exists():
        return None
    return np.load(path)[:1] if row.batch > 1 else np.load(path)


def prepare(bench: Bench, rows: Sequence[Row]) -> None:
    """Has the reference do each row once, and keeps its output for this run and later ones."""
    missing = [row for row in rows if row.batch == 1 and not exact_file(bench, row).exists()]
    if not missing:
        return
    print(f"once: exact numbers of {len(missing)} rows", flush=True)
    worker = bench.worker(REFERENCE, KEPT)
    for row in missing:
        if bench.late():
            break
        answer = worker.do(bench.request(row))
        if "output" in answer:
            output = take(answer["output"])
            with whole(exact_file(bench, row)) as path, path.open("wb") as file:
                np.save(file, output)
        else:
            print(f"{row.name}: no exact numbers; {REFERENCE}: {answer.get('error')}", flush=True)
    worker.close()


def take(path: str) -> np.ndarray:
    output = np.load(path)
    os.unlink(path)
    return output


def relative_error(output: np.ndarray, exact: np.ndarray | None) -> float | None:
    """Returns the error relative to the norm of `exact`; None if there is nothing to compare with."""
    if exact is None or output.shape != exact.shape:
        return None
    return float(np.linalg.norm(output - exact) / np.linalg.norm(exact))


# Rows that need a fresh process


def measure_memory(bench: Bench, row: Row, names: Sequence[str], allocator: str) -> None:
    """Measures the memory that a process needs from its start to the end of its first picture."""
    for name in names:
        if bench.lacks(row.name, [name], allocator) and not bench.late():
            worker = bench.worker(name, allocator)
            answer = worker.do(bench.request(row))
            worker.close()
            result = Result(row.name, name, allocator, note=answer.get("error", ""))
            if "output" in answer:
                take(answer["output"])
                result.seconds = [answer["seconds"]]
                result.peak = max(worker.hello["peak"], answer["peak"])
                result.added = answer["peak"] - answer["before"]
            bench.keep(result)


def measure_load(bench: Bench, names: Sequence[str]) -> None:
    """Measures loading: from the file to networks that are ready to draw."""
    if not bench.lacks(LOAD, names, AS_IS):
        return
    results = {name: Result(LOAD, name, AS_IS) for name in names}
    for _ in range(min(bench.rounds, 3)):
        for name, result in results.items():
            worker = bench.worker(name, AS_IS)
            worker.close()
            if "error" in worker.hello:
                result.note = worker.hello["error"]
            else:
                result.seconds.append(worker.hello["loaded"])
                result.peak = max(result.peak, worker.hello["peak"])
    bench.keep(*results.values())


# A lazy package counts as imported when its main name is; torch comes first, so that it is not counted.
_TIMED = "import time; {} start = time.perf_counter(); {}; print(time.perf_counter() - start)"
_IMPORTS = {
    "torch": _TIMED.format("", "import torch"),
    "reifusion": _TIMED.format("import torch;", "import reifusion; reifusion.generate"),
    "diffusers": _TIMED.format("import torch;", "import diffusers; diffusers.StableDiffusionPipeline"),
}


def measure_imports(bench: Bench) -> None:
    names = [name for name in _IMPORTS if importlib.util.find_spec(name)]
    if not bench.lacks(IMPORT, names, AS_IS):
        return
    results = {name: Result(IMPORT, name, AS_IS) for name in names}
    for _ in range(bench.rounds):
        for name, result in results.items():
            done = subprocess.run([sys.executable, "-c", _IMPORTS[name]], capture_output=True, text=True)
            if done.returncode:
                result.note = done.stderr.strip().splitlines()[-1]
            else:
                result.seconds.append(float(done.stdout.split()[-1]))
    bench.keep(*results.values())


def measure_shell(bench: Bench, row: str) -> None:
    """Measures the time from the shell to the PNG, with the mini, as for a user, on a quiet or a busy machine."""
    if not bench.lacks(row, list(WAITING), KEPT):
        return
    results = {name: Result(row, name, KEPT) for name in WAITING}  # the command line keeps its blocks itself
    out = CACHE / "shell"
    command = [sys.executable, "-m", "reifusion", "generate", "a red apple", "--seed", "1", "--quiet"]
    command += ["--steps", str(STEPS), "--out", str(out)]
    outside = {name: value for name, value in os.environ.items() if name not in THREADS}
    busy = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(busy) for _ in range(os.cpu_count() or 1) if row == BUSY]
    try:
        for _ in range(bench.rounds):
            for name, result in results.items():
                start = time.perf_counter()
                done = subprocess.run(command, capture_output=True, text=True, env=outside | WAITING[name])
                if done.returncode:
                    result.note = done.stderr.strip().splitlines()[-1]
                else:
                    result.seconds.append(time.perf_counter() - start)
                    Path(done.stdout.strip()).unlink()
    finally:
        for other in others:
            other.kill()
            other.wait()
    bench.keep(*results.values())


def plain(name: str) -> str:
    """Returns a name that is easy to type: U-Net becomes unet, 512×512 becomes 512x512."""
    return name.lower().replace("-", "").replace("×", "x")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.speed", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rows", default="", help="only rows with one of these in their name, comma-separated"
    )
    parser.add_argument("--contenders", default="", help="only those whose names begin so, comma-separated")
    parser.add_argument("--rounds", type=int, default=5, help="at most")
    parser.add_argument("--minutes", type=float, default=1e6, help="after these, no row begins")
    parser.add_argument(
        "--prepare", action="store_true", help="only what is done once: weights, exact numbers"
    )
    parser.add_argument("--resume", action="store_true", help="only what is not in results.json yet")
    parser.add_argument("--render", action="store_true", help="only write the report of results.json again")
    parser.add_argument(
        "--quick", action="store_true", help="a small model and small pictures, to try this out"
    )
    parser.add_argument("--out", type=Path, help="where RESULTS.md, results.json and speed.svg go")
    options = parser.parse_args(argv)
    if options.rounds < 1:
        parser.error("--rounds is 1 at least")
    chosen = [name for name in CONTENDERS if name.startswith(tuple(options.contenders.split(",")))]
    if not chosen:
        parser.error(f"no contender's name begins like that; there are {', '.join(CONTENDERS)}")
    all_rows = [*(row.name for row in (*ROWS, *SCALING, *MEMORY)), *PROCESSES]
    parts = [part.strip() for part in plain(options.rows).split(",")]
    wanted = [row for row in all_rows if any(part in plain(row) for part in parts)]
    if not wanted:
        parser.error(f"no row has {options.rows!r} in its name; there are {'; '.join(all_rows)}")
    out = options.out or (CACHE / "quick" if options.quick else HERE)
    if options.render:
        if not (out / "results.json").exists():
            parser.error(f"there is no results.json in {out} yet")
        report.write(out)
        return 0

    import torch

    from bench.limits import machine, measure_limits

    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = [name for name in chosen if installed(name)]
    folder = make_weights(options.quick)
    facts: dict[str, Any] = {"quick": options.quick, "machine": machine(device)}
    old = json.loads((out / "results.json").read_text()) if (out / "results.json").exists() else {}
    same = all(old.get(name) == fact for name, fact in facts.items())
    facts |= {
        "date": time.strftime("%Y-%m-%d"),
        "load": round(os.getloadavg()[0], 2),
        "missing": [name for name in CONTENDERS if not installed(name)],
        "limits": measure_limits(device),
    }
    bench = Bench(folder, out, facts, device, options.rounds, options.minutes)

    def smaller(row: Row) -> Row:
        shrunk = {"width": row.width // 4, "height": row.height // 4} if options.quick else {}
        return Row(**(vars(row) | shrunk))

    def those(rows: Sequence[Row]) -> list[Row]:
        return [smaller(row) for row in rows if row.name in wanted]

    if REFERENCE in names:
        prepare(bench, those([*ROWS, *SCALING]))
    if "OpenVINO bf16" in names:
        command = [sys.executable, "-m", "bench.contenders", "OpenVINO bf16", str(folder), "convert"]
        subprocess.run(command, cwd=HERE.parent, capture_output=True)  # if it fails, the contender says so
    if options.prepare:
        return 0
    if same and (options.resume or len(wanted) < len(all_rows) or len(chosen) < len(CONTENDERS)):
        for kept in (Result(**result) for result in old["results"]):
            if (
                options.resume
                or kept.row not in wanted
                or kept.contender not in (*names, *_IMPORTS, *WAITING)
            ):
                bench.results[kept.row, kept.contender, kept.allocator] = kept
    try:
        for together, allocator, rows in PHASES[:2]:
            measure(bench, those(rows), [name for name in together if name in names], allocator)
        for row in those(MEMORY):
            for allocator, together in ((AS_IS, BEST), (KEPT, OURS)):
                measure_memory(bench, row, [name for name in together if name in names], allocator)
        if LOAD in wanted and not bench.late():
            loaded = ("diffusers bf16", "diffusers bf16 channels-last", *OURS)
            measure_load(bench, [name for name in loaded if name in names])
        if IMPORT in wanted and not bench.late():
            measure_imports(bench)
        for shell in (SHELL, BUSY):
            if shell in wanted and not bench.late():
                measure_shell(bench, shell)
        for together, allocator, rows in PHASES[2:]:
            measure(bench, those(rows), [name for name in together if name in names], allocator)
    except KeyboardInterrupt:
        print("stopped; --resume goes on from here", file=sys.stderr)
    if bench.results:
        report.write(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
