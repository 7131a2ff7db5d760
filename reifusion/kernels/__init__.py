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

from ..families import lcm
from ..model import attention, decoder, diffusion
from ..swap import swap
from . import bands, fast, graphs, halves, native

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
PLAIN = {kernel: plain for plain, kernel in FAST.items()}


def install(models: Mapping[str, nn.Module]) -> None:
    """Gives networks, by name, their fast forms, in place."""
    for module in (module for network in models.values() for module in network.modules()):
        if type(module) in FAST:
            swap(module, FAST[type(module)])
        elif isinstance(module, attention.SelfAttention | attention.CrossAttention):
            module.kernel = native.attention


def uninstall(models: Mapping[str, nn.Module]) -> None:
    """Gives networks their plain forms back, in place: bit for bit the textbook's."""
    for module in (module for network in models.values() for module in network.modules()):
        if type(module) in PLAIN:
            swap(module, PLAIN[type(module)])
        elif isinstance(module, attention.SelfAttention | attention.CrossAttention):
            module.kernel = attention.attention


@contextmanager
def plain(models: Mapping[str, nn.Module]) -> Iterator[None]:
    """Takes the fast forms out while the `with` lasts, if they are in."""
    installed = any(type(module) in PLAIN for network in models.values() for module in network.modules())
    if not installed:
        yield
        return
    uninstall(models)
    try:
        yield
    finally:
        install(models)
