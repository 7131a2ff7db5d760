"""The captioned scenes, composed from made-up sprites."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from reifusion.train.mini import scenes
from reifusion.train.mini.scenes import COLOURS, DYES, KINDS, POSITIONS, Scene, SceneConfig, Sprites, compose
from reifusion.train.mini.sprites import (
    STYLES,
    SpriteRecord,
    held_out_colour,
    held_out_style,
    training_sprites,
)
from tests.sprites import NOUNS, disc, prepared

ONLY = {kind: SceneConfig(**{k: float(k == kind) for k in KINDS}, combine=0.0) for kind in KINDS}


def nearest(lab: np.ndarray, names: list[str]) -> str:
    return min(
        names, key=lambda name: np.linalg.norm(lab - scenes.to_oklab(np.array(COLOURS[name], np.uint8)))
    )


@pytest.fixture(scope="module")
def sprites(tmp_path_factory: pytest.TempPathFactory) -> Sprites:
    """The sprites to train on, from a file with every noun in every style."""
    folder = prepared(tmp_path_factory.mktemp("cache"))
    return Sprites(*training_sprites(folder))


def scene(sprites: Sprites, i: int, kind: str) -> Scene:
    return compose(np.random.default_rng([7, i]), sprites, ONLY[kind])


def test_scenes_never_show_a_held_out_pair(sprites: Sprites) -> None:
    config = SceneConfig(plain=0.3, background=0, dyed=0.4, placed=0, two=0.3, combine=0.5)
    shown = set()
    for i in range(3000):
        tags = compose(np.random.default_rng([0, i]), sprites, config).tags
        for subject, colour in zip(tags["subjects"], tags["colours"], strict=True):
            assert not held_out_style(subject, tags["style"])
            assert not (colour and held_out_colour(subject, colour))
            shown |= {(subject, tags["style"]), (subject, colour)}
    styles = {(noun, style) for noun in NOUNS for style in STYLES if held_out_style(noun, style)}
    assert styles and len(shown) > 400  # some pairs are held out, and the scenes are many enough to show one


def test_a_bank_depends_on_seed_and_index_alone(sprites: Sprites, tmp_path: Path) -> None:
    short, captions = scenes.load_bank(scenes.build_bank(4, 3, tmp_path / "short", sprites))
    long, more = scenes.load_bank(scenes.build_bank(9, 3, tmp_path / "long", sprites))
    other, _ = scenes.load_bank(scenes.build_bank(4, 4, tmp_path / "other", sprites))
    assert np.array_equal(short, long[:4]) and captions == more[:4]
    assert long.shape == (9, 128, 128, 3) and long.dtype == np.uint8
    assert not np.array_equal(short, other)


def test_plain_scenes_show_the_whole_sprite_on_white(sprites: Sprites) -> None:
    for i in range(50):
        image = scene(sprites, i, "plain").image
        border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
        assert (border == 255).all() and (image < 255).any()


def test_the_background_has_the_colour_the_caption_names(sprites: Sprites) -> None:
    seen = set()
    for i in range(200):
        drawn = scene(sprites, i, "background")
        name = drawn.tags["background"]
        if name != "white":
            seen.add(name)
            assert name in drawn.caption.split() or name in drawn.caption.replace(",", "").split()
            corner = scenes.to_oklab(drawn.image[0, 0])
            nearest = min(
                COLOURS,
                key=lambda c: np.linalg.norm(corner - scenes.to_oklab(np.array(COLOURS[c], np.uint8))),
            )
            assert nearest == name
    assert seen == set(COLOURS)


def test_the_left_subject_is_on_the_left(sprites: Sprites) -> None:
    for i in range(50):
        drawn = scene(sprites, i, "two")
        for subject, half in zip(
            drawn.tags["subjects"], (drawn.image[:, :64], drawn.image[:, 64:]), strict=True
        ):
            inked = half[(half < 255).any(-1)].mean(0)
            sprite = sprites.get(subject, drawn.tags["style"])
            assert np.abs(inked - sprite[sprite[..., 3] > 0][:, :3].mean(0)).max() < 25


def test_a_subject_is_where_the_caption_says(sprites: Sprites) -> None:
    for i in range(200):
        drawn = scene(sprites, i, "placed")
        y, x = np.nonzero((drawn.image < 255).any(-1))
        right, down = POSITIONS.get(drawn.tags["position"], ((0, 0),))[0]
        for centre, direction in ((x.mean(), right), (y.mean(), down)):
            assert abs(centre - 63.5) < 3 if direction == 0 else (centre - 63.5) * direction > 10
        if drawn.tags["position"] in POSITIONS:
            assert set(drawn.tags["position"].split()) <= set(drawn.caption.replace(",", "").split())


@pytest.mark.parametrize("colour", DYES)
@pytest.mark.parametrize("rgb", [(235, 235, 240), (120, 120, 125), (180, 110, 60), (60, 160, 60)])
def test_a_dyed_subject_takes_the_colour_and_keeps_its_shape(rgb: tuple[int, int, int], colour: str) -> None:
    sprite = disc(rgb)
    dyed = scenes.dye(sprite, colour)
    assert np.array_equal(dyed[..., 3], sprite[..., 3])
    lab = scenes.to_oklab(dyed[sprite[..., 3] > 0][:, :3]).mean(0)
    assert nearest(lab, DYES) == colour


def test_dyeing_leaves_white_eyes_white() -> None:
    sprite = disc((180, 110, 60))
    sprite[50:60, 50:60, :3] = 255
    assert (scenes.dye(sprite, "blue")[52:58, 52:58, :3] > 250).all()


@pytest.mark.parametrize(
    "subject, category, can",
    [("cat", "animal-mammal", True), ("black cat", "animal-mammal", False), ("orange", "food-fruit", False),
     ("girl", "person", False), ("rainbow", "sky-weather", False)],
)  # fmt: skip
def test_what_can_be_dyed(subject: str, category: str, can: bool) -> None:
    assert scenes.can_be_dyed(SpriteRecord(subject, "3d", category, (), (), "", "MIT")) == can


def test_oklab_round_trip_is_exact() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (1000, 3)).astype(np.uint8)
    assert np.array_equal(scenes.from_oklab(scenes.to_oklab(rgb)), rgb)
    white = scenes.to_oklab(np.array([255, 255, 255], np.uint8))
    assert np.allclose(white, [1, 0, 0], atol=1e-3)


def test_an_unnamed_style_is_mostly_3d(sprites: Sprites) -> None:
    tags = [compose(np.random.default_rng([1, i]), sprites).tags for i in range(1500)]
    unnamed = [t["style"] for t in tags if not t["says_style"]]
    assert 0.85 < np.mean([style == "3d" for style in unnamed]) < 0.98


def test_the_caption_names_the_style_where_the_tags_say_so(sprites: Sprites) -> None:
    for i in range(300):
        drawn = compose(np.random.default_rng([2, i]), sprites)
        assert (drawn.tags["style"] in drawn.caption.replace(",", "").split()) == drawn.tags["says_style"]


def test_asides_change_the_words_and_never_the_picture(sprites: Sprites) -> None:
    said = 0
    for i in range(200):
        bare, chatty = (
            compose(np.random.default_rng([8, i]), sprites, SceneConfig(aside=aside)) for aside in (0, 1)
        )
        assert np.array_equal(bare.image, chatty.image) and bare.tags == chatty.tags
        assert not any(word in f"{bare.caption}," for word in (*scenes.DOING, *scenes.PRAISE))
        assert any(f", {praise}" in chatty.caption for praise in scenes.PRAISE)
        said += any(f" {doing}" in chatty.caption for doing in scenes.DOING)
    assert said > 150  # every scene of a single subject
