"""Chapter 7: the VAE."""

from unittest.mock import patch

import numpy as np
import torch

from reifusion.model.config import VAEConfig
from reifusion.model.encoder import Encoder, ResidualBlock, scale_latents
from reifusion.train import critic as critics
from reifusion.train.vae import kl
from tests.equations.check import Pair, checks, normal

MEAN, LOG_VARIANCE = normal(2, 4, 3, 3), 2 * normal(2, 4, 3, 3, seed=1)
TINY = VAEConfig(channels=(8, 8), layers=1, groups=4, scale_factor=1.0)


@checks("reparameterisation")
def sample_of_the_latents() -> Pair:
    encoder, noise = Encoder(TINY), normal(2, 4, 3, 3, seed=2)
    with patch.object(encoder, "moments", return_value=(torch.tensor(MEAN), torch.tensor(LOG_VARIANCE))):
        ours = encoder(torch.zeros(2, 3, 6, 6), torch.tensor(noise))
    return ours, MEAN + np.sqrt(np.exp(LOG_VARIANCE)) * noise


@checks("kl")
def divergence_from_the_standard_normal() -> Pair:
    each = -0.5 * (1 + LOG_VARIANCE - MEAN**2 - np.exp(LOG_VARIANCE))
    return kl(torch.tensor(MEAN), torch.tensor(LOG_VARIANCE)), each.mean()


@checks("scale-factor")
def scaled_latents() -> Pair:
    return scale_latents(torch.tensor(MEAN), VAEConfig()), 0.18215 * MEAN


@checks("group-norm")
def norm_of_the_vae() -> Pair:
    groups, channels = 2, 6
    layer = ResidualBlock(channels, channels, groups).norm_1.double()
    gamma, beta = normal(channels), normal(channels, seed=1)
    layer.weight.data, layer.bias.data = torch.tensor(gamma), torch.tensor(beta)
    x = 1e-3 * normal(2, channels, 4, 4, seed=2)  # as small as √ε, so that ε counts
    y = np.empty_like(x)
    for image in range(2):
        for own in (slice(0, 3), slice(3, 6)):
            part = x[image, own]
            y[image, own] = (part - part.mean()) / np.sqrt(part.var() + 1e-6)
    return layer(torch.tensor(x)), gamma[:, None, None] * y + beta[:, None, None]


@checks("critic")
def real_against_reconstructed() -> Pair:
    torch.manual_seed(0)
    critic = critics.Critic(channels=(4, 4)).double()
    real, made = torch.tensor(normal(2, 3, 16, 16)), torch.tensor(normal(2, 3, 16, 16, seed=1))
    ours, _ = critics.judge(critic, real, made, r1=0.0)
    d_real, d_made = (critic(x)[-1].detach().numpy() for x in (real, made))
    return ours, -np.log(1 / (1 + np.exp(d_made - d_real))).mean()
