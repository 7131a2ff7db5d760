"""The evaluation's own promises, on made-up sprites and with a judge whose verdicts are known."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from bench import estimates, pixels, quality
from bench import judge as judging
from bench.judge import Judge, JudgeTraining, Seen, choices, retrieved
from bench.pixels import on_white
from bench.prompts import COUNTS, Prompt, make_prompts
from bench.quality import Figure
from reifusion.model.config import ModelConfig, VAEConfig
from reifusion.model.decoder import Decoder
from reifusion.model.encoder import Encoder
from reifusion.model.pipeline import StableDiffusion
from reifusion.train.loop import LoopConfig
from reifusion.train.mini import scenes
from reifusion.train.mini.scenes import COLOURS, DYES, SceneConfig, Sprites, background_colour, compose
from reifusion.train.mini.sprites import (
    STYLES,
    held_out_colour,
    held_out_sprites,
    held_out_style,
    training_sprites,
)
from tests.sprites import NOUNS, prepared
from tests.sprites import disc as draw_disc

disc = partial(draw_disc, eye=True)
slowly = settings(deadline=None, max_examples=50)  # however busy the machine is


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with a prepared file: every noun in every style, each a disc of its own colour."""
    return prepared(tmp_path_factory.mktemp("cache"), eye=True, brightest=220)


@pytest.fixture(scope="module")
def trained(cache: Path) -> Sprites:
    return Sprites(*training_sprites(cache))


@pytest.fixture(scope="module")
def drawings(cache: Path) -> Sprites:
    """Returns all drawings."""
    return Sprites(*judging.all_pictures(cache))


@pytest.fixture(scope="module")
def prompts(cache: Path, trained: Sprites) -> list[Prompt]:
    held_out = Sprites(*held_out_sprites(cache))
    return make_prompts(trained, held_out, {kind: 6 for kind in COUNTS})


def of_kind(prompts: list[Prompt], kind: str) -> list[Prompt]:
    return [prompt for prompt in prompts if prompt.kind == kind]


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


