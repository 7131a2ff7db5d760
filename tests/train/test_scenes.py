"""Dyes, styles, places, and the scenes that are composed of made-up sprites and rendered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from reifusion.train.mini import places, render
from reifusion.train.mini.captions import POSITIONS, STYLED, Scene
from reifusion.train.mini.colours import (
    COLOURS,
    DYES,
    NAMES,
    PALETTE,
    dye,
    from_oklab,
    stands_out,
    to_oklab,
)
from reifusion.train.mini.compose import KINDS, SHARES, Specs, compose_bank, compose_scenes
from reifusion.train.mini.held_out import held_out_colour, held_out_look, held_out_place, held_out_style
from reifusion.train.mini.library import Library
from reifusion.train.mini.material import levels
from reifusion.train.mini.places import PLACES, draw
from reifusion.train.mini.render import random_pictures, sprite_pictures
from reifusion.train.mini.styles import STYLES, premultiply
from tests.sprites import NOUNS, ball, made_up

SIDE = 64
LOOKS = ("flat", "cartoon", "outlined", "clip art")
PAPER = torch.ones(1, 3, 1, 1)


@pytest.fixture(scope="module")
def library() -> Library:
    return made_up(NOUNS, SIDE)


def of_kind(library: Library, kind: str, count: int = 60) -> tuple[Specs, list[Scene], Tensor]:
    specs, scenes = compose_scenes(library.sprites, 7, range(count), kind)
    return specs, scenes, render.render(library.pixels, specs)


def eyed(rgb: tuple[int, int, int], side: int = SIDE) -> Tensor:
    """A disc with a white eye -> (4, side, side) in [0, 1]"""
    sprite = ball(tuple(level / 255 for level in rgb), side).float() / 255
    eye = slice(side * 3 // 8, side // 2)
    sprite[:3, eye, eye] = 1
    return sprite


# ---- colours


def test_oklab_round_trip_is_exact() -> None:
    rgb = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1000, 3))).float() / 255
    assert (from_oklab(to_oklab(rgb)) * 255 - rgb * 255).abs().max() < 0.2
    assert torch.allclose(to_oklab(torch.ones(1, 3)), torch.tensor([[1.0, 0, 0]]), atol=1e-3)


GREYS = [(235, 235, 240), (120, 120, 125)]
RGB = [*GREYS, (180, 110, 60), (60, 160, 60), (240, 210, 40)]


@pytest.mark.parametrize("colour", DYES)
def test_a_dyed_subject_takes_the_colour_and_keeps_its_shape_and_the_white_of_its_eyes(colour: str) -> None:
    sprites = torch.stack([eyed(rgb) for rgb in RGB])
    dyed = dye(sprites, torch.full((len(RGB),), NAMES.index(colour)))
    assert torch.equal(dyed[:, 3], sprites[:, 3])
    table = PALETTE[: len(DYES) + 1][[NAMES.index(name) for name in DYES]]
    for rgb, before, after in zip(RGB, sprites, dyed, strict=True):
        body = (before[3] > 0) & (before[:3] < 1).any(0)
        lab = to_oklab(after[None, :3, body]).mean(2)
        assert DYES[int(torch.cdist(lab, table).argmin())] == colour
        if rgb not in GREYS:  # a grey subject is dyed everywhere except in its blacks
            assert (after[:3, 24:32, 24:32] > 0.98).all()


def dye_by_numpy(sprite: np.ndarray, colour: str) -> np.ndarray:
    """`dye` as it was first written, for one sprite (H, W, 4) uint8."""

    def ramp(x: np.ndarray, low: float, high: float) -> np.ndarray:
        return ((x - low) / (high - low)).clip(0, 1)

    def oklab(rgb: np.ndarray) -> np.ndarray:
        return to_oklab(torch.from_numpy(rgb.reshape(-1, 3) / 255)).numpy()

    solid = sprite[..., 3] > 0
    lab, (target,) = oklab(sprite[solid][:, :3]), oklab(np.array([COLOURS[colour]]))
    lightness, chroma, hue = lab[:, 0], np.hypot(lab[:, 1], lab[:, 2]), np.arctan2(lab[:, 2], lab[:, 1])
    light, *ab = target
    alpha = sprite[solid][:, 3] / 255
    coloured = ramp(chroma, 0.03, 0.07)
    if np.average(ramp(chroma, 0.05, 0.1), weights=alpha) < 0.4:
        change, strength, turn = ramp(lightness, 0.15, 0.35), np.ones_like(chroma), np.zeros_like(hue)
    else:
        bins = np.bincount(((hue / np.pi + 1) * 18).astype(int) % 36, chroma * coloured * alpha, minlength=36)
        within = np.sum([np.roll(bins, k) for k in range(-6, 7)], axis=0)
        main = (np.flatnonzero(within >= 0.9999 * within.max())[0] + 0.5) / 18 * np.pi - np.pi
        turn = (hue - main + np.pi) % (2 * np.pi) - np.pi
        near = coloured * ramp(-np.abs(turn), -1.9, -1.2)
        change = near if (near * alpha).sum() > 0.5 * (coloured * alpha).sum() else coloured
        strength = (chroma / np.average(chroma, weights=change * alpha + 1e-6)).clip(0, 1.5) ** 0.5
    middle = np.average(lightness, weights=change * alpha + 1e-6)
    new_hue = np.arctan2(ab[1], ab[0]) + 0.15 * turn.clip(-1, 1)
    new_chroma = np.hypot(*ab) * strength
    new_lightness = lightness + 0.9 * (light - middle)
    new = np.stack([new_lightness, new_chroma * np.cos(new_hue), new_chroma * np.sin(new_hue)], 1)
    dyed = sprite.copy()
    mixed = torch.from_numpy(lab + change[:, None] * (new - lab))
    dyed[solid, :3] = (from_oklab(mixed).numpy() * 255).round()
    return dyed


@pytest.mark.parametrize("colour", DYES)
def test_dyeing_a_batch_equals_dyeing_one_sprite_by_the_first_formula(colour: str) -> None:
    rng = np.random.default_rng(0)
    sprites = torch.stack(
        [(eyed(tuple(rgb)) * 255).round().byte() for rgb in [*RGB, *rng.integers(0, 256, (9, 3))]]
    )
    sprites[:, :3] = (
        (sprites[:, :3].float() + torch.from_numpy(rng.normal(0, 9, sprites[:, :3].shape)))
        .clamp(0, 255)
        .byte()
    )
    dyed = dye(sprites.float() / 255, torch.full((len(sprites),), NAMES.index(colour)))
    ours = (dyed * 255).round().permute(0, 2, 3, 1).numpy()
    for one, sprite in zip(ours, sprites.permute(0, 2, 3, 1).numpy(), strict=True):
        seen = sprite[..., 3] > 0
        assert np.abs(one - dye_by_numpy(sprite, colour).astype(float))[seen].max() <= 2


def test_a_subject_stands_out_on_other_colours_than_its_own() -> None:
    for name in NAMES:
        found = stands_out(ball(tuple(level / 255 for level in COLOURS[name])).float() / 255)
        assert name not in found and len(found) >= 5


# ---- styles


def test_styles_do_not_depend_on_the_batch_and_stay_in_range(library: Library) -> None:
    sprites = library.pixels[:6].float() / 255
    for apply in STYLES.values():
        styled = apply(sprites)
        assert styled.shape == sprites.shape and styled.min() >= 0 and styled.max() <= 1
        assert torch.allclose(styled[4:5], apply(sprites[4:5]), atol=1e-5)


def test_pixel_art_is_made_of_squares_of_few_colours() -> None:
    sprite = STYLES["pixel art"](eyed((180, 110, 60))[None])
    squares = sprite.unfold(2, 2, 2).unfold(3, 2, 2)  # (1, 4, 32, 32, 2, 2)
    assert torch.equal(squares, squares[..., :1, :1].expand_as(squares))
    assert set(sprite[:, 3].unique().tolist()) == {0, 1}
    assert len((sprite[0, :3, sprite[0, 3] > 0]).unique(dim=1).T) <= 24


def test_a_silhouette_keeps_the_shape_and_nothing_else() -> None:
    sprite = eyed((240, 200, 60))[None]
    dark = STYLES["silhouette"](sprite)
    assert (
        torch.equal(dark[:, 3], sprite[:, 3]) and len(dark[:, :3].unique()) == 1 and dark[:, :3].max() < 0.2
    )


@pytest.mark.parametrize("style", ["line drawing", "pencil drawing"])
def test_a_drawing_has_dark_lines_around_its_parts_and_no_colour(style: str) -> None:
    sprite = STYLES[style](eyed((240, 200, 60), 256)[None])
    picture = (premultiply(sprite)[:, :3] + PAPER * (1 - sprite[:, 3:]))[0]
    assert torch.equal(picture[0], picture[1]) and torch.equal(picture[0], picture[2])
    assert picture[0, 128, 10:24].min() < 0.45 and picture[0, 128, :8].min() > 0.99  # the rim of the disc
    assert picture[0, 110, 90:102].min() < 0.45  # the rim of its eye
    assert picture[0, 180:200, 120:140].mean() > (0.97 if style == "line drawing" else 0.7)


def test_a_sticker_is_the_sprite_with_a_white_rim() -> None:
    small = torch.zeros(1, 4, SIDE, SIDE)
    small[:, :, 8:56, 8:56] = torch.nn.functional.interpolate(eyed((60, 90, 200))[None], size=(48, 48))
    sprite = STYLES["sticker"](small)
    inside = small[0, 3] == 1
    assert torch.allclose(sprite[0, :3, inside], small[0, :3, inside], atol=1e-5)
    assert sprite[0, 3].gt(0.9).sum() > 1.05 * inside.sum()
    edge = next(x for x in range(SIDE) if inside[32, x])
    assert (sprite[0, :3, 32, edge - 2] > 0.9).all() and sprite[0, 3, 32, edge - 2] > 0.9


# ---- places


def test_a_place_is_decided_by_its_seed_in_any_batch() -> None:
    for k in range(len(PLACES)):
        several = draw(torch.full((5,), k), torch.tensor([3, 14, 15, 92, 65]), SIDE)
        assert several.min() >= 0 and several.max() <= 1
        assert torch.allclose(several[2:3], draw(torch.tensor([k]), torch.tensor([15]), SIDE), atol=1e-5)
        assert all((several[0] - other).abs().mean() > 0.005 for other in several[1:])


def test_places_of_one_batch_are_those_of_single_pictures() -> None:
    kinds = torch.tensor([2, 0, 5, 2])
    together = draw(kinds, torch.arange(4), SIDE)
    alone = torch.cat([draw(kinds[i : i + 1], torch.tensor([i]), SIDE) for i in range(4)])
    assert torch.allclose(together, alone, atol=1e-5)


def test_places_have_the_colours_that_people_expect() -> None:
    def part(place: str, top: float, bottom: float) -> list[float]:
        pictures = draw(torch.full((12,), list(PLACES).index(place)), torch.arange(12), SIDE)
        return pictures[:, :, int(top * SIDE) : int(bottom * SIDE)].mean((0, 2, 3)).tolist()

    red, green, blue = part("meadow", 0.8, 1.0)
    assert green > red + 0.1 and green > blue + 0.2
    assert min(part("snow", 0.8, 1.0)) > 0.9
    assert max(part("night", 0.0, 0.4)) < 0.5 and min(part("night", 0.8, 1.0)) > 0.3  # moonlit ground
    red, green, blue = part("sea", 0.5, 0.65)
    assert blue > red + 0.3
    red, green, blue = part("desert", 0.8, 1.0)
    assert red > green > blue + 0.1
    red, green, blue = part("under water", 0.3, 0.6)
    assert blue > green > red


def test_random_numbers_of_places_are_even_and_independent() -> None:
    brush = places.Brush(torch.arange(4000) * 3, 8)
    x = brush.random(6)
    assert (x.mean(0) - 0.5).abs().max() < 0.02 and (x.std(0) - 12**-0.5).abs().max() < 0.02
    assert (torch.corrcoef(x.T) - torch.eye(6)).abs().max() < 0.07
    assert abs(float(torch.corrcoef(torch.stack([x[1:, 0], x[:-1, 0]]))[0, 1])) < 0.07
    # Three of 64 million numbers would be rounded to 1, and a choice by them would be none of the options.
    assert 0.999 < places.Brush(torch.tensor([471_123]), 8).random(32).max() < 1


# ---- scenes


def test_scenes_never_show_a_held_out_pair(library: Library) -> None:
    shown: set[tuple[str, str]] = set()
    for kind in (None, "dyed", "style", "place"):
        for scene in compose_scenes(library.sprites, 0, range(1500), kind)[1]:
            for subject, colour in zip(scene.subjects, scene.colours, strict=True):
                shown |= {(subject, word) for word in (scene.look, scene.style, scene.place, colour) if word}
    rules: dict[Callable[[str, str], bool], Collection[str]] = {
        held_out_style: STYLES,
        held_out_place: PLACES,
        held_out_colour: DYES,
        held_out_look: LOOKS,
    }
    for rule, words in rules.items():
        held_out = {(noun, word) for noun in NOUNS for word in words if rule(noun, word)}
        assert held_out and not held_out & shown
        possible = len(NOUNS) * len(words)
        assert len({(noun, word) for noun, word in shown if word in words}) > 0.7 * possible


def test_a_subject_that_nothing_makes_visible_is_in_no_held_out_place(library: Library) -> None:
    hidden = [replace(sprite, stands_out=()) for sprite in library.sprites]
    composed = compose_scenes(hidden, 0, range(400), "place")[1]
    scenes = [scene for scene in composed if not any(scene.colours)]  # dyed ones may be seen elsewhere
    assert {scene.place for scene in scenes} == {"snow", ""}
    for scene in scenes:
        assert (scene.place == "") == held_out_place(scene.subjects[0], "snow")


def test_every_kind_of_scene_has_its_share(library: Library) -> None:
    count = 3000
    kinds = Counter(scene.kind for scene in compose_scenes(library.sprites, 1, range(count))[1])
    for kind, share in SHARES.items():
        assert abs(kinds[kind] / count - share) < 4 * (share * (1 - share) / count) ** 0.5
    assert sum(SHARES.values()) == pytest.approx(1)


def same(one: Specs, two: Specs) -> bool:
    return all(torch.equal(getattr(one, field.name), getattr(two, field.name)) for field in fields(Specs))


@pytest.mark.slow
def test_a_bank_depends_on_seed_and_index_alone(library: Library) -> None:
    long, captions = compose_bank(library, 3, 1200)
    short, fewer = compose_bank(library, 3, 5)
    assert same(short, long[:5]) and fewer == captions[:5]
    assert not same(short, compose_bank(library, 4, 5)[0])
    by_two, said = compose_bank(library, 3, 1200, workers=2)
    assert same(by_two, long) and said == captions


def test_a_caption_says_what_is_special_about_a_scene(library: Library) -> None:
    for scene in compose_scenes(library.sprites, 2, range(600))[1]:
        words = scene.caption.replace(",", "")
        for subject, colour in zip(scene.subjects, scene.colours, strict=True):
            assert subject in words and colour in words
        assert (scene.look in words.split() or f"{scene.look} " in f"{words} ") == scene.names_look
        if scene.style:
            assert any(scene.caption in form.format(scene.caption) for form in STYLED[scene.style])
            assert scene.style.split()[0] in words or "line art" in words
        if scene.place:
            assert any(phrase in words for phrase in PLACES[scene.place][1])
        if scene.background != "white":
            assert scene.background in words.split()
        if scene.position in POSITIONS:
            assert any(phrase in words for phrase in POSITIONS[scene.position][1])


def test_captions_of_drawings_are_not_said_of_what_is_dyed_or_styled(library: Library) -> None:
    sprites = [replace(sprite, caption=f"grey {sprite.subject}") for sprite in library.sprites]
    said: Counter[str] = Counter()
    for scene in compose_scenes(sprites, 5, range(800))[1]:
        grey = "grey" in scene.caption.split()
        said["plain"] += grey and not (any(scene.colours) or scene.style)
        assert not (grey and len(scene.subjects) == 1 and (any(scene.colours) or scene.style))
    assert said["plain"] > 100


# ---- pictures


def test_pictures_are_the_same_in_any_batch(library: Library) -> None:
    specs, _ = compose_scenes(library.sprites, 11, range(40))
    whole = render.render(library.pixels, specs)
    assert whole.shape == (40, 3, SIDE, SIDE) and whole.min() >= -1 and whole.max() <= 1
    alone = torch.cat([render.render(library.pixels, specs[i : i + 1]) for i in range(40)])
    assert (whole - alone).abs().max() < 1e-4
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert (render.render(library.pixels, specs[order]) - whole[order]).abs().max() < 1e-4


def test_drawing_more_scenes_at_once_takes_no_more_operations(library: Library) -> None:
    """On a GPU, time goes by operations, whatever the number of pictures."""
    specs, _ = compose_bank(library, 3, 400)
    library_pixels = F.avg_pool2d(library.pixels.float(), 2).byte()
    counts = []
    for some in (specs, specs[torch.arange(400).repeat(2)]):
        with Operations() as operations:
            render.render(library_pixels, some)
        counts.append(operations.count)
    assert counts[1] <= counts[0] < 6000  # 3,300, and views


class Operations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_plain_scenes_show_the_whole_sprite_on_white(library: Library) -> None:
    specs, scenes, pictures = of_kind(library, "plain")
    for row, (scene, picture) in enumerate(zip(scenes, pictures, strict=True)):
        if scene.background == "white":
            rim = torch.cat([picture[:, 0], picture[:, -1], picture[:, :, 0], picture[:, :, -1]], 1)
            assert (rim > 0.999).all() and (picture < 0.9).any()
        if specs.scale[row, 0] == 1 and not any(scene.colours):
            sprite = premultiply(library.pixels[specs.sprite[row, :1]].float() / 255)
            inside = sprite[0, 3] == 1
            shown, meant = (picture[:, inside] + 1) / 2, sprite[0, :3, inside]
            mirrored = sprite[0, :3].flip(-1)[:, inside]
            assert min((shown - meant).abs().max(), (shown - mirrored).abs().max()) < 1e-3


def test_the_background_has_the_colour_the_caption_names(library: Library) -> None:
    _, scenes, pictures = of_kind(library, "background", 120)
    assert {scene.background for scene in scenes} >= set(COLOURS)
    for scene, picture in zip(scenes, pictures, strict=True):
        if scene.background != "white":
            lab = to_oklab((picture[None, :, 0, 0] + 1) / 2)
            assert NAMES[int(torch.cdist(lab, PALETTE).argmin())] == scene.background


def ink(picture: Tensor) -> Tensor:
    """(S, S) bool: what differs from the corner's colour"""
    return (picture - picture[:, :1, :1]).abs().amax(0) > 0.1


