"""Muon's promises: steps are equally large in all directions, and its state can be restored."""

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from reifusion.train.muon import Muon, optimizers, orthogonalise

SIZES = st.integers(1, 40)


def random_matrix(rows: int, columns: int, seed: int, condition: float = 3.0) -> torch.Tensor:
    """Returns a matrix (rows, columns) with singular values spaced evenly from 1 to 1 / condition."""
    generator = torch.Generator().manual_seed(seed)
    u, _, v = torch.linalg.svd(torch.randn(rows, columns, generator=generator), full_matrices=False)
    return u @ torch.diag(torch.linspace(1, 1 / condition, min(rows, columns))) @ v


@settings(max_examples=40, deadline=None)
@given(SIZES, SIZES, st.integers(0, 1000), st.floats(1e-3, 1e3))
def test_singular_values_become_about_one_whatever_the_scale(rows, columns, seed, scale):
    values = torch.linalg.svdvals(orthogonalise(scale * random_matrix(rows, columns, seed)))
    assert values.min() > 0.6 and values.max() < 1.25


@settings(max_examples=40, deadline=None)
@given(SIZES, SIZES, st.integers(0, 1000))
def test_direction_is_that_of_the_singular_vectors(rows, columns, seed):
    matrix = random_matrix(rows, columns, seed)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    found, exact = orthogonalise(matrix), u @ v
    assert nn.functional.cosine_similarity(found.flatten(), exact.flatten(), dim=0) > 0.96
    # In the axes of the singular vectors the result is diagonal: Newton–Schulz changes none of them.
    inside = u.mT @ found @ v.mT
    assert (inside - torch.diag(inside.diagonal())).norm() < 0.05 * inside.norm()


def test_nothing_moves_where_there_is_no_gradient():
    assert torch.equal(orthogonalise(torch.zeros(4, 6)), torch.zeros(4, 6))
    weight, without = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2, 3))
    weight.grad = torch.zeros(2, 3)
    Muon([weight, without], lr=0.1, weight_decay=0.0).step()
    assert torch.equal(weight, torch.ones(2, 3)) and torch.equal(without, torch.ones(2, 3))


def test_first_step_is_the_one_in_the_docstring():
    torch.manual_seed(0)
    before, gradient = torch.randn(6, 4), random_matrix(6, 4, 0)
    weight = nn.Parameter(before.clone())
    weight.grad = gradient.clone()
    Muon([weight], lr=0.1, momentum=0.9, weight_decay=0.5).step()
    moved = (1 - 0.1 * 0.5) * before - 0.1 * 0.2 * 6**0.5 * orthogonalise(gradient + 0.9 * gradient)
    assert torch.allclose(weight, moved, atol=1e-6)


def test_it_finds_the_bottom_of_a_badly_scaled_bowl_faster_than_gradients_do():
    """‖A(W − W*)‖², with A's singular values from 1 to 1/100: gradients are tiny along the small ones."""
    a, best = random_matrix(16, 16, 1, condition=100.0), random_matrix(16, 16, 2)

    def distance(make) -> float:
        weight = nn.Parameter(torch.zeros(16, 16))
        optimizer = make([weight])
        for _ in range(200):
            optimizer.param_groups[0]["lr"] *= 0.98
            optimizer.zero_grad()
            (a @ (weight - best)).pow(2).sum().backward()
            optimizer.step()
        return ((weight - best).norm() / best.norm()).item()

    ours = distance(lambda p: Muon(p, lr=0.2, weight_decay=0.0))
    theirs = min(distance(lambda p, lr=lr: torch.optim.SGD(p, lr, momentum=0.9)) for lr in (0.01, 0.03, 0.1))
    assert ours < 0.1 and ours < 0.5 * theirs


def test_channels_last_weights_take_the_same_steps():
    torch.manual_seed(0)
    plain = nn.Conv2d(3, 8, 3)
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 8, 8)
    for conv in (plain, last):
        optimizer = Muon([conv.weight], lr=0.1)
        for _ in range(3):
            conv.zero_grad()
            conv(x).pow(2).sum().backward()
            optimizer.step()
    assert last.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(plain.weight, last.weight, atol=2e-3)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_state_is_restored_bit_for_bit(layout):
    def begin():
        torch.manual_seed(0)
        conv = nn.Conv2d(3, 8, 3).to(memory_format=layout)
        return conv, Muon(conv.parameters(), lr=0.1)

    def step(conv, optimizer, seed):
        conv.zero_grad()
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        conv(x).pow(2).sum().backward()
        optimizer.step()

    whole, optimizer = begin()
    whole.bias.requires_grad_(False)
    for seed in range(6):
        step(whole, optimizer, seed)
        if seed == 2:
            file = io.BytesIO()
            torch.save({"model": whole.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed, optimizer = begin()
    resumed.bias.requires_grad_(False)
    resumed.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    for seed in range(3, 6):
        step(resumed, optimizer, seed)
    assert torch.equal(whole.weight, resumed.weight)


def test_each_weight_that_is_trained_has_one_optimizer():
    model = nn.ModuleDict(
        {
            "conv_in": nn.Conv2d(3, 4, 3),
            "hidden": nn.Linear(4, 4),
            "norm": nn.LayerNorm(4),
            "embedding": nn.Embedding(5, 4),
            "frozen": nn.Linear(2, 2).requires_grad_(False),
        }
    )
    muon, adamw = optimizers(model, 1e-3, 0.01, (0.9, 0.99))
    assert muon.param_groups[0]["params"] == [model["hidden"].weight]
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in adamw.param_groups[0]["params"]} == {
        "conv_in.weight", "conv_in.bias", "hidden.bias", "norm.weight", "norm.bias", "embedding.weight"
    }  # fmt: skip


def test_an_optimizer_with_nothing_to_do_is_left_out():
    both = optimizers(nn.Linear(3, 3, bias=False), 1e-3, 0.0, (0.9, 0.99))
    assert [type(optimizer) for optimizer in both] == [Muon]
    both = optimizers(nn.LayerNorm(3), 1e-3, 0.0, (0.9, 0.99))
    assert [type(optimizer) for optimizer in both] == [torch.optim.AdamW]


def test_matrices_of_one_shape_move_as_each_would_alone():
    torch.manual_seed(0)
    shapes = [(6, 4), (6, 4), (4, 6), (6, 2, 2, 1), (6, 4)]
    together = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    alone = copy.deepcopy(together)
    for one, other in zip(together, alone, strict=True):
        one.grad = torch.randn(one.shape)
        other.grad = one.grad.clone()
    optimizers_alone = [Muon([weight], lr=0.1) for weight in alone]
    both = Muon(together, lr=0.1)
    for _ in range(3):
        both.step()
        for optimizer in optimizers_alone:
            optimizer.step()
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-2 * 0.1)
