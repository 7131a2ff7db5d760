"""Noise from a Brownian path: torchsde's tree, and k-diffusion's samplers on it, written down anew."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from reifusion.model.pipeline import StableDiffusion
from reifusion.settings import Settings, parsed
from reifusion.steer.brownian import BrownianPath
from reifusion.steer.noises import Philox, Torch
from tests.tiny import SMALL, WORDS, networks

LOW, HIGH = 0.0292, 14.6146


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion:
    return StableDiffusion(SMALL, WORDS, networks(SMALL, noise=0.02))


@pytest.mark.parametrize(
    ("low", "begin", "end", "numbers"),
    [  # of k-diffusion's BrownianTreeNoiseSampler on a CPU
        (LOW, 14.6146, 5.0, [0.3299, 1.1199, 0.3427, 0.6610, -2.3319, -0.9514]),
        (LOW, 5.0, 2.0, [-0.0760, 1.3040, -0.8590, -0.8746, 0.7798, 0.0905]),
        (0.1, 14.6146, 5.0, [0.2704, 1.0478, 0.2392]),
    ],
)
def test_the_numbers_are_those_of_k_diffusion(low, begin, end, numbers):
    path = BrownianPath(low, HIGH, 0, (4, 2, 2), Torch)
    found = ((path(end) - path(begin)) / math.sqrt(begin - end)).flatten()[: len(numbers)]
    assert found.tolist() == pytest.approx(numbers, abs=1e-4)


@pytest.mark.parametrize("kind", [Torch, Philox])
def test_a_path_is_torchsdes_wherever_it_is_asked(kind, monkeypatch):
    tree = pytest.importorskip("torchsde", reason="the path's oracle: pip install torchsde")
    interval = tree._brownian.brownian_interval
    monkeypatch.setattr(interval, "_randn", lambda size, dtype, device, seed: kind(int(seed)).randn(size))
    draw = random.Random(0)
    for seed in (0, 7, 2**32 + 5):
        theirs = tree.BrownianTree(LOW, torch.zeros(2, 3, 5), HIGH, entropy=seed)
        ours = BrownianPath(LOW, HIGH, seed, (2, 3, 5), kind)
        for _ in range(15):
            a, b = sorted(draw.uniform(LOW, HIGH) for _ in range(2))
            assert torch.allclose((ours(b) - ours(a)).float(), theirs(a, b), atol=1e-5)
        assert torch.allclose(ours(HIGH).float(), theirs(LOW, HIGH), atol=1e-5)


def test_the_noise_of_a_path_is_normal_and_of_neighbours_independent():
    path = BrownianPath(LOW, HIGH, 3, (4, 64, 64), Torch)
    noises = [(path(b) - path(a)).flatten() / math.sqrt(a - b) for a, b in pairwise((14.6, 9.0, 2.5, 0.3))]
    for noise in noises:
        assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03
    assert abs((noises[0] * noises[1]).mean()) < 0.03 and abs((noises[1] * noises[2]).mean()) < 0.03


def single(sigma: float) -> float:
    return torch.tensor(sigma, dtype=torch.float32).item()


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("manner", ["a1111", "comfyui"])
@pytest.mark.parametrize("sampler", ["dpmpp_2m_sde", "dpmpp_2s_sde"])
def test_samplers_take_the_noise_of_each_step_from_the_path(pipe, sampler, manner, strength):
    """k-diffusion's loops, from the latents with which ours begins."""
    size, n = (40, 24), 4
    asked = parsed({"manner": manner}) | {"sampler": sampler, "schedule": "karras"}
    if strength < 1:
        from PIL import Image

        asked["init_image"] = Image.linear_gradient("L").resize(size).convert("RGB")
    settings = Settings("a cat", "a dog", steps=n, cfg=1.0, seed=9, size=size, strength=strength, **asked)
    seen: list[Any] = []
    try:
        request = settings.request()
    except ValueError:  # a name that means something else there
        pytest.skip("the program has another sampler of this name")
    settings.draw(pipe, request.for_model(pipe.config), callback=seen.append)
    sigmas = [*(step.sigma for step in seen if step.index % step_calls(sampler) == 0), 0.0]
    every = sigmas if manner == "comfyui" or strength == 1 else all_sigmas(n)
    kind = Philox if manner == "a1111" else Torch
    path = BrownianPath(single(every[-2]), single(every[0]), 9, (4, 12, 20), kind)

    def noise(begin: float, end: float) -> Tensor:
        begin, end = single(begin), single(end)
        return ((path(end) - path(begin)) / math.sqrt(begin - end)).float()[None]

    words, unet = pipe.encode_text(["a cat"]), pipe.models["diffusion"]

    def denoised(x: Tensor, step: Any) -> Tensor:
        with torch.inference_mode():
            t = torch.tensor([float(step.t)])
            return x - step.sigma * unet((x / (step.sigma**2 + 1) ** 0.5).float(), words, t)

    def ancestral(sigma: float, later: float) -> tuple[float, float]:
        up = min(later, (later**2 * (sigma**2 - later**2) / sigma**2) ** 0.5)
        return (later**2 - up**2) ** 0.5, up

    calls = iter(seen)
    x, old = seen[0].x_t, None
    for k, (sigma, later) in enumerate(pairwise(sigmas)):
        d = denoised(x, next(calls))
        if later == 0:
            x = d
        elif sampler == "dpmpp_2s_sde":
            middle = math.sqrt(sigma * later)
            down, up = ancestral(sigma, middle)
            x_2 = down / sigma * x + (1 - down / sigma) * d + noise(sigma, middle) * up
            d_2 = denoised(x_2, next(calls))
            down, up = ancestral(sigma, later)
            x = down / sigma * x + (1 - down / sigma) * d_2 + noise(sigma, later) * up
        else:
            h = math.log(sigma / later)
            next_x = later / sigma * math.exp(-h) * x - math.expm1(-2 * h) * d
            if old is not None:
                r = math.log(sigmas[k - 1] / sigma) / h
                next_x = next_x - 0.5 * math.expm1(-2 * h) / r * (d - old)
            x, old = next_x + noise(sigma, later) * later * math.sqrt(-math.expm1(-2 * h)), d
    torch.testing.assert_close(seen[-1].latents, x, rtol=1e-3, atol=2e-3 * x.abs().max().item())


def step_calls(sampler: str) -> int:
    return 2 if sampler == "dpmpp_2s_sde" else 1


def all_sigmas(n: int) -> list[float]:
    """Karras's of Stable Diffusion's training, and 0."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    bars = (1 - betas).cumprod(0)
    ends = [(((1 - bars[i]) / bars[i]) ** 0.5).item() ** (1 / 7) for i in (-1, 0)]
    return [(ends[0] + k / (n - 1) * (ends[1] - ends[0])) ** 7 for k in range(n)] + [0.0]
