"""Stable Diffusion 3 and 3.5: three text encoders, a transformer in place of the U-Net, and rectified flow.

Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis",
arXiv:2403.03206. The transformer is in `mmdit.py`, the third encoder in `t5.py`, and what its files are like
in `sd3_files.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..model import family
from ..model.config import CLIPConfig, ModelConfig, ScheduleConfig, VAEConfig
from ..model.ddpm import exact
from ..model.decoder import Decoder
from ..model.encoder import Encoder
from ..model.finite import finite
from ..model.guidance import Denoiser, Guidance
from ..model.pipeline import StableDiffusion, as_gradients_are
from ..model.request import Request
from ..model.tokenizer import Tokenizer
from .flow_solver import FlowDPMPP2MSampler as FlowDPMPP2MSampler
from .mmdit import MMDiT, MMDiTConfig
from .pooled_text import BIG_G, TextEncoder, padding_with, read_prompts
from .t5 import T5, T5Config
from .unigram import Unigram

SD3_VAE = VAEConfig(latent_channels=16, scale_factor=1.5305, shift=0.0609, quant=False)


@dataclass(frozen=True)
class SD3Config(ModelConfig):
    """A model of this family. The defaults are the first's, of 2 billion parameters ("medium")."""

    name: str = "sd3-medium"
    size: int = 1024
    vae: VAEConfig = SD3_VAE
    unet: MMDiTConfig = field(default_factory=MMDiTConfig)  # type: ignore[assignment]  # in its place
    schedule: ScheduleConfig = field(
        default_factory=lambda: ScheduleConfig(prediction_type="flow", shift=3.0)
    )
    sampler: str = "flow"
    steps: int = 28
    cfg: float = 5.0
    clip_2: CLIPConfig = BIG_G
    pooled: tuple[int, int] = (768, 1280)  # the widths of the vectors for the whole text, one from each CLIP
    t5: T5Config | None = field(default_factory=T5Config)  # None: its vectors are zeros
    t5_length: int = 256  # tokens
    pad_2: str = "!"  # the token that fills up the second encoder's texts

    @property
    def rows(self) -> int:
        """How many rows behind the words hold the vector for the whole text."""
        return -(-sum(self.pooled) // self.unet.context_width)


MEDIUM = SD3Config()
MEDIUM_35 = SD3Config(
    name="sd3.5-medium",
    unet=MMDiTConfig(positions=384, qk_norm=True, dual_attention=tuple(range(13))),
    steps=40,
)
LARGE_35 = SD3Config(
    name="sd3.5-large", unet=MMDiTConfig(layers=38, heads=38, width=2432, qk_norm=True), steps=40, cfg=4.5
)
PRESETS = (MEDIUM, MEDIUM_35, LARGE_35)


def build(config: SD3Config) -> dict[str, nn.Module]:
    """The networks of a config on PyTorch's "meta" device: shapes without memory."""

    def make() -> dict[str, nn.Module]:
        networks: dict[str, nn.Module] = {
            "clip": TextEncoder(config.clip, config.pooled[0]),
            "clip_2": TextEncoder(config.clip_2, config.pooled[1]),
            "encoder": Encoder(config.vae),
            "decoder": Decoder(config.vae),
            "diffusion": MMDiT(config.unet),
        }
        return networks if config.t5 is None else {**networks, "t5": T5(config.t5)}

    return family.without_memory(make)


@dataclass(frozen=True)
class SkipLayers:
    """Guidance away from what the network says without some of its blocks; helps 3.5 medium with bodies."""

    blocks: tuple[int, ...] = (7, 8, 9)
    scale: float = 2.8
    start: float = 0.01  # from this share of the steps …
    stop: float = 0.2  # … to this one


@dataclass
class SkipLayerGuidance(Guidance):
    """Classifier-free guidance, and in some steps `SkipLayers` too."""

    skip: SkipLayers = field(kw_only=True)
    timesteps: Tensor = field(kw_only=True)  # of all steps

    def __call__(self, x: Tensor, t: Tensor, sigma: float) -> tuple[Tensor, Tensor, Tensor | None]:
        """x (B, 16, h, w), t (1,), σ -> the guided output, the conditional, the unconditional"""
        output, cond, uncond = super().__call__(x, t, sigma)
        step, steps = int((self.timesteps > t.item() * (1 + 1e-6)).sum()), len(self.timesteps)
        if uncond is None or not self.skip.start * steps < step < self.skip.stop * steps:
            return output, cond, uncond
        # Stability's code: v + s (v_cond - v_cond without these blocks)
        without = exact(cast(Any, self.denoiser)(x, self.positive, t, self.skip.blocks))
        return output + self.skip.scale * (cond - without), cond, uncond


class Tokenizers(Tokenizer):
    """CLIP's tokenizer, and beside it T5's."""

    t5: Unigram | None = None  # None: T5 is not used, and its vectors are zeros


def warn_of_length(prompts: Sequence[str], clip: Tokenizer, t5: Unigram) -> None:
    """Warns of what T5 does with prompts that are too long for the CLIPs, which warn for themselves."""
    room = t5.length - 1
    for prompt in prompts:
        many = len(t5.tokenize(prompt))
        if many > room:
            warnings.warn(
                f"T5 has room for {room} tokens and the prompt has {many}: it reads the first", stacklevel=2
            )
        elif len(clip.tokenize(prompt)) > clip.context_length - 2:
            warnings.warn("T5 reads the prompt to its end", stacklevel=2)


@dataclass(repr=False)
class StableDiffusion3(StableDiffusion):
    """Draws with models of this family.

    Behind the words of all three encoders, as more rows of the same tensor, rides the vector for the whole
    text, filled up with zeros.
    """

    skip: SkipLayers | None = None

    @property
    def encoders(self) -> list[tuple[str, Tokenizer]]:
        """The names of both CLIPs, each with its tokenizer."""
        return [("clip", self.tokenizer), ("clip_2", padding_with(self.tokenizer, self._config.pad_2))]

    def vectors(self, prompts: Sequence[str], clip_skip: int) -> Tensor:
        """B prompts -> (B, 77 + 256 + 1, 4096), in the dtype of the text encoders"""
        heard = [read_prompts(self, name, prompts, tokenizer, clip_skip) for name, tokenizer in self.encoders]
        t5 = getattr(self.tokenizer, "t5", None)
        if t5 is not None:
            warn_of_length(prompts, self.tokenizer, t5)
        tokens = [[] if t5 is None else t5.encode(prompt) for prompt in prompts]
        return self.joined([words for words, _ in heard], [whole for _, whole in heard], self.t5(tokens))

    def joined(self, words: Sequence[Tensor], wholes: Sequence[Tensor | None], t5: Tensor) -> Tensor:
        """What the CLIPs make of words (B, S, width) and whole texts, and T5's words -> (B, S + 257, 4096)"""
        config = self._config
        width = config.unet.context_width
        # §4, Esser et al. 2024: both CLIPs' words side by side, then zeros; and behind them T5's
        clips = torch.cat([*words], dim=-1)  # (B, 77, 768), (B, 77, 1280) -> (B, 77, 2048)
        clips = F.pad(clips, (0, width - clips.shape[-1]))  # -> (B, 77, 4096)
        assert wholes[0] is not None and wholes[1] is not None  # both encoders have a projection
        pooled = torch.cat([wholes[0], wholes[1]], dim=-1)  # (B, 768), (B, 1280) -> (B, 2048)
        pooled = F.pad(pooled, (0, config.rows * width - pooled.shape[-1])).unflatten(1, (config.rows, width))
        return torch.cat([clips, t5.to(clips), pooled], dim=1)

    @property
    def _config(self) -> SD3Config:
        return cast(SD3Config, self.config)

    def t5(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """B × 256 tokens -> T5's words, (B, 256, 4096); zeros without T5"""
        config = self._config
        if config.t5 is None or getattr(self.tokenizer, "t5", None) is None:
            return torch.zeros(len(texts), config.t5_length, config.unet.context_width, device=self.device)
        with self.borrow("t5") as t5:
            return finite(as_gradients_are(t5)(torch.tensor(texts).to(self.device)), "T5", t5)

    def denoiser(self, unet: nn.Module, request: Request) -> Denoiser:
        """The transformer, as the loop calls it: with the words, and with the vector for the whole text."""
        config, dtype = self._config, self.dtype

        def denoise(x: Tensor, context: Tensor, t: Tensor, skip: tuple[int, ...] = ()) -> Tensor:
            words, rows = context[:, : -config.rows], context[:, -config.rows :]
            pooled = rows.flatten(1)[:, : config.unet.pooled_width]
            return unet(x.to(dtype), words, t, pooled, skip) if skip else unet(x.to(dtype), words, t, pooled)

        return denoise

    def guided(
        self, denoiser: Denoiser, extra: Tensor | None, positive: Tensor, negative: Tensor | None,
        request: Request,
    ) -> Guidance:  # fmt: skip
        """The denoiser with guidance, of two kinds if `skip` is set."""
        plain = super().guided(denoiser, extra, positive, negative, request)
        if self.skip is None:
            return plain
        timesteps = self.sampler(request).timesteps
        return SkipLayerGuidance(**vars(plain), skip=self.skip, timesteps=timesteps)
