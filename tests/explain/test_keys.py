"""Swapped keys: a place receives the other word's value, and on the mini things change places."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

import reifusion
from reifusion.explain.keys import chosen, keys_swapped, likeness, swap
from reifusion.explain.words import Word, prompt_words
from reifusion.model.attention import CrossAttention, softmax_attention
from reifusion.model.request import Request


def ask(prompt: str = "a cat on a rocket", **settings: Any) -> Request:
    return Request(prompt, **{"sampler": "ddim", "steps": 2, "seed": 1, "cfg": 3, **settings})


def halves(left: str, right: str) -> Image.Image:
    page = Image.new("RGB", (40, 40), "white")
    page.paste(left, (6, 10, 16, 30))
    page.paste(right, (24, 10, 34, 30))
    return page


def test_likeness_is_one_minus_one_or_nought():
    one = halves("red", "blue")
    assert likeness(one, one) == pytest.approx(1) and likeness(one, halves("blue", "red")) == pytest.approx(
        -1
    )
    assert likeness(one, Image.new("RGB", (40, 40), "white")) == 0


def test_a_place_receives_the_other_words_value_and_only_the_prompts_half_is_changed(pipe):
    layer = next(m for m in pipe.models["diffusion"].modules() if isinstance(m, CrossAttention))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, n, 4, generator=generator) for n in (9, 6, 6))
    with keys_swapped(pipe, Word("one", (1, 2)), Word("other", (4,))):  # the last piece of each
        seen = layer.kernel(q, k, v, False)
    order = [0, 1, 4, 3, 2, 5]
    torch.testing.assert_close(seen[0], softmax_attention(q, k, v[:, :, order])[0][0])
    torch.testing.assert_close(seen[1], softmax_attention(q, k, v)[0][1])


def test_the_model_is_as_before_afterwards(pipe):
    words = prompt_words(pipe, ask())
    before = list(pipe.denoise(ask()))[-1].latents
    with pytest.raises(RuntimeError, match="stop"), keys_swapped(pipe, words[1], words[4]):
        assert not torch.equal(list(pipe.denoise(ask()))[-1].latents, before)
        raise RuntimeError("stop")
    assert torch.equal(list(pipe.denoise(ask()))[-1].latents, before)


def test_words_are_named_or_chosen_and_missing_ones_get_a_sentence(pipe):
    assert [word.text for word in chosen(pipe, ask(), ["rocket", "cat"])] == ["rocket", "cat"]
    assert len({word.text for word in chosen(pipe, ask(), None)}) == 2
    two = "two different words are swapped"
    for words, sentence in ((["cat", "fish"], "no word 'fish'"), (["cat"], two), (["cat", "cat"], two)):
        with pytest.raises(ValueError, match=sentence):
            chosen(pipe, ask(), words)
    with pytest.raises(ValueError, match="two words"):
        chosen(pipe, ask("cat"), None)


def test_the_exhibit_says_how_many_changed_places(pipe):
    exhibit = swap(pipe, ask(), ["cat", "rocket"], seeds=2)
    assert len(exhibit.numbers["likeness"]) == 2
    many = sum(cosine < -0.5 for cosine in exhibit.numbers["likeness"])
    assert exhibit.guide.startswith(f"In {many} of 2 pictures")


@pytest.mark.slow
def test_on_the_mini_things_change_places():
    pipe = reifusion.load(dtype="fp32")
    for prompt, words in (
        ("a dog next to a tree", ["dog", "tree"]),
        ("an apple next to a fish", ["apple", "fish"]),
    ):
        exhibit = swap(pipe, Request(prompt, seed=1, steps=12, sampler="ddim"), words, seeds=2)
        assert max(exhibit.numbers["likeness"]) < -0.8
