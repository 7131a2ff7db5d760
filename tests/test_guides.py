"""The commands of the guides and of the README run, with tiny models in place of the files that they name."""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

from reifusion.api import load
from reifusion.cli import main
from reifusion.steer.control_files import save_control
from reifusion.steer.controlnet import ControlNet
from reifusion.weights import save
from tests.tiny import WORDS, native_state, random_networks
from tests.tiny_sdxl import TINY as XL
from tests.tiny_sdxl import TINY_SD

pytestmark = pytest.mark.slow

pytest.importorskip("cv2")
diffusers = pytest.importorskip("diffusers")
ROOT = Path(__file__).parents[1]
GUIDES = ROOT / "docs" / "guides"
# Those that have a test of their own, and one without a command
ELSEWHERE = {"samplers", "server", "studio", "which-files"}
PAGES = sorted(page.stem for page in GUIDES.glob("*.md") if page.stem not in ELSEWHERE)
RUN = ("batch", "convert", "edges", "generate", "grid", "info", "lora", "samplers", "vae", "why")
# As many levels and blocks as Stable Diffusion 1.x has, so that block weights fit, and few channels
UNET = replace(
    TINY_SD.unet, channels=(32, 32, 64, 64), attention=(1, 1, 1, 0), layers=2, heads=(4,) * 4, groups=16
)
VAE = replace(TINY_SD.vae, channels=(8, 8, 8, 8), groups=4)
SD15 = replace(TINY_SD, unet=UNET, vae=VAE, size=64, steps=2, cfg=3.0)


