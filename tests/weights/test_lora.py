"""LoRAs: read in every layout, added to the right rows of the right weights, and taken out bit for bit."""

from __future__ import annotations

import copy
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from reifusion.model.clip import CLIP
from reifusion.model.config import CLIPConfig, ModelConfig, UNetConfig, VAEConfig
from reifusion.model.diffusion import UNet
from reifusion.model.tensors import ModelError
from reifusion.weights.lora import LoRA, Update, apply, load_lora, places, remove
from reifusion.weights.lora_kinds import LYCORIS, AnyUpdate
from reifusion.weights.lora_tools import plain

TINY = ModelConfig(
    name="tiny",
    size=32,
    clip=CLIPConfig(vocab_size=600, context_length=8, width=24, layers=2, heads=4),
    vae=VAEConfig(channels=(16, 32), layers=1, groups=8),
    unet=UNetConfig(channels=(16, 32), attention=(1, 0), layers=1, heads=(4, 4), context_width=24, groups=8),
)
R = 3  # the rank of the LoRAs made here

# One layer, as it is called in the files of different programs.
KEY = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k"
DOTTED = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
TEXT = "text_model.encoder.layers.1.self_attn"
U_NET = {
    "kohya": (f"lora_unet_{KEY}.lora_down.weight", f"lora_unet_{KEY}.lora_up.weight"),
    "kohya, of CompVis's U-Net": (
        "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_k.lora_down.weight",
        "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_k.lora_up.weight",
    ),
    "peft": (f"unet.{DOTTED}.to_k.lora_A.weight", f"unet.{DOTTED}.to_k.lora_B.weight"),
    "diffusers 0.22": (f"unet.{DOTTED}.to_k.lora.down.weight", f"unet.{DOTTED}.to_k.lora.up.weight"),
    "diffusers 0.17": (
        f"unet.{DOTTED}.processor.to_k_lora.down.weight",
        f"unet.{DOTTED}.processor.to_k_lora.up.weight",
    ),
    "diffusers 0.12": (
        f"{DOTTED}.processor.to_k_lora.down.weight",
        f"{DOTTED}.processor.to_k_lora.up.weight",
    ),
    "peft, a U-Net's alone": (f"{DOTTED}.to_k.lora_A.weight", f"{DOTTED}.to_k.lora_B.weight"),
}
ENCODER = {
    "kohya": (
        "lora_te_text_model_encoder_layers_1_self_attn_v_proj.lora_down.weight",
        "lora_te_text_model_encoder_layers_1_self_attn_v_proj.lora_up.weight",
    ),
    "peft": (f"text_encoder.{TEXT}.v_proj.lora_A.weight", f"text_encoder.{TEXT}.v_proj.lora_B.weight"),
    "peft, of transformers 5": (
        "text_encoder.encoder.layers.1.self_attn.v_proj.lora_A.weight",
        "text_encoder.encoder.layers.1.self_attn.v_proj.lora_B.weight",
    ),
    "diffusers 0.22": (
        f"text_encoder.{TEXT}.v_proj.lora_linear_layer.down.weight",
        f"text_encoder.{TEXT}.v_proj.lora_linear_layer.up.weight",
    ),
    "diffusers 0.17": (
        f"text_encoder.{TEXT}.to_v_lora.down.weight",
        f"text_encoder.{TEXT}.to_v_lora.up.weight",
    ),
}


