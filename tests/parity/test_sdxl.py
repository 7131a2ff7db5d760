"""Stable Diffusion XL: networks, pictures and files agree with diffusers's."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import shutil
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import reifusion
from reifusion import cli
from reifusion.api import load as load_pipe
from reifusion.explain.steer import rewritten
from reifusion.explain.words import watch
from reifusion.families import few_steps
from reifusion.families.sdxl import BASE, REFINER, SSD_1B, VEGA, SDXLConfig, StableDiffusionXL, build
from reifusion.families.sdxl_files import SDXL, to_diffusers
from reifusion.families.sdxl_unet import tell
from reifusion.model.ask import ask
from reifusion.model.config import SD15
from reifusion.model.ddpm import randn
from reifusion.model.model_converter import convert, load_from_standard_weights, match, rules
from reifusion.model.model_loader import preload_models_from_standard_weights, state_dict
from reifusion.model.pipeline import StableDiffusion
from reifusion.model.samplers import EulerAncestralSampler
from reifusion.model.tensors import ModelError
from reifusion.settings import Settings
from reifusion.weights import Changes, find_config, load, save
from reifusion.weights.lora import apply, load_lora, places, remove
from reifusion.weights.lora_tools import extract
from reifusion.weights.lora_tools import write as write_lora
from tests.marks import often
from tests.tiny import WORDS, random_networks
from tests.tiny_sdxl import TINY, TINY_REFINER

os.environ.setdefault("HF_HUB_OFFLINE", "1")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

# As SSD-1B, with uneven depths on the way up; and as Segmind Vega. Neither has attention in the middle.
TINY_SSD = replace(TINY, name="tiny-ssd", unet=replace(TINY.unet, middle_attention=0, up=(1, 3, 0, 0)))
TINY_VEGA = replace(TINY, name="tiny-vega", unet=replace(TINY.unet, middle_attention=0, attention=(0, 1)))
PROMPTS, SEED = ["a cat!", "a dog & a cat"], 3


def write(config: SDXLConfig, path: Path, to: str = "diffusers") -> Path:
    save(config, random_networks(config), path, to, WORDS)
    return path


def read(folder: Path, kind: str = "StableDiffusionXLPipeline", dtype: torch.dtype = torch.float32) -> Any:
    """Opens a folder with diffusers's pipeline; any tensor that does not fit is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pipe = getattr(diffusers, kind).from_pretrained(folder, local_files_only=True, torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write(TINY, tmp_path_factory.mktemp("model") / "tiny-xl")


@pytest.fixture(scope="module")
def refiner(tmp_path_factory) -> Path:
    return write(TINY_REFINER, tmp_path_factory.mktemp("model") / "tiny-refiner")


@pytest.fixture(scope="module")
def ssd(tmp_path_factory) -> Path:
    return write(TINY_SSD, tmp_path_factory.mktemp("model") / "tiny-ssd")


def close(ours: torch.Tensor, theirs: torch.Tensor, limit: float) -> bool:
    assert theirs.std() > 0.01 and ours.shape == theirs.shape
    return bool((ours - theirs).abs().max() <= limit * theirs.abs().max())


# Networks


@torch.inference_mode()
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
@pytest.mark.parametrize("clip_skip", [0, 1])
def test_both_encoders_and_the_whole_text_are_those_of_diffusers(base, dtype, limit, clip_skip):
    ours = load_pipe(base, "cpu", dtype).encode_text(PROMPTS, clip_skip)
    theirs = read(base, dtype=dtype)
    words, _, whole, _ = theirs.encode_prompt(
        PROMPTS, do_classifier_free_guidance=False, clip_skip=clip_skip or None
    )
    assert ours.shape == (2, 17, 56)
    assert close(ours[:, :16], words, limit)
    assert close(ours[:, 16, :20], whole, limit)
    assert not ours[:, 16, 20:].any()


@torch.inference_mode()
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
def test_the_refiner_reads_as_in_diffusers(refiner, dtype, limit):
    ours = load_pipe(refiner, "cpu", dtype).encode_text(PROMPTS)
    theirs = read(refiner, "StableDiffusionXLImg2ImgPipeline", dtype)
    words, _, whole, _ = theirs.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    assert ours.shape == (2, 18, 32)
    assert close(ours[:, :16], words, limit) and close(ours[:, 16, :20], whole, limit)


@torch.inference_mode()
@pytest.mark.parametrize("config", [TINY, TINY_REFINER, TINY_SSD, TINY_VEGA], ids=lambda config: config.name)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
def test_the_u_net_is_that_of_diffusers(config, dtype, limit, tmp_path):
    folder = write(config, tmp_path / "model")
    unet = load(folder, dtype=dtype)[1]["diffusion"]
    theirs = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=dtype)
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    x, words, whole = drawn(2, 4, 9, 14), drawn(2, 7, config.unet.context_width), drawn(2, 20)
    numbers = torch.tensor([[1024.0, 768, 0, 64, 512, 640], [96, 1000, 8, 0, 88, 2056]])[:, : config.numbers]
    t = torch.tensor([7, 801])
    told = {"text_embeds": whole, "time_ids": numbers}
    expected = theirs(x, t, words, added_cond_kwargs=told).sample
    assert close(unet(x, words, t, tell(whole, numbers, 8)), expected, limit)
    other = unet(x, words, t, tell(whole, numbers + 100, 8))
    assert not close(other, expected, 10 * limit)  # it matters


# Pictures


def draw(pipe: StableDiffusion, **settings: Any) -> np.ndarray:
    pictures = pipe.generate(PROMPTS, seed=SEED, progress=False, **settings)
    assert isinstance(pictures, list)
    return np.stack([np.array(picture) for picture in pictures]).astype(int)


def draw_theirs(pipe: Any, **settings: Any) -> np.ndarray:
    drawn = pipe(PROMPTS, output_type="np", **settings).images
    return (drawn * 255).round().astype(int)


