"""The fast forms against the plain ones: fewer passes over memory must give the same numbers."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from reifusion import kernels
from reifusion.kernels import bands, native, training
from reifusion.kernels.fast import Conv2d, Linear
from reifusion.kernels.native import attention
from reifusion.model.attention import SelfAttention, softmax_attention
from reifusion.model.attention import attention as plain_attention
from reifusion.model.config import UNetConfig, VAEConfig
from reifusion.model.decoder import Decoder
from reifusion.model.decoder import Upsample as VAEUpsample
from reifusion.model.diffusion import GEGLU, Given, UNet, Upsample
from reifusion.model.encoder import ResidualBlock
from reifusion.train.loop import LoopConfig, train

UNET = UNetConfig(channels=(32, 64), attention=(1, 0), layers=1, heads=(4, 4), context_width=24, groups=8)
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


def installed(module: Any) -> Any:
    """The module with its fast forms."""
    kernels.install({"network": nn.ModuleList([module])})
    return module


def plain(module: Any) -> Any:
    kernels.uninstall({"network": nn.ModuleList([module])})
    return module


def error(x: torch.Tensor, exact: torch.Tensor) -> float:
    """Of the norm."""
    assert x.shape == exact.shape and exact.isfinite().all() and exact.norm() > 0
    return ((x.double() - exact.double()).norm() / exact.double().norm()).item()


def as_exact_as(fast: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, luck: float = 0) -> bool:
    """True if the fast form is as near to the numbers in float64 as the plain form, both in bfloat16.

    Where there are few numbers, one of them may be rounded luckily; hence the last term, 2⁻⁸ for one number.
    ``luck`` is for numbers that hang on one another: the plain form may be that share too near.
    """
    assert fast.dtype == plain.dtype == torch.bfloat16
    assert fast.shape == plain.shape
    return error(fast, exact) <= (1.2 + luck) * error(plain, exact) + (2**-8) / math.sqrt(exact.numel())


# attention.c

SIZES: dict[str, Any] = {
    "batch": st.integers(1, 3),
    "heads": st.integers(1, 3),
    "keys": st.integers(1, 600),
    "width": st.integers(1, 90).map(lambda half: 2 * half),
    "fused": st.booleans(),  # keys and values in one tensor
}


def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    out = native.flash_attention(q, k, v)
    assert out is not None
    return out


@compiled
@settings(max_examples=60, deadline=None)
@given(**SIZES, length=st.integers(1, 200), scale=st.sampled_from([0.0, 0.1, 1.0, 30.0]))
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


def test_compiled_attention_declines_inputs_that_it_is_not_made_for():
    x = normal(1, 2, 8, 16)
    for q in x, x.bfloat16()[..., :15], x.bfloat16().transpose(2, 3), x.bfloat16()[:, :, :0], x.half():
        assert native.flash_attention(q, q, q) is None
    x = x.bfloat16()
    one, thin, short = x[:, :1], x[..., :8], x[:, :, :4]  # a head, half the width, half the words
    for q, k, v in (x, thin, thin), (x, x, short), (x, one, one), (x, x, thin):
        assert native.flash_attention(q, k, v) is None
    two = torch.cat([x, x])
    assert native.flash_attention(two, x, x) is None  # which PyTorch's broadcasts
    wide = normal(1, 1, 2, 514).bfloat16()
    assert native.flash_attention(wide, wide, wide) is None
    assert torch.equal(attention(x, x, x, True), F.scaled_dot_product_attention(x, x, x, is_causal=True))


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


# Its gradients


def with_gradients(kernel: Any, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What the kernel gives for q, k and v, and their gradients if that of its result is the last tensor."""
    *inputs, grad = given
    q, k, v = (x.detach().requires_grad_() for x in inputs)
    out = kernel(q, k, v)
    return out, *torch.autograd.grad(out, (q, k, v), grad.to(out.dtype))


def written_out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return softmax_attention(q, k, v)[0]