def tiny(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """A text encoder and a U-Net, the same each time."""
    generator = torch.Generator().manual_seed(0)
    models: dict[str, nn.Module] = {"clip": CLIP(TINY.clip), "diffusion": UNet(TINY.unet)}
    for module in models.values():
        for x in module.parameters():
            x.data.normal_(std=0.1, generator=generator)
        module.to(dtype).eval()
    return models


def state(models: dict[str, Any]) -> dict[str, Tensor]:
    return {f"{net}.{name}": x.clone() for net in models for name, x in models[net].state_dict().items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    return [name for name in before if not torch.equal(before[name], after[name])]


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def delta(update: AnyUpdate) -> Tensor:
    return update.delta(torch.zeros(update.shape))


def written(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file(tensors, path, metadata)
    return path


# Reading


@pytest.mark.parametrize("names", U_NET.values(), ids=U_NET)
def test_every_layout_changes_the_same_rows_of_the_u_net(tmp_path, names):
    models, down, up = tiny(), random(R, 16), random(16, R, seed=2)
    before = state(models)
    apply(models, load_lora(written(tmp_path / "x.safetensors", dict(zip(names, (down, up))))))
    after = state(models)
    name = "diffusion.down.1.1.layers.0.self_attention.qkv.weight"
    assert changed(before, after) == [name]
    change = torch.cat([torch.zeros(16, 16), up @ down, torch.zeros(16, 16)])  # q, k, v
    assert torch.equal(after[name], before[name] + change)


@pytest.mark.parametrize("names", ENCODER.values(), ids=ENCODER)
def test_every_layout_changes_the_same_rows_of_the_text_encoder(tmp_path, names):
    models, down, up = tiny(), random(R, 24), random(24, R, seed=2)
    before = state(models)
    apply(models, load_lora(written(tmp_path / "x.safetensors", dict(zip(names, (down, up))))))
    after = state(models)
    name = "clip.layers.1.attention.qkv.weight"
    assert changed(before, after) == [name]
    assert torch.equal(after[name][:48], before[name][:48])
    assert torch.equal(after[name][48:], before[name][48:] + up @ down)


@pytest.mark.parametrize(
    "name", ["unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_out_lora", "unet.mid_block."
    "attentions.0.transformer_blocks.0.attn2.to_out.0.lora"]
)  # fmt: skip
def test_the_output_projection_is_found_by_its_old_name(tmp_path, name):
    models, down, up = tiny(), random(R, 32), random(32, R, seed=2)
    before = state(models)
    tensors = {f"{name}.down.weight": down, f"{name}.up.weight": up}
    apply(models, load_lora(written(tmp_path / "x.safetensors", tensors)))
    assert changed(before, state(models)) == ["diffusion.middle.1.layers.0.cross_attention.out.weight"]


def test_pickles_are_read_and_code_in_them_is_not_run(tmp_path):
    names, down, up = U_NET["kohya"], random(R, 16), random(16, R)
    torch.save(dict(zip(names, (down, up))), tmp_path / "x.pt")
    (update,) = plain(load_lora(tmp_path / "x.pt")).values()
    assert torch.equal(update.down, down) and torch.equal(update.up, up)
    torch.save({names[0]: os.system}, tmp_path / "code.pt")
    with pytest.raises(ModelError, match="holds code"):
        load_lora(tmp_path / "code.pt")


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (None, R),
        (torch.tensor(1.5), 1.5),
        (torch.tensor(4), 4),
        (torch.tensor([2.0], dtype=torch.bfloat16), 2),
    ],
)
def test_alpha_is_the_rank_where_it_is_missing(tmp_path, alpha, expected):
    tensors = {
        f"lora_unet_{KEY}.lora_down.weight": random(R, 16),
        f"lora_unet_{KEY}.lora_up.weight": random(16, R),
    }
    if alpha is not None:
        tensors[f"lora_unet_{KEY}.alpha"] = alpha
    (update,) = plain(load_lora(written(tmp_path / "x.safetensors", tensors))).values()
    assert (update.alpha, update.rank) == (expected, R)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, R),
        ({"unet.lora_alpha": 6}, 6),
        ({"text_encoder.lora_alpha": 6}, R),
        ({"unet.lora_alpha": 6, "unet.alpha_pattern": {"attn1.to_k": 2, "to_q": 4}}, 2),
        ({"unet.lora_alpha": 6, "unet.alpha_pattern": {"o_k": 2}}, 6),
        ({"unet.lora_alpha": 6, "unet.use_rslora": True}, 6 * math.sqrt(R)),
    ],
)
def test_alpha_of_a_peft_layout_is_in_its_header(tmp_path, config, expected):
    tensors = dict(zip(U_NET["peft"], (random(R, 16), random(16, R))))
    header = {"lora_adapter_metadata": json.dumps(config)}
    (update,) = plain(load_lora(written(tmp_path / "x.safetensors", tensors, header))).values()
    assert update.alpha == expected


