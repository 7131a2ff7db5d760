"""LoHa, LoKr, LoCon, DoRA, full differences and norms: files that LyCORIS made change a layer as there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from reifusion.weights.lora import apply, load_lora, remove
from tests.tiny import SMALL, native_state, random_networks

pytest.importorskip("lycoris")
from lycoris.modules.full import FullModule
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule

DOUBLE = torch.float64
# Layers: how a file names them, our network, our weight, and the rows in it
LAYERS = {
    "k": (
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k",
        "down.1.1.layers.0.cross_attention.kv",
        slice(0, 32),
    ),
    "pointwise": ("lora_unet_input_blocks_1_1_proj_in", "down.1.1.proj_in", slice(0, 32)),
    "convolution": ("lycoris_up_blocks_1_resnets_0_conv1", "up.2.0.conv_1", slice(0, 32)),
}
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "LoCon": (LoConModule, {}),
    "LoCon, Tucker": (LoConModule, {"use_tucker": True}),
    "LoCon, by the root of the rank": (LoConModule, {"rs_lora": True}),
    "LoHa": (LohaModule, {}),
    "LoHa, Tucker": (LohaModule, {"use_tucker": True}),
    "LoKr": (LokrModule, {}),
    "LoKr, unequal": (LokrModule, {"unbalanced_factorization": True, "factor": 8}),
    "LoKr, Tucker": (LokrModule, {"use_tucker": True}),
    "LoKr, both sides of a low rank": (LokrModule, {"decompose_both": True, "factor": 4, "lora_dim": 1}),
    "LoKr, whole": (LokrModule, {"full_matrix": True}),
}


def their_layer(models: dict[str, nn.Module], layer: str) -> nn.Module:
    """The layer as LyCORIS sees it: of stacked projections one, of what may be a convolution that."""
    _, ours, rows = LAYERS[layer]
    weight = models["diffusion"].get_parameter(f"{ours}.weight").detach().clone()[rows]
    if layer == "pointwise":
        weight = weight[..., None, None]
    out, columns = weight.shape[:2]
    made: nn.Linear | nn.Conv2d = nn.Linear(columns, out, bias=False)
    if weight.ndim == 4:
        made = nn.Conv2d(columns, out, weight.shape[2], bias=False)
    made.weight = nn.Parameter(weight)
    return made


def file_of(module: Any, name: str, path: Path) -> Path:
    """Fills the module with noise, and writes it."""
    generator = torch.Generator().manual_seed(5)
    for key, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=DOUBLE)
        parameter.data = parameter.data.double() * (1 + 0.1 * noise) if "dora" in key else 0.4 * noise
    tensors = {f"{name}.{key}": x.detach().contiguous() for key, x in module.custom_state_dict().items()}
    save_file(tensors, path)
    return path


def change(models: dict[str, nn.Module], path: Path, layer: str, weight: float) -> Tensor:
    """The layer's weight with the LoRA. All others are as they were, and so is this one after `remove`."""
    _, ours, rows = LAYERS[layer]
    before = {key: x.clone() for key, x in native_state(models).items()}
    lora = load_lora(path)
    apply(models, lora, weight)
    after = {key: x.clone() for key, x in native_state(models).items()}
    name = f"diffusion.{ours}.weight"
    assert [key for key in after if not torch.equal(before[key], after[key])] == [name]
    assert torch.equal(after[name][rows.stop :], before[name][rows.stop :])
    remove(models, lora)
    assert all(torch.equal(x, before[key]) for key, x in native_state(models).items())
    return after[name][rows]


