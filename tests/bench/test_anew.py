"""What the mini drew is drawn anew: into the README's pictures, in their width and in few colours."""

import sys

import numpy as np
import pytest
from PIL import Image

from bench import anew


def test_a_part_that_is_not_there_gets_a_sentence_and_nothing_is_begun(monkeypatch, capsys):
    begun = []
    monkeypatch.setattr(anew, "PARTS", {"hero": lambda: begun.append("hero")})
    monkeypatch.setattr(sys, "argv", ["anew", "hero", "herro"])
    with pytest.raises(SystemExit) as stop:
        anew.main()
    assert stop.value.code == 2 and "no part 'herro'; there are hero" in capsys.readouterr().err and not begun


def test_without_names_all_parts_are_made_in_order_up_to_the_first_that_fails(monkeypatch):
    begun = []

    def fails() -> None:
        raise RuntimeError("no drawings")

    parts = {"one": lambda: begun.append(1), "two": lambda: begun.append(2), "bad": fails, "last": fails}
    monkeypatch.setattr(anew, "PARTS", parts)
    monkeypatch.setattr(sys, "argv", ["anew"])
    with pytest.raises(RuntimeError, match="no drawings"):
        anew.main()
    assert begun == [1, 2]


@pytest.mark.slow
def test_the_hero_is_the_readmes_strip_in_256_colours(monkeypatch, tmp_path):
    monkeypatch.setattr(anew, "IMAGES", tmp_path)
    anew.hero()
    with Image.open(tmp_path / "hero.png") as made, Image.open(anew.ROOT / "images" / "hero.png") as shipped:
        assert made.mode == "P" and made.size == shipped.size == (anew.WIDTH, shipped.height)
        levels = [np.asarray(picture.convert("RGB"), float) for picture in (made, shipped)]
    assert np.abs(levels[0] - levels[1]).mean() < 8  # drawn in bf16, or on another CPU