@compiled
@settings(max_examples=60, deadline=None)
@given(**SIZES, length=st.integers(1, 600), scale=st.sampled_from([0.1, 1.0, 5.0]))
def test_compiled_gradients_are_as_exact_as_pytorchs(batch, heads, length, keys, width, scale, fused):
    q, grad = scale * normal(batch, length, heads, width), normal(batch, heads, length, width, seed=2)
    kv = normal(batch, keys, 2, heads, width, seed=1).bfloat16()
    k, v = (part if fused else part.contiguous() for part in kv.unbind(2))
    given_ = (*(x.transpose(1, 2) for x in (q.bfloat16(), k, v)), grad.bfloat16())
    exact = with_gradients(written_out, *(x.double() for x in given_))
    pytorchs = with_gradients(F.scaled_dot_product_attention, *given_)
    # A row's gradients all hang on the one sum that is rounded for it: the more rows, the less is luck.
    luck = 8 / math.sqrt(batch * heads * length)
    for ours, theirs, right in zip(
        with_gradients(training.Fused.apply, *given_), pytorchs, exact, strict=True
    ):
        # With a single key the gradients of q and k are zero, and what is left is rounding.
        assert as_exact_as(ours, theirs, right, luck) if right.norm() > 1e-9 else ours.norm() < 0.1


@compiled
def test_compiled_gradients_survive_scores_of_any_size():
    q, k, v, grad = (normal(1, 2, 70, 16, seed=i).bfloat16() for i in range(4))
    for scale in 1e-20, 1e3, 1e15:
        for x in with_gradients(training.Fused.apply, scale * q, k, v, grad):
            assert x.isfinite().all()
    grad[0, 0, 3] = torch.inf
    assert not all(x.isfinite().all() for x in with_gradients(training.Fused.apply, q, k, v, grad))


@compiled
def test_compiled_gradients_take_a_gradient_that_lies_in_memory_in_any_way():
    q, k, v = (normal(2, 3, 130, 40, seed=i).bfloat16() for i in range(3))
    full = normal(2, 3, 130, 40, seed=3).bfloat16()
    turned = full.transpose(2, 3).contiguous().transpose(2, 3)
    expanded = torch.full((1,), 0.5).bfloat16().expand(2, 3, 130, 40)
    for grad, plain_grad in ((turned, full), (expanded, expanded.contiguous())):
        one, two = (with_gradients(training.Fused.apply, q, k, v, x) for x in (grad, plain_grad))
        assert grad.stride() != plain_grad.stride() and all(map(torch.equal, one, two))


@compiled
def test_compiled_gradients_do_not_depend_on_the_number_of_threads():
    given_ = [normal(2, 3, 300, 40, seed=i).bfloat16() for i in range(4)]
    threads = torch.get_num_threads()
    results = []
    try:
        for number in 1, 2, 5:
            torch.set_num_threads(number)
            results.append(torch.stack(with_gradients(training.Fused.apply, *given_)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@compiled
def test_the_comment_in_attention_c_says_what_the_gradients_are():
    lines = [line.removeprefix("//     ") for line in native.SOURCE.read_text().splitlines()]
    start = next(i for i, line in enumerate(lines) if line.startswith("weights = torch.exp2"))
    given_ = [normal(1, 1, length, 40, seed=length) for length in (70, 600, 600, 70)]
    out, *exact = with_gradients(written_out, *(x.double() for x in given_))
    q, k, v, grad = (x[0, 0].double() for x in given_)
    variables: dict[str, Any] = {"torch": torch, "log2": math.log2, "e": math.e, "q": q, "k": k, "v": v}
    variables |= {"grad": grad, "out": out[0, 0].detach()}
    variables["sums"] = (q @ k.T / 40**0.5).logsumexp(1) / math.log(2)
    exec("\n".join(lines[start : start + 3]), variables)
    for name, right in zip(("to_q", "to_k", "to_v"), exact, strict=True):
        assert error(variables[name], right[0, 0]) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=bf16)])
@pytest.mark.parametrize(("length", "keys"), [(300, 300), (300, 7), (20, 20), (8, 9000)])
def test_in_training_attention_has_the_gradients_of_the_written_out_form(dtype, length, keys):
    sizes = (length, keys, keys, length)
    given_ = [normal(2, 2, n, 16, seed=i).to(dtype) for i, n in enumerate(sizes)]
    exact = with_gradients(written_out, *(x.double() for x in given_))
    for x, right in zip(with_gradients(training.attention, *given_), exact, strict=True):
        assert x.dtype == dtype and error(x, right) < (1e-5 if dtype == torch.float32 else 0.01)


