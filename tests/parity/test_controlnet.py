"""ControlNets: networks, loops and files agree with those of diffusers, in SD 1.x and in SDXL."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from reifusion.api import load
from reifusion.families.sdxl_unet import tell
from reifusion.model.ddpm import randn
from reifusion.model.diffusion import UNet
from reifusion.model.pipeline import StableDiffusion
from reifusion.model.tensors import ModelError
from reifusion.shortcuts.deepcache import deepcached
from reifusion.steer.control_files import load_control, save_control
from reifusion.steer.controlnet import MODES, Control, ControlNet, controlled
from reifusion.weights import save
from tests.marks import often
from tests.tiny import WORDS, random_networks
from tests.tiny_sdxl import TINY, TINY_SD

os.environ.setdefault("HF_HUB_OFFLINE", "1")
diffusers = pytest.importorskip("diffusers")

CONFIGS = {"sd": TINY_SD, "xl": TINY}
PROMPTS, NEGATIVES, SEED, STEPS = ["a cat", "a dog & a cat"], ["dog", "cat"], 3, 6
WIDTH, HEIGHT = 72, 52  # 18×13 latents, an odd number, in the VAE's steps of 4


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / request.param
    config = CONFIGS[request.param]
    save(config, random_networks(config), path, "diffusers", WORDS)
    return path


@pytest.fixture(scope="module")
def ours(folder) -> StableDiffusion:
    return load(folder, "cpu", "fp32")


@pytest.fixture(scope="module")
def theirs(folder) -> Any:
    """diffusers's U-Net, for its ControlNet to begin with."""
    return diffusers.UNet2DConditionModel.from_pretrained(folder / "unet", local_files_only=True)


