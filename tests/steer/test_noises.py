"""Noise as other programs draw it, against published numbers, and variations along a circle."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from reifusion.model.noise import randn
from reifusion.model.pipeline import StableDiffusion
from reifusion.steer.noises import NOISES, Philox, philox
from reifusion.steer.variations import slerp, slerp_of_columns, varied
from tests.tiny import SMALL, WORDS, networks


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # Random123's known answers
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_known_answers(counter, key, words):
    counters, keys = ([int(word, 16) for word in text.split()] for text in (counter, key))
    found = philox(np.array(counters, np.uint32)[:, None], (keys[0], keys[1]))
    assert [f"{word:08x}" for word in found[:, 0]] == words.split()


@pytest.mark.parametrize(
    ("seed", "first"),
    [  # what CUDA devices print; beyond 32 bits, what A1111's own file computes
        (0, [-0.9246624, -0.42534396, -2.6438458, 0.14518388, -0.12086651, -0.5797257]),
        (1, [-0.29627782, 2.676448, -0.1408464, -0.84409505, 0.2905384, -0.28383082]),
        (42, [0.19401887, 2.1613739, -0.17205095, 0.84906, -1.9243993, 0.6529853]),
        (2**32 + 5, [-2.8427474, 1.3404924, 0.27223086, 1.4550629]),
    ],
)
def test_the_numbers_are_those_of_a_cuda_device(seed, first):
    found = Philox(seed).randn((len(first),))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor(first), atol=1e-6, rtol=0)


def test_a_whole_picture_and_a_second_call_are_those_of_a_cuda_device():
    source = Philox(0)
    noise = source.randn((4, 64, 64))
    assert noise.sum().item() == pytest.approx(-113.79399, abs=1e-3)
    assert noise.flatten()[[1000, -1]].tolist() == pytest.approx([-0.3893392, -2.954316], abs=1e-6)
    second = source.randn((4,)).tolist()
    assert second == pytest.approx([0.18082589, -0.5522627, 0.9238134, -0.73497033], abs=1e-6)


def test_each_program_goes_on_in_its_own_way():
    shape, seed = (4, 8, 8), 7

    def cpu(seed):
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(shape, generator=generator) for _ in range(2)]

    gpu = Philox(seed)
    expected = {
        "cpu": cpu(seed),
        "philox": [gpu.randn(shape), gpu.randn(shape)],
        "comfyui": [cpu(seed)[0], Philox(seed).randn(shape)],
        "comfyui-cpu": [cpu(seed)[0], cpu(seed + 1)[0]],
        "invokeai": [cpu(seed)[0], cpu(0xFFFFFFF8)[0]],
    }
    assert expected.keys() == NOISES.keys()
    for name, (first, later) in expected.items():
        source = NOISES[name](seed)
        assert torch.equal(source.randn(shape), first) and torch.equal(source.randn(shape), later), name
    assert torch.equal(NOISES["invokeai"](2**32 + seed).randn(shape), cpu(seed)[0])


def test_noise_on_the_way_keeps_its_spread_and_begins_and_ends_at_the_two():
    one, other = randn((2, 4, 64, 64), torch.Generator().manual_seed(0))
    for mix in (slerp, slerp_of_columns):
        for share in (0.1, 0.5, 0.8):
            assert mix(share, one, other).std().item() == pytest.approx(1, abs=0.02)
        torch.testing.assert_close(mix(0, one, other), one, atol=2e-6, rtol=0)
        torch.testing.assert_close(mix(1, one, other), other, atol=2e-6, rtol=0)
    assert torch.lerp(one, other, 0.5).std() < 0.75  # what a straight mix does


def test_the_way_is_even_and_the_columns_of_the_web_ui_turn_on_their_own():
    one, other = torch.tensor([[[1.0], [0.0]]]), torch.tensor([[[0.0], [2.0]]])  # (1, 2, 1), at a right angle
    half = 0.5**0.5
    assert slerp(0.5, one, other).flatten().tolist() == pytest.approx([half, 2 * half])
    assert slerp(1 / 3, one, other).flatten().tolist() == pytest.approx([0.75**0.5, 1.0])
    # Two columns: one turns by 90°, the other by 60°; (C, H, W) = (1, 2, 2)
    one = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])
    other = torch.tensor([[[0.0, 0.5], [1.0, 0.75**0.5]]])
    found = slerp_of_columns(0.5, one, other)
    torch.testing.assert_close(found[0, :, 0], torch.tensor([half, half]))
    torch.testing.assert_close(found[0, :, 1], torch.tensor([0.75**0.5, 0.5]))
    assert not torch.allclose(slerp(0.5, one, other), found)
    # Almost the same: theirs goes the other way round, ours does not.
    near = 1.001 * one
    torch.testing.assert_close(slerp_of_columns(0.25, one, near), 0.25 * one + 0.75 * near)
    torch.testing.assert_close(slerp(0.25, one, near), 0.75 * one + 0.25 * near)


def test_only_the_first_noise_is_mixed():
    source, plain = varied(2, 0.3, Philox)(1), Philox(1)
    first, second = source.randn((4, 8, 8)), source.randn((4, 8, 8))
    assert torch.equal(first, slerp(0.3, plain.randn((4, 8, 8)), Philox(2).randn((4, 8, 8))))
    assert torch.equal(second, plain.randn((4, 8, 8)))
    with pytest.raises(ValueError, match=r"variation must be between 0 and 1, not 1\.5"):
        varied(1, 1.5)


@pytest.mark.parametrize("sampler", ["ddim", "euler_a"])
def test_a_request_draws_from_its_source_in_every_place_of_a_batch(sampler):
    pipe = StableDiffusion(SMALL, WORDS, networks(SMALL, noise=0.02))
    asked = {"steps": 3, "sampler": sampler, "size": (32, 24), "progress": False}
    plain = pipe.generate("a cat", seed=5, **asked)
    assert pipe.generate("a cat", seed=5, source=NOISES["cpu"], **asked).tobytes() == plain.tobytes()
    _, second = pipe.generate("a cat", seed=4, num=2, source=NOISES["philox"], **asked)
    alone = pipe.generate("a cat", seed=5, source=NOISES["philox"], **asked)
    assert second.tobytes() == alone.tobytes() != plain.tobytes()
    assert pipe.generate("a cat", seed=5, source=varied(9, 0.0), **asked).tobytes() == plain.tobytes()
    # All of the way is the other picture only where the sampler adds no noise.
    all_the_way = pipe.generate("a cat", seed=5, source=varied(9, 1.0), **asked)
    other = pipe.generate("a cat", seed=9, **asked)
    if sampler == "ddim":
        assert all_the_way.tobytes() == other.tobytes()
    else:
        assert all_the_way.tobytes() != other.tobytes()