@compiled
def test_in_training_it_is_enough_that_one_of_the_three_is_learned(monkeypatch):
    """As with a LoRA of the values alone, and whatever PyTorch's usual dtype is."""
    q, k, v, grad = (normal(1, 2, 130, 16, seed=i).bfloat16() for i in range(4))
    expected = with_gradients(training.Fused.apply, q, k, v, grad)[3]
    used, real = [], native.gradients

    def gradients(*given_: torch.Tensor) -> tuple[torch.Tensor, ...]:
        used.append(1)
        return real(*given_)

    monkeypatch.setattr(native, "gradients", gradients)
    try:
        torch.set_default_dtype(torch.float64)
        out = training.attention(q, k, v.requires_grad_())
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.autograd.grad(out, v, grad)[0], expected) and used == [1]


def test_in_training_layers_have_that_kernel_and_afterwards_their_own_again():
    for unet, before in (
        (randomized(UNet(UNET)), plain_attention),
        (installed(randomized(UNet(UNET))), attention),
    ):
        layers = [x for x in unet.modules() if isinstance(x, kernels.ATTENTION)]
        own = layers[0].kernel = lambda q, k, v, causal: q  # somebody's experiment stays
        with pytest.raises(RuntimeError, match="stop"), training.in_training(unet):
            assert layers[0].kernel is own
            assert len(layers) > 1 and all(layer.kernel is training.attention for layer in layers[1:])
            raise RuntimeError("stop")
        assert layers[0].kernel is own and all(layer.kernel is before for layer in layers[1:])


def test_a_run_trains_with_that_kernel(tmp_path, monkeypatch):
    seen = []

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = SelfAttention(2, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(self.layer.kernel)
            return self.layer(x)

    def objective(network: Any, done: float, generator: torch.Generator, part: Any) -> Any:
        return network(normal(2, 4, 8)).square().mean(), {"samples": 2.0}

    model = Model()
    train(model, objective, LoopConfig(steps=2, warmup=1, mixed_precision="no"), tmp_path)
    assert seen == [training.attention] * 2 and model.layer.kernel is plain_attention


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
def test_the_kernel_is_compiled_once_where_only_its_user_can_write(fresh):
    assert native._library() is not None
    (library,) = native._cache().iterdir()
    assert [path.stat().st_mode & 0o777 for path in (library, library.parent)] == [0o700, 0o700]
    made = library.stat().st_mtime_ns
    native._library.cache_clear()
    assert native._library() is not None and library.stat().st_mtime_ns == made


@compiled
def test_a_library_that_others_could_have_written_is_not_loaded(fresh):
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
def test_geglu_in_two_passes_is_as_exact_as_in_four():
    geglu = randomized(GEGLU(32)).bfloat16()
    x = 2 * normal(2, 7, 32).bfloat16()
    in_four, exact = geglu(x), geglu.double()(x.double())
    in_two = installed(geglu.bfloat16())(x)
    assert not torch.equal(in_two, in_four), "the fast form did not run"
    assert as_exact_as(in_two, in_four, exact)


@bf16
@torch.inference_mode()
@settings(max_examples=20, deadline=None)
@given(height=st.integers(1, 150), width=st.integers(1, 9), batch=st.integers(1, 2))
def test_upsampling_by_four_small_kernels_is_upsampling(height, width, batch):
    layer = randomized(VAEUpsample(16)).bfloat16().to(memory_format=torch.channels_last)
    x = normal(batch, 16, height, width).bfloat16().to(memory_format=torch.channels_last)
    slow, exact = layer(x), layer.double()(x.double())
    assert error(slow, exact) < 0.003
    assert error(installed(layer.bfloat16())(x), exact) < 0.004  # sums of weights are rounded once more


@torch.inference_mode()
@pytest.mark.parametrize("size", [None, (6, 8), (5, 8), (5, 7)])
def test_the_unets_upsampling_grows_to_any_size(size):
    layer, x = randomized(Upsample(16)), normal(2, 16, 3, 4)
    given_ = Given(normal(1, 64), normal(2, 7, 24), None if size is None else torch.Size(size))
    want = layer(x, given_)
    assert want.shape[-2:] == (size or (6, 8))
    assert error(installed(layer)(x, given_), want) < 1e-5


@bf16
def test_fast_forms_step_aside_for_a_hook_and_for_gradients():
    layer, geglu = installed(VAEUpsample(16)).bfloat16(), installed(GEGLU(16)).bfloat16()
    x = normal(1, 16, 3, 3).bfloat16().requires_grad_()
    layer(x).sum().backward()
    geglu(x.flatten(2).mT).sum().backward()
    parameters = (x, *layer.parameters(), *geglu.parameters())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in parameters)
    seen: list[nn.Module] = []
    for module in layer.conv, geglu.linear_1:
        module.register_forward_hook(lambda module, given, output: seen.append(module))
    with torch.inference_mode():
        layer(x)
        geglu(x.flatten(2).mT)
    assert seen == [layer.conv, geglu.linear_1]