def test_facts_in_the_header_are_kept(tmp_path):
    tensors = dict(zip(U_NET["kohya"], (random(R, 16), random(16, R))))
    path = written(tmp_path / "x.safetensors", tensors, {"ss_output_name": "zork"})
    assert load_lora(path).metadata["ss_output_name"] == "zork"


# Adding


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 20), st.floats(0.1, 32), st.floats(-3, 3), st.integers(0, 2**31))
def test_the_weight_becomes_w_plus_weight_times_alpha_over_rank_times_ba(rank, alpha, weight, seed):
    models, down, up = tiny(), random(rank, 32, seed=seed), random(32, rank, seed=seed + 1)
    layer = models["diffusion"].middle[1].layers[0].cross_attention.out
    before = layer.weight.detach().clone()
    apply(
        models,
        LoRA({"unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0": Update(down, up, alpha)}),
        weight,
    )
    expected = before.double() + weight * alpha / rank * (up.double() @ down.double())
    torch.testing.assert_close(layer.weight.double(), expected, rtol=1e-5, atol=1e-4)


def test_a_convolution_gets_the_two_convolutions_in_one(tmp_path):
    models = tiny()
    conv = models["diffusion"].down[1][0].conv_1
    down, up = random(R, 16, 3, 3), random(16, R, 1, 1, seed=2)
    x = random(2, 16, 5, 7, seed=3)
    before = conv(x)
    apply(models, LoRA({"lora_unet_down_blocks_0_resnets_0_conv1": Update(down, up, 6.0)}))
    torch.testing.assert_close(
        conv(x), before + 2 * F.conv2d(F.conv2d(x, down, padding=1), up), rtol=1e-4, atol=1e-4
    )


def test_a_pointwise_convolution_and_a_linear_layer_are_the_same_thing():
    down, up = random(R, 16), random(16, R, seed=2)
    results = []
    for shapes in ((down, up), (down[..., None, None], up[..., None, None])):
        models = tiny()
        apply(models, LoRA({"lora_unet_down_blocks_0_attentions_0_proj_in": Update(*shapes, 1.0)}))
        results.append(state(models))
    assert changed(*results) == []
    assert changed(results[0], state(tiny())) == ["diffusion.down.1.1.proj_in.weight"]


def test_there_is_a_place_for_every_row_of_every_weight():
    models = tiny()
    rows: dict[str, int] = {}
    for place in places(TINY):
        layer = models[place.network].get_submodule(place.layer)
        if not isinstance(layer, nn.Identity):  # a skip connection without a convolution
            name = f"{place.network}.{place.layer}.weight"
            rows[name] = rows.get(name, 0) + len(layer.weight) // place.parts
    assert rows == {name: len(x) for name, x in state(models).items() if name.endswith(".weight")}
    names = [place.name for place in places(TINY)]
    assert len(set(names)) == len(names)
    assert {f"diffusion.middle.1.layers.0.self_attention.{part}" for part in ("q", "k", "v", "out")} <= set(
        names
    )
    assert {f"diffusion.middle.1.layers.0.cross_attention.{part}" for part in ("q", "k", "v", "out")} <= set(
        names
    )


OUT = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"
QUERY = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
CONV = "lora_unet_up_blocks_0_resnets_1_conv2"


def some_loras() -> list[LoRA]:
    return [
        LoRA({OUT: Update(random(R, 32), random(32, R, seed=2), 1.0)}),
        LoRA({OUT: Update(random(1, 32, seed=3), random(32, 1, seed=4), 1.0)}),
        LoRA(
            {
                OUT: Update(random(2, 32, seed=5), random(32, 2, seed=6), 1.0),
                QUERY: Update(random(2, 24, seed=7), random(24, 2, seed=8), 1.0),
                CONV: Update(random(2, 32, 3, 3, seed=9), random(32, 2, 1, 1, seed=10), 1.0),
            }
        ),
    ]


