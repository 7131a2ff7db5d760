"""IP-Adapters: the image encoder, the projections, loops and files agree with transformers and diffusers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from reifusion.api import load
from reifusion.model.ddpm import randn
from reifusion.model.pipeline import StableDiffusion
from reifusion.model.tensors import ModelError
from reifusion.shortcuts.int8 import quantize_layer
from reifusion.steer.clip_vision import prepared
from reifusion.steer.controlnet import Control, ControlNet, controlled
from reifusion.steer.ip_adapter import (
    Full,
    ImagePrompt,
    IPAdapter,
    Plain,
    Plus,
    cross_attentions,
    with_image_prompts,
)
from reifusion.steer.ip_adapter_files import load_image_encoder, load_ip_adapter
from reifusion.weights import save
from tests.tiny import WORDS, native_state, random_networks
from tests.tiny_sdxl import TINY, TINY_SD

os.environ.setdefault("HF_HUB_OFFLINE", "1")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

CONFIGS = {"sd": TINY_SD, "xl": TINY}
KINDS = "plain", "plus", "full"
PROMPT, NEGATIVE, SEED, STEPS = "a cat & a dog", "dog", 3, 3
WIDTH, HEIGHT = 72, 56  # 18×14 latents, and 9×7 one level below
FEATURES, PROJECTION = 48, 20  # of the image encoder: of a patch, and of the picture


def picture(seed: int, size: tuple[int, int] = (61, 40)) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(levels).resize(size, Image.Resampling.BICUBIC)


def randomised(net: nn.Module, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    for name, x in net.named_parameters():
        norm = "norm" in name and name.endswith("weight")
        nn.init.normal_(x, float(norm), (x[0].numel() if x.ndim > 1 else 25) ** -0.5)
    return net


def write_encoder(folder: Path, activation: str = "gelu", projection: int = PROJECTION) -> Path:
    config = transformers.CLIPVisionConfig(
        hidden_size=FEATURES, intermediate_size=72, num_hidden_layers=3, num_attention_heads=4, image_size=28,
        patch_size=7, projection_dim=projection, hidden_act=activation,
    )  # fmt: skip
    net: Any = randomised(transformers.CLIPVisionModelWithProjection(config), 7)
    net.save_pretrained(folder)
    return folder


def write_adapter(path: Path, kind: str, pipe: StableDiffusion, seed: int = 5) -> Path:
    unet: Any = pipe.models["diffusion"]
    width = unet.config.context_width
    make: Any = {
        "plain": lambda: Plain(PROJECTION, 4, width),
        "plus": lambda: Plus(FEATURES, 5, 40, 2, 4, width),
        "full": lambda: Full(FEATURES, width),
    }[kind]
    outs = [layer.q.out_features for layer in cross_attentions(unet)]
    save_file(randomised(IPAdapter(make(), width, outs), seed).state_dict(), path)
    return path


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
def home(ours, tmp_path_factory) -> Path:
    """A repository as h94/IP-Adapter: a folder with an adapter of each kind and the image encoder."""
    home = tmp_path_factory.mktemp("home")
    write_encoder(home / "models" / "image_encoder")
    for kind in KINDS:
        write_adapter(home / "models" / f"{kind}.safetensors", kind, ours)
    return home


# ---- the image encoder ------------------------------------------------------------------------------------


@torch.inference_mode()
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_the_encoder_sees_what_that_of_transformers_sees(tmp_path, activation):
    write_encoder(tmp_path, activation)
    pipe = StableDiffusion(TINY_SD, WORDS, {"diffusion": nn.Linear(1, 1).double()})
    net = load_image_encoder(tmp_path, pipe)
    theirs = transformers.CLIPVisionModelWithProjection.from_pretrained(tmp_path).double()
    pixels = torch.randn(3, 3, 28, 28).double()
    seen, expected = net(pixels), theirs(pixels, output_hidden_states=True)
    torch.testing.assert_close(seen.picture, expected.image_embeds, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(seen.patches, expected.hidden_states[-2], rtol=1e-9, atol=1e-9)
    # As older transformers wrote it, and as a part of the whole CLIP
    tensors = load_file(tmp_path / "model.safetensors")
    old = {
        name if name.startswith("visual") else f"vision_model.{name.removeprefix('vision_model.')}": x
        for name, x in tensors.items()
    }
    save_file(
        old | {"vision_model.embeddings.position_ids": torch.arange(17)}, tmp_path / "model.safetensors"
    )
    again = load_image_encoder(tmp_path, pipe)
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in net.state_dict().items())


@pytest.mark.parametrize("size", [(61, 40), (40, 61), (28, 28), (300, 97), (29, 28)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_a_picture_is_prepared_as_in_transformers(size, mode):
    processor = transformers.CLIPImageProcessor(size=28, crop_size=28)
    image = picture(1, size).convert(mode)
    expected = processor(images=image.convert("RGB"), return_tensors="pt").pixel_values
    torch.testing.assert_close(prepared(image, 28), expected, rtol=1e-5, atol=1e-5)


# ---- loops ------------------------------------------------------------------------------------------------


def drawn_by_diffusers(
    folder: Path, home: Path, used: list[tuple[str, int, float]], cfg: float
) -> np.ndarray:
    xl = "XL" if folder.name == "xl" else ""
    pipe = getattr(diffusers, f"StableDiffusion{xl}Pipeline").from_pretrained(folder, local_files_only=True)
    pipe.load_ip_adapter(
        str(home), subfolder="models", weight_name=[f"{kind}.safetensors" for kind, _, _ in used]
    )
    pipe.set_ip_adapter_scale([weight for *_, weight in used])
    pipe.scheduler = diffusers.DDIMScheduler.from_config(
        pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(SEED + k) for k in range(2)]
    noise = randn((2, 4, HEIGHT // 4, WIDTH // 4), generators)
    return pipe(
        PROMPT, ip_adapter_image=[picture(seed) for _, seed, _ in used], negative_prompt=NEGATIVE,
        width=WIDTH, height=HEIGHT, latents=noise, num_inference_steps=STEPS, guidance_scale=cfg,
        num_images_per_prompt=2, output_type="latent",
    ).images.numpy()  # fmt: skip


def prompts(pipe: StableDiffusion, home: Path, used: list[tuple[str, int, float]]) -> list[ImagePrompt]:
    return [
        ImagePrompt(*load_ip_adapter(home / "models" / f"{kind}.safetensors", pipe), picture(seed), weight)
        for kind, seed, weight in used
    ]


def drawn(pipe: StableDiffusion, **settings: Any) -> np.ndarray:
    asked: dict[str, Any] = {
        "negative": NEGATIVE, "cfg": 5.0, "sampler": "ddim", "steps": STEPS, "seed": SEED, "num": 2,
        "width": WIDTH, "height": HEIGHT,
    }  # fmt: skip
    *_, last = pipe.denoise(PROMPT, **(asked | settings))
    return last.latents.numpy()


def assert_close(one: np.ndarray, other: np.ndarray, limit: float = 1e-4) -> None:
    assert one.shape == other.shape and other.std() > 0.1
    assert np.abs(one - other).max() <= limit * np.abs(other).max()


CASES = {
    "plain": ([("plain", 1, 0.8)], 5.0),
    "plus": ([("plus", 1, 1.0)], 5.0),
    "full": ([("full", 2, 0.6)], 5.0),
    "two": ([("plain", 1, 0.7), ("plus", 2, -0.4)], 5.0),
    "without guidance": ([("plain", 2, 0.7)], 1.0),
}


@pytest.mark.parametrize("case", CASES)
def test_the_latents_are_those_of_diffusers(folder, ours, home, case):
    used, cfg = CASES[case]
    before = {name: x.clone() for name, x in native_state(ours.models).items()}
    kinds = [type(module) for module in ours.models["diffusion"].modules()]
    plain = drawn(ours, cfg=cfg)
    prompted = drawn(with_image_prompts(ours, *prompts(ours, home, used)), cfg=cfg)
    assert_close(prompted, drawn_by_diffusers(folder, home, used, cfg))
    assert np.abs(prompted - plain).max() > 0.1  # it does look
    # And the model is bit for bit what it was
    assert kinds == [type(module) for module in ours.models["diffusion"].modules()]
    assert all(torch.equal(x, before[name]) for name, x in native_state(ours.models).items())
    assert np.array_equal(drawn(ours, cfg=cfg), plain)


def test_the_weight_0_is_the_plain_picture(ours, home):
    prompt = prompts(ours, home, [("plus", 1, 0.0)])
    pipe = with_image_prompts(ours, *prompt)
    assert np.array_equal(drawn(pipe), drawn(ours))
    with pytest.raises(ValueError, match="given all together"):
        with_image_prompts(pipe, *prompt)


def test_a_controlnet_sees_the_words_alone(ours, home):
    """A ControlNet is told as many words with a picture as without one."""
    unet: Any = random_networks(ours.config)["diffusion"]
    net: Any = randomised(ControlNet(unet, (4, 8, 12)), 3).eval()
    told = []
    net.register_forward_hook(lambda module, given, made: told.append(given[1].shape[1]))
    steered = controlled(ours, Control(net, picture(4), 0.3))
    both = with_image_prompts(steered, *prompts(ours, home, [("plain", 1, 0.8)]))
    nothing = with_image_prompts(steered, *prompts(ours, home, [("plain", 1, 0.0)]))
    assert np.array_equal(drawn(nothing), drawn(steered))
    assert np.abs(drawn(both) - drawn(steered)).max() > 0.1
    assert set(told) == {16}


def test_a_u_net_with_weights_of_8_bits_looks_too(folder, home):
    pipe = load(folder, "cpu", "fp32")
    prompted = prompts(pipe, home, [("plain", 1, 0.8)])
    exact, plain = drawn(with_image_prompts(pipe, *prompted)), drawn(pipe)
    unet: Any = pipe.models["diffusion"]
    for layer in cross_attentions(unet):
        quantize_layer(layer.q)
    rounded = drawn(with_image_prompts(pipe, *prompted))
    assert 0 < np.abs(rounded - exact).max() < 0.2 * np.abs(plain - exact).max()


def test_derivatives_go_through_the_picture_s_attention(ours, home):
    pipe = with_image_prompts(ours, *prompts(ours, home, [("plain", 1, 0.8)]))
    *_, last = pipe.denoise(PROMPT, grad=True, steps=2, seed=1, width=WIDTH, height=HEIGHT, sampler="ddim")
    (slope,) = torch.autograd.grad(last.x0.square().sum(), last.x_t)
    assert slope.isfinite().all() and slope.abs().max() > 0


# ---- files ------------------------------------------------------------------------------------------------


def test_a_pickle_and_an_encoder_elsewhere_are_found(ours, home, tmp_path):
    tensors = load_file(home / "models" / "plain.safetensors")
    parts = {
        part: {name.removeprefix(f"{part}."): x for name, x in tensors.items() if name.startswith(part)}
        for part in ("ip_adapter", "image_proj")
    }
    (home / "sdxl_models").mkdir(exist_ok=True)
    torch.save(parts, home / "sdxl_models" / "plain.bin")
    adapter, encoder = load_ip_adapter(home / "sdxl_models" / "plain.bin", ours)
    assert encoder.config.projection == PROJECTION
    assert adapter.state_dict().keys() == tensors.keys()
    assert all(torch.equal(x, tensors[name]) for name, x in adapter.state_dict().items())
    # The one beside does not fit, the one in `models` does
    write_encoder(home / "sdxl_models" / "image_encoder", projection=PROJECTION + 4)
    assert load_ip_adapter(home / "sdxl_models" / "plain.bin", ours)[1].config.projection == PROJECTION
    torch.save(parts, tmp_path / "plain.bin")
    with pytest.raises(ModelError, match=r"needs an image encoder that makes vectors of 20"):
        load_ip_adapter(tmp_path / "plain.bin", ours)
    with pytest.raises(ModelError, match=r"needs an image encoder .* makes 24"):
        load_ip_adapter(tmp_path / "plain.bin", ours, home / "sdxl_models" / "image_encoder")
    assert load_ip_adapter(tmp_path / "plain.bin", ours, home / "models" / "image_encoder")


def test_what_is_no_ip_adapter_for_the_model_gets_one_sentence(ours, home, tmp_path):
    good = load_file(home / "models" / "plain.safetensors")
    first = "ip_adapter.1.to_k_ip.weight"
    cases = [
        ({"a": torch.ones(1)}, "is not an IP-Adapter"),
        (good | {"image_proj.perceiver_resampler.latents": torch.ones(1)}, "FaceID"),
        (good | {"ip_adapter.0.to_q_lora.down.weight": torch.ones(1)}, "FaceID"),
        ({name: x for name, x in good.items() if name != first}, f"it lacks {first}"),
        (good | {"ip_adapter.99.to_k_ip.weight": torch.ones(1)}, "1 tensors more, first ip_adapter.99"),
        (good | {first: torch.ones(3, 3)}, r"has shape \(3, 3\), and not"),
        (
            {name: x for name, x in good.items() if "image_proj.proj" not in name},
            "of a kind that is not built in",
        ),
    ]
    for i, (tensors, said) in enumerate(cases):
        save_file(tensors, tmp_path / f"{i}.safetensors")
        with pytest.raises(ModelError, match=said) as error:
            load_ip_adapter(tmp_path / f"{i}.safetensors", ours, home / "models" / "image_encoder")
        assert "\n" not in str(error.value)
    with pytest.raises(ModelError, match="there is no file"):
        load_ip_adapter(tmp_path / "x", ours)
    path = home / "models" / "plain.safetensors"
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load_ip_adapter(path, ours, tmp_path)
    for odd in ('{"hidden_act": "odd"}', '{"num_attention_heads": 5}', '{"patch_size": 0}', "[]", "{"):
        (tmp_path / "config.json").write_text(odd)
        with pytest.raises(ModelError, match="not the config of an image encoder"):
            load_ip_adapter(path, ours, tmp_path)
    with pytest.raises(ValueError, match="finite number"):
        ImagePrompt(*load_ip_adapter(path, ours), picture(1), float("nan"))


def test_an_adapter_of_another_model_is_refused(home, tmp_path):
    one, other = (StableDiffusion(config, WORDS, random_networks(config)) for config in CONFIGS.values())
    path = write_adapter(home / "models" / "one.safetensors", "plain", one)
    with pytest.raises(ModelError, match="is no IP-Adapter for tiny-xl"):
        load_ip_adapter(path, other)
    prompt = ImagePrompt(*load_ip_adapter(path, one), picture(1))
    with pytest.raises(ValueError, match="was not loaded for tiny-xl"):
        with_image_prompts(other, prompt)
