"""Block weights: the lists that A1111's users write name the right rows of the right model."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from reifusion import a1111, album, families
from reifusion.cli import main
from reifusion.families.sdxl import BASE
from reifusion.families.sdxl import PRESETS as SDXLS
from reifusion.model.config import SD15, ModelConfig
from reifusion.settings import Settings
from reifusion.weights import load, save
from reifusion.weights.lora import LoRA, apply, places, remove
from reifusion.weights.lora_blocks import PRESETS, block_of, factors, read
from reifusion.weights.lora_kinds import Difference
from tests.tiny import SMALL, WORDS, native_state, networks, random_networks
from tests.tiny_sd3 import networks as sd3_networks

# What stands at each place of a list, by sd-webui-lora-block-weight: lora_block_weight.py, BLOCKID17, …
SHORT_1 = "BASE,IN01,IN02,IN04,IN05,IN07,IN08,M00,OUT03,OUT04,OUT05,OUT06,OUT07,OUT08,OUT09,OUT10,OUT11"
SHORT_XL = "BASE,IN04,IN05,IN07,IN08,M00,OUT00,OUT01,OUT02,OUT03,OUT04,OUT05"
LONG_1 = ["BASE", *(f"IN{i:02}" for i in range(12)), "M00", *(f"OUT{i:02}" for i in range(12))]
LONG_XL = ["BASE", *(f"IN{i:02}" for i in range(9)), "M00", *(f"OUT{i:02}" for i in range(9))]


@pytest.mark.parametrize(
    ("config", "listed"),
    [(SD15, SHORT_1.split(",")), (SD15, LONG_1), (BASE, SHORT_XL.split(",")), (BASE, LONG_XL)],
    ids=["17", "26", "12", "20"],
)
def test_a_list_is_read_as_in_a1111(config: ModelConfig, listed: list[str]):
    unet = families.build(config)["diffusion"]  # without memory
    numbers = [float(i + 1) for i in range(len(listed))]
    found = factors(",".join(map(str, numbers)), unet)
    sides = {"input": "IN", "output": "OUT"}
    seen = set()
    for place in places(config):
        block = "BASE" if place.network != "diffusion" else ""
        if m := re.search(r"(input|output)_blocks\.(\d+)\.", place.compvis):
            block = f"{sides[m[1]]}{int(m[2]):02}"
        elif ".middle_block." in place.compvis:
            block = "M00"
        assert block_of(place.network, place.layer) == block
        if block:
            assert found[block] == (numbers[listed.index(block)] if block in listed else 0.0), place
            seen.add(block)
    assert seen >= {*listed}


def test_presets_are_those_of_a1111_and_fit_models_of_its_kind_alone():
    unet = families.build(SD15)["diffusion"]
    given = "1,0,0,0,1,1,1,1,1,1,1,1,0,0,0,0,0"
    assert factors("MIDD", unet) == factors(given, unet)
    assert factors("OUTS", unet) == factors("1,0,0,0,0,0,0,0,0,0,0,0,1,1,1,1,1", unet)
    assert factors("IND", unet) == factors("1,0,0,0,1,1,1,0,0,0,0,0,0,0,0,0,0", unet)
    assert set(factors("ALL0.5", unet).values()) == {0.5} and set(factors("NONE", unet).values()) == {0.0}
    assert {len(text.replace(" ", "")) for text in PRESETS.values()} == {17}
    xl = families.build(SDXLS[0])["diffusion"]
    assert set(factors("ALL", xl).values()) == {1.0}
    with pytest.raises(ValueError, match=r"MIDD is for Stable Diffusion 1\.x and 2\.x; this model has 12"):
        factors("MIDD", xl)


def everywhere(models: dict) -> LoRA:
    """A difference of ones for every weight of text encoder and U-Net."""
    updates = {}
    for place in places(SMALL):
        layer = models[place.network].get_submodule(place.layer)
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
            weight = layer.weight.chunk(place.parts)[place.part]
            updates[place.diffusers] = Difference(torch.ones(weight.shape))
    return LoRA(updates)


def test_each_block_is_changed_by_its_own_number_and_the_rest_by_the_weight():
    models = {name: net.double() for name, net in networks(SMALL).items()}
    before = {name: x.clone() for name, x in native_state(models).items()}
    lora = everywhere(models)
    # BASE; down: a convolution, attention, smaller, 3; the middle; up: 0, 1, and 2 and 3 with attention
    numbers = [0.5, 10, 11, 12, 13, 20, 30, 31, 32, 33]
    apply(models, lora, 2.0, blocks=numbers)
    for name, x in native_state(models).items():
        change = (x - before[name]).flatten()
        network, rest = name.split(".", 1)
        number = 1.0
        if network == "clip":
            number = 0.5
        elif m := re.match(r"(down|middle|up)\.(\d+)", rest):
            number = 20 if m[1] == "middle" else numbers[(1 if m[1] == "down" else 6) + int(m[2])]
        if change.any():
            torch.testing.assert_close(change, torch.full_like(change, 2.0 * number))
        else:
            assert network in ("encoder", "decoder") or x.ndim == 1 or "embedding" in name
    remove(models, lora)
    assert all(torch.equal(x, before[name]) for name, x in native_state(models).items())


@pytest.mark.parametrize(
    ("blocks", "says"),
    [
        ("1,2", r"there are 2 block weights, .* takes 5 \(those of BASE, IN01, M00, OUT02, OUT03\) or 10"),
        ([1.0, float("nan")], "must be finite numbers"),
        ("MIDI", "block weights are numbers with commas between them, or one of NONE, ALL"),
    ],
)  # fmt: skip
def test_what_is_not_a_list_of_this_model_is_refused_and_changes_nothing(blocks, says):
    models = networks(SMALL)
    before = {name: x.clone() for name, x in native_state(models).items()}
    with pytest.raises(ValueError, match=says):
        apply(models, everywhere(models), 1.0, blocks=blocks)
    assert all(torch.equal(x, before[name]) for name, x in native_state(models).items())
    with pytest.raises(ValueError, match="for models with a U-Net"):
        factors("ALL", sd3_networks()["diffusion"])
    assert read("1,-0.5,2") == (1.0, -0.5, 2.0)


def test_the_commands_know_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    models = networks(SMALL)
    save(SMALL, models, tmp_path / "model.safetensors", tokenizer=WORDS)
    every = everywhere(models).updates
    tensors = {f"{name}.diff": one.change for name, one in every.items() if isinstance(one, Difference)}
    save_file(tensors, tmp_path / "zork.safetensors")
    lora = f"{tmp_path}/zork.safetensors:0.1:lbw=1,0,1,0,0"
    fuse = ["lora", "fuse", f"{tmp_path}/model.safetensors", lora, "--out", f"{tmp_path}/fused.safetensors"]
    assert main(fuse) == 0
    apply(models, everywhere(models), 0.1, blocks="1,0,1,0,0")
    fused = native_state(load(tmp_path / "fused.safetensors", dtype=torch.float32)[1])
    for name, x in native_state(models).items():
        torch.testing.assert_close(fused[name], x, msg=name)
    assert main(["lora", "merge", lora, "--out", f"{tmp_path}/merged.safetensors"]) == 2
    assert "block weights need a model" in capsys.readouterr().err
    assert main(["generate", "cat", f"--model={tmp_path}/model.safetensors", f"--lora={lora},1"]) == 2
    assert "there are 6 block weights" in capsys.readouterr().err
    settings = Settings(
        "cat", lora=((lora.partition(":")[0], 0.1, "1,0,1,0,0"),), sampler="ddim", size=(32, 32)
    )
    assert "cat <lora:zork:0.1:lbw=1,0,1,0,0>\n" in a1111.write(settings, "small", "0123456789", ["abc"])
    assert 'Lora hashes: "zork: abc"' in a1111.write(settings, "small", "0123456789", ["abc"])


def test_a_picture_carries_them_and_is_repeated(tmp_path, capsys, monkeypatch):
    small = replace(SMALL, steps=2)
    save(small, random_networks(small), tmp_path / "model.safetensors", tokenizer=WORDS)
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    halves = (("a", (32, 2)), ("b", (2, 24)))
    tensors = {f"{name}.hada_w{i}_{x}": torch.ones(shape) for i in (1, 2) for x, shape in halves}
    save_file(tensors, tmp_path / "loha.safetensors")
    model = f"--model={tmp_path}/model.safetensors"
    command = ["generate", "cat", model, "--seed=1", "--quiet", "--dtype=fp32"]

    def draw(*more: str) -> Path:
        assert main([*command, f"--out={tmp_path}/out", *more]) == 0
        return Path(capsys.readouterr().out.strip())

    def pixels(path: Path) -> np.ndarray:
        return np.asarray(Image.open(path)).astype(int)

    lora = f"--lora={tmp_path}/loha.safetensors:2.0"
    plain, whole, none = draw(), draw(lora), draw(f"{lora}:lbw=0,0,1,1,1")
    in_its_row = draw(f"{lora}:lbw=0,0.5,0,0,0")
    assert np.array_equal(pixels(none), pixels(plain)) and not np.array_equal(pixels(whole), pixels(plain))
    assert np.array_equal(pixels(in_its_row), pixels(draw(f"--lora={tmp_path}/loha.safetensors:1.0")))
    assert np.array_equal(pixels(draw("--like", str(in_its_row))), pixels(in_its_row))
    settings = album.read(in_its_row).settings
    assert settings.lora == ((f"{tmp_path}/loha.safetensors", 2.0, "0,0.5,0,0,0"),)
    monkeypatch.chdir(tmp_path)
    exec(compile(settings.as_python(), "lines", "exec"), {})
    assert np.array_equal(pixels(Path("picture.png")), pixels(in_its_row))
