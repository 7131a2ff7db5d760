"""LoRAs for Stable Diffusion 3, in every layout: the right rows of the right weights, and out again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from reifusion.families.sd3 import StableDiffusion3
from reifusion.model.tensors import ModelError
from reifusion.weights.lora import apply, load_lora, remove
from reifusion.weights.lora_tools import extract, write
from tests.tiny import native_state
from tests.tiny_sd3 import TINY, networks, tokenizers

R, WIDTH = 3, TINY.unet.width
# What a layer is called by diffusers and PEFT (q, k and v apart) and in Stability's own names (together), and
# the rows of our weight that it changes
Q, ALL = slice(0, WIDTH), slice(0, 3 * WIDTH)
LAYERS = {
    "diffusers": ("transformer.transformer_blocks.1.attn.to_q", "blocks.1.pixels.queries.qkv", Q),
    "diffusers, words": (
        "transformer.transformer_blocks.1.attn.add_v_proj",
        "blocks.1.words.queries.qkv",
        slice(2 * WIDTH, None),
    ),
    "diffusers, second": (
        "transformer.transformer_blocks.0.attn2.to_k",
        "blocks.0.pixels.second.qkv",
        slice(WIDTH, 2 * WIDTH),
    ),
    "peft": ("base_model.model.transformer_blocks.1.attn.to_out.0", "blocks.1.pixels.queries.out", Q),
    "kohya": ("lora_unet_joint_blocks_1_x_block_attn_qkv", "blocks.1.pixels.queries.qkv", ALL),
    "kohya, words": ("lora_unet_joint_blocks_1_context_block_mlp_fc2", "blocks.1.words.linear_2", Q),
    "kohya, last norm": ("lora_unet_final_layer_adaLN_modulation_1", "modulation", slice(0, 2 * WIDTH)),
    "kohya, diffusers's names": (
        "lora_transformer_transformer_blocks_1_ff_net_2",
        "blocks.1.pixels.linear_2",
        Q,
    ),
    "comfy": ("diffusion_model.joint_blocks.1.context_block.attn.qkv", "blocks.1.words.queries.qkv", ALL),
}


@pytest.fixture
def pipe() -> StableDiffusion3:
    return StableDiffusion3(TINY, tokenizers(), networks())


def written(path: Path, layer: str, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    down, up = (torch.randn(*shape, generator=generator) for shape in ((R, columns), (rows, R)))
    ends = ("lora_down", "lora_up") if layer.startswith("lora_") else ("lora_A", "lora_B")
    save_file({f"{layer}.{ends[0]}.weight": down, f"{layer}.{ends[1]}.weight": up}, path)
    return down, up


@pytest.mark.parametrize("layout", LAYERS)
def test_a_lora_changes_its_own_rows_and_comes_out_to_the_bit(pipe, layout, tmp_path):
    name, ours, rows = LAYERS[layout]
    before = {key: x.clone() for key, x in native_state(pipe.models).items()}
    weight = before[f"diffusion.{ours}.weight"]
    down, up = written(tmp_path / "lora.safetensors", name, len(weight[rows]), weight.shape[1])
    lora = load_lora(tmp_path / "lora.safetensors")
    apply(pipe, lora, 0.5)
    expected = weight.clone()
    expected[rows] += 0.5 * up @ down
    for key, x in native_state(pipe.models).items():
        if key == f"diffusion.{ours}.weight":
            torch.testing.assert_close(x, expected)
        else:
            assert torch.equal(x, before[key]), key
    remove(pipe, lora)
    assert all(torch.equal(x, before[key]) for key, x in native_state(pipe.models).items())


def test_text_encoders_are_changed_too(pipe, tmp_path):
    for name, network, ours in (
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1", "clip", "layers.0.linear_1"),
        ("lora_te2_text_model_encoder_layers_1_self_attn_out_proj", "clip_2", "layers.1.attention.out"),
        ("lora_te3_encoder_block_1_layer_1_DenseReluDense_wo", "t5", "layers.1.linear_2"),
    ):
        weight = pipe.models[network].get_parameter(f"{ours}.weight")
        before = weight.detach().clone()
        down, up = written(tmp_path / "lora.safetensors", name, *before.shape)
        apply(pipe, load_lora(tmp_path / "lora.safetensors"))
        torch.testing.assert_close(weight.detach(), before + up @ down)


@pytest.mark.parametrize(
    "layer",
    [
        "transformer.norm_out.linear",  # whose rows diffusers keeps in another order
        "transformer.transformer_blocks.1.attn2.to_q",  # which only the first block has
    ],
)
def test_a_layer_that_is_not_there_gets_one_sentence(pipe, layer, tmp_path):
    written(tmp_path / "lora.safetensors", layer, WIDTH, WIDTH)
    with pytest.raises(ModelError, match=f"no layer for {layer}"):
        apply(pipe, load_lora(tmp_path / "lora.safetensors"))


def test_a_lora_that_diffusers_has_trained_draws_as_there(tmp_path):
    """The LoRA is written by diffusers itself, and its transformer with the LoRA gives the same output."""
    diffusers = pytest.importorskip("diffusers")
    peft = pytest.importorskip("peft")
    from tests.parity.test_sd3_networks import assert_close, mmdit_pair, normal

    ours, theirs = mmdit_pair(TINY.unet)
    theirs.add_adapter(
        peft.LoraConfig(
            r=R, lora_alpha=2 * R, target_modules=["to_q", "add_k_proj", "to_out.0", "to_add_out"]
        )
    )
    generator = torch.Generator().manual_seed(0)
    for name, x in theirs.named_parameters():
        if "lora" in name:
            x.data.normal_(0, 0.2, generator=generator)
    layers = peft.get_peft_model_state_dict(theirs)
    diffusers.StableDiffusion3Pipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers)
    tensors = ours.state_dict()
    pipe = StableDiffusion3(TINY, tokenizers(), {**networks(), "diffusion": ours})
    inputs = normal(1, 16, 6, 4, dtype=torch.float32), normal(1, 5, 200, dtype=torch.float32)
    t, pooled = torch.tensor([100.0]), normal(1, 160, dtype=torch.float32)
    before = ours(*inputs, t, pooled)
    lora = load_lora(tmp_path)
    apply(pipe, lora, 2.0)  # α is not in the file, so that α/r = 2 has to be said
    with torch.no_grad():
        expected = theirs(inputs[0], inputs[1], pooled, t, return_dict=False)[0]
    assert_close(ours(*inputs, t, pooled), expected, 1e-4)
    remove(pipe, lora)
    assert torch.equal(ours(*inputs, t, pooled), before) and tensors.keys() == ours.state_dict().keys()


def test_the_lora_of_a_difference_brings_it_back(pipe, tmp_path):
    after = networks()
    for network, layer in ("diffusion", "blocks.1.words.queries.qkv"), ("t5", "layers.0.gate"):
        after[network].get_parameter(f"{layer}.weight").data += torch.randn(1) @ torch.randn(1, 1)
    difference = extract(pipe.models, after, rank=2, config=TINY)
    write(difference, tmp_path / "lora.safetensors")
    apply(pipe, load_lora(tmp_path / "lora.safetensors"))
    for (name, ours), theirs in zip(native_state(pipe.models).items(), native_state(after).values()):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)