@torch.no_grad()
def output(layer: Any, like: Any) -> Tensor:
    """What a layer, or one with that weight, makes of the same noise."""
    shape = (2, like.in_channels, 5, 7) if isinstance(like, nn.Conv2d) else (2, 3, like.in_features)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(9), dtype=DOUBLE)
    if isinstance(layer, Tensor):
        return torch.func.functional_call(like, {"weight": layer.view_as(like.weight)}, (x,))
    return layer(x)


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    return random_networks(SMALL, DOUBLE)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_changed_as_in_lycoris(models, kind, layer, tmp_path):
    made, options = KINDS[kind]
    original = their_layer(models, layer)
    module = made("x", original, 1.0, **{"lora_dim": 3, "alpha": 4.5, **options})
    path = file_of(module, LAYERS[layer][0], tmp_path / "x.safetensors")
    parts = {key.rpartition(".")[2] for key in module.custom_state_dict()} - {"alpha"}
    if "Tucker" in kind and layer == "convolution":
        assert any("mid" in key or "_t" in key for key in module.custom_state_dict())
    if "both" in kind:
        assert {"lokr_w1_a", "lokr_w2_a"} <= parts
    module.multiplier = 0.7
    expected = output(module, original)
    assert (expected - output(original, original)).abs().max() > 0.1
    got = change(models, path, layer, 0.7)
    torch.testing.assert_close(output(got, original), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("of_rows", [True, False])
@pytest.mark.parametrize("kind", ["LoCon", "LoHa", "LoKr"])
def test_a_dora_is_that_of_lycoris_at_weight_1_and_on_the_way_there_at_others(
    models, kind, of_rows, layer, tmp_path
):
    made, _ = KINDS[kind]
    original = their_layer(models, layer)
    module = made("x", original, 1.0, 3, 4.5, weight_decompose=True, wd_on_out=of_rows)
    path = file_of(module, LAYERS[layer][0], tmp_path / "x.safetensors")
    without, whole = output(original, original), output(module, original)
    assert (whole - without).abs().max() > 0.1
    for strength in (1.0, 0.3, -0.5):
        got = change(models, path, layer, strength)
        expected = without + strength * (whole - without)
        torch.testing.assert_close(output(got, original), expected, rtol=1e-5, atol=1e-5)


def test_full_differences_of_weights_and_biases(models, tmp_path):
    name, ours = "lora_unet_down_blocks_0_resnets_0_conv1", "down.1.0.conv_1"
    layer: Any = models["diffusion"].get_submodule(ours)
    original = nn.Conv2d(32, 32, 3)
    original.weight, original.bias = (nn.Parameter(x.detach().clone()) for x in (layer.weight, layer.bias))
    module = FullModule("x", original, 1.0)
    noise = torch.Generator().manual_seed(5)
    for parameter in module.parameters():
        parameter.data += torch.randn(parameter.shape, generator=noise, dtype=DOUBLE)
    tensors = {f"{name}.{key}": x.detach().contiguous() for key, x in module.custom_state_dict().items()}
    assert {key.rpartition(".")[2] for key in tensors} == {"diff", "diff_b"}
    save_file(tensors, tmp_path / "x.safetensors")
    lora = load_lora(tmp_path / "x.safetensors")
    before = {key: x.clone() for key, x in native_state(models).items()}
    apply(models, lora)
    torch.testing.assert_close(layer.weight.detach(), module.weight.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.bias.detach(), module.bias.detach(), rtol=1e-6, atol=1e-6)
    remove(models, lora)
    assert all(torch.equal(x, before[key]) for key, x in native_state(models).items())


@pytest.mark.parametrize(
    ("name", "network", "ours"),
    [
        ("lora_unet_down_blocks_0_resnets_0_norm2", "diffusion", "down.1.0.norm_2"),
        ("lora_unet_input_blocks_1_1_transformer_blocks_0_norm3", "diffusion", "down.1.1.layers.0.norm_3"),
        ("lora_te_text_model_encoder_layers_1_layer_norm2", "clip", "layers.1.norm_2"),
    ],
)  # fmt: skip
def test_norms_are_changed_as_in_lycoris(models, name, network, ours, tmp_path):
    layer: Any = models[network].get_submodule(ours)
    original: Any = nn.LayerNorm(len(layer.weight))
    original.weight, original.bias = (nn.Parameter(x.detach().clone()) for x in (layer.weight, layer.bias))
    module = NormModule("x", original, 1.0)
    generator = torch.Generator().manual_seed(5)
    for parameter in (module.w_norm, module.b_norm):
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=DOUBLE)
    tensors = {f"{name}.{key}": getattr(module, key).detach() for key in ("w_norm", "b_norm")}
    save_file(tensors, tmp_path / "x.safetensors")
    weight, bias = module.make_weight(0.6)
    lora = load_lora(tmp_path / "x.safetensors")
    apply(models, lora, 0.6)
    torch.testing.assert_close(layer.weight.detach(), weight.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.bias.detach(), bias.detach(), rtol=1e-6, atol=1e-6)
    remove(models, lora)
    assert torch.equal(layer.weight, original.weight) and torch.equal(layer.bias, original.bias)


def test_the_names_are_all_that_lycoris_writes_for_these_kinds():
    from reifusion.weights.lora_kinds import LYCORIS

    written = {
        *LohaModule.weight_list,
        *LokrModule.weight_list,
        *FullModule.weight_list,
        *NormModule.weight_list,
    }
    assert written - {"alpha", "dora_scale", "lokr_t1"} <= {*LYCORIS}  # it makes no lokr_t1