@settings(deadline=None, max_examples=25)
@given(
    st.lists(
        st.tuples(st.sampled_from(["apply", "remove"]), st.integers(0, 2), st.floats(-2, 2)), max_size=8
    ),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_a_removed_lora_leaves_no_trace_in_any_order(steps, dtype):
    loras, models = some_loras(), tiny(dtype)
    there: list[tuple[int, float]] = []
    for what, which, weight in steps:
        if what == "apply":
            apply(models, loras[which], weight)
            there.append((which, weight))
        elif any(entry[0] == which for entry in there):
            remove(models, loras[which])
            there = [entry for entry in there if entry[0] != which]
        else:
            before = state(models)
            with pytest.raises(ValueError, match="the LoRA is not in this model"):
                remove(models, loras[which])
            assert changed(before, state(models)) == []
    fresh = tiny(dtype)
    for which, weight in there:
        apply(fresh, loras[which], weight)
    assert changed(state(fresh), state(models)) == []
    remove(models)
    assert changed(state(tiny(dtype)), state(models)) == []


def test_a_copy_of_a_model_knows_its_loras():
    models, (one, two, _) = tiny(), some_loras()
    apply(models, one)
    apply(models, two)
    twin = copy.deepcopy(models)
    remove(twin, one)
    only_two = tiny()
    apply(only_two, two)
    assert changed(state(only_two), state(twin)) == []
    remove(models)
    assert changed(state(tiny()), state(models)) == []
    assert changed(state(only_two), state(twin)) == []


def test_loras_add_up():
    models = tiny()
    before = state(models)
    for lora, weight in zip(some_loras(), (1.0, -0.5, 2.0)):
        apply(models, lora, weight)
    total = sum(
        (w * delta(lora.updates[OUT]) for lora, w in zip(some_loras(), (1.0, -0.5, 2.0))), torch.zeros(())
    )
    name = "diffusion.middle.1.layers.0.cross_attention.out.weight"
    torch.testing.assert_close(state(models)[name], before[name] + total)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once_from_float32(dtype):
    models, (one, two, _) = tiny(dtype), some_loras()
    before = state(models)["diffusion.middle.1.layers.0.cross_attention.out.weight"]
    assert before.dtype == dtype
    apply(models, one, 0.01)
    apply(models, two, 0.01)
    exact = before.float() + 0.01 * delta(one.updates[OUT]) + 0.01 * delta(two.updates[OUT])
    assert torch.equal(
        state(models)["diffusion.middle.1.layers.0.cross_attention.out.weight"], exact.to(dtype)
    )


def test_a_network_stays_in_the_order_of_memory_it_was_in():
    models = tiny()
    models["diffusion"].to(memory_format=torch.channels_last)
    conv, expected = models["diffusion"].up[1][0].conv_2, tiny()["diffusion"].up[1][0].conv_2
    apply(models, some_loras()[2])
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(
        conv.weight.contiguous(), expected.weight + delta(some_loras()[2].updates[CONV])
    )
    remove(models)
    assert torch.equal(conv.weight, expected.weight)


# What does not fit


@pytest.mark.parametrize(
    ("layer", "update", "says"),
    [
        ("lora_unet_down_blocks_9_attentions_0_proj_in", ((R, 16), (16, R)), "no layer for lora_unet_down"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1", ((R, 24), (96, R)), "no layer for lora_te2_"),
        ("unet.conv_norm_out", ((R, 1), (16, R)), "no layer for unet.conv_norm_out"),
        (OUT, ((R, 48), (32, R)), r"to_out.0 changes .* shape \(32, 48, 1, 1\), .* \(32, 32, 1, 1\)"),
        (OUT, ((R, 32, 3, 3), (32, R, 1, 1)), r"\(32, 32, 3, 3\), and the model's is \(32, 32, 1, 1\)"),
        (CONV, ((R, 32), (32, R)), r"\(32, 32, 1, 1\), and the model's is \(32, 32, 3, 3\)"),
        (CONV, ((R, 32, 1, 1), (32, R, 3, 3)), "does not fit"),
        (f"lora_unet_{KEY}", ((R, 16), (48, R)), r"\(48, 16, 1, 1\), and the model's is \(16, 16, 1, 1\)"),
    ],
)  # fmt: skip
def test_a_lora_that_does_not_fit_is_named_and_changes_nothing(layer, update, says):
    models = tiny()
    before = state(models)
    down, up = (random(*shape) for shape in update)
    good = some_loras()[2].updates
    with pytest.raises(ModelError, match=says) as error:
        apply(models, LoRA(good | {layer: Update(down, up, 1.0)}, path="x.safetensors"))
    assert str(error.value).startswith("x.safetensors ") and "\n" not in str(error.value)
    assert changed(before, state(models)) == []


def test_the_same_layer_under_two_names_is_refused():
    update = Update(random(R, 16), random(16, R), 1.0)
    with pytest.raises(ModelError, match="twice"):
        apply(tiny(), LoRA({f"lora_unet_{KEY}": update, f"unet.{DOTTED}.to_k": update}))


@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_a_weight_that_is_no_number_is_refused(weight):
    with pytest.raises(ValueError, match="finite"):
        apply(tiny(), some_loras()[0], weight)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (f"lora_unet_{KEY}.oft_blocks", "OFT"),
        (f"lora_unet_{KEY}.on_input", "IA³"),
        (f"lora_unet_{KEY}.a1.weight", "GLoRA"),
        (f"lora_unet_{KEY}.set_weight", "replace"),
    ],
)
def test_other_kinds_are_refused_by_name(tmp_path, name, kind):
    tensors = dict(zip(U_NET["kohya"], (random(R, 16), random(16, R)))) | {name: random(4)}
    with pytest.raises(ModelError, match=kind) as error:
        load_lora(written(tmp_path / "x.safetensors", tensors))
    assert name in str(error.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({U_NET["kohya"][0]: None}, "lacks its down matrix"),
        ({U_NET["kohya"][1]: None}, "lacks its up matrix"),
        ({U_NET["kohya"][0]: torch.full((R, 16), math.nan)}, "down.weight holds a number that is not finite"),
        ({U_NET["kohya"][0]: random(R + 1, 16)}, r"do not fit together, \(4, 16\) and \(16, 3\)"),
        ({U_NET["kohya"][0]: random(16)}, r"a tensor down of shape \(16,\), which cannot be"),
        ({U_NET["kohya"][0]: random(0, 16), U_NET["kohya"][1]: random(16, 0)}, "which cannot be"),
        ({f"lora_unet_{KEY}.alpha": torch.ones(2)}, "is not one number"),
        ({"something.weight": torch.ones(2)}, "it has a tensor something.weight"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused(tmp_path, change, says):
    tensors = dict(zip(U_NET["kohya"], (random(R, 16), random(16, R)))) | change
    with pytest.raises(ModelError, match=says):
        load_lora(written(tmp_path / "x.safetensors", {n: x for n, x in tensors.items() if x is not None}))


FIT = dict(zip(U_NET["kohya"], (random(R, 16), random(16, R))))
HADA = {
    f"lora_unet_{KEY}.hada_w{i}_{x}": random(*s) for i in (1, 2) for x, s in (("a", (16, R)), ("b", (R, 16)))
}


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({f"lora_unet_{KEY}.dora_scale": random(16, 1)}, "lacks the tensors that its lengths belongs to"),
        (FIT | {f"lora_unet_{KEY}.dora_scale": random(4, 4)}, r"lengths of shape \(4, 4\)"),
        (FIT | {f"lora_unet_{KEY}.diff": random(16, 16)}, "a LoRA and a tensor diff, which do not go"),
        (FIT | {f"lora_unet_{KEY}.hada_w1_a": random(16, R)}, "a LoRA and a tensor hada_w1_a"),
        (FIT | {f"lora_unet_{KEY}.lora_mid.weight": random(R, R)}, "three matrices that do not fit together"),
        (HADA | {f"lora_unet_{KEY}.hada_w2_a": random(17, R)}, "two products that do not fit together"),
        (HADA | {f"lora_unet_{KEY}.hada_w2_a": random(16, R + 1)}, "two matrices that do not fit together"),
        ({f"lora_unet_{KEY}.hada_w1_a": random(16, R)}, "lacks its hada_w1_b tensor"),
        ({f"lora_unet_{KEY}.lokr_w1": random(4, 4)}, "lacks its lokr_w2_a tensor"),
        ({f"unet.{DOTTED}.to_k.lora_B.bias": random(16)}, "has a bias, and not its matrices"),
        ({f"a{i}.weight": random(2) for i in range(5)}, "5 tensors that no LoRA has, .*a2.* and 2 more"),
    ],
)  # fmt: skip
def test_another_kind_that_is_damaged_is_refused(tmp_path, tensors, says):
    with pytest.raises(ModelError, match=says) as error:
        load_lora(written(tmp_path / "x.safetensors", tensors))
    assert "\n" not in str(error.value)


