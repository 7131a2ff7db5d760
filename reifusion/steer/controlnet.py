"""ControlNet: a picture of edges, lines, depth or poses says where things are, and the prompt what they are.

A second network, made from the U-Net's own way down, looks at the latents and at that picture, the hint. What
it makes of them is added to the skips of the U-Net, whose weights stay as they are.
Zhang, Rao & Agrawala 2023, "Adding Conditional Control to Text-to-Image Diffusion Models", arXiv:2302.05543.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.graphs import played
from ..model.diffusion import Given, UNet
from ..model.modes import dtype_of
from ..model.pictures import Picture, fit, open_picture, to_tensor
from ..model.pipeline import StableDiffusion, as_it_is
from ..model.request import Request
from .t2i_adapter import MIDDLE, SOFT, T2IAdapter

CHANNELS = (16, 32, 96, 256)  # of the hint's encoder, one for each resolution, full size first


def zeroed(conv: nn.Conv2d) -> nn.Conv2d:
    """The convolution with zeros for weights: to begin with, nothing is added to the U-Net."""
    for parameter in conv.parameters():
        nn.init.zeros_(parameter)
    return conv


class HintEncoder(nn.Sequential):
    """Hint -> as many channels and places as the U-Net's first row has."""

    def __init__(self, channels: Sequence[int], out: int):
        convs = [nn.Conv2d(3, channels[0], 3, padding=1)]
        for now, later in pairwise(channels):
            convs += [nn.Conv2d(now, now, 3, padding=1), nn.Conv2d(now, later, 3, stride=2, padding=1)]
        super().__init__(*convs, zeroed(nn.Conv2d(channels[-1], out, 3, padding=1)))

    def forward(self, hint: Tensor) -> Tensor:
        """hint (B, 3, H, W) in [0, 1] -> (B, 320, H/8, W/8)"""
        *convs, last = self
        for conv in convs:
            hint = F.silu(conv(hint))
        return last(hint)


class ControlNet(nn.Module):
    """The way down of a U-Net, told a hint; its outputs are what is added to the U-Net's skips."""

    def __init__(self, unet: UNet, channels: Sequence[int] = CHANNELS):
        """Takes over the layers of `unet`. channels: of the hint's encoder."""
        super().__init__()
        self.config = unet.config
        self.time_embedding, self.down, self.middle = unet.time_embedding, unet.down, unet.middle
        wide, layers = self.config.channels, self.config.layers
        # Of each row: the first convolution; then each level's blocks, and where it is halved
        skips = [wide[0], *(c for c in wide for _ in range(layers + 1))][: len(unet.down)]
        self.hint = HintEncoder(channels, wide[0])
        self.outs = nn.ModuleList(zeroed(nn.Conv2d(c, c, 1)) for c in skips)
        self.middle_out = zeroed(nn.Conv2d(wide[-1], wide[-1], 1))

    def forward(
        self, latents: Tensor, context: Tensor, t: Tensor, seen: Tensor, **told: Tensor
    ) -> list[Tensor]:
        """latents (B, 4, h, w) -> what is added to each skip and to the middle, each (B, C, h, w)

        seen: the encoded hint, (1, 320, h, w). context, t, and what SDXL is told: as for the U-Net.
        """
        given = Given(self.time_embedding(t, **told), context)
        # Fig. 3, Zhang et al. 2023: the hint is added once, behind the first convolution
        x = self.down[0](latents, given) + seen
        outputs = [self.outs[0](x)]
        for row, out in zip(list(self.down)[1:], list(self.outs)[1:]):
            x = row(x, given)
            outputs.append(out(x))
        return [*outputs, self.middle_out(self.middle(x, given))]


