"""A file that is given to the wrong option is told what it is, or what it lacks, in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from reifusion.api import load
from reifusion.cli import main
from reifusion.steer.control_files import save_control
from reifusion.steer.controlnet import ControlNet
from reifusion.weights import save
from tests import tiny_sd3
from tests.tiny import SMALL, WORDS, random_networks
from tests.tiny_sdxl import TINY as XL
from tests.tiny_sdxl import TINY_REFINER


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    for name, config in (("sd", SMALL), ("xl", XL), ("refiner", TINY_REFINER)):
        save(config, random_networks(config), home / f"{name}.safetensors", tokenizer=WORDS)
    save(tiny_sd3.TINY, tiny_sd3.networks(), home / "sd3.safetensors", tokenizer=tiny_sd3.tokenizers())
    unet: Any = load(home / "sd.safetensors", "cpu", "fp32").models["diffusion"]
    save_control(ControlNet(unet, (4, 8)), SMALL, home / "net.safetensors")
    save_file({"body.0.block1.weight": torch.ones(2, 2, 3, 3)}, home / "t2i.safetensors")
    save_file({"bundle_emb.zork.clip_l": torch.ones(2, 24)}, home / "word.safetensors")
    Image.new("RGB", (32, 32)).save(home / "hint.png")
    return home


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--model t2i.safetensors", "t2i.safetensors is a T2I-Adapter, which guides a model but is not"),
        ("--model net.safetensors", "net.safetensors is a ControlNet, which guides a model but is not"),
        (
            "--model sd.safetensors --unet net.safetensors",
            "net.safetensors is a ControlNet, which has the names",
        ),
        ("--model sd.safetensors --vae t2i.safetensors", "t2i.safetensors is not a VAE"),
        ("--model sd.safetensors --lora t2i.safetensors", "t2i.safetensors is not a LoRA"),
        ("--model sd.safetensors --lora word.safetensors", "nothing but learned words, as --embedding reads"),
        ("--model sd.safetensors --ip-adapter t2i.safetensors=hint.png", "is not an IP-Adapter"),
        ("--model sd.safetensors --control hint.png=hint.png", "hint.png is not a checkpoint"),
        (
            "--model sd.safetensors --control hint.png=net.safetensors",
            "net.safetensors cannot be read as a pict",
        ),
        (
            "--model sd.safetensors --control word.safetensors=hint.png",
            "word.safetensors is not a ControlNet",
        ),
        ("--model sd3.safetensors --control t2i.safetensors=hint.png", "is for models with a U-Net"),
        ("--model sd3.safetensors --control net.safetensors=hint.png", "is for models with a U-Net"),
        ("--model xl.safetensors --control t2i.safetensors=hint.png", "is no T2I-Adapter for tiny-xl"),
        ("--model sd.safetensors --ensd=-1", "ensd must be between 0 and 4294967295, not -1"),
        ("--model sd.safetensors --ensd=many", "Invalid value for '--ensd'"),
        ("--model sd.safetensors --emphasis loud", "loud"),
        ("--model sd3.safetensors --emphasis compel", "compel's rule is for CLIP alone"),
        ("--model xl.safetensors --emphasis a1111 --refiner refiner.safetensors", "do not go together"),
        ("--model sd.safetensors --fp8 --ema", "it has no moving average"),
        ("--model sd.safetensors --fp8=yes", "fp8"),
    ],
)
def test_it_is_told_in_one_sentence(home: Path, given: str, said: str, monkeypatch, capsys):
    monkeypatch.chdir(home)
    assert main(["generate", "a (cat:1.2)", "--quiet", *given.split()]) == 2
    out, error = capsys.readouterr()
    assert said in error and error.count("\n") == 1 and "Traceback" not in error and not out


def test_info_does_not_take_a_controlnet_for_a_unet(home: Path, capsys):
    assert main(["info", str(home / "net.safetensors")]) == 2
    assert "is a ControlNet" in capsys.readouterr().err
