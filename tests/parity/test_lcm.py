"""Pictures in 1 to 8 steps, as diffusers draws them: latent consistency models (Luo et al. 2023)."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from reifusion import cli
from reifusion.api import load as load_pipe
from reifusion.families import build
from reifusion.model.config import SD15, ModelConfig
from reifusion.model.diffusers_folder import config_to_diffusers
from reifusion.model.family import from_shapes
from reifusion.model.model_converter import convert, match
from reifusion.model.pipeline import StableDiffusion
from reifusion.model.samplers import SAMPLERS
from reifusion.shortcuts.deepcache import deepcached
from reifusion.train.lora import attach, save_lora
from reifusion.weights import load, save
from reifusion.weights.lora import apply, load_lora
from tests.tiny import SMALL, WORDS, random_networks

os.environ.setdefault("HF_HUB_OFFLINE", "1")
diffusers = pytest.importorskip("diffusers")

PROMPTS, SEED = ["a cat", "a dog"], 5


def write(config: ModelConfig, path: Path, to: str = "diffusers") -> Path:
    """Writes a model with random weights."""
    save(config, random_networks(config), path, to, WORDS)
    return path


def draw_ours(pipe: StableDiffusion, steps: int, scale: float, **settings: Any) -> np.ndarray:
    pictures = pipe.generate(
        PROMPTS,
        seed=SEED,
        sampler="lcm",
        steps=steps,
        cfg=scale,
        progress=False,
        **settings,
    )
    assert isinstance(pictures, list)
    return np.stack([np.array(picture) for picture in pictures]).astype(int)


def draw_theirs(pipe: Any, steps: int, scale: float) -> np.ndarray:
    generators = [torch.Generator().manual_seed(SEED + k) for k in range(len(PROMPTS))]
    side = SMALL.size
    drawn = pipe(
        PROMPTS,
        num_inference_steps=steps,
        guidance_scale=scale,
        generator=generators,
        height=side,
        width=side,
        output_type="np",
    ).images
    return (drawn * 255).round().astype(int)


def assert_same(drawn: np.ndarray, expected: np.ndarray) -> None:
    assert drawn.shape == expected.shape
    assert expected.std() > 5  # the picture is not empty
    assert (np.abs(drawn - expected) <= 1).mean() >= 0.999


# A LoRA that makes an LCM of a model


@pytest.fixture(scope="module")
def usual(tmp_path_factory) -> Path:
    return write(SMALL, tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module", params=["kohya", "peft"])
def lora(request, usual, tmp_path_factory) -> Path:
    """Makes a LoRA like LCM-LoRAs: for the convolutions, the times and the attention of the U-Net."""
    models = load(usual)[1]
    model = nn.ModuleDict({"clip": models["clip"], "diffusion": models["diffusion"]})
    generator = torch.Generator().manual_seed(2)
    for matrix in attach(model, rank=4, alpha=1.0, targets=("diffusion.*",)):
        matrix.data.normal_(std=0.2, generator=generator)
    path = tmp_path_factory.mktemp("lora") / "lcm.safetensors"
    save_lora(model, path, request.param)
    return path


@pytest.fixture
def theirs(usual, lora) -> Any:
    pytest.importorskip("peft")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(usual, local_files_only=True)
    pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    pipe.load_lora_weights(lora, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(("steps", "scale"), [(1, 1.0), (4, 1.0), (4, 1.5), (8, 2.0)])
def test_a_model_with_an_lcm_lora_draws_as_in_diffusers(usual, lora, theirs, steps, scale):
    pipe = load_pipe(usual, "cpu", "fp32")
    apply(pipe, load_lora(lora))
    assert_same(draw_ours(pipe, steps, scale), draw_theirs(theirs, steps, scale))


def test_the_command_line_draws_with_an_lcm_lora(usual, lora, theirs, tmp_path, capsys):
    flags = ["--model", usual, "--lora", lora, "--sampler", "lcm", "--steps", 4, "--cfg", 1.5]
    flags += ["--seed", SEED, "--dtype", "fp32", "--device", "cpu", "--out", tmp_path]
    assert cli.main(["generate", PROMPTS[0], *map(str, flags)]) == 0
    (drawn,) = capsys.readouterr().out.splitlines()
    assert_same(np.array(Image.open(drawn)).astype(int), draw_theirs(theirs, 4, 1.5)[0])


# A model that was distilled as a whole, with the guidance as an input


LCM = replace(SMALL, unet=replace(SMALL.unet, guidance_width=16))


def waves(scale: torch.Tensor, width: int) -> torch.Tensor:
    """Returns diffusers' embedding of the guidance w = s - 1."""
    embed = diffusers.StableDiffusionPipeline.get_guidance_scale_embedding
    return embed(None, scale - 1, embedding_dim=width)


