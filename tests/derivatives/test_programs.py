"""What people do with a network besides calling it: second derivatives, compiling, exporting, changing it."""

from __future__ import annotations

import contextlib
import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reifusion import api
from reifusion.kernels import native
from reifusion.model.pipeline import StableDiffusion
from reifusion.weights.lora import LoRA, Update, apply, remove
from tests.derivatives.test_matrix import INPUTS, MODES, REFUSED, Case, agree, backward, dual, jvp, made, vjp
from tests.model.test_fast import error, normal
from tests.tiny import SMALL, WORDS, random_networks

pytestmark = pytest.mark.slow

X, WORDS_, T = INPUTS["unet"].values()
forms = pytest.mark.parametrize("installed", [False, True], ids=["plain", "installed"])


def unet(installed: bool) -> nn.Module:
    return made("unet", "fp32", installed).network


# Towards one input, or one weight, when nothing else requires a gradient


@forms
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_gradient_towards_one_thing_alone_is_not_lost(dtype, installed):
    case = made("unet", dtype, installed)
    for key in ("latents", "words", "t", *(k for k in case.values if "cross_attention" in k or "qkv" in k)):
        agree(case, backward(case, {key: case.values[key]}))


@forms
def test_a_lora_on_any_matrix_gets_its_gradients_in_training_with_autocast(installed):
    """As `train lora` does it: bf16 by autocast, all but the update frozen."""
    case = Case("unet", "fp32", installed)
    exact = {key: backward(made("unet"), {key: made("unet").values[key]})[key] for key in case.values}
    matrices = tuple(f".{name}.weight" for name in ("q", "kv", "qkv", "out"))
    for key in (k for k in case.values if k.endswith(matrices)):
        with torch.autocast("cpu", torch.bfloat16):
            found = backward(case, {key: case.values[key]})
        assert error(found[key], exact[key]) < 0.3, key


@pytest.mark.skipif(
    not getattr(torch.cpu, "_is_avx512_bf16_supported", bool)(), reason="this CPU cannot run attention.c"
)
def test_the_kernel_in_c_steps_aside_for_derivatives_where_it_would_draw(monkeypatch):
    """On CPUs with AMX it is never chosen; here it is forced upon them."""
    monkeypatch.setattr(native, "_suits", lambda: True)
    monkeypatch.setenv("REIFUSION_NATIVE", "1")
    native._library.cache_clear()
    used: list[Tensor | None] = []
    kernel = native.flash_attention

    def noted(q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
        used.append(kernel(q, k, v))
        return used[-1]

    monkeypatch.setattr(native, "flash_attention", noted)
    try:
        case = made("unet", "bf16", True)
        with torch.inference_mode():
            case.network(*(x.bfloat16() for x in (X, WORDS_)), T)
        if used[0] is None:
            pytest.skip("there is no compiler")
        used.clear()
        for name, mode in MODES.items():
            for way in (vjp, jvp, dual):
                if (way, name) in REFUSED:
                    continue
                for key in ("words", "latents", *(k for k in case.values if k.endswith("kv.weight"))):
                    with mode():
                        found = way(case, {key: case.values[key]})
                    if isinstance(found, dict):
                        agree(case, found)
                    else:
                        assert found is not None
                        exact = made("unet")
                        gradient = backward(exact, {key: exact.values[key]})[key]
                        slope = (gradient * case.directions[key].double()).sum()
                        assert abs(found.double() - slope) <= case.within * gradient.norm(), (key, way)
        agree(case, backward(case, {"words": case.values["words"]}))
        assert not used
    finally:
        native._library.cache_clear()


# Batches of batches, and second derivatives


@forms
@pytest.mark.parametrize("mode", MODES)
def test_vmap_is_a_loop(installed, mode):
    many, network = normal(3, 2, 4, 6, 8), unet(installed)
    with MODES[mode]():
        by_vmap = torch.func.vmap(lambda x: network(x, WORDS_, T))(many)
        one_by_one = torch.stack([network(x, WORDS_, T) for x in many])
    assert error(by_vmap, one_by_one) < 1e-5


@forms
def test_each_pictures_own_gradient_by_vmap(installed):
    network = unet(installed)

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(network, weights, (x[None], WORDS_[:1], T[:1])).pow(2).sum()

    weights = {key: p.detach() for key, p in network.named_parameters()}
    by_vmap = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, X)
    for i, x in enumerate(X):
        for key, gradient in torch.func.grad(loss)(weights, x).items():
            assert error(by_vmap[key][i], gradient) < 1e-4, key


@forms
def test_second_derivatives_forward_and_backward_agree_with_differences_of_first(installed):
    case, exact = made("unet", "fp32", installed), made("unet")
    some = {key: case.values[key] for key in ("latents", "words", "t")}
    direction = {key: case.directions[key] for key in some}
    ahead, behind = (
        torch.func.grad(exact)({key: x.double() + h * direction[key].double() for key, x in some.items()})
        for h in (1e-5, -1e-5)
    )
    forward = torch.func.jvp(torch.func.grad(case), (some,), (direction,))[1]
    twice = torch.func.grad(
        lambda y: sum((x * direction[key]).sum() for key, x in torch.func.grad(case)(y).items())
    )(some)
    for key in some:
        difference = (ahead[key] - behind[key]) / 2e-5
        assert error(forward[key], difference) < 1e-3 and error(twice[key], difference) < 1e-3, key


# Compilers


