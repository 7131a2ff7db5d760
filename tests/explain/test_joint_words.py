"""Word maps of joint attention, by hand and by `watch`: places look at places and at two sets of words."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from reifusion.explain.ablate import ablate
from reifusion.explain.trace import trace
from reifusion.explain.words import Attention, watch, words
from reifusion.families.mmdit import JointAttention
from reifusion.families.sd3 import StableDiffusion3
from reifusion.model.request import Request
from tests.tiny_sd3 import PIECES, TINY, networks, tokenizers

PROMPT = "a cat, dog"
# start a cat , dog end | padding; and T5: ▁ a ▁cat <unk> ▁dog end | padding
SIZE = (48, 32)  # 12 × 8 places


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion3:
    return StableDiffusion3(TINY, tokenizers(), networks())


def ask(**settings) -> Request:
    return Request(PROMPT, **{"seed": 1, "steps": 2, "cfg": 3.0, "size": SIZE, **settings})


def test_a_model_of_joint_attention_can_be_traced_and_not_ablated(pipe):
    found = trace(pipe, ask())
    (row, *_) = (row for row in found.rows if row.kind == "JointAttention")
    tokens = 8 * 12 + len(pipe.encode_text([PROMPT])[0]) - pipe.config.rows  # of the picture, and of words
    width = pipe.config.unet.width
    assert row.own_flops == 2 * 2 * 2 * tokens**2 * width  # two products, both halves of guidance
    assert "the text encoders, which are not in this table, run once" in found.html()
    with pytest.raises(ValueError, match="has no cross-attention whose layers could be taken away"):
        ablate(pipe, ask())


@pytest.fixture(scope="module")
def recorded(pipe) -> Attention:
    with watch(pipe, ask(), (30, 10)) as attention:
        list(pipe.denoise(ask()))
    return attention


def by_hand(pipe: StableDiffusion3) -> dict[str, list[Tensor]]:
    """Each layer's weights of the prompt's half of the batch, written out: (heads, L, L + S)"""
    seen: dict[str, list[Tensor]] = {}

    def keep(name: str):
        def hook(layer: nn.Module, streams: tuple) -> None:
            q: list[Tensor] = []
            k: list[Tensor] = []
            for queries, x in streams:
                both = x[0] @ queries.qkv.weight.T + queries.qkv.bias  # (L, 3·width)
                parts = both.reshape(len(both), 3, 2, 64).permute(1, 2, 0, 3)  # (3, heads, L, 64)
                for found, norm, part in (q, queries.norm_q, parts[0]), (k, queries.norm_k, parts[1]):
                    size = (part**2).mean(-1, keepdim=True) + 1e-6
                    found.append(part / size.sqrt() * norm.weight)
            scores = torch.cat(q, 1) @ torch.cat(k, 1).mT / math.sqrt(64)
            weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
            seen.setdefault(name, []).append(weights[:, :96])  # places alone

        return hook

    layers = pipe.models["diffusion"].named_modules()
    handles = [
        layer.register_forward_pre_hook(keep(name))
        for name, layer in layers
        if isinstance(layer, JointAttention)
    ]
    list(pipe.denoise(ask()))
    for handle in handles:
        handle.remove()
    return seen


def test_maps_are_those_of_the_written_out_form(pipe, recorded):
    weights = by_hand(pipe)
    assert set(recorded.maps) == {f"blocks.{i}.attention" for i in range(3)}
    assert recorded.tokens[:7] == ["start", "a", "cat", ",", "dog", "end", "padding"]
    assert recorded.tokens[7:] == ["▁", "a", "cat", "<unk>", "dog", "end", "padding"]
    for name, maps in recorded.maps.items():
        assert maps.shape == (2, 2, 14, 8, 12)
        expected = torch.stack(weights[name])[..., 96:]  # (N, heads, L, 16 + 256)
        columns = [expected[..., k] for k in range(6)] + [expected[..., 6:16].sum(-1)]
        columns += [expected[..., 16 + k] for k in range(6)] + [expected[..., 22:].sum(-1)]
        by_word = torch.stack(columns, 2).unflatten(-1, (8, 12))
        torch.testing.assert_close(maps.float(), by_word, rtol=2e-3, atol=1e-6)


def test_a_word_has_the_tokens_of_both_texts(recorded):
    assert {word.text: word.tokens for word in recorded.words} == {
        "a": (1, 7, 8),
        "cat": (2, 9),
        ",": (3, 10),
        "dog": (4, 11),
    }
    cat = recorded.find("cat")
    alone = [recorded.heat(replace(cat, tokens=(k,))) for k in cat.tokens]
    torch.testing.assert_close(recorded.heat(cat), alone[0] + alone[1], rtol=1e-2, atol=1e-4)
    shares = sum(recorded.share(word) for word in (*recorded.words, *recorded.special))
    assert 0.5 < shares < 1  # the rest went to other places


def test_what_a_place_looks_at_is_that_of_the_written_out_form(pipe, recorded):
    weights = by_hand(pipe)
    assert "blocks.0.second_attention" in recorded.looks and len(recorded.looks) == 4
    place = (10 * 8 // 32) * 12 + 30 * 12 // 48
    for name, looks in recorded.looks.items():
        expected = torch.stack(weights[name])[:, :, place, :96].unflatten(-1, (8, 12))
        torch.testing.assert_close(looks.float(), expected, rtol=2e-3, atol=1e-6)


def test_recording_changes_nothing_and_leaves_nothing(pipe):
    plain = [step.latents for step in pipe.denoise(ask())]
    with watch(pipe, ask()):
        watched = [step.latents for step in pipe.denoise(ask())]
    assert all(torch.equal(a, b) for a, b in zip(plain, watched))
    assert all(getattr(layer, "hook", None) is None for layer in pipe.models["diffusion"].modules())


@pytest.mark.parametrize("by", ["word", "step", "layer", "head"])
def test_every_exhibit_is_drawn(pipe, by):
    assert "cat" in words(pipe, ask(), by).alt


def test_pieces_that_are_cut_otherwise_go_to_the_word_that_they_begin_in(pipe):
    request = Request("dogcat! c-at", steps=1, size=SIZE, seed=0)
    with watch(pipe, request) as attention:
        list(pipe.denoise(request))
    pieces = {word.text: [attention.tokens[k] for k in word.tokens] for word in attention.words}
    assert pieces["dogcat"][-3:] == ["c", "a", "t"] and pieces["!"][-1] == PIECES[2]
    assert pieces["-"][-1] == PIECES[2] and pieces["at"][-2:] == ["a", "t"]
