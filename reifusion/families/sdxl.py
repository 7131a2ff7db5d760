"""Stable Diffusion XL: two text encoders, a larger U-Net that is told sizes, and a refiner that goes on.

Podell et al. 2023, "SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis",
arXiv:2307.01952. Base and refiner are one family: the refiner has the second text encoder alone. The encoders
are in `pooled_text.py`, the U-Net in `sdxl_unet.py`, and what the files are like in `sdxl_files.py`.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..model import family
from ..model.ask import ask
from ..model.asked import Prompt
from ..model.config import CLIPConfig, ModelConfig, VAEConfig
from ..model.decoder import Decoder
from ..model.encoder import Encoder
from ..model.guidance import Denoiser
from ..model.modes import dtype_of
from ..model.pipeline import StableDiffusion
from ..model.request import Request
from ..model.step import Step
from ..model.tokenizer import Tokenizer
from .pooled_text import BIG_G, TextEncoder, padding_with, read_prompts
from .sdxl_unet import SDXLUNet, SDXLUNetConfig, tell


@dataclass(frozen=True)
class SDXLConfig(ModelConfig):
    """A model of this family. Defaults are the base's."""

    name: str = "sdxl"
    size: int = 1024
    vae: VAEConfig = field(default_factory=lambda: VAEConfig(scale_factor=0.13025))
    unet: SDXLUNetConfig = field(default_factory=SDXLUNetConfig)
    sampler: str = "euler"
    steps: int = 30
    cfg: float = 5.0
    clip_2: CLIPConfig | None = BIG_G  # None: the refiner, whose `clip` is this one
    pooled: int = 1280  # the width of the vector for the whole text, which the last text encoder gives
    numbers: int = 6  # that the U-Net is told: three sizes; the refiner's are two sizes and a score
    waves: int = 256  # the width of each of these numbers as waves
    pad_2: str = "!"  # the token that fills up the second encoder's texts
    zeros: bool = True  # no negative prompt is zeros, and not the vectors of an empty text
    upcast: bool = True  # the VAE overflows in float16, so that it works in float32 there

    @property
    def rows(self) -> int:
        """How many rows behind the words hold what the U-Net is told beside them."""
        return 1 if self.numbers == len(SIZES) else 2


SIZES = ("original height", "original width", "crop top", "crop left", "target height", "target width")

BASE = SDXLConfig()
REFINER = SDXLConfig(
    name="sdxl-refiner",
    clip=BIG_G,
    unet=SDXLUNetConfig(
        channels=(384, 768, 1536, 1536),
        attention=(0, 4, 4, 0),
        middle_attention=4,
        heads=(6, 12, 24, 24),
        context_width=1280,
    ),
    clip_2=None,
    numbers=5,
    zeros=False,
)
# Two that were made smaller; their authors draw with more guidance.
SSD_1B = SDXLConfig(
    name="ssd-1b",
    unet=SDXLUNetConfig(attention=(0, 2, 4), middle_attention=0, up=(4, 4, 10, 2, 1, 1, 0, 0, 0)),
    cfg=9.0,
)
VEGA = replace(SSD_1B, name="segmind-vega", unet=SDXLUNetConfig(attention=(0, 1, 2), middle_attention=0))
PRESETS = (BASE, REFINER, SSD_1B, VEGA)


def build(config: SDXLConfig) -> dict[str, nn.Module]:
    """The networks of a config on PyTorch's "meta" device: shapes without memory."""

    if config.unet.guidance_width is not None:
        raise ValueError("an SDXL that is told its guidance scale, as LCMs are, is not built in")

    def make() -> dict[str, nn.Module]:
        networks: dict[str, nn.Module] = {"clip": TextEncoder(config.clip)}
        if config.clip_2 is None:
            networks["clip"] = TextEncoder(config.clip, config.pooled)
        else:
            networks["clip_2"] = TextEncoder(config.clip_2, config.pooled)
        vae = {"encoder": Encoder(config.vae), "decoder": Decoder(config.vae)}
        told = config.pooled + config.numbers * config.waves
        return {**networks, **vae, "diffusion": SDXLUNet(config.unet, told)}

    return family.without_memory(make)


