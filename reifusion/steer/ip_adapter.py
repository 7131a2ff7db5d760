"""IP-Adapter: a picture as a prompt, beside the words.

What CLIP sees in the picture becomes a few tokens more. The words' cross-attention stays as it is, and beside
it stands a second one, which looks at these tokens; what the two say is added.
Ye et al. 2023, "IP-Adapter: Text Compatible Image Prompt Adapter", arXiv:2308.06721.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..model.attention import CrossAttention, attention, merge_heads, softmax_attention, split_heads
from ..model.diffusion import UNet
from ..model.pictures import Picture, open_picture
from ..model.pipeline import StableDiffusion
from ..model.request import Request
from ..swap import swap
from .clip_vision import CLIPVision, Seen, prepared

# ---- from what CLIP saw to tokens. The layers are called as in the files. ----------------------------------


class Plain(nn.Module):
    """One vector for the picture -> a few tokens."""

    def __init__(self, features: int, tokens: int, width: int):
        super().__init__()
        self.proj = nn.Linear(features, tokens * width)
        self.norm = nn.LayerNorm(width)

    def forward(self, seen: Seen) -> Tensor:
        """picture (B, features) -> (B, tokens, width)"""
        return self.norm(self.proj(seen.picture).unflatten(1, (-1, self.norm.normalized_shape[0])))

    def without(self, encoder: CLIPVision, pixels: Tensor) -> Seen:
        """What stands for no picture: a vector of zeros."""
        seen = encoder(pixels)
        return Seen(seen.patches, torch.zeros_like(seen.picture))


class Full(nn.Module):
    """Every patch -> a token, as for whole faces."""

    def __init__(self, features: int, width: int):
        super().__init__()
        self.proj = nn.Sequential(
            nn.Linear(features, features), nn.GELU(), nn.Linear(features, width), nn.LayerNorm(width)
        )

    def forward(self, seen: Seen) -> Tensor:
        """patches (B, P, features) -> (B, P, width)"""
        return self.proj(seen.patches)

    def without(self, encoder: CLIPVision, pixels: Tensor) -> Seen:
        """What stands for no picture: pixels of zero, which are CLIP's mean grey."""
        return encoder(torch.zeros_like(pixels))


class Plus(nn.Module):
    """All patches -> a few tokens, which ask the patches in turn: a resampler.

    Alayrac et al. 2022, "Flamingo", Fig. 5, arXiv:2204.14198.
    """

    def __init__(self, features: int, tokens: int, inner: int, heads: int, layers: int, width: int):
        super().__init__()
        self.latents = nn.Parameter(torch.zeros(1, tokens, inner))
        self.proj_in = nn.Linear(features, inner)
        self.layers = nn.ModuleList(
            nn.ModuleList([Asking(inner, heads), _feed_forward(inner)]) for _ in range(layers)
        )
        self.proj_out = nn.Linear(inner, width)
        self.norm_out = nn.LayerNorm(width)

    def forward(self, seen: Seen) -> Tensor:
        """patches (B, P, features) -> (B, tokens, width)"""
        x = self.proj_in(seen.patches)
        tokens = self.latents.expand(len(x), -1, -1)
        for layer in self.layers:
            ask, think = cast(nn.ModuleList, layer)
            tokens = tokens + ask(tokens, x)
            tokens = tokens + think(tokens)
        return self.norm_out(self.proj_out(tokens))

    def without(self, encoder: CLIPVision, pixels: Tensor) -> Seen:
        """What stands for no picture: pixels of zero, which are CLIP's mean grey."""
        return encoder(torch.zeros_like(pixels))


class Asking(nn.Module):
    """Tokens attend to the patches and to themselves, with heads of 64 numbers."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, inner = heads, 64 * heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, tokens: Tensor, x: Tensor) -> Tensor:
        """tokens (B, T, width), x (B, P, width) -> (B, T, width)"""
        tokens = self.norm2(tokens)
        both = torch.cat([self.norm1(x), tokens], dim=1)  # (B, P + T, width)
        k, v = (split_heads(part, self.heads) for part in self.to_kv(both).chunk(2, dim=-1))
        return self.to_out(merge_heads(attention(split_heads(self.to_q(tokens), self.heads), k, v, False)))


def _feed_forward(width: int) -> nn.Module:
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, 4 * width, bias=False),
        nn.GELU(),
        nn.Linear(4 * width, width, bias=False),
    )


# ---- in the U-Net -----------------------------------------------------------------------------------------


class PictureKV(nn.Module):
    """Keys and values of a picture's tokens for one cross-attention."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.to_k_ip = nn.Linear(width, out, bias=False)
        self.to_v_ip = nn.Linear(width, out, bias=False)


class IPAdapter(nn.Module):
    """A projection of what CLIP saw, and keys and values for each cross-attention of a U-Net.

    The parameters are called as in the files: "image_proj.…" and "ip_adapter.1.to_k_ip.weight".
    """

    def __init__(self, projection: Plain | Plus | Full, width: int, outs: Sequence[int]):
        """outs: the widths of the cross-attentions, in the order of `cross_attentions`."""
        super().__init__()
        self.image_proj = projection
        layers = {str(2 * i + 1): PictureKV(width, out) for i, out in enumerate(outs)}
        self.ip_adapter = nn.ModuleDict(layers)


def cross_attentions(unet: UNet) -> list[CrossAttention]:
    """Returns a U-Net's cross-attentions in the order of IP-Adapters: on the way down, up, in the middle."""
    return [
        module
        for part in (unet.down, unet.up, unet.middle)
        for module in part.modules()
        if isinstance(module, CrossAttention)
    ]


