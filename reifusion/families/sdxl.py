"""Stable Diffusion XL: two text encoders, a larger U-Net that is told sizes, and a refiner that goes on.

Podell et al. 2023, "SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis",
arXiv:2307.01952. Base and refiner are one family: the refiner has the second text encoder alone.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..model import diffusers_folder, family, model_converter
from ..model.asked import Prompt
from ..model.clip import CLIP
from ..model.config import CLIPConfig, ModelConfig, UNetConfig, VAEConfig
from ..model.decoder import Decoder
from ..model.diffusion import Given, TimeEmbedding, UNet, sinusoids
from ..model.encoder import Encoder
from ..model.family import Family, FromShapes, Shapes
from ..model.finite import finite
from ..model.guidance import Denoiser
from ..model.model_converter import Block, Layout
from ..model.pipeline import StableDiffusion, as_gradients_are
from ..model.prediction import Prediction
from ..model.request import Request, ask
from ..model.step import Step
from ..model.tensors import ModelError, short
from ..model.tokenizer import END, Tokenizer
from ..model.tokenizer_folder import read_tokenizer, write_tokenizer

BIG_G = CLIPConfig(width=1280, layers=32, heads=20, activation="gelu")  # OpenCLIP's ViT-bigG/14


@dataclass(frozen=True)
class SDXLConfig(ModelConfig):
    """A model of this family. Defaults are the base's."""

    name: str = "sdxl"
    size: int = 1024
    vae: VAEConfig = field(default_factory=lambda: VAEConfig(scale_factor=0.13025))
    unet: UNetConfig = field(
        default_factory=lambda: UNetConfig(
            channels=(320, 640, 1280),
            attention=(0, 2, 10),
            middle_attention=10,
            heads=(5, 10, 20),
            context_width=2048,
            linear_projection=True,
        )
    )
    sampler: str = "euler"
    steps: int = 30
    cfg: float = 5.0
    clip_2: CLIPConfig | None = BIG_G  # None: the refiner, whose `clip` is this one
    pooled: int = 1280  # the width of the vector for the whole text, which the last text encoder gives
    numbers: int = 6  # that the U-Net is told: three sizes; the refiner's are two sizes and a score
    waves: int = 256  # the width of each of these numbers as waves
    pad_2: str = "!"  # the token that fills up the second encoder's texts
    zeros: bool = True  # no negative prompt is zeros, and not the vectors of an empty text

    @property
    def rows(self) -> int:
        """How many rows behind the words hold what the U-Net is told beside them."""
        return 1 if self.numbers == len(SIZES) else 2


SIZES = ("original height", "original width", "crop top", "crop left", "target height", "target width")

BASE = SDXLConfig()
REFINER = SDXLConfig(
    name="sdxl-refiner",
    clip=BIG_G,
    unet=UNetConfig(
        channels=(384, 768, 1536, 1536),
        attention=(0, 4, 4, 0),
        middle_attention=4,
        heads=(6, 12, 24, 24),
        context_width=1280,
        linear_projection=True,
    ),
    clip_2=None,
    numbers=5,
    zeros=False,
)
PRESETS = (BASE, REFINER)


# The networks


class TextEncoder(CLIP):
    """CLIP without its last layer, and a vector for the whole text from all of it."""

    def __init__(self, config: CLIPConfig, pooled: int | None = None):
        super().__init__(config)
        self.projection = None if pooled is None else nn.Linear(config.width, pooled, bias=False)

    def both(self, tokens: Tensor, ends: Tensor, skip: int = 0) -> tuple[Tensor, Tensor | None]:
        """tokens (B, L), ends (B,): where each text ends -> words (B, L, width), whole text (B, pooled).

        skip: how many more of the last layers to leave out. The second is None without a projection. Raises
        ValueError for a `skip` out of range.
        """
        last = len(self.layers) - 1 - skip
        if not 0 <= skip < len(self.layers):
            raise ValueError(f"skip must be from 0 to {len(self.layers) - 1}, not {skip}")
        words = x = self.embedding(tokens)  # (B, L) -> (B, L, width)
        for i, layer in enumerate(self.layers if self.projection else self.layers[:last]):
            x = layer(x)
            words = x if i < last else words  # the last layer learned to compare with pictures; and no norm
        if self.projection is None:
            return words, None
        # [pooled-text] §2.4, Radford et al. 2021: of the text's end, which has seen all of it: W LN(h)
        end = self.norm(x)[torch.arange(len(x), device=x.device), ends]  # (B, L, width) -> (B, width)
        return words, self.projection(end)

    def forward(self, tokens: Tensor, skip: int = 0) -> Tensor:
        """tokens (B, L) -> (B, L, width), as `both` says."""
        return self.both(tokens, torch.zeros_like(tokens[:, 0]), skip)[0]


