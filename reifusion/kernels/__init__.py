"""Speed, installed into networks that were loaded, and taken out again. `model/` never hears of it.

`install` gives modules of the textbook's kinds a class with the same parameters and a faster `forward`, and
sets the slot that attention offers. Outside of inference mode, and under autocast or a compiler, the fast
forms step aside by themselves, so that every derivative of an installed network is right; and so they do on
the device for which they are not made. The tests hold both forms equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from ..families import lcm, mmdit
from ..model import attention, decoder, diffusion
from ..swap import swap
from . import bands, compiled, fast, graphs, halves, native

FAST: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: fast.Linear,
    nn.Conv2d: fast.Conv2d,
    nn.GroupNorm: fast.GroupNorm,
    diffusion.GEGLU: fast.GEGLU,
    diffusion.Upsample: fast.UNetUpsample,
    decoder.Upsample: fast.VAEUpsample,
    diffusion.SwitchSequential: halves.Row,
    diffusion.UNet: graphs.UNet,
    lcm.LCMUNet: graphs.LCMUNet,
    decoder.Decoder: bands.Decoder,
}
# What has a slot for a kernel
ATTENTION = (attention.SelfAttention, attention.CrossAttention, mmdit.JointAttention)
PLAIN = {kernel: plain for plain, kernel in FAST.items()}


def install(models: Mapping[str, nn.Module], compile: bool = False) -> None:
    """Gives networks, by name, their fast forms, in place; those in Triton if they are on a GPU that has it.

    compile: compiles the blocks of the U-Net and of the decoder, when they are first called.
    """
    for name, network in models.items():
        forms = _forms(network, compile and name in compiled.NETWORKS)
        for module in network.modules():
            if type(module) in forms:
                swap(module, forms[type(module)])
            elif isinstance(module, ATTENTION):
                module.kernel = native.attention


def _forms(network: nn.Module, compile: bool) -> dict[type[nn.Module], type[nn.Module]]:
    """The fast forms for a network, where it is."""
    forms = dict(FAST)
    if any(x.is_cuda for x in network.parameters()):
        from . import fused  # which imports Triton

        if fused.available():
            forms |= fused.FORMS
    if compile:
        forms |= compiled.FORMS
    PLAIN.update({kernel: plain for plain, kernel in forms.items()})
    return forms


def uninstall(models: Mapping[str, nn.Module]) -> None:
    """Gives networks their plain forms back, in place: bit for bit the textbook's."""
    for module in _modules(models):
        if type(module) in PLAIN:
            swap(module, PLAIN[type(module)])
        elif isinstance(module, ATTENTION):
            module.kernel = attention.attention


@contextmanager
def plain(models: Mapping[str, nn.Module]) -> Iterator[None]:
    """Takes the fast forms out while the `with` lasts, if they are in."""
    kinds = {type(module) for module in _modules(models)}
    if kinds.isdisjoint(PLAIN):
        yield
        return
    uninstall(models)
    try:
        yield
    finally:
        install(models, compile=not kinds.isdisjoint(compiled.FORMS.values()))


def _modules(models: Mapping[str, nn.Module]) -> Iterator[nn.Module]:
    return (module for network in models.values() for module in network.modules())
