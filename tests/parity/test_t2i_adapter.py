"""T2I-Adapters against those of diffusers: features, and whole pictures, alone and beside a ControlNet."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from reifusion.api import load
from reifusion.model.ddpm import randn
from reifusion.model.pipeline import StableDiffusion
from reifusion.model.tensors import ModelError
from reifusion.steer.control_files import load_control
from reifusion.steer.controlnet import Control, controlled
from reifusion.steer.t2i_adapter import SOFT
from reifusion.weights import save
from tests.parity.test_controlnet import their_net
from tests.tiny import WORDS, random_networks
from tests.tiny_sdxl import TINY, TINY_SD

os.environ.setdefault("HF_HUB_OFFLINE", "1")
diffusers = pytest.importorskip("diffusers")

# As many levels as adapters know of; the last one of Stable Diffusion 1.x has no attention.
DEEPER: dict[str, Any] = {"channels": (32, 64, 64), "heads": (4, 4, 4)}
CONFIGS = {
    "sd": replace(TINY_SD, unet=replace(TINY_SD.unet, attention=(1, 1, 0), **DEEPER)),
    "xl": replace(TINY, unet=replace(TINY.unet, attention=(0, 2, 2), **DEEPER)),
}
WIDTH, HEIGHT, STEPS, SEED = 80, 64, 4, 3  # 20×16 latents, then 10×8, then 5×4
# diffusers' kinds, for these models: their number of levels is that of the widths
KINDS = {"sd": ("full_adapter", "light_adapter"), "xl": ("full_adapter_xl",)}
CASES = [(name, kind) for name, kinds in KINDS.items() for kind in kinds]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    made = {}
    for name, config in CONFIGS.items():
        made[name] = tmp_path_factory.mktemp("model") / name
        save(config, random_networks(config), made[name], "diffusers", WORDS)
    return made


def hint(seed: int, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(levels)


def their_adapter(name: str, kind: str, channels: int, path: Path, seed: int = 1) -> Any:
    torch.manual_seed(seed)
    config = CONFIGS[name]
    widths = [*config.unet.channels]
    # The light one makes one level more than it has widths
    widths = {"full_adapter": widths, "light_adapter": widths[:-1], "full_adapter_xl": [*widths, 64]}[kind]
    factor = config.vae.factor * (2 if name == "xl" else 1)
    made = diffusers.T2IAdapter(channels, widths, 2, factor, kind)
    for parameter in made.parameters():
        spread = (parameter[0].numel() if parameter.ndim > 1 else 25) ** -0.5
        parameter.data = spread * torch.randn_like(parameter)
    save_file(made.state_dict(), path)
    return made


def drawn_by_diffusers(folder: Path, adapter: Any, picture: Image.Image, weight: float) -> np.ndarray:
    xl = "XL" if folder.name == "xl" else ""
    pipe = getattr(diffusers, f"StableDiffusion{xl}AdapterPipeline").from_pretrained(
        folder, adapter=adapter, local_files_only=True
    )
    pipe.scheduler = diffusers.DDIMScheduler.from_config(
        pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    pipe.set_progress_bar_config(disable=True)
    noise = randn((1, 4, HEIGHT // 4, WIDTH // 4), torch.Generator().manual_seed(SEED))
    made = pipe(
        "a cat", negative_prompt="dog", image=picture, width=WIDTH, height=HEIGHT, latents=noise,
        num_inference_steps=STEPS, guidance_scale=3.0, adapter_conditioning_scale=weight, output_type="np",
    )  # fmt: skip
    return made.images[0] * 255


def draw(pipe: StableDiffusion, **more: Any) -> np.ndarray:
    asked: dict[str, Any] = {"steps": STEPS, "cfg": 3.0, "size": (WIDTH, HEIGHT), "seed": SEED}
    picture = pipe.generate("a cat", "dog", sampler="ddim", progress=False, **asked, **more)
    return np.asarray(picture).astype(float)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_picture_is_that_of_diffusers(folders, name, kind, tmp_path):
    theirs = their_adapter(name, kind, 3, tmp_path / "x.safetensors")
    pipe = load(folders[name], "cpu", "fp32")
    net = load_control(tmp_path / "x.safetensors", pipe)
    drawn = draw(controlled(pipe, Control(net, hint(0), weight=0.7)))
    expected = drawn_by_diffusers(folders[name], theirs, hint(0), 0.7)
    assert np.abs(drawn - expected).max() < 0.6
    assert np.abs(drawn - draw(pipe)).max() > 10


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["full_adapter", "light_adapter"])
def test_features_agree_in_float64_and_in_the_authors_names(folders, kind, channels, tmp_path):
    theirs = their_adapter("sd", kind, channels, tmp_path / "x.safetensors").double()
    pipe = load(folders["sd"], "cpu", "fp64")
    net: Any = load_control(tmp_path / "x.safetensors", pipe)
    grey = hint(1).convert("L").convert("RGB")  # of one channel, the colours' mean is looked at
    pixels = torch.from_numpy(np.asarray(grey)).permute(2, 0, 1)[None].double() / 255
    found, expected = net(pixels), theirs(pixels[:, :channels])
    assert list(found) == [1, 3, 5]  # the last row of each level
    for feature, other in zip(found.values(), expected, strict=True):
        assert torch.allclose(feature, other, atol=1e-9)
    state = {}
    for at, x in load_file(tmp_path / "x.safetensors").items():
        at = at.removeprefix("adapter.")
        if kind == "light_adapter":
            at = at.replace(".resnets.", ".body.")
        elif inside := re.fullmatch(r"body\.(\d+)\.resnets\.(\d+)\.(.*)", at):
            at = f"body.{2 * int(inside[1]) + int(inside[2])}.{inside[3]}"
        else:
            at = re.sub(r"body\.(\d+)\.in_conv", lambda m: f"body.{2 * int(m[1])}.in_conv", at)
        state[at] = x
    save_file(state, tmp_path / "authors.safetensors")
    again: Any = load_control(tmp_path / "authors.safetensors", pipe)
    assert all(torch.equal(x, net.state_dict()[at]) for at, x in again.state_dict().items())


def test_several_add_up_and_stand_beside_a_controlnet(folders, tmp_path):
    pipe = load(folders["sd"], "cpu", "fp32")
    for i in (1, 2):
        their_adapter("sd", "full_adapter", 3, tmp_path / f"{i}.safetensors", seed=i)
    one, two = (load_control(tmp_path / f"{i}.safetensors", pipe) for i in (1, 2))
    unet = diffusers.UNet2DConditionModel.from_pretrained(folders["sd"] / "unet", local_files_only=True)
    net = load_control(their_net(unet, 1, tmp_path / "net"), pipe)
    a, b = Control(one, hint(0), 0.5), Control(two, hint(1), 0.5)
    both = draw(controlled(pipe, a, b))
    assert np.array_equal(both, draw(controlled(pipe, b, a)))
    alone = draw(controlled(pipe, a))
    assert np.abs(both - alone).max() > 5
    third = Control(net, hint(2), 0.5)
    assert np.abs(draw(controlled(pipe, a, third)) - alone).max() > 5
    nothing = Control(net, hint(2), 0.0)
    assert np.abs(draw(controlled(pipe, a, nothing)) - alone).max() <= 1


def test_it_works_in_its_share_of_the_steps_and_of_guidance(folders, tmp_path):
    pipe = load(folders["sd"], "cpu", "fp32")
    their_adapter("sd", "full_adapter", 3, tmp_path / "x.safetensors")
    net = load_control(tmp_path / "x.safetensors", pipe)

    def steps(**more: Any) -> list[Any]:
        steered = controlled(pipe, Control(net, hint(0), **more))
        asked: dict[str, Any] = {"steps": 4, "cfg": 3.0, "size": (WIDTH, HEIGHT), "seed": SEED}
        return [*steered.denoise("a cat", "dog", sampler="ddim", **asked)]

    plain: list[Any] = [
        *pipe.denoise("a cat", "dog", sampler="ddim", steps=4, cfg=3.0, size=(WIDTH, HEIGHT), seed=SEED)
    ]
    late = steps(start=0.5)
    assert torch.equal(late[1].latents, plain[1].latents)
    assert not torch.allclose(late[2].latents, plain[2].latents)
    whole, half = steps()[0], steps(mode="control")[0]
    assert torch.allclose(half.uncond, plain[0].uncond, atol=1e-5)  # the half without the prompt
    assert not torch.allclose(whole.uncond, plain[0].uncond, atol=1e-3)
    soft = steps(mode="prompt")[0]
    assert not torch.allclose(soft.cond, whole.cond, atol=1e-3) and SOFT[-1] == 1


def test_one_for_another_model_is_refused(folders, tmp_path):
    their_adapter("xl", "full_adapter_xl", 3, tmp_path / "xl.safetensors")
    their_adapter("sd", "full_adapter", 3, tmp_path / "sd.safetensors")
    pipe = load(folders["sd"], "cpu", "fp32")
    with pytest.raises(ModelError, match="its first layer does not look at squares of 4×4 pixels"):
        load_control(tmp_path / "xl.safetensors", pipe)
    state = load_file(tmp_path / "sd.safetensors")
    for change, said in (
        (
            lambda s: {k: x for k, x in s.items() if "body.1.resnets.0.block1.bias" not in k},
            "it lacks body.1",
        ),
        (lambda s: s | {"adapter.body.7.resnets.0.block1.bias": torch.ones(2)}, "1 tensors that are no part"),
        (lambda s: s | {"adapter.body.1.resnets.0.block1.bias": torch.ones(2)}, r"has shape \(2,\)"),
    ):
        save_file(change(state), tmp_path / "x.safetensors")
        with pytest.raises(ModelError, match=said):
            load_control(tmp_path / "x.safetensors", pipe)
