"""Compares every sampler with its class in diffusers, through whole loops with a made-up network.

Twice: with diffusers as it is, in float32, and, much more strictly, with diffusers in float64. The latter
runs its own code, but reads `float32` as `float64` throughout, schedule included, so that what is left is
the arithmetic alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from reifusion.model.ddpm import Sampler, randn
from reifusion.model.samplers import SAMPLERS

diffusers = pytest.importorskip("diffusers")

SHAPE = (2, 4, 6, 5)
STEPS = [1, 2, 7, 20, 50, pytest.param(999, marks=pytest.mark.slow)]

SD15 = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
LEADING = {"timestep_spacing": "leading", "steps_offset": 1}
# Our name -> the module and class in diffusers, and the configuration beyond SD15's
REFERENCES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ddpm": ("ddpm", "DDPMScheduler", {"clip_sample": False, **LEADING}),
    "ddim": ("ddim", "DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False, **LEADING}),
    "pndm": ("pndm", "PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False, **LEADING}),
    "lms": ("lms_discrete", "LMSDiscreteScheduler", LEADING),
    "euler": ("euler_discrete", "EulerDiscreteScheduler", LEADING),
    "euler_a": ("euler_ancestral_discrete", "EulerAncestralDiscreteScheduler", LEADING),
    "heun": ("heun_discrete", "HeunDiscreteScheduler", LEADING),
    "dpmpp_2m": ("dpmsolver_multistep", "DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_karras": ("dpmsolver_multistep", "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    # diffusers' other DPM++ SDE, DPMSolverSDEScheduler, needs torchsde and is another algorithm.
    "dpmpp_sde": (
        "dpmsolver_multistep",
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++"},
    ),
    "unipc": ("unipc_multistep", "UniPCMultistepScheduler", {}),
    "lcm": ("lcm", "LCMScheduler", {"set_alpha_to_one": False}),
}
NAMES = list(REFERENCES)
STOCHASTIC = ("ddpm", "euler_a", "dpmpp_sde", "lcm")


class _Double:
    """A module in which float32 means float64."""

    def __init__(self, module: Any) -> None:
        self._module, self.float32 = module, module.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _double_noise(shape: Any, generator: Any, **_: Any) -> Tensor:
    return randn(shape, generator).double()


def _quad(f: Any, start: Any, end: Any, **_: Any) -> tuple[float]:
    """scipy.integrate.quad, for the polynomials that LMS integrates; so that scipy is not needed."""
    nodes, weights = np.polynomial.legendre.leggauss(8)
    middle, half = (float(start) + float(end)) / 2, (float(end) - float(start)) / 2
    return (half * sum(w * float(f(middle + half * node)) for node, w in zip(nodes, weights, strict=True)),)


def set_timesteps(scheduler: Any, n: int) -> None:
    if "LCM" in type(scheduler).__name__:  # refuses more than 50 steps unless its grid is finer
        scheduler.set_timesteps(n, original_inference_steps=max(50, n))
    else:
        scheduler.set_timesteps(n)


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """reference(name, n, prediction_type, double=…, more configuration): diffusers', set to n steps."""

    def make(name: str, n: int, prediction_type: str = "epsilon", double: bool = False, **more: Any) -> Any:
        module_name, class_name, config = REFERENCES[name]
        module = importlib.import_module(f"diffusers.schedulers.scheduling_{module_name}")
        if name == "lms":
            monkeypatch.setattr(module, "integrate", SimpleNamespace(quad=_quad), raising=False)
        if double:
            monkeypatch.setattr(module, "torch", _Double(torch))
            monkeypatch.setattr(module, "np", _Double(np))
            if name in STOCHASTIC:  # float64 noise would be other numbers
                monkeypatch.setattr(module, "randn_tensor", _double_noise)
            torch.set_default_dtype(torch.float64)
        settings = SD15 | config | {"prediction_type": prediction_type} | more
        scheduler = getattr(module, class_name)(**settings)
        set_timesteps(scheduler, n)
        return scheduler

    yield make
    torch.set_default_dtype(torch.float32)


def network(x: Tensor, t: Any) -> Tensor:
    """A smooth function, not linear, different at every t, which mixes neighbours: it reveals any mistake."""
    s = float(t) / 1000
    return torch.tanh((0.6 + 0.3 * s) * x) + 0.2 * torch.sin(3 * x.roll(1, -1) + 4 * s)


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in (7, 8)]


def make_ours(name: str, n: int, prediction_type: str | None = None, **more: Any) -> Sampler:
    more |= {} if prediction_type is None else {"prediction_type": prediction_type}
    sampler = SAMPLERS[name](generators(), **more)
    sampler.set_inference_timesteps(n)
    return sampler


