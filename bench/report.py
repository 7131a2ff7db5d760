"""Turns the results of `bench.speed`, results.json, into a report for people: RESULTS.md and speed.svg."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.rows import (
    BRIEFLY,
    BUSY,
    DECODE,
    IMPORT,
    KEPT,
    LOAD,
    LONG,
    MEMORY,
    OURS,
    ROWS,
    SCALING,
    SHELL,
    STEP,
    Result,
)
from reifusion.files import whole, write_text

EAGER = ("diffusers fp32", "diffusers bf16", "diffusers bf16 channels-last")
HEAD = """
*Share*: the row's plain arithmetic by that time, of the faster of matmul and convolution in the contender's
dtype; who does less arithmetic for the same numbers may exceed 100 %. *Error*: that of the numbers against
diffusers's in float32, relative to their norm. *Blocks kept*: large blocks of memory stay in the process, as
`reifusion generate` has it; given to all alike. *Peak*: resident memory, at most, while the row ran. *Rounds*:
what the median is of. A step is one beyond the first of a picture: for reifusion, keys and values of the words
are there.
"""


def write(folder: Path) -> None:
    """Reads results.json in the folder, and writes the report and the plot beside it."""
    facts = json.loads((folder / "results.json").read_text())
    results = [Result(**result) for result in facts.pop("results")]
    plotted = plot(results, folder / "speed.svg")
    write_text(folder / "RESULTS.md", report(facts, results, plotted))


def report(facts: dict[str, Any], results: Sequence[Result], plotted: bool) -> str:
    about, limits = facts["machine"], facts["limits"]
    abilities = ", ".join(about["abilities"]) or "no bfloat16 instructions"
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    kernels = ", ".join("{0} {2:.2f}{1}".format(*name.split(","), value) for name, value in limits.items())
    lines = [
        "# How fast it is",
        "",
        f"`make bench`, {facts['date']}: {about['cpu']}, {about['threads']} threads, {abilities}; accelerator: "
        f"{about['accelerator']}; Python {about['python']}, {versions}. Load before: {facts['load']}.",
    ]
    if facts["quick"]:
        lines += ["", "**Only a trial: a small model, and a quarter of each side.**"]
    if facts["missing"]:
        lines += ["", f"Not installed, so not here: {', '.join(facts['missing'])}."]
    lines += ["", f"What single kernels reach here: {kernels}.", "", "## What was aimed at", ""]
    lines += ["| | aim | found | |", "|---|---:|---:|---|"]
    lines += [f"| {what} | {aim} | {found} | {verdict} |" for what, aim, found, verdict in targets(results)]
    lines += ["", *["![Seconds, as bars](speed.svg)", ""] * plotted, *HEAD.strip().splitlines(), ""]
    for row in (row.name for row in ROWS):
        lines += table(row, [result for result in results if result.row == row], limits)
    lines += scaling(results)
    for row in (LOAD, IMPORT, SHELL, BUSY, *(row.name for row in MEMORY)):
        lines += small_table(row, [result for result in results if result.row == row])
    return "\n".join(lines).rstrip() + "\n"


def table(row: str, results: Sequence[Result], limits: dict[str, float]) -> list[str]:
    if not results:
        return []
    allocators = sorted({result.allocator for result in results})
    head = ["contender", *(f"s, {a}" for a in allocators), "× ours", "share", "error", "peak MB", "rounds"]
    lines = [f"## {row}", "", f"| {' | '.join(head)} |", "|---" + "|---:" * (len(head) - 1) + "|"]
    ours = fastest(results, row, OURS)
    for name in dict.fromkeys(result.contender for result in results):
        its = {result.allocator: result for result in results if result.contender == name}
        timed = [result for result in its.values() if result.seconds]
        if not timed:
            lines.append(f"| {name} | {next(iter(its.values())).note} |" + " |" * (len(head) - 2))
            continue
        one = min(timed, key=lambda result: result.median)
        speed = one.gflop / one.median / 1e3
        cells = [f"{its[a].median:.3f}" if a in its and its[a].seconds else "" for a in allocators]
        cells.append(f"{one.median / ours:.2f}" if ours else "")
        cells.append(f"{speed / limit_of(limits, name):.0%}")
        cells.append("another picture" if one.error is None else f"{one.error:.1e}")
        cells += [f"{one.peak:.0f}", str(len(one.seconds))]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def limit_of(limits: dict[str, float], contender: str) -> float:
    """Returns the TFLOP/s of matmul or convolution, the faster of the two, in the contender's dtype."""
    full = contender.split()[1:2] == ["fp32"]
    return max(value for name, value in limits.items() if "FLOP" in name and ("float32" in name) == full)