@dataclass(repr=False)
class StableDiffusionXL(StableDiffusion):
    """Draws with the base or the refiner.

    What the U-Net is told rides behind the 77 words, as one more row of the context: the whole text's vector,
    filled up with zeros. The refiner has one row more, with its score.
    """

    refiner: StableDiffusion | None = None  # takes over the noisy latents, and draws the last steps
    share: float = 0.8  # the part of the way that is gone before, in (0, 1)
    original: tuple[int, int] | None = None  # width and height that the picture is to look as if it had had
    corner: tuple[int, int] = (0, 0)  # left and top: where in it the picture is to look as if cut from
    # The refiner is told how beautiful the picture is, with the prompt and with the negative one.
    scores: tuple[float, float] = (6.0, 2.5)

    def denoise(
        self,
        prompt: Prompt | Request,
        negative: Prompt | None = None,
        *,
        grad: bool = False,
        **settings: Any,
    ) -> Generator[Step, Tensor | None, None]:
        """The loop of `generate`, as `StableDiffusion.denoise` says; its last steps are the refiner's.

        Raises ValueError for a share that leaves the base or the refiner no step.
        """
        request = ask(prompt, negative, **settings).for_model(self.config)
        if self.refiner is None:
            yield from super().denoise(request, grad=grad)
            return
        begun = request.generators()
        # Both models draw from one generator, so that no noise comes twice.
        drawn = dict(zip(request.seeds, request.generators()))
        request = replace(request, source=cast(Any, drawn.__getitem__))
        steps = super().denoise(request, grad=grad)
        sampler = self.sampler(request)
        timesteps = sampler.timesteps
        if len(timesteps) != sampler.num_inference_steps - sampler.skipped:
            raise ValueError(
                f"base and refiner need a sampler that calls the network once in a step, like euler, and not"
                f" {request.sampler}"
            )
        # §2.5, Podell et al. 2023: the refiner learned the least noisy fifth of the timesteps alone
        least = round((1 - self.share) * self.config.schedule.num_training_steps)
        first = int((timesteps >= least).sum())
        if not 0 < first < len(timesteps):
            left = f"of {len(timesteps)} steps, a share of {self.share} leaves one of them none"
            raise ValueError(f"base and refiner: {left}")
        latents = None
        with closing(steps):
            for _ in range(first):
                step = steps.send(latents)
                latents = yield step
        latents = step.latents if latents is None else latents
        noise = self._noise(request, begun)  # what a mask's surroundings are known under
        rest = replace(request, latents=latents, start=sampler.skipped + first, noise=noise)
        with closing(self.refiner.denoise(rest, grad=grad)) as steps:
            latents = None
            for index in range(first, len(timesteps)):
                step = replace(steps.send(latents), index=index, total=len(timesteps))
                latents = yield step
            with suppress(StopIteration):
                steps.send(latents)  # to its end, where the last steps are judged

    @property
    def _config(self) -> SDXLConfig:
        return cast(SDXLConfig, self.config)

    @property
    def encoders(self) -> list[tuple[str, Tokenizer]]:
        """The text encoders' names, each with its tokenizer."""
        first = ("clip", self.tokenizer)
        if self._config.clip_2 is None:
            return [first]
        return [first, ("clip_2", padding_with(self.tokenizer, self._config.pad_2))]

    def vectors(self, prompts: Sequence[str], clip_skip: int) -> Tensor:
        """B prompts -> (B, 78, 2048), in the dtype of the text encoders"""
        heard = [read_prompts(self, name, prompts, tokenizer, clip_skip) for name, tokenizer in self.encoders]
        return self.joined([words for words, _ in heard], [whole for _, whole in heard])

    def joined(self, words: Sequence[Tensor], wholes: Sequence[Tensor | None]) -> Tensor:
        """What each encoder makes of words (B, S, width) and of whole texts (B, 1280) -> (B, S+1, 2048)"""
        # §2.1, Podell et al. 2023: both encoders' words side by side, 768 + 1280 channels
        side_by_side = torch.cat([*words], dim=-1)  # (B, 77, 2048)
        whole = wholes[-1]
        assert whole is not None  # the last encoder has a projection
        rows = torch.stack([whole, torch.full_like(whole, self.scores[0])][: self._config.rows], dim=1)
        rows = F.pad(rows, (0, side_by_side.shape[-1] - whole.shape[-1]))  # (B, 1, 1280) -> (B, 1, 2048)
        return torch.cat([side_by_side, rows], dim=1)

    def encode_words(self, request: Request) -> tuple[Tensor, Tensor | None]:
        """Encodes the prompts and, for guidance, the negative prompts: each (B, 78, 2048)."""
        config = self._config
        length = config.clip.context_length
        for given in (request.prompt, request.negative):
            if isinstance(given, Tensor) and given.shape[-2] <= length:
                need = f"{length + config.rows} rows, those for the whole text included"
                raise ValueError(f"a prompt of vectors for {config.name} has {need}, not {given.shape[-2]}")
        positive, negative = super().encode_words(request)
        if negative is not None and request.negative is None and config.zeros:
            return positive, torch.zeros_like(negative)
        if negative is not None and config.rows == 2:
            negative[..., -1, :] = self.scores[1]
        return positive, negative

    def denoiser(self, unet: nn.Module, request: Request) -> Denoiser:
        """The U-Net, as the loop calls it: with the words, and with what it is told of text and sizes."""
        config, dtype = self._config, self.dtype
        size = cast("tuple[int, int]", request.size)
        sizes = [side for pair in (self.original or size, self.corner, size) for side in reversed(pair)]
        known = torch.tensor(sizes, device=self.device)  # once: each copy to a GPU is a wait

        def denoise(x: Tensor, context: Tensor, t: Tensor) -> Tensor:
            words, more = context[:, : -config.rows], context[:, -config.rows :]
            numbers = known.to(x.device, t.dtype).expand(len(x), -1)
            if config.rows == 2:  # a score in place of the target's size
                numbers = torch.cat([numbers[:, :4], more[:, 1, :1].to(t.dtype)], dim=1)
            told = tell(more[:, 0, : config.pooled], numbers, config.waves)
            return unet(x.to(dtype), words, t, told=told)

        return denoise

    @contextmanager
    def borrow(self, name: str) -> Generator[nn.Module, None, None]:
        """A network, as `StableDiffusion.borrow` says; the VAE in float32 if float16 is too small for it."""
        with super().borrow(name) as network:
            if self._config.upcast and name in ("encoder", "decoder") and dtype_of(network) == torch.float16:
                network.float()
            yield network


def with_refiner(base: StableDiffusion, refiner: StableDiffusion, share: float = 0.8) -> StableDiffusion:
    """The base, whose last steps the refiner draws: after that share of the way, in (0, 1).

    Raises ValueError for models that are no base and refiner of SDXL.
    """
    for pipe, is_refiner in (base, False), (refiner, True):
        config = pipe.config
        if not isinstance(config, SDXLConfig) or (config.clip_2 is None) != is_refiner:
            raise ValueError(f"{config.name} is no {'refiner' if is_refiner else 'base model'} of SDXL")
    return replace(cast(StableDiffusionXL, base), refiner=refiner, share=share)
