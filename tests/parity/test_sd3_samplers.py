"""Compares rectified flow with a shift, by Euler's method and by DPM-Solver++, with diffusers's classes."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from reifusion.families.flow_solver import FlowDPMPP2MSampler
from reifusion.model.flow import FlowSampler
from tests.parity.test_samplers import _Double, network, relative_error

diffusers = pytest.importorskip("diffusers")

NOISE = torch.randn(2, 16, 6, 5, generator=torch.Generator().manual_seed(0))


def scheduler_in(module: str, name: str, monkeypatch: pytest.MonkeyPatch | None, **settings: Any) -> Any:
    """A scheduler of diffusers; with a monkeypatch, one that computes in float64 throughout."""
    found = importlib.import_module(f"diffusers.schedulers.scheduling_{module}")
    if monkeypatch is not None:
        monkeypatch.setattr(found, "torch", _Double(torch))
        monkeypatch.setattr(found, "np", _Double(np))
    return getattr(found, name)(**settings)


def run(scheduler: Any, x: Tensor, timesteps: Tensor) -> Tensor:
    for t in timesteps:
        step = scheduler.step(network(x, t), t, x)
        x = step if isinstance(step, Tensor) else step.prev_sample
    return x


def ours(sampler: FlowSampler, x: Tensor) -> Tensor:
    for t in sampler.timesteps:
        x = sampler.step(t, x, network(x, t))
    return x


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.7, 12.5])
@pytest.mark.parametrize("total", [1000, 50])
def test_timesteps_are_those_of_the_reference(shift, total, monkeypatch):
    """For every number of steps."""
    euler = "flow_match_euler_discrete", "FlowMatchEulerDiscreteScheduler"
    single = scheduler_in(*euler, None, shift=shift, num_train_timesteps=total)
    for n in [*range(1, 60), 100, 333, 999, 1000]:
        if n <= total:
            sampler = FlowSampler(shift=shift, num_training_steps=total)
            sampler.set_inference_timesteps(n)
            single.set_timesteps(n)
            torch.testing.assert_close(sampler.timesteps.float(), single.timesteps, rtol=1e-5, atol=0)
            torch.testing.assert_close(torch.tensor(sampler.sigmas), single.sigmas, rtol=1e-5, atol=0)
    double = scheduler_in(*euler, monkeypatch, shift=shift, num_train_timesteps=total)
    sampler = FlowSampler(shift=shift, num_training_steps=total)
    for n in 1, 2, 28, 50:
        sampler.set_inference_timesteps(n)
        double.set_timesteps(n)
        torch.testing.assert_close(sampler.timesteps, double.timesteps, rtol=1e-12, atol=0)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("n", [1, 2, 7, 28])
def test_euler_s_method_equals_the_reference(n, double, monkeypatch):
    reference = scheduler_in(
        "flow_match_euler_discrete",
        "FlowMatchEulerDiscreteScheduler",
        monkeypatch if double else None,
        shift=3.0,
    )
    reference.set_timesteps(n)
    sampler = FlowSampler(shift=3.0)
    sampler.set_inference_timesteps(n)
    x = NOISE.double() if double else NOISE
    error = relative_error(ours(sampler, x), run(reference, x, reference.timesteps))
    assert error < (1e-12 if double else 1e-5)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 28])
def test_dpm_solver_equals_the_reference_on_the_same_timesteps(n, double, monkeypatch):
    reference = scheduler_in(
        "dpmsolver_multistep",
        "DPMSolverMultistepScheduler",
        monkeypatch if double else None,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=3.0,
    )
    sampler = FlowDPMPP2MSampler(shift=3.0)
    sampler.set_inference_timesteps(n)
    reference.set_timesteps(n)
    x = NOISE.double() if double else NOISE
    dtype = x.dtype
    # By itself it begins at 0.999, which is not quite all noise.
    reference.sigmas = torch.tensor(sampler.sigmas, dtype=dtype)
    reference.timesteps = sampler.timesteps.to(dtype)
    theirs = run(reference, x, reference.timesteps)
    assert relative_error(ours(sampler, x), theirs) < (1e-12 if double else 1e-4)


@pytest.mark.parametrize("strength", [0.01, 0.3, 0.55, 0.6, 0.999, 1.0])
@pytest.mark.parametrize("n", [4, 10, 28])
def test_a_strength_keeps_as_many_steps_as_the_reference(n, strength):
    pipeline = diffusers.StableDiffusion3Img2ImgPipeline
    reference = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    reference.set_timesteps(n)

    class Stub:
        scheduler = reference

    expected, _ = pipeline.get_timesteps(Stub(), n, strength, "cpu")
    for kind in FlowSampler, FlowDPMPP2MSampler:
        sampler = kind(shift=3.0)
        sampler.set_inference_timesteps(n)
        sampler.set_strength(strength)
        torch.testing.assert_close(sampler.timesteps.float(), expected, rtol=1e-5, atol=0)
        picture = torch.ones_like(NOISE)
        a = sampler.add_noise(picture, sampler.timesteps[0], NOISE)
        b = reference.scale_noise(picture, expected[:1], NOISE)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_twice_the_steps_leave_half_of_euler_s_error_and_a_quarter_of_dpm_solver_s():
    """On a flow with a known end: x₀ is drawn from N(1, ½²), for which the velocity is known exactly."""

    def velocity(x: Tensor, sigma: float) -> Tensor:
        variance = (1 - sigma) ** 2 / 4 + sigma**2
        return (x - (1 - sigma)) * (sigma - (1 - sigma) / 4) / variance - 1

    def error(kind: type[FlowSampler], n: int) -> float:
        sampler, x = kind(shift=3.0), NOISE.double()
        sampler.set_inference_timesteps(n)
        for t in sampler.timesteps:
            x = sampler.step(t, x, velocity(x, t.item() / 1000))
        return (x - (1 + NOISE.double() / 2)).abs().max().item()

    assert 0.45 < error(FlowSampler, 160) / error(FlowSampler, 80) < 0.55
    assert 0.15 < error(FlowDPMPP2MSampler, 160) / error(FlowDPMPP2MSampler, 80) < 0.25
    assert error(FlowDPMPP2MSampler, 160) < error(FlowSampler, 160) / 3
