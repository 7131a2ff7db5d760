"""The README tells the truth: links lead somewhere, equations stand where it says, commands exist."""

import re
from pathlib import Path

import pytest

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


def test_flags_of_the_readme_exist():
    source = (ROOT / "reifusion" / "cli.py").read_text()
    flags = {
        flag
        for line in README.splitlines()
        if line.startswith("reifusion g")
        for flag in re.findall(r" --([a-z-]+)", line)
    }
    assert flags and [flag for flag in flags if f"{flag.replace('-', '_')}:" not in source] == []