class ToldTimeEmbedding(TimeEmbedding):
    """Timestep, whole text and sizes -> the vector that every residual block adds."""

    def __init__(self, width: int, told: int):
        super().__init__(width)
        self.label_1 = nn.Linear(told, 4 * width)
        self.label_2 = nn.Linear(4 * width, 4 * width)

    def forward(self, t: Tensor, told: Tensor) -> Tensor:  # type: ignore[override]
        """t (B,) or (1,), told (B, 2816) -> (B, 4·width)"""
        # [told] §2.2, Podell et al. 2023: what is told is added to the time: MLP(time) + MLP(text and sizes)
        return super().forward(t) + self.label_2(F.silu(self.label_1(told.to(self.label_1.weight.dtype))))


class SDXLUNet(UNet):
    """A U-Net that is told the whole text in one vector, and sizes."""

    def __init__(self, config: SDXLConfig):
        super().__init__(config.unet)
        told = config.pooled + config.numbers * config.waves
        self.time_embedding = ToldTimeEmbedding(config.unet.channels[0], told)

    def forward(self, latents: Tensor, context: Tensor, t: Tensor, told: Tensor) -> Tensor:  # type: ignore[override]
        """latents (B, 4, h, w), context (B, 77, 2048), t (B,) or (1,), told (B, 2816) -> (B, 4, h, w)"""
        return self.walk(latents, Given(self.time_embedding(t, told), context))


def tell(pooled: Tensor, numbers: Tensor, waves: int) -> Tensor:
    """The vector that the U-Net is told: pooled (B, 1280), numbers (B, n) -> (B, 1280 + n·waves)"""
    # [size-waves] §2.2, Podell et al. 2023: each number as waves, like the time, and all of them end to end
    told = (
        sinusoids(numbers.flatten(), waves).unflatten(0, numbers.shape).flatten(1)
    )  # (B, n) -> (B, n·waves)
    return torch.cat([pooled.to(told.dtype), told], dim=-1)


def build(config: SDXLConfig) -> dict[str, nn.Module]:
    """The networks of a config on PyTorch's "meta" device: shapes without memory."""

    def make() -> dict[str, nn.Module]:
        networks: dict[str, nn.Module] = {"clip": TextEncoder(config.clip)}
        if config.clip_2 is None:
            networks["clip"] = TextEncoder(config.clip, config.pooled)
        else:
            networks["clip_2"] = TextEncoder(config.clip_2, config.pooled)
        vae = {"encoder": Encoder(config.vae), "decoder": Decoder(config.vae)}
        return {**networks, **vae, "diffusion": SDXLUNet(config)}

    return family.without_memory(make)


