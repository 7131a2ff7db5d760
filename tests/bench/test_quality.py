"""The evaluation's own promises, on made-up sprites and with a judge whose verdicts are known."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from bench import judge as judging
from bench import pixels, quality
from bench.judge import MANNERS, NOWHERE, Judge, JudgeTraining, Seen, choices, retrieved
from bench.pixels import on_white, to_images
from bench.prompts import COUNTS, SEEDS, Prompt, make_prompts
from bench.quality import Figure
from reifusion.model.config import ModelConfig
from reifusion.train import estimates
from reifusion.train.loop import LoopConfig
from reifusion.train.mini.colours import COLOURS, DYES, NAMES, dye, from_oklab
from reifusion.train.mini.compose import WHITE, compose_scenes, is_held_out, shade
from reifusion.train.mini.held_out import held_out_colour, held_out_place, held_out_style
from reifusion.train.mini.library import Library
from reifusion.train.mini.render import render
from tests.sprites import NOUNS, ball, made_up, prepared_library

pytestmark = pytest.mark.slow

SIDE = 64
slowly = settings(deadline=None, max_examples=50)  # however busy the machine is


@pytest.fixture(scope="module")
def library() -> Library:
    """Every noun by every hand, discs of nearly one colour for each noun."""
    return made_up(NOUNS, SIDE, alike=True)


@pytest.fixture(scope="module")
def prompts(library: Library) -> list[Prompt]:
    return make_prompts(library, {kind: 2 * SEEDS if kind == "seeds" else 6 for kind in COUNTS})


def of_kind(prompts: list[Prompt], kind: str) -> list[Prompt]:
    return [prompt for prompt in prompts if prompt.kind == kind]


def disc(rgb: Sequence[int], eye: bool = True) -> np.ndarray:
    """A disc (64, 64, 4) uint8, perhaps with a white eye"""
    sprite = ball([level / 255 for level in rgb], SIDE)
    if eye:
        sprite[:3, 25:30, 25:30] = 255
    return sprite.permute(1, 2, 0).numpy().copy()


def white(sprite: np.ndarray) -> np.ndarray:
    return on_white(torch.from_numpy(sprite).permute(2, 0, 1)[None])[0]


# ---- estimates


@slowly
@given(st.integers(1, 400).flatmap(lambda of: st.tuples(st.integers(0, of), st.just(of))))
def test_wilson_intervals_end_where_the_share_is_1_96_standard_errors_away(pair: tuple[int, int]) -> None:
    right, of = pair
    low, high = estimates.wilson(right, of)
    assert 0 <= low <= right / of + 1e-12 and right / of - 1e-12 <= high <= 1 and low < high
    for end in (low, high):
        assert (right / of - end) ** 2 == pytest.approx(1.96**2 * end * (1 - end) / of, abs=1e-12)


def test_wilson_interval_of_8_in_10() -> None:
    assert estimates.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)


def test_mean_interval_covers_the_true_mean_19_times_in_20() -> None:
    generator = torch.Generator().manual_seed(2)
    covered = 0
    for _ in range(1000):
        middle, low, high = estimates.mean(3 + torch.randn(100, generator=generator))
        covered += low < 3 < high
        assert low < middle < high
    assert 920 < covered < 980


# ---- pixels


@pytest.mark.parametrize("name", pixels.NAMED)
def test_a_background_is_called_by_the_name_it_was_made_from(name: str) -> None:
    for seed in range(8):
        rng = np.random.default_rng(seed)
        lab = shade(rng, name) if name in COLOURS else WHITE
        ground = from_oklab(torch.tensor([lab])) * 255  # (1, 3)
        canvas = Image.new("RGB", (SIDE, SIDE), tuple(ground[0].byte().tolist()))
        subject = Image.fromarray(disc((90, 60, 30)))
        canvas.paste(subject, (0, 20), subject)  # the subject cuts a little of the rim
        noise = rng.normal(0, 4, (SIDE, SIDE, 3))
        assert pixels.background_name((np.asarray(canvas) + noise).clip(0, 255).astype(np.uint8)) == name


def test_a_background_of_many_colours_has_no_name() -> None:
    bands = [np.full((128, 32, 3), COLOURS[name], np.uint8) for name in ("red", "green", "blue", "yellow")]
    assert pixels.background_name(np.concatenate(bands, axis=1)) == ""


@pytest.mark.parametrize("colour", DYES)
@pytest.mark.parametrize("rgb", [(235, 200, 190), (120, 120, 125), (180, 110, 60), (60, 160, 60)])
def test_a_dyed_subject_has_the_colour_of_its_dye(rgb: tuple[int, int, int], colour: str) -> None:
    sprite = torch.from_numpy(disc(rgb)).permute(2, 0, 1)[None] / 255
    (image,) = on_white((dye(sprite, torch.tensor([NAMES.index(colour)])) * 255).round().byte())
    assert pixels.dye_name(image) == colour
    assert pixels.dye_name(image[::-1, ::2]) == colour  # wherever, and however large


def test_grey_has_no_dye() -> None:
    assert pixels.dye_name(white(disc((120, 120, 120)))) == ""
    assert pixels.dye_name(np.full((SIDE, SIDE, 3), 255, np.uint8)) == ""


def test_places_and_sizes_are_those_of_the_scene(library: Library) -> None:
    specs, scenes = compose_scenes(library.sprites, 1, range(150), "placed")
    seen = set()
    for scene, image in zip(scenes, to_images(render(library.pixels, specs)), strict=True):
        across = {"left": "left", "right": "right"}.get(scene.position.split()[-1], "middle")
        assert pixels.side_name(image) == across
        small = scene.size == "small"
        assert (pixels.extent(image) < pixels.SMALL) == small
        seen |= {across, small}
    assert seen == {"left", "right", "middle", True, False}


@slowly
@given(st.floats(0.2, 0.9), st.integers(-20, 20), st.integers(-20, 20), st.sampled_from(sorted(COLOURS)))
def test_a_crop_shows_the_same_wherever_the_subject_is(scale: float, x: int, y: int, ground: str) -> None:
    side, reach = round(128 * scale), round(64 - 60 * scale)
    canvas = Image.new("RGB", (128, 128), COLOURS[ground])
    rgb = (240, 240, 240) if ground != "yellow" else (30, 30, 30)
    subject = Image.fromarray(disc(rgb)).resize((side, side), Image.Resampling.BICUBIC)
    x, y = (max(-reach, min(reach, shift)) for shift in (x, y))
    canvas.paste(subject, (64 - side // 2 + x, 64 - side // 2 + y), subject)
    left, top, right, bottom = pixels.box(pixels.foreground(pixels.crop(np.asarray(canvas), 64)))
    margin = 64 * pixels.MARGIN / (1 + 2 * pixels.MARGIN)
    assert all(abs(edge - margin) < 5 for edge in (left, top, 64 - right, 64 - bottom))


def test_an_empty_picture_is_cropped_to_itself() -> None:
    blank = np.full((128, 128, 3), 200, np.uint8)
    blank[5, 5] = 0  # a speck is no subject
    assert pixels.box(pixels.foreground(blank)) == (0, 0, 128, 128)
    assert [part.shape for part in pixels.parts(blank, 32, 3)] == [(32, 32, 3)] * 3


def test_the_parts_of_a_picture_are_those_with_small_details() -> None:
    image = white(ball((0.9, 0.7, 0.2), 256).permute(1, 2, 0).numpy())
    for y, x in ((90, 100), (90, 150), (170, 125)):  # eyes and a mouth
        image[y : y + 6, x : x + 12] = 20
    parts = pixels.parts(image, 96, 3)
    assert sum((part < 60).all(-1).any() for part in parts) >= 2
    assert (parts[0] < 60).all(-1).sum() > 40
    again = pixels.parts(np.ascontiguousarray(image[::-1, ::-1]), 96, 1)[0]
    assert np.abs(again[::-1, ::-1].astype(int) - parts[0]).mean() < 12  # the same part, upside down


@pytest.mark.parametrize("side", [64, 256, 300])
def test_pictures_of_any_size_are_judged_at_one(side: int) -> None:
    image = white(ball((0.1, 0.3, 0.8), side).permute(1, 2, 0).numpy())
    small = pixels.resized(image, 128)
    assert small.shape == (128, 128, 3) and pixels.dye_name(small) == "blue"
    assert pixels.extent(small) == pytest.approx(0.86, abs=0.03)


# ---- prompts


def test_prompts_are_always_the_same_and_never_twice(library: Library, prompts: list[Prompt]) -> None:
    again = make_prompts(library, {kind: 2 * SEEDS if kind == "seeds" else 6 for kind in COUNTS})
    fewer = make_prompts(library, {"style": 2, "two": 3})
    assert [p.text for p in prompts] == [p.text for p in again]
    assert len({p.seed for p in prompts}) == len(prompts)
    for kind in COUNTS:
        texts = [prompt.text for prompt in of_kind(prompts, kind)]
        assert len(texts) == len(set(texts)) * (SEEDS if kind == "seeds" else 1)
    chosen = of_kind(prompts, "style")[:2] + of_kind(prompts, "two")[:3]
    assert [(p.text, p.seed) for p in fewer] == [(p.text, p.seed) for p in chosen]


def test_held_out_prompts_are_held_out_and_the_others_are_not(prompts: list[Prompt]) -> None:
    for prompt in prompts:
        scene, held_out = prompt.scene, prompt.kind.endswith("held out")
        pairs = [
            held_out_colour(*pair) for pair in zip(scene.subjects, scene.colours, strict=True) if pair[1]
        ]
        pairs += [held_out_style(scene.subjects[0], scene.style)] if scene.style else []
        pairs += [held_out_place(scene.subjects[0], scene.place)] if scene.place else []
        assert all(pair == held_out for pair in pairs)
        assert bool(pairs) == (prompt.kind.split()[0] in ("style", "dye", "place"))


def test_prompts_say_what_their_scenes_show(prompts: list[Prompt]) -> None:
    for prompt in prompts:
        scene, words = prompt.scene, prompt.text.replace(",", "")
        assert all(subject in words for subject in scene.subjects)
        assert (scene.look in words) == scene.names_look or not scene.names_look
        assert all(colour in words.split() for colour in scene.colours if colour)
        assert bool(scene.colours[0]) == prompt.kind.startswith("dye")
        assert (scene.background != "white") == (prompt.kind == "background")
        if prompt.kind == "left or right":
            assert scene.position in words.split()
        if prompt.kind == "seeds":
            assert words in (f"a {scene.subjects[0]}", f"an {scene.subjects[0]}")


@slowly
@given(st.integers(50, 500))
def test_fewer_prompts_keep_their_proportions(count: int) -> None:
    assert sum(COUNTS.values()) == 500
    part = quality.portion(count)
    assert sum(part.values()) == count
    assert all(abs(part[kind] - n * count / 500) < 1 for kind, n in COUNTS.items())


def test_too_few_pictures_for_the_prompts_is_an_error() -> None:
    with pytest.raises(ValueError, match="give 1 prompts of the kind 'plain', not 9"):
        make_prompts(made_up(NOUNS[4:5], SIDE), {"plain": 9})


# ---- judging


class Planted(Judge):
    """A judge that recognises a picture by the mean colour of its foreground."""

    def __init__(self, library: Library):
        self.subjects, self.id = library.subjects, "planted"
        self.unseen = {"3d": (9, 10), "flat": (4, 4), "cartoon": (3, 6)}
        known = on_white(library.pixels[[library.of[subject][4] for subject in self.subjects]])
        self.known = torch.tensor(np.stack([self._mean(image) for image in known]))
        self.manner, self.place = "flat", "snow"

    @staticmethod
    def _mean(image: np.ndarray) -> np.ndarray:
        return image[pixels.foreground(image)].mean(0).astype(np.float32)

    def see(self, images: Sequence[np.ndarray], outside: bool = False) -> Seen:
        means = torch.tensor(np.stack([self._mean(image) for image in images]))
        manners, places = [self.manner] * len(images), [self.place] * len(images)
        return Seen(means, -torch.cdist(means, self.known), manners, places)

    def see_parts(self, images: Sequence[np.ndarray], count: int = 4) -> Tensor:
        return self.see(images).subjects[:, None].repeat(1, count, 1)


@pytest.fixture(scope="module")
def planted(library: Library) -> Planted:
    return Planted(library)


PLAIN = ("plain", "look", "background", "left or right", "small", "two", "seeds")


def test_real_pictures_pass_their_own_tests(prompts: list[Prompt], planted: Planted) -> None:
    some = [prompt for prompt in prompts if prompt.kind in PLAIN]
    said, features = quality.verdicts([p.image for p in some], some, planted)
    assert features.shape == (len(some), 3)
    for prompt, right in zip(some, said, strict=True):
        assert right.pop("manner", False) == (prompt.kind == "look" and prompt.scene.look == "flat")
        assert all(right.values()), (prompt.text, right)


def test_dyes_and_places_are_looked_for(prompts: list[Prompt], planted: Planted) -> None:
    dyed = [prompt for prompt in prompts if prompt.kind.startswith("dye")]
    assert all(right["dye"] for right in quality.verdicts([p.image for p in dyed], dyed, planted)[0])
    outside = [prompt for prompt in prompts if prompt.kind.startswith("place")]
    said, _ = quality.verdicts([p.image for p in outside], outside, planted)
    assert [right["place"] for right in said] == [p.scene.place == "snow" for p in outside]
    styled = [prompt for prompt in prompts if prompt.kind.startswith("style")]
    said, _ = quality.verdicts([p.image for p in styled], styled, planted)
    assert not any(right["manner"] for right in said)  # this judge says "flat" of every picture


def test_other_pictures_fail(prompts: list[Prompt], planted: Planted) -> None:
    for kind, failing in (("plain", "subject"), ("background", "background"), ("dye", "dye"),
                          ("two", "subject")):  # fmt: skip
        some = of_kind(prompts, kind)
        others = [prompt.image for prompt in some[1:] + some[:1]]
        said, _ = quality.verdicts(others, some, planted)
        assert sum(right[failing] for right in said) <= 3, kind
    mirrored = of_kind(prompts, "left or right")
    said, _ = quality.verdicts([p.image[:, ::-1] for p in mirrored], mirrored, planted)
    assert not any(right["where"] for right in said)
    swapped = of_kind(prompts, "two")
    said, _ = quality.verdicts([np.roll(p.image, SIDE // 2, axis=1) for p in swapped], swapped, planted)
    assert not any(right["subject"] for right in said)


@slowly
@given(st.integers(0, 10**6), st.integers(0, 49))
def test_the_right_one_is_among_20_different_ones(seed: int, right: int) -> None:
    among = choices(np.random.default_rng(seed), 50, [right, (right + 1) % 50])
    assert len(set(among)) == 20 and {right, (right + 1) % 50} <= set(among)
    scores = torch.zeros(50)
    scores[right] = 1.0
    assert retrieved(scores, right, among) and not retrieved(-scores, right, among)


@pytest.mark.parametrize(
    "guess", [lambda generator: torch.randn(50, generator=generator), lambda _: torch.zeros(50)]
)
def test_guessing_gets_one_in_20_and_so_does_a_judge_that_sees_no_difference(guess) -> None:
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    hits = [retrieved(guess(generator), k % 50, choices(rng, 50, [k % 50])) for k in range(2000)]
    assert 0.03 < np.mean(hits) < 0.07


def test_copies_are_told_from_new_drawings(tmp_path: Path) -> None:
    library = made_up(NOUNS, SIDE)
    prompts = make_prompts(library, {"plain": 10, "look": 10})

    def near(change) -> float:
        images = [change(prompt.image) for prompt in prompts]
        return quality.memory(prompts, images, images, library, tmp_path).value

    assert near(lambda image: image) > 0.6  # drawings, in other sizes and mirrored
    assert (tmp_path / "nearest.png").exists()

    def other(image: np.ndarray) -> np.ndarray:
        image = image.copy()
        image[20:44, 20:44] = (255, 0, 255)
        return image

    assert near(other) == 0


def test_near_is_measured_against_the_subjects_most_alike_drawings() -> None:
    training, names = torch.tensor([[0.0], [1.0], [5.0], [100.0], [103.0], [200.0]]), list("aaabbc")
    ours = torch.tensor([[2.5], [1.5], [105.0], [107.0], [0.1], [200.0]])
    # "a" allows less than 1, "b" less than 3, "c" has one drawing; the nearest may be a picture of anything.
    assert estimates.too_near(ours, list("aabbbc"), training, names) == [
        False,
        True,
        True,
        False,
        True,
        False,
    ]


def test_seeds_differ_as_much_as_drawings_if_they_are_the_drawings(
    library: Library, prompts: list[Prompt], planted: Planted
) -> None:
    different = made_up(NOUNS, SIDE)  # discs of one noun have any colours
    seeds = of_kind(prompts, "seeds")
    drawings = [on_white(different.pixels[different.of[p.scene.subjects[0]]]) for p in seeds]
    same = quality.differing(prompts, planted.see([p.image for p in prompts]).features, library, planted)
    assert same.of == len(seeds) and same.value < 0.01  # the same picture for every seed
    images = [prompt.image for prompt in prompts]
    for prompt, pictures in zip(seeds, drawings, strict=True):
        images[prompts.index(prompt)] = pictures[prompt.seed % SEEDS]
    figure = quality.differing(prompts, planted.see(images).features, different, planted)
    assert 0.6 < figure.value < 1.6 and figure.low < figure.value < figure.high


def test_small_parts_are_counted_beside_those_of_real_pictures(
    prompts: list[Prompt], planted: Planted
) -> None:
    real = [prompt.image for prompt in prompts]
    images = [image if i % 2 else np.roll(image, 90, axis=2)[..., [1, 2, 0]] for i, image in enumerate(real)]
    ratio, alone = quality.small_parts(prompts, images, real, planted)
    assert alone.real == pytest.approx(1) and ratio.value == pytest.approx(alone.value / alone.real)
    assert 0.3 < ratio.value < 0.8 and ratio.of == 12


def test_the_judges_own_figures_are_sums_over_looks(planted: Planted) -> None:
    everything, *looks = quality.examined(planted)
    assert (everything.value, everything.of) == (16 / 20, 20) and not everything.met
    assert [(figure.value, figure.of) for figure in looks] == [(0.9, 10), (1, 4), (0.5, 6)]


def test_a_score_counts_only_what_a_row_needs(prompts: list[Prompt]) -> None:
    needs = ("subject", "manner", "dye", "background", "where", "place")
    every = dict.fromkeys(needs, True) | {"manner": False}
    drawn = [every | {"subject": p.seed % 2 == 0} for p in prompts]
    figures = {f.name: f for f in quality.score(prompts, drawn, [every] * len(prompts))}
    assert figures["subject, among 20"].value == 0.5 and figures["subject, among 20"].of == 12
    assert figures["  style alone"].value == 0.0
    assert figures["background and subject"].value == 0.5
    assert figures["  background alone"].value == 1.0
    assert figures["left, right, small, two: where and subject"].of == 18
    for name, figure in figures.items():
        assert figure.real == (0 if "style" in name or "look" in name else 1)
        assert figure.low <= figure.value <= figure.high


FIGURES = [
    quality.share("subject, among 20", 95, 100, 0.99, 0.90),
    quality.share("dye", 10, 40, 1.0, 0.80),
    quality.share("no target", 1, 2),
    Figure("seeds", 0.7312, 0.7, 0.76, 80, 1.0, 0.6, "ratio"),
    Figure("seconds", 2.5, 2.4, 2.6, 5, target=3.0, unit="s", at_most=True),
    Figure("weights", 34.5, 34.5, 34.5, 1, target=34, unit="MiB", at_most=True),
]


def test_the_table_says_which_targets_are_met() -> None:
    lines = [" ".join(line.split()) for line in quality.table(FIGURES).splitlines()][1:]
    assert lines[0] == "subject, among 20 95.0 % 88.8 – 97.8 100 99.0 ≥ 90 % met"
    assert lines[1].endswith("≥ 80 % not met")
    assert lines[2] == "no target 50.0 % 9.5 – 90.5 2"
    assert lines[3] == "seeds 0.73 0.70 – 0.76 80 1.00 ≥ 0.6 met"
    assert lines[4].endswith("≤ 3 s met") and lines[5].endswith("≤ 34 MiB not met")


def test_the_card_gets_the_figures_and_keeps_the_rest() -> None:
    card = "# A\n\n<!-- python -m bench.quality --card -->\nold\n<!-- end -->\n\nB\n"
    once = quality.with_figures(card, FIGURES)
    assert once.startswith("# A\n") and once.endswith("\n\nB\n") and "old" not in once
    assert "| subject, among 20 | 95.0 % | 88.8 – 97.8 | 100 | 99.0 | ≥ 90 % | met |\n" in once
    assert quality.with_figures(once, FIGURES) == once
    with pytest.raises(ValueError, match="lacks the marks"):
        quality.with_figures("# A\n", FIGURES)


def test_the_cards_figures_are_the_reports() -> None:
    """Nobody edits the card's figures by hand."""
    report, card = Path(quality.__file__).with_name("quality.json"), quality.CARD.read_text(encoding="utf-8")
    rows = json.loads(report.read_text(encoding="utf-8"))["figures"] if report.exists() else []
    assert quality.with_figures(card, [Figure.read(row) for row in rows]) == card


