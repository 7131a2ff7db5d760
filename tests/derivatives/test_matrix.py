"""Derivatives are right in every mode, or refused: each way to ask for one, of each network in each form.

The reference is the textbook's network in float64. Its own gradients are held against central differences
along a direction of each input and each weight, so that one that is lost for a single matrix is seen.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from reifusion import kernels
from reifusion.model.clip import CLIP
from reifusion.model.config import CLIPConfig, UNetConfig, VAEConfig
from reifusion.model.decoder import Decoder
from reifusion.model.diffusion import UNet
from reifusion.model.encoder import Encoder
from tests.model.test_fast import error, normal, randomized

Named = dict[str, Tensor]

UNET = UNetConfig(channels=(8, 16), attention=(1, 0), layers=1, heads=(2, 2), context_width=6, groups=2)
VAE = VAEConfig(channels=(8, 16), layers=1, groups=2)
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "unet": lambda: UNet(UNET),
    "decoder": lambda: Decoder(VAE),
    "encoder": lambda: Encoder(VAE),
    "clip": lambda: CLIP(CLIPConfig(vocab_size=20, context_length=5, width=8, layers=2, heads=2)),
}
INPUTS: dict[str, Named] = {
    "unet": {"latents": normal(2, 4, 6, 8), "words": normal(2, 5, 6), "t": torch.tensor([300.0, 7.0])},
    "decoder": {"latents": normal(2, 4, 3, 4)},
    "encoder": {"image": normal(2, 3, 6, 8), "noise": normal(2, 4, 3, 4)},
    "clip": {"tokens": torch.tensor([[1, 5, 7, 2, 0], [1, 9, 2, 0, 0]])},
}
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
WITHIN = {"fp64": 1e-9, "fp32": 1e-4, "bf16": 0.3}  # of a gradient's norm


class Case:
    """A network in one form, and a number that it makes of its inputs and its weights."""

    def __init__(self, name: str, dtype: str, installed: bool):
        self.name, self.within = name, WITHIN[dtype]
        self.network = randomized(NETWORKS[name]()).to(DTYPES[dtype])
        if installed:  # as `load` makes it ready
            self.network.to(memory_format=torch.channels_last)
            kernels.install({name: self.network})
        # What derivatives are taken towards: the inputs, and the weights, whose names begin with a point.
        self.values = {k: x.to(DTYPES[dtype]) for k, x in INPUTS[name].items() if x.is_floating_point()}
        self.values |= {f".{key}": x.detach() for key, x in self.network.named_parameters()}
        self.directions = {
            k: normal(*x.shape, seed=i).to(x.dtype) for i, (k, x) in enumerate(self.values.items())
        }
        with torch.no_grad():
            given = (x.to(DTYPES[dtype]) if x.is_floating_point() else x for x in INPUTS[name].values())
            self.parts = normal(*self.network(*given).shape, seed=99)

    def __call__(self, some: Named) -> Tensor:
        """The number, as a function of some of the values."""
        values = self.values | some
        weights = {key[1:]: x for key, x in values.items() if key.startswith(".")}
        output = torch.func.functional_call(
            self.network, weights, tuple(values.get(key, x) for key, x in INPUTS[self.name].items())
        )
        exact = output.to(torch.promote_types(output.dtype, torch.float32))
        return (exact * self.parts.to(exact.dtype)).sum()


@functools.cache
def made(name: str, dtype: str = "fp64", installed: bool = False) -> Case:
    return Case(name, dtype, installed)


# The ways to ask for gradients, by name


def backward(case: Case, values: Named) -> Named:
    """As a training does: what a gradient is wanted of requires it, and nothing else."""
    leaves = {key: x.clone().requires_grad_() for key, x in values.items()}
    case(leaves).backward()
    assert all(x.grad is not None for x in leaves.values())
    return {key: x.grad for key, x in leaves.items() if x.grad is not None}


def grad(case: Case, values: Named) -> Named:
    return torch.func.grad(case)(values)


def vjp(case: Case, values: Named) -> Named:
    number, pull = torch.func.vjp(case, values)[:2]
    return pull(torch.ones_like(number))[0]


def checkpointed(case: Case, values: Named) -> Named:
    leaves = {key: x.clone().requires_grad_() for key, x in values.items()}
    torch.utils.checkpoint.checkpoint(case, leaves, use_reentrant=False).backward()
    return {key: x.grad for key, x in leaves.items() if x.grad is not None}


# … and for the slope along the directions


def jvp(case: Case, values: Named) -> Tensor:
    return torch.func.jvp(case, (values,), ({key: case.directions[key] for key in values},))[1]


def dual(case: Case, values: Named) -> Tensor | None:
    with forward_ad.dual_level():
        some = {key: forward_ad.make_dual(x, case.directions[key]) for key, x in values.items()}
        return forward_ad.unpack_dual(case(some)).tangent


MODES: dict[str, Any] = {
    "by default": contextlib.nullcontext,
    "enable_grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}
REFUSED = {  # by PyTorch, in a sentence or by None where the tangent would be
    (backward, "no_grad"), (backward, "inference_mode"), (dual, "inference_mode"),
    (checkpointed, "no_grad"), (checkpointed, "inference_mode"),
}  # fmt: skip


@functools.cache
def exact(name: str) -> Named:
    """The gradients of the textbook's network in float64."""
    return backward(made(name), made(name).values)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_textbooks_gradients_are_the_slopes_that_central_differences_find(name):
    case = made(name)
    for key, gradient in exact(name).items():
        h = 1e-3 if key == "t" else 1e-5
        ahead, behind = (case({key: case.values[key] + d * case.directions[key]}) for d in (h, -h))
        away = (gradient * case.directions[key]).sum() - (ahead - behind) / (2 * h)
        assert away.abs() <= 1e-5 * gradient.norm(), key
        assert gradient.norm() > 0 or key.endswith("kv.bias"), key


def agree(case: Case, found: Named | Tensor) -> None:
    """Holds gradients, or the slope along all directions, against the exact ones."""
    expected = exact(case.name)
    if isinstance(found, Tensor):
        slope = sum((expected[key] * x.double()).sum() for key, x in case.directions.items())
        length = sum(x.pow(2).sum() for x in expected.values()) ** 0.5
        assert abs(found.double() - slope) <= case.within * length
        return
    for key, gradient in found.items():
        assert error(gradient, expected[key]) <= case.within, key


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", [backward, checkpointed, grad, vjp, jvp, dual])
@pytest.mark.parametrize("installed", [False, True], ids=["plain", "installed"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_way_is_right_in_every_mode_or_refused(name, dtype, installed, way, mode):
    case = made(name, dtype, installed)
    if (way, mode) in REFUSED:
        with MODES[mode]():
            if way is dual:
                assert way(case, case.values) is None
            else:
                with pytest.raises(RuntimeError, match="does not require grad"):
                    way(case, case.values)
        return
    with MODES[mode]():
        found = way(case, case.values)
    agree(case, found)