def steered(
    unet: UNet,
    added: Sequence[Tensor],
    features: Mapping[int, Tensor],
    latents: Tensor,
    context: Tensor,
    t: Tensor,
    **more: Tensor,
) -> Tensor:
    """The U-Net's output, with something added on its way: (B, 4, h, w) -> (B, 4, h, w)

    added: to each skip and to the middle, by ControlNets; the way down reads its own outputs as they were, so
    that it is seen on the way up alone. features: to rows of the way down, by adapters; what follows sees it.
    """
    given = Given(unet.time_embedding(t, **more), context)
    pile, x = [], latents
    for i, row in enumerate(unet.down):
        x = row(x, given)
        x = x + features[i] if i in features else x
        pile.append(x)
    x = unet.middle(x, given)
    x = x + features[MIDDLE] if MIDDLE in features else x
    if added:
        *skips, middle = added
        x, pile = x + middle, [skip + one for skip, one in zip(pile, skips, strict=True)]
    return unet.ascend(x, pile, given)


# How strongly each of the n outputs counts, from the first skip to the middle, and whether the half without
# the prompt is steered too.
MODES = {
    "balanced": (lambda n: [1.0] * n, True),
    # diffusers's guess mode: 0.1 … 1, evenly on a logarithmic scale
    "guess": (lambda n: [10 ** (i / (n - 1) - 1) for i in range(n)], False),
    # AUTOMATIC1111's "My prompt is more important" and "ControlNet is more important", from the authors' code
    "prompt": (lambda n: [0.825 ** (12 - i) for i in range(n)], True),
    "control": (lambda n: [0.825 ** (12 - i) for i in range(n)], False),
}


def check(weight: float, start: float, end: float, mode: str) -> None:
    """Raises ValueError for what cannot be done."""
    if not math.isfinite(weight):
        raise ValueError(f"the weight of a ControlNet must be a finite number, not {weight}")
    if not 0 <= start < end <= 1:
        said = f"{start:g} to {end:g}"
        raise ValueError(f"a ControlNet works from one share of the steps to a later one, not {said}")
    if mode not in MODES:
        raise ValueError(f"the mode of a ControlNet is one of {', '.join(MODES)}, not {mode!r}")


@dataclass
class Control:
    """A ControlNet, or a T2I-Adapter, and the picture that it goes by."""

    net: ControlNet | T2IAdapter
    hint: Picture  # light lines on dark, for edges and scribbles; it is used as it is
    weight: float = 1.0  # how much of what the network says is added
    start: float = 0.0  # the share of the steps before it begins
    end: float = 1.0  # … and at whose end it stops
    mode: str = "balanced"  # one of MODES

    def __post_init__(self) -> None:
        check(self.weight, self.start, self.end, self.mode)
        self.hint = open_picture(self.hint)

    def works(self, step: int, steps: int) -> bool:
        """True if it steers that step, counted from 0, of so many; as diffusers counts."""
        return self.start <= step / steps and (step + 1) / steps <= self.end