@slowly
@given(st.integers(2, 6), st.integers(2, 6), st.integers(1, 5), st.integers(0, 99))
def test_kid_is_what_two_loops_compute(m: int, n: int, d: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(count, d, generator=generator, dtype=torch.float64) for count in (m, n))

    def k(a: Tensor, b: Tensor) -> float:
        return (float(a @ b) / d + 1) ** 3

    expected = sum(k(x[i], x[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    expected += sum(k(y[i], y[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    expected -= 2 * sum(k(a, b) for a in x for b in y) / (m * n)
    assert estimates.kid(x, y) == pytest.approx(expected, abs=1e-8)


def test_kid_is_zero_for_alike_sets_and_grows_as_they_part() -> None:
    generator = torch.Generator().manual_seed(0)
    alike = [estimates.kid(*torch.randn(2, 100, 16, generator=generator)) for _ in range(100)]
    error = np.std(alike) / 10
    assert abs(np.mean(alike)) < 3 * error  # unbiased
    assert min(alike) < 0 < max(alike)
    x, y = torch.randn(2, 200, 16, generator=generator)
    apart = [estimates.kid(x, y + shift) for shift in (0.0, 0.3, 0.6, 1.2)]
    assert apart == sorted(apart) and apart[1] > 3 * np.std(alike)


def test_kid_interval_is_as_wide_as_kid_spreads_on_new_sets() -> None:
    generator = torch.Generator().manual_seed(1)

    def sets() -> tuple[Tensor, Tensor]:
        x, y = torch.randn(2, 80, 8, generator=generator)
        return x, y + 0.5

    spread = float(np.std([estimates.kid(*sets()) for _ in range(200)]))
    low, high = estimates.kid_interval(*sets())
    assert 0.6 < (high - low) / (2 * 1.96 * spread) < 1.6


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
        shade = background_colour(rng, name) if name in COLOURS else (255, 255, 255)
        canvas = Image.new("RGB", (128, 128), shade)
        subject = Image.fromarray(disc((90, 60, 30)))
        canvas.paste(subject, (0, 40), subject)  # the subject cuts a little of the rim
        noise = rng.normal(0, 4, (128, 128, 3))
        assert pixels.background_name((np.asarray(canvas) + noise).clip(0, 255).astype(np.uint8)) == name


def test_a_background_of_many_colours_has_no_name() -> None:
    bands = [np.full((128, 32, 3), COLOURS[name], np.uint8) for name in ("red", "green", "blue", "yellow")]
    assert pixels.background_name(np.concatenate(bands, axis=1)) == ""


@pytest.mark.parametrize("colour", DYES)
@pytest.mark.parametrize("rgb", [(235, 200, 190), (120, 120, 125), (180, 110, 60), (60, 160, 60)])
def test_a_dyed_subject_has_the_colour_of_its_dye(rgb: tuple[int, int, int], colour: str) -> None:
    image = on_white(scenes.dye(disc(rgb), colour))
    assert pixels.dye_name(image) == colour
    assert pixels.dye_name(image[::-1, ::2]) == colour  # wherever, and however large


def test_grey_has_no_dye() -> None:
    assert pixels.dye_name(on_white(disc((120, 120, 120)))) == ""
    assert pixels.dye_name(np.full((128, 128, 3), 255, np.uint8)) == ""


def test_places_and_sizes_are_those_of_the_scene(trained: Sprites) -> None:
    config = SceneConfig(plain=0, background=0, dyed=0, placed=1, two=0, combine=0.3)
    seen = set()
    for i in range(150):
        scene = compose(np.random.default_rng([1, i]), trained, config)
        across = {"left": "left", "right": "right"}.get(scene.tags["position"].split()[-1], "middle")
        assert pixels.side_name(scene.image) == across
        small = scene.tags["size"] == "small"
        assert (pixels.extent(scene.image) < quality.SMALL) == small
        seen |= {across, small}
    assert seen == {"left", "right", "middle", True, False}


@slowly
@given(st.floats(0.2, 0.9), st.integers(-20, 20), st.integers(-20, 20), st.sampled_from(sorted(COLOURS)))
def test_a_crop_shows_the_same_wherever_the_subject_is(scale: float, x: int, y: int, ground: str) -> None:
    side, reach = round(128 * scale), round(64 - 56 * scale)
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


# ---- prompts


def test_prompts_are_always_the_same_and_never_twice(
    cache: Path, trained: Sprites, prompts: list[Prompt]
) -> None:
    held_out = Sprites(*held_out_sprites(cache))
    again = make_prompts(trained, held_out, {kind: 6 for kind in COUNTS})
    fewer = make_prompts(trained, held_out, {"style": 2, "two": 3})
    assert [p.text for p in prompts] == [p.text for p in again]
    assert len({p.text for p in prompts}) == len({p.seed for p in prompts}) == len(prompts) == 6 * len(COUNTS)
    chosen = of_kind(prompts, "style")[:2] + of_kind(prompts, "two")[:3]
    assert [(p.text, p.seed) for p in fewer] == [(p.text, p.seed) for p in chosen]


def test_held_out_prompts_are_held_out_and_the_others_are_not(prompts: list[Prompt]) -> None:
    for prompt in prompts:
        tags = prompt.scene.tags
        for subject, colour in zip(tags["subjects"], tags["colours"], strict=True):
            assert held_out_style(subject, tags["style"]) == (prompt.kind == "style held out")
            if colour:
                assert held_out_colour(subject, colour) == (prompt.kind == "dye held out")


def test_prompts_say_what_their_scenes_show(prompts: list[Prompt]) -> None:
    for prompt in prompts:
        tags, words = prompt.scene.tags, prompt.text.replace(",", "").split()
        assert all(set(subject.split()) <= set(words) for subject in tags["subjects"])
        assert (tags["style"] in words) == prompt.kind.startswith("style")
        assert all(colour in words for colour in filter(None, tags["colours"]))
        assert bool(tags["colours"][0]) == prompt.kind.startswith("dye")
        if prompt.kind == "left or right":
            assert tags["position"] in words


@slowly
@given(st.integers(50, 500))
def test_fewer_prompts_keep_their_proportions(count: int) -> None:
    assert sum(COUNTS.values()) == 500
    part = quality.portion(count)
    assert sum(part.values()) == count
    assert all(abs(part[kind] - n * count / 500) < 1 for kind, n in COUNTS.items())


def test_too_few_pictures_for_the_prompts_is_an_error(trained: Sprites) -> None:
    with pytest.raises(ValueError, match="give 67 prompts of the kind 'plain', not 99"):
        make_prompts(trained, trained, {"plain": 99})


# ---- judging


class Planted(Judge):
    """A judge that recognises a picture by the mean colour of its crop."""

    def __init__(self, known: dict[str, np.ndarray]):
        self.subjects, self.id, self.vae = list(known), "planted", ""
        self.unseen = {"3d": (9, 10), "flat": (4, 4), "cartoon": (3, 6)}
        self.known = torch.tensor(np.stack([self._mean(image) for image in known.values()]))

    @staticmethod
    def _mean(image: np.ndarray) -> np.ndarray:
        return image[pixels.foreground(image)].mean(0).astype(np.float32)

    def see(self, images) -> Seen:
        means = torch.tensor(np.stack([self._mean(image) for image in images]))
        return Seen(means, -torch.cdist(means, self.known))


@pytest.fixture(scope="module")
def planted(trained: Sprites) -> Planted:
    return Planted({subject: on_white(trained.get(subject, "3d")) for subject in trained.subjects})


def test_real_pictures_pass_their_own_tests(
    prompts: list[Prompt], planted: Planted, drawings: Sprites
) -> None:
    some = [p for p in prompts if p.kind in ("plain", "background", "left or right", "small", "two")]
    said, features = quality.verdicts([p.scene.image for p in some], some, planted, drawings)
    assert features.shape == (len(some), 3)
    for prompt, right in zip(some, said, strict=True):
        if prompt.scene.tags["style"] == "3d":
            assert all(right.values()), (prompt.text, right)


def test_other_pictures_fail(prompts: list[Prompt], planted: Planted, drawings: Sprites) -> None:
    for kind, failing in (("plain", "subject"), ("background", "background"), ("dye", "dye"),
                          ("two", "subject")):  # fmt: skip
        some = of_kind(prompts, kind)
        others = [p.scene.image for p in some[1:] + some[:1]]
        said, _ = quality.verdicts(others, some, planted, drawings)
        assert sum(right[failing] for right in said) <= 3, kind
    mirrored = of_kind(prompts, "left or right")
    said, _ = quality.verdicts([p.scene.image[:, ::-1] for p in mirrored], mirrored, planted, drawings)
    assert not any(right["place"] for right in said)
    swapped = of_kind(prompts, "two")
    said, _ = quality.verdicts(
        [np.roll(p.scene.image, 64, axis=1) for p in swapped], swapped, planted, drawings
    )
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


@pytest.mark.parametrize("style", STYLES)
def test_a_style_is_known_by_the_drawing_it_is_nearest_to(style: str, drawings: Sprites) -> None:
    for subject in drawings.subjects[:10]:
        image = on_white(drawings.get(subject, style))
        darker = (0.9 * image[:, ::-1]).astype(np.uint8)
        assert quality.style_name(image, subject, drawings) == style
        assert quality.style_name(darker, subject, drawings) == style


@pytest.mark.parametrize("asked, shown, right", [
    ("3d", "3d", (True, True)), ("3d", "glossy", (False, True)), ("glossy", "3d", (False, True)),
    ("flat", "glossy", (False, False)), ("flat", "cartoon", (False, False)),
    ("cartoon", "cartoon", (True, True)),
])  # fmt: skip
def test_two_words_for_one_look_are_equally_right(
    asked: str, shown: str, right: tuple, planted: Planted, drawings: Sprites
) -> None:
    subject = planted.subjects[0]
    tags = {"kind": "plain", "subjects": [subject], "style": asked}
    image = on_white(drawings.get(subject, shown))
    said, _ = quality.verdicts(
        [image], [Prompt("style", "", 1, scenes.Scene(image, "", tags))], planted, drawings
    )
    assert (said[0]["style"], said[0]["look"]) == right


def test_copies_are_told_from_new_drawings(trained: Sprites) -> None:
    training = [on_white(trained.pixels[i]) for found in trained.index.values() for i in found.values()]
    names = [subject for subject, found in trained.index.items() for _ in found]
    theirs = quality.thumbnails(training)
    away, place = estimates.nearest(theirs[:8], theirs)
    assert place.tolist() == list(range(8)) and away.max() == 0
    assert estimates.too_near(theirs[:8], names[:8], theirs, names) == 8
    new = [image.copy() for image in training[:8]]
    for image in new:
        image[30:90, 30:90] = (255, 0, 255)
    assert estimates.too_near(quality.thumbnails(new), names[:8], theirs, names) == 0


def test_near_is_measured_against_the_subjects_most_alike_drawings() -> None:
    training, names = torch.tensor([[0.0], [1.0], [5.0], [100.0], [103.0]]), ["a", "a", "a", "b", "b"]
    ours = torch.tensor([[2.5], [1.5], [105.0], [107.0], [0.1]])
    # "a" allows less than 1, "b" less than 3; the nearest may be a picture of anything.
    assert [estimates.too_near(x[None], [name], training, names) for x, name in zip(ours, "aabbb")] == [
        0,
        1,
        1,
        0,
        1,
    ]


def test_the_judges_own_figures_are_sums_over_styles(planted: Planted) -> None:
    everything, same_hand, other_hand = quality.examined(planted)
    assert (everything.value, everything.of) == (16 / 20, 20) and not everything.met
    assert (same_hand.value, same_hand.of) == (13 / 14, 14)
    assert (other_hand.value, other_hand.of) == (3 / 6, 6)


def test_a_score_counts_only_what_a_row_needs(prompts: list[Prompt]) -> None:
    every = {"subject": True, "style": False, "look": True, "dye": True, "background": True, "place": True}
    drawn = [every | {"subject": p.seed % 2 == 0} for p in prompts]
    figures = {f.name: f for f in quality.score(prompts, drawn, [every] * len(prompts))}
    assert figures["subject, among 20"].value == 0.5 and figures["subject, among 20"].of == 12
    assert figures["style, among the three looks of the subject"].value == 1.0
    assert figures["  and among its four drawings"].value == 0.0
    assert figures["background colour"].value == 1.0
    assert figures["left, right, small, two: place and subject"].value == 0.5
    for name, figure in figures.items():
        assert figure.real == (0 if name == "  and among its four drawings" else 1)
        assert figure.low <= figure.value <= figure.high


FIGURES = [
    quality.share("subject, among 20", 95, 100, 0.99, 0.90),
    quality.share("dye", 10, 40, 1.0, 0.80),
    quality.share("no target", 1, 2),
    Figure("KID, ×10³", 0.01234, 0.01, 0.0156, 80, 0.001, unit="×10⁻³"),
    Figure("seconds", 2.5, 2.4, 2.6, 5, target=3.0, unit="s"),
    Figure("seconds", 3.5, 3.4, 3.6, 5, target=3.0, unit="s"),
]


def test_the_table_says_which_targets_are_met() -> None:
    lines = [" ".join(line.split()) for line in quality.table(FIGURES).splitlines()][1:]
    assert lines[0] == "subject, among 20 95.0 % 88.8 – 97.8 100 99.0 ≥ 90 % met"
    assert lines[1].endswith("≥ 80 % not met")
    assert lines[2] == "no target 50.0 % 9.5 – 90.5 2"
    assert lines[3] == "KID, ×10³ 12.3 10.0 – 15.6 80 1.0"
    assert lines[4].endswith("≤ 3 s met") and lines[5].endswith("≤ 3 s not met")


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
    pipe: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [np.full((8, 8, 3), level, np.uint8) for level in (0, 100, 200)]
    monkeypatch.setattr(quality, "through_vae", lambda pipe, images: [image + 1 for image in images])
    figure = quality.psnr("", pipe, images, target=30.0)
    assert figure.value == pytest.approx(48.13, abs=0.01) and figure.met


# ---- the judge


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion:
    """A tiny VAE with random weights: it returns anything except the picture."""
    torch.manual_seed(0)
    vae = VAEConfig(channels=(8, 8, 8, 8), layers=1, groups=4)
    models: dict[str, torch.nn.Module] = {"encoder": Encoder(vae).eval(), "decoder": Decoder(vae).eval()}
    return StableDiffusion(ModelConfig(vae=vae), None, models)


def test_a_judge_learns_once_and_then_comes_from_the_cache(
    cache: Path, pipe: StableDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawings, records = training_sprites(cache)
    chosen = [i for i, picture in enumerate(records) if picture.subject in NOUNS[:6]]
    drawings, records = drawings[chosen].copy(), [records[i] for i in chosen]
    for sprite, picture in zip(drawings, records, strict=True):
        top = 16 + 16 * NOUNS.index(picture.subject)
        sprite[top : top + 16, :, :3] = 0  # the place of the disc's black belt tells subjects apart
    monkeypatch.setattr(judging, "load", lambda name: pipe)
    monkeypatch.setattr(judging, "all_pictures", lambda cache_dir: (drawings, records))
    others = drawings[::4, :, ::-1], [replace(picture, style="another hand") for picture in records[::4]]
    monkeypatch.setattr(judging.others, "other_pictures", lambda subjects, cache_dir: others)
    loop = LoopConfig(steps=40, lr=5e-3, warmup=5, decay=0.5, ema=0.9)
    recipe = JudgeTraining(side=32, channels=(16, 16), width=32, joint=16, scenes=4, batch=6, loop=loop)
    judge = judging.get_judge(recipe, tmp_path / "mini")
    assert [path.name for path in tmp_path.iterdir()] == [f"judge-{judge.id}.safetensors"]
    images = [on_white(sprite) for sprite in drawings]
    right = torch.tensor([judge.subjects.index(picture.subject) for picture in records])
    assert (judge.see(images).subjects.argmax(1) == right).float().mean() > 0.6  # by chance 1 in 6
    assert sum(of for _, of in judge.unseen.values()) == 6  # no other artist's drawings among them
    assert set(judge.unseen) <= set(STYLES)

    def fail(*_: object) -> Judge:
        raise AssertionError("trained again")

    monkeypatch.setattr(judging, "train_judge", fail)
    again = judging.get_judge(recipe, tmp_path / "mini")
    assert torch.equal(again.see(images).subjects, judge.see(images).subjects)
    assert replace(again, model=judge.model) == judge
    with pytest.raises(AssertionError, match="trained again"):  # another recipe is another judge
        judging.get_judge(replace(recipe, width=16), tmp_path / "mini")


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
        self.config, self.dtype, self.models = ModelConfig(), torch.float32, dict[str, torch.nn.Module]()
        self.real = {prompt.text: prompt.scene.image for prompt in prompts}
        self.drawn = 0

    def generate(self, texts: str | list[str], **settings: object) -> list[Image.Image]:
        chosen = [self.real.get(text, next(iter(self.real.values()))) for text in texts]
        self.drawn += len(chosen) if isinstance(texts, list) else 0
        return [Image.fromarray(image) for image in chosen]


def test_a_report_is_whole_and_drawn_once(
    prompts: list[Prompt], planted: Planted, cache: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Runs the command from end to end with a model that draws the real pictures, so everything is right."""
    painter = Painter(prompts)
    planted.model = torch.nn.Linear(1, 1)  # type: ignore[assignment]
    monkeypatch.setenv("REIFUSION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(quality, "load", lambda name: painter)
    monkeypatch.setattr(quality, "get_judge", lambda: planted)
    monkeypatch.setattr(quality, "make_prompts", lambda counts: prompts)
    monkeypatch.setattr(quality, "through_vae", lambda pipe, images: list(images))
    monkeypatch.setattr(quality, "training_sprites", lambda: training_sprites(cache))
    monkeypatch.setattr(quality, "all_pictures", lambda: judging.all_pictures(cache))
    monkeypatch.setattr(quality, "held_out_sprites", lambda: held_out_sprites(cache))
    monkeypatch.setattr(quality, "unseen_pictures", lambda: [on_white(disc((9, 9, 9)))] * 2)
    assert quality.main(["--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "quality.json").read_text())
    read = [Figure.read(row) for row in report["figures"]]
    assert [asdict(figure) | {"met": figure.met} for figure in read] == report["figures"]
    figures = {figure.name: figure for figure in read}
    assert figures["background colour"].value == figures["  dye alone"].real == 1.0
    assert all(figure.real in (None, figure.value) for figure in read)
    assert figures["too near to a training picture"].value == 1.0  # its pictures are copies
    assert quality.table(read) in capsys.readouterr().out
    sheets = {path.stem for path in (tmp_path / "out" / "quality-sheets").glob("*.png")}
    assert sheets == {kind.replace(" ", "-") for kind in COUNTS} | {"nearest"}
    assert not list(tmp_path.rglob(".*"))

    # A run that was stopped after a few pictures goes on from there.
    assert painter.drawn == len(prompts)
    next(tmp_path.glob("cache/quality-*/*.png")).unlink()
    assert quality.main(["--out", str(tmp_path / "out")]) == 0
    assert painter.drawn == len(prompts) + 6  # the batch in which it was