def scaling(results: Sequence[Result]) -> list[str]:
    by_row = {row.name: row for row in (*ROWS, *SCALING) if row.kind == "unet"}
    found = [
        r for r in results if r.row in by_row and r.contender in OURS and r.allocator == KEPT and r.seconds
    ]
    found.sort(key=lambda r: (by_row[r.row].batch, by_row[r.row].width * by_row[r.row].height))
    if len(found) < 2:
        return []
    lines = ["## Scaling: reifusion bf16, a step with guidance", ""]
    lines += [
        "| pictures × size | s | s a picture | GFLOP/s | error | peak MB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for r in found:
        row = by_row[r.row]
        error = "" if r.error is None else f"{r.error:.1e}"
        cells = (
            f"{r.median:.3f} | {r.median / row.batch:.3f} | {r.gflop / r.median:.0f} | {error} | {r.peak:.0f}"
        )
        lines.append(f"| {row.batch} × {row.width}×{row.height} | {cells} |")
    return [*lines, ""]


def small_table(row: str, results: Sequence[Result]) -> list[str]:
    if not results:
        return []
    lines = [f"## {row}", "", "| | memory | s | rounds | peak MB | added MB |"]
    lines.append("|---|---|---:|---:|---:|---:|")
    for r in results:
        cells = [f"{r.median:.3f}", str(len(r.seconds))] if r.seconds else [r.note, ""]
        cells += [f"{value:.0f}" if value else "" for value in (r.peak, r.added)]
        name = f"{r.contender}, {r.note}" if r.seconds and r.note else r.contender
        lines.append(f"| {name} | {r.allocator} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def fastest(results: Iterable[Result], row: str, names: Sequence[str]) -> float | None:
    return min(
        (r.median for r in results if r.row == row and r.contender in names and r.seconds), default=None
    )


def targets(results: Sequence[Result]) -> list[tuple[str, str, str, str]]:
    """Returns each target's name, aim and result, and whether it is met, each side with its better allocator."""

    def seconds(row: str, *names: str) -> float | None:
        return fastest(results, row, names)

    def memory(row: str, name: str, kind: str) -> float | None:
        its = (getattr(r, kind) for r in results if r.row == row and r.contender == name and r.seconds)
        return min(its, default=None)

    def over(one: float | None, other: float | None) -> float | None:
        return one / other if one and other else None

    last, shell, torch = EAGER[-1], seconds(SHELL, BRIEFLY), seconds(IMPORT, "torch")
    decode, draw = (row.name for row in MEMORY)
    found: list[tuple[str, Callable[[float, float], bool], float, float | None]] = [
        ("a step at 512×512: times as fast as diffusers, eager", at_least, 1.5, over(seconds(STEP, *EAGER), seconds(STEP, *OURS))),
        ("the same: times as fast as OpenVINO", at_least, 1.15, over(seconds(STEP, "OpenVINO bf16"), seconds(STEP, *OURS))),
        ("VAE decode at 512×512: times as fast as diffusers, eager", at_least, 2, over(seconds(DECODE, *EAGER), seconds(DECODE, *OURS))),
        ("its memory, added to that of the weights, of diffusers's", at_most, 0.5, over(memory(decode, *OURS, "added"), memory(decode, last, "added"))),
        ("peak memory of a picture, of diffusers's", at_most, 0.75, over(memory(draw, *OURS, "peak"), memory(draw, last, "peak"))),
        ("time to load, of diffusers's", at_most, 0.5, over(seconds(LOAD, *OURS), seconds(LOAD, *EAGER))),
        ("time to import beyond torch, of diffusers's", at_most, 0.35, over(seconds(IMPORT, "reifusion"), seconds(IMPORT, "diffusers"))),
        ("seconds from shell to PNG, the mini, torch's import apart", at_most, 4, shell and torch and shell - torch),
        ("the same, with a busy program on each core: times as long", at_most, 2.5, over(seconds(BUSY, BRIEFLY), shell)),
        ("what it costs on a quiet machine that threads wait briefly", at_most, 1.03, over(shell, seconds(SHELL, LONG))),
    ]  # fmt: skip
    rows = []
    for what, enough, aim, value in found:
        sign = "≥" if enough is at_least else "≤"
        if value is None:
            rows.append((what, f"{sign} {aim}", "not measured", ""))
        else:
            rows.append(
                (what, f"{sign} {aim}", f"{value:.2f}", "met" if enough(value, aim) else "**not met**")
            )
    return rows


def at_least(value: float, aim: float) -> bool:
    return value >= aim


def at_most(value: float, aim: float) -> bool:
    return value <= aim


def plot(results: Sequence[Result], path: Path) -> bool:
    """Draws bars, a panel for each row. Returns False if there is nothing to show, or no matplotlib."""
    rows = [row.name for row in ROWS if any(r.seconds for r in results if r.row == row.name)]
    try:
        import matplotlib
    except ImportError:
        return False
    if not rows:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "reifusion"}):
        bars = {
            row: {r.contender: fastest(results, row, [r.contender]) for r in results if r.row == row}
            for row in rows
        }
        heights = [0.9 + 0.25 * len(bars[row]) for row in rows]
        size: dict[str, Any] = {
            "figsize": (8, sum(heights)),
            "height_ratios": heights,
            "layout": "constrained",
        }
        figure, axes = pyplot.subplots(len(rows), 1, squeeze=False, **size)
        for row, ax in zip(rows, axes[:, 0]):
            times = {name: seconds for name, seconds in bars[row].items() if seconds}
            names = sorted(times, key=times.__getitem__, reverse=True)
            colours = ["tab:orange" if "reifusion" in name else "tab:gray" for name in names]
            ax.bar_label(
                ax.barh(names, [times[name] for name in names], color=colours), fmt="%.3g s", padding=3
            )
            ax.set_title(row, loc="left")
            ax.margins(x=0.15)
            ax.spines[["top", "right"]].set_visible(False)
        with whole(path) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    return True