def run_ours(sampler: Sampler, x: Tensor) -> Tensor:
    for t in sampler.timesteps:
        x = sampler.step(t, x, network(sampler.scale_model_input(x, t), t))
    return x


def run_theirs(name: str, scheduler: Any, x: Tensor, timesteps: Tensor | None = None) -> Tensor:
    extra = {"generator": generators()} if name in STOCHASTIC else {}
    for t in scheduler.timesteps if timesteps is None else timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x, **extra).prev_sample
    return x


def relative_error(a: Tensor, b: Tensor) -> float:
    assert a.dtype == b.dtype
    assert b.isfinite().all()
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("n", STEPS)
@pytest.mark.parametrize("name", NAMES)
def test_equals_diffusers(name: str, n: int, prediction_type: str, reference: Any) -> None:
    noise = randn(SHAPE, torch.Generator().manual_seed(0))
    mine, theirs = make_ours(name, n, prediction_type), reference(name, n, prediction_type)
    a = run_ours(mine, noise * mine.init_noise_sigma)
    b = run_theirs(name, theirs, noise * theirs.init_noise_sigma)
    # diffusers' schedule is in float32: α = ᾱₜ / ᾱₜ₋₁ keeps four digits of β when neighbours are one apart.
    assert relative_error(a, b) < (1e-4 if n == 999 else 1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("n", STEPS)
@pytest.mark.parametrize("name", NAMES)
def test_equals_diffusers_in_float64(name: str, n: int, prediction_type: str, reference: Any) -> None:
    noise = randn(SHAPE, torch.Generator().manual_seed(0)).double()
    mine, theirs = make_ours(name, n, prediction_type), reference(name, n, prediction_type, double=True)
    a = run_ours(mine, noise * mine.init_noise_sigma)
    b = run_theirs(name, theirs, noise * theirs.init_noise_sigma)
    # diffusers' DDPM ends with a trace of noise, of variance 1e-20; ours ends with none, as in the paper.
    assert relative_error(a, b) < (1e-9 if name == "ddpm" else 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_same_timesteps_for_any_number_of_steps(name: str, reference: Any) -> None:
    sampler, scheduler = make_ours(name, 1), reference(name, 1, double=True)
    for n in [*range(1, 61), *range(61, 999, 17), 499, 500, 501, 997, 998, 999]:
        sampler.set_inference_timesteps(n)
        set_timesteps(scheduler, n)
        assert sampler.timesteps.tolist() == scheduler.timesteps.tolist(), n
        if hasattr(sampler, "sigmas"):
            theirs = scheduler.sigmas[:-1][:: scheduler.order].tolist()  # Heun's are repeated
            assert sampler.sigmas[:-1] == pytest.approx(theirs, rel=1e-12)
            assert sampler.sigmas[-1] == scheduler.sigmas[-1] == 0


def test_karras_timesteps_in_float32_may_round_the_other_way(reference: Any) -> None:
    # diffusers as it is, in float32: of the numbers of steps up to 60, these have a timestep near a half.
    sampler, scheduler = make_ours("dpmpp_2m_karras", 1), reference("dpmpp_2m_karras", 1)
    for n in range(1, 61):
        sampler.set_inference_timesteps(n)
        scheduler.set_timesteps(n)
        off_by_one = (sampler.timesteps - scheduler.timesteps).abs()
        assert off_by_one.max() <= 1
        assert off_by_one.sum() <= (1 if n in (18, 35, 43, 52) else 0), n


# Image-to-image. diffusers' PNDM and LMS are not good references for it, see below.


@pytest.mark.parametrize("strength", [0.04, 0.3, 0.75, 1.0])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("pndm", "lms")])
def test_strength_equals_diffusers(name: str, strength: float, reference: Any) -> None:
    n, x0, noise = 25, randn(SHAPE, generators()), randn(SHAPE, torch.Generator().manual_seed(0))
    sampler, scheduler = make_ours(name, n), reference(name, n)
    sampler.set_strength(strength)
    # as in diffusers' StableDiffusionImg2ImgPipeline.get_timesteps
    start = (n - int(n * strength)) * scheduler.order
    timesteps = scheduler.timesteps[start:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    assert sampler.timesteps.tolist() == timesteps.tolist()

    t = sampler.timesteps[0]
    a, b = sampler.add_noise(x0, t, noise), scheduler.add_noise(x0, noise, timesteps[:1])
    assert relative_error(a, b) < 1e-5
    assert relative_error(run_ours(sampler, a), run_theirs(name, scheduler, b, timesteps)) < 1e-5


def test_strength_with_pndm_and_lms_is_a_fresh_start() -> None:
    # Given the end of a schedule, diffusers' PNDM takes its second timestep for the second visit to the first
    # step, so every prediction from there on is for a timestep that the latents are not at; and its LMS takes
    # the weights for four slopes with the one it has. Ours start as they would any schedule.
    pndm, lms = make_ours("pndm", 10), make_ours("lms", 10)
    pndm.set_strength(0.5)
    lms.set_strength(0.5)
    assert pndm.timesteps.tolist() == [401, 301, 301, 201, 101, 1]
    x0, noise = randn(SHAPE, generators()), randn(SHAPE, torch.Generator().manual_seed(0))
    first = lms.step(401, x := lms.add_noise(x0, 401, noise), noise)
    euler = make_ours("euler", 10)
    torch.testing.assert_close(first, euler.step(401, x, noise))


# Other options of diffusers' schedulers that ours have too


@pytest.mark.parametrize("name", NAMES)
def test_add_noise_with_a_timestep_per_image_equals_diffusers(name: str, reference: Any) -> None:
    x0, noise = randn(SHAPE, generators()), randn(SHAPE, torch.Generator().manual_seed(0))
    sampler, scheduler = make_ours(name, 20), reference(name, 20)
    if (
        name == "dpmpp_2m_karras"
    ):  # whose σ is not that of its rounded timestep; see test_strength_equals_diffusers
        scheduler = reference("dpmpp_2m", 20)
    t = scheduler.timesteps[[3, -2]]
    assert relative_error(sampler.add_noise(x0, t, noise), scheduler.add_noise(x0, noise, t)) < 1e-5


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", ["ddpm", "ddim", "euler", "euler_a", "heun", "lms"])
def test_predict_equals_diffusers(name: str, prediction_type: str, reference: Any) -> None:
    sampler, scheduler = make_ours(name, 20, prediction_type), reference(name, 20, prediction_type)
    x = randn(SHAPE, generators()) * sampler.init_noise_sigma
    t = scheduler.timesteps[0]
    output = network(scheduler.scale_model_input(x, t), t)
    x0, _ = sampler.predict(t, x, output)
    assert relative_error(x0, scheduler.step(output, t, x).pred_original_sample) < 1e-5


@pytest.mark.parametrize("name", ["ddpm", "ddim", "lcm"])
def test_velocity_equals_diffusers(name: str, reference: Any) -> None:
    x0, noise, t = randn(SHAPE, generators()), randn(SHAPE), torch.tensor([0, 700])
    v = make_ours(name, 20).velocity(x0, t, noise)
    assert relative_error(v, reference(name, 20).get_velocity(x0, noise, t)) < 1e-5


# Zero terminal SNR and `trailing` spacing (Lin et al. 2023), in the classes of diffusers that have both

ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
WITH_ZERO_SNR = [name for name in NAMES if name not in ("pndm", "lms", "heun")]


@pytest.mark.parametrize("n", STEPS)
@pytest.mark.parametrize("name", WITH_ZERO_SNR)
def test_zero_terminal_snr_equals_diffusers_in_float64(name: str, n: int, reference: Any) -> None:
    if name == "ddim" and 1000 % n:
        pytest.skip("diffusers goes from t to t - 1000 // n, which is not its own next timestep")
    mine = make_ours(name, n, "v_prediction", zero_terminal_snr=True)
    theirs = reference(name, n, "v_prediction", double=True, **ZERO_SNR)
    if name == "dpmpp_2m_karras":
        theirs.set_begin_index(0)  # its first timesteps are all 999, of which it would begin at the second
    assert mine.timesteps.tolist() == theirs.timesteps.tolist()
    assert mine.timesteps[0] == 999 or (name, n) == ("lcm", 999)
    # The same start for both: diffusers begins at σ where it is not `leading`, ours always at √(σ² + 1).
    noise = randn(SHAPE, torch.Generator().manual_seed(0)).double() * mine.init_noise_sigma
    a, b = run_ours(mine, noise), run_theirs(name, theirs, noise)
    # With σ from 4096 to 0, a few digits cancel. DDPM's: see test_equals_diffusers_in_float64.
    assert relative_error(a, b) < (1e-9 if name == "ddpm" else 1e-11)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "euler", "dpmpp_2m"])