def noise(width: int, height: int) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(SEED + k) for k in range(2)]
    return randn((2, 4, height // 4, width // 4), generators)


def assert_same(drawn: np.ndarray, expected: np.ndarray) -> None:
    assert drawn.shape == expected.shape
    assert expected.std() > 5  # the picture is not empty
    assert (np.abs(drawn - expected) <= 1).mean() >= 0.999


@pytest.mark.parametrize(
    ("width", "height", "negative"), [(64, 64, None), (72, 40, None), (72, 40, ""), (40, 72, "a dog")]
)
def test_the_picture_is_that_of_diffusers(base, width, height, negative):
    ours, theirs = load_pipe(base, "cpu", "fp32"), read(base)
    assert type(theirs.scheduler) is diffusers.EulerDiscreteScheduler
    drawn = draw(ours, width=width, height=height, steps=5, negative=negative)
    told = None if negative is None else [negative] * 2
    expected = draw_theirs(
        theirs,
        negative_prompt=told,
        latents=noise(width, height),
        width=width,
        height=height,
        num_inference_steps=5,
        guidance_scale=5.0,
    )
    assert_same(drawn, expected)


def test_no_negative_prompt_is_not_an_empty_one(base):
    pipe = load_pipe(base, "cpu", "fp32")
    without, empty = draw(pipe, steps=3), draw(pipe, steps=3, negative="")
    assert np.abs(without - empty).max() > 5


@pytest.mark.parametrize(("width", "height", "strength"), [(64, 64, 0.3), (40, 72, 0.8)])
def test_the_refiner_draws_over_a_picture_as_in_diffusers(refiner, width, height, strength):
    ours, theirs = load_pipe(refiner, "cpu", "fp32"), read(refiner, "StableDiffusionXLImg2ImgPipeline")
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 255, (height, width, 3), "uint8"))
    drawn = draw(ours, init_image=picture, strength=strength, steps=7, width=width, height=height)
    give(theirs, noise(width, height))
    told = {"negative_prompt": [""] * 2, "strength": strength, "num_inference_steps": 7}
    expected = draw_theirs(theirs, image=[picture] * 2, guidance_scale=5.0, **told)
    assert_same(drawn, expected)


def give(pipe: Any, noise: torch.Tensor) -> None:
    """Makes an image-to-image pipeline of diffusers begin with this noise and with the VAE's mean."""
    pipe.prepare_latents = lambda image, t, *_, **__: pipe.scheduler.add_noise(
        pipe.vae.encode(image).latent_dist.mean * pipe.vae.config.scaling_factor, noise, t
    )


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_base_and_refiner_together_draw_as_in_diffusers(base, refiner, share):
    other = load_pipe(refiner, "cpu", "fp32")
    ours = replace(xl(base), refiner=other, share=share)
    drawn = draw(ours, steps=5)
    told = {"num_inference_steps": 5, "guidance_scale": 5.0}
    first, second = read(base), read(refiner, "StableDiffusionXLImg2ImgPipeline")
    second.vae = first.vae
    latents = first(PROMPTS, latents=noise(64, 64), denoising_end=share, output_type="latent", **told).images
    expected = draw_theirs(second, image=latents, denoising_start=share, **told)
    assert_same(drawn, expected)
    with pytest.raises(ValueError, match=r"of 3 steps, a share of 0\.01 leaves one of them none"):
        draw(replace(ours, share=0.01), steps=3)


@pytest.mark.parametrize("sampler", ["heun", "pndm", "dpm2"])
def test_samplers_of_several_calls_are_refused_for_base_and_refiner(base, refiner, sampler):
    pipe = replace(xl(base), refiner=load_pipe(refiner, "cpu", "fp32"))
    with pytest.raises(ValueError, match=f"calls the network once in a step, like euler, and not {sampler}"):
        draw(pipe, steps=5, sampler=sampler)


@pytest.mark.parametrize("schedule", [None, "ddim_uniform"])
def test_the_refiner_goes_on_where_the_base_has_stopped(base, refiner, schedule, monkeypatch):
    """In the timesteps and in the count of steps; and no noise comes twice."""
    pipe = replace(xl(base), refiner=load_pipe(refiner, "cpu", "fp32"))
    drawn: list[torch.Tensor] = []

    def kept(self: Any, x: torch.Tensor) -> torch.Tensor:
        drawn.append(noise_of(self, x))
        return drawn[-1]

    ended = 0

    def finish(self: Any) -> None:
        nonlocal ended
        ended += 1

    monkeypatch.setattr("reifusion.model.finite.Watch.finish", finish)
    noise_of = EulerAncestralSampler._noise
    monkeypatch.setattr(EulerAncestralSampler, "_noise", kept)
    asked: dict[str, Any] = {"steps": 30, "schedule": schedule, "sampler": "euler_a", "seed": SEED}
    both = [(step.t, step.index, step.total) for step in pipe.denoise("a cat", **asked)]
    ours, drawn[:] = [*drawn], []
    assert both == [(step.t, step.index, step.total) for step in xl(base).denoise("a cat", **asked)]
    assert ended == 2  # the refiner's last steps are judged, and so are those of the base drawn alone
    assert all(map(torch.equal, ours[:20], drawn))
    assert len({noise.sum().item() for noise in ours}) == len(ours)


def test_what_a_mask_keeps_is_under_the_same_noise_for_both(base, refiner):
    other = load_pipe(refiner, "cpu", "fp32")
    pipe = replace(xl(base), refiner=other)
    other.models["encoder"] = pipe.models["encoder"]
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    asked: dict[str, Any] = {
        "steps": 10,
        "init_image": Image.new("RGB", (64, 64), "teal"),
        "mask": mask,
        "seed": SEED,
    }
    steps = [step.x_t[:, :, :, -8:] for step in pipe.denoise("a cat", strength=1.0, **asked)]
    alone = [step.x_t[:, :, :, -8:] for step in xl(base).denoise("a cat", strength=1.0, **asked)]
    assert all(map(torch.equal, steps, alone))


def xl(folder: Path) -> StableDiffusionXL:
    pipe = load_pipe(folder, "cpu", "fp32")
    assert isinstance(pipe, StableDiffusionXL)
    return pipe


