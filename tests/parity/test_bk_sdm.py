"""BK-SDM, Stable Diffusion without some of its blocks: its files are read as diffusers reads its folders."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from reifusion import families, weights
from reifusion.families.bk_sdm import PRESETS
from reifusion.model.config import ModelConfig
from reifusion.model.family import like
from reifusion.model.model_converter import convert
from reifusion.model.model_loader import state_dict
from reifusion.model.tokenizer import Tokenizer
from tests.tiny import SMALL, assert_same_networks, random_networks

os.environ.setdefault("HF_HUB_OFFLINE", "1")
diffusers = pytest.importorskip("diffusers")

TINY = replace(
    SMALL,
    name="bk-tiny",
    clip=replace(SMALL.clip, vocab_size=49408),
    unet=replace(SMALL.unet, attention=(1, 1), middle=False, middle_attention=0, heads=(4, 4)),
)
SMALL_BK = replace(TINY, name="bk-small", unet=replace(TINY.unet, attention=(1, 0)))
BASE_BK = replace(SMALL_BK, name="bk-base", unet=replace(SMALL_BK.unet, middle=True, middle_attention=1))
KINDS = [TINY, SMALL_BK, BASE_BK]


@torch.inference_mode()
@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.name)
def test_the_u_net_is_that_of_diffusers(config, tmp_path):
    weights.save(
        config, random_networks(config), tmp_path / config.name, "diffusers", Tokenizer(context_length=16)
    )
    ours = weights.load(tmp_path / config.name, dtype=torch.float64)[1]["diffusion"]
    theirs = diffusers.UNet2DConditionModel.from_pretrained(
        tmp_path / config.name / "unet", torch_dtype=torch.float64
    )
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 9, 14, generator=generator).double()
    words, t = torch.randn(2, 7, 24, generator=generator).double(), torch.tensor([7, 801])
    expected = theirs(x, t, words).sample
    torch.testing.assert_close(ours(x, words, t), expected, rtol=0, atol=1e-9 * expected.abs().max().item())


def as_the_usual_converter_numbers(folder: Path, config: ModelConfig) -> dict[str, torch.Tensor]:
    """The U-Net's tensors as `convert_diffusers_to_original_stable_diffusion.py` names them.

    It was written for four levels of two blocks: three rows a level, attention at all levels but the lowest,
    the layer that grows in the third row.
    """
    single = weights.load(folder)[1]
    names = convert(state_dict(single), "compvis", config)
    unet, found = load_file(next((folder / "unet").glob("*.safetensors"))), {}
    for name, x in names.items():
        if not name.startswith("model.diffusion_model."):
            found[name] = x
    for name, x in unet.items():
        side, number, kind, place, *_ = [*name.split("."), "", "", ""]
        rest = name.split(".", 4)[-1]
        if side == "down_blocks" and kind == "resnets":
            new = f"input_blocks.{3 * int(number) + int(place) + 1}.0.{OF_RES[rest.rsplit('.', 1)[0]]}"
        elif side == "down_blocks" and kind == "attentions":
            new = f"input_blocks.{3 * int(number) + int(place) + 1}.1.{rest.rsplit('.', 1)[0]}"
        elif side == "down_blocks":
            new = f"input_blocks.{3 * (int(number) + 1)}.0.op"
        elif side == "up_blocks" and kind == "resnets":
            new = f"output_blocks.{3 * int(number) + int(place)}.0.{OF_RES[rest.rsplit('.', 1)[0]]}"
        elif side == "up_blocks" and kind == "attentions" and int(number) > 0:
            new = f"output_blocks.{3 * int(number) + int(place)}.1.{rest.rsplit('.', 1)[0]}"
        elif side == "up_blocks" and kind == "upsamplers":
            new = f"output_blocks.{3 * int(number) + 2}.{1 if number == '0' else 2}.conv"
        elif side == "up_blocks":
            new = name.rsplit(".", 1)[0]  # is left as it is
        else:
            continue
        found[f"model.diffusion_model.{new}.{name.rsplit('.', 1)[1]}"] = x
    rows = {name: x for name, x in names.items() if not ("input_blocks" in name or "output_blocks" in name)}
    first = {name: x for name, x in names.items() if "input_blocks.0." in name}
    return found | rows | first


OF_RES = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


@pytest.mark.parametrize("usual", [True, False])
@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.name)
def test_a_single_file_is_the_folder_in_both_ways_of_counting_rows(config, usual, tmp_path, monkeypatch):
    models, path = random_networks(config), tmp_path / "x.safetensors"
    weights.save(config, models, tmp_path / config.name, "diffusers", Tokenizer(context_length=16))
    tensors = convert(state_dict(models), "compvis", config)
    if usual:
        tensors = as_the_usual_converter_numbers(tmp_path / config.name, config)
        assert len(tensors) == len(convert(state_dict(models), "compvis", config))
    save_file({name: x.contiguous() for name, x in tensors.items()}, path)
    found, loaded, _ = weights.load(path, config=config)
    assert_same_networks(loaded, models)
    assert found == config


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_a_published_model_is_known_by_its_shapes(preset):
    shapes = {name: x.shape for name, x in state_dict(families.build(preset)).items()}
    found = families.STABLE_DIFFUSION.from_shapes(shapes, None).config
    assert found == preset and like(preset, shapes) == preset


def test_the_networks_have_as_many_parameters_as_the_paper_says():
    """Table 2, Kim et al. 2023: 0.58, 0.49 and 0.33 billion in the U-Net, rounded up."""
    counts = {}
    for preset in PRESETS[:3]:
        unet = families.build(preset)["diffusion"]
        counts[preset.name] = math.ceil(sum(x.numel() for x in unet.parameters()) / 1e7) / 100
    assert counts == {"bk-sdm-base": 0.58, "bk-sdm-small": 0.49, "bk-sdm-tiny": 0.33}