def test_zero_terminal_snr_equals_diffusers(name: str, reference: Any) -> None:
    mine = make_ours(name, 20, "v_prediction", zero_terminal_snr=True)
    theirs = reference(name, 20, "v_prediction", **ZERO_SNR)
    noise = randn(SHAPE, torch.Generator().manual_seed(0)) * mine.init_noise_sigma
    assert relative_error(run_ours(mine, noise), run_theirs(name, theirs, noise)) < 1e-4


@pytest.mark.parametrize("n", [1, 2, 20, 50])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "lcm"])
def test_trailing_spacing_equals_diffusers_in_float64(name: str, n: int, reference: Any) -> None:
    mine = make_ours(name, n, "epsilon", timestep_spacing="trailing")
    theirs = reference(name, n, "epsilon", double=True, timestep_spacing="trailing")
    noise = randn(SHAPE, torch.Generator().manual_seed(0)).double() * mine.init_noise_sigma
    a, b = run_ours(mine, noise), run_theirs(name, theirs, noise)
    assert relative_error(a, b) < (1e-9 if name == "ddpm" else 1e-12)


def test_trailing_timesteps_equal_diffusers_for_any_number_of_steps(reference: Any) -> None:
    mine, theirs = (
        make_ours("ddpm", 1, timestep_spacing="trailing"),
        reference("ddpm", 1, timestep_spacing="trailing"),
    )
    for n in range(1, 1001):
        mine.set_inference_timesteps(n)
        theirs.set_timesteps(n)
        # For some n its steps add up to a little less than 1000, and there is one too many. And a timestep
        # that is exactly a half is rounded the way that the sum of its steps happens to lie.
        off = mine.timesteps - theirs.timesteps[:n]
        half = torch.arange(n) * 2000 % (2 * n) == n
        assert (off[~half] == 0).all()
        assert off.abs().max() <= 1