@pytest.mark.slow
@forms
def test_a_compiled_unet_draws_and_learns_the_same(installed):
    torch._dynamo.reset()
    compiled = torch.compile(unet(installed), fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        assert error(compiled(X, WORDS_, T), unet(installed)(X, WORDS_, T)) < 1e-5
    words = [WORDS_.clone().requires_grad_() for _ in range(2)]
    for network, own in zip((compiled, unet(installed)), words):
        network(X, own, T).pow(2).sum().backward()
    assert error(*(own.grad for own in words if own.grad is not None)) < 1e-5


@forms
def test_an_exported_unet_takes_any_batch(installed):
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    shapes = {"latents": batch, "context": batch, "t": batch}
    with torch.no_grad():
        program = torch.export.export(unet(installed), (X, WORDS_, T), dynamic_shapes=shapes)
        three = [torch.cat([x, x])[:3] for x in (X, WORDS_, T)]
        assert error(program.module()(*three), unet(installed)(*three)) < 1e-5


@forms
@pytest.mark.parametrize("mode", MODES)
def test_a_traced_unet_is_the_unet(installed, mode):
    with MODES[mode]():
        traced = torch.jit.trace(unet(installed), (X, WORDS_, T), check_trace=False)
    with torch.no_grad():
        assert error(traced(X + 1, 2 * WORDS_, T), unet(installed)(X + 1, 2 * WORDS_, T)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("dynamo", [False, True], ids=["TorchScript", "dynamo"])
@pytest.mark.parametrize("name", INPUTS)
def test_onnx_computes_the_same_for_any_batch(name, dynamo):
    runtime = pytest.importorskip("onnxruntime")
    if dynamo:
        pytest.importorskip("onnxscript")
    network, inputs = made(name, "fp32", True).network, tuple(INPUTS[name].values())
    file, shapes = io.BytesIO(), tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs)
    names = [f"input {i}" for i in range(len(inputs))]
    with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
        if dynamo:
            program = torch.onnx.export(network, inputs, dynamo=True, dynamic_shapes=shapes, verbose=False)
            assert program is not None
            file.write(program.model_proto.SerializeToString())
        else:
            axes = {name: {0: "batch"} for name in names}
            to: Any = file  # which the TorchScript exporter takes too
            torch.onnx.export(network, inputs, to, dynamo=False, input_names=names, dynamic_axes=axes)
        three = [torch.cat([x, x])[:3] for x in inputs]
        session = runtime.InferenceSession(file.getvalue())
        given = {slot.name: x.numpy() for slot, x in zip(session.get_inputs(), three)}
        assert error(torch.from_numpy(session.run(None, given)[0]), network(*three)) < 1e-5


# In the pipeline


@pytest.fixture
def pipe() -> StableDiffusion:
    from reifusion import kernels

    models = random_networks(SMALL)
    kernels.install(models)
    return StableDiffusion(SMALL, WORDS, models)


def test_a_model_whose_unet_is_compiled_draws_is_saved_and_takes_a_lora(pipe, tmp_path):
    from reifusion.weights import save

    torch._dynamo.reset()
    plain = copy.deepcopy(pipe)
    pipe.models["diffusion"] = torch.compile(pipe.models["diffusion"], backend="aot_eager")
    asked: dict[str, Any] = {"steps": 2, "sampler": "ddim", "seed": 1}
    last, expected = (list(one.denoise("cat", **asked))[-1].latents for one in (pipe, plain))
    assert error(last, expected) < 1e-4
    save(SMALL, pipe.models, tmp_path / "model.safetensors", tokenizer=WORDS)
    again = api.load(tmp_path / "model.safetensors", dtype="fp32")
    assert error(list(again.denoise("cat", **asked))[-1].latents, expected) < 1e-4
    for one in (pipe, plain):
        apply(one, lora(one))
    last, with_lora = (list(one.denoise("cat", **asked))[-1].latents for one in (pipe, plain))
    assert error(last, with_lora) < 1e-4 < error(with_lora, expected)


def lora(pipe: StableDiffusion) -> LoRA:
    """A LoRA on the keys and values of the words alone."""
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_"
    width, context = pipe.config.unet.channels[-1], pipe.config.unet.context_width
    update = Update(normal(4, context), normal(width, 4, seed=1), 4.0)
    return LoRA({layer + part: update for part in "kv"})


def test_a_change_of_weights_between_two_steps_is_seen_in_the_next(pipe):
    """A LoRA that is put in, weights that are scaled, and a hook that edits keys and values."""
    asked: dict[str, Any] = {"steps": 3, "sampler": "ddim", "seed": 1, "cfg": 3.0}
    layer: Any = pipe.models["diffusion"].get_submodule("middle.1.layers.0.cross_attention")
    own = lora(pipe)
    changes: dict[str, tuple[Any, Any]] = {
        "lora": (lambda: apply(pipe, own), lambda: remove(pipe, own)),
        "weights": (lambda: layer.kv.weight.data.mul_(4), lambda: layer.kv.weight.data.div_(4)),
        "hook": (
            lambda: layer.kv.register_forward_hook(lambda module, given, output: 4 * output),
            lambda: layer.kv._forward_hooks.clear(),
        ),
    }
    plain = list(pipe.denoise("cat", **asked))
    for change, undo in changes.values():
        midway = []
        for step in pipe.denoise("cat", **asked):
            midway.append(step)
            if step.index == 0:
                change()
        from_there = list(pipe.denoise("cat", **asked, latents=midway[1].x_t, start=1))
        undo()
        assert torch.equal(midway[0].latents, plain[0].latents)
        assert torch.equal(midway[-1].latents, from_there[-1].latents)
        assert error(midway[-1].latents, plain[-1].latents) > 1e-3
