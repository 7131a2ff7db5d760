"""LoRAs made here have the same effect in diffusers, and LoRAs made by PEFT have the same effect here."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reifusion.train.lora import ATTENTION, LAYOUTS, TEXT_ENCODER, attach, detach, save_lora
from reifusion.weights import load, save
from reifusion.weights.lora import apply, load_lora, remove
from tests.tiny import SMALL, WORDS, random_networks

os.environ.setdefault("HF_HUB_OFFLINE", "1")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

# As in SD 2.x and the mini: heads of one width, and linear layers around the transformer.
SMALL_2 = replace(SMALL, unet=replace(SMALL.unet, heads=(2, 4), linear_projection=True))

TARGETS = {
    "attention": (ATTENTION, TEXT_ENCODER),
    "every layer": ("diffusion.*", "clip.*attention.*", "clip.*linear_*"),
    "q and v": ("diffusion.*attention.[qv]",),  # diffusers reads kohya's text encoder only with `out`
}


@pytest.fixture(scope="module", params=[SMALL, SMALL_2], ids=["as SD 1", "as SD 2"])
def folder(request, tmp_path_factory) -> Path:
    """Writes a model with random weights, in diffusers's format."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    save(request.param, random_networks(request.param), path, "diffusers", WORDS)
    return path


@pytest.fixture
def ours(folder) -> dict[str, nn.Module]:
    return load(folder)[1]


@pytest.fixture
def theirs(folder) -> Any:
    return diffusers.StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)


@torch.no_grad()
def outputs(models: Any) -> tuple[Tensor, Tensor]:
    """Returns the outputs of text encoder, (1, 16, 24), and U-Net, (2, 4, 6, 10): ours or a pipeline's."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 500, (1, 16), generator=generator)
    latents, t = torch.randn(2, 4, 6, 10, generator=generator), torch.tensor([7, 801])
    words = torch.randn(2, 16, 24, generator=generator)
    if isinstance(models, dict):
        return models["clip"](tokens), models["diffusion"](latents, words, t)
    return models.text_encoder(tokens).last_hidden_state, models.unet(latents, t, words).sample


def error(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> float:
    """Returns the largest difference, as a share of the output's scale."""
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, theirs))


def bits(models: dict[str, nn.Module]) -> dict[str, Tensor]:
    return {f"{name}.{key}": x.clone() for name in models for key, x in models[name].state_dict().items()}


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_diffusers_reads_what_is_written_here(ours, theirs, tmp_path, layout, targets):
    plain, untouched = outputs(ours), bits(ours)
    model = nn.ModuleDict({"clip": ours["clip"], "diffusion": ours["diffusion"]})
    generator = torch.Generator().manual_seed(2)
    for matrix in attach(model, rank=4, alpha=1.0, targets=targets):
        matrix.data.normal_(std=0.2, generator=generator)
    save_lora(model, tmp_path / "x.safetensors", layout)
    beside = outputs(ours)
    detach(model)
    apply(ours, load_lora(tmp_path / "x.safetensors"))
    merged = outputs(ours)
    theirs.load_lora_weights(tmp_path / "x.safetensors", local_files_only=True)
    reference = outputs(theirs)
    assert error(plain, reference) > 0.01
    assert error(merged, reference) < 1e-5
    assert error(beside, reference) < 1e-5
    remove(ours)
    assert all(torch.equal(x, untouched[name]) for name, x in bits(ours).items())


@pytest.mark.parametrize(
    ("modules", "more"),
    [
        (["to_q", "to_k", "to_v", "to_out.0"], {}),
        (["to_q", "to_k"], {"alpha_pattern": {"attn2.to_k": 7}}),
        (["to_k", "proj_in", "ff.net.0.proj", "ff.net.2", "time_emb_proj", "linear_1"], {"use_rslora": True}),
        (["conv1", "conv2", "conv_shortcut", "conv_in", "conv_out", "downsamplers.0.conv"], {}),
    ],
    ids=["attention", "an alpha of its own", "linear, scaled by the root of the rank", "convolutions"],
)
def test_what_peft_made_is_read_here(ours, theirs, tmp_path, modules, more):
    from diffusers.training_utils import _collate_lora_metadata
    from peft.utils import get_peft_model_state_dict

    torch.manual_seed(3)
    random = {"init_lora_weights": False}
    theirs.unet.add_adapter(peft.LoraConfig(r=4, lora_alpha=2, target_modules=modules, **random, **more))
    theirs.text_encoder.add_adapter(
        peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj", "out_proj", "fc1"], **random)
    )
    parts = {"unet": theirs.unet, "text_encoder": theirs.text_encoder}
    theirs.save_lora_weights(
        tmp_path, *map(get_peft_model_state_dict, parts.values()), **_collate_lora_metadata(parts)
    )
    plain, reference = outputs(ours), outputs(theirs)
    apply(ours, load_lora(tmp_path / "pytorch_lora_weights.safetensors"))
    assert error(plain, reference) > 0.01
    assert error(outputs(ours), reference) < 1e-5