def test_what_is_sent_into_the_loop_counts_for_the_refiner_too(base, refiner):
    pipe = replace(xl(base), refiner=load_pipe(refiner, "cpu", "fp32"))
    steps = pipe.denoise("a cat", seed=SEED, steps=10)
    seen = [next(steps)]
    with contextlib.suppress(StopIteration):
        while True:
            seen.append(steps.send(torch.zeros_like(seen[-1].latents)))
    assert len(seen) == 10
    assert all(not step.x_t.any() for step in seen[1:])
    assert seen[-1].words.shape[-1] == 32  # the refiner's


def test_a_picture_is_drawn_over_by_base_and_refiner(base, refiner):
    pipe = replace(xl(base), refiner=load_pipe(refiner, "cpu", "fp32"))
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 255, (64, 64, 3), "uint8"))
    ts = [step.t for step in pipe.denoise("a cat", seed=SEED, steps=10, init_image=picture, strength=0.5)]
    assert ts == [step.t for step in xl(base).denoise("a cat", steps=10, init_image=picture, strength=0.5)]


class Exact(diffusers.EulerDiscreteScheduler):  # type: ignore[name-defined]
    """Theirs computes in float32. This one is given σ in float64, and takes Euler's step in it."""

    given: torch.Tensor

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        super().set_timesteps(*args, **kwargs)
        self.sigmas = self.given

    def step(self, output: torch.Tensor, t: Any, x: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor]:
        i = self.timesteps.tolist().index(t)
        self._step_index = i + 1
        return (x + (self.sigmas[i + 1] - self.sigmas[i]) * output,)


def exact_waves(numbers: torch.Tensor, half: int) -> torch.Tensor:
    """Numbers as waves in float64, where diffusers has float32."""
    angles = np.outer(numbers.double().numpy(), 10_000 ** (-np.arange(half) / half))
    return torch.from_numpy(np.concatenate([np.cos(angles), np.sin(angles)], axis=1))


def test_the_loop_agrees_to_the_ninth_digit_in_float64(base):
    ours, theirs = load_pipe(base, "cpu", "fp64"), read(base, dtype=torch.float64)
    theirs.unet.time_proj.forward = partial(exact_waves, half=16)
    theirs.unet.add_time_proj.forward = partial(exact_waves, half=4)
    steps = list(ours.denoise(PROMPTS, seed=SEED, steps=4, width=72, height=40))
    theirs.scheduler = Exact.from_config(theirs.scheduler.config)
    theirs.scheduler.given = torch.tensor([*(step.sigma for step in steps), 0.0], dtype=torch.float64)
    told = {"latents": noise(72, 40).double(), "width": 72, "height": 40, "guidance_scale": 5.0}
    expected = theirs(PROMPTS, num_inference_steps=4, output_type="latent", **told).images
    assert close(steps[-1].latents, expected, 1e-9)


@pytest.mark.parametrize("channels", [4, 9])
def test_inpainting_is_that_of_diffusers(channels, tmp_path):
    config = replace(TINY, unet=replace(TINY.unet, in_channels=channels))
    folder = write(config, tmp_path / "model")
    theirs = read(folder, "StableDiffusionXLInpaintPipeline")
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 255, (40, 72, 3), "uint8"))
    mask = Image.new("L", (72, 40))
    mask.paste(255, (16, 8, 56, 32))
    size: dict[str, Any] = {"width": 72, "height": 40}
    ours = load_pipe(folder, "cpu", "fp32")
    steps = ours.denoise(PROMPTS, seed=SEED, init_image=picture, mask=mask, strength=1.0, steps=5, **size)
    *_, last = steps
    use_the_mean(theirs)
    told: dict[str, Any] = {"num_inference_steps": 5, "guidance_scale": 5.0, "strength": 1.0, **size}
    told["latents"] = noise(72, 40)
    expected = theirs(PROMPTS, image=picture, mask_image=mask, output_type="latent", **told).images
    assert close(last.latents, expected, 1e-4)


@pytest.mark.parametrize(("negative", "cfg", "image_guidance"), [(None, 5.0, 1.5), ("a dog", 3.0, 1.0)])
def test_a_picture_is_edited_as_in_diffusers(negative, cfg, image_guidance, tmp_path):
    folder = write(replace(TINY, unet=replace(TINY.unet, in_channels=8)), tmp_path / "model")
    ours, theirs = load_pipe(folder, "cpu", "fp32"), diffusers.DiffusionPipeline.from_pretrained(folder)
    assert type(theirs) is diffusers.StableDiffusionXLInstructPix2PixPipeline
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 255, (40, 72, 3), "uint8"))
    size: dict[str, Any] = {"width": 72, "height": 40}
    more = {"cfg": cfg, "image_guidance": image_guidance, "negative": negative}
    *_, last = ours.denoise(PROMPTS, seed=SEED, init_image=picture, steps=4, **more, **size)
    told = {"guidance_scale": cfg, "image_guidance_scale": image_guidance, "latents": noise(72, 40)}
    told["negative_prompt"] = None if negative is None else [negative] * 2
    expected = theirs(
        PROMPTS, image=picture, num_inference_steps=4, output_type="latent", **told, **size
    ).images
    assert close(last.latents, expected, 1e-4)


def use_the_mean(pipe: Any) -> None:
    """Makes an inpainting pipeline of diffusers use the VAE's mean, and no noise on it."""
    pipe._encode_vae_image = lambda image, generator: (
        pipe.vae.encode(image).latent_dist.mean * pipe.vae.config.scaling_factor
    )


# Files


@pytest.fixture(scope="module", params=["base", "refiner", "ssd"])
def written(request, base, refiner, ssd) -> tuple[SDXLConfig, Path]:
    return {"base": (TINY, base), "refiner": (TINY_REFINER, refiner), "ssd": (TINY_SSD, ssd)}[request.param]


