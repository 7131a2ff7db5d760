"""Experiments vary what they name, keep everything else, and restore what they change."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from reifusion.explain import ablate, experiments, latents, schedule
from reifusion.explain.experiments import contrast, difference, distance, draw, lerp, saturation, slerp
from reifusion.explain.steer import muted, rewritten
from reifusion.explain.trajectory import record
from reifusion.explain.words import prompt_words
from reifusion.model.attention import CrossAttention, merge_heads, softmax_attention, split_heads
from reifusion.model.request import Request

from .conftest import TINY, tiny


def ask(prompt: str = "a cat on a rocket", **settings: Any) -> Request:
    defaults: dict[str, Any] = {"sampler": "dpmpp_2m", "steps": 2, "seed": 1, "cfg": 3}
    return Request(prompt, **defaults | settings)


def drawn(monkeypatch) -> list[Image.Image]:
    """Collects the pictures that experiments draw."""
    pictures: list[Image.Image] = []
    right = experiments.draw

    def draw(pipe, request):
        pictures.append(right(pipe, request))
        return pictures[-1]

    monkeypatch.setattr(experiments, "draw", draw)
    monkeypatch.setattr(ablate, "draw", draw)
    return pictures


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.tobytes() == other.tobytes()


# Measures


def test_distance_and_saturation():
    black, grey = Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4), (30, 30, 30))
    assert distance(black, grey) == 30 and distance(grey, grey) == 0
    assert saturation(grey) == 0 and saturation(Image.new("RGB", (4, 4), "red")) == 1
    assert (
        np.array_equal(np.asarray(difference(black, grey)), np.full((4, 4, 3), 240)) and contrast(grey) == 0
    )
    halves = Image.new("L", (4, 4), 0)
    halves.paste(100, (0, 0, 2, 4))
    assert contrast(halves.convert("RGB")) == 50


def test_captions_are_computed(pipe):
    exhibit = experiments.cfg(pipe, ask(), scales=(1, 3), seeds=2)
    low, high = np.mean(exhibit.numbers["saturation"], axis=0)
    assert exhibit.guide.startswith(f"From s = 1 to s = 3 the saturation goes from {low:.2f} to {high:.2f}")
    exhibit = experiments.seeds(pipe, ask(), to=2, stops=3)
    assert f"{exhibit.numbers['ends']:.0f} levels apart" in exhibit.guide
    assert f"{exhibit.numbers['contrasts'][1][1]:.0f} straight through" in exhibit.guide


# Guidance, steps, samplers


def test_cfg_varies_the_scale_and_nothing_else(pipe, monkeypatch):
    pictures = drawn(monkeypatch)
    exhibit = experiments.cfg(pipe, ask(), scales=(1, 4), seeds=2)
    expected = [draw(pipe, ask(seed=seed, cfg=scale)) for seed in (1, 2) for scale in (1, 4)]
    assert all(same(*pair) for pair in zip(pictures, expected, strict=True))
    assert exhibit.numbers["saturation"][1][0] == saturation(expected[2])


def test_steps_measures_the_distance_to_the_most(pipe, monkeypatch):
    pictures = drawn(monkeypatch)
    numbers = experiments.steps(pipe, ask(), counts=(1, 3), samplers=("ddim", "euler_a")).numbers
    assert same(pictures[3], draw(pipe, ask(sampler="euler_a", steps=3)))
    assert numbers["distance_to_last"] == [[distance(*pictures[:2]), 0], [distance(*pictures[2:]), 0]]


def test_samplers_counts_calls(pipe):
    calls = experiments.samplers(pipe, ask(steps=4)).numbers
    assert calls["heun"] == 7 and calls["pndm"] == 5 and calls["ddim"] == 4 and "lcm" not in calls


# Walks


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 300), st.floats(0, 1))
def test_slerp_stays_on_the_sphere_and_moves_evenly(seed, size, u):
    one, other = torch.randn(2, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    other = other / other.norm() * one.norm()
    between = slerp(one, other, u)
    assert between.norm() == pytest.approx(one.norm().item())

    def angle(a, b):
        return math.acos(float((a @ b / (a.norm() * b.norm())).clamp(-1, 1)))

    assert angle(one, between) == pytest.approx(u * angle(one, other), abs=1e-6)


def test_walks_begin_and_end_where_they_should():
    one, other = torch.randn(2, 3, 4)
    for walk in (slerp, lerp):
        assert torch.allclose(walk(one, other, 0), one) and torch.allclose(walk(one, other, 1), other)
        assert torch.allclose(walk(one, one, 0.3), one)
    assert torch.allclose(lerp(one, other, 0.5), (one + other) / 2)


def test_a_walk_between_seeds_begins_and_ends_with_their_pictures(pipe, monkeypatch):
    pictures = drawn(monkeypatch)
    numbers = experiments.seeds(pipe, ask(), to=7, stops=3).numbers
    ends = draw(pipe, ask()), draw(pipe, ask(seed=7))
    for row in (pictures[:3], pictures[3:6]):
        assert distance(row[0], ends[0]) < 0.5 and distance(row[2], ends[1]) < 0.5
    assert not same(pictures[1], pictures[4])
    on_sphere, straight = numbers["lengths"]
    assert on_sphere[1] == pytest.approx(1, abs=0.1) and straight[1] == pytest.approx(math.sqrt(0.5), abs=0.1)
    with pytest.raises(ValueError, match="two seeds, not 1 twice"):
        experiments.seeds(pipe, ask(), to=1)


def test_a_walk_between_prompts_begins_and_ends_with_their_pictures(pipe, monkeypatch):
    pictures = drawn(monkeypatch)
    experiments.prompts(pipe, ask("a cat"), "a dog", stops=3, seeds=1)
    assert distance(pictures[0], draw(pipe, ask("a cat"))) < 0.5
    assert distance(pictures[2], draw(pipe, ask("a dog"))) < 0.5
    assert distance(pictures[1], pictures[0]) > 0 and distance(pictures[1], pictures[2]) > 0


# Taking away


@pytest.fixture
def layer(pipe) -> CrossAttention:
    return next(module for module in pipe.models["diffusion"].modules() if isinstance(module, CrossAttention))


def test_a_muted_layer_says_nothing_and_is_put_back_to_the_bit(layer):
    x, y = torch.randn(1, 5, 16), torch.randn(1, 3, 16)
    before = {name: part.clone() for name, part in layer.state_dict().items()}
    with muted(layer):
        assert layer(x, y).abs().max() == 0
    with pytest.raises(ZeroDivisionError), muted(layer, 1):
        raise ZeroDivisionError
    assert all(torch.equal(part, before[name]) for name, part in layer.state_dict().items())


@pytest.mark.parametrize("head", [0, 1])
def test_a_muted_head_is_that_heads_output_set_to_zero(layer, head):
    x, y = torch.randn(1, 5, 16), torch.randn(1, 3, 16)
    q = split_heads(layer.q(x), 2)
    k, v = (split_heads(part, 2) for part in layer.kv(y).chunk(2, -1))
    out = softmax_attention(q, k, v)[0]  # (1, heads, 5, 8)
    out[:, head] = 0
    with muted(layer, head):
        assert torch.allclose(layer(x, y), layer.out(merge_heads(out)), atol=1e-6)


def test_a_silenced_word_loses_its_own_vectors_only(pipe):
    request = ask()
    rocket = prompt_words(pipe, request)[-1]
    plain = pipe.encode_text(["a cat on a rocket", ""])
    silent = ablate.silenced(pipe, request, rocket).encode_text(["a cat on a rocket", ""])
    changed = (plain != silent).any(-1).nonzero().tolist()
    assert changed == [[0, place] for place in rocket.tokens] and len(changed) == 2
    assert torch.equal(silent[0, rocket.tokens], plain[1, rocket.tokens])
    assert ablate.without_word(pipe, request, rocket) == "a cat on a"


def test_ablation_takes_one_thing_away_at_a_time(pipe, monkeypatch):
    pictures = drawn(monkeypatch)
    numbers = ablate.ablate(pipe, ask("a cat")).numbers
    assert list(numbers["silenced"]) == list(numbers["left out"]) == ["a", "cat"]
    assert len(numbers["layer"]) == 7 and list(numbers["head"]) == ["head 0", "head 1"]
    assert len(pictures) == 1 + 2 + 2 + 7 + 2
    assert numbers["left out"]["cat"] == distance(pictures[0], draw(pipe, ask("a")))
    assert all(value > 0 for value in numbers["layer"].values())
    assert same(pictures[0], draw(pipe, ask("a cat")))  # everything is restored


def test_words_that_come_twice_are_taken_away_one_by_one(pipe):
    numbers = ablate.ablate(pipe, ask("a cat on a cat", steps=1)).numbers
    assert list(numbers["silenced"]) == ["a", "cat", "on", "a (2)", "cat (2)"]


def test_rewriting_leaves_the_model_itself_alone(pipe):
    steered = rewritten(pipe, torch.zeros_like)
    assert steered.encode_text(["a cat"]).abs().max() == 0 and pipe.encode_text(["a cat"]).abs().max() > 0
    assert steered.models is pipe.models


# Latents, VAE, schedule


def test_latents_are_shown_channel_by_channel(pipe):
    numbers = latents.latents(pipe, ask()).numbers
    z = list(pipe.denoise(ask()))[-1].latents[0]
    assert [mean for mean, _ in numbers["mean_std"]] == pytest.approx(z.mean((1, 2)).tolist(), abs=1e-6)
    assert numbers["most"] == z.abs().max().item()


def test_the_round_trip_measures_what_the_vae_loses(pipe):
    picture = latents.test_card(64)
    numbers = latents.round_trip(pipe, picture).numbers
    with torch.inference_mode():
        back = pipe.decode(
            pipe.encode_image(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1)
        )
    error = np.asarray(back[0], float) - np.asarray(picture, float)
    assert numbers["psnr"] == pytest.approx(10 * np.log10(255**2 / np.mean(error**2)), abs=0.02)


@pytest.mark.parametrize("size", [64, 128, 512])
def test_the_test_card_has_stripes_down_to_one_pixel(size):
    row = np.asarray(latents.test_card(size).convert("L"))[size - 2]
    runs = [[len(list(run)) for _, run in itertools.groupby(part > 128)] for part in np.split(row, 4)]
    assert [run[0] for run in runs] == [8, 4, 2, 1]


def test_schedule_tells_where_signal_and_noise_are_equal(velocity_pipe):
    numbers = schedule.schedule(velocity_pipe, ask("", steps=5)).numbers
    root = np.linspace(0.00085**0.5, 0.012**0.5, 1000)
    alpha_bar = np.cumprod(1 - root**2)
    snr = alpha_bar / (1 - alpha_bar)
    assert numbers["crossing"] == np.argmax(snr < 1)
    assert numbers["snr"][999] == pytest.approx(snr[999]) and numbers["snr"][0] == pytest.approx(snr[0])
    assert numbers["timesteps"]["ddim"] == [801, 601, 401, 201, 1]


def test_a_model_of_rectified_flow_is_explained_by_its_own_samplers():
    pipe = tiny(replace(TINY, schedule=replace(TINY.schedule, prediction_type="flow")))
    request = ask("", sampler=None, steps=3)
    numbers = schedule.schedule(pipe, request).numbers
    assert numbers["crossing"] == 501  # the first timestep at which (1 - σ)² < σ²
    assert numbers["timesteps"]["flow"] == pytest.approx([1000, 2000 / 3, 1000 / 3])
    assert "flow" in experiments.samplers(pipe, request).numbers
    assert experiments.steps(pipe, request, counts=(1, 2)).numbers["samplers"] == experiments.suiting(pipe)
    assert record(pipe, request).t == pytest.approx([1000, 2000 / 3, 1000 / 3])


def test_all_else_is_kept_in_a_replaced_request():
    request = replace(ask(), cfg=9.0)
    assert request.seeds == [1] and request.prompts == ["a cat on a rocket"]
