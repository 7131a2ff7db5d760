"""The notebooks ask questions, and are kept small and clean. `make demo` checks that they run."""

import ast
import base64
import io
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from notebooks.execute import LARGEST, main, notebooks, small_png

PARTS = [path for path in notebooks() if path.parent.name == "notebooks"]
ALL = pytest.mark.parametrize("path", notebooks(), ids=lambda path: path.stem)
EACH = pytest.mark.parametrize("path", PARTS, ids=lambda path: path.stem)
ROOT = PARTS[0].parent.parent


def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def outputs(path: Path) -> list[dict]:
    return [output for cell in cells(path) for output in cell.get("outputs", [])]


@EACH
def test_it_is_short_and_asks_after_each_idea(path):
    found = cells(path)
    assert 10 <= len(found) <= 22
    ideas = [source(cell) for cell in found if source(cell).startswith("## ")]
    assert ideas and [idea for idea in ideas if "**Try:**" not in idea] == []


@EACH
def test_its_first_code_installs_what_a_hosted_notebook_lacks(path):
    first = next(source(cell) for cell in cells(path) if cell["cell_type"] == "code")
    assert "%pip install" in first and 'find_spec("reifusion") is None' in first


@EACH
def test_it_uses_nothing_that_the_package_does_not_bring(path):
    code = "\n".join(source(c) for c in cells(path) if c["cell_type"] == "code" and "%pip" not in source(c))
    modules = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name) or ""
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert "reifusion" in {module.partition(".")[0] for module in modules}
    assert {"docs", "tests", "bench"}.isdisjoint(module.partition(".")[0] for module in modules)


@ALL
def test_its_stored_outputs_are_small_and_reveal_nothing_about_a_machine(path):
    kept = outputs(path)
    assert kept
    for output in kept:
        assert output["output_type"] != "error"
        assert output.get("name") != "stderr"
        for picture in [output["data"]["image/png"]] if "image/png" in output.get("data", {}) else []:
            assert len(base64.b64decode(picture)) <= LARGEST
    text = json.dumps([{k: v for k, v in o.get("data", {}).items() if "image" not in k} for o in kept])
    text += "".join("".join(o.get("text", "")) for o in kept)
    assert not re.search(r"/(home|root|tmp|Users|work)/", text)


@ALL
def test_its_links_lead_somewhere(path):
    text = "\n".join(source(cell) for cell in cells(path) if cell["cell_type"] == "markdown")
    links = re.findall(r"\]\((?!https?://)([^)#]+)", text)
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_each_chapter_of_the_book_is_in_a_notebook_or_needs_none():
    text = "".join(source(cell) for path in PARTS for cell in cells(path))
    beside = {"symbols.md", "glossary.md", "references.md"}
    chapters = {path.name for path in (ROOT / "docs" / "book").glob("*.md")} - beside
    left = {name for name in chapters if f"docs/book/{name}" not in text}
    # These need a real checkpoint, a quiet machine, hours or models that are not here; `explain toy` is last.
    assert left == {"checkpoints.md", "speed.md", "sdxl.md", "sd3.md", "toy.md", "ablations.md"}


def test_a_large_picture_is_made_small_enough_and_stays_the_same_picture():
    gradient = Image.linear_gradient("L").resize((900, 700))
    picture = Image.merge("RGB", (gradient, gradient.rotate(90).resize((900, 700)), gradient.rotate(180)))
    file = io.BytesIO()
    picture.save(file, "PNG")
    smaller = Image.open(io.BytesIO(small_png(file.getvalue(), 40_000)))
    assert len(small_png(file.getvalue(), 40_000)) <= 40_000
    middle = smaller.convert("RGB").getpixel((smaller.width // 2, smaller.height // 2))
    assert max(abs(a - b) for a, b in zip(middle, picture.getpixel((450, 350)))) < 24  # type: ignore[arg-type]


def test_an_unknown_name_is_answered_with_the_known_ones(capsys):
    assert main(["nonsense"]) == 2
    assert "3-words" in capsys.readouterr().err