def test_diffusers_misses_nothing_and_finds_nothing_superfluous(written):
    _, folder = written
    classes = {
        "unet": diffusers.UNet2DConditionModel,
        "vae": diffusers.AutoencoderKL,
        "text_encoder": transformers.CLIPTextModel,
        "text_encoder_2": transformers.CLIPTextModelWithProjection,
    }
    parts = [part for part in classes if (folder / part).exists()]
    assert len(parts) == (3 if written[0] is TINY_REFINER else 4)
    for part in parts:
        _, report = classes[part].from_pretrained(folder / part, output_loading_info=True)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), part


@pytest.mark.parametrize("how", often([{}, {"variant": "fp16"}, {"max_shard_size": "100KB"}], [{}]), ids=str)
def test_each_tensor_that_diffusers_wrote_is_used_once_and_written_back(written, how, tmp_path):
    config, folder = written
    kind = "StableDiffusionXLPipeline" if config.clip_2 else "StableDiffusionXLImg2ImgPipeline"
    pipe = read(folder, kind)
    pipe.save_pretrained(tmp_path / config.name, **how)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a tensor that is not used
        found, models, tokenizer = load(tmp_path / config.name)
    assert found == config
    save(found, models, tmp_path / "again", "diffusers", tokenizer)
    again = read(tmp_path / "again", kind)
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if one := getattr(pipe, part, None):
            before, after = one.state_dict(), getattr(again, part).state_dict()
            assert before.keys() == after.keys()
            assert all(torch.equal(x, after[key]) for key, x in before.items()), part


def test_diffusers_converters_understand_our_single_file(written, tmp_path):
    """diffusers's own converters, an independent description of Stability's names."""
    from diffusers.loaders import single_file_utils as theirs

    config, folder = written
    path = tmp_path / "x.safetensors"
    save(config, random_networks(config), path, "compvis", WORDS)
    state = load_file(path)
    unet = theirs.convert_ldm_unet_checkpoint(
        dict(state), diffusers.UNet2DConditionModel.load_config(folder / "unet")
    )
    vae = theirs.convert_ldm_vae_checkpoint(dict(state), diffusers.AutoencoderKL.load_config(folder / "vae"))
    converted = {"unet": unet, "vae": vae}
    begin = "conditioner.embedders.0.model." if config.clip_2 is None else "conditioner.embedders.1.model."
    last = transformers.CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2")
    converted["text_encoder_2"] = theirs.convert_open_clip_checkpoint(last, dict(state), prefix=begin)
    if config.clip_2:
        first = "conditioner.embedders.0.transformer."
        own = theirs.convert_ldm_clip_checkpoint(dict(state), remove_prefix=first)
        converted["text_encoder"] = own
    count = 0
    for part, theirs_state in converted.items():
        name = "diffusion_pytorch_model" if part in ("unet", "vae") else "model"
        ours = load_file(folder / part / f"{name}.safetensors")
        assert {key for key in theirs_state if not key.endswith("position_ids")} == ours.keys(), part
        for key, x in ours.items():
            assert torch.equal(x, theirs_state[key].reshape(x.shape)), (part, key)
        count += len(ours)
    assert count > len(state) / 2


@pytest.mark.parametrize("to", ["native", "compvis", "diffusers"])
def test_every_format_is_written_and_read_bit_for_bit(written, to, tmp_path):
    config, folder = written
    _, models, tokenizer = load(folder)
    path = tmp_path / (config.name if to == "diffusers" else "x.safetensors")
    save(config, models, path, to, tokenizer)
    found, again, _ = load(path)
    assert found == config
    assert again.keys() == models.keys()
    for name, network in models.items():
        state = again[name].state_dict()
        assert network.state_dict().keys() == state.keys()
        assert all(torch.equal(x, state[key]) for key, x in network.state_dict().items())


INPAINTING = replace(BASE, unet=replace(BASE.unet, in_channels=9))


@pytest.mark.parametrize(
    ("config", "to"),
    [
        *((BASE, to) for to in ("native", "compvis", "diffusers")),
        *((config, to) for config in (REFINER, SSD_1B) for to in ("compvis", "diffusers")),
        (INPAINTING, "compvis"),
        (VEGA, "compvis"),
    ],
    ids=lambda x: x if isinstance(x, str) else x.name,
)
def test_a_published_model_is_recognised_by_its_shapes(config, to):
    """Names and shapes of the full size, without memory."""
    native = state_dict(build(config))
    theirs = convert(native, to, config, SDXL.layout)
    format, rules, unknown = match(theirs, None, SDXL.layout)
    assert (format, unknown) == (to, []) and SDXL.recognises(theirs)
    assert sorted(name for rule in rules for name in rule.theirs) == sorted(theirs)
    shapes = {rule.ours: rule.merge([theirs[name] for name in rule.theirs]).shape for rule in rules}
    assert shapes == {name: x.shape for name, x in native.items()}
    assert SDXL.suited(SDXL.from_shapes(shapes, None).config) == config


def test_the_networks_have_as_many_parameters_as_those_published():
    counts = {name: sum(x.numel() for x in one.parameters()) for name, one in build(BASE).items()}
    assert counts["clip"] == 123_060_480
    assert counts["clip_2"] == 694_659_840
    assert counts["diffusion"] == 2_567_463_684


# LoRAs


def places_of(pipe: Any) -> dict[str, Any]:
    """Some layers of each network of diffusers's pipeline, by their names there."""
    networks = {"unet": pipe.unet, "text_encoder": pipe.text_encoder, "text_encoder_2": pipe.text_encoder_2}
    wanted = r"(to_q|to_k|to_v|to_out\.0|proj_in|ff\.net\.2|q_proj|v_proj|out_proj|fc1)$"
    found = {}
    for part, network in networks.items():
        for name, module in network.named_modules():
            if re.search(wanted, name):
                found[f"{part}.{name}"] = module
    return found


