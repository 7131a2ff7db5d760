"""Chapter 8: guidance."""

from typing import Any

import numpy as np
import torch

from reifusion.model.config import CLIPConfig, ModelConfig, UNetConfig, VAEConfig
from reifusion.model.pipeline import StableDiffusion
from reifusion.model.samplers import EulerSampler
from tests.equations.check import ALPHA_BAR, Pair, checks, normal
from tests.tiny import Bytes, networks

TINY = ModelConfig(
    name="tiny",
    size=16,
    clip=CLIPConfig(vocab_size=256, context_length=8, width=16, layers=1, heads=2),
    vae=VAEConfig(channels=(8, 8), layers=1, groups=4),
    unet=UNetConfig(channels=(16, 32), attention=(1, 1), layers=1, heads=(2, 2), context_width=16, groups=8),
)


@checks("guidance", 1e-5)  # the network is in float32, and a batch of two rounds otherwise than one
def guided_noise() -> Pair:
    models = networks(TINY)
    for parameter in models["clip"].parameters():  # fresh embeddings are too similar to tell prompts apart
        parameter.data += 0.2 * torch.randn_like(parameter)
    pipe = StableDiffusion(TINY, Bytes(), models)
    settings: dict[str, Any] = {"seed": 1, "sampler": "ddim", "steps": 3}
    ours = next(iter(pipe.denoise("a cat", "a dog", cfg=7.5, **settings))).eps
    cond, uncond = (  # from passes of one prompt each, where nothing can be swapped
        next(iter(pipe.denoise(text, cfg=1.0, **settings))).eps.double().numpy()
        for text in ("a cat", "a dog")
    )
    return ours, uncond + 7.5 * (cond - uncond)


@checks("score")
def noise_is_the_slope_of_the_density() -> Pair:
    # Pictures are Gaussian numbers with mean m and variance s². With noise they are still Gaussian, with
    # a density whose slope is known, and the best answer to "what was added?" is known too.
    m, s, t = 0.7, 0.6, 400
    alpha, sigma = np.sqrt(ALPHA_BAR[t]), np.sqrt(1 - ALPHA_BAR[t])
    x = normal(1, 4, 2, 2)
    variance = alpha**2 * s**2 + sigma**2
    best_x0 = m + alpha * s**2 / variance * (x - alpha * m)  # E[x₀ | x]
    v = (alpha * x - best_x0) / sigma  # the same answer, as a velocity
    sampler = EulerSampler(prediction_type="v_prediction")
    before, after = sampler.sigmas[999 - t : 1001 - t]
    scaled = torch.tensor(x / alpha)  # Euler's scaling
    slope = (sampler.step(t, scaled, torch.tensor(v)) - scaled) / (after - before)  # ε
    return -slope / sigma, -(x - alpha * m) / variance