def their_net(unet: Any, seed: int, folder: Path) -> Path:
    """Writes a ControlNet of diffusers with random weights; none is zero, so that each of them counts."""
    torch.manual_seed(seed)
    net = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8, 12))
    for parameter in net.parameters():
        spread = (parameter[0].numel() if parameter.ndim > 1 else 25) ** -0.5
        parameter.data = parameter.data + 0.5 * spread * torch.randn_like(parameter)
    net.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def nets(theirs, tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("nets")
    return [their_net(theirs, seed, folder / str(seed)) for seed in (1, 2)]


def hint(seed: int) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def drawn_by_diffusers(folder: Path, nets: list[Path], **settings: Any) -> np.ndarray:
    xl = "XL" if folder.name == "xl" else ""
    read = [diffusers.ControlNetModel.from_pretrained(net, local_files_only=True) for net in nets]
    pipe = getattr(diffusers, f"StableDiffusion{xl}ControlNetPipeline").from_pretrained(
        folder, controlnet=read[0] if len(read) == 1 else read, local_files_only=True
    )
    pipe.scheduler = diffusers.DDIMScheduler.from_config(
        pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(SEED + k) for k in range(len(PROMPTS))]
    settings = {key: value[0] if len(read) == 1 else value for key, value in settings.items()}
    hints = [hint(k) for k in range(len(nets))]
    last: list[torch.Tensor] = []

    def keep(pipe: Any, index: int, t: Any, kept: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        last[:] = [kept["latents"]]
        return kept

    noise = randn((len(PROMPTS), 4, HEIGHT // 4, WIDTH // 4), generators)
    pipe(
        PROMPTS, image=hints[0] if len(read) == 1 else hints, negative_prompt=NEGATIVES,
        width=WIDTH, height=HEIGHT, latents=noise, num_inference_steps=STEPS, guidance_scale=5.0,
        callback_on_step_end=keep, output_type="latent", **settings,
    )  # fmt: skip
    return last[0].numpy()


def drawn(pipe: StableDiffusion, *controls: Control, **settings: Any) -> np.ndarray:
    asked: dict[str, Any] = {
        "negative": NEGATIVES, "cfg": 5.0, "sampler": "ddim", "steps": STEPS, "seed": SEED,
        "width": WIDTH, "height": HEIGHT,
    }  # fmt: skip
    *_, last = controlled(pipe, *controls).denoise(PROMPTS, **(asked | settings))
    return last.latents.numpy()


def assert_close(one: np.ndarray, other: np.ndarray, limit: float = 1e-4) -> None:
    assert one.shape == other.shape and other.std() > 0.1
    assert np.abs(one - other).max() <= limit * np.abs(other).max()


CASES: dict[str, dict[str, list[Any]]] = {
    "one": {"controlnet_conditioning_scale": [0.8]},
    "at the beginning": {"controlnet_conditioning_scale": [1.0], "control_guidance_end": [0.5]},
    "at the end": {"controlnet_conditioning_scale": [1.0], "control_guidance_start": [0.34]},
    "two": {
        "controlnet_conditioning_scale": [0.7, -0.4],
        "control_guidance_start": [0.0, 0.3],
        "control_guidance_end": [0.6, 1.0],
    },
}


@pytest.mark.parametrize("case", often(CASES, list(CASES)[::2]))
def test_the_latents_are_those_of_diffusers(folder, ours, nets, case):
    settings = CASES[case]
    weights = settings["controlnet_conditioning_scale"]
    several = [0.0] * len(weights), [1.0] * len(weights)
    starts = settings.get("control_guidance_start", several[0])
    ends = settings.get("control_guidance_end", several[1])
    used = nets[: len(weights)]
    controls = [
        Control(load_control(net, ours), hint(k), weight, start, end)
        for k, (net, weight, start, end) in enumerate(zip(used, weights, starts, ends, strict=True))
    ]
    steered = drawn(ours, *controls)
    assert_close(steered, drawn_by_diffusers(folder, used, **settings))
    assert np.abs(steered - drawn(ours)).max() > 0.1  # it does steer


def test_guess_mode_is_that_of_diffusers(folder, ours, nets):
    net: Any = load_control(nets[0], ours)
    guessed = drawn(ours, Control(net, hint(0), mode="guess"))
    assert_close(guessed, drawn_by_diffusers(folder, nets[:1], guess_mode=[True]))


@torch.inference_mode()
def test_what_is_added_is_what_diffusers_adds_in_float64(folder, theirs, nets):
    ours = load(folder, "cpu", "fp64")
    net: Any = load_control(nets[0], ours, fast=False)
    other = diffusers.ControlNetModel.from_pretrained(nets[0], local_files_only=True).double()
    torch.manual_seed(4)
    width = ours.config.unet.context_width
    x, words = torch.randn(3, 4, 13, 18).double(), torch.randn(3, 7, width).double()
    t, picture = torch.tensor([900.0, 500.0, 3.0]), torch.rand(3, 3, HEIGHT, WIDTH).double()
    told: dict[str, torch.Tensor] = {}
    more: dict[str, Any] = {}
    if folder.name == "xl":
        pooled, sizes = torch.randn(3, 20).double(), torch.randint(9, 200, (3, 6)).float()
        more = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}
        told = {"told": tell(pooled, sizes, 8)}
    down, middle = other(x, t, words, picture, return_dict=False, **more)
    made = net(x, words, t, net.hint(picture), **told)
    assert len(made) == len(down) + 1
    for one, expected in zip(made, [*down, middle], strict=True):
        assert expected.std() > 1e-3
        assert (one - expected).abs().max() <= 1e-9 * expected.abs().max()


@pytest.mark.parametrize("format", ["compvis", "diffusers"])
def test_files_are_read_and_written_bit_for_bit(ours, nets, tmp_path, format):
    net: Any = load_control(nets[0], ours)
    save_control(net, ours.config, tmp_path / "net.safetensors", format)
    again: Any = load_control(tmp_path / "net.safetensors", ours)
    assert again.state_dict().keys() == net.state_dict().keys()
    for name, x in net.state_dict().items():
        assert torch.equal(x, again.state_dict()[name]), name
    save_control(again, ours.config, tmp_path / "diffusers.safetensors")
    given, written = (
        load_file(nets[0] / "diffusion_pytorch_model.safetensors"),
        load_file(tmp_path / "diffusers.safetensors"),
    )
    assert given.keys() == written.keys()
    assert all(torch.equal(given[name].reshape(x.shape), x) for name, x in written.items())


def test_the_authors_names_are_those_that_diffusers_reads_in_single_files(folder, ours, nets, tmp_path):
    if folder.name == "xl":
        pytest.skip("diffusers finds the sizes of SDXL's by its own configs alone")
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

    net: Any = load_control(nets[0], ours)
    save_control(net, ours.config, tmp_path / "net.safetensors", "compvis")
    config = diffusers.ControlNetModel.load_config(nets[0])
    theirs = convert_controlnet_checkpoint(load_file(tmp_path / "net.safetensors"), dict(config))
    given = load_file(nets[0] / "diffusion_pytorch_model.safetensors")
    # diffusers counts on the hint's encoder of the published ControlNets, which has more layers
    same = [name for name in given if "controlnet_cond_embedding.conv_out" not in name]
    assert len(same) > 40
    for name in same:
        assert torch.equal(theirs[name].reshape(given[name].shape), given[name]), name
    # … and the names may lack what they begin with
    bare = {
        name.removeprefix("control_model."): x for name, x in load_file(tmp_path / "net.safetensors").items()
    }
    save_file(bare, tmp_path / "bare.safetensors")
    assert load_control(tmp_path / "bare.safetensors", ours).state_dict().keys() == net.state_dict().keys()


def test_a_small_one_with_fewer_transformers_is_read(theirs, ours, nets, tmp_path, folder):
    """As diffusers's small ControlNets for SDXL, some of whose transformer layers are left out."""
    tensors = load_file(nets[0] / "diffusion_pytorch_model.safetensors")
    last = theirs.config.num_attention_heads or theirs.config.attention_head_dim
    assert last  # the sizes of heads are the model's, whatever a ControlNet has
    depth = ours.config.unet.middle_attention - 1
    less = {
        name: x
        for name, x in tensors.items()
        if f"mid_block.attentions.0.transformer_blocks.{depth}." not in name
    }
    if depth == 0:
        less = {
            name: x
            for name, x in less.items()
            if "mid_block.attentions" not in name and "mid_block.resnets.1" not in name
        }
    assert len(less) < len(tensors)
    save_file(less, tmp_path / "net.safetensors")
    if depth == 0:
        with pytest.raises(ModelError, match=r"lacks mid_block\.resnets\.1"):
            load_control(tmp_path / "net.safetensors", ours)
    else:
        again: Any = load_control(tmp_path / "net.safetensors", ours)
        assert again.config.middle_attention == depth


def test_without_weight_nothing_changes_to_the_bit(ours, nets):
    net: Any = load_control(nets[0], ours)
    plain = drawn(ours)
    assert np.array_equal(drawn(ours, Control(net, hint(0), weight=0.0)), plain)
    unet = random_networks(ours.config)["diffusion"]
    assert isinstance(unet, UNet)
    fresh = ControlNet(unet, (4, 8, 12)).eval()
    assert np.array_equal(drawn(ours, Control(fresh, hint(0))), plain)  # as training begins
    assert np.array_equal(drawn(ours), plain)  # and the model is what it was


def test_each_mode_weighs_in_its_own_way(ours, nets):
    net: Any = load_control(nets[0], ours)
    made = {mode: drawn(ours, Control(net, hint(0), mode=mode)) for mode in MODES}
    values = list(made.values())
    for i, one in enumerate(values):
        assert all(np.abs(one - other).max() > 1e-3 for other in values[:i])
    # By A1111's rule, the last of 13 outputs has the whole weight, and the first 0.825¹² of it.
    assert MODES["prompt"][0](13)[0] == pytest.approx(0.825**12) and MODES["prompt"][0](13)[-1] == 1


def test_it_follows_the_samplers_and_the_places_in_a_batch(ours, nets):
    control = Control(load_control(nets[0], ours), hint(0), end=0.6)
    for sampler in ("euler_a", "heun", "dpmpp_2m"):
        both = drawn(ours, control, sampler=sampler)
        *_, alone = controlled(ours, control).denoise(
            PROMPTS[1], negative=NEGATIVES[1], cfg=5.0, sampler=sampler, steps=STEPS, seed=SEED + 1,
            width=WIDTH, height=HEIGHT,
        )  # fmt: skip
        assert_close(both[1:], alone.latents.numpy(), 1e-5)


def test_gradients_reach_the_network_and_a_hint_changes_with_the_size(ours, nets):
    net: Any = load_control(nets[0], ours, fast=False)
    pipe = controlled(ours, Control(net, hint(0)))
    steps = pipe.denoise(PROMPTS[0], cfg=1.0, steps=2, seed=1, width=64, height=40, grad=True)
    next(steps).latents.square().sum().backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in net.parameters() if x.ndim > 1)


def test_what_does_not_fit_is_refused_in_one_sentence(ours, nets, tmp_path, folder):
    tensors = load_file(nets[0] / "diffusion_pytorch_model.safetensors")

    def refused(changed: dict[str, torch.Tensor], match: str) -> None:
        save_file(changed, tmp_path / "net.safetensors")
        with pytest.raises(ModelError, match=match):
            load_control(tmp_path / "net.safetensors", ours)

    refused({"x": torch.ones(1)}, "is not a ControlNet")
    refused({"body.0.block1.weight": torch.ones(1)}, "T2I-Adapter")
    refused({"lora_controlnet": torch.ones(1)}, "Control-LoRA")
    refused({**tensors, "extra.weight": torch.ones(1)}, "no part of a ControlNet, first extra.weight")
    name = "controlnet_down_blocks.1.weight"
    refused({key: x for key, x in tensors.items() if key != name}, f"lacks {name}")
    refused({**tensors, name: torch.ones(3, 3, 1, 1)}, "has shape")
    with pytest.raises(ModelError, match="no file or folder"):
        load_control(tmp_path / "missing.safetensors", ours)
    net: Any = load_control(nets[0], ours)
    for wrong, said in (
        ({"start": 0.5, "end": 0.5}, "from one share"),
        ({"weight": float("nan")}, "finite"),
        ({"mode": "x"}, "mode"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            Control(net, hint(0), **wrong)
    with pytest.raises(ValueError, match="deepcache"):
        deepcached(controlled(ours, Control(net, hint(0))), 2)
    with pytest.raises(ValueError, match="deepcache"):
        controlled(deepcached(ours, 2), Control(net, hint(0)))


def test_one_for_another_model_is_refused(tmp_path):
    other = replace(
        TINY_SD, unet=replace(TINY_SD.unet, context_width=20), clip=replace(TINY_SD.clip, width=20)
    )
    for name, config in ("one", TINY_SD), ("other", other):
        save(config, random_networks(config), tmp_path / name, "diffusers", WORDS)
    unet = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "other" / "unet", local_files_only=True)
    net = their_net(unet, 1, tmp_path / "net")
    with pytest.raises(ModelError, match="no ControlNet for one"):
        load_control(net, load(tmp_path / "one", "cpu", "fp32"))


def test_one_for_latents_of_another_size_is_refused(tmp_path, ours):
    net = ControlNet(cast(UNet, random_networks(ours.config)["diffusion"]), (4, 8))  # 2 pixels, and not 4
    save_control(net, ours.config, tmp_path / "net.safetensors")
    with pytest.raises(ModelError, match="its hints have 2 pixels at a latent's side, and not 4"):
        load_control(tmp_path / "net.safetensors", ours)
