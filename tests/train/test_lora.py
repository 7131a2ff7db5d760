"""LoRAs in training: at first they change nothing, they end as a small file, and the model is unharmed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from docs.zork import LORA, draw_zork, draw_zorks
from reifusion.api import load
from reifusion.model.config import CLIPConfig, ModelConfig, UNetConfig, VAEConfig
from reifusion.model.pictures import to_tensor
from reifusion.model.pipeline import StableDiffusion
from reifusion.model.tokenizer import Tokenizer
from reifusion.train import lora as module
from reifusion.train.loop import LoopConfig
from reifusion.train.lora import (
    ATTENTION,
    CONVOLUTIONS,
    FEED_FORWARD,
    LAYOUTS,
    TEXT_ENCODER,
    LoRALayer,
    LoRATraining,
    attach,
    detach,
    lora_state,
    save_lora,
    train_lora,
)
from reifusion.train.text2image import Latents, forward_process
from reifusion.weights.lora import apply, load_lora
from reifusion.weights.lora_tools import plain
from tests.tiny import networks as random_networks

TOKENIZER = Tokenizer("z o\nzo r\nzor k</w>\n", context_length=8)
TINY = ModelConfig(
    name="tiny",
    size=32,
    clip=CLIPConfig(vocab_size=TOKENIZER.vocab_size, context_length=8, width=16, layers=2, heads=2),
    vae=VAEConfig(channels=(8, 8), layers=1, groups=4, scale_factor=1.0),
    unet=UNetConfig(channels=(16, 32), attention=(1, 1), layers=1, heads=(2, 2), context_width=16, groups=8),
)
EVERYTHING = ("diffusion.*", "clip.*attention.*", "clip.*linear_*")


def tiny() -> StableDiffusion:
    return StableDiffusion(TINY, TOKENIZER, random_networks(TINY))


def networks(pipe: StableDiffusion) -> Any:
    return nn.ModuleDict({"clip": pipe.models["clip"], "diffusion": pipe.models["diffusion"]})


def state(pipe: StableDiffusion) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": x.clone()
        for name, network in pipe.models.items()
        for key, x in network.state_dict().items()
    }


@torch.no_grad()
def output(pipe: StableDiffusion) -> Tensor:
    """Returns the U-Net's output (2, 4, 8, 6) for noise and a few words."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, TINY.clip.vocab_size, (2, 8), generator=generator)
    latents = torch.randn(2, 4, 8, 6, generator=generator)
    return pipe.models["diffusion"](latents, pipe.models["clip"](tokens), torch.tensor([3, 700]))


