"""Recording attention changes nothing, loses nothing, and keeps left on the left."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

import reifusion
from reifusion.explain.halves import foreground, halves, iou, measure, pairs
from reifusion.explain.words import Attention, focus, row_grids, watch
from reifusion.model.attention import CrossAttention, SelfAttention
from reifusion.model.config import SD15
from reifusion.model.diffusion import UNet
from reifusion.model.pipeline import StableDiffusion
from reifusion.model.request import Request

from .conftest import TINY, tiny


def ask(prompt: str = "a cat on a rocket", **settings: Any) -> Request:
    defaults: dict[str, Any] = {"sampler": "euler_a", "steps": 3, "seed": 1, "cfg": 3}
    return Request(prompt, **defaults | settings)


def recorded(pipe: StableDiffusion, request: Request, pixel: tuple[int, int] | None = None) -> Attention:
    with watch(pipe, request, pixel) as attention:
        list(pipe.denoise(request))
    return attention


def hooks(pipe: StableDiffusion) -> list:
    modules = pipe.models["diffusion"].modules()
    return [m.hook for m in modules if isinstance(m, CrossAttention | SelfAttention) and m.hook is not None]


@pytest.fixture(scope="module")
def attention(pipe) -> Attention:
    return recorded(pipe, ask(), (50, 10))


# Recording


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recording_does_not_change_a_bit_of_the_picture(dtype):
    pipe = tiny()
    for network in pipe.models.values():
        network.to(dtype)
    plain = list(pipe.denoise(ask()))[-1].latents
    with watch(pipe, ask(), (50, 10)):
        watched = list(pipe.denoise(ask()))[-1].latents
    assert torch.equal(plain, watched)
    assert pipe.decode(plain)[0].tobytes() == pipe.decode(watched)[0].tobytes()


def test_hooks_are_gone_afterwards_also_when_drawing_fails(pipe):
    with watch(pipe, ask(), (0, 0)):
        assert len(hooks(pipe)) == 2 * 7  # two in each of seven blocks
    with pytest.raises(ZeroDivisionError), watch(pipe, ask(), (0, 0)):
        raise ZeroDivisionError
    assert hooks(pipe) == []


def test_maps_have_a_place_for_every_step_head_token_and_grid_point(pipe):
    maps = recorded(pipe, ask(size=(88, 64))).maps  # latents of 8×11, then 4×6
    tokens = len(["start", "a", "cat", "on", "a", "rock", "et", "end", "padding"])
    assert [list(part.shape) for part in maps.values()] == [
        [3, 2, tokens, *grid] for grid in [(8, 11), (4, 6), (4, 6), (4, 6), (4, 6), (8, 11), (8, 11)]
    ]
    assert [name.split(".")[0] for name in maps] == ["down", "down", "middle", "up", "up", "up", "up"]


def test_the_grids_of_stable_diffusion():
    grids = row_grids(SD15.unet, 64, 64)
    sides = [grids[f"down.{i}"][0] for i in range(12)]
    assert sides == [64, 64, 64, 32, 32, 32, 16, 16, 16, 8, 8, 8]
    assert [grids[f"up.{i}"][0] for i in range(12)] == sides[::-1] and grids["middle"] == (8, 8)


def test_every_place_spends_all_of_its_attention(attention):
    for maps in attention.maps.values():
        assert torch.allclose(maps.float().sum(2), torch.ones(()), atol=3e-3)
    for looks in attention.looks.values():
        assert torch.allclose(looks.float().sum((-1, -2)), torch.ones(()), atol=3e-3)
    shares = [attention.share(word) for word in [*attention.words, *attention.special]]
    assert sum(shares) == pytest.approx(1, abs=1e-3) and min(shares) > 0


def test_pieces_of_a_word_are_joined(attention):
    assert [word.text for word in attention.words] == ["a", "cat", "on", "a", "rocket"]
    rocket = attention.find("rocket")
    assert [attention.tokens[k] for k in rocket.tokens] == ["rock", "et"]
    maps = attention.maps["middle.1.layers.0.cross_attention"]
    joined = attention.heat(rocket, layers=["middle.1.layers.0.cross_attention"]).mean()
    assert joined == pytest.approx(maps[:, :, [5, 6]].float().sum(2).mean().item(), rel=1e-2)


def test_the_prompts_half_is_kept_not_the_negative_ones(pipe):
    def first(**settings: Any) -> Tensor:
        maps = recorded(pipe, ask(steps=1, **settings)).maps
        return torch.cat([part.float().flatten() for part in maps.values()])

    guided = first(negative="dog dog dog")
    assert torch.allclose(guided, first(cfg=1), atol=2e-3)
    assert not torch.allclose(guided, first(prompt="a dog on a rocket", cfg=1), atol=2e-3)


def test_heat_is_the_mean_of_all_maps_each_scaled_up_bicubically(attention):
    word = attention.find("cat")
    scaled = [
        F.interpolate(head[None, None].double(), (64, 64), mode="bicubic")[0, 0]
        for maps in attention.maps.values()
        for step in maps[:, :, word.tokens[0]]
        for head in step
    ]
    expected = torch.stack(scaled).mean(0).clamp(min=0)
    assert torch.allclose(attention.heat(word).double(), expected, atol=1e-6)


def test_a_prompt_that_is_too_long_is_explained_as_far_as_it_was_read(pipe):
    with pytest.warns(UserWarning, match="cut off"):
        attention = recorded(pipe, ask("cat " * 50))
    assert len(attention.words) == 38 and attention.share(attention.words[-1]) > 0
    assert attention.share(attention.special[-1]) == 0  # there is no room for padding


def test_an_empty_prompt_shows_the_special_tokens(pipe):
    attention = recorded(pipe, ask(""))
    shown = attention.by_word(Image.new("RGB", (64, 64))).numbers["shares"]
    assert [name for name, _ in shown] == ["start", "end", "padding"]


def test_a_missing_word_or_pixel_is_named(pipe, attention):
    with pytest.raises(ValueError, match="no word 'dog'; its words are a, cat, on, rocket"):
        attention.find("dog")
    with (
        pytest.raises(ValueError, match="pixel 64,0 is outside the picture of 64x64"),
        watch(pipe, ask(), (64, 0)),
    ):
        pass


def test_saved_files_can_be_read(attention, tmp_path):
    attention.save(tmp_path)
    tensors, facts = (
        load_file(tmp_path / "words.safetensors"),
        json.loads((tmp_path / "words.json").read_text()),
    )
    name = "up.3.1.layers.0.cross_attention"
    assert torch.equal(tensors[f"maps.{name}"], attention.maps[name])
    assert facts["layers"][name] == {"steps": 3, "heads": 2, "tokens": 9, "height": 8, "width": 8}
    assert torch.equal(tensors["heat"][1], attention.heat(attention.find("cat")))
    assert [word["text"] for word in facts["words"]][-3:] == ["start", "end", "padding"]


def test_every_view_says_what_it_shows(attention):
    picture = Image.new("RGB", (64, 64), "white")
    words = attention.telling(2)
    views = [
        attention.by_word(picture, special=True),
        attention.by_step(picture, words),
        attention.by_layer(picture, words),
        attention.by_head(picture, words[0]),
        attention.of_pixel(picture),
    ]
    for view in views:
        assert (view.guide and view.alt and "cat on a rocket" in view.alt) or "(50, 10)" in view.alt
    assert views[1].numbers["columns"] == ["step 1", "step 2", "step 3"]
    assert views[2].numbers["rows"] == [word.text for word in words]
    assert np.shape(views[3].numbers["shares"]) == (2, 7)  # heads, layers
    assert all("of a place's attention" in view.figure.texts[-1].get_text() for view in views[:4])  # the bar


def test_captions_say_what_the_numbers_say(attention):
    picture, word = Image.new("RGB", (64, 64), "white"), attention.find("cat")
    view = attention.by_layer(picture, [word])
    shares = dict(zip(view.numbers["columns"], view.numbers["shares"][0]))
    name, share = max(shares.items(), key=lambda item: item[1])
    assert view.guide.startswith(f"“cat” is read most in {' '.join(name.split()[:-1])} ({share:.1%})")
    even, peak = torch.ones(20, 20), torch.zeros(20, 20)
    peak[:2] = 1
    assert focus(even) == pytest.approx(0.1) and focus(peak) == 1
    assert (
        f"at ({', '.join(map(str, attention.of_pixel(picture).numbers['most']))})"
        in attention.of_pixel(picture).guide
    )


# Ground truth: a U-Net that does not draw, but calls its hooks with known weights


class Planted(UNet):
    """Its left half looks at token 1, its right half at token 2, and each place at its mirror image."""

    def forward(self, latents: Tensor, context: Any, t: Tensor, guidance: Any = None) -> Tensor:
        words = getattr(context, "context", context).shape[1]
        grids = row_grids(self.config, *latents.shape[-2:])
        for name, layer in self.named_modules():
            if not isinstance(layer, CrossAttention | SelfAttention) or layer.hook is None:
                continue
            h, w = grids[
                name.split(".1.")[0].removesuffix(".1") if "middle" in name else ".".join(name.split(".")[:2])
            ]
            place = torch.arange(h * w)
            if isinstance(layer, CrossAttention):
                weights = F.one_hot(1 + (place % w >= w // 2).long(), words)
            else:
                weights = F.one_hot((h - 1 - place // w) * w + (w - 1 - place % w), h * w)
            layer.hook(weights.float().expand(len(context), 2, -1, -1))
        return torch.zeros(len(context), *latents.shape[1:])


@pytest.fixture(scope="module")
def planted() -> StableDiffusion:
    pipe = tiny()
    pipe.models["diffusion"] = Planted(TINY.unet)
    return pipe


def test_words_land_on_their_halves(planted):
    attention = recorded(planted, ask("cat dog"))
    things = torch.ones(64, 64, dtype=torch.bool)
    for word, left in (("cat", True), ("dog", False)):
        share, own, other = measure(attention.heat(attention.find(word)), things, left)
        assert share > 0.95 and own > 0.9 and other < 0.1
        swapped, _, _ = measure(attention.heat(attention.find(word)), things, not left)
        assert swapped == pytest.approx(1 - share, abs=1e-5)


def test_a_pixel_looks_where_it_looks(planted):
    attention = recorded(planted, ask(size=(96, 64)), (88, 4))  # at the right and the top
    look = attention.look()
    y, x = divmod(int(look.argmax()), 96)
    assert x < 32 and y > 32  # at the left and the bottom
    assert look.mean() == pytest.approx(1, abs=0.05)  # relative to looking everywhere alike


# The mini


@pytest.mark.slow
def test_the_minis_words_are_looked_at_where_their_things_are():
    pipe = reifusion.load()
    for prompt in ("a dog next to a tree", "a banana next to a car", "a penguin next to a sunflower"):
        request = ask(prompt, seed=0, steps=8, cfg=4)
        attention = recorded(pipe, request)
        things = foreground(pipe.decode(list(pipe.denoise(request))[-1].latents)[0])
        left = torch.arange(things.shape[1]) < things.shape[1] // 2
        for place, own in ((1, things & left), (5, things & ~left)):  # each word, and the thing on its side
            heat = attention.heat(attention.words[place])
            assert heat[own].mean() > 1.5 * heat[things & ~own].mean()
    for prompt in ("a cat on a red background", "a tree on a yellow background"):
        request = ask(prompt, seed=0, steps=8, cfg=4)
        attention = recorded(pipe, request)
        things = foreground(pipe.decode(list(pipe.denoise(request))[-1].latents)[0])
        heats = [attention.heat(attention.words[place]) for place in (1, 4)]  # the thing and the colour
        thing, colour = (heat[things].mean() / heat[~things].mean() for heat in heats)
        assert thing > 2 * colour


# Whether words find their things


def test_measures_of_a_perfect_and_of_a_blind_map():
    things = torch.zeros(8, 8, dtype=torch.bool)
    things[2:6, 1:3] = things[2:6, 5:7] = True
    left = things & (torch.arange(8) < 4)
    assert measure(left.float(), things, True) == (1, 1, 0)
    assert measure(left.float(), things, False) == (0, 0, 1)
    share, own, other = measure(torch.ones(8, 8), things, True)
    assert (share, own, other) == (0.5, 8 / 64, 8 / 64)
    assert iou(torch.zeros(2, 2, dtype=torch.bool), torch.zeros(2, 2, dtype=torch.bool)) == 0


def test_foreground_is_what_is_not_the_colour_of_the_rim():
    picture = Image.new("RGB", (32, 32), (250, 240, 245))
    ImageDraw.Draw(picture).rectangle((8, 10, 15, 12), fill="red")
    places = foreground(picture).nonzero()
    assert len(places) == 8 * 3 and places.min(0).values.tolist() == [10, 8]


def test_pairs_are_of_two_things_and_the_same_for_a_seed():
    assert all(a != b for a, b in pairs(50, 0)) and pairs(5, 3) == pairs(5, 3) != pairs(5, 4)


def test_halves_reports_every_word_of_every_prompt(pipe):
    numbers = halves(pipe, ask(""), 2).numbers
    assert [found["side"] for found in numbers["findings"]] == ["left", "right"] * 2
    assert all(f"{found['word']} on the {found['side']}" in found["prompt"] for found in numbers["findings"])
    assert numbers["share"] == pytest.approx(np.mean([found["share"] for found in numbers["findings"]]))
