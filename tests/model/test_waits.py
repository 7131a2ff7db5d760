"""Nobody waits for a GPU inside the denoising loop: proven on "meta", a device that has no numbers to give.

Whoever reads a number of such a tensor fails, as whoever reads one of a GPU waits. What is copied to it from
the CPU is counted: only noise may be, from pinned memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from reifusion import families
from reifusion.families.sdxl import StableDiffusionXL
from reifusion.model import ddpm, finite, noise
from reifusion.model.config import ModelConfig, ScheduleConfig
from reifusion.model.diffusion import UNet
from reifusion.model.finite import Watch
from reifusion.model.pipeline import StableDiffusion
from reifusion.model.samplers import SAMPLERS
from reifusion.shortcuts.deepcache import deepcached
from tests.marks import SOME
from tests.tiny import TINY, WORDS, Bytes, networks
from tests.tiny_sdxl import TINY as XL

STEPS = 5
# Those that draw noise in every step but the last; restart only does from 20 steps on
NOISY = {name for name, kind in SAMPLERS.items() if kind.s_noise is not None and kind.eta != 0} - {"restart"}
IN_THE_SECOND_CALL = {"dpm2_a", "dpmpp_2s_a"}  # draw noise in the second of a step's calls alone


class Traffic:
    """Counts what goes from the CPU to a device that has no numbers."""

    def __init__(self) -> None:
        self.copies: list[str] = []

    def __enter__(self) -> Traffic:
        self._modes = _Copies(self.copies), _Made(self.copies)
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)


class _Copies(TorchDispatchMode):
    def __init__(self, copies: list[str]) -> None:
        super().__init__()
        self.copies = copies

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        from_cpu = any(isinstance(x, Tensor) and x.device.type == "cpu" and x.numel() for x in args)
        if from_cpu and isinstance(out, Tensor) and out.device.type == "meta":
            self.copies.append(str(function))
        return out


class _Made(TorchFunctionMode):
    """Tensors made of Python's numbers: on a GPU, they are made on the CPU and copied."""

    def __init__(self, copies: list[str]) -> None:
        super().__init__()
        self.copies = copies

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.tensor, torch.as_tensor) and "meta" in str((kwargs or {}).get("device")):
            self.copies.append(function.__name__)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def brought(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of the noise that is brought, by the one function that does not wait."""
    shapes: list[torch.Size] = []

    def bring(x: Tensor, device: torch.device) -> Tensor:
        shapes.append(x.shape)
        return torch.empty(x.shape, dtype=x.dtype, device=device)

    monkeypatch.setattr(ddpm, "bring", bring)
    return shapes


def on_meta(config: ModelConfig) -> StableDiffusion:
    models = families.build(config) if config.unet.guidance_width else networks(config)
    for network in models.values():
        network.to("meta")
    return families.adapted(StableDiffusion(config, Bytes(), models, "meta"))


@cache
def of_all_samplers(kind: str) -> StableDiffusion:
    return on_meta(of_type(kind))


def of_type(kind: str, **unet: Any) -> ModelConfig:
    return replace(TINY, schedule=ScheduleConfig(prediction_type=kind), unet=replace(TINY.unet, **unet))


@pytest.fixture(autouse=True)
def answers(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """A device without numbers never answers whether they are finite. What was asked is kept."""
    asked: list[Tensor] = []

    def fetched(answer: Tensor) -> tuple[Tensor, None]:
        asked.append(answer)
        return torch.tensor(True), None

    monkeypatch.setattr(finite, "_fetched", fetched)
    monkeypatch.setattr("reifusion.model.pipeline.finite", lambda x, *_: x)  # before and after the loop
    return asked


def steps(pipe: StableDiffusion, **settings: Any) -> Iterator[Any]:
    return pipe.denoise("a cat", seed=1, steps=STEPS, **settings)


CASES: dict[str, dict[str, Any]] = {
    "guidance": {},
    "no guidance": {"cfg": 1.0},
    "rescaled": {"guidance_rescale": 0.7},
    "in an interval": {"guidance_interval": (0.5, 5)},
    "a batch": {"num": 3},
    "a picture": {"init_image": Image.new("RGB", (64, 64)), "strength": 0.7},
    "inpainting": {
        "init_image": Image.new("RGB", (64, 64)),
        "mask": Image.new("L", (64, 64), 255),
        "strength": 0.7,
    },
}


@pytest.mark.parametrize(
    ("sampler", "case"),
    [
        pytest.param(name, case, marks=[] if name in SOME or case == "guidance" else pytest.mark.slow)
        for name, kind in SAMPLERS.items() for case in CASES
        if case in ("guidance", "inpainting") or not kind.__module__.startswith("reifusion.sampling")
    ],
)  # fmt: skip
def test_no_step_waits_for_the_device(sampler, case, brought, answers, monkeypatch):
    kind = SAMPLERS[sampler].prediction_types[0]
    pipe = of_all_samplers(kind)
    if sampler not in ("ddim", "flow"):  # the U-Net is the same for all, and slow on this device
        monkeypatch.setattr(UNet, "forward", lambda self, latents, *_, **more: torch.empty_like(latents))
    drawn, traffic, index = steps(pipe, sampler=sampler, **CASES[case]), Traffic(), 0
    next(drawn)  # before the first step, words and pictures are brought; the schedule in the first one
    brought.clear()
    while True:
        with traffic:
            step = next(drawn, None)
        if step is None:
            break
        index = step.index
    assert traffic.copies == []
    assert index > 0 and len(answers) == index + 1
    draws = index // 2 if sampler in IN_THE_SECOND_CALL else index - 1
    assert len(brought) == (draws if sampler in NOISY else 0)


@pytest.mark.parametrize("every", [1, 2])
def test_deepcache_does_not_wait(every, brought):
    drawn, traffic = steps(deepcached(on_meta(of_type("epsilon")), every), sampler="ddim"), Traffic()
    next(drawn)
    with traffic:
        assert len(list(drawn)) == STEPS - 1
    assert traffic.copies == []


@pytest.mark.parametrize("unet", [{"guidance_width": 32}, {"in_channels": 8}, {"in_channels": 9}])
def test_relatives_do_not_wait(unet, brought):
    pipe = on_meta(of_type("epsilon", **unet))
    sampler = "lcm" if "guidance_width" in unet else "ddim"
    pictures = {"init_image": Image.new("RGB", (64, 64))} if unet.get("in_channels") == 8 else {}
    if unet.get("in_channels") == 9:
        pictures = {"init_image": Image.new("RGB", (64, 64)), "mask": Image.new("L", (64, 64), 255)}
    drawn, traffic = steps(pipe, sampler=sampler, **pictures), Traffic()
    next(drawn)
    with traffic:
        assert len(list(drawn)) > 0
    assert traffic.copies == []


def test_sdxl_does_not_wait(brought, monkeypatch):
    monkeypatch.setattr("reifusion.families.pooled_text.finite", lambda x, *_: x)  # before the loop
    pipe = StableDiffusionXL(XL, WORDS, families.build(XL), "meta")
    drawn, traffic = steps(pipe, sampler="ddim"), Traffic()
    next(drawn)
    with traffic:
        assert len(list(drawn)) == STEPS - 1
    assert traffic.copies == []


def test_a_wait_or_a_copy_in_a_step_would_be_seen():
    x = torch.empty(3, device="meta")
    for read in (lambda: bool(x.isfinite().all()), lambda: x.sum().item(), lambda: torch.equal(x, x)):
        with pytest.raises((RuntimeError, NotImplementedError)):
            read()
    with Traffic() as traffic:
        torch.ones(3).to("meta")
        torch.tensor([1.0], device="meta")
        x.new_full((), 2.0)
        torch.full((1,), 2.0, device="meta")
    assert len(traffic.copies) == 2


def test_training_brings_the_schedule_once(brought):
    for name in ("ddpm", "flow"):
        sampler = SAMPLERS[name]()
        x0, t = torch.empty(4, 4, 8, 8, device="meta"), torch.empty(4, dtype=torch.long, device="meta")
        eps = torch.empty_like(x0)
        sampler.add_noise(x0, t, eps)
        with Traffic() as traffic:
            sampler.add_noise(x0, t, eps)
            sampler.target(x0, t, eps)
            sampler.predict(t, x0, eps)
        assert traffic.copies == []


def test_a_schedule_that_is_replaced_is_brought_again():
    sampler, x = SAMPLERS["ddpm"](), torch.ones(1, 4, 2, 2)
    before = sampler.add_noise(x, 500, torch.zeros_like(x))
    sampler.alphas_cumprod = sampler.alphas_cumprod**2
    torch.testing.assert_close(sampler.add_noise(x, 500, torch.zeros_like(x)), before**2)


def test_a_schedule_that_was_drawn_with_can_be_trained_with():
    sampler, x = SAMPLERS["ddpm"](), torch.ones(1, 4, 2, 2, requires_grad=True)
    with torch.inference_mode():
        sampler.add_noise(x, 3, torch.zeros_like(x))
    sampler.add_noise(x, torch.tensor([3]), torch.zeros_like(x)).sum().backward()
    assert x.grad is not None


# Whether numbers are finite, when the answer comes late


class Late:
    """An answer that arrives when it is told to."""

    def __init__(self) -> None:
        self.here = self.waited = False

    def query(self) -> bool:
        return self.here

    def synchronize(self) -> None:
        self.here = self.waited = True


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch, answers: list[Tensor]) -> list[Late]:
    arrivals: list[Late] = []

    def fetched(answer: Tensor) -> tuple[Tensor, Late]:
        arrivals.append(Late())
        return answer, arrivals[-1]

    monkeypatch.setattr(finite, "_fetched", fetched)
    return arrivals


def broken_in_step(pipe: StableDiffusion, which: int) -> Iterator[Any]:
    """A denoising loop whose U-Net says NaN in one step."""
    calls: list[int] = []

    def spoil(module: nn.Module, given: Any, output: Tensor) -> Tensor:
        calls.append(0)
        return output * torch.nan if len(calls) == which else output

    pipe.models["diffusion"].register_forward_hook(spoil)
    return steps(pipe, sampler="ddim", cfg=1.0)


def tiny_pipe() -> StableDiffusion:
    return StableDiffusion(TINY, Bytes(), networks())


def test_a_late_answer_is_not_waited_for_and_names_its_own_step(late):
    drawn = broken_in_step(tiny_pipe(), 2)
    seen = [next(drawn) for _ in range(4)]
    assert [step.index for step in seen] == [0, 1, 2, 3] and not any(one.waited for one in late)
    late[0].here = late[1].here = True
    with pytest.raises(FloatingPointError, match=r"the U-Net made numbers .* in step 2 of 5"):
        next(drawn)
    assert not any(one.waited for one in late)


def test_answers_that_never_came_are_waited_for_after_the_last_step(late):
    drawn = broken_in_step(tiny_pipe(), 4)
    with pytest.raises(FloatingPointError, match="in step 4 of 5"):
        for index in range(6):
            assert next(drawn).index == index
    assert index == 5 and [one.waited for one in late] == [True] * 4 + [False]


def test_answers_are_taken_in_order_even_if_they_arrive_out_of_order(late):
    watch, pipe = Watch(nn.Linear(1, 1)), tiny_pipe()
    drawn = list(steps(pipe, sampler="ddim", cfg=1.0))
    late.clear()
    bad = replace(drawn[1], latents=drawn[1].latents * torch.inf)
    watch(drawn[0])
    watch(bad)
    late[1].here = True
    watch(drawn[2])  # the second answer is here, but not the first
    late[0].here = True
    with pytest.raises(FloatingPointError, match="in step 2 of 5"):
        watch(drawn[3])


def test_bringing_noise_to_a_cpu_changes_nothing():
    x = torch.randn(2, 3)
    assert noise.bring(x, "cpu") is x