def blocks(page: str, language: str) -> list[str]:
    """page: the name of a guide, or README."""
    text = (ROOT / "README.md" if page == "README" else GUIDES / f"{page}.md").read_text("utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def photo(folder: Path, name: str, size: tuple[int, int], shift: int = 0) -> None:
    picture = Image.new("RGB", size, (40, 90 + shift, 160))
    ImageDraw.Draw(picture).ellipse((8, 8, size[0] // 2 + shift, size[1] // 2), "white")
    picture.save(folder / name)


def lora(path: Path, seed: int) -> None:
    drawn = torch.Generator().manual_seed(seed)
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0"
    ends = {"down": (2, 64), "up": (64, 2)}
    save_file({f"{layer}.lora_{k}.weight": torch.randn(*x, generator=drawn) for k, x in ends.items()}, path)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all files that the guides name."""
    from tests.parity.test_ip_adapter import write_adapter, write_encoder

    home = tmp_path_factory.mktemp("home")
    save(SD15, random_networks(SD15), home / "sd15.safetensors", tokenizer=WORDS)
    xl = replace(XL, size=64, steps=2)
    save(xl, random_networks(xl), home / "sdxl.safetensors", tokenizer=WORDS)
    pipe, pipe_xl = (load(home / f"{name}.safetensors", "cpu", "fp32") for name in ("sd15", "sdxl"))

    for seed, name in enumerate(("watercolour", "one", "two", "face", "creature", "style")):
        lora(home / f"{name}.safetensors", seed)
    for name in ("control_canny", "canny", "depth"):
        unet: Any = load(home / "sd15.safetensors", "cpu", "fp32").models["diffusion"]
        save_control(ControlNet(unet, (4, 8, 8, 8)), SD15, home / f"{name}.safetensors")

    net = diffusers.T2IAdapter(3, [*UNET.channels], 2, VAE.factor, "full_adapter")
    save_file(net.state_dict(), home / "t2iadapter_canny_sd15v2.safetensors")
    torch.save({"string_to_param": {"*": torch.randn(3, 24)}}, home / "creature.pt")
    os.link(home / "sd15.safetensors", home / "v1-5-pruned-emaonly.safetensors")
    vae = str(home / "vae-ft-mse-840000-ema-pruned.safetensors")
    assert main(["vae", "convert", str(home / "sd15.safetensors"), vae, "--to", "native"]) == 0
    unet = native_state({"diffusion": random_networks(SD15)["diffusion"]})
    save_file(unet, home / "other-unet.safetensors")

    for folder in ("models", "h94/IP-Adapter/models", "my", "photos", "my-pictures"):
        (home / folder).mkdir(parents=True)
    for place in (
        "image_encoder",
        "models/image_encoder",
        "h94/IP-Adapter/models/image_encoder",
        "my/image_encoder",
    ):
        write_encoder(home / place)
    write_adapter(home / "models/ip-adapter_sd15.safetensors", "plain", pipe)
    write_adapter(home / "h94/IP-Adapter/models/ip-adapter-plus_sd15.safetensors", "plus", pipe)
    write_adapter(home / "ip.safetensors", "plain", pipe_xl)
    for source, target in (("ip.safetensors", "sdxl"), ("models/ip-adapter_sd15.safetensors", "sd15")):
        nested: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}  # as its authors do
        for key, tensor in load_file(home / source).items():
            start, _, name = key.partition(".")
            nested[start][name] = tensor
        torch.save(nested, home / f"ip-adapter_{target}.bin")

    for name in ("photo", "cat", "style", "depth", "sketch", "photos/1", "photos/2"):
        photo(home, f"{name}.png", (48, 40))
    for i in range(4):
        photo(home, f"my-pictures/{i}.png", (32, 32), 4 * i)
        (home / f"my-pictures/{i}.txt").write_text("cat")
    assert main(["edges", str(home / "photo.png"), "--out", str(home / "edges.png")]) == 0
    mask = Image.new("L", (48, 40))
    ImageDraw.Draw(mask).rectangle((10, 10, 20, 20), 255)
    mask.save(home / "mask.png")
    for place, source in (
        ("my-pictures/model", "sd15"), ("mini-lora/lora", "style"), ("my-word/zork", "creature"),
    ):  # fmt: skip
        link = home / "runs" / f"{place}.safetensors"
        link.parent.mkdir(parents=True)
        if source == "creature":
            save_file({"emb_params": torch.randn(1, 24)}, link)
        else:
            os.link(home / f"{source}.safetensors", link)
    (home / "prompts.csv").write_text(blocks("many", "text")[0])
    for seed, name in enumerate(("mine", "theirs")):
        command = ["generate", "cat", f"--model={home}/sd15.safetensors", f"--seed={seed}", "--quiet"]
        assert main([*command, f"--out={home}/{name}.png"]) == 0
    return home


def commands(page: str) -> list[list[str]]:
    lines = "".join(blocks(page, "bash" if page == "README" else "console")).splitlines()
    split = [words[1:] for line in lines if (words := shlex.split(line, comments=True))[:1] == ["reifusion"]]
    return [words for words in split if words[0] in RUN or words[:2] == ["train", "control"]]


@pytest.mark.parametrize("page", [*PAGES, "README"])
def test_every_command_runs(home: Path, page: str, monkeypatch, capsys):
    monkeypatch.chdir(home)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    asked = commands(page)
    assert asked
    for verb, *words in asked:
        given = " ".join([verb, *words])
        if "--ray" in words:  # tests/test_batch_ray.py
            continue
        if verb in ("generate", "batch", "why", "grid") and "--model" not in words:
            words += [] if "--like" in words else ["--model", "sd15.safetensors"]
        for option, small in (("--size", "64x64"), ("--steps", "2")):
            words += [option, small] if option in words else []
        if verb == "train":
            words += ["start=sd15.safetensors", "steps=1", "batch=2", "warmup=1", "mixed_precision=no"]
        assert main([verb, *words]) == 0, f"{given}\n{capsys.readouterr().err}"


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_the_python_runs(home: Path, page: str, monkeypatch):
    monkeypatch.chdir(home)
    for block in blocks(page, "python"):
        code = block.replace("reifusion.load()", 'reifusion.load("sd15.safetensors")')
        exec(code.replace("Settings(", 'Settings(model="sd15.safetensors", prompt='), {})
