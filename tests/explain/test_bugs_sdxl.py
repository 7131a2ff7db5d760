"""Famous bugs of Stable Diffusion XL: each shows, leaves nothing behind, and has a test that catches it."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from reifusion.explain.bugs import gallery
from reifusion.explain.bugs_sdxl import SDXL_BUGS
from reifusion.families.sdxl import StableDiffusionXL
from reifusion.model.request import Request
from tests.test_members import XL as MEMBER
from tests.tiny import WORDS, random_networks

# The projection is square, as in the published model, so that nothing complains if it is turned.
XL = replace(MEMBER, pooled=16, vae=replace(MEMBER.vae, scale_factor=0.13025))
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def pipe():
    return StableDiffusionXL(XL, WORDS, random_networks(XL))


@pytest.mark.parametrize("bug", SDXL_BUGS.values(), ids=SDXL_BUGS)
def test_the_number_gives_it_away_and_comes_back(pipe, bug):
    right = bug.measure(pipe)
    with bug.switched_on(pipe):
        wrong = bug.measure(pipe)
    assert wrong != pytest.approx(right, rel=0.02, abs=0.01)
    assert bug.measure(pipe) == right


@pytest.mark.parametrize("bug", SDXL_BUGS.values(), ids=SDXL_BUGS)
def test_the_picture_changes_and_comes_back(pipe, bug):
    right, wrong = bug.draw(pipe, "a cat", steps=3, size=(48, 32))
    assert (np.asarray(right) != np.asarray(wrong)).any()
    again, _ = bug.draw(pipe, "a cat", steps=3, size=(48, 32))
    assert np.array_equal(np.asarray(right), np.asarray(again))


@pytest.mark.parametrize("bug", SDXL_BUGS.values(), ids=SDXL_BUGS)
def test_the_test_that_would_catch_it_exists(bug):
    path, _, name = bug.test.partition("::")
    assert re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.M)


def test_the_gallery_is_of_the_family_s_own_bugs(pipe):
    exhibit = gallery(pipe, Request("a cat", steps=2, seed=0, sampler="euler"))
    assert list(exhibit.numbers) == list(SDXL_BUGS)
    with pytest.raises(ValueError, match="there is no bug 'wrong-eps'; there are xl-last-layer"):
        gallery(pipe, Request("a cat", steps=2, seed=0), ["wrong-eps"])
