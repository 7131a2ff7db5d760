"""Famous bugs of Stable Diffusion 3: each shows, leaves nothing behind, and has a test that catches it."""

import re
from pathlib import Path

import numpy as np
import pytest

from reifusion.explain.bugs import gallery
from reifusion.explain.bugs_sd3 import SD3_BUGS
from reifusion.families.sd3 import StableDiffusion3
from reifusion.model.request import Request
from tests.tiny_sd3 import TINY, networks, tokenizers

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def pipe():
    return StableDiffusion3(TINY, tokenizers(), networks())


@pytest.mark.parametrize("bug", SD3_BUGS.values(), ids=SD3_BUGS)
def test_the_number_gives_it_away_and_comes_back(pipe, bug):
    right = bug.measure(pipe)
    with bug.switched_on(pipe):
        wrong = bug.measure(pipe)
    assert wrong != pytest.approx(right, rel=0.02, abs=0.01)
    assert bug.measure(pipe) == right


@pytest.mark.parametrize("bug", SD3_BUGS.values(), ids=SD3_BUGS)
def test_the_picture_changes_and_comes_back(pipe, bug):
    right, wrong = bug.draw(pipe, "a cat", steps=3, size=(48, 32))
    assert (np.asarray(right) != np.asarray(wrong)).any()
    again, _ = bug.draw(pipe, "a cat", steps=3, size=(48, 32))
    assert np.array_equal(np.asarray(right), np.asarray(again))


@pytest.mark.parametrize("bug", SD3_BUGS.values(), ids=SD3_BUGS)
def test_the_test_that_would_catch_it_exists(bug):
    path, _, name = bug.test.partition("::")
    assert re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.M)


def test_the_gallery_is_of_the_family_s_own_bugs(pipe):
    exhibit = gallery(pipe, Request("a cat", steps=2, seed=0, sampler="flow"))
    assert list(exhibit.numbers) == list(SD3_BUGS)
    with pytest.raises(ValueError, match="there is no bug 'wrong-eps'; there are scale-shift-swapped"):
        gallery(pipe, Request("a cat", steps=2, seed=0), ["wrong-eps"])