def randomize(parameters: list[nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(2)
    for parameter in parameters:
        parameter.data.normal_(std=0.3, generator=generator)


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


# Beside a model


@pytest.mark.parametrize("targets", [(ATTENTION,), (FEED_FORWARD, CONVOLUTIONS), (TEXT_ENCODER,), EVERYTHING])
def test_a_new_lora_changes_nothing(targets):
    pipe = tiny()
    before = output(pipe)
    attach(networks(pipe), targets=targets)
    # The layer alone runs another kernel than the layer with a LoRA beside it.
    torch.testing.assert_close(output(pipe), before, rtol=1e-4, atol=1e-5)


def test_a_and_b_are_trained_and_nothing_else():
    pipe = tiny()
    model = networks(pipe)
    trained = attach(model, rank=3, targets=EVERYTHING)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {id(parameter) for parameter in trained} == {
        id(parameter) for parameter in model.parameters() if parameter.requires_grad
    }
    assert all(".down." in name or ".up." in name for name in names)
    layers = [layer for layer in model.modules() if isinstance(layer, LoRALayer)]
    for layer in layers:
        assert all(not up.any() for up in layer.up)
        assert all(0 < down.std() < 1 and len(down) == 3 for down in layer.down)
    # Stacked q, k and v have a LoRA each: three pairs of matrices beside one.
    assert sorted({len(layer.down) for layer in layers}) == [1, 2, 3]


def test_the_same_seed_begins_with_the_same_numbers():
    one, two, other = (attach(networks(tiny()), seed=seed) for seed in (5, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(one, two))
    assert not all(torch.equal(a, b) for a, b in zip(one, other))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "targets",
    [
        (ATTENTION,),
        ("*.self_attention.k", "*.cross_attention.[qv]"),
        ("diffusion.*conv*", "*proj_*"),
        EVERYTHING,
    ],
)
def test_merged_is_the_same_as_beside(tmp_path, layout, targets):
    pipe, model = tiny(), networks(tiny())
    plain = output(pipe)
    model = networks(pipe)
    randomize(attach(model, rank=3, alpha=2.0, targets=targets))
    save_lora(model, tmp_path / "x.safetensors", layout)
    beside = output(pipe)
    assert (beside - plain).abs().max() > 0.01 * plain.abs().max()
    detach(model)
    apply(pipe, load_lora(tmp_path / "x.safetensors"))
    assert (output(pipe) - beside).abs().max() < 1e-5 * beside.abs().max()


def test_detaching_leaves_the_model_as_it_was():
    pipe = tiny()
    before, modules = state(pipe), [str(network) for network in pipe.models.values()]
    model = networks(pipe)
    randomize(attach(model, targets=EVERYTHING))
    detach(model)
    assert_same(before, state(pipe))
    assert modules == [str(network) for network in pipe.models.values()]
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_dropout_drops_in_training_only():
    pipe = tiny()
    model = networks(pipe)
    randomize(attach(model, dropout=0.5))
    assert torch.equal(output(pipe), output(pipe)) is False
    model.eval()
    assert torch.equal(output(pipe), output(pipe))


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"targets": ("diffusion.*attention.*", "unet.*")}, "no layer matches 'unet"),
        ({"targets": ("clip.norm",)}, "no layer matches 'clip.norm'"),
        ({"rank": 0}, "rank 0"),
        ({"alpha": float("nan")}, "alpha nan"),
        ({"dropout": 1.0}, "dropout 1.0"),
    ],
)
def test_impossible_settings_are_refused_and_leave_the_model_alone(how, says):
    pipe = tiny()
    model = networks(pipe)
    with pytest.raises(ValueError, match=says):
        attach(model, **how)
    assert not any(isinstance(layer, LoRALayer) for layer in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


# In a file


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_holds_what_was_trained_to_the_bit(tmp_path, layout):
    model = networks(tiny())
    randomize(attach(model, rank=3, alpha=1.5, targets=EVERYTHING))
    save_lora(model, tmp_path / "x.safetensors", layout, {"ss_output_name": "zork"})
    found = load_lora(tmp_path / "x.safetensors")
    expected = lora_state(model, layout)
    down, up = (
        (".lora_down.weight", ".lora_up.weight")
        if layout == "kohya"
        else (".lora_A.weight", ".lora_B.weight")
    )
    assert len(found.updates) == len([name for name in expected if name.endswith(down)])
    for name, update in plain(found).items():
        assert torch.equal(update.down, expected[name + down])
        assert torch.equal(update.up, expected[name + up])
        assert (update.rank, update.alpha) == (3, 1.5)
    assert found.metadata["ss_output_name"] == "zork"


def test_names_are_those_that_kohya_and_diffusers_expect():
    model = networks(tiny())
    attach(model, targets=("diffusion.middle.1.layers.0.self_attention.k", "clip.layers.0.attention.q"))
    kohya, peft = (
        sorted({name.split(".lora_")[0] for name in lora_state(model, layout)}) for layout in LAYOUTS
    )
    assert [name for name in kohya if not name.endswith(".alpha")] == [
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_k",
    ]
    assert peft == [
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_k",
    ]


def test_the_header_says_what_kohya_s_users_look_for(tmp_path):
    model = networks(tiny())
    attach(model, rank=5, alpha=2.0, targets=(ATTENTION, CONVOLUTIONS))
    save_lora(model, tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        header = file.metadata()
    assert header["ss_network_module"] == "networks.lora"
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("5", "2.0")
    assert json.loads(header["ss_network_args"]) == {"conv_dim": "5", "conv_alpha": "2.0"}


def test_a_failed_save_leaves_the_old_file_whole(tmp_path, monkeypatch):
    model, path = networks(tiny()), tmp_path / "x.safetensors"
    attach(model)
    save_lora(model, path)
    before = path.read_bytes()

    def full(tensors, file, header):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_tensors", full)
    with pytest.raises(OSError, match="No space"):
        save_lora(model, path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


def test_what_cannot_be_saved_is_refused(tmp_path):
    model = networks(tiny())
    with pytest.raises(ValueError, match="no LoRA"):
        save_lora(model, tmp_path / "x.safetensors")
    attach(model)
    with pytest.raises(ValueError, match="kohya, peft"):
        save_lora(model, tmp_path / "x.safetensors", "onnx")
    assert not list(tmp_path.iterdir())


# In training

QUICK = LoRATraining(
    loop=LoopConfig(steps=6, lr=1e-2, warmup=1, ema=0.5, log_every=1, mixed_precision="no"), batch=4
)


@pytest.fixture
def data() -> Latents:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(6, 4, 16, 16, generator=generator)
    return Latents(latents, torch.randint(0, TINY.clip.vocab_size, (6, 8), generator=generator))


def trained_layers(path: Path) -> set[str]:
    return {name for name, update in plain(load_lora(path)).items() if update.up.any()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_makes_a_file_and_leaves_the_model_as_it_was(tmp_path, data, dtype):
    pipe = tiny()
    for network in pipe.models.values():
        network.to(dtype)
    before, modules = state(pipe), [str(network) for network in pipe.models.values()]
    path = train_lora(pipe, data, replace(QUICK, train_text_encoder=True), tmp_path)
    assert path == tmp_path / "lora.safetensors"
    layers = trained_layers(path)
    assert len(layers) == len(load_lora(path).updates)
    assert {name.split("_")[1] for name in layers} == {"unet", "te"}
    assert_same(before, state(pipe))
    assert modules == [str(network) for network in pipe.models.values()]
    assert not any(layer.training for network in pipe.models.values() for layer in network.modules())


def test_only_the_lora_is_in_the_checkpoint(tmp_path, data):
    pipe = tiny()
    train_lora(pipe, data, QUICK, tmp_path)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    for part in ("model", "ema"):
        assert saved[part] and all(".down." in name or ".up." in name for name in saved[part])
    assert (tmp_path / "checkpoint.pt").stat().st_size < 1_000_000


def test_a_stopped_run_resumes_and_ends_in_the_same_bits(tmp_path, data):
    whole = train_lora(tiny(), data, replace(QUICK, dropout=0.2), tmp_path / "whole")

    class Dies:
        """Data that ends the run at its fifth batch."""

        drawn, device = 0, torch.device("cpu")

        def __len__(self) -> int:
            return len(data)

        def describe(self, generator: torch.Generator, count: int) -> str:
            return data.describe(generator, count)

        def latent_batch(self, generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
            self.drawn += 1
            if self.drawn == 5:
                raise KeyboardInterrupt
            return data.latent_batch(generator, count)

    often = replace(QUICK, dropout=0.2, loop=replace(QUICK.loop, checkpoint_minutes=0.0))
    pipe = tiny()
    before = state(pipe)
    with pytest.raises(KeyboardInterrupt):
        train_lora(pipe, Dies(), often, tmp_path / "cut")
    assert_same(before, state(pipe))  # after an interruption, too
    assert (tmp_path / "cut" / "lora.safetensors").exists()  # from the last checkpoint
    resumed = train_lora(pipe, data, often, tmp_path / "cut")
    assert_same(load_file(resumed), load_file(whole))


def test_a_sheet_that_fails_changes_nothing(tmp_path, data):
    often = replace(QUICK, dropout=0.2, loop=replace(QUICK.loop, checkpoint_minutes=0.0))

    def fails(step: int, shown: StableDiffusion) -> Image.Image:
        raise MemoryError

    one = train_lora(tiny(), data, often, tmp_path / "one")
    with pytest.warns(UserWarning, match="cannot be shown"):
        two = train_lora(tiny(), data, often, tmp_path / "two", watch=fails)
    assert_same(load_file(one), load_file(two))


def test_whoever_watches_sees_the_average_in_the_model(tmp_path, data):
    pipe, seen = tiny(), {}

    def watch(step: int, shown: StableDiffusion) -> Image.Image:
        seen[step] = output(shown)
        return Image.new("RGB", (8, 8))

    path = train_lora(pipe, data, QUICK, tmp_path, tmp_path / "out" / "zork.safetensors", "peft", watch=watch)
    assert path == tmp_path / "out" / "zork.safetensors"
    apply(pipe, load_lora(path))
    assert list(seen) == [6]
    torch.testing.assert_close(seen[6], output(pipe), rtol=1e-4, atol=1e-5)
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_folder_of_pictures_is_enough(tmp_path):
    draw_zorks(tmp_path / "zorks", 4)
    (tmp_path / "zorks" / "metadata.jsonl").unlink()
    training = replace(QUICK, caption="a zork")
    with pytest.warns(UserWarning, match="caption"):
        path = train_lora(tiny(), tmp_path / "zorks", training, tmp_path / "run", size=16, mirror=True)
    (latents,) = (tmp_path / "run" / "latents").glob("*/16x16/*.safetensors")
    assert load_file(latents)["mean"].shape == (8, 4, 8, 8)  # four zorks, and mirrored
    assert trained_layers(path)


# A zork


@pytest.mark.slow
def test_the_mini_learns_a_zork_from_twenty_pictures(tmp_path):
    """Forty steps are enough to lower the loss on pictures that it has not seen."""
    draw_zorks(tmp_path / "zorks")
    pipe = load("mini", device="cpu")
    training = LoRATraining(
        loop=LoopConfig(steps=40, lr=3e-3, warmup=5, ema=0.9, log_every=1, seed=1),
        batch=4,
        caption_dropout=0.0,
    )
    before = zork_loss(pipe)
    path = train_lora(pipe, tmp_path / "zorks", training, tmp_path / "run")
    assert zork_loss(pipe) == before
    apply(pipe, load_lora(path))
    assert zork_loss(pipe) < 0.9 * before


def test_the_book_s_lora_knows_zorks_that_it_has_not_seen():
    pipe = load("mini", device="cpu")
    before = zork_loss(pipe)
    apply(pipe, load_lora(LORA))
    assert zork_loss(pipe) < 0.75 * before


@torch.no_grad()
def zork_loss(pipe: StableDiffusion) -> float:
    """Returns the loss on eight zorks that training did not show, always with the same noise."""
    pictures, captions = zip(*(draw_zork(seed) for seed in range(100, 108)))
    latents = pipe.encode_image(torch.cat([to_tensor(picture) for picture in pictures]))  # (8, 4, 16, 16)
    sampler, t = forward_process(pipe.config.schedule), torch.linspace(100, 900, 8).long()
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    unet, context = pipe.models["diffusion"], pipe.encode_text(captions)
    output = unet(sampler.add_noise(latents, t, noise).to(pipe.dtype), context, t).float()
    return (output - sampler.target(latents, t, noise)).pow(2).mean().item()
