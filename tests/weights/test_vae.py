"""A VAE in a file of its own: read from every format, drawn through, and written in every format."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from reifusion.api import load
from reifusion.cli.main import main
from reifusion.model.config import SD15
from reifusion.model.decoder import Decoder
from reifusion.model.model_converter import convert
from reifusion.model.pipeline import StableDiffusion
from reifusion.model.tensors import ModelError
from reifusion.train.vae import VAE
from reifusion.train.vae_file import save_vae as save_trained
from reifusion.weights import save
from reifusion.weights.vae import load_vae, save_vae
from tests.tiny import SMALL, WORDS, networks

FORMATS = ("native", "compvis", "diffusers")


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion:
    return StableDiffusion(SMALL, WORDS, networks(SMALL, noise=0.05))


def target(folder: Path, to: str) -> Path:
    return folder / (to if to == "diffusers" else f"{to}.safetensors")


def same(one: StableDiffusion, other: StableDiffusion) -> bool:
    halves = [pipe.models[half].state_dict() for pipe in (one, other) for half in ("encoder", "decoder")]
    pairs = ((halves[0], halves[2]), (halves[1], halves[3]))
    return all(a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in pairs)


@pytest.mark.parametrize("to", ["native", "diffusers"])
def test_what_is_written_alone_is_read_alone_bit_for_bit(pipe, to, tmp_path):
    save_vae(pipe, target(tmp_path, to), to)
    again = load_vae(target(tmp_path, to))
    assert again.config.vae == SMALL.vae and same(pipe, again)


def test_all_formats_hold_the_same_tensors(pipe, tmp_path):
    for to in FORMATS:
        save_vae(pipe, target(tmp_path, to), to)
    save_vae(load_vae(tmp_path / "diffusers"), tmp_path / "again.safetensors", "compvis")
    names = load_file(tmp_path / "compvis.safetensors"), load_file(tmp_path / "again.safetensors")
    assert names[0].keys() == names[1].keys() and all(torch.equal(names[0][k], names[1][k]) for k in names[0])
    assert {"encoder.down.0.block.0.norm1.weight", "decoder.mid.attn_1.q.weight"} < names[0].keys()


def test_diffusers_decodes_what_was_written_to_the_same_picture(pipe, tmp_path):
    save_vae(pipe, tmp_path / "vae", "diffusers")
    theirs = AutoencoderKL.from_pretrained(tmp_path / "vae", local_files_only=True)
    z = torch.randn(1, 4, 5, 7, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs.decode(z / theirs.config.scaling_factor).sample
    assert torch.allclose(load_vae(tmp_path / "vae").decode_image(z), expected, atol=1e-4)


def test_what_diffusers_writes_is_read(tmp_path):
    torch.manual_seed(0)
    theirs: Any = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.3,
    )
    theirs.save_pretrained(tmp_path / "vae")
    own = load_vae(tmp_path / "vae")
    pixels = torch.rand(1, 3, 12, 20) * 2 - 1
    with torch.no_grad():
        expected = 0.3 * theirs.encode(pixels).latent_dist.mean
    assert torch.allclose(own.encode_image(pixels), expected, atol=1e-5)
    assert own.config.vae.groups == 4 and own.config.vae.scale_factor == 0.3


def test_the_vae_of_a_whole_model_and_of_a_training_is_taken(pipe, tmp_path):
    save(SMALL, pipe.models, tmp_path / "model.safetensors", tokenizer=WORDS)
    assert same(load_vae(tmp_path / "model.safetensors"), pipe)
    vae = VAE(SMALL.vae)
    save_trained(vae, tmp_path / "trained.safetensors")
    trained = load_vae(tmp_path / "trained.safetensors")
    assert trained.config.vae == SMALL.vae
    assert torch.equal(cast(Decoder, trained.models["decoder"]).conv_in.weight, vae.decoder.conv_in.weight)
    mini = load_vae("mini")
    assert same(mini, load("mini", "cpu", next(mini.models["encoder"].parameters()).dtype))


def test_the_sizes_of_a_known_vae_are_enough_and_others_are_refused(tmp_path):
    # Shared files of Stable Diffusion's VAE say nothing of their groups.
    for name, config in ("known", SD15.vae), ("other", replace(SD15.vae, channels=(64, 64, 128, 128))):
        with torch.device("meta"):
            state = VAE(config).state_dict()
        empty = {key: torch.zeros(x.shape, dtype=torch.float16) for key, x in state.items()}
        save_file(empty, tmp_path / f"{name}.safetensors")
    assert load_vae(tmp_path / "known.safetensors").config.vae == SD15.vae
    with pytest.raises(ModelError, match="the shapes of no VAE that is known here"):
        load_vae(tmp_path / "other.safetensors")


def test_the_vae_of_a_whole_sdxl_has_its_scale(tmp_path):
    with torch.device("meta"):
        state = VAE(SD15.vae).state_dict()
    shapes = {name: x.shape for name, x in convert(state, "compvis").items()}
    tensors = {name: torch.zeros(shape, dtype=torch.float16) for name, shape in shapes.items()}
    name = "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight"
    save_file({**tensors, name: torch.zeros(2)}, tmp_path / "x.safetensors")
    assert load_vae(tmp_path / "x.safetensors").config.vae.scale_factor == 0.13025


def test_the_commands_show_and_convert(pipe, tmp_path, capsys):
    save_vae(pipe, tmp_path / "vae.safetensors")
    Image.new("RGB", (300, 200), "orange").save(tmp_path / "photo.png")
    line = ["vae", "show", str(tmp_path / "vae.safetensors"), f"--out={tmp_path / 'out'}"]
    assert main([*line, str(tmp_path / "photo.png")]) == 0 and main(line) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "vae-vae-photo.png",
        "vae-vae-test-card.png",
    }
    assert "dB" in capsys.readouterr().out
    half = str(tmp_path / "half.safetensors")
    line = ["vae", "convert", str(tmp_path / "vae.safetensors"), half, "--to=compvis"]
    assert main([*line, "--dtype=fp16"]) == 0
    with safe_open(half, "pt") as file:
        assert file.get_tensor("encoder.conv_in.weight").dtype == torch.float16
    capsys.readouterr()
    assert main(line) == 2 and "is there already" in capsys.readouterr().err


def test_without_matplotlib_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["vae", "show", "mini"]) == 2
    assert 'pip install "reifusion[explain]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, said",
    [
        (["show", "nowhere.safetensors"], "nowhere.safetensors"),
        (["convert", "mini", "x.bin", "--to=native"], "is a .safetensors file"),
        (["convert", "mini", "x.safetensors", "--to=onnx"], "there is no format 'onnx'"),
        (["convert", "mini", "x.safetensors", "--to=native", "--dtype=int3"], "there is no dtype 'int3'"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["vae", *words]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_damaged_config_and_a_lora_are_refused(pipe, tmp_path):
    save_vae(pipe, tmp_path / "vae", "diffusers")
    (tmp_path / "vae" / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="lacks in_channels"):
        load_vae(tmp_path / "vae")
    save_file({"lora_unet_x.lora_down.weight": torch.ones(2, 2)}, tmp_path / "lora.safetensors")
    with warnings.catch_warnings(), pytest.raises(ModelError, match="is not a VAE"):
        load_vae(tmp_path / "lora.safetensors")
