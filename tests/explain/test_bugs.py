"""Famous bugs: each shows while it is switched on, leaves nothing behind, and has a test that catches it."""

import re
from pathlib import Path

import numpy as np
import pytest

import reifusion
from reifusion.explain.bugs import BUGS, gallery
from reifusion.model.request import Request
from tests.model import test_pipeline as pipelines
from tests.model import test_samplers as samplers

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def pipe():
    return reifusion.load(dtype="fp32")


@pytest.fixture(scope="module")
def known():
    """Right pictures, each drawn once for all bugs that share it."""
    return {}


@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_the_number_gives_it_away_and_comes_back(pipe, bug):
    right = bug.measure(pipe)
    with bug.switched_on(pipe):
        wrong = bug.measure(pipe)
    assert wrong != pytest.approx(right, rel=0.02, abs=0.01) or (bug.name == "wrong-gelu" and wrong != right)
    assert bug.measure(pipe) == right


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_the_picture_changes_unless_the_bug_sleeps(pipe, bug, known):
    right, wrong = bug.draw(pipe, "a red apple", known=known, steps=4)
    if bug.name != "wrong-eps":  # too quiet for 8 bits: some pictures change by a level, some do not at all
        assert (np.asarray(right) != np.asarray(wrong)).any() == (bug.name != "unclamped-variance")
    again, _ = bug.draw(pipe, "a red apple", steps=4)
    assert np.array_equal(np.asarray(right), np.asarray(again))


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_the_picture_shows_what_its_text_claims(pipe, bug, known):
    assert bug.claim is not None and bug.claim(*bug.draw(pipe, seed=1, known=known))


@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_the_test_that_would_catch_it_exists(bug):
    path, _, name = bug.test.partition("::")
    assert re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.M)


def _knows_the_picture(pipe):
    kind = pipe.config.schedule.prediction_type
    samplers.test_a_network_that_knows_the_picture_leads_to_it("ddim", kind, 13, 1.0)


# Those that are switched on in classes or in this pipeline, where the test looks as well.
CAUGHT = {
    "no-offset": lambda pipe: samplers.test_leading_timesteps_have_stable_diffusions_offset(),
    "linear-betas": lambda pipe: samplers.test_schedule_is_stable_diffusions(),
    "noise-reused": lambda pipe: samplers.test_each_step_draws_noise_of_its_own("euler_a"),
    "wrong-prediction-type": _knows_the_picture,
    "guidance-swapped": pipelines.test_guidance_goes_from_the_negative_prompt_to_the_prompt_and_beyond,
}


@pytest.mark.parametrize("name", CAUGHT)
def test_the_test_that_it_names_fails_while_it_is_on(pipe, name):
    CAUGHT[name](pipe)
    with BUGS[name].switched_on(pipe), pytest.raises(AssertionError):
        CAUGHT[name](pipe)


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
