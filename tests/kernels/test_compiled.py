"""Compiled blocks compute what they are, and step aside for whoever watches or derives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from reifusion import kernels
from reifusion.kernels import compiled
from reifusion.model.decoder import Decoder
from reifusion.model.diffusion import UNet
from reifusion.settings import Settings
from tests.model.test_fast import UNET, VAE, error, normal, randomized
from tests.tiny import TINY, networks


@pytest.fixture(autouse=True)
def eager_backend(monkeypatch):
    """Traces as ever, and has PyTorch run what was traced: a compiler takes half a minute."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    torch._dynamo.reset()


def models() -> dict[str, nn.Module]:
    return {"diffusion": randomized(UNet(UNET)), "decoder": randomized(Decoder(VAE))}


def given() -> tuple[torch.Tensor, ...]:
    return normal(2, 4, 8, 8), normal(2, 7, 24), torch.tensor([5.0])


def traced() -> int:
    """How many functions were traced since the last reset."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.slow
def test_compiled_networks_are_the_networks_and_are_put_back_to_the_bit():
    its = models()
    kinds = [type(module) for network in its.values() for module in network.modules()]
    z = normal(1, 4, 6, 5)
    with torch.inference_mode():
        before = its["diffusion"](*given()), its["decoder"](z)
        kernels.install(its, compile=True)
        torch._dynamo.utils.counters.clear()
        after = its["diffusion"](*given()), its["decoder"](z)
        assert traced() > 5
        assert all(error(one, other) < 1e-5 for one, other in zip(after, before))
        seen = traced()
        its["diffusion"](*given())
        assert traced() == seen  # once is enough
        with kernels.plain(its):
            assert all(map(torch.equal, (its["diffusion"](*given()), its["decoder"](z)), before))
        assert {type(module) for module in its["diffusion"].modules()} & set(compiled.FORMS.values())
    kernels.uninstall(its)
    assert [type(module) for network in its.values() for module in network.modules()] == kinds


@pytest.mark.slow
def test_every_block_of_a_u_net_is_compiled_though_their_shapes_are_many():
    levels = 10
    config = replace(UNET, channels=tuple(8 * i for i in range(1, levels + 1)))
    unet = randomized(UNet(replace(config, attention=(0,) * levels, heads=(1,) * levels)))
    kernels.install({"diffusion": unet}, compile=True)
    torch._dynamo.utils.counters.clear()
    x = normal(1, 4, 512, 1)
    with torch.inference_mode():
        unet(x, normal(1, 7, 24), torch.tensor([5.0]))
    assert traced() > 16  # PyTorch's own limit is 8


def test_hooks_and_derivatives_are_served_by_the_plain_form():
    its, calls = models(), []
    x, context, t = given()
    with torch.inference_mode():
        want = its["diffusion"](x, context, t)
    kernels.install(its, compile=True)
    torch._dynamo.utils.counters.clear()
    unet = its["diffusion"]
    handles = [
        unet.get_submodule(name).register_forward_hook(lambda *_: calls.append(1))
        for name in ("down.1.0.conv_1", "down.1.1")
    ]
    layer: Any = unet.get_submodule("down.1.1.layers.0.cross_attention")
    layer.hook = lambda weights: calls.append(1)
    with torch.inference_mode():
        assert error(unet(x, context, t), want) < 1e-5
    assert len(calls) == 3
    for handle in handles:
        handle.remove()
    torch._dynamo.utils.counters.clear()
    x.requires_grad_()
    unet(x, context, t).sum().backward()
    assert x.grad is not None and traced() == 0


def test_weights_that_change_are_used():
    unet = models()["diffusion"]
    kernels.install({"diffusion": unet}, compile=True)
    with torch.inference_mode():
        for _ in range(2):
            unet.get_parameter("down.1.0.conv_1.weight").mul_(1.5)
            after = unet(*given())
            with kernels.plain({"diffusion": unet}):
                assert error(after, unet(*given())) < 1e-5


def test_the_switch_reaches_the_networks(monkeypatch):
    its = networks()
    monkeypatch.setattr("reifusion.weights.load", lambda *_, **__: (TINY, its, None))
    Settings(prompt="a").pipe("cpu")
    assert not {type(part) for part in its["diffusion"].modules()} & set(compiled.FORMS.values())
    kernels.uninstall(its)
    Settings(prompt="a").pipe("cpu", compile=True)
    for name, network in its.items():
        there = bool({type(part) for part in network.modules()} & set(compiled.FORMS.values()))
        assert there == (name in ("diffusion", "decoder"))