PARTS = (
    "lora_down.weight",
    "lora_up.weight",
    "lora_mid.weight",
    "lora_up.bias",
    "alpha",
    "dora_scale",
    *LYCORIS,
)
SHAPES = st.lists(st.sampled_from([0, 1, 3, 4, 16]), max_size=4).map(tuple)


@settings(deadline=None, max_examples=300)
@given(st.dictionaries(st.sampled_from(PARTS), SHAPES, min_size=1, max_size=6))
def test_tensors_of_any_shapes_are_read_or_refused_in_a_sentence(tmp_path_factory, shapes):
    path = tmp_path_factory.mktemp("odd") / "x.safetensors"
    save_file({f"lora_unet_{KEY}.{part}": torch.ones(shape) for part, shape in shapes.items()}, path)
    models = {"clip": nn.Linear(1, 1), "diffusion": TINY_UNET}
    try:
        apply(models, load_lora(path), config=TINY)
        remove(models)
    except ModelError as error:
        assert "\n" not in str(error)


TINY_UNET = UNet(TINY.unet)

# Other kinds

TO_K = f"lora_unet_{KEY}"
FIRST = "lora_unet_conv_in"


def several_kinds(path: Path) -> LoRA:
    """A file with a layer of each kind, differences of norms and biases among them."""
    more = {
        "lora_unet_mid_block_resnets_0_conv1.hada_w1_a": random(32, R),
        "lora_unet_mid_block_resnets_0_conv1.hada_w1_b": random(R, 32 * 9, seed=2),
        "lora_unet_mid_block_resnets_0_conv1.hada_w2_a": random(32, R, seed=3),
        "lora_unet_mid_block_resnets_0_conv1.hada_w2_b": random(R, 32 * 9, seed=4),
        "lora_te_text_model_encoder_layers_1_mlp_fc1.lokr_w1": random(4, 2),
        "lora_te_text_model_encoder_layers_1_mlp_fc1.lokr_w2": random(24, 12, seed=2),
        "lora_te_text_model_encoder_layers_1_self_attn_q_proj.diff_b": random(24),
        "lora_te_text_model_encoder_layers_1_self_attn_v_proj.diff": random(24, 24),
        "lora_unet_mid_block_resnets_0_norm1.w_norm": random(32),
        "lora_unet_mid_block_resnets_0_norm1.b_norm": random(32, seed=2),
        f"{TO_K}.dora_scale": random(16, 1).abs(),
    }
    return load_lora(written(path, FIT | more))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_kinds_come_out_again_bit_for_bit_after_fifty_rounds(tmp_path, dtype):
    models, lora, other = tiny(dtype), several_kinds(tmp_path / "x.safetensors"), some_loras()[2]
    before = state(models)
    for i in range(50):
        apply(models, lora, 0.1 * i - 2)
        if i == 0:
            assert len(changed(before, state(models))) == 7
        apply(models, other, 0.5)
        remove(models, (lora, other)[i % 2])
        remove(models)
    assert changed(before, state(models)) == []


