"""The views of a drawing: its words with their heat, the schedule, the equations of each stage."""

from __future__ import annotations

import base64
import json
import re
from html import unescape
from pathlib import Path

import numpy as np
import pytest

import reifusion
from reifusion.model import attention, ddpm, samplers
from reifusion.model.request import Request
from reifusion.studio.stages import PACKAGE, excerpts, happens
from reifusion.studio.views import carries, says, schedule, view

EVIL = "a <b onclick=alert(1)> cat \" ' ${1+1} {{x}} &amp;"


@pytest.fixture
def drawing(finish):
    return finish(Request("a cat on a dog", seed=3, sampler="ddpm", steps=4))


def heats(html: str) -> dict:
    return json.loads(unescape(re.findall('data-heats="(.*?)"', html)[0]))


@pytest.mark.parametrize("place", [1, 3, 5])
def test_each_word_carries_its_heat_at_that_step(drawing, place):
    html = view(drawing, place)
    sent = heats(html)
    step = drawing.frames[place].step
    assert len(sent["maps"]) == html.count('class="word"') == 5
    for word, map in zip(drawing.attention.words, sent["maps"]):
        heat = drawing.attention.heat(word, slice(None) if step is None else slice(step, step + 1)).numpy()
        shown = np.frombuffer(base64.b64decode(map), np.uint8).reshape(sent["height"], sent["width"])
        assert np.abs(shown / 255 - heat / heat.max()).max() <= 1 / 255  # 64 × 64: not made any coarser here


def test_noise_has_no_words(drawing):
    assert heats(view(drawing, 0)) == {} and 'class="word"' not in view(drawing, 0)


def test_a_prompt_is_text_and_never_markup(finish):
    html = view(drawing := finish(Request(EVIL, seed=3, sampler="ddpm", steps=2)), 1)
    assert "<b onclick" not in html + happens(drawing, 1) + says(EVIL) + carries({"prompt": EVIL})
    assert "a &lt;b onclick=alert(1)&gt; cat &quot;" in html


def test_the_marker_moves_from_noise_to_picture(drawing):
    marks = [
        float(re.findall(r'class="marker" d="M([\d.]+)', schedule(drawing, place))[0])
        for place in range(len(drawing.frames))
    ]
    assert marks == sorted(marks) and marks[0] < marks[2] < marks[-1] and marks[0] == marks[1]
    assert schedule(drawing, 2).count('class="tick"') == 4


def test_the_equation_and_its_line_are_those_of_the_code():
    [found] = excerpts(ddpm.Sampler.predict, "x0-from-v")
    assert found.equation.startswith("App. D, Salimans & Ho 2022: x₀ = αₜ xₜ - σₜ v")
    path, line = found.place.split(":")
    lines = (Path(reifusion.__file__).parents[1] / path).read_text("utf-8").splitlines()
    assert found.code.splitlines()[0] == lines[int(line) - 1].strip()
    assert "signal * x - sigma * output" in found.code


def test_the_lines_of_an_equation_are_those_that_compute_it_to_the_end():
    [found] = excerpts(attention.softmax_attention, "attention")
    assert found.code.splitlines()[-1] == "return weights @ v, weights" and ".softmax(dim=-1)" in found.code


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_every_sampler_has_lines_to_show(name):
    from reifusion.studio.stages import _way_back

    found = _way_back(samplers.SAMPLERS[name](None))
    for excerpt in found:
        path, line = excerpt.place.split(":")
        first = (PACKAGE / path).read_text("utf-8").splitlines()[int(line) - 1]
        assert first.strip() == excerpt.code.splitlines()[0].strip()
    assert found and any(excerpt.code.strip() for excerpt in found)


def test_each_stage_shows_its_own_equations(drawing):
    noise, first, end = (happens(drawing, place) for place in (0, 1, 5))
    assert "Radford et al. 2018" in noise and "def randn" in noise
    for source in ("Vaswani et al. 2017", "Ho &amp; Salimans 2022", "x₀ ≈", "μ̃ₜ ="):
        assert source in first and source not in noise + end
    assert "x₀ = αₜ" not in first  # this model predicts ε
    assert "def to_picture" in end


def test_without_guidance_nothing_is_said_of_it(finish):
    drawing = finish(Request("a cat", seed=3, sampler="ddim", steps=2, cfg=1))
    assert "Salimans 2022" not in happens(drawing, 1) and "Song et al. 2021" in happens(drawing, 1)


def test_errors_are_alerts():
    assert 'role="alert"' in says("no", failed=True) and 'role="status"' in says("yes")
