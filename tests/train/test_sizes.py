"""Sizes of one's own: said in a recipe, checked before anything is encoded, kept in the file."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

import reifusion
from reifusion import cli
from reifusion.model.config import MINI, SD15
from reifusion.train import watch
from reifusion.train.__main__ import main
from reifusion.train.keys import RecipeError
from reifusion.train.recipe import read
from reifusion.train.sizes import SIZES, model_config
from reifusion.train.text2image import TextToImage
from reifusion.train.vae import VAE
from reifusion.train.vae_file import save_vae


@pytest.mark.parametrize("name", ["7m", "16m", "75m"])
def test_a_size_has_as_many_parameters_as_its_name_says(name):
    config = SIZES[name]
    with torch.device("meta"):
        networks = TextToImage(config), VAE(config.vae)
    millions = sum(p.numel() for network in networks for p in network.parameters()) / 1e6
    assert f"{millions:.0f}m" == name == config.name


def test_sizes_of_ones_own_take_the_place_of_the_models():
    own = ["channels=[64, 96]", "vae_channels=[16, 32, 32]", "text_width=64", "patch=1", "size=96"]
    config = model_config(read("text2image", None, ["model=16m", *own]))
    assert config.unet.channels == (64, 96) and config.unet.heads == (1, 1) and config.unet.patch == 1
    assert config.unet.attention == (1, 1) and config.unet.context_width == config.clip.width == 64
    assert config.vae.channels == (16, 32, 32) and config.vae.factor == 4 and config.size == 96
    assert (
        model_config(read("text2image")) == MINI and model_config(read("vae", None, ["model=sd15"])) == SD15
    )


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("channels=[100]", "channels must be multiples of 32, not 100"),
        ("channels=[0]", "channels must be 1 or more"),
        ("vae_channels=[12, 16]", "vae_channels must be multiples of 8, not 12"),
        ("text_width=50", "text_width must be multiples of"),
        ("text_width=-1", "text_width must be 0 or more"),
        ("patch=-2", "patch must be 0 or more"),
        ("model=32m", "there is no model '32m' to train; there are 7m, 16m, mini"),
    ],
)
def test_sizes_that_no_network_can_have_are_refused(key, says):
    with pytest.raises(RecipeError, match=says):
        model_config(read("text2image", None, [key]))


def test_sizes_are_not_for_a_model_that_exists(capsys, tmp_path):
    assert main(["text2image", "start=mini", "channels=[64]", f"folder={tmp_path}"]) == 2
    assert "channels is set but would not be used: mini decides the sizes" in capsys.readouterr().err


@pytest.mark.slow
def test_a_newcomers_pictures_become_a_model_of_their_own_size(tmp_path, monkeypatch):
    """The recipes my-vae and my-pictures, one after the other; pictures of odd shapes, and patches of two."""
    monkeypatch.setattr(watch, "contact_sheet", lambda *_, **__: Image.new("RGB", (8, 8)))
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(5):
        Image.new("RGB", (60 + 9 * i, 50), ("red", "green", "blue")[i % 3]).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a {('red', 'green', 'blue')[i % 3]} thing")
    vae, out = tmp_path / "vae.safetensors", tmp_path / "mine.safetensors"
    small = ["vae_channels=[8, 16]", "channels=[32, 32]", "text_width=32", "patch=2", "size=44"]
    few = [f"data={folder}", "steps=2", "batch=2", "minutes=none", *small]
    more = [f"folder={tmp_path}/v", f"out={vae}", "crop=16"]
    vae_keys = [key for key in few if not key.startswith(("channels", "text", "patch"))]
    assert main(["vae", "--config", "my-vae", *vae_keys, *more]) == 0
    more = [f"folder={tmp_path}/t", f"out={out}", f"vae={vae}"]
    assert main(["text2image", "--config", "my-pictures", *few, *more]) == 0
    pipe = reifusion.load(out)
    assert pipe.config.size == 44 and pipe.config.unet.patch == 2 and pipe.config.name == "16m-own"
    assert pipe.generate("a red thing", steps=1, seed=0, progress=False).size == (44, 44)


def test_a_vae_that_was_trained_can_be_looked_at_by_itself(tmp_path, capsys):
    path = tmp_path / "vae.safetensors"
    vae = VAE(SIZES["7m"].vae)
    save_vae(vae, path)
    assert cli.main(["info", str(path)]) == 0
    said = capsys.readouterr().out
    assert "a VAE alone" in said and "--vae" in said
    assert f"{sum(p.numel() for p in vae.parameters()):,}" in said
    assert f"{sum(p.numel() for p in vae.encoder.parameters()):,}" in said
    (tmp_path / "half.safetensors").write_bytes(path.read_bytes()[:5000])
    assert cli.main(["info", str(tmp_path / "half.safetensors")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
