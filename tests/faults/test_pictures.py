"""Pictures that people bring: each is read as its author meant it, or refused in one sentence."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as some
from PIL import Image

from reifusion import families
from reifusion.families.pix2pix import InstructPix2Pix
from reifusion.model.pictures import is_transparent, open_mask, open_picture, read_picture
from reifusion.model.pipeline import StableDiffusion
from reifusion.model.request import Request
from tests.tiny import TINY, Bytes, networks

QUICK: dict[str, Any] = {"steps": 2, "seed": 0, "progress": False}


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(colour: int, bits: int, row: bytes, transparent: bytes = b"", palette: bytes = b"") -> Image.Image:
    """A PNG of two pixels, which Pillow could not always write."""
    chunks = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, bits, colour, 0, 0, 0))
    chunks += chunk(b"PLTE", palette) if palette else b""
    chunks += chunk(b"tRNS", transparent) if transparent else b""
    chunks += chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    return Image.open(io.BytesIO(b"\x89PNG\r\n\x1a\n" + chunks))


# Two pixels: the left one is transparent, the right one white and opaque.
LEFT_TRANSPARENT: dict[str, Any] = {
    "RGBA, white": png(6, 8, bytes([255, 255, 255, 0] + 4 * [255])),
    "RGBA, black": png(6, 8, bytes([0, 0, 0, 0] + 4 * [255])),
    "RGBA, 16 bits": png(6, 16, bytes(6 * [255] + 2 * [0] + 8 * [255])),
    "grey and alpha": png(4, 8, bytes([255, 0, 255, 255])),
    "grey and alpha, 16 bits": png(4, 16, bytes([255, 255, 0, 0] + 4 * [255])),
    "grey with a transparent level": png(0, 8, bytes([254, 255]), struct.pack(">H", 254)),
    "grey, 16 bits, with a transparent level": png(0, 16, bytes([255, 0, 255, 255]), bytes([255, 0])),
    "grey, 1 bit, with a transparent level": png(0, 1, b"\x40", bytes(2)),
    "RGB with a transparent colour": png(2, 8, bytes([9, 9, 9, 255, 255, 255]), bytes([0, 9, 0, 9, 0, 9])),
    "palette": png(3, 8, bytes([0, 1]), bytes([0, 255]), bytes(6 * [255])),
    "palette, 1 bit": png(3, 1, b"\x40", bytes([0]), bytes(6 * [255])),
    "premultiplied": Image.fromarray(np.array([[[0] * 4, [255] * 4]], np.uint8)).convert("RGBa"),
    "premultiplied grey": Image.fromarray(np.array([[[0] * 4, [255] * 4]], np.uint8))
    .convert("LA")
    .convert("La"),
    "PA": Image.fromarray(np.array([[[0] * 4, [255] * 4]], np.uint8)).convert("PA"),
    "an array, RGBA": np.array([[[255, 255, 255, 0], [255] * 4]], np.uint8),
    "an array, grey and alpha": np.array([[[255, 0], [255, 255]]], np.uint8),
}


@pytest.mark.parametrize("name", LEFT_TRANSPARENT)
def test_a_mask_is_what_is_opaque_and_light(name):
    picture = LEFT_TRANSPARENT[name]
    mask = open_mask(picture)
    assert mask.mode == "L" and np.asarray(mask).tolist() == [[0, 255]]
    assert is_transparent(picture)
    assert np.asarray(open_picture(picture)).tolist() == [[[255] * 3] * 2]  # as a picture, white


OPAQUE: dict[str, Any] = {
    "black and white": Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1"),
    "bool": np.array([[False, True]]),
    "16 bits": Image.fromarray(np.array([[0, 65535]], np.uint16)),
    "32 bits": Image.fromarray(np.array([[0, 65535]], np.int32)),
    "floats to 1": Image.fromarray(np.array([[0, 1]], np.float32)),
    "floats to 255": Image.fromarray(np.array([[0, 255]], np.float32)),
    "floats that are none": Image.fromarray(np.array([[np.nan, np.inf]], np.float32)),
    "(H, W, 1)": np.array([[[0], [255]]], np.uint8),
    "opaque RGBA": Image.fromarray(np.array([[[0, 0, 0, 255], [255] * 4]], np.uint8)),
}


@pytest.mark.parametrize("name", OPAQUE)
def test_a_mask_without_transparency_is_what_is_light(name):
    assert np.asarray(open_mask(OPAQUE[name])).tolist() == [[0, 255]]
    assert not is_transparent(OPAQUE[name])


@pytest.mark.parametrize(
    ("picture", "says"),
    [
        (torch.zeros(3, 64, 64), "not Tensor"),
        (b"\x89PNG", "not bytes"),
        ([Image.new("RGB", (8, 8))], "not list"),
        (7, "not int"),
        (np.zeros((3, 64, 64), np.uint8), "not 3×64×64"),
        (np.zeros((1, 64, 64, 3), np.uint8), "not 1×64×64×3"),
        (np.zeros(64, np.uint8), "not 64"),
        (np.zeros((), np.uint8), "height×width"),
        (np.zeros((0, 64, 3), np.uint8), "no pixels"),
        (np.zeros((64, 64, 3)), "not float64"),
        (np.zeros((64, 64, 3), np.int64), "not int64"),
        (np.zeros((64, 64), object), "not object"),
        (Image.new("RGB", (0, 8)), "0×8 has no pixels"),
        ("no such.png", "no such.png"),
        ("a\0b.png", "cannot be read"),
        (".", "cannot be read"),
        ("x" * 5000, "cannot be read"),
    ],
)
def test_anything_else_is_refused_in_one_sentence(picture, says):
    for given_as in ({"init_image": picture}, {"init_image": Image.new("L", (8, 8)), "mask": picture}):
        with pytest.raises(ValueError, match=says) as caught:
            Request("a cat", **given_as)
        assert "\n" not in str(caught.value)


@given(
    some.arrays(
        st.sampled_from([np.uint8, np.int8, np.uint16, np.float32, np.float64, bool, np.complex64]),
        some.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
    )
)
@settings(max_examples=200, deadline=None)
def test_any_array_is_a_picture_or_one_sentence(array):
    try:
        picture, mask = open_picture(array), open_mask(array)
    except ValueError as error:
        assert str(error).startswith("a picture") and len(str(error)) < 120
    else:
        assert picture.mode == "RGB" and mask.mode == "L"
        assert picture.size == mask.size == (array.shape[1], array.shape[0])


@given(st.binary(max_size=200), st.sampled_from(["", "PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"]), st.data())
@settings(max_examples=150, deadline=None)
def test_any_file_is_a_picture_or_one_sentence(tmp_path_factory, noise, kind, data):
    content = noise
    if kind:  # a picture of that format, with the noise somewhere in it
        stream = io.BytesIO()
        Image.new("RGB", (8, 8), "red").save(stream, kind)
        place = data.draw(st.integers(0, len(stream.getvalue())))
        content = stream.getvalue()[:place] + noise + stream.getvalue()[place + len(noise) :]
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(content)
    try:
        assert open_picture(read_picture(path)).mode == "RGB"
    except ValueError as error:
        assert str(path) in str(error)


# Files with more beside the picture than Pillow unpacks


def with_chunk(kind: bytes, data: bytes, at_the_end: bool = False) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(stream, "PNG")
    content = stream.getvalue()
    place = content.index(b"IEND" if at_the_end else b"IDAT") - 4
    return content[:place] + chunk(kind, data) + content[place:]


LARGE = zlib.compress(b"x" * 3_000_000)


@pytest.mark.parametrize("at_the_end", [False, True])
@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (b"zTXt", b"workflow\0\0" + LARGE),
        (b"iTXt", b"workflow\0\1\0\0\0" + LARGE),
        (b"iCCP", b"profile\0\0" + LARGE),
        (b"tEXt", b"workflow\0" + b"x" * 70_000_000),
    ],
)
def test_a_png_with_a_large_text_or_profile_is_read(tmp_path, kind, data, at_the_end):
    if kind == b"iCCP" and at_the_end:
        pytest.skip("a profile stands before the pixels")
    (tmp_path / "a.png").write_bytes(with_chunk(kind, data, at_the_end))
    assert open_picture(tmp_path / "a.png").getpixel((0, 0)) == (255, 0, 0)


def test_the_settings_beside_a_large_text_are_read(tmp_path):
    content = with_chunk(b"zTXt", b"workflow\0\0" + LARGE)
    place = content.index(b"IDAT") - 4
    (tmp_path / "a.png").write_bytes(content[:place] + chunk(b"tEXt", b"reifusion\0{}") + content[place:])
    picture: Any = read_picture(tmp_path / "a.png")
    assert picture.text == {"reifusion": "{}"}


# What a request says about its pictures


def notices(**pictures: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        Request("a cat", **pictures).for_model(TINY)
    return [str(one.message) for one in told]


def grey(level: int, width: int = 8, height: int = 8) -> Image.Image:
    return Image.new("L", (width, height), level)


def test_a_mask_of_another_size_is_fitted_and_said_to_be():
    half = grey(0, 40, 20)
    half.paste(255, (0, 0, 20, 20))
    with pytest.warns(UserWarning, match="the mask of 40×20 was fitted to the init image of 80×40"):
        request = Request("a cat", init_image=grey(9, 80, 40), mask=half)
    fitted = np.asarray(request.mask)
    assert fitted.shape == (40, 80) and (fitted[:, :36] > 250).all() and (fitted[:, 44:] < 5).all()


def test_each_notice_is_given_once_and_only_where_it_is_due():
    hole = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert notices(init_image=hole)[0].startswith("the init image is transparent in places")
    assert len(notices(init_image=hole)) == 1
    assert notices(init_image=hole, mask=grey(255)) == []
    assert notices(init_image=grey(9), mask=hole)[0].startswith("the mask has no white, only levels up to 0")
    assert notices(init_image=grey(9), mask=np.eye(8, dtype=np.uint8))[0].startswith("the mask has no white")
    assert notices(init_image=Image.new("RGBA", (8, 8), "red"), mask=grey(255)) == []
    assert notices(init_image=grey(9)) == []


# Drawing with them


def tiny(channels: int) -> StableDiffusion:
    config = replace(TINY, unet=replace(TINY.unet, in_channels=channels))
    return families.adapted(StableDiffusion(config, Bytes(), networks(config, noise=0.1)))


@pytest.mark.parametrize("channels", [4, 9])
def test_inpainting_at_strength_1_forgets_what_was_under_the_mask(channels):
    pipe, mask = tiny(channels), Image.new("L", (64, 64), 255)
    black, white = (
        pipe.generate("a cat", init_image=Image.new("RGB", (64, 64), colour), mask=mask, strength=1, **QUICK)
        for colour in ("black", "white")
    )
    assert np.array_equal(np.asarray(black), np.asarray(white))


def test_a_model_that_edits_begins_with_noise_alone_and_sees_the_picture():
    pipe, picture = tiny(8), Image.new("RGB", (64, 64), "red")
    assert isinstance(pipe, InstructPix2Pix)
    request = Request("a cat", init_image=picture, steps=2, seed=0)
    first = next(iter(pipe.denoise(request)))
    noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(first.x_t[0], noise * pipe.sampler(request).init_noise_sigma)
    filled = request.for_model(pipe.config)
    assert (filled.strength, filled.image_guidance, filled.cfg) == (1.0, 1.5, TINY.cfg)
    drawn = [
        np.asarray(pipe.generate("a cat", init_image=picture, image_guidance=scale, **QUICK)).astype(int)
        for scale in (1.0, 1.5, 4.0)
    ]
    assert np.abs(drawn[0] - drawn[1]).max() > 0 and np.abs(drawn[1] - drawn[2]).max() > 0


def test_a_model_that_edits_can_keep_a_part_and_says_that_a_picture_is_missing():
    pipe, picture, mask = tiny(8), Image.new("RGB", (64, 64), "red"), Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    drawn = np.asarray(pipe.generate("a cat", init_image=picture, mask=mask, **QUICK))
    assert (drawn[:, 32:] == (255, 0, 0)).all() and (drawn[:, :32] != (255, 0, 0)).any()
    with pytest.warns(UserWarning, match="edits pictures, but there is no init image"):
        pipe.generate("a cat", **QUICK)


def test_image_guidance_is_refused_where_it_means_nothing():
    with pytest.raises(
        ValueError, match="image_guidance is for models that edit pictures, which tiny does not"
    ):
        tiny(4).generate("a cat", image_guidance=2, **QUICK)
    with pytest.raises(ValueError, match="image_guidance must be a finite number, not nan"):
        Request("a cat", image_guidance=float("nan"))
    with pytest.raises(ValueError, match=r"image_guidance must be a number, not 'much'"):
        Request("a cat", image_guidance="much")  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [64, "64x64", (64,), (1, 2, 3), {"w": 1}, object()])
def test_an_odd_size_is_one_sentence(size):
    with pytest.raises(ValueError, match="a size is a width and a height"):
        Request("a cat", size=size)


def test_a_value_of_any_length_leaves_the_message_short():
    for wrong in ({"sampler": "x" * 10**5}, {"size": [0] * 10**5}, {"cfg": "x" * 10**5}, {"seed": 10**4000}):
        with pytest.raises(ValueError) as caught:
            Request("a cat", **wrong)
        assert len(str(caught.value)) < 420  # with the names of all samplers


# Weights that are no numbers


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("clip", "the text encoder made numbers that are not finite: 1 of its weights"),
        ("encoder", "the VAE's encoder made numbers that are not finite: 1 of its weights"),
        ("diffusion", "the U-Net made numbers that are not finite in step 1 of 2: 1 of its weights"),
        ("decoder", "the VAE's decoder made numbers that are not finite: 1 of its weights"),
    ],
)
def test_weights_that_are_no_numbers_are_named_by_part_and_step(name, says):
    pipe = tiny(4)
    next(pipe.models[name].parameters()).data.flatten()[0] = float("nan")
    with warnings.catch_warnings(), pytest.raises(FloatingPointError, match=says):
        warnings.simplefilter("ignore")
        pipe.generate("a cat", init_image=grey(9, 64, 64), **{**QUICK, "steps": 3, "strength": 0.7})


def test_too_much_guidance_is_named_too():
    with pytest.raises(
        FloatingPointError, match=r"guidance made numbers .* in step 1 of 2: try less guidance"
    ):
        tiny(4).generate("a cat", cfg=1e300, **QUICK)
