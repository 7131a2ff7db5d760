"""The fast forms against the plain ones. Whatever is done in fewer turns must give the same numbers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from reifusion.model import bands, native
from reifusion.model.attention import CrossAttention, Words, attention, softmax_attention
from reifusion.model.config import UNetConfig, VAEConfig
from reifusion.model.decoder import Decoder
from reifusion.model.diffusion import UNet
from reifusion.model.encoder import ResidualBlock
from reifusion.kernels.fast import Conv2d, Linear, geglu, upsampled

UNET = UNetConfig(channels=(32, 64), attention=(True, False), layers=1, heads=4, context_width=24, groups=8)
VAE = VAEConfig(channels=(16, 32, 64), layers=1, groups=8)

bf16 = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    reason="oneDNN has no bfloat16 on this CPU",
)
compiled = pytest.mark.skipif(native._library() is None, reason="attention.c is not for this CPU")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randomized(module: Any, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for name, x in module.named_parameters():
        x.requires_grad_(False)
        if x.ndim > 1:
            x.normal_(0, x[0].numel() ** -0.5, generator=generator)
        else:
            x.normal_(float("norm" in name and name.endswith("weight")), 0.2, generator=generator)
    return module.eval()


def error(x: torch.Tensor, exact: torch.Tensor) -> float:
    """Of the norm."""
    assert x.shape == exact.shape and exact.isfinite().all() and exact.norm() > 0
    return ((x.double() - exact.double()).norm() / exact.double().norm()).item()


def as_exact_as(fast: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> bool:
    """Is the fast form as near to the numbers in float64 as the plain one, both in bfloat16?

    Where there are few numbers, one of them may be rounded luckily; hence the last term, 2⁻⁸ for one number.
    """
    assert fast.dtype == plain.dtype == torch.bfloat16
    assert fast.shape == plain.shape
    return error(fast, exact) <= 1.2 * error(plain, exact) + (2**-8) / math.sqrt(exact.numel())


# attention.c


def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    out = native.flash_attention(q, k, v)
    assert out is not None
    return out


@compiled
@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    length=st.integers(1, 200),
    keys=st.integers(1, 600),
    width=st.integers(1, 90).map(lambda half: 2 * half),
    scale=st.sampled_from([0.0, 0.1, 1.0, 30.0]),
    fused=st.booleans(),
)
def test_compiled_attention_is_as_exact_as_pytorchs(batch, heads, length, keys, width, scale, fused):
    q = scale * normal(batch, length, heads, width)
    kv = normal(batch, keys, 2, heads, width, seed=1)
    q, kv = q.bfloat16(), kv.bfloat16()
    k, v = (part if fused else part.contiguous() for part in kv.unbind(2))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = flash(q, k, v)
    exact = softmax_attention(q.double(), k.double(), v.double())[0]
    assert as_exact_as(out, F.scaled_dot_product_attention(q, k, v), exact)


@compiled
def test_compiled_attention_survives_scores_of_any_size():
    q, k, v = (normal(1, 2, 70, 16, seed=i).bfloat16() for i in range(3))
    for scale in 1e-20, 1e3, 1e15:
        out = flash(scale * q, k, v)
        assert error(out, F.scaled_dot_product_attention(scale * q.float(), k.float(), v.float())) < 0.01
    v[0, 0, 3] = torch.inf
    assert flash(q, k, v)[0, 0].isinf().any()  # what is broken is seen to be


@compiled
def test_compiled_attention_does_not_depend_on_the_number_of_threads():
    q, k, v = (normal(2, 3, 300, 40, seed=i).bfloat16() for i in range(3))
    threads = torch.get_num_threads()
    try:
        results = []
        for number in 1, 2, 5:
            torch.set_num_threads(number)
            results.append(flash(q, k, v))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


def test_compiled_attention_leaves_alone_what_it_is_not_made_for():
    x = normal(1, 2, 8, 16)
    for q in x, x.bfloat16()[..., :15], x.bfloat16().transpose(2, 3), x.bfloat16()[:, :, :0], x.half():
        assert native.flash_attention(q, q, q) is None
    wide = normal(1, 1, 2, 514).bfloat16()
    assert native.flash_attention(wide, wide, wide) is None
    x = x.bfloat16()
    plain = F.scaled_dot_product_attention(x, x, x, is_causal=True)
    assert torch.equal(attention(x, x, x, causal=True), plain)


@compiled
def test_the_comment_in_attention_c_says_what_it_does():
    lines = [line.removeprefix("//     ") for line in native.SOURCE.read_text().splitlines()]
    start = next(i for i, line in enumerate(lines) if line.startswith("top, total, out"))
    code = "\n".join(lines[start : lines.index("out = out / total") + 1])
    q, keys, values = (normal(1, 1, length, 40, seed=length).bfloat16() for length in (70, 600, 600))
    variables: dict[str, Any] = {"torch": torch}
    variables |= {"q": q[0, 0].float(), "keys": keys[0, 0].float(), "values": values[0, 0].float()}
    exec(code, variables)
    exact = softmax_attention(q.double(), keys.double(), values.double())[0]
    assert error(variables["out"], exact[0, 0]) < 1e-6
    assert error(flash(q, keys, values)[0, 0], variables["out"]) < 0.005


# Where it is not to be, or cannot be: as if this process had not asked for it yet.


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "_suits", lambda: True)
    native._library.cache_clear()
    yield tmp_path
    native._library.cache_clear()


def pytorch_does_the_work() -> bool:
    q, k, v = (normal(1, 2, 8, 16, seed=i).bfloat16() for i in range(3))
    return torch.equal(attention(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_without_a_compiler_pytorchs_attention_does_the_work(fresh, monkeypatch):
    monkeypatch.setenv("PATH", str(fresh))
    monkeypatch.delenv("CC", raising=False)
    assert pytorch_does_the_work() and native._library() is None


def test_when_compiling_fails_pytorchs_attention_does_the_work_and_nothing_stays(fresh, monkeypatch):
    broken = fresh / "cc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    assert pytorch_does_the_work() and native._library() is None
    assert list((fresh / "cache").rglob("*.*")) == []


def test_without_a_home_pytorchs_attention_does_the_work(fresh, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(native.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert pytorch_does_the_work()


def test_reifusion_native_0_switches_it_off(fresh, monkeypatch):
    monkeypatch.setenv("REIFUSION_NATIVE", "0")
    assert pytorch_does_the_work()
    assert not (fresh / "cache").exists()


@compiled
def test_it_is_compiled_once_where_only_its_user_can_write(fresh):
    assert native._library() is not None
    (library,) = native._cache().iterdir()
    assert [path.stat().st_mode & 0o777 for path in (library, library.parent)] == [0o700, 0o700]
    made = library.stat().st_mtime_ns
    native._library.cache_clear()
    assert native._library() is not None and library.stat().st_mtime_ns == made


@compiled
def test_what_others_could_have_written_is_not_loaded(fresh):
    assert native._library() is not None
    (library,) = native._cache().iterdir()
    for path in library, library.parent:
        path.chmod(0o777)
        native._library.cache_clear()
        assert pytorch_does_the_work()
        path.chmod(0o700)
    native._library.cache_clear()
    assert native._library() is not None


# fast.py


@bf16
@torch.inference_mode()
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_as_exact_as_pytorchs(bias):
    linear = Linear(48, 80, bias=bias).bfloat16()
    x = normal(2, 9, 48).bfloat16()
    exact = linear.double()(x.double())
    linear = linear.bfloat16()
    assert as_exact_as(linear(x), F.linear(x, linear.weight, linear.bias), exact)


@bf16
@torch.inference_mode()
@pytest.mark.parametrize("height, width", [(1, 1), (1, 3), (4, 5), (8, 8)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_convolution_of_a_small_map_is_the_same_as_a_matrix_product(height, width, layout):
    conv = Conv2d(96, 128, 3, padding=1).bfloat16().to(memory_format=layout)
    x = normal(2, 96, height, width).bfloat16().to(memory_format=layout)
    assert conv.weight.numel() >= 9 * x.numel()
    exact = F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)
    assert as_exact_as(conv(x), F.conv2d(x, conv.weight, conv.bias, padding=1), exact)


@bf16
@torch.inference_mode()
def test_geglu_in_two_turns_is_as_exact_as_in_four():
    linear = Linear(32, 256).bfloat16()
    x = 2 * normal(2, 7, 32).bfloat16()
    plain, exact = (
        value * F.gelu(gate)
        for value, gate in (
            F.linear(x.to(dtype), linear.weight.to(dtype), linear.bias.to(dtype)).chunk(2, dim=-1)
            for dtype in (torch.bfloat16, torch.float64)
        )
    )
    assert as_exact_as(geglu(x, linear), plain, exact)


@bf16
@torch.inference_mode()
@settings(max_examples=20, deadline=None)
@given(height=st.integers(1, 150), width=st.integers(1, 9), batch=st.integers(1, 2))
def test_upsampling_by_four_small_kernels_is_upsampling(height, width, batch):
    conv = randomized(Conv2d(16, 24, 3, padding=1)).bfloat16().to(memory_format=torch.channels_last)
    x = normal(batch, 16, height, width).bfloat16().to(memory_format=torch.channels_last)
    size = (2 * height, 2 * width)
    plain = F.conv2d(F.interpolate(x, size=size), conv.weight, conv.bias, padding=1)
    exact = F.conv2d(
        F.interpolate(x.double(), size=size), conv.weight.double(), conv.bias.double(), padding=1
    )
    out = upsampled(x, conv, size)
    assert error(plain, exact) < 0.003
    assert error(out, exact) < 0.004  # sums of weights are rounded once more


@bf16
def test_fast_forms_step_aside_for_a_hook_and_for_gradients():
    conv, linear = Conv2d(16, 24, 3, padding=1).bfloat16(), Linear(16, 128).bfloat16()
    x = normal(1, 16, 3, 3).bfloat16().requires_grad_()
    upsampled(x, conv, (6, 6)).sum().backward()
    geglu(x.flatten(2).mT, linear).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in (x, *conv.parameters(), linear.weight))
    seen: list[nn.Module] = []
    for module in conv, linear:
        module.register_forward_hook(lambda module, given, output: seen.append(module))
    with torch.no_grad():
        upsampled(x, conv, (6, 6))
        geglu(x.flatten(2).mT, linear)
    assert seen == [conv, linear]


@bf16
@torch.no_grad()
def test_fast_forms_leave_autocast_its_choice_of_precision():
    linear, conv = Linear(16, 128), Conv2d(16, 24, 3, padding=1)
    x = normal(1, 16, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        for half in (x, x.bfloat16()):
            rows = half.flatten(2).mT
            outputs = linear(rows), geglu(rows, linear), conv(half), upsampled(half, conv, (6, 6))
            assert [y.dtype for y in outputs] == [torch.bfloat16] * 4
            plain = F.linear(rows, linear.weight, linear.bias)
            assert torch.equal(outputs[0], plain)


# The U-Net: what does not change during a generation is computed once


@torch.inference_mode()
@pytest.mark.parametrize("attention", [(True, False), (False, True), (False, False)])
def test_guidance_halves_are_computed_once_until_they_meet_the_words(attention):
    unet = randomized(UNet(replace(UNET, attention=attention)))
    x, context, t = normal(2, 4, 8, 12), normal(4, 7, 24), torch.tensor([3, 700])
    twice = unet(x.repeat(2, 1, 1, 1), context, t.repeat(2))
    assert error(unet(x, context, t), twice) < 1e-5
    assert error(unet(x, Words(context), t), twice) < 1e-5
    same = unet(x.repeat(2, 1, 1, 1), context, torch.tensor([700] * 4))
    assert error(unet(x, context, torch.tensor([700])), same) < 1e-5

    sizes: list[int] = []
    unet.down[0].register_forward_hook(lambda module, given, output: sizes.append(len(output)))
    unet(x, context, t)
    assert sizes == [2]


@torch.inference_mode()
def test_guidance_halves_keep_the_layout_that_convolutions_like():
    unet = randomized(UNet(UNET)).to(memory_format=torch.channels_last)
    layouts: list[bool] = []
    for module in unet.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(
                lambda module, given, output: layouts.append(
                    given[0].is_contiguous(memory_format=torch.channels_last)
                )
            )
    unet(normal(1, 4, 8, 8).to(memory_format=torch.channels_last), normal(2, 7, 24), torch.tensor([5]))
    assert len(layouts) > 10 and all(layouts)


@torch.inference_mode()
def test_words_are_read_once_in_a_generation():
    layer = randomized(CrossAttention(2, 16, 24))
    calls: list[int] = []
    layer.kv.register_forward_hook(lambda module, given, output: calls.append(1))
    context, x = normal(2, 7, 24), normal(2, 5, 16)
    words = Words(context)
    first, second = layer(x, words), layer(x + 1, words)
    assert len(calls) == 1
    assert torch.equal(first, layer(x, context)) and torch.equal(second, layer(x + 1, context))
    other = Words(context + 1)
    assert not torch.equal(layer(x, other), first)


@bf16
@torch.inference_mode()
def test_unet_in_bfloat16_is_as_exact_as_the_plain_one(monkeypatch):
    unet = randomized(UNet(UNET)).to(memory_format=torch.channels_last)
    x, context, t = normal(1, 4, 16, 8), normal(2, 7, 24), torch.tensor([300])
    unet = unet.bfloat16()
    x, context = x.bfloat16(), context.bfloat16()
    exact = unet.double()(x.double(), context.double(), t)
    unet.bfloat16()
    fast = unet(x, context, t)
    monkeypatch.setattr("reifusion.kernels.fast.drawing", lambda x: False)
    monkeypatch.setattr("reifusion.model.attention.flash_attention", lambda q, k, v: None)
    plain = unet(x, context, t)
    assert not torch.equal(fast, plain), "the fast forms did not run"
    assert as_exact_as(fast, plain, exact)


# The decoder in bands


@torch.inference_mode()
@pytest.mark.parametrize("rows", [1, 3, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoder_in_bands_draws_the_same_picture(monkeypatch, rows, dtype):
    decoder = randomized(Decoder(VAE)).to(memory_format=torch.channels_last)
    z = normal(2, 4, 7, 5)
    exact = decoder(z)
    decoder, z = decoder.to(dtype), z.to(dtype)
    plain = decoder(z)
    monkeypatch.setattr(bands, "suits", lambda *_: True)
    monkeypatch.setattr(bands, "BAND", rows * 16 * 20 * z.element_size())
    before = z.clone()
    banded = decoder(z)
    assert torch.equal(z, before)
    if dtype == torch.float32:
        assert error(banded, plain) < 1e-5
    else:
        assert as_exact_as(banded, plain, exact)


@torch.inference_mode()
def test_decoder_in_bands_takes_half_the_memory(monkeypatch):
    """Counted: what is allocated and not yet freed, at most."""
    decoder = randomized(Decoder(replace(VAE, channels=(32, 64, 64)))).to(memory_format=torch.channels_last)
    z = normal(1, 4, 96, 24)
    monkeypatch.setattr(bands, "BAND", 2**17)
    assert bands.suits(decoder, torch.empty(1, 64, 1, 1), 384 * 96 // 4)

    def peak() -> int:
        with torch.profiler.profile(profile_memory=True) as profile:
            decoder(z)
        now = most = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                now += event.nbytes()
                most = max(most, now)
        return most

    banded = peak()
    monkeypatch.setattr(bands, "suits", lambda *_: False)
    assert banded < 0.5 * peak()


@torch.inference_mode()
def test_statistics_of_bands_are_those_of_the_map(monkeypatch):
    monkeypatch.setattr(bands, "BAND", 2 * 8 * 6 * 4)
    norm = nn.GroupNorm(4, 8)
    for mean, std in (0, 1), (100, 1), (5, 0):
        x = mean + std * normal(1, 8, 11, 6)
        found_mean, found_var = bands.group_statistics(x, norm)
        groups = x.double().view(4, -1)
        torch.testing.assert_close(found_mean[::2].double(), groups.mean(1), rtol=1e-5, atol=1e-5)
        want = groups.var(1, correction=0)
        torch.testing.assert_close(found_var[::2].double(), want, rtol=1e-3, atol=1e-6)


def test_bands_are_not_for_small_maps_for_training_or_for_observers():
    decoder = Decoder(VAE)
    x = torch.empty(1, 64, 1, 1)
    large = 2**20
    assert not bands.suits(decoder, x, large)  # gradients
    with torch.inference_mode():
        assert bands.suits(decoder, x, large)
        assert not bands.suits(decoder, x, 64)
        assert not bands.suits(decoder, x.half(), large)
        handle = decoder.conv_out.register_forward_hook(lambda *_: None)
        assert not bands.suits(decoder, x, large)
        handle.remove()


@torch.inference_mode()
def test_residual_blocks_in_bands_need_no_more_room_than_their_input(monkeypatch):
    monkeypatch.setattr(bands, "BAND", 2**12)
    for channels in (32, 16), (16, 16), (16, 32), (24, 16):
        block = randomized(ResidualBlock(*channels, 8)).to(memory_format=torch.channels_last)
        x = normal(1, channels[0], 12, 10).to(memory_format=torch.channels_last)
        want = block(x)
        out, room = bands._residual(block, x.clone(memory_format=torch.channels_last), None)
        assert error(out, want) < 1e-5
        assert room.shape == out.shape and room.data_ptr() != out.data_ptr()
        room.zero_()
        assert error(out, want) < 1e-5