# Drawing


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
    scores: tuple[float, float] = (
        6.0,
        2.5,
    )  # the refiner: how beautiful, with the prompt and the negative one

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
        steps = super().denoise(request, grad=grad)
        if self.refiner is None:
            yield from steps
            return
        timesteps = self.sampler(request).timesteps
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
        start = cast(int, request.steps) - len(timesteps) + first
        yield from self.refiner.denoise(replace(request, latents=latents, start=start), grad=grad)

    def vectors(self, prompts: Sequence[str], clip_skip: int) -> Tensor:
        """B prompts -> (B, 78, 2048), in the dtype of the text encoders"""
        config, tokenizer = cast(SDXLConfig, self.config), self.tokenizer
        words, whole = self._read("clip", prompts, tokenizer, clip_skip)
        if config.clip_2 is not None:
            more, whole = self._read("clip_2", prompts, padding_with(tokenizer, config.pad_2), clip_skip)
            # §2.1, Podell et al. 2023: both encoders' words side by side, 768 + 1280 channels
            words = torch.cat([words, more], dim=-1)  # (B, 77, 2048)
        rows = [whole] if config.rows == 1 else [whole, torch.full_like(whole, self.scores[0])]
        width = words.shape[-1]
        return torch.cat([words, *(F.pad(row, (0, width - row.shape[-1])) for row in rows)], dim=1)

    def _read(
        self, name: str, prompts: Sequence[str], tokenizer: Tokenizer, clip_skip: int
    ) -> tuple[Tensor, Tensor]:
        """B prompts -> an encoder's words (B, 77, width), and the whole texts (B, 1, pooled), or (B, 0, …)"""
        texts = [tokenizer.encode(prompt) for prompt in prompts]
        tokens, ends = torch.tensor(texts), torch.tensor([text.index(tokenizer.end) for text in texts])
        with self.borrow(name) as clip:
            width = cast(TextEncoder, clip).config.width

            def one(tokens: Tensor, ends: Tensor) -> Tensor:
                """-> (B, 78, the larger width)"""
                words, whole = cast(TextEncoder, clip).both(tokens, ends, clip_skip)
                if whole is None:
                    return words
                most = max(width, whole.shape[-1])
                parts = words, whole[:, None]
                return torch.cat([F.pad(x, (0, most - x.shape[-1])) for x in parts], dim=1)

            made = as_gradients_are(one)(tokens.to(self.device), ends.to(self.device))
            finite(made, "the text encoder", clip)
        length = tokens.shape[1]
        return made[:, :length, :width], made[:, length:, : cast(SDXLConfig, self.config).pooled]

    def encode_words(self, request: Request) -> tuple[Tensor, Tensor | None]:
        """Encodes the prompts and, for guidance, the negative prompts: each (B, 78, 2048)."""
        config = cast(SDXLConfig, self.config)
        length = config.clip.context_length
        for given in (request.prompt, request.negative):
            if isinstance(given, Tensor) and given.shape[-2] <= length:
                need = f"{length + config.rows} rows, those for the whole text included"
                raise ValueError(f"a prompt of vectors for {config.name} has {need}, not {given.shape[-2]}")
        positive, negative = super().encode_words(request)
        if negative is not None and request.negative is None and config.zeros:
            return positive, torch.zeros_like(negative)
        if negative is not None and config.rows == 2:
            negative[:, -1] = self.scores[1]
        return positive, negative

    def denoiser(self, unet: nn.Module, request: Request) -> Denoiser:
        """The U-Net, as the loop calls it: with the words, and with what it is told of text and sizes."""
        config, dtype = cast(SDXLConfig, self.config), self.dtype
        size = cast("tuple[int, int]", request.size)
        sizes = [side for pair in (self.original or size, self.corner, size) for side in reversed(pair)]

        def denoise(x: Tensor, context: Tensor, t: Tensor) -> Tensor:
            words, more = context[:, : -config.rows], context[:, -config.rows :]
            numbers = torch.tensor(sizes, dtype=t.dtype, device=x.device).expand(len(x), -1)
            if config.rows == 2:  # a score in place of the target's size
                numbers = torch.cat([numbers[:, :4], more[:, 1, :1].to(t.dtype)], dim=1)
            told = tell(more[:, 0, : config.pooled], numbers, config.waves)
            return unet(x.to(dtype), words, t, told=told)

        return denoise


def with_refiner(base: StableDiffusion, refiner: StableDiffusion, share: float = 0.8) -> StableDiffusion:
    """The base, whose last steps the refiner draws: after that share of the way, in (0, 1).

    Raises ValueError for models that are no base and refiner of SDXL.
    """
    for pipe, is_refiner in (base, False), (refiner, True):
        config = pipe.config
        if not isinstance(config, SDXLConfig) or (config.clip_2 is None) != is_refiner:
            raise ValueError(f"{config.name} is no {'refiner' if is_refiner else 'base model'} of SDXL")
    return replace(cast(StableDiffusionXL, base), refiner=refiner, share=share)


@lru_cache(maxsize=4)
def padding_with(tokenizer: Tokenizer, pad: str) -> Tokenizer:
    """Returns a tokenizer that fills up with another token."""
    merges, length = tokenizer.merges_text, tokenizer.context_length
    return Tokenizer(merges, length, vocabulary=tokenizer._ids, pad=pad, exact=tokenizer.exact)


# The names in files


TABLE = (
    model_converter.TABLE
    + """
[told]
label_1                 0.0                                 linear_1
label_2                 0.2                                 linear_2

[projection]
projection.weight       text_projectionᵀ                    text_projection.weight
"""
)


def blocks(config: SDXLConfig, open_clip: bool) -> Iterator[Block]:
    """Yields every block of a model. open_clip is of no importance: CompVis's names are always the same."""
    cv = "conditioner.embedders"
    if config.clip_2 is None:
        last, place, df = "clip", f"{cv}.0.model", "text_encoder_2"
        yield from model_converter.clip_blocks(config.clip, True, last, place, f"{df}.text_model")
    else:
        last, place, df = "clip_2", f"{cv}.1.model", "text_encoder_2"
        first = f"{cv}.0.transformer.text_model", "text_encoder.text_model"
        yield from model_converter.clip_blocks(config.clip, False, "clip", *first)
        yield from model_converter.clip_blocks(config.clip_2, True, last, place, f"{df}.text_model")
    yield "projection", last, place, df
    yield from model_converter.vae_blocks(config.vae)
    yield from model_converter.unet_blocks(config.unet)
    yield "told", "diffusion.time_embedding", "model.diffusion_model.label_emb", "unet.add_embedding"


