"""Chapter 2: noise, and the forward process."""

import numpy as np
import torch

from reifusion.model.ddpm import DDPMSampler
from reifusion.train.text2image import loss_weights
from tests.equations.check import ALPHA_BAR, SINGLE, Pair, checks, normal


@checks("betas")
def scaled_linear_betas() -> Pair:
    first, last, T = 0.00085, 0.012, 1000
    t = np.arange(T)
    return DDPMSampler().betas, (np.sqrt(first) + t / (T - 1) * (np.sqrt(last) - np.sqrt(first))) ** 2


@checks("alphas-cumprod")
def products_of_alphas() -> Pair:
    sampler = DDPMSampler()
    alphas = 1 - sampler.betas.numpy()
    return sampler.alphas_cumprod, [np.prod(alphas[: t + 1]) for t in range(1000)]


@checks("forward")
def noised_latents() -> Pair:
    x0, noise, t = normal(3, 4, 2, 2), normal(3, 4, 2, 2, seed=1), np.array([0, 400, 999])
    ours = DDPMSampler().add_noise(torch.tensor(x0), torch.tensor(t), torch.tensor(noise))
    alpha_bar = ALPHA_BAR[t].reshape(3, 1, 1, 1)
    return ours, np.sqrt(alpha_bar) * x0 + np.sqrt(1 - alpha_bar) * noise


@checks("snr", SINGLE)
def signal_to_noise_ratio() -> Pair:
    # A bound below every ratio makes the weight bound / SNR. As logarithms, so that small ones count.
    weights = loss_weights(DDPMSampler(), torch.arange(1000), max_snr=1e-4)
    return np.log(1e-4 / weights.double().numpy()), np.log(ALPHA_BAR / (1 - ALPHA_BAR))