def test_a_subject_is_where_the_caption_says(library: Library) -> None:
    _, scenes, pictures = of_kind(library, "placed", 120)
    for scene, picture in zip(scenes, pictures, strict=True):
        centre = ink(picture).nonzero().float().mean(0) - (SIDE - 1) / 2  # down, right
        right, down = POSITIONS.get(scene.position, ((0, 0),))[0]
        for away, direction in zip(centre.tolist(), (down, right), strict=True):
            assert abs(away) < 1 if direction == 0 else away * direction > SIDE / 12
        extent = ink(picture).any(0).sum() / SIDE
        assert (extent < 0.4) == (scene.size == "small") and (extent > 0.95) == (scene.size == "big")


def test_of_two_subjects_the_first_is_on_the_left(library: Library) -> None:
    specs, scenes, pictures = of_kind(library, "two")
    for row, (scene, picture) in enumerate(zip(scenes, pictures, strict=True)):
        if any(scene.colours):
            continue
        assert len(scene.subjects) == 2 and specs.sprite[row].min() >= 0
        for half, index in zip(picture.chunk(2, 2), specs.sprite[row], strict=True):
            mean = (half[:, ink(half)].mean(1) + 1) / 2
            sprite = library.pixels[index].float() / 255
            assert (mean - sprite[:3, sprite[3] == 1].mean(1)).abs().max() < 0.06