def test_the_weight_0_changes_nothing_and_the_order_does_not_matter(tmp_path):
    lora, other = (
        several_kinds(tmp_path / "x.safetensors"),
        LoRA({TO_K: Update(random(R, 16), random(16, R), 1.0)}),
    )
    results = []
    for order in ((lora, other), (other, lora)):
        models = tiny(torch.float64)
        before = state(models)
        apply(models, lora, 0.0)
        assert changed(before, state(models)) == []
        for one in order:
            apply(models, one, 0.4)
        results.append(state(models))
    for name, x in results[0].items():
        torch.testing.assert_close(x, results[1][name], rtol=1e-14, atol=1e-14)


def test_biases_and_norms_go_to_their_rows(tmp_path):
    models = tiny(torch.float64)
    before = state(models)
    apply(models, several_kinds(tmp_path / "x.safetensors"), 2.0)
    after = state(models)
    bias = after["clip.layers.1.attention.qkv.bias"] - before["clip.layers.1.attention.qkv.bias"]
    expected = torch.cat([2 * random(24), torch.zeros(48)]).double()
    torch.testing.assert_close(bias, expected)
    for name, seed in (("weight", 1), ("bias", 2)):
        change = after[f"diffusion.middle.0.norm_1.{name}"] - before[f"diffusion.middle.0.norm_1.{name}"]
        torch.testing.assert_close(change, 2 * random(32, seed=seed).double())


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({f"{TO_K}.diff_b": random(16)}, "attn1_to_k has no bias"),
        ({"lora_unet_mid_block_resnets_0_norm1.w_norm": random(31)}, r"a weight of shape \(31, 1, 1, 1\)"),
        (FIT | {f"{TO_K}.dora_scale": random(15, 1)}, "has 15 lengths for a weight of shape"),
        ({f"unet.nothing_{i}.diff": random(2) for i in range(5)}, "no layer for unet.nothing_0,.* 2 more"),
    ],
)  # fmt: skip
def test_other_kinds_that_do_not_fit_are_named_and_change_nothing(tmp_path, tensors, says):
    models = tiny()
    before = state(models)
    with pytest.raises(ModelError, match=says):
        apply(models, load_lora(written(tmp_path / "x.safetensors", tensors)))
    assert changed(before, state(models)) == []