@pytest.mark.parametrize("layout", ["kohya", "kohya's names of CompVis", "peft"])
def test_a_lora_changes_what_it_changes_in_diffusers(base, layout, tmp_path):
    pytest.importorskip("peft")
    theirs = read(base)
    generator, marks = torch.Generator().manual_seed(4), {"unet": 0, "encoder": 0, "encoder_2": 0}
    tensors: dict[str, torch.Tensor] = {}
    compvis = {place.diffusers: place.compvis for place in places(TINY)}
    for name, module in places_of(theirs).items():
        down, up = (
            torch.randn(shape, generator=generator) * 0.2
            for shape in ((3, module.in_features), (module.out_features, 3))
        )
        part, _, inner = name.partition(".")
        marks[part.removeprefix("text_")] += 1
        if layout == "peft":
            whole = name if part == "unet" or "text_model" in name else f"{part}.text_model.{inner}"
            tensors |= {f"{whole}.lora_A.weight": down, f"{whole}.lora_B.weight": up}
            continue
        if part == "unet" and "CompVis" in layout:
            inner = compvis[name].removeprefix("model.diffusion_model.")
        elif part != "unet" and not inner.startswith("text_model."):
            inner = f"text_model.{inner}"
        start = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}[part]
        key = f"{start}_{inner.replace('.', '_')}"
        tensors |= {
            f"{key}.lora_down.weight": down,
            f"{key}.lora_up.weight": up,
            f"{key}.alpha": torch.tensor(2.0),
        }
    assert all(marks.values())
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    ours = load_pipe(base, "cpu", "fp32")
    before = draw(ours, steps=3)
    apply(ours, load_lora(path), 0.7)
    after = draw(ours, steps=3)
    theirs.load_lora_weights(path, local_files_only=True)
    theirs.set_adapters(theirs.get_active_adapters(), 0.7)
    expected = draw_theirs(theirs, latents=noise(64, 64), num_inference_steps=3, guidance_scale=5.0)
    assert_same(after, expected)
    assert np.abs(after - before).max() > 5
    remove(ours)
    assert np.array_equal(draw(ours, steps=3), before)


def test_a_lora_of_sdxl_is_written_as_kohya_writes_it(base, tmp_path):
    pipe = load_pipe(base, "cpu", "fp32")
    old = {name: copy.deepcopy(network) for name, network in pipe.models.items()}
    for name in ("clip", "clip_2", "diffusion"):
        weight = next(x for key, x in pipe.models[name].named_parameters() if key.endswith("qkv.weight"))
        weight.data += 0.1 * torch.outer(torch.ones(len(weight)), weight.data[0])
    found = extract(old, pipe.models, 2, config=pipe.config)
    write_lora(found, tmp_path / "x.safetensors")
    names = load_lora(tmp_path / "x.safetensors").updates
    assert {name.split("_")[1] for name in names} == {"te1", "te2", "unet"}
    apply(old, load_lora(tmp_path / "x.safetensors"), config=pipe.config)
    for name in ("clip", "clip_2", "diffusion"):
        for one, other in zip(old[name].parameters(), pipe.models[name].parameters()):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


# SSD-1B and Segmind Vega


@pytest.mark.parametrize("config", [TINY_SSD, TINY_VEGA], ids=lambda config: config.name)
def test_the_picture_of_a_model_that_has_lost_layers_is_that_of_diffusers(config, tmp_path):
    folder = write(config, tmp_path / config.name)
    drawn = draw(load_pipe(folder, "cpu", "fp32"), width=72, height=40, steps=3)
    told = {"latents": noise(72, 40), "width": 72, "height": 40, "guidance_scale": 5.0}
    assert_same(drawn, draw_theirs(read(folder), num_inference_steps=3, **told))


# What the published folders say of their U-Nets; the sizes are a test's.
SAID = {
    "ssd-1b": (
        {
            "transformer_layers_per_block": [1, [2, 2], [4, 4]],
            "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
            "mid_block_type": "UNetMidBlock2D",
        },
        SSD_1B.unet,
    ),
    "vega": (
        {
            "transformer_layers_per_block": [1, [1, 1], [2, 2]],
            "reverse_transformer_layers_per_block": [[2, 2, 2], [1, 1, 1], 1],
            "mid_block_type": "UNetMidBlock2D",
        },
        VEGA.unet,
    ),
}


@pytest.mark.parametrize("name", SAID)
def test_the_config_of_a_published_folder_is_understood_and_says_the_same_again(name):
    said, expected = SAID[name]
    jsons = to_diffusers(BASE)
    found = SDXL.from_diffusers({**jsons, "unet": jsons["unet"] | said}, name)
    assert isinstance(found, SDXLConfig) and found.unet == expected
    assert SDXL.from_diffusers(to_diffusers(found), name) == found
    assert SDXL.suited(found).cfg == 9.0
    unet = build(found)["diffusion"]
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel(**jsons["unet"] | said)
    count, published = (sum(x.numel() for x in one.parameters()) for one in (unet, theirs))
    assert count == published


@pytest.mark.parametrize("wrong", [[[4, 4, 10], [2, 1, 1]], [[4, 4], [2, 1, 1], 1], "x"], ids=str)
def test_depths_that_do_not_fit_are_refused_in_one_sentence(wrong):
    jsons = to_diffusers(BASE)
    unet = jsons["unet"] | {"reverse_transformer_layers_per_block": wrong}
    with pytest.raises(ModelError, match=r"reverse_transformer_layers_per_block = .* does not fit"):
        SDXL.from_diffusers({**jsons, "unet": unet}, "x")


# Half precision


def too_large_for_half(folder: Path, tmp_path: Path) -> Path:
    """A copy of the model whose VAE has numbers above 65504 inside; its pictures stay as they are."""
    config, models, tokenizer = load(folder)
    for half, factor in ("encoder", 8e4), ("decoder", 1.5e4):
        models[half].get_parameter("conv_in.weight").data *= factor
    path = tmp_path / "large.safetensors"
    save(config, models, path, "native", tokenizer)
    return path


