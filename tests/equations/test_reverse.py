"""Chapter 3: the reverse step."""

from unittest.mock import patch

import numpy as np
import torch

from reifusion.model.ddpm import DDPMSampler
from tests.equations.check import ALPHA_BAR, BETAS, Pair, checks, normal

X, X0, EPS = normal(1, 4, 2, 2), normal(1, 4, 2, 2, seed=1), normal(1, 4, 2, 2, seed=2)


def ddpm_step(t: int, x: np.ndarray, eps: np.ndarray, z: np.ndarray, steps: int = 1000) -> np.ndarray:
    """Takes our step, with z as the noise that it draws."""
    sampler = DDPMSampler()
    sampler.set_inference_timesteps(steps)
    with patch.object(DDPMSampler, "_noise", return_value=torch.tensor(z)):
        return sampler.step(t, torch.tensor(x), torch.tensor(eps)).numpy()


@checks("posterior-variance")
def variance_of_the_reverse_step() -> Pair:
    times = np.array([999, 500, 50, 1])
    # A step with noise 1 ends further than a step with noise 0, by the standard deviation.
    z = np.ones_like(X)
    ours = [(ddpm_step(t, X, EPS, z) - ddpm_step(t, X, EPS, 0 * z)).mean() ** 2 for t in times]
    return ours, (1 - ALPHA_BAR[times - 1]) / (1 - ALPHA_BAR[times]) * BETAS[times]


@checks("posterior-mean")
def mean_of_the_reverse_step() -> Pair:
    t, before = 501, 481  # two of 50 timesteps: α is the product of those between
    bar, bar_before = ALPHA_BAR[t], ALPHA_BAR[before]
    alpha = np.prod(1 - BETAS[before + 1 : t + 1])
    eps = (X - np.sqrt(bar) * X0) / np.sqrt(1 - bar)  # which says that the picture is x₀
    mean = np.sqrt(bar_before) * (1 - alpha) / (1 - bar) * X0
    mean = mean + np.sqrt(alpha) * (1 - bar_before) / (1 - bar) * X
    return ddpm_step(t, X, eps, np.zeros_like(X), steps=50), mean


@checks("reverse-step")
def reverse_step_as_usually_quoted() -> Pair:
    t, z = 300, normal(1, 4, 2, 2, seed=3)
    mean = (X - BETAS[t] / np.sqrt(1 - ALPHA_BAR[t]) * EPS) / np.sqrt(1 - BETAS[t])
    variance = (1 - ALPHA_BAR[t - 1]) / (1 - ALPHA_BAR[t]) * BETAS[t]
    return ddpm_step(t, X, EPS, z), mean + np.sqrt(variance) * z


@checks("x0-from-eps")
def picture_from_noise() -> Pair:
    t = 800
    x0, _ = DDPMSampler().predict(t, torch.tensor(X), torch.tensor(EPS))
    return x0, (X - np.sqrt(1 - ALPHA_BAR[t]) * EPS) / np.sqrt(ALPHA_BAR[t])


@checks("velocity")
def velocity() -> Pair:
    t = 600
    ours = DDPMSampler().velocity(torch.tensor(X0), t, torch.tensor(EPS))
    return ours, np.sqrt(ALPHA_BAR[t]) * EPS - np.sqrt(1 - ALPHA_BAR[t]) * X0


@checks("x0-from-v")
def picture_and_noise_from_velocity() -> Pair:
    t, v = 700, normal(1, 4, 2, 2, seed=4)
    both = DDPMSampler(prediction_type="v_prediction").predict(t, torch.tensor(X), torch.tensor(v))
    alpha, sigma = np.sqrt(ALPHA_BAR[t]), np.sqrt(1 - ALPHA_BAR[t])
    return torch.stack(both), np.stack([alpha * X - sigma * v, sigma * X + alpha * v])
