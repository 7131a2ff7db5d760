"""Compares the transformer and the T5 of Stable Diffusion 3 with diffusers's and transformers's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from reifusion.families.mmdit import MMDiT, MMDiTConfig
from reifusion.families.sd3_names import TABLE, mmdit_blocks, t5_blocks
from reifusion.families.t5 import T5, T5Config, bucket
from reifusion.model.config import ModelConfig
from reifusion.model.model_converter import Block, Layout, rules, structure

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

TINY = MMDiTConfig(
    in_channels=4,
    out_channels=4,
    layers=3,
    heads=4,
    width=32,
    context_width=24,
    pooled_width=20,
    positions=12,
)
KINDS = {
    "3": TINY,
    "3.5 large": replace(TINY, layers=2, qk_norm=True, in_channels=16, out_channels=16),
    "3.5 medium": replace(TINY, layers=4, qk_norm=True, dual_attention=(0, 1)),
    "patches of one": replace(TINY, patch=1, dual_attention=(1, 2)),
}
TINY_T5 = T5Config(vocab_size=99, width=32, layers=3, heads=4, head_width=12, hidden=40)


def normal(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def randomize(network: nn.Module) -> nn.Module:
    """Gives every tensor numbers that matter, the table of positions too."""
    generator = torch.Generator().manual_seed(0)
    network.to_empty(device="cpu").requires_grad_(False).eval()
    for name, x in network.named_parameters():
        mean = float("norm" in name and name.endswith("weight") and x.ndim == 1)
        x.normal_(mean, 0.2 if x.ndim == 1 else x[0].numel() ** -0.5, generator=generator)
    return network


def translated(network: nn.Module, blocks: list[Block], prefix: str) -> dict[str, Tensor]:
    """A network's tensors in diffusers's names; every tensor is used once."""
    ours, theirs = dict(network.state_dict()), {}
    layout = Layout(lambda config, open_clip: iter(blocks), structure, TABLE)
    for rule in rules(ModelConfig(), "diffusers", layout=layout):
        if (x := ours.pop(rule.ours.split(".", 1)[1], None)) is not None:
            for name, part in zip(rule.theirs, rule.split(x), strict=True):
                assert name not in theirs
                theirs[name.removeprefix(prefix)] = part
    assert not ours
    return theirs


def mmdit_pair(config: MMDiTConfig) -> tuple[nn.Module, nn.Module]:
    """Our transformer, and diffusers's with the same weights."""
    with torch.device("meta"):
        ours = MMDiT(config)
    randomize(ours)
    theirs = diffusers.SD3Transformer2DModel(
        sample_size=config.positions // 2 * config.patch,
        patch_size=config.patch,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_layers=config.layers,
        attention_head_dim=config.width // config.heads,
        num_attention_heads=config.heads,
        joint_attention_dim=config.context_width,
        caption_projection_dim=config.width,
        pooled_projection_dim=config.pooled_width,
        pos_embed_max_size=config.positions,
        dual_attention_layers=config.dual_attention,
        qk_norm="rms_norm" if config.qk_norm else None,
    )
    theirs.load_state_dict(translated(ours, list(mmdit_blocks(config)), "transformer."))
    return ours, theirs.requires_grad_(False).eval()


def exact_norms(network: nn.Module) -> None:
    """Replaces norms that compute in float32 whatever their input, which would hide smaller differences."""
    for parent in list(network.modules()):
        for name, norm in list(parent.named_children()):
            if type(norm).__name__ in ("RMSNorm", "T5LayerNorm"):
                same = nn.RMSNorm(norm.get_parameter("weight").shape, eps=1e-6)
                same.weight = norm.get_parameter("weight")
                setattr(parent, name, same)


def assert_close(ours: Tensor, theirs: Tensor, within: float) -> None:
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert 0.05 < theirs.abs().max() < 1e4, "the output says nothing"
    torch.testing.assert_close(ours, theirs, rtol=0, atol=within * theirs.abs().max().item())


