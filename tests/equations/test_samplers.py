"""Chapter 9: samplers. Each gets random outputs of a network, and NumPy walks the same way."""

import math

import numpy as np
import torch

from reifusion.model.ddpm import Sampler
from reifusion.model.samplers import (
    DDIMSampler,
    DPMPP2MKarrasSampler,
    DPMPP2MSampler,
    DPMPPSDESampler,
    EulerAncestralSampler,
    EulerSampler,
    HeunSampler,
    LMSSampler,
    PNDMSampler,
)
from tests.equations.check import ALPHA_BAR, Pair, checks, normal

SHAPE, STEPS, SEED = (1, 4, 2, 2), 8, 5


def walk(sampler: Sampler) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns timesteps (n,), the network's outputs (n, …), and the latents around each step (n + 1, …)."""
    sampler.set_inference_timesteps(STEPS)
    times = sampler.timesteps.numpy()
    outputs, x = normal(len(times), *SHAPE), torch.tensor(normal(*SHAPE, seed=1))
    path = [x]
    for t, output in zip(times, outputs):
        x = sampler.step(int(t), x, torch.tensor(output))
        path.append(x)
    return times, outputs, torch.stack(path).numpy()


def noises() -> np.ndarray:
    """Returns the noise that a sampler with this seed draws, step by step: (n, …)"""
    generator = torch.Generator().manual_seed(SEED)
    return np.stack([torch.randn(SHAPE, generator=generator).double().numpy() for _ in range(STEPS)])


def sigmas_at(times: np.ndarray) -> np.ndarray:
    """(n,) -> (n + 1,), the last of them 0"""
    return np.append(np.sqrt((1 - ALPHA_BAR[times]) / ALPHA_BAR[times]), 0.0)


@checks("ddim")
def picture_and_noise_mixed_again() -> Pair:
    times, eps, path = walk(DDIMSampler())
    bars = np.append(ALPHA_BAR[times], ALPHA_BAR[0])
    expected = []
    for i, x in enumerate(path[:-1]):
        x0 = (x - np.sqrt(1 - bars[i]) * eps[i]) / np.sqrt(bars[i])
        expected.append(np.sqrt(bars[i + 1]) * x0 + np.sqrt(1 - bars[i + 1]) * eps[i])
    return path[1:], expected


@checks("sigma")
def noise_relative_to_the_picture() -> Pair:
    sampler = EulerSampler()  # with all timesteps
    return sampler.sigmas[:-1], np.sqrt((1 - ALPHA_BAR) / ALPHA_BAR)[::-1]


@checks("euler")
def euler_steps() -> Pair:
    times, eps, path = walk(EulerSampler())
    sigmas = sigmas_at(times)
    return path[1:], [path[i] + (sigmas[i + 1] - sigmas[i]) * eps[i] for i in range(STEPS)]


@checks("heun")
def mean_of_two_slopes() -> Pair:
    times, eps, path = walk(HeunSampler())  # two calls a step, but for the last step one
    sigmas = sigmas_at(np.append(times[0], times[1::2]))
    expected = []
    for i in range(STEPS - 1):
        slope = (eps[2 * i] + eps[2 * i + 1]) / 2
        expected.append(path[2 * i] + (sigmas[i + 1] - sigmas[i]) * slope)
    return path[2::2], expected


@checks("lms")
def polynomial_through_the_last_slopes() -> Pair:
    times, eps, path = walk(LMSSampler())
    sigmas, expected = sigmas_at(times), []
    for i in range(3, STEPS):  # from the first step with four slopes on
        x = path[i].copy()
        for j in range(4):
            others = [sigmas[i - k] for k in range(4) if k != j]
            lagrange = np.poly1d(others, r=True) / np.prod(sigmas[i - j] - np.array(others))
            integral = lagrange.integ()
            x += eps[i - j] * (integral(sigmas[i + 1]) - integral(sigmas[i]))
        expected.append(x)
    return path[4:], expected


