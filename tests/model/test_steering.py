"""The loop can be steered: by latents, words, guidance and gradients; and it can be written by hand."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from reifusion.explain.steer import attending, watching
from reifusion.model.attention import CrossAttention
from reifusion.model.ddpm import randn
from reifusion.model.pipeline import StableDiffusion, Turn
from reifusion.model.samplers import SAMPLERS
from tests.marks import SOME
from tests.model.test_pipeline import QUICK, draw, latents, photo, tiny, trained_for

ROOT = Path(__file__).parents[2]
LOOP: dict[str, Any] = {"sampler": "ddim", "steps": 3, "seed": 3}


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion:
    return tiny()


# By hand


def by_hand(file: str) -> str:
    """The code in a page that draws by hand, up to the latents."""
    text = (ROOT / file).read_text("utf-8")
    (code,) = re.findall(r"```python[^\n]*\n((?:(?!```).)*for t in sampler\.timesteps:.*?)```", text, re.S)
    return code[: code.index("sampler.step(t, x, guided)")] + "sampler.step(t, x, guided)\n"


@pytest.mark.parametrize(
    ("file", "name"), [*(("README.md", name) for name in SOME), ("docs/ideas.md", "euler_a")]
)
def test_the_loop_by_hand_is_the_pipelines_to_the_last_bit(pipe, file, name):
    pipe = replace(pipe, config=trained_for(SAMPLERS[name].prediction_types[-1]))
    steps = int(re.findall(r"set_inference_timesteps\((\d+)\)", by_hand(file))[0])
    scope = {"pipe": pipe, "unet": pipe.models["diffusion"], "side": 8}
    scope |= {"torch": torch, "randn": randn, "SAMPLERS": SAMPLERS}
    exec(by_hand(file).replace('"euler_a"', repr(name)), scope)
    asked: dict[str, Any] = {"seed": 3, "sampler": name, "steps": steps, "cfg": 4.0}
    assert torch.equal(scope["x"], latents(pipe, "a rocket", **asked))


# Latents


def test_latents_that_are_changed_in_place_are_gone_on_with(pipe):
    steps = pipe.denoise("a cat", **LOOP)
    step = next(steps)
    step.latents.mul_(0.5)
    assert torch.equal(next(steps).x_t, step.latents)


def test_latents_that_are_sent_are_at_least_as_exact_as_the_loops(pipe):
    steps = pipe.denoise("a cat", **LOOP)
    assert steps.send(None).x_t.dtype == torch.float32
    assert steps.send(torch.zeros(1, 4, 8, 8, dtype=torch.bfloat16)).x_t.dtype == torch.float32


def test_latents_that_are_sent_must_be_as_large_as_the_loops(pipe):
    steps = pipe.denoise("a cat", **LOOP)
    next(steps)
    with pytest.raises(ValueError, match=r"latents that are sent must be \(1, 4, 8, 8\), not \(4, 8, 8\)"):
        steps.send(torch.zeros(4, 8, 8))


@pytest.mark.parametrize("name", ["ddim", "euler", "heun", "dpmpp_2m_karras", "flow"])
def test_a_loop_that_begins_in_the_middle_goes_on_as_the_whole_one(pipe, name):
    """… where a step needs nothing of those before it; a multistep sampler begins with its first order."""
    pipe = replace(pipe, config=trained_for(SAMPLERS[name].prediction_types[-1]))
    whole = list(pipe.denoise("a cat", seed=3, sampler=name, steps=5))
    at = next(step for step in whole if step.index == (4 if name == "heun" else 2))
    rest = list(pipe.denoise("a cat", seed=3, sampler=name, steps=5, latents=at.x_t, start=2))
    assert [step.t for step in rest] == [step.t for step in whole[at.index :]]
    assert torch.equal(rest[0].x_t, at.x_t)
    if name != "dpmpp_2m_karras":
        assert torch.equal(rest[-1].latents, whole[-1].latents)


def test_given_latents_say_how_large_the_picture_is(pipe):
    drawn = pipe.generate("a cat", latents=torch.zeros(1, 4, 5, 7), seed=0, **QUICK)
    assert drawn.size == (56, 40)


# Words


def test_vectors_stand_in_place_of_texts(pipe):
    words = pipe.encode_text(["a cat", "a dog"])
    asked: dict[str, Any] = {"seed": 3, "cfg": 4.0, "sampler": "ddim"}
    as_text = latents(pipe, ["a cat", "a dog"], "a hat", **asked)
    assert torch.equal(latents(pipe, words, pipe.encode_text(["a hat"]), **asked), as_text)
    assert torch.equal(latents(pipe, words, "a hat", **asked), as_text)
    assert torch.equal(latents(pipe, ["a cat", "a dog"], pipe.encode_text(["a hat"]), **asked), as_text)
    assert torch.equal(latents(pipe, words, cfg=1, seed=3), latents(pipe, ["a cat", "a dog"], cfg=1, seed=3))
    many = pipe.generate(words, num=2, seed=3, **QUICK)
    assert [np.array(one).tolist() for one in many] == [
        np.array(one).tolist() for one in pipe.generate(["a cat", "a dog"], num=2, seed=3, **QUICK)
    ]


def test_each_turn_can_have_its_own_words(pipe):
    cat, dog = pipe.encode_text(["a cat", "a dog"]).split(1)
    schedule = torch.stack([cat, dog, dog])
    steps = list(pipe.denoise(schedule, **LOOP))
    assert [torch.equal(step.words, cat) for step in steps] == [True, False, False]
    assert torch.equal(steps[0].latents, next(pipe.denoise("a cat", **LOOP)).latents)
    rest = list(pipe.denoise("a dog", **LOOP, latents=steps[1].x_t, start=1))
    assert torch.equal(rest[-1].latents, steps[-1].latents)


# Guidance


def test_a_guide_stands_in_for_guidance(pipe):
    def guide(cond: Tensor, uncond: Tensor | None, turn: Turn) -> Tensor:
        assert uncond is not None
        return uncond + 7.5 * (cond - uncond)

    for sampler in ("ddim", "heun"):
        own = latents(pipe, "a cat", "a dog", cfg=2.0, guide=guide, seed=3, sampler=sampler)
        assert torch.equal(own, latents(pipe, "a cat", "a dog", cfg=7.5, seed=3, sampler=sampler))


def test_a_guide_may_look_again_under_other_words_and_from_elsewhere(pipe):
    cat, dog = pipe.encode_text(["a cat", "a dog"]).split(1)
    seen: list[tuple[bool, bool]] = []

    def guide(cond: Tensor, uncond: Tensor | None, turn: Turn) -> Tensor:
        same = torch.allclose(turn.look(), cond, atol=1e-4)
        other = torch.allclose(turn.look(x=turn.x_t + 1), cond, atol=1e-4)
        seen.append((same, other))
        return turn.look(dog)

    for sampler in ("ddim", "euler"):  # whose scalings differ
        drawn = latents(pipe, cat, guide=guide, seed=3, sampler=sampler)
        torch.testing.assert_close(drawn, latents(pipe, dog, cfg=1, seed=3, sampler=sampler))
    assert seen == 6 * [(True, False)]


# Gradients


def test_a_gradient_at_x_t_needs_no_clone_and_no_context(pipe):
    """… and is right: the slope of a number made of x₀, by central differences."""
    pipe = tiny()
    for network in pipe.models.values():
        network.double()
    direction, h = randn((1, 4, 8, 8)).double(), 1e-5
    steps = pipe.denoise("a cat", **LOOP, grad=True)
    step = next(steps)
    (gradient,) = torch.autograd.grad(step.x0.pow(2).sum(), step.x_t)

    def loss(x: Tensor) -> float:
        return next(pipe.denoise("a cat", **LOOP, latents=x)).x0.pow(2).sum().item()

    slope = (loss(step.x_t.detach() + h * direction) - loss(step.x_t.detach() - h * direction)) / (2 * h)
    assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-6)
    after = steps.send((step.latents - 0.1 * gradient).detach())
    assert after.x_t.is_leaf and after.x_t.requires_grad  # cut off from the step before


def test_gradients_go_through_all_steps_to_the_noise_and_the_words(pipe):
    noise, words = randn((1, 4, 8, 8)).requires_grad_(), pipe.encode_text(["a cat"]).requires_grad_()

    def end(noise: Tensor, words: Tensor) -> Tensor:
        *_, last = pipe.denoise(words, "a dog", **LOOP, grad=True, noise=noise)
        return last.latents.pow(2).sum()

    end(noise, words).backward()
    for x in (noise, words):
        assert x.grad is not None
        change, h = randn(x.shape, torch.Generator().manual_seed(1)), 1e-2
        with torch.no_grad():
            ahead, behind = (end(*(y + d * change if y is x else y for y in (noise, words))) for d in (h, -h))
        assert (x.grad * change).sum().item() == pytest.approx((ahead - behind).item() / (2 * h), rel=0.02)


def test_without_grad_there_is_no_graph(pipe):
    words = pipe.encode_text(["a cat"]).requires_grad_()
    step = next(pipe.denoise(words, **LOOP))
    assert not any(x.requires_grad for x in (step.x_t, step.latents, step.output, step.x0))


def test_text_and_pictures_have_derivatives_when_asked(pipe):
    pipe.models["clip"].requires_grad_(True).zero_grad()
    pipe.encode_text(["a cat", "a cat"], grad=True).pow(2).sum().backward()
    assert all(p.grad is not None for p in pipe.models["clip"].parameters() if p.requires_grad)
    pixels = torch.rand(1, 3, 16, 16, requires_grad=True)
    pipe.decode_image(pipe.encode_image(pixels, grad=True), grad=True).sum().backward()
    assert pixels.grad is not None and pixels.grad.abs().max() > 0
    assert not pipe.encode_text(["a cat"]).requires_grad
    assert not pipe.encode_image(pixels).requires_grad
    assert not pipe.decode_image(torch.zeros(1, 4, 2, 2, requires_grad=True)).requires_grad


def test_the_whole_loop_works_in_float64(pipe):
    exact = tiny()
    for network in exact.models.values():
        network.double()
    asked: dict[str, Any] = {"seed": 3, "cfg": 4.0, "init_image": photo(), "strength": 0.7}
    for name, kind in SAMPLERS.items():
        config = trained_for(kind.prediction_types[-1])
        steps = list(replace(exact, config=config).denoise("a cat", sampler=name, steps=4, **asked))
        assert all(x.dtype == torch.float64 for s in steps for x in (s.x_t, s.latents, s.output, s.x0))
        rough = latents(replace(pipe, config=config), "a cat", sampler=name, steps=4, **asked)
        assert 0 < (steps[-1].latents - rough).abs().max() < 1e-4
    assert np.abs(draw(exact, "a cat", seed=3) - draw(pipe, "a cat", seed=3)).max() <= 1


# What cannot be done


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"prompt": torch.zeros(8, 16)}, "a prompt of vectors is"),
        ({"prompt": torch.zeros(1, 8, 15)}, "must be .* not .1, 8, 15."),
        ({"prompt": torch.zeros(2, 1, 8, 16)}, "3, B, 77, 16"),
        ({"prompt": torch.zeros(1, 9, 16)}, "of the same shape, not .1, 9, 16. and .1, 8, 16."),
        ({"prompt": torch.zeros(1, 8, 16, dtype=torch.int64)}, "a prompt of vectors must be floating"),
        ({"prompt": torch.zeros(3, 8, 16), "negative": torch.zeros(2, 8, 16)}, "3 prompts"),
        ({"latents": torch.zeros(2, 4, 8, 8)}, "latents must be .1, 4, 8, 8., not .2, 4, 8, 8."),
        ({"latents": [0.0]}, "latents must be a tensor"),
        ({"latents": torch.zeros(1, 4, 8, 8), "start": 3}, "start must be below the number of steps, 3"),
        ({"start": 1}, "start needs the latents"),
        ({"start": -1}, "start must be at least 0"),
        ({"noise": torch.zeros(1, 4, 8)}, "noise must be a tensor"),
        ({"guide": lambda *_: None}, "what guide returns must be .1, 4, 8, 8., not NoneType"),
        ({"guide": lambda cond, *_: cond[0]}, "what guide returns must be .1, 4, 8, 8., not .4, 8, 8."),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(pipe, wrong, says):
    with pytest.raises(ValueError, match=says) as caught:
        list(pipe.denoise(**{"prompt": "a cat", **LOOP, **wrong}))
    assert "\n" not in str(caught.value)


# Attention, for a while


def test_attention_is_watched_and_replaced_while_the_with_lasts(pipe):
    layers = [layer for layer in pipe.models["diffusion"].modules() if isinstance(layer, CrossAttention)]
    kernels, plain = [layer.kernel for layer in layers], latents(pipe, "a cat", seed=3)

    def uniform(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        return v.mean(2, keepdim=True).expand_as(q)

    with attending(layers, uniform), watching(layers) as seen:
        other = latents(pipe, "a cat", seed=3)
    assert len(seen) == 3 * len(layers) and seen[0].shape[-1] == 8
    torch.testing.assert_close(seen[0].sum(-1), torch.ones(seen[0].shape[:-1]))
    assert not torch.equal(other, plain)
    assert [layer.kernel for layer in layers] == kernels and all(layer.hook is None for layer in layers)
    assert torch.equal(latents(pipe, "a cat", seed=3), plain) and len(seen) == 3 * len(layers)
