"""Compares samplers, schedules and options beyond the model's with diffusers, in float64."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import reifusion.sampling  # noqa: F401  # adds the samplers
from reifusion.model.ddpm import Sampler, randn
from reifusion.model.samplers import SAMPLERS
from reifusion.model.spacing import SCHEDULES, place_of, sigma_at
from tests.parity.test_samplers import (
    SD15,
    SHAPE,
    _Double,
    _double_noise,
    generators,
    network,
    relative_error,
)

LINSPACE = {"timestep_spacing": "linspace"}


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """theirs(module, class, n, more configuration): diffusers', in float64, set to n steps."""

    def make(module_name: str, class_name: str, n: int, **more: Any) -> Any:
        module = importlib.import_module(f"diffusers.schedulers.scheduling_{module_name}")
        monkeypatch.setattr(module, "torch", _Double(torch))
        monkeypatch.setattr(module, "np", _Double(np))
        monkeypatch.setattr(module, "randn_tensor", _double_noise, raising=False)
        torch.set_default_dtype(torch.float64)
        scheduler = getattr(module, class_name)(**SD15 | more)
        scheduler.set_timesteps(n)
        return scheduler

    yield make
    torch.set_default_dtype(torch.float32)


def ours(name: str, n: int, schedule: str | None = None, options: Any = None, **more: Any) -> Sampler:
    sampler = SAMPLERS[name](generators(), **more)
    vars(sampler).update(options or {})
    sampler.set_inference_timesteps(n, schedule)
    return sampler


def run(sampler: Any, x: Tensor, **extra: Any) -> Tensor:
    for t in sampler.timesteps:
        output = network(sampler.scale_model_input(x, t), t)
        x = sampler.step(t, x, output) if isinstance(sampler, Sampler) else (
            sampler.step(output, t, x, **extra).prev_sample
        )  # fmt: skip
    return x


