"""LoRAs as people share them: in any names, by folder, beside embeddings, on models with more channels."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from reifusion.cli.main import main
from reifusion.model.tensors import ModelError
from reifusion.spelling import read_lora
from reifusion.weights.lora import apply, load_lora, remove
from tests.tiny import SMALL, networks

QKV = "down.1.1.layers.0.self_attention.qkv.weight"
LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CV_LAYER = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"
TEXT = "text_model.encoder.layers.1.self_attn.q_proj"
R = 4

torch.manual_seed(0)
DOWN, UP = torch.randn(R, 32), torch.randn(32, R)
TEXT_DOWN, TEXT_UP = torch.randn(R, 24), torch.randn(24, R)

U_NET = {
    "kohya": (f"lora_unet_{LAYER.replace('.', '_')}", "lora_down", "lora_up"),
    "ComfyUI": (f"diffusion_model.{CV_LAYER}", "lora_down", "lora_up"),
    "ComfyUI in diffusers's names": (f"diffusion_model.{LAYER}", "lora_A", "lora_B"),
    "CompVis": (f"model.diffusion_model.{CV_LAYER}", "lora_A", "lora_B"),
    "PEFT": (f"base_model.model.{LAYER}", "lora_A", "lora_B"),
    "PEFT, its adapter named": (f"base_model.model.{LAYER}", "lora_A.default", "lora_B.default"),
    "PEFT, another adapter": (f"base_model.model.{LAYER}", "lora_A.my-style_2", "lora_B.my-style_2"),
    "PEFT and network": (f"unet.base_model.model.{LAYER}", "lora_A", "lora_B"),
    "PEFT in PEFT": (f"base_model.model.unet.{LAYER}", "lora_A", "lora_B"),
    "diffusers, adapter named": (f"unet.{LAYER}", "lora_A.default", "lora_B.default"),
}
TEXTS = {
    "kohya": (f"lora_te_{TEXT.replace('.', '_')}", "lora_down", "lora_up"),
    "PEFT": (f"text_encoder.base_model.model.{TEXT}", "lora_A.default", "lora_B.default"),
    "ComfyUI": (f"text_encoders.clip_l.transformer.{TEXT}", "lora_A", "lora_B"),
    "ComfyUI, short": (f"clip_l.transformer.{TEXT}", "lora_down", "lora_up"),
}


def named(layer: tuple[str, str, str], down: Tensor = DOWN, up: Tensor = UP) -> dict[str, Tensor]:
    return {f"{layer[0]}.{layer[1]}.weight": down.clone(), f"{layer[0]}.{layer[2]}.weight": up.clone()}


def written(path: Path, tensors: dict[str, Tensor], header: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, header)
    return path


def change(file: Path, models: dict[str, nn.Module] | None = None) -> Tensor:
    """What a LoRA adds to the weights of q in the first attention of the U-Net."""
    models = models or networks(SMALL)
    weight = models["diffusion"].get_parameter(QKV)
    before, lora = weight.detach().clone(), load_lora(file)
    apply(models, lora)
    after = weight.detach().clone()
    remove(models, lora)
    assert torch.equal(weight, before) and torch.equal(after[32:], before[32:])
    return (after - before)[:32]


@pytest.mark.parametrize("spelling", U_NET)
def test_a_lora_is_the_same_in_every_spelling(tmp_path, spelling):
    added = change(written(tmp_path / "x.safetensors", named(U_NET[spelling])))
    assert torch.allclose(added, UP @ DOWN, atol=1e-5)


@pytest.mark.parametrize("spelling", TEXTS)
def test_so_it_is_on_the_text_encoder(tmp_path, spelling):
    models = networks(SMALL)
    weight = models["clip"].get_parameter("layers.1.attention.qkv.weight")
    before = weight.detach().clone()
    apply(models, load_lora(written(tmp_path / "x.safetensors", named(TEXTS[spelling], TEXT_DOWN, TEXT_UP))))
    assert torch.allclose((weight - before)[:24], TEXT_UP @ TEXT_DOWN, atol=1e-5)


@pytest.mark.parametrize("alpha", ["NaN", "1e400", "[" * 100_000])
def test_a_config_of_peft_that_would_spoil_the_model_is_refused(tmp_path, alpha):
    path = tmp_path / "x.safetensors"
    tensors = named(U_NET["PEFT and network"])
    save_file(tensors, path, {"lora_adapter_metadata": f'{{"unet.r": 2, "unet.lora_alpha": {alpha}}}'})
    with pytest.raises(ModelError, match=r"has a config of PEFT, .*not understood"):
        load_lora(path)


@pytest.mark.parametrize(
    "odd",
    [
        torch.zeros(1).expand(20_000, 4_000),
        torch.zeros(4, 4).to_sparse(),
        torch.zeros(4, 4, device="meta"),
        torch.quantize_per_tensor(torch.zeros(4, 4), 0.1, 0, torch.qint8),
        torch.zeros(4, 4, dtype=torch.complex64),
    ],
    ids=["larger than its file", "sparse", "without numbers", "quantised", "complex"],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_none_are_refused_with_their_file(tmp_path, odd):
    torch.save({"lora_unet_x.lora_up.weight": odd}, tmp_path / "x.pt")
    with pytest.raises(ModelError, match=r"x\.pt is damaged or .*lora_up.* is no plain tensor"):
        load_lora(tmp_path / "x.pt")


def test_two_adapters_in_a_file_are_refused_by_name(tmp_path):
    one, two = (named((LAYER, f"lora_A.{name}", f"lora_B.{name}")) for name in ("cats", "dogs"))
    with pytest.raises(ModelError, match="holds several LoRAs, cats and dogs; save one of them alone"):
        load_lora(written(tmp_path / "x.safetensors", one | two))


@pytest.mark.parametrize("end", ["string_to_param.*", "clip_l", "emb_params"])
def test_a_word_beside_a_lora_is_read_with_it(tmp_path, end):
    wanted = torch.arange(48.0).reshape(2, 24)
    tensors = named(U_NET["kohya"]) | {f"bundle_emb.zork.{end}": wanted}
    path = written(tmp_path / "x.safetensors", tensors)
    assert torch.allclose(change(path), UP @ DOWN, atol=1e-5)
    (word,) = load_lora(path).words
    assert word.word == "zork" and torch.equal(word.vectors, wanted)


def test_an_embedding_alone_is_no_lora(tmp_path):
    path = written(tmp_path / "x.safetensors", {"bundle_emb.zork.clip_l": torch.ones(2, 24)})
    with pytest.raises(ModelError, match="is not a LoRA: it has nothing but learned words"):
        load_lora(path)


# Folders


def test_a_folder_of_diffusers_is_a_lora(tmp_path):
    written(tmp_path / "x" / "pytorch_lora_weights.safetensors", named((f"unet.{LAYER}", "lora_A", "lora_B")))
    written(tmp_path / "x" / "optimizer.safetensors", {"a": torch.ones(1)})
    assert torch.allclose(change(tmp_path / "x"), UP @ DOWN, atol=1e-5)


@pytest.mark.parametrize("config, scale", [({"r": R, "lora_alpha": 2}, 0.5), ({"r": R}, 1.0)])
def test_a_folder_of_peft_is_a_lora_with_the_alpha_of_its_config(tmp_path, config, scale):
    written(tmp_path / "x" / "adapter_model.safetensors", named(U_NET["PEFT"]))
    (tmp_path / "x" / "adapter_config.json").write_text(json.dumps(config))
    assert torch.allclose(change(tmp_path / "x"), scale * UP @ DOWN, atol=1e-5)


def test_a_folder_of_peft_may_have_a_folder_for_each_network(tmp_path):
    written(tmp_path / "unet" / "adapter_model.safetensors", named(U_NET["PEFT"]))
    (tmp_path / "unet" / "adapter_config.json").write_text(json.dumps({"r": R, "lora_alpha": 8}))
    text = named((f"base_model.model.{TEXT}", "lora_A", "lora_B"), TEXT_DOWN, TEXT_UP)
    written(tmp_path / "text_encoder" / "adapter_model.safetensors", text)
    assert torch.allclose(change(tmp_path), 2 * UP @ DOWN, atol=1e-4)
    assert len(load_lora(tmp_path).updates) == 2


def test_a_folder_with_one_file_is_that_file_and_one_with_two_is_refused(tmp_path):
    written(tmp_path / "zork.safetensors", named(U_NET["kohya"]))
    assert torch.allclose(change(tmp_path), UP @ DOWN, atol=1e-5)
    written(tmp_path / "blot.safetensors", named(U_NET["kohya"]))
    with pytest.raises(ModelError, match="does not hold one LoRA; if it holds several, name the file of one"):
        load_lora(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"lora_alpha": "x"}'])
def test_a_broken_config_of_peft_is_refused(tmp_path, content):
    written(tmp_path / "adapter_model.safetensors", named(U_NET["PEFT"]))
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(
        ModelError, match="has a config of PEFT, in its header or beside it, that is not underst"
    ):
        load_lora(tmp_path)


def test_a_weight_follows_a_file_a_folder_or_an_id(tmp_path):
    (tmp_path / "x.safetensors").touch()
    for source in f"{tmp_path}/x.safetensors", str(tmp_path), "someone/zork-lora":
        assert read_lora(source) == (source, 1.0)
        assert read_lora(f"{source}:0.5") == (source, 0.5)
        with pytest.raises(ValueError, match="the weight of a LoRA is a number"):
            read_lora(f"{source}:x")
        assert read_lora(f"{source}:lbw=OUTALL") == (source, 1.0, "OUTALL")
        assert read_lora(f"{source}:-0.5:lbw=1,0.5,0") == (source, -0.5, "1,0.5,0")
        for bad in ("x", "1,", "nan,1", "", "middd"):
            with pytest.raises(ValueError, match="block weights are numbers with commas between them, or"):
                read_lora(f"{source}:0.5:lbw={bad}")


# Models with more channels


@pytest.mark.parametrize("channels", [8, 9])
def test_a_lora_of_a_plain_model_changes_one_for_inpainting_or_editing(tmp_path, channels):
    models = networks(replace(SMALL, unet=replace(SMALL.unet, in_channels=channels)))
    down, up = torch.randn(R, 4, 3, 3), torch.randn(32, R, 1, 1)
    tensors = named(U_NET["kohya"]) | named(("lora_unet_conv_in", "lora_down", "lora_up"), down, up)
    first = models["diffusion"].get_parameter("down.0.0.weight")
    before, lora = first.detach().clone(), load_lora(written(tmp_path / "x.safetensors", tensors))
    apply(models, lora)
    added = (first - before).detach()
    assert torch.allclose(added[:, :4].flatten(1), up.flatten(1) @ down.flatten(1), atol=1e-5)
    assert not added[:, 4:].any()
    remove(models, lora)
    assert torch.equal(first, before)


@pytest.mark.parametrize("channels", [5, 8])
def test_training_on_such_a_model_is_refused_before_any_work(tmp_path, channels, capsys):
    from PIL import Image

    from reifusion.weights import save
    from tests.tiny import WORDS, random_networks

    config = replace(SMALL, name="more", unet=replace(SMALL.unet, in_channels=channels))
    save(config, random_networks(config), tmp_path / "x.safetensors", "native", WORDS)
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "pictures" / "a.png")
    words = [
        f"data={tmp_path}/pictures",
        f"start={tmp_path}/x.safetensors",
        f"folder={tmp_path}/run",
        "steps=1",
    ]
    assert main(["train", "lora", "--config", "mini-lora", *words, "size=32"]) == 2
    told = capsys.readouterr().err
    assert f"has {channels} input channels" in told and "those for inpainting can be trained" in told
    assert not list(tmp_path.glob("run/**/latents*"))
