"""Files: those that diffusers wrote are read here, and the other way round, with the same results."""

from __future__ import annotations

import os
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from reifusion.model.config import ModelConfig, ScheduleConfig, VAEConfig
from reifusion.model.tokenizer import Tokenizer
from reifusion.weights import info, load, save
from tests.tiny import SMALL, WORDS, random_networks

os.environ.setdefault("HF_HUB_OFFLINE", "1")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

TINY = replace(
    SMALL,
    name="tiny",
    vae=VAEConfig(channels=(16, 32, 32), layers=1, groups=8, scale_factor=0.3),
    schedule=ScheduleConfig(prediction_type="v_prediction"),
)
# A small SD 2.x: heads of one width, linear projections, exact GELU.
TINY_2 = replace(
    TINY,
    clip=replace(TINY.clip, activation="gelu"),
    unet=replace(TINY.unet, heads=(2, 4), linear_projection=True),
)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert theirs.std() > 0.01
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=1e-3, atol=1e-4 * theirs.abs().max().item())


@torch.inference_mode()
def assert_agrees(models: dict[str, nn.Module], tokenizer: Tokenizer, config: ModelConfig, pipe) -> None:
    """Asserts that every network and the tokenizer agree with diffusers's."""
    words = "a cat & a dog"
    padded = pipe.tokenizer(
        words, padding="max_length", max_length=16, truncation=True, return_tensors="pt"
    ).input_ids
    assert padded[0].tolist() == tokenizer.encode(words)

    context = pipe.text_encoder(padded).last_hidden_state
    assert_close(models["clip"](padded), context)
    latents, t = torch.randn(2, config.unet.in_channels, 6, 10), torch.tensor([7, 801])
    context = context.repeat(2, 1, 1)
    assert_close(models["diffusion"](latents, context, t), pipe.unet(latents, t, context).sample)
    picture = torch.randn(1, 3, 16, 24)
    assert_close(models["encoder"].moments(picture)[0], pipe.vae.encode(picture).latent_dist.mean)
    latents = torch.randn(1, 4, 4, 6)
    scaled = latents * pipe.vae.config.scaling_factor
    assert_close(models["decoder"](scaled), pipe.vae.decode(latents).sample)
    theirs = pipe.scheduler.config
    assert config.schedule.prediction_type == theirs.prediction_type
    assert (config.schedule.beta_start, config.schedule.beta_end) == (theirs.beta_start, theirs.beta_end)


@pytest.fixture(scope="module", params=[TINY, TINY_2], ids=["as SD 1", "as SD 2"])
def written_here(request, tmp_path_factory) -> tuple[ModelConfig, Path]:
    config, path = request.param, tmp_path_factory.mktemp("ours") / "tiny"
    save(config, random_networks(config), path, "diffusers", WORDS)
    return config, path


