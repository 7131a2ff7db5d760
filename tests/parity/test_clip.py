"""Compares the text encoder with transformers's CLIPTextModel, on random weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from reifusion.model.clip import CLIP
from reifusion.model.config import SD15, CLIPConfig

transformers = pytest.importorskip("transformers")

# Whatever the size, the output agrees to this share of the largest number in it.
TOLERANCE = 1e-4  # float32
TOLERANCE_BF16 = 0.03  # bfloat16 keeps 8 bits, one part in 256, and each layer rounds a few times

TINY = CLIPConfig(vocab_size=99, context_length=20, width=48, layers=3, heads=4)


def make_reference(config: CLIPConfig):
    """Makes transformers's model, with weights that all differ from zero and one."""
    reference = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            intermediate_size=4 * config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            max_position_embeddings=config.context_length,
            hidden_act=config.activation,
            bos_token_id=config.vocab_size - 2,
            eos_token_id=config.vocab_size - 1,
        )
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, x in reference.named_parameters():
            if "embedding" in name:
                x.normal_(0, 0.5, generator=generator)
            elif x.ndim > 1:
                x.normal_(0, 1.5 * x.shape[1] ** -0.5, generator=generator)
            else:
                x.normal_(float("norm" in name and name.endswith("weight")), 0.2, generator=generator)
    return reference.requires_grad_(False)


def copy_weights(reference, config: CLIPConfig) -> CLIP:
    """Copies every tensor of the reference to our names, which are written out here without the converter."""
    theirs = {name.removeprefix("text_model."): x for name, x in reference.state_dict().items()}
    ours = {
        "embedding.token.weight": theirs.pop("embeddings.token_embedding.weight"),
        "embedding.position": theirs.pop("embeddings.position_embedding.weight"),
        "norm.weight": theirs.pop("final_layer_norm.weight"),
        "norm.bias": theirs.pop("final_layer_norm.bias"),
    }
    names = {
        "norm_1": "layer_norm1",
        "norm_2": "layer_norm2",
        "attention.out": "self_attn.out_proj",
        "linear_1": "mlp.fc1",
        "linear_2": "mlp.fc2",
    }
    for i in range(config.layers):
        for kind in ("weight", "bias"):
            for our, their in names.items():
                ours[f"layers.{i}.{our}.{kind}"] = theirs.pop(f"encoder.layers.{i}.{their}.{kind}")
            projections = [theirs.pop(f"encoder.layers.{i}.self_attn.{x}_proj.{kind}") for x in "qkv"]
            ours[f"layers.{i}.attention.qkv.{kind}"] = torch.cat(projections)
    assert not theirs
    with torch.device("meta"):
        clip = CLIP(config)
    clip.load_state_dict(ours, assign=True)
    return clip.requires_grad_(False).eval()


def tokens_for(config: CLIPConfig, length: int | None = None) -> Tensor:
    shape = (2, length or config.context_length)
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(1))


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    scale = theirs.float().abs().max().item()
    error = (ours.float() - theirs.float()).abs().max().item()
    assert 0.5 < scale < 100, "the output says nothing"
    assert error <= tolerance * scale, f"off by {error / scale:.2e} of the scale"


@pytest.fixture(scope="module", params=["quick_gelu", "gelu"])
def pair(request: pytest.FixtureRequest):
    config = replace(TINY, activation=request.param)
    reference = make_reference(config)
    return copy_weights(reference, config), reference


@pytest.mark.parametrize("length", [20, 7, 1])
def test_output_is_the_reference_s(pair, length: int):
    clip, reference = pair
    tokens = tokens_for(TINY, length)
    assert_close(clip(tokens), reference(tokens).last_hidden_state, TOLERANCE)


@pytest.mark.parametrize("skip", [0, 1, 2])
def test_skip_is_the_clip_skip_of_diffusers(pair, skip: int):
    """As in `StableDiffusionPipeline.encode_prompt`: an inner layer's output, then the final norm."""
    clip, reference = pair
    tokens = tokens_for(TINY)
    hidden = reference(tokens, output_hidden_states=True).hidden_states
    assert_close(clip(tokens, skip=skip), reference.final_layer_norm(hidden[-(skip + 1)]), TOLERANCE)


def test_the_activations_are_not_the_same_thing():
    """Otherwise the tests above could not tell one from the other."""
    quick, exact = (replace(TINY, activation=name) for name in ("quick_gelu", "gelu"))
    reference, tokens = make_reference(quick), tokens_for(TINY)
    error = (copy_weights(reference, exact)(tokens) - reference(tokens).last_hidden_state).abs().max()
    assert error > 100 * TOLERANCE


@pytest.mark.slow
def test_sd_1_5_in_float32_and_bfloat16():
    """All 123 million weights."""
    reference, tokens = make_reference(SD15.clip), tokens_for(SD15.clip)
    clip = copy_weights(reference, SD15.clip)
    assert sum(x.numel() for x in clip.parameters()) == 123_060_480
    with torch.inference_mode():
        exact = reference(tokens, output_hidden_states=True)
        assert_close(clip(tokens), exact.last_hidden_state, TOLERANCE)
        penultimate = reference.final_layer_norm(exact.hidden_states[-2])
        assert_close(clip(tokens, skip=1), penultimate, TOLERANCE)
        # Both round in bfloat16, each in its own order, so each is compared with float32.
        theirs, ours = reference.bfloat16()(tokens).last_hidden_state, clip.bfloat16()(tokens)
        assert ours.dtype == theirs.dtype == torch.bfloat16
        assert_close(ours.float(), exact.last_hidden_state, TOLERANCE_BF16)
        assert_close(ours, theirs, TOLERANCE_BF16)
