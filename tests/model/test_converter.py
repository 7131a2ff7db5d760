"""Names: every format leads to every other and back, and nothing is lost on the way."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reifusion.model.config import MINI, SD15, CLIPConfig, ModelConfig, UNetConfig, VAEConfig
from reifusion.model.diffusers_folder import config_from_diffusers, config_to_diffusers
from reifusion.model.model_converter import (
    FORMATS,
    HARMLESS,
    convert,
    detect,
    match,
    rules,
    structure,
)
from reifusion.model.model_loader import build
from reifusion.model.tensors import ModelError

TINY = ModelConfig(
    name="tiny",
    size=32,
    clip=CLIPConfig(vocab_size=50, context_length=9, width=8, layers=2, heads=2),
    vae=VAEConfig(channels=(4, 8, 12), layers=1, groups=2),
    unet=UNetConfig(
        channels=(4, 8, 12), attention=(0, 1, 1), layers=1, heads=(2, 2, 2), context_width=8, groups=2
    ),
)


def random_state(config: ModelConfig, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Our tensors for a config, each with its own numbers."""
    generator = torch.Generator().manual_seed(0)
    return {
        f"{net}.{name}": torch.randn(x.shape, generator=generator).to(dtype)
        for net, module in build(config).items()
        for name, x in module.state_dict().items()
    }


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