@checks("plms")
def mean_of_the_last_four_outputs() -> Pair:
    times, eps, path = walk(PNDMSampler())
    eps = np.delete(eps, 1, axis=0)  # the second call only repeats the first step and is forgotten
    path, times = np.delete(path, 1, axis=0), np.delete(times, 1)
    bars = np.append(ALPHA_BAR[times], ALPHA_BAR[0])
    ours, expected = [], []
    for i in range(3, STEPS):
        # A DDIM step is linear in ε, so its result tells which ε it used.
        grown = np.sqrt(bars[i + 1] / bars[i])
        ours.append(
            (path[i + 1] - grown * path[i]) / (np.sqrt(1 - bars[i + 1]) - grown * np.sqrt(1 - bars[i]))
        )
        expected.append((55 * eps[i] - 59 * eps[i - 1] + 37 * eps[i - 2] - 9 * eps[i - 3]) / 24)
    return np.stack(ours), expected


def dpm_terms(times: np.ndarray, eps: np.ndarray, path: np.ndarray) -> tuple[np.ndarray, ...]:
    """Returns αᵢ, σᵢ (n + 1,), hᵢ and Dᵢ (n, …) of DPM-Solver++ 2M; the step to i + 1 has index i."""
    alphas, sigmas = (np.append(values, end) for values, end in (
        (np.sqrt(ALPHA_BAR[times]), 1.0), (np.sqrt(1 - ALPHA_BAR[times]), 0.0)))  # fmt: skip
    with np.errstate(divide="ignore"):
        h = np.diff(np.log(alphas / sigmas))  # the last is ∞
    x0 = [(x - s * e) / a for x, s, e, a in zip(path, sigmas, eps, alphas)]
    directions = [x0[0]]
    for i in range(1, STEPS - 1):
        r = h[i - 1] / h[i]
        directions.append((1 + 1 / (2 * r)) * x0[i] - 1 / (2 * r) * x0[i - 1])
    return alphas, sigmas, h, np.stack([*directions, x0[-1]])


@checks("dpmpp-2m")
def line_through_the_last_two_guesses() -> Pair:
    times, eps, path = walk(DPMPP2MSampler())
    alphas, sigmas, h, D = dpm_terms(times, eps, path)
    return path[1:], [
        sigmas[i + 1] / sigmas[i] * path[i] - alphas[i + 1] * (np.exp(-h[i]) - 1) * D[i] for i in range(STEPS)
    ]


@checks("dpmpp-sde")
def the_same_with_fresh_noise() -> Pair:
    times, eps, path = walk(DPMPPSDESampler(torch.Generator().manual_seed(SEED)))
    alphas, sigmas, h, D = dpm_terms(times, eps, path)
    z, expected = noises(), []
    for i in range(STEPS):
        x = (
            sigmas[i + 1] / sigmas[i] * np.exp(-h[i]) * path[i]
            + alphas[i + 1] * (1 - np.exp(-2 * h[i])) * D[i]
        )
        expected.append(x + sigmas[i + 1] * np.sqrt(1 - np.exp(-2 * h[i])) * z[i])
    return path[1:], expected


@checks("karras-sigmas")
def small_steps_at_the_end() -> Pair:
    sampler, n, rho = DPMPP2MKarrasSampler(), 20, 7
    sampler.set_inference_timesteps(n)
    low, high = (math.sqrt((1 - bar) / bar) for bar in (ALPHA_BAR[0], ALPHA_BAR[-1]))
    i = np.arange(n)
    expected = (high ** (1 / rho) + i / (n - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    return sampler.sigmas[:-1], expected


@checks("ancestral")
def less_noise_than_planned_then_fresh() -> Pair:
    times, eps, path = walk(EulerAncestralSampler(torch.Generator().manual_seed(SEED)))
    sigmas, z, expected = sigmas_at(times), noises(), []
    for i in range(STEPS):
        now, then = sigmas[i], sigmas[i + 1]
        up = then * np.sqrt((now**2 - then**2) / now**2)
        down = np.sqrt(then**2 - up**2)
        expected.append(path[i] + (down - now) * eps[i] + up * z[i])
    return path[1:], expected