@bf16
@torch.inference_mode()
def test_fast_forms_leave_autocast_its_choice_of_precision():
    linear, conv, layer, geglu = Linear(16, 128), Conv2d(16, 24, 3, padding=1), VAEUpsample(16), GEGLU(16)
    x = normal(1, 16, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        for half in (x, x.bfloat16()):
            rows = half.flatten(2).mT
            outputs = linear(rows), installed(geglu)(rows), conv(half), installed(layer)(half)
            assert [y.dtype for y in outputs] == [torch.bfloat16] * 4
            assert torch.equal(outputs[0], F.linear(rows, linear.weight, linear.bias))


# Installing


def networks() -> dict[str, nn.Module]:
    return {"decoder": randomized(Decoder(VAE)), "diffusion": randomized(UNet(UNET))}


@torch.inference_mode()
def test_installed_kernels_are_taken_out_again_to_the_bit():
    models = networks()
    x, context, t = normal(2, 4, 8, 8).repeat(2, 1, 1, 1), normal(4, 7, 24), torch.tensor([5])
    before = models["diffusion"](x, context, t), models["decoder"](x[:1])
    kinds = [type(module) for model in models.values() for module in model.modules()]
    weights = {name: p for model in models.values() for name, p in model.named_parameters()}
    kernels.install(models)
    assert [type(module) for model in models.values() for module in model.modules()] != kinds
    assert {name: p for model in models.values() for name, p in model.named_parameters()} == weights
    with kernels.plain(models):
        assert torch.equal(models["diffusion"](x, context, t), before[0])
    fast = models["diffusion"](x, context, t), models["decoder"](x[:1])
    assert all(error(a, b) < 1e-5 for a, b in zip(fast, before))
    kernels.uninstall(models)
    assert [type(module) for model in models.values() for module in model.modules()] == kinds
    assert all(
        torch.equal(a, b)
        for a, b in zip((models["diffusion"](x, context, t), models["decoder"](x[:1])), before)
    )


def test_copies_and_hooks_work_with_installed_kernels():
    models = networks()
    calls: list[int] = []
    models["diffusion"].get_submodule("down.1.0.conv_1").register_forward_hook(lambda *_: calls.append(1))
    kernels.install(models)
    twin = copy.deepcopy(models["diffusion"])
    with torch.inference_mode():
        x, context = normal(1, 4, 8, 8), normal(1, 7, 24)
        one, other = (unet(x, context, torch.tensor([5])) for unet in (models["diffusion"], twin))
    assert torch.equal(one, other) and len(calls) == 2


@torch.inference_mode()
def test_a_change_of_weights_is_seen_in_the_next_call():
    unet = installed(randomized(UNet(UNET)))
    x, context, t = normal(1, 4, 8, 8).repeat(2, 1, 1, 1), normal(2, 7, 24), torch.tensor([5])
    before = unet(x, context, t)
    unet.down[1][1].layers[0].cross_attention.kv.weight.data.mul_(2)
    after = unet(x, context, t)
    assert error(after, plain(unet)(x, context, t)) < 1e-5 < error(after, before)


def test_derivatives_of_an_installed_network_are_those_of_the_plain_one():
    """Backward towards words and latents, forward mode under no_grad, and vmap: against the plain network."""
    fast, slow = installed(randomized(UNet(UNET))), randomized(UNet(UNET))
    x, context, t = normal(2, 4, 8, 8), normal(2, 7, 24, seed=1), torch.tensor([5.0])
    v, w = normal(2, 4, 8, 8, seed=2), normal(2, 7, 24, seed=3)

    def gradients(unet: nn.Module) -> tuple[torch.Tensor, ...]:
        inputs = [y.clone().requires_grad_() for y in (x, context)]
        return torch.autograd.grad(unet(*inputs, t).pow(2).sum(), inputs)

    for one, other in zip(gradients(fast), gradients(slow)):
        assert error(one, other) < 1e-5
    for unet in fast, slow:
        # PyTorch's fused attention has no forward mode, and says so; its plain form has.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            ahead, behind = (unet(x + d * v, context + d * w, t) for d in (1e-3, -1e-3))
            tangent = torch.func.jvp(lambda *y, unet=unet: unet(*y, t), (x, context), (v, w))[1]
        assert error(tangent, (ahead - behind) / 2e-3) < 1e-2
    many = normal(3, 2, 4, 8, 8)
    one_by_one = torch.stack([slow(y, context, t) for y in many])
    assert error(torch.func.vmap(lambda y: fast(y, context, t))(many), one_by_one) < 1e-5


# The U-Net: both halves of the guidance begin with the same numbers


@torch.inference_mode()
@pytest.mark.parametrize("attention", [(1, 0), (0, 1), (0, 0), (2, 1)])
@pytest.mark.parametrize("times", [1, 4])
def test_guidance_halves_are_computed_once_until_they_meet_the_words(attention, times):
    unet = randomized(UNet(replace(UNET, attention=attention)))
    x, context = normal(2, 4, 8, 12).repeat(2, 1, 1, 1), normal(4, 7, 24)
    t = torch.tensor([3, 700, 3, 700])[:times]
    want = unet(x, context, t)
    assert error(installed(unet)(x, context, t), want) < 1e-5

    sizes: list[int] = []
    first = unet.down[0][0]
    first.register_forward_hook(lambda module, given, output: sizes.append(len(output)))
    unet(x, context, t)
    unet(x + torch.arange(4.0).view(4, 1, 1, 1), context, t)
    assert sizes == [2, 4]


@torch.inference_mode()
def test_other_halves_other_times_and_odd_batches_are_computed_whole():
    unet = randomized(UNet(UNET))
    x, context = normal(2, 4, 8, 12), normal(2, 7, 24)
    cases = [
        (x, context, torch.tensor([5])),
        (x[:1].repeat(2, 1, 1, 1), context, torch.tensor([5, 700])),
        (x[:1].repeat(3, 1, 1, 1), normal(3, 7, 24), torch.tensor([5])),
        (x[:1], context[:1], torch.tensor([5])),
        (x[:1].repeat(2, 1, 1, 1), context[:1], torch.tensor([5])),  # one prompt for both
    ]
    wanted = [unet(*case) for case in cases]
    installed(unet)
    assert all(error(unet(*case), want) < 1e-5 for case, want in zip(cases, wanted))


@torch.inference_mode()
def test_guidance_halves_keep_the_layout_that_convolutions_like():
    unet = installed(randomized(UNet(UNET))).to(memory_format=torch.channels_last)
    layouts: list[bool] = []
    for module in unet.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(
                lambda module, given, output: layouts.append(
                    given[0].is_contiguous(memory_format=torch.channels_last)
                )
            )
    x = normal(1, 4, 8, 8).repeat(2, 1, 1, 1).to(memory_format=torch.channels_last)
    unet(x, normal(2, 7, 24), torch.tensor([5]))
    assert len(layouts) > 10 and all(layouts)


@bf16
@torch.inference_mode()
def test_unet_in_bfloat16_is_as_exact_as_the_plain_one():
    unet = randomized(UNet(UNET)).to(memory_format=torch.channels_last).bfloat16()
    x, context, t = normal(1, 4, 16, 8).repeat(2, 1, 1, 1), normal(2, 7, 24), torch.tensor([300])
    x, context = x.bfloat16(), context.bfloat16()
    slow, exact = unet(x, context, t), unet.double()(x.double(), context.double(), t)
    fast = installed(unet.bfloat16())(x, context, t)
    assert not torch.equal(fast, slow), "the fast forms did not run"
    assert as_exact_as(fast, slow, exact)


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
    installed(decoder)
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
    decoder = installed(randomized(Decoder(replace(VAE, channels=(32, 64, 64)))))
    decoder.to(memory_format=torch.channels_last)
    z = normal(1, 4, 96, 24)
    monkeypatch.setattr(bands, "BAND", 2**17)
    assert bands.suits(decoder, z, 64 * 384 * 96 // 4)

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
    x, large = torch.empty(1, 4, 1, 1), 2**26
    assert not bands.suits(decoder, x, large)  # gradients
    with torch.inference_mode():
        assert bands.suits(decoder, x, large)
        assert not bands.suits(decoder, x, 2**12)
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