@pytest.fixture(scope="module")
def distilled(tmp_path_factory) -> Path:
    return write(LCM, tmp_path_factory.mktemp("model") / "lcm")


@torch.inference_mode()
@pytest.mark.parametrize("scales", [[1.0], [1.5, 8.0], [12.25, 3.0]])
def test_the_u_net_sees_the_guidance_as_in_diffusers(distilled, scales):
    ours = load(distilled)[1]["diffusion"]
    theirs = diffusers.UNet2DConditionModel.from_pretrained(distilled / "unet", local_files_only=True)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 9, 12, generator=generator)
    words, t = torch.randn(2, 16, 24, generator=generator), torch.tensor([3, 871])
    scale = torch.tensor(scales)
    expected = theirs(x, t, words, timestep_cond=waves(scale, 16).expand(2, -1)).sample
    limit = 1e-4 * expected.abs().max()
    assert (ours(x, words, t, scale) - expected).abs().max() < limit
    assert (ours(x, words, t) - expected).abs().max() > 100 * limit  # it matters


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_an_lcm_draws_as_in_diffusers(distilled, steps, scale):
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(distilled, local_files_only=True)
    assert type(theirs.scheduler) is diffusers.LCMScheduler
    theirs.set_progress_bar_config(disable=True)
    pipe = load_pipe(distilled, "cpu", "fp32")
    assert_same(draw_ours(pipe, steps, scale), draw_theirs(theirs, steps, scale))


def test_an_lcm_does_not_compute_a_second_half(distilled):
    pipe = load_pipe(distilled, "cpu", "fp32")
    batches: list[int] = []
    pipe.models["diffusion"].register_forward_hook(lambda *call: batches.append(len(call[-1])))
    draw_ours(pipe, 4, 8.0)
    assert batches == [len(PROMPTS)] * 4
    # no guidance is a scale of 1, which is also an input
    assert np.array_equal(draw_ours(pipe, 4, 8.0, do_cfg=False), draw_ours(pipe, 4, 1.0))


def test_an_lcm_under_deepcache_is_told_the_guidance_scale(distilled):
    pipe = load_pipe(distilled, "cpu", "fp32")
    cached = deepcached(pipe, 2)
    assert np.abs(draw_ours(cached, 4, 8.0) - draw_ours(cached, 4, 1.0)).max() > 5
    assert not np.array_equal(draw_ours(cached, 4, 8.0), draw_ours(pipe, 4, 8.0))


def test_the_command_line_draws_an_lcm_in_four_steps_by_default(distilled, tmp_path, capsys):
    flags = ["--model", distilled, "--seed", SEED, "--dtype", "fp32", "--device", "cpu", "--out", tmp_path]
    assert cli.main(["generate", PROMPTS[0], *map(str, flags)]) == 0
    (drawn,) = capsys.readouterr().out.splitlines()
    pipe = load_pipe(distilled, "cpu", "fp32")
    assert np.array_equal(np.array(Image.open(drawn)), draw_ours(pipe, 4, 8.0)[0])
    assert [step.total for step in pipe.denoise("a cat", steps=3)] == [3] * 3  # by the lcm sampler


def test_another_sampler_may_be_asked_for(distilled):
    pipe = load_pipe(distilled, "cpu", "fp32")
    with_ddim = pipe.generate(PROMPTS, seed=SEED, sampler="ddim", steps=4, progress=False)
    assert isinstance(with_ddim, list)
    assert not np.array_equal(np.stack([np.array(p) for p in with_ddim]), draw_ours(pipe, 4, 8.0))