# Rectified flow


def flow(n: int) -> Any:
    """diffusers' scheduler with even steps: by itself it makes the last one from σ = 0.001, which is lost."""
    module = importlib.import_module("diffusers.schedulers.scheduling_flow_match_euler_discrete")
    scheduler = module.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / n, n))
    return scheduler


def run_flow(scheduler: Any, x: Tensor, timesteps: Tensor | None = None) -> Tensor:
    for t in scheduler.timesteps if timesteps is None else timesteps:
        x = scheduler.step(network(x, t), t, x).prev_sample
    return x


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("n", [*STEPS, 1000])
def test_flow_equals_diffusers(n: int, double: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if double:
        module = importlib.import_module("diffusers.schedulers.scheduling_flow_match_euler_discrete")
        monkeypatch.setattr(module, "torch", _Double(torch))
        monkeypatch.setattr(module, "np", _Double(np))
    noise = randn(SHAPE, torch.Generator().manual_seed(0)).to(torch.float64 if double else torch.float32)
    sampler, scheduler = make_ours("flow", n), flow(n)
    torch.testing.assert_close(
        sampler.timesteps, scheduler.timesteps.double(), rtol=1e-12 if double else 1e-6, atol=0
    )
    assert relative_error(run_ours(sampler, noise), run_flow(scheduler, noise)) < (1e-12 if double else 1e-5)


@pytest.mark.parametrize("strength", [0.04, 0.3, 0.75, 1.0])
def test_flow_from_a_picture_equals_diffusers(strength: float) -> None:
    n, x0, noise = 25, randn(SHAPE, generators()), randn(SHAPE, torch.Generator().manual_seed(0))
    sampler, scheduler = make_ours("flow", n), flow(n)
    sampler.set_strength(strength)
    start = int(n - n * strength)  # as diffusers's pipelines for Stable Diffusion 3 count
    scheduler.set_begin_index(start)
    timesteps = scheduler.timesteps[start:]
    a, b = sampler.add_noise(x0, sampler.timesteps[0], noise), scheduler.scale_noise(x0, timesteps[:1], noise)
    assert relative_error(a, b) < 1e-6
    assert relative_error(run_ours(sampler, a), run_flow(scheduler, b, timesteps)) < 1e-5


# Where all 1,000 timesteps are asked for, the reference fails, each class in its own way; ours is 999 … 0.


@pytest.mark.slow
def test_a_thousand_steps_where_diffusers_cannot(reference: Any) -> None:
    x = randn(SHAPE, generators())
    for name in NAMES:
        result = run_ours(make_ours(name, 1000), x)
        assert result.isfinite().all(), name

    for name in ("ddpm", "ddim", "pndm"):  # the offset leads to timestep 1000, past the table's end
        assert reference(name, 1000).timesteps[0] == 1000
        with pytest.raises(IndexError):
            run_theirs(name, reference(name, 1000), x)
    for name in ("euler", "euler_a", "heun", "lms"):  # the network is asked about timestep 1000
        assert reference(name, 1000).timesteps[0] == 1000
        assert reference(name, 1000).sigmas[0] == reference(name, 1000).sigmas[1 if name != "heun" else 2]
    for name in ("dpmpp_2m", "dpmpp_sde", "unipc"):  # a timestep comes twice: a step of length 0
        scheduler = reference(name, 1000)
        assert len(scheduler.timesteps.unique()) < 1000
        assert not run_theirs(name, scheduler, x).isfinite().all()
