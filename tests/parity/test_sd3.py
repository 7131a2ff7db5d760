"""Compares Stable Diffusion 3 with diffusers's pipeline: text stage, files and pictures."""

from __future__ import annotations

import inspect
import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import reifusion
from reifusion import cli, kernels, weights
from reifusion.families.sd3 import (
    PRESETS,
    SD3Config,
    SkipLayers,
    StableDiffusion3,
    Tokenizers,
    build,
    warn_of_length,
)
from reifusion.families.sd3_files import SD3, from_shapes
from reifusion.families.unigram import Unigram
from reifusion.model.ddpm import randn
from reifusion.model.model_converter import convert
from reifusion.model.model_loader import state_dict
from reifusion.model.tensors import ModelError
from reifusion.model.tokenizer import Tokenizer
from reifusion.shortcuts.deepcache import deepcached
from reifusion.shortcuts.int8 import quantize
from tests.parity.test_sd3_networks import exact_norms
from tests.tiny import assert_same_networks, native_state, random_networks
from tests.tiny_sd3 import PIECES, TINY, networks, tokenizers

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

PROMPTS, NEGATIVES = ["a cat", "dog dog cat"], ["cog", ""]


def test_of_long_prompts_t5_says_what_it_reads() -> None:
    tokenizer = tokenizers()
    room = t5_of(tokenizer).length - 1
    with pytest.warns(UserWarning, match="T5 reads the prompt to its end"):
        warn_of_length(["a cat " * 12], tokenizer, t5_of(tokenizer))
    with pytest.warns(UserWarning, match=f"T5 has room for {room} tokens and the prompt has "):
        warn_of_length(["a cat " * 300], tokenizer, t5_of(tokenizer))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_length(["a cat"], tokenizer, t5_of(tokenizer))


def t5_of(tokenizer: Tokenizer) -> Unigram:
    assert isinstance(tokenizer, Tokenizers) and tokenizer.t5 is not None
    return tokenizer.t5


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    return networks()