# There and back


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    channels = st.lists(st.sampled_from([4, 8, 12]), min_size=1, max_size=4).map(tuple)
    unet_channels = draw(channels)

    def a_level(strategy: st.SearchStrategy) -> st.SearchStrategy:
        levels = len(unet_channels)
        return st.lists(strategy, min_size=levels, max_size=levels).map(tuple)

    attention = draw(a_level(st.integers(0, 3)))
    return replace(
        TINY,
        clip=replace(TINY.clip, layers=draw(st.integers(1, 12))),
        vae=replace(TINY.vae, channels=draw(channels), layers=draw(st.integers(1, 3))),
        unet=replace(
            TINY.unet,
            channels=unet_channels,
            attention=attention,
            middle_attention=attention[-1] or draw(st.integers(1, 3)),  # diffusers knows no other
            heads=draw(a_level(st.sampled_from([1, 2, 4]))),
            layers=draw(st.integers(1, 3)),
            in_channels=draw(st.sampled_from([4, 8, 9])),
            linear_projection=draw(st.booleans()),
        ),
    )


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(config=configs())
def test_any_structure_survives_all_formats_bit_for_bit(config):
    native = random_state(config)
    compvis = convert(native, "compvis")
    diffusers = convert(native, "diffusers")
    assert [detect(x) for x in (native, compvis, diffusers)] == list(FORMATS)
    assert_same(convert(compvis), native)
    assert_same(convert(diffusers), native)
    assert_same(convert(compvis, "diffusers"), diffusers)
    assert_same(convert(diffusers, "compvis"), compvis)
    for state, format in (native, "native"), (compvis, "compvis"), (diffusers, "diffusers"):
        assert_same(convert(state, format), state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("format", ["compvis", "diffusers"])
def test_every_dtype_survives(format, dtype):
    native = random_state(TINY, dtype)
    assert_same(convert(convert(native, format)), native)


@pytest.mark.parametrize(
    "config", [SD15, replace(MINI, clip=replace(MINI.clip, vocab_size=8192))], ids=["sd15", "mini"]
)
@pytest.mark.parametrize("format", ["compvis", "diffusers"])
def test_real_sizes_survive(format, config):
    """On shapes alone: the numbers are the same code at any size."""
    native = {f"{net}.{k}": x for net, m in build(config).items() for k, x in m.state_dict().items()}
    back = convert(convert(native, format))
    assert {k: x.shape for k, x in back.items()} == {k: x.shape for k, x in native.items()}


def test_converting_leaves_the_given_tensors_alone_and_shares_no_memory_between_the_new():
    native = random_state(TINY)
    before = {name: x.clone() for name, x in native.items()}
    for format in "compvis", "diffusers":
        theirs = convert(native, format)
        assert len({x.untyped_storage().data_ptr() for x in theirs.values()}) == len(theirs)
    assert_same(native, before)


def test_a_part_of_a_model_can_be_converted():
    native = random_state(TINY)
    unet = {name: x for name, x in native.items() if name.startswith("diffusion.")}
    vae = {name: x for name, x in native.items() if name.startswith(("encoder.", "decoder."))}
    for part in unet, vae:
        for format in "compvis", "diffusers":
            assert_same(convert(convert(part, format)), part)


# The rules


@pytest.mark.parametrize("config", [TINY, SD15])
@pytest.mark.parametrize("format", FORMATS)
def test_no_two_rules_speak_of_the_same_tensor(format, config):
    found = rules(config, format)
    ours, theirs = [rule.ours for rule in found], [name for rule in found for name in rule.theirs]
    assert len(set(ours)) == len(ours) and len(set(theirs)) == len(theirs)
    assert not any(HARMLESS.match(name) for name in theirs)


def test_fused_projections_are_stacked_in_the_order_q_k_v():
    native = random_state(TINY)
    theirs = convert(native, "diffusers")
    block = "unet.mid_block.attentions.0.transformer_blocks.0"
    parts = [theirs[f"{block}.attn1.to_{x}.weight"] for x in "qkv"]
    assert torch.equal(torch.cat(parts), native["diffusion.middle.1.layers.0.self_attention.qkv.weight"])
    parts = [theirs[f"{block}.attn2.to_{x}.weight"] for x in "kv"]
    assert torch.equal(torch.cat(parts), native["diffusion.middle.1.layers.0.cross_attention.kv.weight"])


def test_decoder_levels_are_counted_from_the_other_side_in_compvis():
    native = random_state(TINY)
    compvis, diffusers = convert(native, "compvis"), convert(native, "diffusers")
    first = native["decoder.up.0.0.conv_1.weight"]  # the first to be run, at the size of the latents
    assert torch.equal(compvis["first_stage_model.decoder.up.2.block.0.conv1.weight"], first)
    assert torch.equal(diffusers["vae.decoder.up_blocks.0.resnets.0.conv1.weight"], first)


def test_structure_is_read_from_names_in_every_format():
    native = random_state(TINY)
    for format in FORMATS:
        found = structure(convert(native, format), format)
        assert found.clip.layers == 2
        assert (len(found.vae.channels), found.vae.layers) == (3, 1)
        assert (found.unet.attention, found.unet.layers) == ((False, True, True), 1)


# A real checkpoint's names


def manifest() -> dict[str, Tensor]:
    """The 1,143 names, shapes and dtypes of a published SD 1.x checkpoint, without numbers."""
    tensors = json.loads(Path(__file__).with_name("sd-v1-manifest.json").read_text())
    return {
        name: torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")), device="meta")
        for name, (shape, dtype) in tensors.items()
    }


def test_every_name_of_a_published_checkpoint_has_its_place():
    published = manifest()
    assert len(published) == 1143
    format, _, unknown = match(published)
    assert (format, unknown) == ("compvis", [])
    ours = {f"{net}.{k}": x.shape for net, m in build(SD15).items() for k, x in m.state_dict().items()}
    assert {name: x.shape for name, x in convert(published).items()} == ours


def test_a_published_checkpoint_comes_back_without_its_harmless_tensors_only():
    published = manifest()
    back = convert(convert(published, "diffusers"), "compvis")
    left_out = published.keys() - back.keys()
    assert back.keys() <= published.keys()
    assert all(back[name].shape == published[name].shape for name in back)
    schedule = {name for name in left_out if "." not in name}
    assert left_out - schedule == {"cond_stage_model.transformer.text_model.embeddings.position_ids"}
    assert {"betas", "alphas_cumprod", "posterior_variance"} < schedule and len(schedule) == 12


# Variations found in the wild


def renamed(state: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    assert any(old in name for name in state)
    return {name.replace(old, new): x for name, x in state.items()}


@pytest.mark.parametrize("format", ["compvis", "diffusers"])
def test_text_model_prefix_may_be_missing(format):
    """transformers 5 writes CLIPTextModel without it."""
    native = random_state(TINY)
    assert_same(convert(renamed(convert(native, format), ".text_model.", ".")), native)


@pytest.mark.parametrize("shape", ["linear", "1×1 convolution"])
def test_old_names_of_the_vae_attention_are_understood(shape):
    native = random_state(TINY)
    old = convert(native, "diffusers")
    for new_name, old_name in (
        ("to_q", "query"),
        ("to_k", "key"),
        ("to_v", "value"),
        ("to_out.0", "proj_attn"),
    ):
        for half in "encoder", "decoder":
            for kind in "weight", "bias":
                place = f"vae.{half}.mid_block.attentions.0."
                x = old.pop(f"{place}{new_name}.{kind}")
                conv = shape != "linear" and kind == "weight"
                old[f"{place}{old_name}.{kind}"] = x[:, :, None, None] if conv else x
    assert_same(convert(old), native)


def test_compvis_has_convolutions_in_the_vae_attention_and_linear_layers_are_understood_as_well():
    native = random_state(TINY)
    theirs = convert(native, "compvis")
    name = "first_stage_model.encoder.mid.attn_1.q.weight"
    assert theirs[name].shape == (12, 12, 1, 1)
    assert_same(
        convert({k: x.flatten(1) if ".attn_1." in k and x.ndim == 4 else x for k, x in theirs.items()}),
        native,
    )


HARMLESS_NAMES = {
    "compvis": [
        "betas",
        "alphas_cumprod_prev",
        "sqrt_recipm1_alphas_cumprod",
        "log_one_minus_alphas_cumprod",
        "posterior_mean_coef2",
        "scale_factor",
        "model_ema.decay",
        "model_ema.num_updates",
        "model_ema.diffusion_modelinput_blocks00weight",
        "first_stage_model.loss.logvar",
        "first_stage_model.loss.discriminator.main.0.weight",
        "cond_stage_model.transformer.text_model.embeddings.position_ids",
        "cond_stage_model.transformer.vision_model.post_layernorm.weight",
        "cond_stage_model.logit_scale",
        "cond_stage_model.transformer.text_projection.weight",
        "safety_checker.concept_embeds",
    ],
    "diffusers": [
        "text_encoder.text_model.embeddings.position_ids",
        "text_encoder.embeddings.position_ids",
        "text_encoder.logit_scale",
        "text_encoder.text_projection.weight",
        "text_encoder.vision_model.embeddings.class_embedding",
        "text_encoder.visual_projection.weight",
        "safety_checker.special_care_embeds",
    ],
}


@pytest.mark.parametrize("format, name", [(f, name) for f, names in HARMLESS_NAMES.items() for name in names])
def test_tensors_that_are_not_part_of_the_model_are_left_out(format, name):
    native = random_state(TINY)
    assert_same(convert(convert(native, format) | {name: torch.ones(3)}), native)


@pytest.mark.parametrize(
    "format, name",
    [
        ("native", "diffusion.extra"),
        ("compvis", "model.diffusion_model.label_emb.0.weight"),
        ("compvis", "extra"),
        ("diffusers", "unet.class_embedding.weight"),
    ],
)
def test_an_unknown_tensor_is_named(format, name):
    state = convert(random_state(TINY), format) | {name: torch.ones(3)}
    with pytest.raises(ModelError, match=f"1 tensors have no place in the model, first {name}"):
        convert(state)


def test_a_third_of_a_fused_projection_is_named():
    state = convert(random_state(TINY), "diffusers")
    gone = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_k.weight"
    del state[gone]
    with pytest.raises(ModelError, match=f"tensor {gone} is missing"):
        convert(state)


@pytest.mark.parametrize("state", [{}, {"fc.weight": torch.ones(2)}, {"state_dict": torch.ones(1)}])
def test_other_models_are_refused(state):
    with pytest.raises(ModelError, match="not the tensors of a Stable Diffusion model"):
        convert(state)


def test_other_formats_are_refused():
    with pytest.raises(ModelError, match="no format 'onnx'; the formats are native, compvis, diffusers"):
        convert(random_state(TINY), "onnx")


@pytest.mark.parametrize(("config", "ndim"), [(SD15, 4), (MINI, 2)])
@pytest.mark.parametrize("to", ["compvis", "diffusers"])
def test_projections_are_convolutions_in_files_of_sd1_and_linear_elsewhere(config, ndim, to):
    native = {f"{net}.{name}": x for net, m in build(config).items() for name, x in m.state_dict().items()}
    for known in (None, config):
        theirs = convert(native, to, known)
        shapes = {x.ndim for name, x in theirs.items() if name.endswith("proj_in.weight")}
        assert shapes == {ndim}
        other = "diffusers" if to == "compvis" else "compvis"
        again = convert(theirs, other)
        assert {x.ndim for name, x in again.items() if name.endswith("proj_in.weight")} == {ndim}


# Configs


@settings(max_examples=50, deadline=None)
@given(config=configs())
def test_any_config_survives_diffusers(config):
    jsons = json.loads(json.dumps(config_to_diffusers(config)))
    assert config_from_diffusers(jsons, config.name) == replace(
        config, size=config.size // config.vae.factor * config.vae.factor
    )


def test_heads_of_each_level_survive_diffusers():
    config = replace(TINY, unet=replace(TINY.unet, heads=(2, 4, 6)))
    jsons = config_to_diffusers(config)
    assert jsons["unet"]["attention_head_dim"] == [2, 4, 6]
    assert config_from_diffusers(jsons, "tiny") == config


def test_published_config_of_sd15_is_ours():
    """The numbers of the published `config.json`s, as far as they are of 2022: without what came later."""
    jsons = {
        "text_encoder": {
            "hidden_act": "quick_gelu",
            "hidden_size": 768,
            "intermediate_size": 3072,
            "layer_norm_eps": 1e-05,
            "max_position_embeddings": 77,
            "num_attention_heads": 12,
            "num_hidden_layers": 12,
            "vocab_size": 49408,
        },
        "vae": {
            "act_fn": "silu",
            "block_out_channels": [128, 256, 512, 512],
            "in_channels": 3,
            "latent_channels": 4,
            "layers_per_block": 2,
            "out_channels": 3,
            "sample_size": 512,
        },
        "unet": {
            "act_fn": "silu",
            "attention_head_dim": 8,
            "block_out_channels": [320, 640, 1280, 1280],
            "center_input_sample": False,
            "cross_attention_dim": 768,
            "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
            "downsample_padding": 1,
            "flip_sin_to_cos": True,
            "freq_shift": 0,
            "in_channels": 4,
            "layers_per_block": 2,
            "mid_block_scale_factor": 1,
            "norm_eps": 1e-05,
            "norm_num_groups": 32,
            "out_channels": 4,
            "sample_size": 64,
        },
        "scheduler": {
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "num_train_timesteps": 1000,
            "set_alpha_to_one": False,
            "skip_prk_steps": True,
            "steps_offset": 1,
            "trained_betas": None,
        },
    }
    assert config_from_diffusers(jsons, "sd-1.5") == SD15


@pytest.mark.parametrize(
    "part, key, value",
    [
        ("unet", "addition_embed_type", "text_time"),
        ("unet", "class_embed_type", "projection"),
        ("unet", "flip_sin_to_cos", False),
        ("vae", "shift_factor", 0.1159),
        ("vae", "use_quant_conv", False),
    ],
)
def test_a_config_that_would_silently_draw_something_else_is_refused(part, key, value):
    jsons = config_to_diffusers(TINY)
    jsons[part][key] = value
    with pytest.raises(ModelError, match=f"its {part} has {key} = .*, which is not built in"):
        config_from_diffusers(jsons)


@pytest.mark.parametrize("betas", [[0.1], [0.1] * 999, [0.1] * 999 + [1.5], ["x"] * 1000, 0.1])
def test_betas_that_do_not_fit_the_training_steps_are_refused(betas):
    jsons = config_to_diffusers(TINY)
    jsons["scheduler"]["trained_betas"] = betas
    with pytest.raises(ModelError, match=r"trained_betas = .*, which are not one for each step"):
        config_from_diffusers(jsons)


@pytest.mark.parametrize("key", ["transformer_layers_per_block", "attention_head_dim"])
@pytest.mark.parametrize("value", [[1, 2], ["a", "b", "c"], [[1], [2], [3]]])
def test_a_list_that_does_not_fit_the_levels_is_refused(key, value):
    jsons = config_to_diffusers(TINY)
    jsons["unet"][key] = value
    with pytest.raises(ModelError, match=f"its unet has {key} = .*, which does not fit its 3 levels"):
        config_from_diffusers(jsons)


def test_a_middle_that_diffusers_cannot_express_is_refused():
    with pytest.raises(ModelError, match="its middle has another depth than its last level"):
        config_to_diffusers(replace(TINY, unet=replace(TINY.unet, attention=(0, 1, 2), middle_attention=3)))


def test_a_config_without_a_size_is_refused():
    jsons = config_to_diffusers(TINY)
    del jsons["unet"]["block_out_channels"]
    with pytest.raises(ModelError, match="the config of its unet lacks block_out_channels"):
        config_from_diffusers(jsons)