def test_pictures_that_the_vae_changes_by_one_level_have_48_db(
    prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [np.full((8, 8, 3), level, np.uint8) for level in (0, 100, 200)]
    monkeypatch.setattr(quality, "through_vae", lambda pipe, images: [image + 1 for image in images])
    figure = quality.psnr("", Painter(prompts), images, target=30.0)  # type: ignore[arg-type]
    assert figure.value == pytest.approx(48.13, abs=0.01) and figure.met


# ---- the judge


@pytest.mark.slow
def test_a_judge_learns_once_and_then_comes_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REIFUSION_CACHE", str(tmp_path))
    prepared_library(tmp_path / "mini", NOUNS[:6])
    library = made_up(NOUNS[:6], 256)
    for sprite, record in zip(library.pixels, library.sprites, strict=True):
        top = 32 + 32 * NOUNS.index(record.subject)
        sprite[:3, top : top + 32] = 0  # the place of the disc's black belt tells subjects apart
    monkeypatch.setattr(judging, "read_library", lambda pixels=True: library)
    loop = LoopConfig(steps=60, lr=5e-3, warmup=5, decay=0.5, ema=0.9)
    recipe = JudgeTraining(
        side=32, channels=(16, 16), width=32, joint=16, scenes=2, batch=4, parts=2, loop=loop
    )
    judge = judging.get_judge(recipe)
    path = tmp_path / f"judge-{judge.id}.safetensors"
    assert {each.name for each in tmp_path.iterdir()} == {"mini", path.name}
    right = torch.tensor([judge.subjects.index(sprite.subject) for sprite in library.sprites])
    images = on_white(library.pixels)
    seen = judge.see(images)
    assert (seen.subjects.argmax(1) == right).float().mean() > 0.6  # by chance 1 in 6
    assert sum(of for _, of in judge.unseen.values()) == 6
    assert judge.see_parts(images[:2], 3).shape == (2, 3, 6)
    assert set(seen.manners) <= set(MANNERS)

    def fail(*_: object) -> Judge:
        raise AssertionError("trained again")

    monkeypatch.setattr(judging, "train_judge", fail)
    again = judging.get_judge(recipe)
    assert torch.equal(again.see(images).subjects, seen.subjects)
    assert replace(again, model=judge.model) == judge
    with pytest.raises(AssertionError, match="trained again"):  # another recipe is another judge
        judging.get_judge(replace(recipe, width=16))


def test_a_judge_learns_from_every_sprite_in_scenes_of_all_kinds(tmp_path: Path) -> None:
    library = made_up(NOUNS[:6], SIDE)
    recipe = JudgeTraining(side=32, scenes=4)
    views, manners, places, parts = bank = judging._bank(library, recipe, tmp_path)
    assert views.shape == (54, 4, 36, 36, 3) and manners.shape == places.shape == (54, 4)
    assert parts.shape == views.shape and all(part.float().std() > 1 for part in parts)
    styled = manners >= len(judging.MEDIA)
    looks = [MANNERS.index(sprite.look) for sprite in library.sprites]
    plain = torch.where(styled, torch.tensor(looks)[:, None], manners)
    assert torch.equal(plain, torch.tensor(looks)[:, None].expand(54, 4))
    assert set(manners[styled].tolist()) == {MANNERS.index(style) for style in judging.STYLES}
    assert set(places.flatten().tolist()) == {*range(NOWHERE), NOWHERE}
    assert not (styled & (places < NOWHERE)).any()
    again = judging._bank(library, recipe, tmp_path)  # kept in the folder
    assert all(torch.equal(one, two) for one, two in zip(bank, again, strict=True))


def test_the_loss_is_low_only_for_the_right_pairs() -> None:
    names = torch.eye(4)
    low, figures = judging.contrastive_loss(20 * names, names)
    assert low < 1e-3 and figures["right"] == 1
    high, figures = judging.contrastive_loss(20 * names.roll(1, 0), names)
    assert high > 10 and figures["right"] == 0


def test_augmented_pictures_are_decided_by_the_generator() -> None:
    x = torch.rand(5, 3, 36, 36) * 2 - 1
    one, two = (judging.augment(x, 32, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two) and one.shape == (5, 3, 32, 32)
    assert (one - x[..., 2:-2, 2:-2]).abs().mean() > 0.05


def test_parts_are_enlarged_windows_of_sprites() -> None:
    sprites = ball((0.2, 0.4, 0.8), 128)[None].repeat(8, 1, 1, 1)
    parts = judging.random_parts(sprites, 48, torch.Generator().manual_seed(0))
    assert parts.shape == (8, 3, 48, 48)
    blue = (parts[:, 2] > parts[:, 0] + 0.2).float().mean((1, 2))
    assert 0.3 < blue.mean() < 1 and len(blue.unique()) > 4  # at different places, mostly of the disc


# ---- the command


def test_wrong_input_is_one_sentence_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ["--model", "/no/such/model"], ["--steps", "0"], ["--sampler", "nonsense"], ["--prompts", "9"]
    ):  # fmt: skip
        with pytest.raises(SystemExit) as stopped:
            quality.main(arguments)
        assert stopped.value.code == 2
        assert len(capsys.readouterr().err.strip().splitlines()[-1]) < 400


class Painter:
    """A model that draws the real pictures and counts them."""

    def __init__(self, prompts: list[Prompt]):
        self.config, self.dtype, self.models = (
            ModelConfig(size=8),
            torch.float32,
            dict[str, torch.nn.Module](),
        )
        self.real = {prompt.text: prompt.image for prompt in prompts}
        self.drawn = 0

    def generate(self, texts: str | list[str], **settings: object) -> list[Image.Image]:
        chosen = [self.real.get(text, next(iter(self.real.values()))) for text in texts]
        self.drawn += len(chosen) if isinstance(texts, list) else 0
        return [Image.fromarray(image) for image in chosen]


def test_a_report_is_whole_and_drawn_once(
    library: Library, prompts: list[Prompt], planted: Planted, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Runs the command from end to end with a model that draws the real pictures, so everything is right."""
    painter = Painter(prompts)
    planted.model = torch.nn.Linear(1, 1)  # type: ignore[assignment]
    monkeypatch.setenv("REIFUSION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(quality, "SIDE", SIDE)
    monkeypatch.setattr(quality, "load", lambda name: painter)
    monkeypatch.setattr(quality, "get_judge", lambda: planted)
    monkeypatch.setattr(quality, "read_library", lambda: library)
    monkeypatch.setattr(quality, "make_prompts", lambda library, counts: prompts)
    monkeypatch.setattr(quality, "through_vae", lambda pipe, images: list(images))
    assert any(is_held_out(sprite) for sprite in library.sprites)
    assert quality.main(["--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "quality.json").read_text())
    read = [Figure.read(row) for row in report["figures"]]
    assert [asdict(figure) | {"met": figure.met} for figure in read] == report["figures"]
    figures = {figure.name: figure for figure in read}
    assert figures["  background alone"].value == figures["  dye alone"].real == 1.0
    seeds = figures.pop("do seeds differ? ÷ real drawings")  # not those of a model that has one drawing
    assert seeds.value < 0.01 and not seeds.met
    assert all(figure.real in (None, figure.value) for figure in figures.values())
    assert quality.table(read) in capsys.readouterr().out
    sheets = {path.stem for path in (tmp_path / "out" / "quality-sheets").glob("*.png")}
    assert sheets == {kind.replace(" ", "-") for kind in COUNTS} | {"nearest"}
    assert not list(tmp_path.rglob(".*"))

    # A run that was stopped after a few pictures goes on from there.
    assert painter.drawn == len(prompts)
    next(tmp_path.glob("cache/quality-*/*.png")).unlink()
    assert quality.main(["--out", str(tmp_path / "out")]) == 0
    assert len(prompts) + 6 <= painter.drawn <= len(prompts) + 2 * SEEDS  # the batch in which it was


def test_a_file_is_weighed(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(3 * 2**20))
    (figure,) = quality.weight(str(file))
    assert figure.value == 3 and figure.met
    assert quality.weight("somebody/some-model") == []
