"""Batches that are drawn ahead are the same batches, at the same step."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from reifusion.train.ahead import Ahead
from reifusion.train.images import DataError
from reifusion.train.loop import rng


class Draw:
    """Random pictures, and a list of what was drawn by which thread."""

    def __init__(self) -> None:
        self.drawn: list[tuple[int, int, int, str]] = []
        self.done = threading.Condition()

    def __call__(self, generator: torch.Generator, count: int, size: int) -> Tensor:
        pictures = torch.rand(count, 3, size, size, generator=generator)
        with self.done:
            self.drawn.append((generator.initial_seed(), count, size, threading.current_thread().name))
            self.done.notify_all()
        return pictures


def test_every_step_gets_the_batch_that_it_would_have_drawn():
    ahead, plain = Ahead(Draw()), Draw()
    for step, (count, size) in enumerate([(4, 8), (4, 8), (4, 8), (2, 16), (2, 16)]):
        for _ in range(2):  # as the parts of a batch do
            one, other = rng(7, step), rng(7, step)
            assert torch.equal(ahead(one, count, size), plain(other, count, size))
            assert torch.equal(one.get_state(), other.get_state())
            assert torch.equal(torch.rand(3, generator=one), torch.rand(3, generator=other))


def test_the_next_batch_is_begun_before_it_is_asked_for():
    draw = Draw()
    ahead = Ahead(draw)
    ahead(rng(1, 0), 2, 8)
    with draw.done:
        assert draw.done.wait_for(lambda: len(draw.drawn) == 2, 10)
    ahead(rng(1, 1), 2, 8)
    with draw.done:
        assert draw.done.wait_for(lambda: len(draw.drawn) == 3, 10)
    seeds, threads = [one[0] for one in draw.drawn], {one[3] for one in draw.drawn}
    assert seeds == [rng(1, step).initial_seed() for step in range(3)]
    assert threading.current_thread().name not in threads and len(threads) == 1
    assert len(ahead.begun) == 2


def test_a_generator_that_was_used_before_draws_what_follows():
    ahead, plain, one, other = Ahead(Draw()), Draw(), rng(0, 0), rng(0, 0)
    for generator in (one, other):
        torch.rand(5, generator=generator)
    assert torch.equal(ahead(one, 2, 8), plain(other, 2, 8))
    assert torch.equal(one.get_state(), other.get_state())


def test_what_goes_wrong_ahead_is_said_at_its_own_step():
    def draw(generator: torch.Generator, count: int, size: int) -> Tensor:
        if generator.initial_seed() == rng(0, 1).initial_seed():
            raise DataError("the picture cat.png cannot be read")
        return torch.zeros(count, 3, size, size)

    ahead = Ahead(draw)
    assert ahead(rng(0, 0), 2, 8).shape == (2, 3, 8, 8)
    with pytest.raises(DataError, match=r"cat\.png"):
        ahead(rng(0, 1), 2, 8)