# Of these, only a folder tells how deep each block is, in words that are not read here.
DISTILLED = "SSD-1B or Segmind Vega, an SDXL with blocks of uneven depth, which is not built in"

# The layers of CLIP-L, of bigG beside it, and of bigG alone, in each format.
LAYERS = {
    "native": (r"clip\.layers\.(\d+)", r"clip_2\.layers\.(\d+)", r"clip\.layers\.(\d+)"),
    "compvis": (
        r"conditioner\.embedders\.0\.transformer\.text_model\.encoder\.layers\.(\d+)",
        r"conditioner\.embedders\.1\.model\.transformer\.resblocks\.(\d+)",
        r"conditioner\.embedders\.0\.model\.transformer\.resblocks\.(\d+)",
    ),
    "diffusers": (
        r"text_encoder\.text_model\.encoder\.layers\.(\d+)",
        r"text_encoder_2\.text_model\.encoder\.layers\.(\d+)",
        r"text_encoder_2\.text_model\.encoder\.layers\.(\d+)",
    ),
}


def structure(names: Collection[str], format: str) -> SDXLConfig:
    """Counts a model's blocks by its names. Returns a config with these counts, whose sizes mean nothing."""
    first, second, alone = (
        len({found[1] for name in names if (found := re.match(pattern, name))}) for pattern in LAYERS[format]
    )
    known = model_converter.structure(names, format)
    if not known.unet.middle_attention:
        raise ModelError(f"it is {DISTILLED}")
    both = first > 0 and second > 0
    return SDXLConfig(
        clip=replace(known.clip, layers=first if both else alone),
        clip_2=replace(BIG_G, layers=second) if both else None,
        vae=known.vae,
        unet=replace(known.unet, linear_projection=True),
    )


def recognises(names: Collection[str]) -> bool:
    """True for the names of tensors, or of files in a folder of diffusers, of base or refiner."""
    marks = r"clip_2\.|diffusion\.time_embedding\.label_|conditioner\.embedders\.|text_encoder_2[./]"
    return any(re.match(marks, name) for name in names)


def from_shapes(shapes: Shapes, told: Prediction | None = None) -> FromShapes:
    """Finds the config of a file by its shapes. The preset with the same shapes supplies the rest."""
    kind = structure(shapes, "native")
    for preset in PRESETS:
        config = family.like(preset, shapes, kind)
        assert isinstance(config, SDXLConfig)
        if (kind.clip_2 is None) != (preset.clip_2 is None):
            continue
        if preset.clip_2 and kind.clip_2:
            config = replace(
                config, clip_2=family.clip_like(preset.clip_2, shapes, "clip_2", kind.clip_2.layers)
            )
        # A vocabulary may have grown, and a U-Net may be given more than latents.
        same = [replace(config.clip, vocab_size=preset.clip.vocab_size) == preset.clip]
        same += [replace(config.unet, in_channels=4) == preset.unet, config.unet.in_channels in (4, 8, 9)]
        if all(same) and config.vae == preset.vae:
            return FromShapes(config)
    raise ModelError("it has the shapes of no known SDXL, and shapes alone are not enough: it needs a config")


# Folders of diffusers


TOLD = "projection_class_embeddings_input"