@pytest.mark.parametrize("dtype, within", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("kind", KINDS)
def test_mmdit_equals_the_reference(kind, dtype, within):
    config = KINDS[kind]
    ours, theirs = (network.to(dtype) for network in mmdit_pair(config))
    if dtype == torch.float64:
        exact_norms(theirs)
    for batch, rows, columns, words in (2, 5, 8, 7), (1, 12, 3, 1), (3, 12, 12, 10):
        x = normal(batch, config.in_channels, rows * config.patch, columns * config.patch, dtype=dtype)
        context = normal(batch, words, config.context_width, seed=2, dtype=dtype)
        pooled = normal(batch, config.pooled_width, seed=3, dtype=dtype)
        t = torch.tensor([713.4, 3.5, 999.0])[:batch]
        expected = theirs(x, context, pooled, t, return_dict=False)[0]
        assert_close(ours(x, context, t, pooled), expected, within)


def test_one_time_does_for_a_batch():
    ours = mmdit_pair(TINY)[0].double()
    x, c, pooled = normal(2, 4, 6, 4), normal(2, 3, 24), normal(2, 20)
    assert_close(ours(x, c, torch.tensor([5.0]), pooled), ours(x, c, torch.tensor([5.0, 5.0]), pooled), 1e-12)


def test_blocks_are_left_out_as_in_the_reference():
    ours, theirs = (network.double() for network in mmdit_pair(KINDS["3"]))
    x, c, pooled, t = normal(2, 4, 6, 4), normal(2, 3, 24), normal(2, 20), torch.tensor([500.0, 20.0])
    expected = theirs(x, c, pooled, t, skip_layers=[0, 2], return_dict=False)[0]
    assert_close(ours(x, c, t, pooled, skip=(0, 2)), expected, 1e-9)


@pytest.mark.slow
def test_one_block_at_full_width():
    config = replace(MMDiTConfig(), layers=2, positions=16)  # 24 heads of 64
    ours, theirs = mmdit_pair(config)
    x, context = normal(1, 16, 8, 12, dtype=torch.float32), normal(1, 20, 4096, dtype=torch.float32)
    pooled, t = normal(1, 2048, dtype=torch.float32), torch.tensor([250.0])
    assert_close(ours(x, context, t, pooled), theirs(x, context, pooled, t, return_dict=False)[0], 1e-4)


@pytest.mark.parametrize("size, says", [((4, 26), "too large"), ((5, 4), "multiples of 2")])
def test_latents_that_do_not_fit_get_one_sentence(size, says):
    ours = MMDiT(TINY).double()
    with pytest.raises(ValueError, match=says):
        ours(normal(1, 4, *size), normal(1, 3, 24), torch.tensor([1.0]), normal(1, 20))


# T5


def t5_pair(config: T5Config) -> tuple[nn.Module, nn.Module]:
    """Our T5, and transformers's with the same weights."""
    ours = randomize(T5(config))
    theirs = transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=config.vocab_size,
            d_model=config.width,
            d_kv=config.head_width,
            d_ff=config.hidden,
            num_layers=config.layers,
            num_heads=config.heads,
            relative_attention_num_buckets=config.buckets,
            relative_attention_max_distance=config.far,
            feed_forward_proj="gated-gelu",
        )
    )
    state = translated(ours, list(t5_blocks(config.layers, "t5", "", "text_encoder_3")), "text_encoder_3.")
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"encoder.embed_tokens.weight"}  # which is `shared`
    return ours, theirs.requires_grad_(False).eval()


@pytest.mark.parametrize("dtype, within", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_t5_equals_the_reference(dtype, within):
    ours, theirs = (network.to(dtype) for network in t5_pair(TINY_T5))
    if dtype == torch.float64:
        exact_norms(theirs)
    for length in 1, 7, 300:  # beyond the distance from which all are far
        tokens = torch.randint(99, (2, length), generator=torch.Generator().manual_seed(length))
        assert_close(ours(tokens), theirs(tokens)[0], within)


def test_each_distance_is_in_the_reference_s_class():
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(-600, 600)
    for buckets, far in (32, 128), (8, 20):
        expected = T5Attention._relative_position_bucket(distance, True, buckets, far)
        assert torch.equal(bucket(distance, replace(TINY_T5, buckets=buckets, far=far)), expected)


def test_t5_in_half_precision_survives_sums_that_outgrow_it():
    ours, _ = t5_pair(TINY_T5)
    for name, factor in ("embedding", 100), ("linear_1", 100), ("linear_2", 400):  # sums far above 65504
        for parameter_name, x in ours.named_parameters():
            x.mul_(factor if f"{name}." in parameter_name else 1)
    tokens = torch.arange(20)[None]
    expected, half = ours(tokens), ours.half()(tokens)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), expected, rtol=0, atol=0.05 * expected.abs().max().item())
