"""Figures: pixels stay what they are, texts are carried along, and no file is ever half-written."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from reifusion.explain.figures import (
    MARGIN,
    Exhibit,
    heat_picture,
    overlay,
    picture_grid,
    plain,
    render,
    sheet,
    signed_picture,
    two_heats,
)
from reifusion.explain.guide import GUIDE
from reifusion.files import free, whole, write_text


def noise(side: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


@pytest.mark.parametrize(("side", "shown"), [(64, 256), (128, 256), (256, 256)])
def test_a_picture_is_shown_pixel_by_pixel(side, shown):
    figure = picture_grid([[noise(side)]], "a title")
    _, top = sheet(480, 100, "a title")
    cell = np.asarray(render(figure))[top : top + shown, MARGIN : MARGIN + shown]
    expected = np.asarray(noise(side).resize((shown, shown), Image.Resampling.NEAREST))
    assert np.array_equal(cell[2:-2, 2:-2], expected[2:-2, 2:-2])  # the hairline is around it


def test_large_pictures_are_made_smaller_and_many_smaller_still():
    one = render(picture_grid([[noise(512)]], ""))
    many = render(picture_grid([[noise(512)] * 12], ""))
    tall = render(picture_grid([[noise(512)]] * 12, ""))
    assert one.height < 256 + 100 and one.width == 480  # room for the heading
    assert many.width < 12 * 160 and tall.height < 12 * 160


@settings(max_examples=15, deadline=None)
@given(st.text(max_size=60))
def test_any_text_can_be_written(text):
    figure, _ = sheet(400, 120, text, text)
    assert render(figure).size == (400, 120)


def test_a_dollar_is_a_dollar():
    assert (
        plain("$5 and $6") == r"\$5 and \$6"
        and plain(" a\n b\x07 ") == "a b�"
        and plain("abcdef", 4) == "abc…"
    )


def test_an_exhibit_carries_its_texts_and_leaves_no_other_file(tmp_path):
    figure, _ = sheet(300, 80, "t")
    Exhibit(figure, "a title", "what is seen \ud800", "what to look for", {"a": [1, 2.5]}).save(
        tmp_path / "e.png"
    )
    with Image.open(tmp_path / "e.png") as picture:
        texts = picture.info
    assert texts["Title"] == "a title" and texts["Description"] == "what is seen ?"
    assert texts["Comment"] == "what to look for" and json.loads(texts["reifusion-explain"]) == {
        "a": [1, 2.5]
    }
    assert [path.name for path in tmp_path.iterdir()] == ["e.png"]


def test_no_heat_leaves_the_grey_and_all_of_it_is_dark_red():
    picture = Image.new("RGB", (2, 1), (100, 100, 100))
    cold, hot = np.asarray(overlay(picture, np.array([[0.0, 1.0]])))[0].astype(int)
    assert len(set(cold)) == 1 and hot[0] > 3 * hot[1]


def test_colours_tell_high_from_low_and_plus_from_minus():
    dark, bright = np.asarray(heat_picture(np.array([[0.0, 1.0]])))[0].astype(int)
    assert dark.sum() < 30 and bright.sum() > 600
    blue, white, red = np.asarray(signed_picture(np.array([[-2.0, 0.0, 2.0]]), 2))[0].astype(int)
    assert blue[2] > 2 * blue[0] and white.min() > 240 and red[0] > 2 * red[2]


def test_two_heats_are_red_and_blue():
    torch = pytest.importorskip("torch")
    left = torch.tensor([[1.0, 0.0]])
    red, blue = np.asarray(two_heats(Image.new("RGB", (2, 1), "white"), left, left.flip(1)))[0].astype(int)
    assert red[0] > 2 * red[2] and blue[2] > 2 * blue[0]


def test_a_file_that_fails_half_way_does_not_exist(tmp_path):
    with pytest.raises(OSError), whole(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise OSError
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path):
    path = tmp_path / "a.txt"
    assert free(path) == path
    write_text(path, "one")
    assert free(path).name == "a-2.txt"


def test_every_guide_is_a_paragraph():
    assert all(len(text.split()) > 20 and "\n" not in text and text[-1] in ".”" for text in GUIDE.values())