def test_the_vae_works_in_float32_where_half_precision_is_too_small_for_it(base, tmp_path):
    path = too_large_for_half(base, tmp_path)
    half = load_pipe(path, "cpu", "fp16")
    calls: list[torch.dtype] = []
    half.models["decoder"].register_forward_pre_hook(lambda _, given: calls.append(given[0].dtype))
    latents, pixels = torch.randn(2, 4, 5, 9), torch.rand(1, 3, 20, 36) * 2 - 1
    expected = load_pipe(path, "cpu", "fp32")
    expected.models |= {name: expected.models[name].half().float() for name in ("encoder", "decoder")}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of an overflow
        assert torch.equal(half.decode_image(latents), expected.decode_image(latents))
        assert torch.equal(half.encode_image(pixels), expected.encode_image(pixels))
    assert calls == [torch.float32] * 2 and half.dtype == torch.float16
    assert isinstance(half.config, SDXLConfig)
    without = replace(load_pipe(path, "cpu", "fp16"), config=replace(half.config, upcast=False))
    with pytest.warns(UserWarning, match=r"the VAE overflowed in torch\.float16"):
        without.decode_image(latents)
    assert {x.dtype for x in load_pipe(path, "cpu", "bf16").models["decoder"].parameters()} == {
        torch.bfloat16
    }


def upcasts(path: Path, changes: Changes | None = None) -> bool:
    config = find_config(path, changes)
    assert isinstance(config, SDXLConfig)
    return config.upcast


def test_whether_the_vae_needs_float32_its_folder_says_or_its_name(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "x")
    file = folder / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"force_upcast": False}))
    config, models, tokenizer = load(folder)
    assert not upcasts(folder) and upcasts(base)
    save(config, models, tmp_path / "y.safetensors", "native", tokenizer)
    save(config, models, tmp_path / "z", "diffusers", tokenizer)
    assert not upcasts(tmp_path / "y.safetensors")
    assert not diffusers.AutoencoderKL.load_config(tmp_path / "z" / "vae")["force_upcast"]
    vae = next((base / "vae").glob("*.safetensors"))
    for name, upcast in ("sdxl_vae", True), ("sdxl.vae.fp16-fix", False), ("sdxl_vae_fp16_fix", False):
        shutil.copy(vae, tmp_path / f"{name}.safetensors")
        assert upcasts(base, Changes(vae=tmp_path / f"{name}.safetensors")) == upcast
    assert not upcasts(base, Changes(vae=folder))
    assert not upcasts(base, Changes(vae=folder / "vae"))


@pytest.mark.parametrize("key", ["edm_mean", "edm_vpred.sigma_max"])
def test_a_model_for_the_noise_of_edm_is_refused(base, key, tmp_path):
    path = write(TINY, tmp_path / "x.safetensors", "compvis")
    save_file({**load_file(path), key: torch.ones(1)}, path)
    with pytest.raises(ModelError, match="is trained with EDM's noise"):
        load(path)


def test_a_vae_with_means_of_its_latents_is_refused(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "x")
    file = folder / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"latents_mean": [0.1, 0.2, 0.3, 0.4]}))
    with pytest.raises(ModelError, match=r"its vae has latents_mean = \[0.1, 0.2, 0.3, 0.4\]"):
        load(folder)


@pytest.mark.parametrize("way", ["folder", "unet"])
def test_an_sdxl_that_is_told_the_guidance_scale_is_refused(base, way, tmp_path):
    theirs = diffusers.UNet2DConditionModel.load_config(base / "unet") | {"time_cond_proj_dim": 16}
    folder = shutil.copytree(base, tmp_path / "lcm")
    diffusers.UNet2DConditionModel.from_config(theirs).save_pretrained(folder / "unet")
    with pytest.raises(ModelError, match="told its guidance scale, as LCMs are, is not built in"):
        load(folder) if way == "folder" else load(base, changes=Changes(unet=folder / "unet"))


def test_a_u_net_alone_is_told_what_it_needs(base, tmp_path):
    for to, start in ("compvis", "model.diffusion_model."), ("diffusers", "unet."):
        tensors = convert(state_dict(load(base)[1]), to, TINY, SDXL.layout)
        own = {name: x.contiguous() for name, x in tensors.items() if name.startswith(start)}
        save_file(own, tmp_path / "x.safetensors")
        with pytest.raises(ModelError, match="a U-Net of Stable Diffusion XL alone; name a whole model"):
            load(tmp_path / "x.safetensors")


# Few steps


@pytest.fixture(scope="module", params=["euler_a", "euler"])
def turbo(request, tmp_path_factory) -> tuple[Path, str]:
    schedule = replace(TINY.schedule, timestep_spacing="trailing")
    config = replace(TINY, schedule=schedule, sampler=request.param)
    return write(config, tmp_path_factory.mktemp("model") / "one"), request.param


@pytest.mark.parametrize("steps", [1, 4])
def test_a_model_of_few_steps_draws_as_in_diffusers(turbo, steps):
    folder, sampler = turbo
    ours, theirs = load_pipe(folder, "cpu", "fp32"), read(folder)
    assert (ours.config.sampler, ours.config.steps, ours.config.cfg) == (sampler, 4, 1.0)
    ancestral = type(theirs.scheduler) is diffusers.EulerAncestralDiscreteScheduler
    assert ancestral == (sampler == "euler_a")
    generators = [torch.Generator().manual_seed(SEED + k) for k in range(2)]
    told = {"num_inference_steps": steps, "guidance_scale": 0.0, "generator": generators}
    assert_same(draw(ours, steps=steps), draw_theirs(theirs, width=64, height=64, **told))


@pytest.mark.parametrize(
    ("name", "sampler", "steps", "cfg"),
    [
        ("sd_xl_turbo_1.0_fp16", "euler_a", 4, 1.0),
        ("sdxl_lightning_2step", "euler", 2, 1.0),
        ("Hyper-SDXL-8steps-CFG", "ddim", 8, 5.0),
        ("sd_xl_base_1.0", "euler", 30, 5.0),
        ("hyperrealism_v3", "euler", 30, 5.0),
    ],
)
def test_the_name_of_a_file_tells_of_few_steps(base, name, sampler, steps, cfg, tmp_path):
    save(*load(base)[:2], tmp_path / f"{name}.safetensors", "compvis", WORDS)
    pipe = load_pipe(tmp_path / f"{name}.safetensors", "cpu", "fp32")
    found = pipe.config
    assert (found.sampler, found.steps, found.cfg) == (sampler, steps, cfg)
    few = steps < 30
    drawn = next(pipe.denoise("a cat", steps=steps))
    assert (drawn.t == 999) == few


