"""Soft masks, only the masked part, and outpainting, beside OpenCV's and diffusers' ways."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from reifusion.album import read
from reifusion.cli.main import main
from reifusion.model.pipeline import StableDiffusion
from reifusion.settings import Settings
from reifusion.steer import masks, outpaint
from reifusion.weights import save
from tests.tiny import SMALL, WORDS, networks


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion:
    return StableDiffusion(SMALL, WORDS, networks(SMALL, noise=0.02))


def mask_of(size: tuple[int, int], *boxes: tuple[int, int, int, int]) -> Image.Image:
    mask = Image.new("L", size)
    for box in boxes:
        mask.paste(255, box)
    return mask


@pytest.mark.parametrize("blur", [0.5, 2.0, 4.0, 7.3])
def test_a_mask_is_blurred_as_opencv_does_it(blur):
    cv2 = pytest.importorskip("cv2")
    mask = mask_of((61, 44), (0, 3, 20, 20), (40, 30, 61, 44))
    reach = 2 * int(2.5 * blur + 0.5) + 1
    for kind, tolerance in ((np.float64, 0.5 + 1e-6), (np.uint8, 2)):  # which is rounded twice, as A1111 does
        theirs = cv2.GaussianBlur(np.array(mask, kind), (reach, 1), blur)
        theirs = cv2.GaussianBlur(theirs, (1, reach), blur)
        assert np.abs(np.asarray(masks.blurred(mask, blur)).astype(float) - theirs).max() <= tolerance
    assert masks.blurred(mask, 0) is mask


def test_the_part_to_draw_is_that_of_diffusers_where_it_fits():
    random, same, beyond = np.random.default_rng(0), 0, 0
    for _ in range(300):
        size = int(random.integers(20, 120)), int(random.integers(20, 120))
        x, y = (int(random.integers(0, side - 4)) for side in size)
        box = (x, y, x + int(random.integers(1, 30)), y + int(random.integers(1, 30)))
        mask, padding = mask_of(size, box), int(random.integers(0, 20))
        asked = int(8 * random.integers(2, 9)), int(8 * random.integers(2, 9))
        theirs = VaeImageProcessor.get_crop_region(mask, *asked, pad=padding)
        ours = masks.region(mask, padding, asked)
        if min(ours[:2]) < 0 or ours[2] > mask.width or ours[3] > mask.height:
            beyond += 1  # theirs loses the ratio here
            assert abs((ours[2] - ours[0]) * asked[1] - (ours[3] - ours[1]) * asked[0]) <= max(asked)
        else:
            same += 1
            assert ours == tuple(theirs)
    assert same > 100 and beyond > 20


def test_an_empty_mask_is_refused_and_no_padding_is_a_padding():
    with pytest.raises(ValueError, match="black everywhere"):
        masks.region(Image.new("L", (8, 8)), 0, (8, 8))
    assert masks.region(mask_of((64, 64), (8, 8, 16, 16)), 0, (32, 32)) == (8, 8, 16, 16)


def pictures(folder, size=(90, 70)) -> tuple[str, str]:
    picture = Image.effect_noise(size, 60).convert("RGB")
    picture.save(folder / "photo.png")
    mask_of(size, (50, 20, 60, 34)).save(folder / "mask.png")
    return str(folder / "photo.png"), str(folder / "mask.png")


def test_only_the_masked_part_is_drawn_at_full_size_and_all_else_stays_bit_by_bit(pipe, tmp_path):
    photo, mask = pictures(tmp_path)
    settings = Settings(
        "a cat", steps=2, cfg=1.0, seed=3, size=(48, 32), init_image=photo, mask=mask, only_masked=5
    )
    seen: list[tuple[int, ...]] = []
    request = settings.request().for_model(pipe.config)
    drawn = settings.draw(pipe, request, callback=lambda step: seen.append(tuple(step.x_t.shape)))
    assert set(seen) == {(1, 4, 16, 24)}  # SMALL's factor is 2
    before, after = (np.asarray(one).astype(int) for one in (Image.open(photo), drawn))
    hidden = np.asarray(Image.open(mask)) == 0
    assert drawn.size == (90, 70) and (before == after)[hidden].all()
    assert np.abs(before - after)[~hidden].mean() > 10
    # The part that was drawn is what a request for that part alone draws.
    box = masks.region(Image.open(mask), 5, (48, 32))
    part = settings.draw(pipe, request).crop(box)
    inside = masks.only(request, box)
    direct = pipe.generate(inside, progress=False).resize(part.size, Image.Resampling.LANCZOS)
    shown = np.asarray(Image.open(mask).crop(box)) > 0
    assert (np.asarray(part) == np.asarray(direct))[shown].all()


def test_a_soft_mask_changes_little_at_its_edge_and_nothing_beyond_its_reach(pipe, tmp_path):
    photo, mask = pictures(tmp_path, (48, 48))
    mask_of((48, 48), (16, 16, 32, 32)).save(mask)
    settings = Settings(
        "a cat", steps=2, cfg=1.0, seed=3, size=(48, 48), init_image=photo, mask=mask, mask_blur=2
    )
    drawn = np.asarray(settings.draw(pipe, settings.request().for_model(pipe.config))).astype(int)
    changes = np.abs(drawn - np.asarray(Image.open(photo))).mean(2)
    assert changes[:11].max() == 0 and changes[:, 37:].max() == 0  # 2.5 σ = 5 pixels
    assert 0 < changes[12:15, 18:30].mean() < changes[18:30, 18:30].mean()


def test_a_picture_is_continued_beyond_its_border_and_stays_inside(pipe, tmp_path):
    photo, _ = pictures(tmp_path, (50, 40))
    settings = Settings(
        "a cat", steps=2, cfg=1.0, seed=3, init_image=photo, outpaint=(0, 12, 30, 0), strength=1
    )
    request = settings.request().for_model(pipe.config)
    assert request.size == (128, 64)  # multiples of 64
    drawn = settings.draw(pipe, request)
    assert drawn.size == (80, 52) and drawn.info["seed"] == 3
    assert drawn.crop((0, 12, 50, 52)).tobytes() == Image.open(photo).tobytes()
    above = np.asarray(drawn)[:12].astype(int)
    assert above.std() > 5  # something is there


@pytest.mark.parametrize("by", ["lanczos", "latent"])
def test_a_second_pass_keeps_what_a_mask_keeps(pipe, tmp_path, by):
    photo, mask = pictures(tmp_path, (48, 48))
    mask_of((48, 48), (16, 16, 32, 32)).save(mask)
    usual = Settings("a cat", steps=2, cfg=1.0, seed=3, init_image=photo, hires=2, hires_by=by)
    settings = replace(usual, size=(48, 48), mask=mask)
    drawn = settings.draw(pipe, settings.request().for_model(pipe.config))
    large = Image.open(photo).resize((96, 96), Image.Resampling.LANCZOS)
    apart = np.abs(np.asarray(drawn).astype(int) - np.asarray(large)).mean(2)
    assert drawn.size == (96, 96) and drawn.info["seed"] == 3
    assert apart[:26].max() == 0 and apart[:, 70:].max() == 0 and apart[36:60, 36:60].mean() > 5
    # The picture is continued to twice the sides that were asked for.
    settings = replace(usual, outpaint=(0, 12, 30, 0), strength=1)
    drawn = settings.draw(pipe, settings.request().for_model(pipe.config))
    assert drawn.size == (156, 120) and drawn.info["seed"] == 3
    apart = np.abs(np.asarray(drawn.crop((0, 24, 96, 120))).astype(int) - np.asarray(large)).mean(2)
    assert apart[8:88, :88].max() <= 1  # but near what is new


def test_the_mask_of_a_soft_edge_reaches_into_the_picture_on_grown_sides_alone():
    picture = Image.effect_noise((40, 30), 60).convert("RGB")
    larger, mask = outpaint.larger(picture, (0, 0, 24, 0), blur=3)
    levels = np.asarray(mask)
    assert larger.size == mask.size == (64, 64)
    assert (levels[:30, :34] == 0).all() and (levels[:, 34:] == 255).all() and (levels[30:] == 255).all()
    assert larger.crop((0, 0, 40, 30)).tobytes() == picture.tobytes()
    assert np.asarray(larger)[15, 63].std() < 60  # filled, not black
    assert outpaint.read_sides("right=24, top=3") == (0, 3, 24, 0)
    assert outpaint.read_sides(outpaint.write_sides((1, 2, 3, 4))) == (1, 2, 3, 4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mask_blur": 3.0}, "need a mask"),
        ({"only_masked": 3}, "need a mask"),
        ({"outpaint": (0, 0, 8, 0)}, "outpaint needs an init image"),
        ({"outpaint": (0, 0, 0, 0)}, "1 to 4096 pixels"),
        ({"mask_blur": float("nan")}, "mask_blur must be"),
        ({"only_masked": -1}, "only_masked must be"),
        ({"variation": 2.0}, "variation must be"),
        ({"variation_seed": -3}, "variation_seed"),
        ({"manner": "dalle"}, "no manner 'dalle'"),
        ({"rng": "dice"}, "no rng 'dice'"),
    ],
)
def test_what_cannot_be_drawn_is_said_before_a_model_is_loaded(changes, said):
    with pytest.raises(ValueError, match=said):
        Settings("a cat", **changes).request()


def test_the_command_draws_them_and_repeats_them(tmp_path, capsys):
    model = tmp_path / "small.safetensors"
    save(SMALL, networks(SMALL, noise=0.02), model, tokenizer=WORDS)
    photo, mask = pictures(tmp_path)
    usual = [
        "generate",
        "a cat",
        "--model",
        str(model),
        "--steps",
        "2",
        "--seed",
        "3",
        "--dtype",
        "fp32",
        "--quiet",
    ]
    asked = {
        "masked": ["--mask", mask, "--only-masked", "8", "--mask-blur", "2", "--size", "32x32"],
        "grown": ["--outpaint", "right=10,top=6", "--mask-blur", "2"],
    }
    for name, flags in asked.items():
        first, again = tmp_path / f"{name}.png", tmp_path / f"{name}-again.png"
        assert main([*usual, "--init-image", photo, *flags, "--out", str(first)]) == 0
        assert main(["generate", "--like", str(first), "--quiet", "--out", str(again)]) == 0
        assert Image.open(first).tobytes() == Image.open(again).tobytes()
    assert read(tmp_path / "grown.png").settings.outpaint == (0, 6, 10, 0)
    assert main([*usual, "--outpaint", "up=3", "--out", str(tmp_path)]) == 2
    assert "right=128,top=64" in capsys.readouterr().err