def noise(module: nn.Module, mark: str) -> None:
    generator = torch.Generator().manual_seed(4)
    for name, x in module.named_parameters():
        if mark in name:
            x.data.normal_(std=0.2, generator=generator)


MODULES = ["to_q", "to_k", "proj_in", "ff.net.2", "conv1", "conv_in", "conv_out"]


def test_a_dora_of_peft_is_read_here(ours, theirs, tmp_path):
    from peft.utils import get_peft_model_state_dict

    theirs.unet.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, target_modules=MODULES, use_dora=True))
    noise(theirs.unet, "lora_")
    for name, x in theirs.unet.named_parameters():
        if "magnitude" in name:
            x.data.abs_().add_(0.5)
    theirs.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(theirs.unet))
    plain, reference, untouched = outputs(ours), outputs(theirs), bits(ours)
    lora = load_lora(tmp_path)
    assert {type(one).__name__ for one in lora.updates.values()} == {"DoRA"}
    apply(ours, lora)
    assert error(plain[1:], reference[1:]) > 0.01
    assert error(outputs(ours)[1:], reference[1:]) < 1e-5
    remove(ours)
    assert all(torch.equal(x, untouched[name]) for name, x in bits(ours).items())


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ("LoHaConfig", {"alpha": 3}),
        ("LoHaConfig", {"alpha": 3, "use_effective_conv2d": True, "alpha_pattern": {"to_q": 5}}),
        ("LoKrConfig", {"alpha": 3}),
        ("LoKrConfig", {"alpha": 3, "use_effective_conv2d": True, "decompose_factor": 4}),
        ("LoKrConfig", {"alpha": 3, "r": 64, "decompose_both": True}),  # so that all sides are whole
    ],
    ids=["LoHa", "LoHa in Tucker's form", "LoKr", "LoKr in Tucker's form", "LoKr, whole"],
)
def test_a_loha_or_a_lokr_of_peft_is_read_here(ours, theirs, tmp_path, config, options):
    options = {"r": 2, "target_modules": [m for m in MODULES if not m.startswith("conv_")]} | options
    changed = peft.get_peft_model(theirs.unet, getattr(peft, config)(**options))
    noise(changed, "hada_" if config == "LoHaConfig" else "lokr_")
    if options["r"] == 64:
        assert not any("_a" in name for name, _ in changed.named_parameters() if "lokr" in name)
    changed.save_pretrained(tmp_path)
    plain, reference = outputs(ours), outputs(theirs)
    apply(ours, load_lora(tmp_path))
    assert error(plain[1:], reference[1:]) > 0.01
    assert error(outputs(ours)[1:], reference[1:]) < 1e-5


def test_biases_of_peft_are_read_here(ours, theirs, tmp_path):
    options = {"r": 4, "lora_alpha": 2, "lora_bias": True}
    changed = peft.get_peft_model(
        theirs.unet, peft.LoraConfig(target_modules=["to_out.0", "conv1"], **options)
    )
    noise(changed, "lora_")
    changed.save_pretrained(tmp_path)
    plain, reference = outputs(ours), outputs(theirs)
    lora = load_lora(tmp_path)
    assert len(lora.biases) == len(lora.updates)
    apply(ours, lora)
    assert error(plain[1:], reference[1:]) > 0.01
    assert error(outputs(ours)[1:], reference[1:]) < 1e-5
    remove(ours, lora)
    assert error(outputs(ours), plain) == 0


def test_a_lora_for_the_u_net_alone_is_read_here(ours, theirs, tmp_path):
    torch.manual_seed(3)
    theirs.unet.add_adapter(
        peft.LoraConfig(r=4, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    )
    theirs.unet.save_lora_adapter(tmp_path)
    plain, reference = outputs(ours), outputs(theirs)
    apply(ours, load_lora(tmp_path / "pytorch_lora_weights.safetensors"))
    assert error(plain[1:], reference[1:]) > 0.01
    assert error(outputs(ours), reference) < 1e-5


def test_weights_and_several_at_once_are_as_in_diffusers(ours, theirs, tmp_path):
    model = nn.ModuleDict({"clip": ours["clip"], "diffusion": ours["diffusion"]})
    for seed, name in enumerate("ab"):
        for matrix in attach(model, rank=2 + seed, targets=(ATTENTION, TEXT_ENCODER)):
            matrix.data.normal_(std=0.2, generator=torch.Generator().manual_seed(seed))
        save_lora(model, tmp_path / f"{name}.safetensors")
        detach(model)
        theirs.load_lora_weights(tmp_path / f"{name}.safetensors", adapter_name=name, local_files_only=True)
    theirs.set_adapters(["a", "b"], [0.7, -0.4])
    apply(ours, load_lora(tmp_path / "a.safetensors"), 0.7)
    apply(ours, load_lora(tmp_path / "b.safetensors"), -0.4)
    assert error(outputs(ours), outputs(theirs)) < 1e-5