@pytest.fixture(scope="module")
def folder(models, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sd3") / "tiny"
    weights.save(TINY, models, path, "diffusers", tokenizers())
    return path


@pytest.fixture(scope="module")
def theirs(folder):
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def ours(folder) -> StableDiffusion3:
    pipe = reifusion.load(folder, "cpu", "fp32")
    assert isinstance(pipe, StableDiffusion3)
    return pipe


def theirs_encode(pipe: Any, prompts: list[str], **settings: Any) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        words, _, pooled, _ = pipe.encode_prompt(
            prompts, prompts, prompts, do_classifier_free_guidance=False, **settings
        )
    return words, pooled


@pytest.mark.parametrize("skip", [0, 1])
def test_words_and_pooled_vector_are_the_reference_s(ours, theirs, skip):
    words, pooled = theirs_encode(theirs, PROMPTS, clip_skip=skip)
    made = ours.encode_text(PROMPTS, clip_skip=skip)
    assert made.shape == (2, 16 + 256 + 1, 200)
    torch.testing.assert_close(made[:, :-1], words, rtol=0, atol=1e-4 * words.abs().max().item())
    torch.testing.assert_close(made[:, -1, :160], pooled, rtol=0, atol=1e-4 * pooled.abs().max().item())
    assert made[:, -1, 160:].eq(0).all()


def pictures_of(theirs: Any, noise: Tensor, **settings: Any) -> np.ndarray:
    drawn = theirs(
        PROMPTS, negative_prompt=NEGATIVES, latents=noise, output_type="np", **settings
    )  # fmt: skip
    return (drawn.images * 255).round()


def same_share(ours: list[Image.Image], theirs: np.ndarray) -> float:
    """The share of the pixels' numbers that are within 1 of 255."""
    return float((np.abs(np.stack([np.asarray(one, float) for one in ours]) - theirs) <= 1).mean())


@pytest.mark.parametrize("width, height, cfg, steps", [(48, 32, 4.5, 6), (20, 44, 7.0, 3), (32, 32, 1.0, 4)])
def test_pictures_are_the_reference_s(ours, theirs, width, height, cfg, steps):
    noise = randn((2, 16, height // 2, width // 2), [torch.Generator().manual_seed(k) for k in (7, 8)])
    expected = pictures_of(
        theirs, noise, width=width, height=height, guidance_scale=cfg, num_inference_steps=steps
    )
    assert expected.std() > 5, "the picture says nothing"
    drawn = ours.generate(
        PROMPTS, NEGATIVES, seed=7, size=(width, height), cfg=cfg, steps=steps, progress=False
    )
    assert same_share(drawn, expected) >= 0.999


class Exact(diffusers.FlowMatchEulerDiscreteScheduler):  # type: ignore[name-defined]
    """Theirs computes in float32. This one is given σ in float64, and takes Euler's step in it."""

    given: Tensor

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        super().set_timesteps(*args, **kwargs)
        self.sigmas, self.timesteps = self.given, self.given[:-1] * 1000

    def step(self, output: Tensor, t: Any, x: Tensor, *_: Any, **__: Any) -> tuple[Tensor]:
        i = self.timesteps.tolist().index(t)
        return (x + (self.sigmas[i + 1] - self.sigmas[i]) * output,)


def exact_waves(t: Tensor) -> Tensor:
    """Times as waves in float64, where diffusers has float32."""
    angles = np.outer(t.double().numpy(), 10_000 ** (-np.arange(128) / 128))
    return torch.from_numpy(np.concatenate([np.cos(angles), np.sin(angles)], axis=1))


def test_words_and_loop_agree_to_the_ninth_digit_in_float64(folder):
    mine = reifusion.load(folder, "cpu", "fp64")
    theirs = diffusers.StableDiffusion3Pipeline.from_pretrained(folder, torch_dtype=torch.float64)
    theirs.set_progress_bar_config(disable=True)
    exact_norms(theirs.transformer)
    exact_norms(theirs.text_encoder_3)
    theirs.transformer.time_text_embed.time_proj.forward = exact_waves
    steps = list(mine.denoise(PROMPTS, NEGATIVES, seed=7, steps=4, size=(48, 32), cfg=4.5))
    theirs.scheduler = Exact.from_config(theirs.scheduler.config)
    theirs.scheduler.given = torch.tensor([*(step.t / 1000 for step in steps), 0.0], dtype=torch.float64)
    noise = randn((2, 16, 16, 24), [torch.Generator().manual_seed(k) for k in (7, 8)]).double()
    expected = theirs(
        PROMPTS, negative_prompt=NEGATIVES, latents=noise, width=48, height=32, guidance_scale=4.5,
        num_inference_steps=4, output_type="latent",
    ).images  # fmt: skip
    assert expected.dtype == torch.float64 and expected.std() > 0.1
    limit = 1e-9 * expected.abs().max().item()
    torch.testing.assert_close(steps[-1].latents, expected, rtol=0, atol=limit)


def test_guidance_by_blocks_that_are_left_out_is_the_reference_s(ours, theirs):
    noise = randn((2, 16, 16, 24), [torch.Generator().manual_seed(k) for k in (7, 8)])
    asked = {"width": 48, "height": 32, "guidance_scale": 4.5, "num_inference_steps": 8}
    expected = pictures_of(
        theirs, noise, **asked, skip_guidance_layers=[0, 2], skip_layer_guidance_scale=2.0,
        skip_layer_guidance_start=0.2, skip_layer_guidance_stop=0.8,
    )  # fmt: skip
    skip = SkipLayers(blocks=(0, 2), scale=2.0, start=0.2, stop=0.8)
    settings = {"seed": 7, "size": (48, 32), "cfg": 4.5, "steps": 8, "progress": False}
    drawn = replace(ours, skip=skip).generate(PROMPTS, NEGATIVES, **settings)
    assert same_share(drawn, expected) >= 0.999
    assert same_share(ours.generate(PROMPTS, NEGATIVES, **settings), expected) < 0.9


def test_without_t5_its_words_are_zeros_as_in_the_reference(models, tmp_path):
    config = replace(TINY, t5=None)
    without = {name: network for name, network in models.items() if name != "t5"}
    weights.save(config, without, tmp_path / "tiny", "diffusers", Tokenizer(context_length=16))
    index = json.loads((tmp_path / "tiny" / "model_index.json").read_text())
    assert index["text_encoder_3"] == index["tokenizer_3"] == [None, None]
    pipe = reifusion.load(tmp_path / "tiny", "cpu", "fp32")
    theirs = diffusers.StableDiffusion3Pipeline.from_pretrained(
        tmp_path / "tiny", text_encoder_3=None, tokenizer_3=None
    )
    theirs.set_progress_bar_config(disable=True)
    words, _ = theirs_encode(theirs, PROMPTS)
    made = pipe.encode_text(PROMPTS)
    assert made[:, 16:272].eq(0).all() and words[:, 16:].eq(0).all()
    noise = randn((2, 16, 16, 16), [torch.Generator().manual_seed(k) for k in (3, 4)])
    expected = pictures_of(theirs, noise, width=32, height=32, guidance_scale=5, num_inference_steps=3)
    drawn = pipe.generate(PROMPTS, NEGATIVES, seed=3, size=(32, 32), cfg=5, steps=3, progress=False)
    assert same_share(drawn, expected) >= 0.999


# Files


def test_a_folder_that_diffusers_wrote_gives_the_same_networks_and_is_used_up(theirs, models, tmp_path):
    theirs.save_pretrained(tmp_path / "theirs")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config, loaded, tokenizer = weights.load(tmp_path / "theirs")
    assert weights.info(tmp_path / "theirs").unused == ()
    assert config == replace(TINY, name="theirs", steps=28)
    assert_same_networks(models, loaded)
    assert t5_of(tokenizer).encode("a cat") == t5_of(tokenizers()).encode("a cat")


@pytest.mark.parametrize("to", ["native", "compvis", "diffusers"])
def test_every_format_gives_everything_back_to_the_bit(models, to, tmp_path):
    path = tmp_path / ("sd3" if to == "diffusers" else "sd3.safetensors")
    weights.save(TINY, models, path, to, tokenizers())
    config, loaded, tokenizer = weights.load(path)
    assert_same_networks(models, loaded)
    if to != "diffusers":
        assert config == TINY and t5_of(tokenizer).pieces == t5_of(tokenizers()).pieces
    assert weights.info(path).format == to and weights.info(path).unused == ()


@pytest.fixture
def single(models, tmp_path) -> Path:
    """A single file as Stability writes it: without a header, and without T5's tokenizer."""
    path = tmp_path / "sd3.safetensors"
    weights.save(TINY, models, path, "compvis", tokenizers())
    save_file(load_file(path), path)
    return path


def test_the_names_in_a_single_file_are_those_that_diffusers_reads(models, single, theirs):
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    names = load_file(single)
    start = "model.diffusion_model."
    converted = convert_sd3_transformer_checkpoint_to_diffusers(
        {name: x for name, x in names.items() if name.startswith(start)}
    )
    expected = theirs.transformer.state_dict()
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[name], x) for name, x in expected.items())
    t5 = {name: x for name, x in names.items() if name.startswith("text_encoders.t5xxl.transformer.")}
    whole = theirs.text_encoder_3.state_dict()
    assert {name.removeprefix("text_encoders.t5xxl.transformer.") for name in t5} == {
        name for name in whole if "embed_tokens" not in name
    }
    clip = "text_encoders.clip_g.transformer."
    assert all(torch.equal(names[clip + name], x) for name, x in theirs.text_encoder_2.state_dict().items())


def test_a_single_file_is_known_by_its_shapes(models, single):
    (single.parent / "spiece.model").write_bytes(spiece())
    config, loaded, tokenizer = weights.load(single)
    assert_same_networks(models, loaded)
    assert isinstance(config, SD3Config)
    assert config.unet == TINY.unet and config.t5 == TINY.t5 and config.vae == TINY.vae
    assert (config.clip, config.clip_2, config.pooled) == (TINY.clip, TINY.clip_2, TINY.pooled)
    assert config.schedule == TINY.schedule
    assert t5_of(tokenizer).pieces[: len(PIECES)] == t5_of(tokenizers()).pieces


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_published_models_are_known_by_their_shapes(preset):
    shapes = {name: x.shape for name, x in state_dict(build(preset)).items()}
    assert from_shapes(shapes).config == preset
    without = {name: shape for name, shape in shapes.items() if not name.startswith("t5.")}
    assert from_shapes(without).config == replace(preset, t5=None)


def test_eight_bits_a_number_are_read_back_nearly_the_same(models, tmp_path):
    path = tmp_path / "eight.safetensors"
    weights.save(TINY, models, path, "native", tokenizers(), dtype=torch.int8)
    _, loaded, _ = weights.load(path, dtype=torch.float32)
    assert path.stat().st_size < 0.3 * sum(4 * x.numel() for x in native_state(models).values())
    for (name, x), y in zip(native_state(models).items(), native_state(loaded).values(), strict=True):
        assert (x - y).norm() <= 0.02 * x.norm(), name


def spiece() -> bytes:
    """A `spiece.model` with PIECES."""
    pb2: Any = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    model = pb2.ModelProto()
    for i, piece in enumerate(PIECES):
        model.pieces.add(piece=piece, score=-1.5 * i)
    return model.SerializeToString()


@pytest.mark.parametrize("name", ["sd3.5-large-turbo", "sd3.5_large_turbo.safetensors"])
def test_turbo_is_known_by_its_name(models, name, tmp_path):
    to = "native" if name.endswith("safetensors") else "diffusers"
    weights.save(TINY, models, tmp_path / name, to, tokenizers())
    for config in weights.find_config(tmp_path / name), weights.load(tmp_path / name)[0]:
        assert (config.steps, config.cfg, config.sampler) == (4, 1.0, "flow")


def test_without_t5_s_tokenizer_t5_is_left_out_with_a_warning(single):
    with pytest.warns(UserWarning, match=r"T5 is left out, until its spiece\.model lies beside"):
        _, _, tokenizer = weights.load(single)
    assert isinstance(tokenizer, Tokenizers) and tokenizer.t5 is None


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("place", [".", "text_encoders"])
def test_text_encoders_beside_the_file_are_found(models, single, place, bare):
    tensors, rest = load_file(single), {}
    for part in "clip_l", "clip_g", "t5xxl":
        start = f"text_encoders.{part}.transformer."
        own = {name.removeprefix(start): x for name, x in tensors.items() if name.startswith(start)}
        (single.parent / place).mkdir(exist_ok=True)
        save_file(own, single.parent / place / f"{part}.safetensors")
    for name, x in tensors.items():
        if not name.startswith("text_encoders."):
            rest[name.removeprefix("model.diffusion_model.") if bare else name] = x
    save_file(rest, single)
    with pytest.warns(UserWarning, match="T5 is left out"):
        _, loaded, _ = weights.load(single)
    assert_same_networks(models, loaded)
    shutil.rmtree(single.parent / "text_encoders", ignore_errors=True)


def test_a_clip_l_without_a_projection_has_the_identity(models, single):
    tensors = load_file(single)
    del tensors["text_encoders.clip_l.transformer.text_projection.weight"]
    tensors["text_encoders.t5xxl.transformer.encoder.embed_tokens.weight"] = tensors[
        "text_encoders.t5xxl.transformer.shared.weight"
    ].clone()
    save_file(tensors, single)
    with pytest.warns(UserWarning, match="T5 is left out"):
        _, loaded, _ = weights.load(single)
    assert torch.equal(loaded["clip"].get_parameter("projection.weight"), torch.eye(64))
    assert weights.info(single).unused == ()


def test_a_transformer_is_taken_from_another_file(folder, tmp_path, capsys):
    other = random_networks(TINY)["diffusion"]
    for x in other.parameters():
        x.data *= 2
    model = tmp_path / "other"
    weights.save(TINY, {**networks(), "diffusion": other}, model, "diffusers", tokenizers())
    save_file(other.state_dict(), tmp_path / "ours.safetensors")
    start, names = (
        "model.diffusion_model.",
        convert(native_state({"diffusion": other}), "compvis", TINY, SD3.layout),
    )
    stability = {name.removeprefix(start): x.contiguous() for name, x in names.items()}
    save_file(stability, tmp_path / "bare.safetensors")
    for path in (
        tmp_path / "ours.safetensors",
        tmp_path / "bare.safetensors",
        next((model / "transformer").glob("*.safetensors")),
        model / "transformer",
        model,
    ):
        _, loaded, _ = weights.load(folder, changes=weights.Changes(unet=path))
        assert_same_networks({"diffusion": loaded["diffusion"]}, {"diffusion": other})
        if path.is_file():
            assert cli.main(["info", str(path)]) == 0
            said = capsys.readouterr().out
            assert "a transformer alone" in said and f"{sum(x.numel() for x in other.parameters()):,}" in said


def test_a_file_without_text_encoders_gets_one_sentence(single):
    tensors = {name: x for name, x in load_file(single).items() if not name.startswith("text_encoders.")}
    save_file(tensors, single)
    with pytest.raises(ModelError, match="there are no tensors for the clip"):
        weights.load(single)


@pytest.mark.parametrize(
    "part, key, value, says",
    [
        ("scheduler", "use_dynamic_shifting", True, "use_dynamic_shifting = True, which is not built in"),
        ("scheduler", "_class_name", "DDIMScheduler", "its scheduler is 'DDIMScheduler'"),
        ("transformer", "qk_norm", "layer_norm", "qk_norm = 'layer_norm', which does not fit"),
        ("transformer", "pooled_projection_dim", 1, "pooled_projection_dim = 1, which does not fit"),
        ("text_encoder_3", "feed_forward_proj", "relu", "feed_forward_proj = 'relu', which is not built in"),
        ("vae", "use_post_quant_conv", True, "at one of its two ends alone"),
        ("vae", "latents_std", [2.0], r"latents_std = \[2.0\], which is not built in"),
    ],
)
def test_what_is_not_built_in_is_refused_in_one_sentence(folder, tmp_path, part, key, value, says):
    shutil.copytree(folder, tmp_path / "copy")
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    file = tmp_path / "copy" / part / name
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(ModelError, match=says):
        weights.load(tmp_path / "copy")


def test_the_second_tokenizer_pads_as_in_transformers_where_nothing_says_how(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    config = tmp_path / "copy" / "tokenizer_2" / "tokenizer_config.json"
    said = json.loads(config.read_text())
    found: Any = weights.find_config(tmp_path / "copy")
    assert found.pad_2 == said.pop("pad_token") == "!"
    config.write_text(json.dumps(said))
    (config.parent / "special_tokens_map.json").unlink()
    theirs = transformers.CLIPTokenizer.from_pretrained(config.parent)
    found = weights.find_config(tmp_path / "copy")
    assert found.pad_2 == theirs.pad_token == "<|endoftext|>"


# Drawing from a picture


def test_a_picture_drawn_from_a_picture_is_the_reference_s(ours, theirs):
    other = diffusers.StableDiffusion3Img2ImgPipeline(
        **{x: y for x, y in theirs.components.items() if x not in ("image_encoder", "feature_extractor")}
    )
    other.set_progress_bar_config(disable=True)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 48, 3), np.uint8))
    noise = randn((1, 16, 16, 24), [torch.Generator().manual_seed(5)])
    pixels = torch.tensor(np.asarray(picture)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        z = theirs.vae.encode(pixels).latent_dist.mean
    start = (z - TINY.vae.shift) * TINY.vae.scale_factor
    other.scheduler.set_timesteps(6)
    timesteps, _ = other.get_timesteps(6, 0.55, "cpu")
    noisy = other.scheduler.scale_noise(start, timesteps[:1], noise)
    other.prepare_latents = lambda *args, **kwargs: noisy  # it would draw its own noise
    expected = other(
        "a cat", image=picture, negative_prompt="dog", strength=0.55, num_inference_steps=6,
        guidance_scale=4.0, output_type="np", width=48, height=32,
    ).images  # fmt: skip
    drawn = ours.generate(
        "a cat",
        "dog",
        init_image=picture,
        size=(48, 32),
        strength=0.55,
        steps=6,
        cfg=4.0,
        seed=5,
        progress=False,
    )
    assert same_share([drawn], (expected * 255).round()) >= 0.999


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_inpainting_is_the_reference_s(ours, theirs, strength):
    known = {x: y for x, y in theirs.components.items() if x not in ("image_encoder", "feature_extractor")}
    other = diffusers.StableDiffusion3InpaintPipeline(**known)
    other.set_progress_bar_config(disable=True)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 48, 3), np.uint8))
    mask = Image.new("L", (48, 32), 0)
    mask.paste(255, (16, 8, 40, 24))
    noise = randn((2, 16, 16, 24), [torch.Generator().manual_seed(k) for k in (7, 8)])

    def encoded(image: Tensor, generator: Any) -> Tensor:
        return (theirs.vae.encode(image).latent_dist.mean - TINY.vae.shift) * TINY.vae.scale_factor

    def begin(*args: Any, **settings: Any) -> tuple[Tensor, Tensor, Tensor]:
        start = encoded(settings["image"].float(), None).expand(2, -1, -1, -1)
        noisy = other.scheduler.scale_noise(start, settings["timestep"], noise)
        return noise if settings["is_strength_max"] else noisy, noise, start

    prepared = other.prepare_latents
    names = list(inspect.signature(prepared).parameters)
    other.prepare_latents = lambda *args, **settings: begin(**dict(zip(names, args)), **settings)
    other._encode_vae_image = encoded
    told: dict[str, Any] = {"strength": strength, "num_inference_steps": 5, "guidance_scale": 4.5}
    expected = other(
        PROMPTS, negative_prompt=NEGATIVES, image=picture, mask_image=mask, width=48, height=32,
        output_type="latent", **told,
    ).images  # fmt: skip
    asked: dict[str, Any] = {"init_image": picture, "mask": mask, "size": (48, 32), "strength": strength}
    *_, last = ours.denoise(PROMPTS, NEGATIVES, seed=7, steps=5, cfg=4.5, **asked)
    assert expected.std() > 0.1
    torch.testing.assert_close(last.latents, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def test_inpainting_keeps_what_is_black_in_the_mask_and_draws_the_rest(ours):
    picture = Image.new("RGB", (32, 32), (200, 40, 90))
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (16, 0, 32, 32))
    drawn = np.asarray(
        ours.generate(
            "a cat",
            init_image=picture,
            mask=mask,
            size=(32, 32),
            strength=1.0,
            steps=3,
            seed=1,
            progress=False,
        )
    )
    assert (drawn[:, :16] == (200, 40, 90)).all() and (drawn[:, 20:] != (200, 40, 90)).any()


# Speed


def test_fast_forms_change_nothing_but_rounding_and_are_taken_out(models):
    config = replace(TINY.unet, width=1024, heads=16, layers=2)  # wide enough for weights of 8 bits
    network = random_networks(replace(TINY, unet=config))["diffusion"]
    inputs = (
        torch.randn(2, 16, 8, 12, generator=torch.Generator().manual_seed(0)),
        torch.randn(2, 9, 200, generator=torch.Generator().manual_seed(1)),
        torch.tensor([500.0]),
        torch.randn(2, 160, generator=torch.Generator().manual_seed(2)),
    )
    with torch.inference_mode():
        expected = network(*inputs)
        for change, within in (kernels.install, 1e-5), (kernels.uninstall, 0.0), (quantize, 0.05):
            change({"diffusion": network})
            made = network(*inputs)
            torch.testing.assert_close(made, expected, rtol=0, atol=within * expected.abs().max().item())
    assert not torch.equal(made, expected), "nothing was given 8 bits"


def test_deepcache_is_refused_in_one_sentence(ours):
    with pytest.raises(ValueError, match="deepcache is for models with a U-Net"):
        deepcached(ours, 2)