@pytest.mark.parametrize("original", [20, 50, 100])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6, 7, 8])
def test_the_timesteps_it_was_distilled_on_are_chosen_from(original, steps):
    ours = SAMPLERS["lcm"](original_inference_steps=original)
    theirs = diffusers.LCMScheduler(original_inference_steps=original)
    ours.set_inference_timesteps(steps)
    theirs.set_timesteps(steps)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()


@pytest.mark.parametrize("to", ["native", "compvis", "diffusers"])
def test_an_lcm_is_written_and_read_in_every_format(distilled, tmp_path, to):
    config, models, tokenizer = load(distilled)
    assert config.unet.guidance_width == 16
    config = replace(config, schedule=replace(config.schedule, original_inference_steps=20))
    path = tmp_path / ("folder" if to == "diffusers" else "file.safetensors")
    save(config, models, path, to, tokenizer)
    again, read, _ = load(path)
    assert again.unet == config.unet and again.schedule == config.schedule
    for name, module in models.items():
        state = module.state_dict()
        assert state.keys() == read[name].state_dict().keys()
        assert all(torch.equal(x, state[key]) for key, x in read[name].state_dict().items())


@pytest.mark.parametrize("to", ["native", "compvis", "diffusers"])
def test_a_file_without_metadata_is_recognised_by_its_shapes(to, tmp_path):
    config = replace(SD15, unet=replace(SD15.unet, guidance_width=256))
    shapes = {
        f"{net}.{key}": x for net, module in build(config).items() for key, x in module.state_dict().items()
    }
    theirs = convert(shapes, to, config)
    assert any("cond_proj" in name for name in theirs) == (to != "native")
    format, rules, unknown = match(theirs)
    assert (format, unknown) == (to, [])
    ours = {rule.ours: rule.merge([theirs[name] for name in rule.theirs]).shape for rule in rules}
    assert from_shapes(ours).config.unet == config.unet


@pytest.mark.parametrize("to", ["diffusers", "native"])
def test_the_u_net_of_an_lcm_is_taken_for_another_model(distilled, usual, to, tmp_path):
    model = usual
    if to == "native":
        model = tmp_path / "x.safetensors"
        save(*load(usual)[:2], model, to, WORDS)
    pipe = load_pipe(model, "cpu", "fp32", unet=distilled)
    assert (pipe.config.sampler, pipe.config.steps, pipe.config.cfg) == ("lcm", 4, 8.0)
    assert np.array_equal(draw_ours(pipe, 2, 3.0), draw_ours(load_pipe(distilled, "cpu", "fp32"), 2, 3.0))


def test_a_negative_prompt_that_is_not_read_is_told(tmp_path):
    pipe = load_pipe(write(LCM, tmp_path / "lcm"), "cpu", "fp32")
    with pytest.warns(UserWarning, match="reads no negative prompt"):
        told = draw_ours(pipe, 2, 4.0, negative="a dog")
    assert (told == draw_ours(pipe, 2, 4.0)).all()


def test_an_ordinary_model_is_not_an_lcm():
    assert "original_inference_steps" not in config_to_diffusers(SMALL)["scheduler"]


# SD-Turbo: an ordinary model that was distilled to few steps without guidance


@pytest.mark.parametrize("steps", [1, 4])
def test_sd_turbo_draws_as_in_diffusers(steps, tmp_path):
    config = replace(SMALL, schedule=replace(SMALL.schedule, timestep_spacing="trailing"))
    folder = write(config, tmp_path / "turbo")
    pipe = load_pipe(folder, "cpu", "fp32")
    assert (pipe.config.sampler, pipe.config.steps, pipe.config.cfg) == ("euler", 4, 1.0)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    assert type(theirs.scheduler) is diffusers.EulerDiscreteScheduler
    theirs.set_progress_bar_config(disable=True)
    drawn = pipe.generate(PROMPTS, seed=SEED, steps=steps, progress=False)
    assert isinstance(drawn, list)
    expected = draw_theirs(theirs, steps, 0.0)
    assert_same(np.stack([np.array(picture) for picture in drawn]).astype(int), expected)
