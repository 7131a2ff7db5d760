"""A Stable Diffusion 3 at the size of the mini: one text encoder, the mini's VAE, and an MMDiT.

It is trained like the mini, by rectified flow, with `reifusion train text2image --config mini-mm`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

from torch import Tensor, nn

from ..model import family, model_converter
from ..model.clip import CLIP
from ..model.config import MINI, CLIPConfig, ModelConfig, ScheduleConfig, VAEConfig
from ..model.decoder import Decoder
from ..model.encoder import Encoder
from ..model.family import Family
from ..model.model_converter import Block, Layout
from ..model.tensors import ModelError
from .mmdit import MMDiT, MMDiTConfig
from .sd3_names import TABLE, mmdit_blocks

SMALL = MMDiTConfig(
    in_channels=4,
    out_channels=4,
    layers=8,
    heads=4,
    width=256,
    context_width=192,
    pooled_width=192,
    positions=32,
    qk_norm=True,
)


@dataclass(frozen=True)
class MiniMMConfig(ModelConfig):
    """22 million parameters, for pictures of 256×256."""

    name: str = "mini-mm"
    size: int = 256
    clip: CLIPConfig = MINI.clip
    vae: VAEConfig = MINI.vae
    unet: MMDiTConfig = SMALL  # type: ignore[assignment]  # in its place
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(prediction_type="flow"))
    sampler: str = "flow"
    steps: int = 25
    cfg: float = 4.0


MINI_MM = MiniMMConfig()


class MiniMMDiT(MMDiT):
    """The transformer, called like a U-Net. The last token has seen the whole text, and stands for it."""

    def __init__(self, config: MMDiTConfig):
        super().__init__(config)
        self.initialize()

    def forward(self, latents: Tensor, context: Tensor, t: Tensor) -> Tensor:  # type: ignore[override]
        """latents (B, 4, h, w), words (B, S, width), t (B,) or (1,) in 0 … 1000 -> like latents"""
        return super().forward(latents, context, t, context[:, -1])


def build(config: MiniMMConfig) -> dict[str, nn.Module]:
    """The networks of a config on PyTorch's "meta" device: shapes without memory."""
    return family.without_memory(
        lambda: {
            "clip": CLIP(config.clip),
            "encoder": Encoder(config.vae),
            "decoder": Decoder(config.vae),
            "diffusion": MiniMMDiT(config.unet),
        }
    )


def blocks(config: MiniMMConfig, open_clip: bool) -> Iterator[Block]:
    """Yields every block of a model."""
    names = "cond_stage_model.transformer.text_model", "text_encoder.text_model"
    yield from model_converter.clip_blocks(config.clip, False, "clip", *names)
    yield from model_converter.vae_blocks(config.vae)
    yield from mmdit_blocks(config.unet)


def _needs_its_header(*_: Any) -> NoReturn:
    raise ModelError("a model of the kind of mini-mm is known by its file's header, and has no other format")


MINI_MM_FAMILY = Family(
    name="mini-mm",
    layout=Layout(blocks, _needs_its_header, TABLE),
    folders=(),
    config=MiniMMConfig,
    recognises=lambda names: False,
    from_shapes=_needs_its_header,
    from_diffusers=_needs_its_header,
    to_diffusers=_needs_its_header,
    index=_needs_its_header,
    build=build,
    read_tokenizer=family.tokenizer_of,
    write_tokenizer=_needs_its_header,
    suited=lambda config: config,
    pipeline=lambda config: family.STABLE_DIFFUSION.pipeline(config),
)
