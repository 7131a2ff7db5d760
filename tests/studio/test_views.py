"""What the page shows of a drawing: its words with their heat, its tensors, the equations of each station."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import reifusion
from reifusion.families.sd3 import StableDiffusion3
from reifusion.families.sdxl import StableDiffusionXL
from reifusion.model import attention, ddpm, samplers
from reifusion.model.encoder import unscale_latents
from reifusion.settings import Settings
from reifusion.studio import views
from reifusion.studio.excerpts import PACKAGE, coloured, excerpts, whole
from reifusion.studio.stages import CHAPTERS, facts, stations, way_back
from tests import tiny_sd3, tiny_sdxl
from tests.tiny import WORDS, random_networks

EVIL = "a <b onclick=alert(1)> cat \" ' ${1+1} {{x}} &amp;"


@pytest.fixture
def drawing(wanted, finish):
    return finish(wanted(sampler="ddpm"))


@pytest.mark.parametrize("place", [1, 3, 5])
def test_each_word_carries_its_heat_at_that_step(drawing, place):
    sent = views.heats(drawing, place)
    step = drawing.frames[place].step
    assert [word["text"] for word in sent["words"]] == ["a", "cat", "on", "a", "dog"]
    assert [word["little"] for word in sent["words"]] == [True, False, True, True, False]
    for word, told in zip(drawing.attention.words, sent["words"]):
        heat = drawing.attention.heat(word, slice(None) if step is None else slice(step, step + 1)).numpy()
        shown = np.frombuffer(base64.b64decode(told["map"]), np.uint8).reshape(sent["height"], sent["width"])
        assert np.abs(shown / 255 - heat / heat.max()).max() <= 1 / 255  # 64 × 64: not made any coarser here
        assert told["peak"] == pytest.approx(heat.max()) and told["share"] == pytest.approx(heat.mean())


def test_noise_has_no_words(drawing):
    assert views.heats(drawing, 0)["words"] == []


def test_a_place_says_what_its_two_pictures_are(drawing):
    assert views.under(drawing, 0) == ("the latents, 4 × 8 × 8: noise", "the same, decoded")
    assert [text[:3] for text in views.under(drawing, 2)] == ["x_t", "x̂₀"]
    assert views.under(drawing, 5)[1] == "decoded: the picture"
    assert views.caption(drawing, 2).startswith("step 2 of 4, t = ")


def test_shares_go_from_noise_to_picture(drawing):
    share: list[Any] = [views.shares(drawing, place) for place in range(5)]
    assert share == sorted(share) and share[0] == (0.0, 1.0) and views.shares(drawing, 5) is None
    for place in (1, 4):
        t = int(drawing.frames[place].t)
        bar = drawing.sampler.alphas_cumprod[t].item()
        assert views.shares(drawing, place) == pytest.approx((bar**0.5, (1 - bar) ** 0.5))
    assert views.curve(drawing)["timesteps"] == [frame.t for frame in drawing.frames[1:-1]]


def test_a_tensor_s_picture_has_a_tile_for_each_channel_red_above_zero():
    latents = torch.stack([torch.full((3, 5), value) for value in (9.0, -9.0, 0.0, 9.0)])[None]
    pixels = np.asarray(views.tiles(latents)).astype(int)
    assert pixels.shape == (6, 10, 3)
    red, blue = pixels[0, 0], pixels[0, 9]
    assert red[0] > red[2] + 50 and blue[2] > blue[0] + 50
    assert (pixels[5, 0] == 250).all() and (pixels[5, 9] == red).all()


def test_a_station_has_the_tensors_of_its_step(drawing, pipe, wanted):
    for place, step in enumerate(pipe.denoise(wanted(sampler="ddpm").request()), 1):
        expected: dict[str, Any] = {
            "push": step.eps_cond - step.eps_uncond,
            "scaled": step.scaled,
            "next": step.latents,
            "words": step.words[0],
        }
        for name, values in expected.items():
            shown: Any = views.tensor(drawing, place, name)
            assert torch.equal(values, shown)
    told = facts(drawing, 2)["stations"]
    assert [one["name"] for one in told["guidance"]["tensors"]] == ["uncond", "push"]
    assert told["clip"]["tensors"][0]["shape"] == "40 × 16" and told["unet"]["now"].startswith("t = ")
    assert "next" in [one["name"] for one in told["sampler"]["tensors"]]
    rows = dict(told["tokens"]["rows"])
    assert rows["cat"] == str(pipe.tokenizer.tokenize("cat")[0])
    assert len(told["unet"]["rows"]) == len(drawing.attention.maps)


@pytest.mark.filterwarnings("ignore:the prompt has")
def test_a_prompt_is_text_and_never_markup(wanted, finish):
    drawing = finish(wanted(EVIL, steps=2))
    told = json.dumps([one for one in facts(drawing, 1)["stations"].values() for one in one["code"]])
    assert "onclick" not in told
    assert coloured("if x < 1:  # <b>") == (
        '<i class="word">if</i> x &lt; <i class="number">1</i>:  <i class="remark"># &lt;b&gt;</i>'
    )


def test_the_equation_and_its_line_are_those_of_the_code():
    [found] = excerpts(ddpm.Sampler.predict, "x0-from-v")
    assert found.equation.startswith("App. D, Salimans & Ho 2022: x₀ = αₜ xₜ - σₜ v")
    path, line = found.place.split(":")
    lines = (Path(reifusion.__file__).parents[1] / path).read_text("utf-8").splitlines()
    assert found.code.splitlines()[0] == lines[int(line) - 1].strip()
    assert "signal * x - sigma * output" in found.code


def test_the_lines_of_an_equation_are_those_that_compute_it_to_the_end():
    [found] = excerpts(attention.softmax_attention, "attention")
    assert found.code.splitlines()[-1] == "return weights @ v, weights" and ".softmax(dim=-1)" in found.code


def test_a_function_without_an_equation_is_shown_without_its_docstring():
    code = whole(unscale_latents).code
    assert code.startswith("def unscale_latents") and '"""' not in code and "/ config.scale_factor" in code


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_every_sampler_has_lines_to_show(name):
    found = way_back(samplers.SAMPLERS[name])
    for excerpt in found:
        path, line = excerpt.place.split(":")
        first = (PACKAGE / path).read_text("utf-8").splitlines()[int(line) - 1]
        assert first.strip() == excerpt.code.splitlines()[0].strip()
    assert found and any(excerpt.code.strip() for excerpt in found)


