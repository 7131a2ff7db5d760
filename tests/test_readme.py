"""The README tells the truth: links lead somewhere, equations stand at their lines, commands exist."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from typer.main import get_command

from reifusion.cli.main import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
ROWS = re.findall(
    r"^\|.+\| (?P<source>[^|\n]+) \| \[[^]]+\]\((?P<path>[^#)]+)#L(?P<line>\d+)\) \|$", README, re.M
)


def test_there_are_equations():
    assert len(ROWS) >= 15


@pytest.mark.parametrize(("source", "path", "line"), ROWS)
def test_equation_stands_at_the_line_that_the_readme_names(source, path, line):
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    places = [number for number, text in enumerate(lines, 1) if source in text]
    assert int(line) in places, f"{source} is now at {path}, line {places}"


def test_links_lead_to_files_of_this_repository():
    links = re.findall(r"\]\((?!https?://)([^)#]+)", README)
    assert links and [link for link in links if not (ROOT / link).exists()] == []


def test_make_targets_of_the_readme_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"make (\w+)", README))
    assert named and named <= targets


def test_the_source_package_has_what_the_readme_and_the_tests_name():
    (line,) = re.findall(r"(?<=sdist]\n)include = .*", (ROOT / "pyproject.toml").read_text("utf-8"))
    links = {link.partition("/")[0] for link in re.findall(r"\]\((?!https?://)([^)#]+)", README)}
    needed = {*links, "Dockerfile", ".dockerignore", "compose.yaml"}
    assert needed <= set(re.findall(r'"([^"]+)"', line))


def test_every_pin_is_for_the_versions_of_python_that_the_readme_names():
    for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines():
        if line[:1] in "#":
            continue
        pin = Requirement(line)
        try:
            installed = distribution(pin.name)
        except PackageNotFoundError:  # for another machine
            continue
        if not pin.specifier.contains(installed.version):
            continue
        wanted = SpecifierSet(",".join(installed.metadata.get_all("Requires-Python") or []))
        for python in "3.10.0", "3.11.2", "3.12.0", "3.13.0":  # 3.11.2: Debian 12's
            here = {"python_full_version": python, "python_version": python.rpartition(".")[0]}
            if pin.marker is None or pin.marker.evaluate(here):
                assert wanted.contains(python), f"{line} is not for Python {python}"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_a_venv_that_was_cut_short_is_made_again(tmp_path):
    for name in "Makefile", "pyproject.toml", "constraints.txt", "README.md":
        shutil.copy(ROOT / name, tmp_path)
    alone = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    env = {**alone, "PIP_NO_INDEX": "1"}
    python = tmp_path / "snake"
    python.write_text('#!/bin/sh\n[ "$1" = -m ] && mkdir -p .venv/bin && touch .venv/bin/python\n')  # too old
    python.chmod(0o755)
    make = ["make", ".venv/ready", f"PYTHON={python}"]
    assert subprocess.run(make, cwd=tmp_path, env=env, capture_output=True).returncode
    assert not (tmp_path / ".venv").exists()  # a Python that is too old leaves nothing behind
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / ".venv"], check=True)
    make[-1] = f"PYTHON={sys.executable}"
    subprocess.run(make, cwd=tmp_path, env=env, capture_output=True)  # fails later: there is no index
    assert list((tmp_path / ".venv" / "bin").glob("pip*"))


def test_flags_of_the_readme_exist():
    group: Any = get_command(app)
    known = {flag for option in group.commands["generate"].params for flag in option.opts}
    flags = {
        flag
        for line in README.splitlines()
        if line.startswith("reifusion generate")
        for flag in re.findall(r" (--[a-z0-9-]+)", line)
    }
    assert flags and flags <= known


# The first commands for a newcomer, each with the output that it must print


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    ("target", "printed"),
    {
        "run": r"images/a-red-apple-\d+\.png",
        "explain": r"explain/words-by-word-a-dog-next-to-a-tree-0\.png",
        "equation": r"reverse-step: (?s:.*)against NumPy in float64: off by \d",
        "bug": r"explain/bugs-.*\.png",
        "studio": r"Opens a page, on this machine only",
    }.items(),
)
def test_the_first_commands_of_the_readme_do_what_it_says(target, printed, tmp_path):
    (line,) = re.findall(rf"^make {target}\b.*?(?=#|$)", README, re.M)
    alone = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    plan = subprocess.run(
        ["make", "--dry-run", *shlex.split(line)[1:]],
        cwd=ROOT, env=alone, capture_output=True, text=True, check=True,
    )  # fmt: skip
    command = shlex.split(plan.stdout.splitlines()[-1])  # the lines before it install packages, once
    assert command[0] in (".venv/bin/reifusion", ".venv/bin/python")
    start = [sys.executable, "-m", "reifusion"] if command[0].endswith("reifusion") else [sys.executable]
    more = ["--help"] if target == "studio" else []  # the studio would run until it is stopped
    done = subprocess.run(
        [*start, *command[1:], *more],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = re.search(printed, done.stdout)
    assert found, done.stdout
    assert not printed.endswith("png") or (tmp_path / found[0]).is_file()


def test_every_box_of_the_diagram_leads_to_a_chapter_and_a_file():
    diagram = README.partition("```mermaid")[2].partition("```")[0]
    boxes = re.findall(r"[\[(](\d [^\])]+)[\])]", diagram)
    rows = re.findall(r"^\| (\d .+?) \| (.+?) \| (.+?) \|", README, re.M)
    told = {box: (chapters, files) for names, chapters, files in rows for box in names.split(", ")}
    assert len(boxes) >= 8 and {*boxes, "4 denoising loop"} <= set(told)
    for chapters, files in told.values():
        assert "](docs/book/" in chapters and "](reifusion/model/" in files


def test_it_answers_in_the_order_in_which_a_newcomer_asks():
    headings = re.findall(r"^## (.+)$", README, re.M)
    asked = ["Run it", "What just happened", "Change something", "Train it", "Use a real model"]
    assert headings[: len(asked)] == asked
