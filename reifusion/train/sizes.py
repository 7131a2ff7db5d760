"""The sizes of a model that is trained from nothing: a name for all of them, or some by themselves."""

from __future__ import annotations

from dataclasses import replace

from ..families.mini_mm import MINI_MM, MiniMMConfig
from ..model.config import (
    MINI,
    SD15,
    CLIPConfig,
    ModelConfig,
    ScheduleConfig,
    UNetConfig,
    VAEConfig,
)
from ..weights import find_config
from .keys import RecipeError
from .recipe import Recipe
from .vae_file import is_vae

HEAD, TEXT_HEAD = 64, 32  # numbers of an attention head in the U-Net and in the text encoder, about


def with_sizes(
    base: ModelConfig,
    channels: tuple[int, ...] = (),
    vae_channels: tuple[int, ...] = (),
    text_width: int = 0,
    patch: int = 0,
) -> ModelConfig:
    """Returns a config with some sizes of its own; () and 0 leave one as it is. Raises RecipeError."""
    config, unet, vae, clip = base, base.unet, base.vae, base.clip
    if channels:
        attention = (unet.attention + unet.attention[-1:] * len(channels))[: len(channels)]
        heads = tuple(max(1, width // HEAD) for width in channels)
        unet = replace(unet, channels=channels, attention=attention, heads=heads)
    if vae_channels:
        vae = replace(vae, channels=vae_channels)
    if text_width:
        clip = replace(clip, width=text_width, heads=max(1, text_width // TEXT_HEAD))
        unet = replace(unet, context_width=text_width)
    if patch:
        unet = replace(unet, patch=patch)
    for name, widths, parts in (
        ("channels", unet.channels, unet.groups),
        ("vae_channels", vae.channels, vae.groups),
        ("text_width", (clip.width,), TEXT_HEAD),
    ):
        wrong = [width for width in widths if width % parts]
        if wrong:
            raise RecipeError(f"{name} must be multiples of {parts}, not {wrong[0]}")
    for width, heads_of in zip(unet.channels, unet.heads, strict=True):
        if width % heads_of:
            raise RecipeError(f"channels must be cut into heads of about {HEAD}, and {width} cannot be")
    return replace(config, clip=clip, vae=vae, unet=unet)


def _small(name: str, channels: tuple[int, ...], text_width: int, layers: int) -> ModelConfig:
    """The mini's kind, for pictures of 128×128."""
    config = with_sizes(MINI, channels=channels, text_width=text_width, patch=1)
    return replace(config, name=name, size=128, clip=replace(config.clip, layers=layers, vocab_size=2048))


# For pictures of 32×32: what two CPU cores train in ten minutes.
TINY = ModelConfig(
    name="tiny",
    size=32,
    clip=CLIPConfig(vocab_size=768, context_length=16, width=64, layers=2, heads=2),
    vae=VAEConfig(channels=(16, 32), layers=1, groups=8, scale_factor=1.0),
    unet=UNetConfig(
        patch=2,
        channels=(64, 128),
        attention=(1, 1),
        heads=(2, 4),
        layers=1,
        context_width=64,
        linear_projection=True,
    ),
    schedule=ScheduleConfig(prediction_type="v_prediction"),
    sampler="euler_a",
    cfg=3.0,
)

# By the number of their parameters, VAE and all; "sd15" has 1,066 million.
SIZES = {
    "7m": _small("7m", (32, 64, 96), 64, 2),
    "16m": _small("16m", (64, 128, 192), 128, 3),
    "mini": MINI,
    "mini-mm": MINI_MM,
    "75m": _small("75m", (192, 320, 448), 256, 6),
    "sd15": SD15,
    "tiny": TINY,
}


def model_config(recipe: Recipe) -> ModelConfig:
    """Returns the sizes that the recipe names, with the recipe's way of adding noise."""
    # A LoRA, a word or a ControlNet is for the mini unless told.
    start = recipe.start or ("mini" if recipe.train in ("lora", "inversion", "control") else "")
    if start and not is_vae(start):
        base = find_config(start)
    elif recipe.model in SIZES:
        base = SIZES[recipe.model]
        own = recipe.channels, recipe.vae_channels, recipe.text_width, recipe.patch
        if any(own) and isinstance(base, MiniMMConfig):
            raise RecipeError(
                "mini-mm has sizes that a recipe cannot change; leave channels and the like out"
            )
        if any(own):
            base = replace(with_sizes(base, *own), name=recipe.model + "-own")
    else:
        raise RecipeError(f"there is no model {recipe.model!r} to train; there are {', '.join(SIZES)}")
    if recipe.size and (not start or is_vae(start)):
        base = replace(base, size=recipe.size)
    schedule = base.schedule
    if recipe.prediction_type:
        schedule = replace(schedule, prediction_type=recipe.prediction_type)
    if recipe.zero_terminal_snr:
        schedule = replace(schedule, zero_terminal_snr=True)
    return replace(base, schedule=schedule)