def sources(drawing, place) -> dict[str, str]:
    return {
        name: " ".join(one.equation + one.code for one in station.code)
        for name, station in stations(drawing, place).items()
    }


def test_each_station_shows_its_own_equations(drawing):
    told = sources(drawing, 1)
    assert "Radford et al. 2018" in told["clip"] and "def randn" in told["noise"]
    assert "Vaswani et al. 2017" in told["unet"] and "Ho & Salimans 2022" in told["guidance"]
    assert "x₀ ≈" in told["sampler"] and "μ̃ₜ =" in told["sampler"]
    assert "x₀ = αₜ" not in told["sampler"]  # this model predicts ε
    assert "def to_picture" in told["vae"] and "latents / config.scale_factor" in told["vae"]
    assert "* config.scale_factor" not in told["vae"]  # that is the encoder's


@pytest.mark.parametrize("name", ["ddim", "euler_a"])  # one in ᾱ, one in σ
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_equation_with_its_numbers_gives_the_clean_latents(prediction, name, wanted, finish):
    settings = wanted(sampler=name, prediction_type=prediction)
    drawing, pipe = finish(settings), settings.pipe()
    for place, step in enumerate(pipe.denoise(settings.request()), 1):
        filled = stations(drawing, place)["sampler"].filled
        signal, noise = (float(x) for x in re.findall(r"\d\.\d+", filled))
        x_t, seen = step.scaled, step.output
        if prediction == "epsilon":
            signal, noise = noise, signal  # (x_t - noise ε) / signal
            x0 = (x_t - noise * seen) / signal
        else:
            x0 = signal * x_t - noise * seen
        assert (x0 - drawing.frames[place].x0).abs().max() < 0.02 * x0.abs().max()


def test_without_guidance_it_says_so(wanted, finish):
    drawing = finish(wanted(steps=2, cfg=1.0))
    station = stations(drawing, 1)["guidance"]
    assert "there is no guidance" in station.said and not station.tensors
    assert "Song et al. 2021" in sources(drawing, 1)["sampler"]


def test_every_chapter_is_one_of_the_book(drawing):
    chapters = {one.chapter for place in (0, 1, 5) for one in stations(drawing, place).values()}
    folder = PACKAGE / "docs" / "book"
    assert chapters < set(CHAPTERS)
    for chapter in CHAPTERS:
        head = (folder / f"{chapter}.md").read_text("utf-8").splitlines()[0]
        assert re.match(rf"# \d+ {re.escape(CHAPTERS[chapter])}", head)


def test_the_reader_is_told_what_was_cut_and_what_an_empty_prompt_does(pipe):
    assert views.notes(pipe, "a cat") == []
    [said] = views.notes(pipe, "cat " * 50 + "dog dog")
    assert said.startswith("The prompt has 52 tokens and there is room for 38, so this is cut off: cat cat")
    assert views.notes(pipe, " ")[0].startswith("An empty prompt")


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_the_larger_families_are_shown_too(family, monkeypatch, tmp_path):
    from reifusion import album
    from reifusion.studio import drawing as drawing_module

    pipe: Any
    if family == "sdxl":
        pipe = StableDiffusionXL(tiny_sdxl.TINY, WORDS, random_networks(tiny_sdxl.TINY))
    else:
        pipe = StableDiffusion3(tiny_sd3.TINY, tiny_sd3.tokenizers(), tiny_sd3.networks())
    monkeypatch.setattr(drawing_module, "model", lambda settings: pipe)
    monkeypatch.setattr(
        album, "entry", lambda asked, request, _: album.Entry(asked.filled(request), {"model": "0123456789"})
    )
    size = (6 * pipe.config.multiple, 4 * pipe.config.multiple)
    settings = Settings(
        "a cat", seed=1, steps=2, cfg=3.0, size=size, sampler="euler" if family == "sdxl" else None
    )
    *_, drawing = drawing_module.draw(drawing_module.Drawing(settings), tmp_path)
    assert drawing.path is not None and len(drawing.frames) == 4, drawing.note
    for place in range(4):
        told = json.loads(json.dumps(facts(drawing, place)))
        for station in told["stations"].values():
            for one in station["tensors"]:
                values: Any = views.tensor(drawing, place, one["name"])
                assert views.tensor_picture(values).width > 1
        assert drawing.look(place, "seen").size == size
    assert [word["text"] for word in told["heats"]["words"]] == ["a", "cat"]
    title, source = ("U-Net", "Vaswani") if family == "sdxl" else ("Transformer", "Esser")
    assert told["stations"]["unet"]["title"] == title
    assert told["stations"]["sampler"]["chapter"] == CHAPTERS["samplers" if family == "sdxl" else "flow"]
    assert source in told["stations"]["unet"]["code"][0]["equation"]