@pytest.fixture(scope="module")
def pipe(written_here):
    """Opens a folder written here with diffusers's pipeline; any tensor that does not fit is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return diffusers.StableDiffusionPipeline.from_pretrained(written_here[1], local_files_only=True)


def test_diffusers_reads_what_is_written_here(written_here, pipe):
    config, _ = written_here
    assert_agrees(random_networks(config), WORDS, config, pipe)


def test_diffusers_misses_nothing_and_finds_nothing_superfluous(written_here):
    _, path = written_here
    classes = {
        "unet": diffusers.UNet2DConditionModel,
        "vae": diffusers.AutoencoderKL,
        "text_encoder": transformers.CLIPTextModel,
    }
    for part, make in classes.items():
        _, report = make.from_pretrained(path / part, output_loading_info=True)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), part


def test_diffusers_draws_with_what_is_written_here(pipe):
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe("a cat", num_inference_steps=2, height=32, width=32, output_type="np").images
    assert drawn.shape == (1, 32, 32, 3) and drawn.std() > 0


@pytest.mark.parametrize(
    "how",
    [{}, {"variant": "fp16"}, {"max_shard_size": "100KB"}, {"safe_serialization": False}],
    ids=["plain", "fp16 variant", "sharded", ".bin"],
)
def test_what_diffusers_wrote_is_read_here(written_here, pipe, tmp_path, how):
    config, _ = written_here
    path = tmp_path / "tiny"
    pipe.save_pretrained(path, **how)
    files = [p.name for p in path.glob("unet/*")]
    if "variant" in how:
        assert "diffusion_pytorch_model.fp16.safetensors" in files
    if "max_shard_size" in how:
        assert "diffusion_pytorch_model.safetensors.index.json" in files
        assert not {"diffusion_pytorch_model.safetensors"} & set(files)
    if "safe_serialization" in how:
        assert "diffusion_pytorch_model.bin" in files
    found, models, tokenizer = load(path)
    assert found == config
    assert info(path).format == "diffusers"
    assert_agrees(models, tokenizer, found, pipe)


def test_half_precision_weights_of_diffusers_keep_their_bits(written_here, pipe, tmp_path):
    path = tmp_path / "half"
    shutil.copytree(written_here[1], path)
    half = diffusers.UNet2DConditionModel.from_pretrained(written_here[1] / "unet", torch_dtype=torch.float16)
    shutil.rmtree(path / "unet")
    half.save_pretrained(path / "unet", variant="fp16")
    _, models, _ = load(path)
    ours = models["diffusion"].state_dict()
    theirs = half.state_dict()
    assert ours["conv_out.weight"].dtype == torch.float16
    assert torch.equal(ours["conv_out.weight"], theirs["conv_out.weight"])
    assert {x.dtype for x in models["clip"].state_dict().values()} == {torch.float32}


def test_text_encoders_are_read_with_and_without_their_prefix(written_here, pipe, tmp_path):
    """transformers 4 writes `text_model.`, transformers 5 does not, and both are in use."""
    config, path = written_here
    with safe_open(path / "text_encoder" / "model.safetensors", "pt") as file:
        assert all(name.startswith("text_model.") for name in file.keys())  # noqa: SIM118
    pipe.save_pretrained(tmp_path / "theirs")
    for folder in path, tmp_path / "theirs":
        assert_agrees(load(folder)[1], WORDS, config, pipe)


def test_a_single_file_is_read_by_diffusers_key_conversion(written_here, tmp_path):
    """diffusers's own converters, an independent description of CompVis's names, understand our file."""
    from diffusers.loaders.single_file_utils import (
        convert_ldm_unet_checkpoint,
        convert_ldm_vae_checkpoint,
    )
    from safetensors.torch import load_file

    config, path = written_here
    save(config, random_networks(config), tmp_path / "x.safetensors", "compvis", WORDS)
    state = load_file(tmp_path / "x.safetensors")
    unet_config = diffusers.UNet2DConditionModel.load_config(path / "unet")
    vae_config = diffusers.AutoencoderKL.load_config(path / "vae")
    unet = convert_ldm_unet_checkpoint(dict(state), unet_config)
    vae = convert_ldm_vae_checkpoint(dict(state), vae_config)
    for part, converted in ("unet", unet), ("vae", vae):
        ours = load_file(path / part / "diffusion_pytorch_model.safetensors")
        assert ours.keys() == converted.keys()
        for name in ours:
            assert torch.equal(ours[name], converted[name].reshape(ours[name].shape)), name


def test_from_compvis_to_diffusers_and_back_to_the_same_file(written_here, tmp_path):
    config, _ = written_here
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    save(config, random_networks(config), one, "compvis", WORDS)
    config_1, models, tokenizer = load(one)
    save(config_1, models, tmp_path / config.name, "diffusers", tokenizer)
    save(*load(tmp_path / config.name)[:2], two, "compvis", tokenizer)
    with safe_open(one, "pt") as a, safe_open(two, "pt") as b:
        assert a.metadata() == b.metadata() and a.keys() == b.keys()
        assert all(torch.equal(a.get_tensor(name), b.get_tensor(name)) for name in a.keys())  # noqa: SIM118


def test_the_text_encoder_of_sd_2_in_one_file_is_read_by_diffusers_key_conversion(tmp_path):
    """OpenCLIP's names, with q, k and v in one tensor."""
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
    from safetensors.torch import load_file

    models = random_networks(TINY_2)
    save(TINY_2, models, tmp_path / "x.safetensors", "compvis", WORDS)
    save(TINY_2, models, tmp_path / "folder", "diffusers", WORDS)
    theirs = transformers.CLIPTextModel.from_pretrained(tmp_path / "folder" / "text_encoder")
    theirs.config.projection_dim = TINY_2.clip.width  # by which the converter splits q, k and v
    state = load_file(tmp_path / "x.safetensors")
    converted = convert_open_clip_checkpoint(theirs, state, prefix="cond_stage_model.model.")
    ours = load_file(tmp_path / "folder" / "text_encoder" / "model.safetensors")
    found = {name.removeprefix("text_model."): x for name, x in converted.items()}
    for name, x in ours.items():
        assert torch.equal(found.pop(name.removeprefix("text_model.")), x), name
    assert not [name for name in found if not name.endswith("position_ids")]
