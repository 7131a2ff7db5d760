"""Weights in prompts for models with several text encoders: SDXL and Stable Diffusion 3."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from reifusion.families.sd3 import StableDiffusion3
from reifusion.families.sdxl import StableDiffusionXL, with_refiner
from reifusion.model.request import Request
from reifusion.steer import emphasis
from reifusion.steer.emphasis import encode
from tests import tiny_sd3
from tests.tiny import WORDS, random_networks
from tests.tiny_sdxl import TINY, TINY_REFINER

LONG = " ".join(["cat"] * 100)


@pytest.fixture(scope="module")
def xl() -> StableDiffusionXL:
    return StableDiffusionXL(TINY, WORDS, random_networks(TINY))


@pytest.fixture(scope="module")
def sd3() -> StableDiffusion3:
    return StableDiffusion3(tiny_sd3.TINY, tiny_sd3.tokenizers(), tiny_sd3.networks())


@pytest.fixture(params=["xl", "sd3"])
def pipe(request) -> Any:
    return request.getfixturevalue(request.param)


def asked(**more: Any) -> dict[str, Any]:
    return {"steps": 2, "cfg": 3.0, "seed": 5, "size": (64, 64)} | more


@pytest.mark.parametrize("rule", emphasis.RULES)
def test_without_signs_nothing_changes(pipe, rule):
    if rule == "compel" and isinstance(pipe, StableDiffusion3):
        with pytest.raises(ValueError, match="compel's rule is for CLIP alone"):
            emphasis.request(pipe, Request("a cat", "dog", **asked()), rule)
        return
    assert torch.allclose(encode(pipe, "a cat", rule), pipe.encode_text(["a cat"]), atol=1e-5)
    plain = pipe.generate("a cat", "dog", progress=False, **asked())
    same = emphasis.request(pipe, Request("a cat", "dog", **asked()), rule)
    difference = torch.tensor(list(plain.tobytes())).float() - torch.tensor(
        list(pipe.generate(same, progress=False)[0].tobytes())
    )
    assert difference.abs().max() <= 1


@pytest.mark.parametrize("rule", ["a1111", "plain"])
def test_each_encoders_words_are_weighted_alone_and_the_whole_text_is_not(xl, rule):
    light, heavy = encode(xl, "a cat", rule)[0], encode(xl, "a (cat:1.5)", rule)[0]
    first, chunk = TINY.clip.width, TINY.clip.context_length
    for words in (slice(0, first), slice(first, None)):
        before, after = light[:chunk, words], heavy[:chunk, words]
        factor = after[2] / before[2]  # of "cat"; "a" is before it, and cannot see it
        other = after[1] / before[1]
        assert torch.allclose(factor / other, torch.tensor(1.5), atol=1e-4)
        kept = torch.allclose(after.mean(), before.mean(), atol=1e-6)
        assert kept == (rule == "a1111")
        assert torch.allclose(other, other[0].expand_as(other), atol=1e-4)
    assert torch.equal(light[chunk:], heavy[chunk:])


def test_a_weight_of_zero_by_comfyuis_rule_is_the_empty_text(pipe):
    found, nothing = encode(pipe, "(cat:0)", "comfyui"), pipe.encode_text([""])
    assert torch.allclose(found[:, 1], nothing[:, 1], atol=1e-5)
    assert not torch.allclose(found[:, 2], nothing[:, 2], atol=1e-3)


def test_compels_rule_mixes_in_a_text_without_the_words_in_both_encoders(xl):
    light, plain = encode(xl, "a (cat:0.00001) dog", "compel"), xl.encode_text(["a cat dog"])
    for words in (slice(0, TINY.clip.width), slice(TINY.clip.width, None)):
        change = (light - plain)[0, :, words].abs().amax(1)
        assert change[1] < 1e-4 < change[3]  # "dog" has not seen the cat; "a" is before it
    assert torch.allclose(light[:, -1], plain[:, -1], atol=1e-5)


def test_weights_reach_t5(sd3):
    start = sd3.config.clip.context_length
    light, heavy = encode(sd3, "a cat", "plain")[0, start:], encode(sd3, "a (cat:1.5)", "plain")[0, start:]
    cat = len(sd3.tokenizer.t5.tokenize("a"))  # T5 reads the whole text in every word
    factors = (heavy[:-1] / light[:-1])[: cat + 3, 0]
    assert factors.tolist() == pytest.approx([1.0] * cat + [1.5, 1.0, 1.0], abs=1e-4)


def test_long_prompts_have_their_chunks_before_what_comes_behind_the_words(pipe):
    chunk = pipe.config.clip.context_length
    short = pipe.encode_text([""]).shape[1]
    long = encode(pipe, LONG, "a1111")
    chunks = -(-100 // (chunk - 2))
    assert long.shape[1] == short + (chunks - 1) * chunk
    first = encode(pipe, " ".join(["cat"] * (chunk - 2)), "a1111")
    assert torch.allclose(long[:, :chunk], first[:, :chunk], atol=1e-5)
    assert torch.allclose(long[:, -1], first[:, -1], atol=1e-5)  # the whole text is the first chunk
    sides = emphasis.request(pipe, Request(LONG, "dog", **asked()), "a1111")
    assert isinstance(sides.negative, torch.Tensor) and isinstance(sides.prompt, torch.Tensor)
    assert sides.negative.shape == sides.prompt.shape
    assert torch.allclose(sides.negative[0, :, -1], encode(pipe, "dog", "a1111")[:, -1])
    joint = isinstance(pipe, StableDiffusion3)  # where more words are more, also if they are the same
    second = encode(pipe, "" if joint else "dog", "a1111")
    assert torch.equal(sides.negative[0, :, chunk : 2 * chunk], second[:, :chunk])
    pipe.generate(sides, progress=False)


def test_no_negative_prompt_is_zeros_for_the_base_but_not_in_comfyui(xl):
    def negative(rule: str, said: str | None = None) -> Any:
        return emphasis.request(xl, Request("a cat", said, **asked()), rule).negative

    assert not negative("a1111").any() and negative("a1111", "dog").any()
    assert torch.equal(negative("comfyui")[0], encode(xl, "", "comfyui"))


def test_a_refiner_is_refused(xl):
    refiner = StableDiffusionXL(TINY_REFINER, xl.tokenizer, random_networks(TINY_REFINER))
    both = with_refiner(xl, refiner)
    with pytest.raises(ValueError, match="a refiner do not go together"):
        emphasis.request(both, Request("a cat", **asked()), "a1111")
    sides = emphasis.request(refiner, Request("a cat", "dog", **asked()), "a1111")
    assert refiner.generate(sides, progress=False)