def test_what_a_name_has_told_is_kept_under_another_name(base, tmp_path):
    lightning = tmp_path / "sdxl_lightning_8step.safetensors"
    save(*load(base)[:2], lightning, "native", WORDS)
    save(*load(lightning)[:2], tmp_path / "mine.safetensors", "native", WORDS)
    config = find_config(tmp_path / "mine.safetensors")
    assert config == find_config(lightning)
    assert (config.sampler, config.steps, config.cfg) == ("euler", 8, 1.0)


@pytest.mark.parametrize(
    ("name", "sampler"),
    [
        ("sd-turbo", "euler_a"),
        ("dreamshaperXL_v21TurboDPMSDE", "euler_a"),
        ("dreamshaperXL_lightningDPMSDE", "euler"),
        ("realvisxlV40_v40LightningBakedvae", "euler"),
        ("juggernautXL_v9Rdphoto2Lightning", "euler"),
        ("Hyper-SD15-4steps-lora", "ddim"),
        ("4step_lightning", "euler"),
        ("realisticVisionV60B1_v51HyperVAE", "ddim"),
        ("Juggernaut_X_RunDiffusion_Hyper", "ddim"),
        ("juggernautXL_v10Hyper", "ddim"),
        ("epicrealism_hyper.safetensors", "ddim"),
        ("SSD-1B-turbo", "euler_a"),
        ("v3_hyperdetailed", None),
        ("xl_hyperrealism", None),
        ("turboDetail-lora", None),
        ("blue_lightning_effect_v2", None),
        ("HyperRealistic", None),
        ("hyperdetailed_xl", None),
    ],
)
def test_the_words_count_where_they_tell_of_the_model(name, sampler):
    found = few_steps.by_name(SD15, name)
    assert found.sampler == (sampler or SD15.sampler) and (found.steps < 10) == bool(sampler)


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [("sdxl_lightning_4step_lora", "EulerDiscreteScheduler"), ("Hyper-SDXL-2steps-lora", "DDIMScheduler")],
)
def test_a_lora_of_few_steps_is_drawn_with_as_its_authors_do(base, name, scheduler, tmp_path):
    pytest.importorskip("peft")
    generator = torch.Generator().manual_seed(1)
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_1_attn1_to_v"
    down, up = (torch.randn(shape, generator=generator) for shape in ((2, 64), (64, 2)))
    tensors = {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}
    save_file(tensors | {f"{layer}.alpha": torch.tensor(1.0)}, tmp_path / f"{name}.safetensors")
    lora = ((str(tmp_path / f"{name}.safetensors"), 1.0),)
    settings = Settings(prompt="a cat", model=str(base), lora=lora, dtype="fp32")
    request, ours = settings.request().for_model(settings.config()), settings.pipe("cpu")
    theirs = read(base)
    kind = getattr(diffusers, scheduler)
    more = {"set_alpha_to_one": False, "clip_sample": False} if scheduler == "DDIMScheduler" else {}
    theirs.scheduler = kind.from_config(theirs.scheduler.config, timestep_spacing="trailing", **more)
    theirs.load_lora_weights(tmp_path / f"{name}.safetensors", local_files_only=True)
    told = {"num_inference_steps": 4 if "lightning" in name else 2, "guidance_scale": 0.0}
    expected = draw_theirs(theirs, latents=noise(64, 64), **told)
    assert (request.steps, request.cfg) == (told["num_inference_steps"], 1.0)
    assert_same(draw(ours), expected)


# The command line


def test_the_command_line_draws_with_base_refiner_and_a_lightning_lora(base, refiner, tmp_path, capsys):
    flags = ["--model", base, "--refiner", refiner, "--seed", SEED, "--steps", 10, "--cfg", 5]
    flags += ["--dtype", "fp32", "--device", "cpu", "--out", tmp_path / "one.png", "--size", "64x64"]
    assert cli.main(["generate", PROMPTS[0], *map(str, flags), "--idle-device", "cpu"]) == 0
    pipe = replace(xl(base), refiner=load_pipe(refiner, "cpu", "fp32"))
    expected = pipe.generate(PROMPTS[0], seed=SEED, steps=10, progress=False)
    assert np.array_equal(np.array(Image.open(tmp_path / "one.png")), np.array(expected))
    key = "lora_te2_text_model_encoder_layers_0_mlp_fc1"
    tensors = {f"{key}.lora_down.weight": torch.ones(1, 32), f"{key}.lora_up.weight": torch.ones(128, 1)}
    save_file(tensors, tmp_path / "lightning_2step.safetensors")
    lora = ["--lora", str(tmp_path / "lightning_2step.safetensors"), "--out", str(tmp_path / "two.png")]
    assert cli.main(["generate", "a cat", "--model", str(base), "--seed", "1", *lora]) == 0
    assert cli.main(["info", str(tmp_path / "two.png")]) == 0
    said = capsys.readouterr().out
    assert re.search(r"steps +2\n", said) and re.search(r"cfg +1\.0\n", said)


def test_a_refiner_that_is_none_is_refused_in_one_sentence(base, tmp_path, capsys):
    flags = ["--model", base, "--refiner", base, "--device", "cpu", "--out", tmp_path]
    assert cli.main(["generate", "a cat", *map(str, flags)]) == 2
    assert "is no refiner of SDXL" in capsys.readouterr().err


def test_convert_and_info(written, tmp_path, capsys):
    config, folder = written
    one, two = tmp_path / "one.safetensors", tmp_path / config.name
    assert cli.main(["convert", str(folder), str(one), "--to", "compvis"]) == 0
    assert cli.main(["convert", str(one), str(two), "--to", "diffusers"]) == 0
    for part in ("unet", "vae", "text_encoder_2"):
        file = next((folder / part).glob("*.safetensors")).relative_to(folder)
        assert (two / file).read_bytes() == (folder / file).read_bytes()
    assert cli.main(["info", str(one)]) == 0
    said = capsys.readouterr().out
    assert re.search(rf"model +{config.name}, for pictures of 64x64", said)
    assert ("clip_2" in said) == (config.clip_2 is not None)