class LookingToo(CrossAttention):
    """A cross-attention that looks at pictures beside the words."""

    pictures: Sequence[tuple[Tensor, Tensor, float]]  # keys and values (B, heads, tokens, d), and a weight

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x (B, L, width), y (B, S, context_width) -> (B, L, width)."""
        q = split_heads(self.q(x), self.heads)
        k, v = (split_heads(part, self.heads) for part in self.kv(y).chunk(2, dim=-1))
        if self.hook is not None:  # which watches the words
            self.hook(softmax_attention(q, k, v)[1])
        # Eq. 5, Ye et al. 2023: Z = Softmax(Q Kᵀ/√d) V + λ Softmax(Q K'ᵀ/√d) V'
        z = self.kernel(q, k, v, False)
        for keys, values, weight in self.pictures:
            z = z + weight * self.kernel(q, keys, values, False)
        return self.out(merge_heads(z))


@dataclass
class ImagePrompt:
    """A picture, how much it counts beside the words, and the networks that read it."""

    adapter: IPAdapter
    encoder: CLIPVision
    picture: Picture
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise ValueError(f"the weight of an IP-Adapter must be a finite number, not {self.weight}")
        self.picture = open_picture(self.picture)

    @torch.no_grad()
    def tokens(self) -> Tensor:
        """Returns the tokens of the picture, and those that stand for no picture: (2, tokens, width)."""
        like, projection = next(self.encoder.parameters()), self.adapter.image_proj
        pixels = prepared(self.picture, self.encoder.config.size).to(like)  # type: ignore[arg-type]
        both = self.encoder(pixels), projection.without(self.encoder, pixels)
        return torch.cat([projection(seen) for seen in both])


class Looking(nn.Module):
    """Stands in for a U-Net while a request is drawn: its cross-attentions look at pictures too.

    inner: what is called, the U-Net or what stands in for it already. unet: is as it was between two calls.
    looked: of each image prompt the keys and values, the tokens, and the weight. count: of pictures that are
    drawn; in a batch with both halves of guidance, the first so many see the pictures.
    """

    def __init__(
        self,
        inner: nn.Module,
        unet: UNet,
        looked: Sequence[tuple[nn.ModuleDict, Tensor, float]],
        count: int,
    ):
        super().__init__()
        self.inner = inner
        self.attentions, self.looked, self.count = cross_attentions(unet), looked, count
        self._known: tuple[Any, list[Any]] = (None, [])

    def forward(self, latents: Tensor, context: Tensor, t: Tensor, **more: Any) -> Tensor:
        """Takes the arguments of the U-Net, and returns its output."""
        with ExitStack() as stack:
            for layer, pictures in zip(self.attentions, self._pictures(latents), strict=True):
                stack.callback(swap(layer, LookingToo, pictures=pictures))
            return self.inner(latents, context, t, **more)

    def _pictures(self, latents: Tensor) -> list[Any]:
        """What each cross-attention looks at. It is the same in all steps, so that it is made once."""
        kind = len(latents), latents.dtype, latents.device, torch.is_inference_mode_enabled()
        if torch.is_grad_enabled() or self._known[0] != kind:
            made = [self._of(i, latents) for i in range(len(self.attentions))]
            if torch.is_grad_enabled():
                return made
            self._known = kind, made
        return self._known[1]

    def _of(self, i: int, latents: Tensor) -> tuple[tuple[Tensor, Tensor, float], ...]:
        layer, found, rows = self.attentions[i], [], len(latents)
        seeing = min(self.count, rows)
        for maker, tokens, weight in self.looked:
            own: Any = maker[str(2 * i + 1)]
            kv = []
            for project in (own.to_k_ip, own.to_v_ip):
                # (2, tokens, width) -> (2, heads, tokens, d)
                picture, nothing = split_heads(project(tokens), layer.heads).to(latents).split(1)
                shape = picture.shape[1:]
                kv.append(torch.cat([picture.expand(seeing, *shape), nothing.expand(rows - seeing, *shape)]))
            found.append((kv[0], kv[1], weight))
        return tuple(found)


def with_image_prompts(pipe: StableDiffusion, *prompts: ImagePrompt) -> StableDiffusion:
    """The same model, prompted with pictures beside the words. Several add up, each with its own weight.

    With ControlNets, those come first: `with_image_prompts(controlled(pipe, …), …)`. Raises ValueError for a
    model that is not the one for which the adapters were loaded, and for one that has image prompts already.
    """
    if isinstance(pipe.around, _Around):
        raise ValueError("image prompts are given all together")
    unet = pipe.models["diffusion"]
    outs = [layer.q.out_features for layer in cross_attentions(unet)] if isinstance(unet, UNet) else []
    for prompt in prompts:
        layers: Any = prompt.adapter.ip_adapter.values()
        if outs != [layer.to_k_ip.out_features for layer in layers]:
            raise ValueError(f"the IP-Adapter was not loaded for {pipe.config.name}")
    looked = [(prompt.adapter.ip_adapter, prompt.tokens(), prompt.weight) for prompt in prompts]
    return replace(pipe, around=_Around(pipe.around, looked))


@dataclass(frozen=True)
class _Around:
    """What stands in for a U-Net, anew in each loop: what stood in for it before, and sees pictures too."""

    before: Callable[[nn.Module, Request], nn.Module]
    looked: Sequence[tuple[nn.ModuleDict, Tensor, float]]

    def __call__(self, unet: nn.Module, request: Request) -> nn.Module:
        return Looking(self.before(unet, request), cast(UNet, unet), self.looked, len(request.prompts))