def start() -> Tensor:
    return randn(SHAPE, torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize("option", ["karras", "exponential"])
@pytest.mark.parametrize("name", ["euler", "heun"])
@pytest.mark.parametrize("n", [2, 7, 20, 999])
def test_schedules_in_sigma_equal_diffusers(name: str, n: int, option: str, theirs: Any) -> None:
    more = LINSPACE | {f"use_{option}_sigmas": True}
    scheduler = theirs(f"{name}_discrete", f"{name.capitalize()}DiscreteScheduler", n, **more)
    sampler: Any = ours(name, n, option)
    theirs_sigmas = scheduler.sigmas[:-1][:: scheduler.order].tolist()  # Heun's are repeated
    assert sampler.sigmas[:-1] == pytest.approx(theirs_sigmas, rel=1e-12)
    x = start() * sampler.init_noise_sigma
    assert relative_error(run(sampler, x), run(scheduler, x)) < 1e-9


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("n", [1, 2, 7, 50, 999])
def test_dpmpp_2m_sde_equals_diffusers(n: int, kind: str, theirs: Any) -> None:
    more = {"algorithm_type": "sde-dpmsolver++", "prediction_type": kind, "euler_at_final": True}
    scheduler = theirs("dpmsolver_multistep", "DPMSolverMultistepScheduler", n, **more)
    sampler = ours("dpmpp_2m_sde", n, "linspace", prediction_type=kind)
    assert sampler.timesteps.tolist() == scheduler.timesteps.tolist()
    a, b = run(sampler, start() * sampler.init_noise_sigma), run(scheduler, start(), generator=generators())
    assert relative_error(a, b) < 1e-10


def test_dpmpp_2m_sde_with_zero_terminal_snr_equals_diffusers(theirs: Any) -> None:
    more = {"algorithm_type": "sde-dpmsolver++", "prediction_type": "v_prediction"}
    zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    scheduler = theirs("dpmsolver_multistep", "DPMSolverMultistepScheduler", 12, **more, **zero)
    sampler = ours("dpmpp_2m_sde", 12, "trailing", prediction_type="v_prediction", zero_terminal_snr=True)
    a, b = run(sampler, start() * sampler.init_noise_sigma), run(scheduler, start(), generator=generators())
    assert relative_error(a, b) < 1e-9


@pytest.mark.parametrize("n", [3, 20, 999])
def test_deis_equals_diffusers_of_order_3(n: int, theirs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    more = {"solver_order": 3, "lower_order_final": False}
    scheduler = theirs("deis_multistep", "DEISMultistepScheduler", n, **more)
    places = torch.cat([scheduler.timesteps.double(), torch.zeros(1)])  # it ends at the least σ, ours at 0
    monkeypatch.setitem(SCHEDULES, "these", lambda sigmas, n: places)
    sampler = ours("deis", n, "these")
    x = start() * sampler.init_noise_sigma
    for t in sampler.timesteps[:-1]:
        x = sampler.step(t, x, network(sampler.scale_model_input(x, t), t))
    signal = float(sampler.alphas_cumprod[0].sqrt())
    assert relative_error(signal * x, run(scheduler, start())) < (
        1e-8 if n == 999 else 1e-10
    )  # digits cancel


@pytest.mark.parametrize("n", [2, 7, 20])
@pytest.mark.parametrize("name", ["dpm2", "dpm2_a"])
def test_dpm2_equals_diffusers(name: str, n: int, theirs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module, kind = ("k_dpm_2_discrete", "KDPM2DiscreteScheduler")
    if name == "dpm2_a":
        module, kind = ("k_dpm_2_ancestral_discrete", "KDPM2AncestralDiscreteScheduler")
    scheduler = theirs(module, kind, n, timestep_spacing="leading", steps_offset=1)
    sampler = ours(name, n, "leading")
    x = start() * sampler.init_noise_sigma
    extra = {"generator": generators()} if name == "dpm2_a" else {}
    assert sampler.timesteps.tolist() == pytest.approx(scheduler.timesteps.tolist(), abs=2e-3)
    assert relative_error(run(sampler, x), run(scheduler, x, **extra)) < 1e-5  # its split of σ is in float32


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("n", "eta"), [(1, 0.3), (4, 0.3), (4, 0.0), (7, 1.0), (50, 0.3)])
def test_tcd_equals_diffusers(n: int, eta: float, kind: str, theirs: Any) -> None:
    scheduler = theirs("tcd", "TCDScheduler", n, prediction_type=kind, clip_sample=False)
    sampler = ours("tcd", n, options={"eta": eta}, prediction_type=kind)
    assert sampler.timesteps.tolist() == scheduler.timesteps.tolist()
    a, b = run(sampler, start()), run(scheduler, start(), eta=eta, generator=generators())
    assert relative_error(a, b) < 1e-12


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_with_noise_equals_diffusers(eta: float, theirs: Any) -> None:
    more = {"clip_sample": False, "set_alpha_to_one": False, "timestep_spacing": "leading", "steps_offset": 1}
    scheduler = theirs("ddim", "DDIMScheduler", 20, **more)
    sampler = ours("ddim", 20, options={"eta": eta})
    a, b = run(sampler, start()), run(scheduler, start(), eta=eta, generator=generators())
    assert relative_error(a, b) < 1e-12


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_spacings_equal_diffusers(spacing: str, theirs: Any) -> None:
    for n in (1, 2, 9, 20, 50, 999):
        module = "euler_discrete" if spacing == "trailing" else "dpmsolver_multistep"
        kind = "EulerDiscreteScheduler" if spacing == "trailing" else "DPMSolverMultistepScheduler"
        if spacing == "leading":
            module, kind = "ddim", "DDIMScheduler"
        more = {"steps_offset": 1} if spacing == "leading" else {}
        scheduler = theirs(module, kind, n, timestep_spacing=spacing, **more)
        assert ours("euler", n, spacing).timesteps.tolist() == scheduler.timesteps.tolist(), n


def test_align_your_steps_visits_the_timesteps_that_diffusers_lists() -> None:
    from diffusers.schedulers import AysSchedules

    for name, listed in (
        ("align_your_steps", "StableDiffusionTimesteps"),
        ("align_your_steps_xl", "StableDiffusionXLTimesteps"),
    ):
        table = AysSchedules[listed]
        assert ours("euler", 10, name).timesteps.tolist() == pytest.approx(table, abs=3.0)


def test_a_schedule_of_whole_timesteps_changes_no_bit() -> None:
    x = start().float()
    for name, schedule in (("euler", "leading"), ("ddim", "leading"), ("dpmpp_2m", "linspace")):
        one, other = ours(name, 20), ours(name, 20, schedule)
        assert torch.equal(run(one, x), run(other, x)), name
    sampler = ours("euler", 10, "karras")
    sigmas = sigma_at(sampler.timesteps, sampler._training_sigmas())
    assert vars(sampler)["sigmas"][:-1] == pytest.approx(sigmas.tolist(), rel=1e-12)


@pytest.mark.parametrize("n", [2, 12, 50])
@pytest.mark.parametrize("name", ["dpmpp_2m_sde", "dpmpp_2m_sde_heun"])
def test_on_rectified_flow_it_equals_diffusers_too(name: str, n: int, theirs: Any, monkeypatch: Any) -> None:
    """Ours walks x / (1 - s) with σ = s / (1 - s); diffusers walks x itself, with α = 1 - s and σ = s."""
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    sde = {
        "algorithm_type": "sde-dpmsolver++",
        "solver_type": "heun" if name.endswith("heun") else "midpoint",
    }
    scheduler = theirs("dpmsolver_multistep", "DPMSolverMultistepScheduler", n, **flow, **sde)
    shares = scheduler.sigmas[:-1].double()
    monkeypatch.setitem(SCHEDULES, "these", lambda table, _: place_of(shares, table))
    sampler = ours(name, n, "these", prediction_type="flow")
    a, b = start() * sampler.init_noise_sigma, start()
    generator = generators()
    for t, rounded in zip(sampler.timesteps, scheduler.timesteps):
        a = sampler.step(t, a, network(sampler.scale_model_input(a, t), t))
        b = scheduler.step(network(b, t), rounded, b, generator=generator).prev_sample
    assert relative_error(a, b) < 1e-9