class Controlled(nn.Module):
    """Stands in for a U-Net while a request is drawn, and adds what ControlNets say.

    unet: is not changed. timesteps: of all steps, to know when a ControlNet works. size: width and height of
    the pictures. count: how many they are; in a batch with both halves of guidance, the first so many have
    the prompt.
    """

    def __init__(
        self,
        unet: UNet,
        controls: Sequence[Control],
        timesteps: Sequence[float],
        size: tuple[int, int],
        count: int,
    ):
        super().__init__()
        self.unet = unet
        self.controls, self.timesteps, self.size, self.count = controls, timesteps, size, count
        self._seen: dict[int, Any] = {}

    def forward(self, latents: Tensor, context: Tensor, t: Tensor, **more: Any) -> Tensor:
        """Takes the arguments of the U-Net, and returns its output."""
        working = [control for control in self.controls if self._works(control, t)]
        if not working:
            return self.unet(latents, context, t, **more)
        told = {name: value for name, value in more.items() if name == "told"}
        nets = [control for control in working if isinstance(control.net, ControlNet)]
        said = zip(*(self._says(control, latents, context, t, **told) for control in nets))
        # Several: what they say is added up
        added = {f"added_{i}": torch.stack(ones).sum(0) for i, ones in enumerate(said)}
        for control in working:
            if isinstance(control.net, T2IAdapter):
                for row, feature in self._features(control, control.net, latents).items():
                    name = f"feature_{row}"
                    added[name] = added[name] + feature if name in added else feature
        return played(self.unet, self._steered, latents, context, t, **more, **added)

    def _steered(self, latents: Tensor, context: Tensor, t: Tensor, **more: Tensor) -> Tensor:
        added = [more.pop(name) for name in list(more) if name.startswith("added_")]
        names = [name for name in more if name.startswith("feature_")]
        features = {int(name.removeprefix("feature_")): more.pop(name) for name in names}
        return steered(self.unet, added, features, latents, context, t, **more)

    def _works(self, control: Control, t: Tensor) -> bool:
        if control.start == 0 and control.end == 1:
            return True  # without asking for t, for which a GPU would be waited for
        step = min(range(len(self.timesteps)), key=lambda i: abs(self.timesteps[i] - t[0].item()))
        return control.works(step, len(self.timesteps))

    def _says(
        self, control: Control, latents: Tensor, context: Tensor, t: Tensor, **told: Tensor
    ) -> list[Tensor]:
        """What a ControlNet adds to each skip and to the middle, each (B, C, h, w)."""
        net, (factors, both) = control.net, MODES[control.mode]
        assert isinstance(net, ControlNet)
        whole = len(latents)
        rows = whole if both else min(self.count, whole)
        x = latents[:rows, : net.config.in_channels]  # of an inpainting U-Net's nine channels, the first four
        words, time, *others = (
            one[:rows] if len(one) == whole else one for one in (context, t, *told.values())
        )
        outputs = net(x, words, time, self._encoded(control, x, net.hint), **dict(zip(told, others)))
        made = []
        for factor, output in zip(factors(len(outputs)), outputs, strict=True):
            output = control.weight * factor * output
            made.append(F.pad(output, (0, 0) * 3 + (0, whole - rows)) if rows < whole else output)
        return made

    def _features(self, control: Control, net: T2IAdapter, latents: Tensor) -> dict[int, Tensor]:
        """What an adapter adds to rows of the way down, each (1, C, h, w), or (B, C, h, w)."""
        both = MODES[control.mode][1]
        soft = SOFT if control.mode in ("prompt", "control") else (1.0,) * len(SOFT)
        made = {}
        for factor, (row, feature) in zip(soft, self._encoded(control, latents, net).items()):
            feature = control.weight * factor * feature
            if not both and len(latents) > self.count:  # the half without the prompt is not steered
                feature = feature.expand(self.count, -1, -1, -1)
                feature = F.pad(feature, (0, 0) * 3 + (0, len(latents) - self.count))
            made[row] = feature
        return made

    def _encoded(self, control: Control, x: Tensor, encode: Callable[[Tensor], Any]) -> Any:
        """What `encode` makes of the hint. It is the same in all steps, so that it is made once."""
        if torch.is_grad_enabled() or id(control) not in self._seen:
            assert isinstance(control.hint, Image.Image)
            hint = (to_tensor(fit(control.hint, *self.size)) + 1) / 2  # (1, 3, H, W) in [0, 1]
            made = encode(hint.to(x))
            if torch.is_grad_enabled():
                return made
            self._seen[id(control)] = made
        return self._seen[id(control)]


def controlled(pipe: StableDiffusion, *controls: Control) -> StableDiffusion:
    """The same model, steered by ControlNets.

    Raises ValueError for a model without a U-Net, and for one whose U-Net is stood in for already.
    """
    unet = pipe.models["diffusion"]
    if not isinstance(unet, UNet):
        raise ValueError(f"ControlNets are for models with a U-Net, which {pipe.config.name} does not have")
    if pipe.around is not as_it_is:
        raise ValueError("ControlNets are given all together, and not with deepcache")

    def around(unet: nn.Module, request: Request) -> nn.Module:
        for control in controls:
            control.net.to(pipe.device, dtype_of(unet))
        timesteps = pipe.sampler(request).timesteps.tolist()
        size = cast("tuple[int, int]", request.size)
        return Controlled(cast(UNet, unet), controls, timesteps, size, len(request.prompts))

    return replace(pipe, around=around)
