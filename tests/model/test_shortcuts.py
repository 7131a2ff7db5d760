"""What trades numbers for time: off, it changes nothing; on, it computes what its paper says."""

from __future__ import annotations

import copy
import json
import math
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import reifusion
from reifusion import cli, kernels
from reifusion.model.clip import CLIP
from reifusion.model.config import CLIPConfig, ModelConfig, ScheduleConfig, UNetConfig, VAEConfig
from reifusion.model.decoder import Decoder
from reifusion.model.diffusion import Given, UNet
from reifusion.model.encoder import Encoder
from reifusion.model.pipeline import StableDiffusion
from reifusion.model.request import Request
from reifusion.model.samplers import SAMPLERS
from reifusion.model.tensors import ModelError
from reifusion.model.tokenizer import Tokenizer
from reifusion.settings import Settings
from reifusion.shortcuts.deepcache import DeepCache, deepcached
from reifusion.shortcuts.fp8 import Fp8Linear, store
from reifusion.shortcuts.int8 import Int8Conv2d, Int8Linear, quantize, quantize_layer
from reifusion.weights import save
from reifusion.weights.lora import LoRA, apply
from reifusion.weights.lora_kinds import Update
from tests.marks import often
from tests.tiny import SMALL, networks

TINY = ModelConfig(
    name="tiny",
    size=32,
    clip=CLIPConfig(width=16, layers=1, heads=2),
    vae=VAEConfig(channels=(8, 8, 8), layers=1, groups=4),
    unet=UNetConfig(channels=(16, 32), attention=(1, 0), layers=1, heads=(2, 2), context_width=16, groups=8),
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randomized(module: nn.Module, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for name, x in module.named_parameters():
        x.requires_grad_(False)
        if x.ndim > 1:
            x.normal_(0, x[0].numel() ** -0.5, generator=generator)
        else:
            x.normal_(float("norm" in name and name.endswith("weight")), 0.2, generator=generator)
    return module.eval()


def error(x: torch.Tensor, exact: torch.Tensor) -> float:
    """Of the norm."""
    assert x.shape == exact.shape and exact.isfinite().all() and exact.norm() > 0
    return ((x.double() - exact.double()).norm() / exact.double().norm()).item()


@pytest.fixture
def pipe() -> StableDiffusion:
    models: dict[str, nn.Module] = {
        "clip": randomized(CLIP(TINY.clip)),
        "encoder": randomized(Encoder(TINY.vae)),
        "decoder": randomized(Decoder(TINY.vae)),
        "diffusion": randomized(UNet(TINY.unet)),
    }
    return StableDiffusion(TINY, Tokenizer(), models)


def steps(pipe: StableDiffusion, **wishes: Any) -> list:
    asked: dict[str, Any] = {"sampler": "dpmpp_2m", "steps": 8, "seed": 1, **wishes}
    return list(deepcached(pipe, asked.pop("deepcache", 1)).denoise("a cat", **asked))


def outcome(pipe: StableDiffusion, **wishes: Any) -> torch.Tensor:
    return steps(pipe, **wishes)[-1].latents


# None of it, unless asked for


@pytest.mark.parametrize("off", [{"guidance_interval": None}, {"deepcache": 1}])
def test_a_shortcut_that_is_off_changes_nothing(pipe, off):
    assert torch.equal(outcome(pipe, **off), outcome(pipe))


def test_without_shortcuts_the_loop_calls_the_network_and_nothing_else(pipe):
    assert deepcached(pipe, 1) is pipe
    calls: list = []
    pipe.models["diffusion"].register_forward_hook(lambda *call: calls.append(call[-1]))
    drawn = steps(pipe)
    for output, step in zip(calls, drawn, strict=True):
        cond, uncond = output.chunk(2)  # both halves, at every step
        assert torch.equal(step.eps, uncond + 7.5 * (cond - uncond))


@pytest.mark.parametrize("wish", [{"guidance_interval": (0.5, 5)}, {"deepcache": 2}])
def test_a_shortcut_that_is_on_changes_the_picture_but_not_the_network(pipe, wish):
    before = outcome(pipe)
    changed = outcome(pipe, **wish)
    assert error(changed, before) > 1e-4
    assert torch.equal(outcome(pipe), before)


@pytest.mark.parametrize(
    "wish",
    [{"guidance_interval": (0.5, 5)}, {"deepcache": 3}, {"deepcache": 2, "guidance_interval": (0.5, 5)}],
)
def test_no_picture_depends_on_its_place_in_the_batch(pipe, wish):
    several = outcome(pipe, num=3, **wish)
    for k in range(3):
        assert error(several[k : k + 1], outcome(pipe, seed=1 + k, **wish)) < 1e-4


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"guidance_interval": (5, 0.3)}, "guidance_interval must begin below its end, and not 5 to 0.3"),
        (
            {"guidance_interval": (1, math.nan)},
            "guidance_interval must begin below its end, and not 1 to nan",
        ),
        ({"guidance_interval": (1,)}, r"guidance_interval must be two numbers, like \(0.3, 5\), not \(1,\)"),
        ({"guidance_interval": "12"}, "guidance_interval must be two numbers"),
        ({"guidance_interval": (0, "x")}, "an end of guidance_interval must be a number, not 'x'"),
    ],
)
def test_an_impossible_interval_is_refused_in_one_sentence(wish, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Request("a cat", **wish)


@pytest.mark.parametrize(
    ("every", "message"),
    [(0, "deepcache must be at least 1, not 0"), (1.5, "deepcache must be a whole number, not 1.5")],
)
def test_an_impossible_deepcache_is_refused_in_one_sentence(pipe, every, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        deepcached(pipe, every)


# Guidance in an interval


@pytest.mark.parametrize("sampler", often(name for name in SAMPLERS if not name.startswith("flow")))
def test_guidance_is_where_the_noise_is_in_the_interval_and_nowhere_else(pipe, sampler):
    batches: list[int] = []
    pipe.models["diffusion"].register_forward_hook(lambda *call: batches.append(len(call[-1])))
    drawn = steps(pipe, sampler=sampler, guidance_interval=(0.4, 6), steps=10)
    alpha_bar = SAMPLERS["ddpm"]().alphas_cumprod
    sigmas = ((1 - alpha_bar) / alpha_bar).sqrt().log().numpy()
    for step, batch in zip(drawn, batches, strict=True):
        sigma = math.exp(np.interp(step.t, np.arange(1000), sigmas))  # t may lie between two of training's
        inside = 0.4 < sigma <= 6
        assert (step.eps_uncond is not None) == inside
        assert batch == 1 + inside  # half the work outside
        if not inside:
            assert torch.equal(step.eps, step.eps_cond)
    assert set(batches) == {1, 2}


def test_the_interval_of_a_flow_is_told_in_the_same_terms(pipe):
    pipe.config = ModelConfig(**{**vars(TINY), "schedule": ScheduleConfig(prediction_type="flow")})
    drawn = steps(pipe, sampler="flow", guidance_interval=(0.5, 3), steps=8)
    # x = (1 - σ) x₀ + σ ε: of σ = 7/8 … 1/8, σ / (1 - σ) is 7, 3, 5/3, 1, 3/5, 1/3, 1/7; at first it is ∞
    guided = [step.eps_uncond is not None for step in drawn]
    assert guided == [False, False, True, True, True, True, False, False]


def test_an_interval_around_every_sigma_is_ordinary_guidance(pipe):
    assert torch.equal(outcome(pipe, guidance_interval=(0, math.inf)), outcome(pipe))


def test_an_interval_that_holds_nothing_is_no_guidance(pipe):
    far = outcome(pipe, guidance_interval=(1e6, 1e7))
    assert torch.equal(far, outcome(pipe, do_cfg=False))


# DeepCache


def told(unet: UNet, batch: int = 1, size: tuple[int, int] = (9, 12)) -> list[tuple]:
    """The arguments of five calls, as of a generation with guidance."""
    words = normal(2 * batch, 7, unet.config.context_width, seed=50)
    times = (999.0, 800.0, 600.0, 400.0, 200.0)
    latents = [normal(batch, 4, *size, seed=i).repeat(2, 1, 1, 1) for i in range(len(times))]
    return [(x, words, torch.tensor([t])) for x, t in zip(latents, times)]


CONFIGS = {
    "two levels": TINY.unet,
    "one level": UNetConfig(channels=(16,), attention=(1,), layers=2, heads=(2,), context_width=16, groups=8),
    "three levels": UNetConfig(
        channels=(16, 24, 32),
        attention=(1, 1, 0),
        layers=2,
        context_width=16,
        groups=8,
        linear_projection=True,
        heads=(2, 3, 4),
    ),
}


def cached_by_the_paper(unet: UNet, calls: list[tuple], every: int) -> list[torch.Tensor]:
    """DeepCache written out: U₂'s output is kept, D₁ and U₁ always run."""
    outputs: list[torch.Tensor] = []
    kept = torch.empty(0)
    for i, (latents, words, t) in enumerate(calls):
        given_ = Given(unet.time_embedding(t), words)
        pile = [unet.down[0](latents, given_)]
        if i % every == 0:
            x = pile[0]
            for row in unet.down[1:]:
                x = row(x, given_)
                pile.append(x)
            x = unet.middle(x, given_)
            for row in unet.up[:-1]:
                skip = pile.pop()
                x = row(torch.cat([x, skip], dim=1), given_._replace(size=pile[-1].shape[-2:]))
            kept = x
        x = unet.up[-1](torch.cat([kept, pile[0]], dim=1), given_)
        outputs.append(unet.conv_out(F.silu(unet.norm(x))))
    return outputs


@pytest.mark.parametrize("every", [1, 2, 3, 9])
@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_deepcache_is_what_the_paper_says(name, every):
    unet = randomized(UNet(CONFIGS[name]))
    calls = told(unet)
    cache = DeepCache(unet, every)
    for call, expected in zip(calls, cached_by_the_paper(unet, calls, every), strict=True):
        assert error(cache(*call), expected) < 1e-5


@torch.inference_mode()
def test_deepcache_of_every_call_is_the_network_to_the_bit():
    unet = randomized(UNet(TINY.unet))
    cache = DeepCache(unet, 1)
    assert all(torch.equal(cache(*call), unet(*call)) for call in told(unet))


@torch.inference_mode()
def test_deepcache_runs_the_inside_in_every_nth_step_only(pipe):
    inside: list[int] = []
    last: list[int] = []
    unet = pipe.models["diffusion"]
    unet.middle.register_forward_hook(lambda *_: inside.append(len(last)))
    unet.up[-1].register_forward_hook(lambda *_: last.append(0))
    steps(pipe, deepcache=3)
    assert len(last) == 8 and inside == [0, 3, 6]


@torch.inference_mode()
def test_deepcache_computes_anew_when_guidance_sets_in_and_not_when_it_ends():
    unet = randomized(UNet(TINY.unet))
    whole: list[int] = []
    unet.middle.register_forward_hook(lambda *call: whole.append(len(call[-1])))
    cache = DeepCache(unet, 9)
    latents, words, t = told(unet)[0]
    cache(latents[:1], words[:1], t)
    both = cache(latents, words, t)
    assert whole == [1, 2]
    alone = cache(latents[:1], words[:1], t)
    assert whole == [1, 2]  # the first half of what is kept
    assert error(alone, both[:1]) < 1e-5


def test_deepcache_leaves_nothing_behind_even_when_the_network_fails():
    unet = randomized(UNet(TINY.unet))
    with pytest.raises(RuntimeError):
        DeepCache(unet, 2)(torch.zeros(1, 5, 8, 8), normal(1, 7, 16), torch.tensor([1.0]))
    assert not unet.up[-1]._forward_pre_hooks


# Weights of 8 bits


def in_8_bits(layer: Any) -> Any:
    quantize_layer(layer := copy.deepcopy(layer))
    assert isinstance(layer, Int8Linear | Int8Conv2d)
    return layer


def exact(layer: nn.Linear | nn.Conv2d, x: torch.Tensor, conv: bool) -> torch.Tensor:
    """The layer on weights and inputs that are rounded by hand, in float64."""

    def rounded(x: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
        scale = x.double().abs().amax(axes, keepdim=True) / 127
        return torch.round(x.double() / scale) * scale

    bias = None if layer.bias is None else layer.bias.double()
    if not conv:
        return F.linear(rounded(x, (-1,)), rounded(layer.weight, (1,)), bias)
    assert isinstance(layer, nn.Conv2d)
    weight = rounded(layer.weight, (1, 2, 3))
    return F.conv2d(rounded(x, (1, 2, 3)), weight, bias, padding=layer.padding)


@pytest.mark.parametrize("vnni", [True, False])
@pytest.mark.parametrize("shape", [(3, 20), (2, 300, 20), (1, 1, 20)])
@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_a_linear_layer_computes_with_whole_numbers(vnni, shape, bias, monkeypatch):
    monkeypatch.setattr("reifusion.shortcuts.int8._suits", lambda x: vnni)
    layer = randomized(nn.Linear(20, 32, bias=bias))
    x = 3 * normal(*shape)
    out = in_8_bits(layer)(x)
    assert error(out, exact(layer, x, conv=False)) < (1e-5 if vnni else 0.02)
    assert error(out, layer(x)) < 0.03


@pytest.mark.parametrize("vnni", [True, False])
@pytest.mark.parametrize(("kernel", "size"), [(3, (7, 9)), (3, (1, 1)), (1, (7, 9)), (3, (40, 30))])
@torch.inference_mode()
def test_a_convolution_computes_with_whole_numbers(vnni, kernel, size, monkeypatch):
    monkeypatch.setattr("reifusion.shortcuts.int8._suits", lambda x: vnni)
    layer = randomized(nn.Conv2d(8, 16, kernel, padding=kernel // 2))
    x = normal(2, 8, *size) * torch.tensor([1.0, 50.0])[:, None, None, None]
    out = in_8_bits(layer)(x)
    assert error(out, exact(layer, x, conv=True)) < (1e-5 if vnni else 0.02)
    assert error(out[0], layer(x)[0]) < 0.03  # the second picture's scale is its own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_a_network_of_8_bits_is_smaller_and_almost_the_same(dtype):
    config = UNetConfig(channels=(64, 128), attention=(1, 1), layers=1, heads=(4, 4), context_width=512)
    unet = randomized(UNet(config)).to(dtype)
    call = normal(2, 4, 8, 8).to(dtype), normal(2, 7, 512).to(dtype), torch.tensor([500.0])
    before, weighed = unet(*call), sum(x.nbytes for x in unet.state_dict().values())
    quantize({"diffusion": unet})
    after = unet(*call)
    assert after.dtype == dtype
    assert 0 < error(after, before) < 0.1
    kinds = [type(module) for module in unet.modules()]
    assert Int8Linear in kinds and Int8Conv2d in kinds
    share = sum(x.nbytes for x in unet.state_dict().values()) / weighed
    assert share < (0.6 if dtype == torch.float32 else 0.8)  # norms and some layers stay


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plain", [True, False])
@torch.inference_mode()
def test_weights_kept_in_float8_are_the_rounded_ones(dtype, plain):
    config = UNetConfig(channels=(64, 128), attention=(1, 1), layers=1, heads=(4, 4), context_width=512)
    unet = randomized(UNet(config)).to(dtype)
    unet.middle[0].conv_1.weight[0, 0, 0, 0] = 1000.0  # more than float8 has
    if not plain:
        kernels.install({"diffusion": unet})
    rounded = copy.deepcopy(unet)
    for layer in rounded.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and layer is not rounded.down[0][0]:
            layer.weight.copy_(layer.weight.clamp(max=448).to(torch.float8_e4m3fn))
    call = normal(2, 4, 8, 8).to(dtype), normal(2, 7, 512).to(dtype), torch.tensor([500.0])
    weighed = sum(x.nbytes for x in unet.state_dict().values())
    store({"diffusion": unet, "decoder": nn.Linear(2, 2)})
    assert error(unet(*call), rounded(*call)) < (1e-5 if dtype == torch.float32 else 0.03)
    share = sum(x.nbytes for x in unet.state_dict().values()) / weighed
    assert share < (0.27 if dtype == torch.float32 else 0.53)
    again = pickle.loads(pickle.dumps(unet))
    assert torch.equal(again(*call), unet(*call)) and torch.equal(copy.deepcopy(unet)(*call), unet(*call))


def test_the_vae_and_norms_keep_their_weights_beside_float8():
    models = networks(SMALL)
    before = {name: copy.deepcopy(models[name].state_dict()) for name in ("encoder", "decoder")}
    store(models)
    for name, state in before.items():
        assert all(torch.equal(x, state[key]) for key, x in models[name].state_dict().items())
    assert isinstance(models["clip"].layers[0].linear_1, Fp8Linear)  # type: ignore[union-attr, index]
    assert models["clip"].get_parameter("norm.weight").dtype == torch.float32


def test_what_comes_after_float8_leaves_it_alone():
    models = networks(SMALL)
    store(models)
    layer = "lora_unet_mid_block_attentions_0_proj_in"
    lora = LoRA({layer: Update(torch.ones(1, 1), torch.ones(1, 1), 1.0)}, path="x.safetensors")
    with pytest.raises(ModelError, match=r"x\.safetensors comes too late: .* has weights of 8 bits"):
        apply(models, lora)
    before = copy.deepcopy(models["diffusion"].state_dict())
    quantize(models)
    assert all(torch.equal(x, before[key]) for key, x in models["diffusion"].state_dict().items())


def test_a_refiner_has_8_bits_as_well(monkeypatch):
    loaded: list[SimpleNamespace] = []

    def load(*_: Any, **__: Any) -> SimpleNamespace:
        loaded.append(SimpleNamespace(models=networks(SMALL), config=SMALL))
        return loaded[-1]

    monkeypatch.setattr("reifusion.api.load", load)
    monkeypatch.setattr("reifusion.families.sdxl.with_refiner", lambda pipe, refiner: pipe)
    monkeypatch.setattr("reifusion.settings.replace", lambda pipe, **_: pipe)
    Settings("a cat", refiner="refiner.safetensors", fp8=True).loaded("cpu")
    assert len(loaded) == 2
    for pipe in loaded:
        assert any(isinstance(layer, Fp8Linear) for layer in pipe.models["diffusion"].modules())


@torch.inference_mode()
def test_layers_of_short_sums_keep_their_weights():
    unet = randomized(UNet(TINY.unet))
    quantize({"diffusion": unet})
    assert isinstance(unet.middle[0].conv_1, nn.Conv2d)  # 9 · 32 terms
    config = UNetConfig(channels=(64,), attention=(1,), layers=1, heads=(4,), context_width=512)
    unet = randomized(UNet(config))
    quantize({"diffusion": unet})
    assert isinstance(unet.middle[0].conv_1, Int8Conv2d)  # 9 · 64 terms
    assert isinstance(unet.middle[1].layers[0].cross_attention.kv, Int8Linear)
    assert isinstance(unet.middle[1].layers[0].cross_attention.q, nn.Linear)
    assert isinstance(unet.time_embedding.linear_2, nn.Linear)  # what is not in a block stays


# On the command line


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    config = ModelConfig(
        **{
            **vars(TINY),
            "unet": UNetConfig(channels=(64,), attention=(1,), layers=1, heads=(2,), context_width=16),
        }
    )
    models: dict[str, nn.Module] = {
        "clip": randomized(CLIP(config.clip)),
        "encoder": randomized(Encoder(config.vae)),
        "decoder": randomized(Decoder(config.vae)),
        "diffusion": randomized(UNet(config.unet)),
    }
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    save(config, models, path, tokenizer=Tokenizer())
    return str(path)


@pytest.fixture
def draw(model, tmp_path, monkeypatch, capsys):
    """Draws by the command line -> its pixels and its settings."""
    monkeypatch.chdir(tmp_path)

    def draw(*arguments: object) -> tuple[Path, np.ndarray, dict]:
        code = cli.main(["generate", *map(str, arguments)])
        out, err = capsys.readouterr()
        assert (code, err) == (0, "")
        picture = Image.open(out.strip())
        return Path(out.strip()), np.array(picture), json.loads(picture.info["reifusion"])

    return draw


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        (["--guidance-interval", "0.3:5"], {"guidance_interval": [0.3, 5.0]}),
        (["--deepcache", 2], {"deepcache": 2}),
        (["--int8"], {"int8": True}),
        (["--fp8"], {"fp8": True}),
    ],
)
def test_a_shortcut_is_taken_remembered_and_given_up_again(draw, model, flags, kept):
    usual = ["--model", model, "--sampler", "ddim", "--steps", 4, "--seed", 1, "--dtype", "fp32"]
    _, plain, _ = draw("a cat", *usual)
    path, pixels, carried = draw("a cat", *usual, *flags)
    assert carried | kept == carried
    assert not np.array_equal(pixels, plain)
    assert np.array_equal(draw("--like", path)[1], pixels)
    off = ["--guidance-interval", "0:inf", "--deepcache", 1, "--no-int8", "--no-fp8"]
    assert np.array_equal(draw("--like", path, *off)[1], plain)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--guidance-interval", "5"], "a guidance interval is from:to, like 0.3:5, not '5'"),
        (["--guidance-interval", "a:b"], "a guidance interval is from:to, like 0.3:5, not 'a:b'"),
        (["--guidance-interval", "5:1"], "guidance_interval must begin below its end, and not 5 to 1"),
        (["--deepcache", "0"], "deepcache must be at least 1, not 0"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_code_2(capsys, flags, message):
    assert cli.main(["generate", "a cat", *flags]) == 2
    assert capsys.readouterr() == ("", f"reifusion: {message}\n")


def test_the_shortcuts_are_arguments_of_generate(pipe):
    usual: dict[str, Any] = {"seed": 1, "sampler": "ddim", "steps": 4, "progress": False}
    wish: dict[str, Any] = {"guidance_interval": (0.3, 5)}
    picture = reifusion.generate("a cat", models=pipe, deepcache=2, **usual, **wish)
    again = deepcached(pipe, 2).generate("a cat", **usual, **wish)
    assert np.array_equal(np.array(picture), np.array(again))
    assert not np.array_equal(np.array(picture), np.array(pipe.generate("a cat", **usual)))
