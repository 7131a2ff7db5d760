"""Famous bugs: each shows while it is switched on, leaves nothing behind, and has a test that catches it."""

import re
from pathlib import Path

import numpy as np
import pytest

import reifusion
from reifusion.explain.bugs import BUGS, gallery
from reifusion.model.request import Request

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def pipe():
    return reifusion.load(dtype="fp32")


@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_the_number_gives_it_away_and_comes_back(pipe, bug):
    right = bug.measure(pipe)
    with bug.switched_on(pipe):
        wrong = bug.measure(pipe)
    assert wrong != pytest.approx(right, rel=0.02, abs=0.01) or (bug.name == "wrong-gelu" and wrong != right)
    assert bug.measure(pipe) == right


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_the_picture_changes_unless_the_bug_sleeps(pipe, bug):
    right, wrong = bug.draw(pipe, "a red apple", steps=4)
    if bug.name != "wrong-eps":  # too quiet for 8 bits: some pictures change by a level, some do not at all
        assert (np.asarray(right) != np.asarray(wrong)).any() == (bug.name != "unclamped-variance")
    again, _ = bug.draw(pipe, "a red apple", steps=4)
    assert np.array_equal(np.asarray(right), np.asarray(again))


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_the_picture_shows_what_its_text_claims(pipe, bug):
    assert bug.claim is not None and bug.claim(*bug.draw(pipe, seed=1))


@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_the_test_that_would_catch_it_exists(bug):
    path, _, name = bug.test.partition("::")
    assert re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.M)


def test_there_are_at_least_twelve_and_each_says_what_it_does():
    assert len(BUGS) >= 12
    assert all(bug.title and bug.effect and bug.number for bug in BUGS.values())
    assert all(bug.made.startswith("https://") for bug in BUGS.values())


def test_the_gallery_shows_the_difference_and_names_the_number(pipe):
    exhibit = gallery(pipe, Request("a cat", steps=1, sampler="ddim", seed=0), ["wrong-gelu"])
    texts = [text.get_text() for text in exhibit.figure.texts]
    assert "difference × 8" in texts and BUGS["wrong-gelu"].number in texts
    bug = BUGS["wrong-gelu"]  # one alone is explained: what was done, and which test finds it
    assert exhibit.guide.startswith(f"wrong-gelu: {bug.title}. {bug.effect}") and bug.test in exhibit.guide