def test_in_a_place_the_subject_stands_on_the_ground_with_a_shadow(library: Library) -> None:
    specs, scenes, pictures = of_kind(library, "place", 40)
    empty = draw(specs.place, specs.seed, SIDE)
    assert {scene.place for scene in scenes} == set(PLACES)
    for row in range(40):
        changed = ((pictures[row] + 1) / 2 - empty[row]).abs().amax(0) > 0.03
        lowest = int(changed.any(1).nonzero().max()) / SIDE
        assert 0.7 < float(specs.foot[row]) < 0.95
        assert float(specs.foot[row]) - 0.02 < lowest < float(specs.foot[row]) + 0.1  # the shadow is below


def test_sizes_and_shifts_are_whole_patches_of_latents(library: Library) -> None:
    specs, _ = compose_scenes(library.sprites, 2, range(500))
    assert torch.equal(specs.scale * 16, (specs.scale * 16).round())
    assert torch.equal(specs.shift * 16, (specs.shift * 16).round())


def test_pictures_for_the_vae_are_decided_by_the_generator(library: Library) -> None:
    specs, _ = compose_scenes(library.sprites, 2, range(8))
    drawn = levels(render.render(library.pixels, specs))

    def some(seed: int, size: int) -> Tensor:
        return random_pictures(drawn, library.pixels, torch.Generator().manual_seed(seed), 9, size)

    for size in (32, SIDE):
        x = some(0, size)
        assert x.shape == (9, 3, size, size) and x.min() >= -1.001 and x.max() <= 1.001
        assert torch.equal(x, some(0, size)) and not torch.equal(x, some(1, size))
    windows = (drawn.float() / 127.5 - 1).unfold(2, 60, 1).unfold(3, 60, 1)  # (8, 3, 5, 5, 60, 60)
    for part in some(3, 60)[:4]:  # the first half are parts of scenes
        assert (windows - part[None, :, None, None]).abs().amax((1, 4, 5)).min() < 1e-4


def test_sprites_for_the_vae_lie_on_white_or_one_colour() -> None:
    x = sprite_pictures(
        ball((0.2, 0.5, 0.3))[None].repeat(30, 1, 1, 1), torch.Generator().manual_seed(0), SIDE
    )
    corners = x[:, :, 0, 0]
    assert (corners > 0.999).all(1).any() and (corners < 0.9).any(1).any()
    assert x.std((2, 3)).amax(1).min() > 0.01  # something is to be seen in each


def test_the_command_draws_a_sheet(library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "read_library", lambda: library)
    arguments = ["render", "--sheet", str(tmp_path / "sheet.png"), "--count", "10", "--kind", "two"]
    monkeypatch.setattr("sys.argv", arguments)
    render.main()
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (8 * 200, 2 * 228)
        assert np.asarray(sheet.convert("L")).std() > 10
    assert set(KINDS) == set(SHARES)