@pytest.mark.parametrize("kind", ["LoHa", "DoRA of rows", "DoRA of columns", "difference"])
def test_a_model_with_more_channels_is_changed_in_the_first_alone(tmp_path, kind):
    tensors = {
        "LoHa": {
            f"{FIRST}.hada_w{i}_{x}": random(*shape, seed=i)
            for i in (1, 2)
            for x, shape in (("a", (16, R)), ("b", (R, 4 * 9)))
        },
        "difference": {f"{FIRST}.diff": random(16, 4, 3, 3)},
    }.get(
        kind,
        {f"{FIRST}.lora_down.weight": random(R, 4, 3, 3), f"{FIRST}.lora_up.weight": random(16, R, 1, 1)},
    )
    if "DoRA" in kind:
        shape = (16, 1, 1, 1) if "rows" in kind else (1, 4, 1, 1)
        tensors |= {f"{FIRST}.dora_scale": random(*shape).abs()}
    lora = load_lora(written(tmp_path / "x.safetensors", tensors))
    plain = UNet(TINY.unet).double()
    wide = UNet(replace(TINY.unet, in_channels=9)).double()
    first, second = (net.get_parameter("down.0.0.weight") for net in (plain, wide))
    second.data[:, :4] = first.data
    before = second.detach().clone()
    for net in (plain, wide):
        apply({"diffusion": net, "clip": CLIP(TINY.clip)}, lora, 0.8)
    assert torch.equal(second[:, 4:], before[:, 4:]) and not torch.equal(second[:, :4], before[:, :4])
    torch.testing.assert_close(second[:, :4], first)


@pytest.mark.parametrize(
    "config", ["{", "[]", '{"unet.lora_alpha": "x"}', '{"unet.alpha_pattern": {"(": 1}}']
)
def test_a_header_that_is_not_understood_is_refused(tmp_path, config):
    tensors = dict(zip(U_NET["peft"], (random(R, 16), random(16, R))))
    with pytest.raises(ModelError, match="header"):
        load_lora(written(tmp_path / "x.safetensors", tensors, {"lora_adapter_metadata": config}))


def test_a_file_that_is_not_a_lora_is_refused(tmp_path):
    (tmp_path / "empty.safetensors").touch()
    (tmp_path / "text.safetensors").write_text("hello")
    save_file({}, tmp_path / "nothing.safetensors")
    save_file(state(tiny()), tmp_path / "model.safetensors")
    for name in ("missing", "empty", "text", "nothing", "model"):
        with pytest.raises(ModelError, match=f"{name}.safetensors"):
            load_lora(tmp_path / f"{name}.safetensors")
    with pytest.raises(ModelError):
        load_lora(tmp_path)
