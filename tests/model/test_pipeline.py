"""The pipeline, on a tiny model with random weights: its pictures mean nothing, its promises hold."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from reifusion.api import find_dtype, generate, load
from reifusion.model.clip import CLIP
from reifusion.model.config import MINI, ModelConfig, ScheduleConfig
from reifusion.model.decoder import Decoder
from reifusion.model.diffusion import UNet
from reifusion.model.first_call import of_networks
from reifusion.model.pictures import open_picture, to_picture, to_tensor
from reifusion.model.pipeline import StableDiffusion, Step
from reifusion.model.request import Request
from reifusion.model.samplers import SAMPLERS
from reifusion.model.tuning import warn_of_little_noise
from tests.tiny import TINY, Bytes, networks


def trained_for(prediction_type: str, **schedule: Any) -> ModelConfig:
    return replace(TINY, schedule=ScheduleConfig(prediction_type=prediction_type, **schedule))


def tiny(config: ModelConfig = TINY) -> StableDiffusion:
    return StableDiffusion(config, Bytes(), networks(config, noise=0.1))


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion:
    return tiny()


QUICK: dict[str, Any] = {"sampler": "ddim", "steps": 3, "progress": False}


def draw(pipe: StableDiffusion, *args, **kwargs) -> np.ndarray:
    """The picture, or pictures, as an array of ints."""
    return np.array(pipe.generate(*args, **QUICK | kwargs)).astype(int)


def latents(pipe: StableDiffusion, *args, **kwargs) -> torch.Tensor:
    kwargs = QUICK | kwargs
    del kwargs["progress"]
    return list(pipe.denoise(*args, **kwargs))[-1].latents


def photo(width: int = 64, height: int = 64) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height))


# What is asked, is drawn


def test_same_seed_gives_same_picture_in_any_batch_position(pipe):
    prompts = ["a cat", "a dog", "a hat"]
    together = draw(pipe, prompts, seed=5, sampler="ddpm")
    alone = [draw(pipe, prompt, seed=5 + k, sampler="ddpm") for k, prompt in enumerate(prompts)]
    assert np.abs(together - np.stack(alone)).max() <= 1
    assert np.abs(together[0] - together[1]).max() > 1


@pytest.mark.slow
def test_in_bfloat16_too_a_batch_moves_no_picture_by_more_than_rounding():
    pipe = load(device="cpu", dtype="bf16")
    prompts = ["a red apple", "a purple cat", "a dog next to a tree"]
    asked: dict[str, Any] = {"sampler": "ddim", "steps": 6, "progress": False}
    together = np.stack([np.asarray(x).astype(int) for x in pipe.generate(prompts, seed=5, **asked)])
    alone = [pipe.generate(prompt, seed=5 + k, **asked) for k, prompt in enumerate(prompts)]
    apart = np.abs(together - np.stack([np.asarray(x).astype(int) for x in alone]))
    # Half a level on average; at an edge, where a place is light or dark, a few places differ by more.
    assert apart.mean() < 1 and (apart > 16).mean() < 0.01


def test_several_images_of_one_prompt_have_seeds_that_count_up(pipe):
    drawn = pipe.generate("a cat", num=3, seed=7, **QUICK)
    assert [picture.info["seed"] for picture in drawn] == [7, 8, 9]
    assert np.abs(np.array(drawn[2]).astype(int) - draw(pipe, "a cat", seed=9)).max() <= 1


def test_prompts_and_images_multiply_prompt_by_prompt(pipe):
    drawn = pipe.generate(["a cat", "a dog"], num=2, seed=1, **QUICK)
    assert [picture.info["prompt"] for picture in drawn] == ["a cat", "a cat", "a dog", "a dog"]


def test_a_list_of_one_prompt_gives_a_list(pipe):
    assert isinstance(pipe.generate(["a cat"], **QUICK), list)
    assert isinstance(pipe.generate("a cat", **QUICK), Image.Image)


def test_no_seed_means_a_new_one_that_the_picture_carries(pipe):
    first, second = (pipe.generate("a cat", **QUICK) for _ in range(2))
    assert first.info["seed"] != second.info["seed"]
    assert np.array_equal(np.array(first), draw(pipe, "a cat", seed=first.info["seed"]))


def test_guidance_of_1_is_no_guidance(pipe):
    one = draw(pipe, "a cat", "ugly", cfg=1, seed=0)
    assert np.array_equal(one, draw(pipe, "a cat", "beautiful", do_cfg=False, seed=0))
    assert not np.array_equal(one, draw(pipe, "a cat", "ugly", cfg=7, seed=0))


def inputs(pipe: StableDiffusion, monkeypatch) -> list[torch.Tensor]:
    """What the U-Net will have been given."""
    seen: list[torch.Tensor] = []
    forward = pipe.models["diffusion"].forward

    def spy(x, context, t):
        seen.append(x)
        return forward(x, context, t)

    monkeypatch.setattr(pipe.models["diffusion"], "forward", spy)
    return seen


def test_guidance_is_one_pass_under_twice_the_words(pipe, monkeypatch):
    """… and the latents, the same in both halves, go in once."""
    seen: list[tuple[int, int]] = []
    forward = pipe.models["diffusion"].forward

    def spy(x, context, t):
        seen.append((len(x), len(context)))
        return forward(x, context, t)

    monkeypatch.setattr(pipe.models["diffusion"], "forward", spy)
    draw(pipe, ["a", "b"], seed=0)
    draw(pipe, ["a", "b"], seed=0, cfg=1)
    assert seen == 3 * [(4, 4)] + 3 * [(2, 2)]


def test_guidance_goes_from_the_negative_prompt_to_the_prompt_and_beyond(pipe):
    for step in pipe.denoise("a cat", "a dog", cfg=5.0, seed=0, steps=2):
        expected = step.eps_uncond + 5.0 * (step.eps_cond - step.eps_uncond)
        torch.testing.assert_close(step.eps, expected)
    swapped = next(iter(pipe.denoise("a dog", "a cat", cfg=5.0, seed=0, steps=2)))
    first = next(iter(pipe.denoise("a cat", "a dog", cfg=5.0, seed=0, steps=2)))
    torch.testing.assert_close(swapped.eps_cond, first.eps_uncond)
    words = next(
        iter(pipe.denoise("a cat", cfg=1.0, seed=0, steps=2))
    )  # one pass, where nothing can be swapped
    torch.testing.assert_close(first.eps_cond, words.eps)
    assert (first.eps_uncond - words.eps).abs().max() > 0.01


def test_rescaled_guidance_has_the_contrast_of_the_conditional_output(pipe):
    request = Request(["a", "b"], cfg=9.0, seed=0, sampler="ddim", steps=2)
    plain, half, whole = (
        next(iter(pipe.denoise(replace(request, guidance_rescale=phi)))) for phi in (0.0, 0.5, 1.0)
    )
    spread = whole.eps.std(
        (1, 2, 3)
    )  # each picture's own; the network predicts ε, so that is what is rescaled
    torch.testing.assert_close(spread, whole.eps_cond.std((1, 2, 3)))
    assert (plain.eps.std((1, 2, 3)) / spread).sub(1).abs().min() > 0.01
    torch.testing.assert_close(half.eps, (plain.eps + whole.eps) / 2)
    # Only the scale changes: what was drawn by more or less of it is the same.
    torch.testing.assert_close(
        whole.eps / spread[:, None, None, None], plain.eps / plain.eps.std((1, 2, 3))[:, None, None, None]
    )


def test_no_negative_prompt_is_an_empty_one(pipe):
    assert np.array_equal(draw(pipe, "a cat", None, seed=0), draw(pipe, "a cat", "", seed=0))
    assert not np.array_equal(draw(pipe, "a cat", "a dog", seed=0), draw(pipe, "a cat", "", seed=0))


def test_each_prompt_can_have_its_own_negative(pipe):
    both = draw(pipe, ["a cat", "a cat"], ["a dog", "a hat"], seed=0)
    assert np.abs(both[0] - draw(pipe, "a cat", "a dog", seed=0)).max() <= 1
    assert np.abs(both[1] - draw(pipe, "a cat", "a hat", seed=1)).max() <= 1


def test_an_empty_prompt_is_drawn(pipe):
    assert draw(pipe, "", seed=0).shape == (64, 64, 3)


def test_clip_skip_changes_the_picture(pipe):
    assert not np.array_equal(draw(pipe, "a cat", clip_skip=1, seed=0), draw(pipe, "a cat", seed=0))


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_draws_with_any_number_of_steps(pipe, name):
    pipe = replace(pipe, config=trained_for(SAMPLERS[name].prediction_types[-1]))
    for n in (1, 2, 5):
        assert draw(pipe, "a cat", sampler=name, steps=n, seed=0).shape == (64, 64, 3)
        kwargs = {"init_image": photo(), "mask": Image.new("L", (64, 64), 255), "strength": 0.5}
        assert latents(pipe, "a cat", sampler=name, steps=n, seed=0, **kwargs).isfinite().all()


# Sizes


@pytest.mark.parametrize(("width", "height"), [(64, 64), (8, 8), (72, 40), (136, 56)])
def test_the_picture_has_the_size_asked_for(pipe, width, height):
    assert pipe.generate("a cat", width=width, height=height, **QUICK).size == (width, height)


@pytest.mark.parametrize(
    ("given", "drawn"),
    [((64, 64), (64, 64)), ((640, 480), (88, 64)), ((30, 50), (64, 104)), ((1000, 10), (128, 64))],
)
def test_an_input_image_keeps_its_shape_at_the_models_size(pipe, given, drawn):
    assert pipe.generate("a cat", init_image=photo(*given), **QUICK).size == drawn


# From a picture


def test_more_strength_changes_more(pipe):
    original = pipe.encode_image(to_tensor(photo()))
    distances = []
    for strength in (0.05, 0.2, 0.4, 0.6, 0.8):
        last = latents(pipe, "a cat", init_image=photo(), strength=strength, steps=20, cfg=1, seed=0)
        distances.append((last - original).square().mean().item())
    assert distances == sorted(distances)


def test_the_mask_keeps_every_pixel_under_black_and_redraws_under_white(pipe):
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[20:50, 10:30] = 255
    drawn = draw(pipe, "a cat", init_image=photo(), mask=mask, seed=0, strength=1)
    original = np.array(photo()).astype(int)
    assert np.array_equal(drawn[mask == 0], original[mask == 0])
    assert np.abs(drawn[mask == 255] - original[mask == 255]).mean() > 5


def test_the_masks_surroundings_are_known_at_every_step(pipe):
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    steps = list(
        pipe.denoise("a cat", init_image=photo(), mask=mask, strength=1, seed=0, **without_progress())
    )
    original = pipe.encode_image(to_tensor(photo()))
    torch.testing.assert_close(steps[-1].latents[..., 4:], original[..., 4:])
    assert (steps[-1].latents[..., :4] - original[..., :4]).abs().mean() > 0.05


def without_progress() -> dict:
    return {name: value for name, value in QUICK.items() if name != "progress"}


def test_a_nine_channel_unet_sees_the_mask_and_the_kept_part(monkeypatch):
    pipe = tiny(replace(TINY, unet=replace(TINY.unet, in_channels=9)))
    seen = inputs(pipe, monkeypatch)
    mask = Image.new("1", (64, 64))
    mask.paste(1, (0, 0, 32, 64))
    draw(pipe, "a cat", init_image=photo(), mask=mask)
    pixels = to_tensor(photo())
    pixels[..., :32] = 0
    kept = pipe.encode_image(pixels)
    assert torch.equal(seen[0][:1, 4], torch.tensor(4 * [1.0] + 4 * [0.0]).expand(1, 8, 8))
    torch.testing.assert_close(seen[0][:1, 5:], kept)
    draw(pipe, "a cat")  # without a picture all is redrawn
    assert (seen[-1][:, 4] == 1).all()


# Pictures of every kind


@given(
    mode=st.sampled_from(
        [
            "1",
            "L",
            "LA",
            "La",
            "P",
            "PA",
            "RGB",
            "RGBA",
            "RGBa",
            "RGBX",
            "CMYK",
            "YCbCr",
            "HSV",
            "I;16",
            "I",
            "F",
        ]
    ),
    width=st.integers(1, 40),
    height=st.integers(1, 40),
)
@settings(max_examples=80, deadline=None)
def test_a_picture_of_any_mode_and_size_becomes_rgb(mode, width, height):
    picture = open_picture(Image.new(mode, (width, height)))
    assert picture.mode == "RGB"
    assert picture.size == (width, height)


def test_transparent_parts_become_white():
    for mode in ("RGBA", "LA"):
        assert open_picture(Image.new("RGBA", (1, 1), (0, 0, 0, 0)).convert(mode)).getpixel((0, 0)) == (
            255,
            255,
            255,
        )
    palette = Image.new("P", (1, 1))
    palette.info["transparency"] = 0
    assert open_picture(palette).getpixel((0, 0)) == (255, 255, 255)
    assert open_picture(Image.new("RGBA", (1, 1), (255, 0, 0, 128))).getpixel((0, 0)) == (255, 127, 127)


def test_sixteen_bit_grey_is_scaled_and_not_clipped(tmp_path):
    grey = np.array([[0, 257 * 100, 65535]], dtype=np.uint16)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert np.array(open_picture(tmp_path / "grey.png"))[0, :, 0].tolist() == [0, 100, 255]


@given(orientation=st.integers(1, 8))
def test_a_sideways_photo_is_turned_upright(orientation):
    upright = photo(24, 16)
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose that the camera did, by orientation
    sideways = upright if orientation == 1 else upright.transpose(Image.Transpose(turns[orientation]))
    sideways.getexif()[0x0112] = orientation
    assert np.array_equal(np.array(open_picture(sideways)), np.array(upright))


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_a_picture_whose_exif_is_broken_is_taken_as_it_lies(suffix, tmp_path):
    Image.new("RGB", (8, 6), "red").save(tmp_path / f"a.{suffix}", exif=b"garbage")
    assert open_picture(tmp_path / f"a.{suffix}").size == (8, 6)


def test_pixels_are_rounded_to_the_nearest_level():
    levels = torch.tensor([-1.2, -1, -1 + 0.6 / 127.5, -1 + 0.4 / 127.5, 1 - 0.4 / 127.5, 1, 3.0])
    row = np.array(to_picture(levels.expand(3, 1, 7)))[0, :, 0]
    assert row.tolist() == [0, 0, 1, 0, 255, 255, 255]


def test_a_picture_can_be_an_array_or_a_path(pipe, tmp_path):
    photo().save(tmp_path / "photo.png")
    drawn = [
        draw(pipe, "a cat", init_image=given, seed=0)
        for given in (photo(), np.array(photo()), tmp_path / "photo.png")
    ]
    assert np.array_equal(drawn[0], drawn[1])
    assert np.array_equal(drawn[0], drawn[2])


# Watching


def test_the_loop_yields_what_generate_decodes(pipe):
    steps = list(pipe.denoise("a cat", seed=3, **without_progress()))
    assert [step.index for step in steps] == [0, 1, 2]
    assert all(step.total == 3 for step in steps)
    assert [step.t for step in steps] == sorted((step.t for step in steps), reverse=True)
    for step, following in itertools.pairwise(steps):
        assert torch.equal(step.latents, following.x_t)
    assert np.array_equal(np.array(pipe.decode(steps[-1].latents)[0]), draw(pipe, "a cat", seed=3))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_step_is_signal_plus_noise(prediction_type):
    pipe = tiny(trained_for(prediction_type))
    alpha_bar = SAMPLERS["ddim"]().alphas_cumprod.float()
    for step in pipe.denoise("a cat", seed=0, steps=4, sampler="ddim"):
        signal, noise = alpha_bar[int(step.t)].sqrt(), (1 - alpha_bar[int(step.t)]).sqrt()
        again = signal * step.x0 + noise * step.eps
        torch.testing.assert_close(again, step.x_t, atol=1e-4, rtol=1e-4)


def test_the_callback_sees_every_step(pipe):
    seen: list[Step] = []
    draw(pipe, "a cat", callback=seen.append)
    assert [step.index for step in seen] == [0, 1, 2]


def test_a_callback_that_returns_false_ends_early_with_the_latest_prediction(pipe):
    seen = []

    def stop_at_1(step: Step) -> bool:
        seen.append(step)
        return step.index < 1

    drawn = draw(pipe, "a cat", callback=stop_at_1)
    assert len(seen) == 2
    assert np.array_equal(drawn, np.array(pipe.decode(seen[-1].x0)[0]))


def test_a_callback_that_raises_ends_all(pipe):
    def stop(step):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        draw(pipe, "a cat", callback=stop)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"cfg": "4"}, "cfg must be a number, not '4'"),
        ({"strength": "0.5"}, "strength must be a number"),
        ({"guidance_rescale": "0.5"}, "guidance_rescale must be a number"),
        ({"eta": "0.5", "sampler": "ddim"}, "eta must be a number"),
        ({"num": 2, "seed": 2**63 - 1}, "the last picture's seed must be between 0 and"),
        ({"noise": torch.full((1, 4, 8, 8), math.nan)}, "noise must be finite numbers, and some are not"),
        ({"latents": torch.full((1, 4, 8, 8), math.inf)}, "latents must be finite numbers"),
        ({"prompt": torch.zeros(1, 8, 16, dtype=torch.long)}, "must be floating-point numbers"),
        ({"prompt": torch.full((1, 8, 16), math.nan)}, "all of them finite"),
    ],
)
def test_what_cannot_be_drawn_is_said_before_anything_is(asked, said):
    with pytest.raises(ValueError, match=said):
        Request(**{"prompt": "a cat", **asked})


def test_a_single_step_without_noise_to_begin_with_is_told(pipe):
    def begin(**settings):
        request = Request("a cat", **{"sampler": "euler", "seed": 0, **settings}).for_model(pipe.config)
        warn_of_little_noise(pipe.sampler(request), request)

    with pytest.warns(UserWarning, match="euler begins at timestep 1, where there is little noise"):
        begin(steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        begin(steps=1, schedule="trailing")
        begin(steps=2)
        begin(steps=1, init_image=np.zeros((64, 64, 3), np.uint8))


def test_latents_that_are_sent_back_take_the_place_of_the_steps_own(pipe):
    steps = pipe.denoise("a cat", seed=3, **without_progress())
    first = next(steps)
    sent = steps.send(2 * first.latents)
    assert torch.equal(sent.x_t, 2 * first.latents)
    assert torch.equal(next(steps).x_t, sent.latents)


def test_tensors_that_the_pipeline_returns_can_be_part_of_a_graph(pipe):
    latents, words = pipe.encode_image(torch.zeros(1, 3, 64, 64)), pipe.encode_text(["a cat"])
    step = next(pipe.denoise("a cat", seed=3, **without_progress()))
    x = step.x_t.requires_grad_()
    unet = pipe.models["diffusion"].requires_grad_(True)
    unet(x + latents[..., :8, :8].mean(), words, torch.tensor([5.0])).sum().backward()
    assert x.grad is not None and x.grad.abs().max() > 0
    step.latents.mul_(0.9)  # in place as well


def test_a_loop_that_is_left_open_ends_in_silence():
    code = "import reifusion; steps = reifusion.load().denoise('a cat', seed=1, steps=3); next(steps)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_caller_of_the_loop_is_not_in_inference_mode(pipe):
    for _ in pipe.denoise("a cat", steps=2):
        assert not torch.is_inference_mode_enabled()
        assert torch.ones(1, requires_grad=True).mul(2).requires_grad


def test_a_copied_or_pickled_model_draws_the_same(pipe):
    for twin in copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe)):
        assert np.array_equal(draw(twin, "cat", seed=1), draw(pipe, "cat", seed=1))


def test_a_model_is_shown_in_three_lines(pipe):
    lines = repr(pipe).splitlines()
    assert lines[0] == "StableDiffusion tiny: pictures of 64×64, float32, cpu"
    assert re.fullmatch(
        r"\d\.\d million parameters: clip \d\.\d, encoder .+, decoder .+, diffusion .+", lines[1]
    )
    assert lines[2:] == ["dpmpp_2m_karras, 25 steps, cfg 7.5; epsilon"]
    odd = replace(pipe, config=replace(TINY, name="<b>"))
    assert odd._repr_html_().startswith("<b>StableDiffusion &lt;b&gt;: ") and len(odd._repr_html_()) < 400


# Machines


def test_networks_are_on_the_device_only_while_in_use(monkeypatch):
    pipe = tiny()
    pipe.idle_device = torch.device("cpu", 0)
    moves: list[tuple[str, Any]] = []

    def spy(name: str, to: Callable) -> Callable:
        def spied(*args):
            moves.append((name, args[0]))
            return to(*args)

        return spied

    for name, network in pipe.models.items():
        monkeypatch.setattr(network, "to", spy(name, network.to))
    draw(pipe, "a cat", init_image=photo())
    order = ["clip", "encoder", "diffusion", "decoder"]
    assert moves == [(name, device) for name in order for device in (pipe.device, pipe.idle_device)]
    moves.clear()
    with pytest.raises(ZeroDivisionError):
        draw(pipe, "a cat", callback=lambda step: 1 / 0)
    assert moves[-1] == ("diffusion", pipe.idle_device)


def test_nothing_of_the_callers_is_changed(pipe):
    before = {name: {k: v.clone() for k, v in m.state_dict().items()} for name, m in pipe.models.items()}
    picture, mask = np.array(photo()), np.full((64, 64), 255, dtype=np.uint8)
    first = picture.copy()
    random = torch.get_rng_state()
    draw(pipe, "a cat", init_image=picture, mask=mask)
    assert np.array_equal(picture, first)
    assert torch.equal(torch.get_rng_state(), random)
    for name, network in pipe.models.items():
        assert all(torch.equal(v, before[name][k]) for k, v in network.state_dict().items())
    step = next(iter(pipe.denoise("a cat")))
    z = step.latents.clone()
    assert np.array_equal(np.array(pipe.decode(z)[0]), np.array(pipe.decode(z)[0]))
    assert torch.equal(z, step.latents)


def test_bf16_draws_about_the_same_picture(pipe):
    half = tiny()
    for network in half.models.values():
        network.to(torch.bfloat16)
    assert np.abs(draw(half, "a cat", seed=0) - draw(pipe, "a cat", seed=0)).mean() < 5


def test_a_vae_that_overflows_decodes_again_in_float32():
    class Overflowing(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, dtype=torch.float16))

        def forward(self, z):
            assert z.dtype == self.weight.dtype
            return z[:, :3] * (float("inf") if z.dtype == torch.float16 else 0)

    pipe = tiny()
    pipe.models["decoder"] = Overflowing()
    with pytest.warns(UserWarning, match="float32"):
        picture = draw(pipe, "a cat")
    assert (picture == 128).all()
    assert pipe.models["decoder"].weight.dtype == torch.float16


def test_latents_that_are_not_numbers_are_an_error_and_not_a_black_picture(pipe):
    with pytest.raises(FloatingPointError, match="float32"):
        pipe.decode(torch.full((1, 4, 8, 8), float("nan")))


# The seed's function


def test_generate_takes_the_seeds_call(pipe):
    drawn = generate(
        "a cat",
        "a dog",
        None,
        0.8,
        True,
        7.5,
        "ddim",
        3,
        pipe.models,
        4,
        "cpu",
        "cpu",
        Bytes(),
        height=64,
        width=64,
    )
    assert np.array_equal(np.array(drawn), draw(pipe, "a cat", "a dog", seed=4, width=64, height=64))


def test_generate_takes_a_loaded_model_as_well(pipe):
    drawn = generate("a cat", models=pipe, seed=4, **QUICK)
    assert np.array_equal(np.array(drawn), draw(pipe, "a cat", seed=4))


def test_networks_with_the_shapes_of_the_mini_get_its_schedule_and_size():
    with torch.device("meta"):
        models = {"clip": CLIP(MINI.clip), "decoder": Decoder(MINI.vae), "diffusion": UNet(MINI.unet)}
    assert of_networks(models, Bytes()).config == MINI
    with pytest.raises(ValueError, match="tokenizer"):
        of_networks(models, None)


@pytest.mark.parametrize("dtype", ["bf16", "bfloat16", torch.bfloat16])
def test_a_dtype_has_many_names(dtype):
    assert find_dtype(dtype, torch.device("cpu")) == torch.bfloat16


def test_the_dtype_suits_the_device(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    assert find_dtype(None, torch.device("cpu")) == torch.float32
    assert find_dtype(None, torch.device("cuda")) == torch.float16
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    assert find_dtype(None, torch.device("cpu")) == torch.bfloat16


# What cannot be drawn


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"prompt": []}, "at least one"),
        ({"prompt": None}, "text"),
        ({"prompt": 3}, "text"),
        ({"prompt": ["a", None]}, "text"),
        ({"prompt": ["a", "b", "c"], "negative": ["d", "e"]}, "3 prompts"),
        ({"sampler": "magic"}, "there are ddpm, "),
        ({"strength": 0}, "strength"),
        ({"strength": 2}, "strength"),
        ({"strength": "much"}, "strength"),
        ({"cfg": float("nan")}, "finite"),
        ({"cfg": float("inf")}, "finite"),
        ({"steps": 0}, "between 1 and 1000"),
        ({"steps": 1001}, "between 1 and 1000"),
        ({"steps": 2.5}, "whole"),
        ({"num": 0}, "number of images"),
        ({"guidance_rescale": 1.5}, "guidance_rescale must be between 0 and 1"),
        ({"guidance_rescale": "much"}, "guidance_rescale must be a number"),
        ({"sampler": "flow"}, "flow does not fit tiny, trained for 'epsilon'; what fits: ddpm, ddim"),
        ({"seed": -1}, "seed"),
        ({"seed": "x"}, "seed"),
        ({"clip_skip": -1}, "clip_skip"),
        ({"clip_skip": 2}, "clip_skip"),
        ({"height": 100}, "height must be a multiple of 8"),
        ({"width": 0}, "width"),
        ({"width": -8}, "width"),
        ({"mask": photo()}, "input image"),
        ({"init_image": np.zeros((8, 8), dtype=np.float32)}, "uint8"),
    ],
)
def test_a_request_that_cannot_be_drawn_is_refused_in_one_sentence(pipe, wrong, says):
    asked = {"prompt": "a cat", **QUICK, **wrong}
    with pytest.raises(ValueError, match=says) as caught:
        pipe.generate(**asked)
    assert "\n" not in str(caught.value)


def test_a_request_is_checked_once_and_can_be_drawn_again(pipe):
    request = Request("a cat", sampler="ddim", steps=2)
    first, second = (np.array(pipe.generate(request, progress=False)) for _ in range(2))
    assert np.array_equal(first, second)
