"""The book's counts and drawings of the code are true."""

import json
import subprocess
import sys

import pytest

from docs import imports, reading
from docs.equation import NotFound, error, find, latex, statement
from docs.equations import ROOT, equations
from docs.walk import STORED, ours, walked


def test_the_model_imports_none_of_its_users():
    used = {whom for who, whom in imports.imports() if who == "model"}
    assert used.isdisjoint({"cli", "train", "explain", "studio", "api", "settings", "album"})


def test_the_command_line_imports_the_rest_only_when_it_is_used():
    at_once = {whom for (who, whom), now in imports.imports().items() if who == "cli" and now}
    assert at_once <= {"files", "errors", "settings", "threads", "explain"}  # of explain, the texts
    at_once = {whom for (who, whom), now in imports.imports().items() if who in at_once - {"explain"} and now}
    assert at_once <= {"model", "spelling"}  # of the model, the length of a sentence
    heavy = {"torch", "numpy", "PIL", "matplotlib"}
    code = f"import sys, reifusion.cli.explain; print({heavy} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "set()\n"


def test_the_parts_stand_above_what_they_need_and_no_two_need_each_other():
    edges, heights = imports.imports(), imports.levels(imports.imports())
    assert all(heights[who] > heights[whom] for who, whom in edges)
    assert heights["cli"] == max(heights.values())
    with pytest.raises(ValueError, match="a circle"):
        imports.levels(edges | {("model", "cli"): False})


def test_an_arrow_that_others_imply_is_left_out():
    edges = {("a", "b"): True, ("b", "c"): True, ("a", "c"): True, ("a", "d"): False}
    assert imports.direct(edges) == {("a", "b"): True, ("b", "c"): True, ("a", "d"): False}


def test_the_diagram_names_every_part():
    drawn = imports.diagram()
    assert all(f">{name}</text>" in drawn for name in imports.parts())


def test_the_reading_order_knows_every_file_of_the_model():
    assert reading.left_out() == []
    assert "model/pipeline.py" in reading.table() and "kernels/fast.py" in reading.later()


def test_minutes_grow_with_the_lines():
    short, long = (reading.Stop((f"reifusion/model/{name}.py",), "", ()) for name in ("config", "samplers"))
    assert short.lines() < long.lines() and short.minutes() < long.minutes()


def test_a_walk_counts_the_lines_that_run_in_the_packages_named_and_no_others():
    from reifusion.model.ddpm import DDPMSampler

    def call() -> None:
        DDPMSampler().set_inference_timesteps(5)
        json.dumps({})

    found = walked(call, "reifusion")
    assert set(found) == {f"reifusion/model/{name}.py" for name in ("ddpm", "other_betas", "spacing")}
    run, length = found["reifusion/model/ddpm.py"]
    assert 5 < run < length == len((ROOT / "reifusion/model/ddpm.py").read_text().splitlines())


def test_one_picture_of_ours_walks_through_the_model_and_nothing_else():
    files = ours()
    assert {"reifusion/model/pipeline.py", "reifusion/model/diffusion.py"} <= set(files)
    assert all(name.startswith("reifusion/model/") for name in files)


def test_the_stored_walk_names_its_versions():
    stored = json.loads(STORED.read_text())
    assert set(stored["versions"]) == {"diffusers", "transformers"}
    assert sum(run for run, _ in stored["files"].values()) > 500


# The equation behind a line


@pytest.mark.parametrize("equation", [e for e in equations() if e.path and e.chapter], ids=lambda e: e.id)
def test_each_equation_is_found_from_its_line_and_its_name(equation):
    known = equations()
    assert find(equation.place, known) == find(equation.id, known) == equation
    assert latex(equation) and f"[{equation.id}]" in statement(equation)


def test_a_statement_of_several_lines_is_shown_whole():
    shown = statement(find("posterior-mean", equations()))
    assert "mean = (" in shown and shown.rstrip().endswith(")") and "(1 - alpha_bar) * x0" in shown


def test_its_error_is_that_of_its_test():
    away, within = error(find("guidance", equations()))
    assert 0 < away <= within <= 1e-5


@pytest.mark.parametrize("what", ["nonsense", "model/ddpm.py", "model/config.py:3", "model/ddpm.py:1"])
def test_a_line_without_an_equation_gets_one_sentence(what):
    with pytest.raises(NotFound, match="equation"):
        find(what, equations())


def test_formulas_can_be_read_in_a_terminal():
    from docs.equation import readable

    assert readable(r"\sqrt{\bar\alpha_t}\,x_0 + \frac{a}{b}\;\hat\epsilon") == "√(ᾱ_t) x_0 + (a) / (b) ε̂"
    texts = [readable(latex(equation)) for equation in equations() if equation.chapter]
    assert all(text and not set(text) & set("\\{}") for text in texts)


def test_a_folder_that_is_no_book_is_left_alone_and_a_build_that_failed_is_repeated(tmp_path, monkeypatch):
    from docs import build

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(build.Wrong, match="mine is no book, so it was left as it is"):
        build.build(["contents.md"], tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()
    monkeypatch.setattr(build, "render", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            build.build(["contents.md"], tmp_path / "site")
