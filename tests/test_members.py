"""Every member of the family goes the same way: told by info, drawn with, converted, changed by a LoRA.

The files have the real layout and random weights of a toy size, so they hold their config in the header; that
real ones are known by their shapes alone is tested beside each member, in `tests/parity`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import reifusion
from reifusion import cli
from reifusion.families import family_of
from reifusion.families.sd3 import Tokenizers
from reifusion.families.sdxl import SDXLConfig
from reifusion.families.sdxl_unet import SDXLUNetConfig
from reifusion.model.config import CLIPConfig, ModelConfig, UNetConfig, VAEConfig
from reifusion.weights import save
from reifusion.weights.lora import apply, load_lora
from tests.tiny import WORDS, random_networks
from tests.tiny_sd3 import TINY as SD3
from tests.tiny_sd3 import tokenizers

CLIP = CLIPConfig(vocab_size=WORDS.vocab_size, context_length=16, width=16, layers=2, heads=2)
GELU = replace(CLIP, activation="gelu")
UNET = UNetConfig(channels=(16, 32), attention=(1, 0), layers=1, heads=(2, 2), context_width=16, groups=8)
SD1 = ModelConfig(
    name="sd1", size=64, clip=CLIP, vae=VAEConfig(channels=(8, 8, 8, 8), layers=1, groups=4), unet=UNET
)
SD2 = replace(SD1, name="sd2", clip=GELU, unet=replace(UNET, linear_projection=True))
XL_UNET = SDXLUNetConfig(
    channels=(16, 32),
    attention=(0, 2),
    middle_attention=2,
    layers=1,
    heads=(2, 2),
    context_width=32,
    groups=8,
)
XL = SDXLConfig(
    name="xl", size=64, clip=CLIP, clip_2=GELU, vae=SD1.vae, unet=XL_UNET, pooled=8, waves=4
)  # fmt: skip
SMALL_3 = replace(
    SD3,
    clip=replace(SD3.clip, vocab_size=WORDS.vocab_size),
    clip_2=replace(SD3.clip_2, vocab_size=WORDS.vocab_size),
)
WORDS_3 = Tokenizers(WORDS.merges_text, WORDS.context_length)
WORDS_3.t5 = tokenizers().t5
MEMBERS: dict[str, ModelConfig] = {
    "sd1": SD1,
    "sd1 inpainting": replace(SD1, unet=replace(UNET, in_channels=9)),
    "sd1 edits": replace(SD1, unet=replace(UNET, in_channels=8)),
    "sd2": replace(SD2, schedule=replace(SD2.schedule, prediction_type="v_prediction")),
    "turbo": replace(SD2, schedule=replace(SD2.schedule, timestep_spacing="trailing")),
    "bk-sdm tiny": replace(SD1, unet=replace(UNET, attention=(1, 1), middle=False, middle_attention=0)),
    "lcm": replace(SD1, unet=replace(UNET, guidance_width=8)),
    "sdxl": XL,
    "sdxl refiner": replace(XL, clip=GELU, clip_2=None, numbers=5, unet=replace(XL_UNET, context_width=16)),
    "ssd-1b": replace(XL, unet=replace(XL_UNET, middle_attention=0, up=(1, 3, 0, 0))),
    "vega": replace(XL, unet=replace(XL_UNET, middle_attention=0)),
    "sd3": replace(SMALL_3, unet=replace(SD3.unet, qk_norm=False, dual_attention=())),
    "sd3.5 large": replace(SMALL_3, unet=replace(SD3.unet, dual_attention=())),
    "sd3.5 medium": SMALL_3,
}
MODELS = {  # of the way up that a U-Net has; of a transformer
    "unet": "lora_unet_up_blocks_{}_attentions_0_transformer_blocks_0_attn1_to_v",
    "transformer": "lora_unet_joint_blocks_0_x_block_attn_proj",
}


@pytest.fixture
def run(capsys: Any) -> Callable[..., str]:
    """Runs a command; returns what it prints."""

    def command(*args: Any) -> str:
        assert cli.main([str(arg) for arg in args]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return command


OFTEN = {"sd1", "sdxl", "sd3.5 medium"}  # one of each family; the rest belong to `make slow`


@pytest.mark.parametrize(
    "member", [pytest.param(name, marks=[] if name in OFTEN else pytest.mark.slow) for name in MEMBERS]
)
def test_a_member_is_told_drawn_with_converted_and_changed(member, run, tmp_path):
    config, one = family_of(MEMBERS[member]).suited(MEMBERS[member]), tmp_path / "one.safetensors"
    is_3 = member.startswith("sd3")
    save(config, random_networks(config), one, "compvis", WORDS_3 if is_3 else WORDS)
    assert f"{config.size}x{config.size}" in run("info", one) and "memory" in run("info", one)

    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), "uint8")).save(tmp_path / "in.png")
    flags = ["--seed", 3, "--steps", 2, "--size", "64x64", "--device", "cpu", "--dtype", "fp32", "--quiet"]
    if member == "sd1 edits":
        flags += ["--init-image", tmp_path / "in.png"]

    def drawn(model: Path, name: str, *more: Any) -> np.ndarray:
        run("generate", "a cat", "--model", model, "--out", tmp_path / f"{name}.png", *flags, *more)
        return np.array(Image.open(tmp_path / f"{name}.png")).astype(int)

    picture = drawn(one, "one")
    assert picture.std() > 5
    run("convert", one, tmp_path / "folder", "--to", "diffusers")
    run("convert", tmp_path / "folder", tmp_path / "two.safetensors", "--to", "native")
    for again in tmp_path / "folder", tmp_path / "two.safetensors":
        assert np.array_equal(drawn(again, again.name), picture)

    pipe = reifusion.load(one, "cpu", "fp32")
    if member != "sd1 edits":
        told: Any = {"seed": 3, "steps": 2, "size": (64, 64), "progress": False}
        assert np.array_equal(np.array(pipe.generate("a cat", **told)), picture)
    width = SD3.unet.width if is_3 else 32 if config.unet.attention[-1] else 16
    layer = MODELS["transformer" if is_3 else "unet"].format(0 if width == 32 else 1)
    down, up = torch.ones(1, width), torch.linspace(-1, 1, width)[:, None]
    lora = tmp_path / "lora.safetensors"
    save_file({f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}, lora)
    changed = drawn(one, "changed", "--lora", f"{lora}:0.5")
    assert np.abs(changed - picture).max() > 2
    apply(pipe, load_lora(lora), 0.5)
    if member != "sd1 edits":
        assert np.array_equal(np.array(pipe.generate("a cat", **told)), changed)