def test_words_of_sdxl_are_edited_and_looked_at(base):
    pipe = xl(base)
    request = ask("a cat & a dog", seed=SEED, steps=2)
    unchanged = rewritten(pipe, lambda context: context).generate(request, progress=False)
    changed = rewritten(pipe, torch.zeros_like).generate(request, progress=False)
    assert np.array_equal(np.array(unchanged), np.array(pipe.generate(request, progress=False)))
    assert not np.array_equal(np.array(unchanged), np.array(changed))
    with watch(pipe, request) as attention:
        list(pipe.denoise(request))
    assert [word.text for word in attention.words] == ["a", "cat", "&", "a", "dog"]
    assert len(attention.maps) == 2 * (1 + 1 + 2)  # down, middle and up, two transformer layers in each block
    for maps in attention.maps.values():
        torch.testing.assert_close(
            maps.float().sum(2), torch.ones_like(maps[:, :, 0]).float(), rtol=0, atol=5e-3
        )


def test_networks_in_a_dict_are_refused_in_one_sentence(base):
    with pytest.raises(
        ValueError, match="networks with a clip_2 are drawn with by the model that `load` returned"
    ):
        reifusion.generate("a cat", models=load(base)[1])


@pytest.mark.parametrize("kind", ["folder", "compvis", "native", "sd3"])
def test_the_first_version_s_calls_say_in_one_sentence_what_opens_the_file(base, kind, tmp_path):
    path = base
    if kind == "sd3":
        path = tmp_path / "x.safetensors"
        save_file({"model.diffusion_model.joint_blocks.0.context_block.mlp.fc1.weight": torch.ones(1)}, path)
    elif kind != "folder":
        path = tmp_path / "x.safetensors"
        save(*load(base)[:2], path, kind, WORDS)
        save_file(load_file(path), path)  # without a header, as others write it
    for read_weights in load_from_standard_weights, preload_models_from_standard_weights:
        with pytest.raises(ModelError, match=r"XL|not a U-Net") as error:
            read_weights(path)
        assert str(path) in str(error.value) and str(error.value).count("\n") == 0


def test_only_the_network_that_works_is_on_the_device(base, monkeypatch):
    """What waits is elsewhere, both text encoders too: the peak is the largest network, and not their sum."""
    pipe = load_pipe(base, "cpu", "fp32", idle_device="cpu")
    assert pipe.idle_device == torch.device("cpu")
    with pytest.raises(ValueError, match="there is no device 'attic'"):
        load_pipe(base, "cpu", idle_device="attic")
    pipe.idle_device = torch.device("cpu", 0)  # the same memory, and another name to tell it by
    sizes = {name: sum(x.nbytes for x in one.state_dict().values()) for name, one in pipe.models.items()}
    here: set[str] = set()
    peaks: dict[str, int] = {}

    def moved(name: str, to: Any) -> Any:
        def move(device: Any) -> Any:
            here.discard(name) if device == pipe.idle_device else here.add(name)
            peaks[name] = max(peaks.get(name, 0), sum(sizes[one] for one in here))
            return to(device)

        return move

    for name, network in pipe.models.items():
        monkeypatch.setattr(network, "to", moved(name, network.to))
    picture = Image.new("RGB", (64, 64), (200, 40, 90))
    draw(pipe, steps=4, init_image=picture)
    assert peaks == sizes and not here
    assert max(peaks.values()) < sum(sizes.values())


def test_vectors_stand_for_a_prompt_with_what_is_said_of_the_whole_text(base):
    pipe = xl(base)
    vectors = pipe.encode_text(PROMPTS)
    assert vectors.shape == (2, 16 + 1, 56)
    drawn = pipe.generate(vectors, seed=SEED, steps=2, progress=False)
    assert np.array_equal(np.stack([np.array(x) for x in drawn]).astype(int), draw(pipe, steps=2))
    with pytest.raises(ValueError, match=r"a prompt of vectors for tiny-xl has 17 rows, .* not 16"):
        pipe.generate(vectors[:, :16], steps=2)


# At full width, 2.6 billion weights: half a minute and 11 GB

MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@torch.inference_mode()
@pytest.mark.slow
@pytest.mark.skipif(MEMORY < 16e9, reason="takes 11 GB")
@pytest.mark.parametrize(("width", "height"), [(24, 16)])
def test_the_u_net_of_the_base_at_full_width_is_that_of_diffusers(width, height):
    unet = build(BASE)["diffusion"].to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    for name, x in unet.named_parameters():
        norm = "norm" in name and name.endswith("weight") and x.ndim == 1
        x.normal_(float(norm), (x[0].numel() if x.ndim > 1 else 25) ** -0.5, generator=generator)
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel(**to_diffusers(BASE)["unet"])
    state: dict[str, torch.Tensor] = {}  # of views, so that both share one memory
    ours = state_dict({"diffusion": unet})
    for rule in rules(BASE, "diffusers", layout=SDXL.layout):
        if rule.ours in ours:
            names = (name.removeprefix("unet.") for name in rule.theirs)
            state |= zip(names, ours[rule.ours].chunk(len(rule.theirs)))
    theirs.load_state_dict(state, assign=True)
    latents = torch.randn(2, 4, height, width, generator=generator)
    words = torch.randn(2, 77, 2048, generator=generator)
    pooled, t = torch.randn(2, 1280, generator=generator), torch.tensor([21, 801])
    numbers = torch.tensor([[1024.0, 768, 0, 64, 512, 640], [96, 1000, 8, 0, 88, 2056]])
    told = {"text_embeds": pooled, "time_ids": numbers}
    expected = theirs.eval()(latents, t, words, added_cond_kwargs=told).sample
    assert close(unet(latents, words, t, tell(pooled, numbers, 256)), expected, 1e-4)