def from_diffusers(jsons: Mapping[str, Mapping[str, Any]], name: str) -> SDXLConfig:
    """Translates the contents of the `config.json`s, by folder, into our config."""
    last = jsons.get("text_encoder_2", {})
    unet = dict(jsons["unet"])
    if (kind := unet.pop("addition_embed_type", None)) != "text_time":
        raise ModelError(f"its unet has addition_embed_type = {short(kind)}, which is not built in")
    if unet.get("reverse_transformer_layers_per_block") or unet.get("mid_block_type") == "UNetMidBlock2D":
        raise ModelError(f"it is {DISTILLED}")
    fields = diffusers_folder.fields_from_diffusers(
        {**jsons, "unet": unet, "text_encoder": jsons.get("text_encoder", last)}
    )
    second = diffusers_folder.translated(last, "text_encoder", "text_encoder_2")
    pooled: Any = last.get("projection_dim", 512)
    waves, told = (unet.get(f"{key}_dim", 0) for key in ("addition_time_embed", TOLD))
    whole = all(isinstance(number, int) for number in (pooled, waves, told))
    if not whole or waves < 1 or told not in (pooled + 5 * waves, pooled + 6 * waves):
        raise ModelError(f"its unet has {TOLD}_dim = {short(told)}, which does not fit its text encoder")
    index, pad = jsons.get("model_index", {}), jsons.get("tokenizer_config", {}).get("pad_token", END)
    return SDXLConfig(
        name=name,
        **fields,
        clip_2=CLIPConfig(**second) if "text_encoder" in jsons else None,
        pooled=pooled,
        numbers=(told - pooled) // waves,
        waves=waves,
        pad_2=(pad["content"] if isinstance(pad, Mapping) else pad) if "text_encoder" in jsons else "!",
        zeros=bool(index.get("force_zeros_for_empty_prompt", True)),
    )


def to_diffusers(config: SDXLConfig) -> dict[str, dict[str, Any]]:
    """Translates our config into the contents of the `config.json`s, by folder."""
    jsons = diffusers_folder.config_to_diffusers(config)
    if config.clip_2 is None:
        del jsons["text_encoder"]
    jsons["text_encoder_2"] = diffusers_folder.clip_to_diffusers(config.clip_2 or config.clip) | {
        "architectures": ["CLIPTextModelWithProjection"],
        "projection_dim": config.pooled,
    }
    jsons["unet"] |= {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": config.waves,
        f"{TOLD}_dim": config.pooled + config.numbers * config.waves,
    }
    jsons["vae"]["force_upcast"] = True
    if jsons["scheduler"]["_class_name"] == "PNDMScheduler":
        trailing = config.schedule.timestep_spacing
        jsons["scheduler"] |= {
            "_class_name": f"Euler{'Ancestral' if trailing else ''}DiscreteScheduler",
            "timestep_spacing": trailing or "leading",
        }
        for key in ("set_alpha_to_one", "skip_prk_steps", "clip_sample"):
            del jsons["scheduler"][key]
    return jsons


def index(config: SDXLConfig) -> dict[str, Any]:
    """Returns what model_index.json says beside the parts of the model."""
    kind = "Inpaint" if config.inpaints else "Img2Img" if config.clip_2 is None else ""
    said: dict[str, Any] = {
        "_class_name": f"StableDiffusionXL{kind}Pipeline",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "force_zeros_for_empty_prompt": config.zeros,
    }
    if config.clip_2 is None:
        said |= {"text_encoder": [None, None], "tokenizer": [None, None], "requires_aesthetics_score": True}
    if kind == "Inpaint":
        said["requires_aesthetics_score"] = config.rows == 2
    return said


def tokenizer_of(path: Path, header: Mapping[str, str], config: SDXLConfig) -> Tokenizer:
    """Reads the tokenizer of a file, by its header, or of a folder of diffusers: the first of two."""
    if path.is_dir() and config.clip_2 is None:
        return read_tokenizer(path / "tokenizer_2", config.clip.context_length)
    return family.tokenizer_of(path, header, config)


def write_tokenizers(tokenizer: Tokenizer, folder: Path, config: SDXLConfig) -> None:
    """Writes the tokenizers into a folder of diffusers."""
    if config.clip_2 is None:
        write_tokenizer(tokenizer, folder / "tokenizer_2")
    else:
        write_tokenizer(tokenizer, folder / "tokenizer")
        write_tokenizer(padding_with(tokenizer, config.pad_2), folder / "tokenizer_2")


def suited(config: SDXLConfig) -> SDXLConfig:
    """Returns a config with the settings that its pictures need."""
    if config.schedule.timestep_spacing == "trailing" and config.schedule.prediction_type == "epsilon":
        return replace(config, sampler="euler_a", steps=4, cfg=1.0)  # SDXL-Turbo, and others distilled
    return config


SDXL = Family(
    name="sdxl",
    layout=Layout(blocks, structure, TABLE),
    folders=("text_encoder", "text_encoder_2", "vae", "unet"),
    config=SDXLConfig,
    recognises=recognises,
    from_shapes=from_shapes,
    from_diffusers=from_diffusers,
    to_diffusers=to_diffusers,
    index=index,
    build=build,
    read_tokenizer=tokenizer_of,
    write_tokenizer=write_tokenizers,
    suited=suited,
    pipeline=lambda config: StableDiffusionXL,
)
