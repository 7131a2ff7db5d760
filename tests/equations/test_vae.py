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


CRITIC = critics.Critic(channels=(4, 4)).double()
REAL, MADE = torch.tensor(normal(2, 3, 16, 16)), torch.tensor(normal(2, 3, 16, 16, seed=1))


def of_the_critic(pictures: torch.Tensor) -> list[np.ndarray]:
    """Returns the critic's features, layer by layer, and its scores."""
    return [x.detach().numpy() for x in CRITIC(pictures)]


@checks("critic")
def real_against_reconstructed() -> Pair:
    ours, _ = critics.judge(CRITIC, REAL, MADE, r1=0.0)
    d_real, d_made = (of_the_critic(x)[-1] for x in (REAL, MADE))
    return ours, -np.log(1 / (1 + np.exp(d_made - d_real))).mean()


@checks("fooling")
def reconstructed_against_real() -> Pair:
    ours, _ = critics.fool(CRITIC, REAL, MADE)
    d_real, d_made = (of_the_critic(x)[-1] for x in (REAL, MADE))
    return ours, -np.log(1 / (1 + np.exp(d_real - d_made))).mean()


@checks("matching")
def distance_of_features() -> Pair:
    _, ours = critics.fool(CRITIC, REAL, MADE)
    layers = zip(of_the_critic(REAL)[:-1], of_the_critic(MADE)[:-1], strict=True)
    return ours, np.mean([np.abs(a - b).sum() / a.size for a, b in layers])


@checks("steepness")
def slope_of_a_critic_of_one_layer() -> Pair:
    plain = critics.Critic(channels=()).double()
    with_penalty, without = (critics.judge(plain, REAL, MADE, r1=r1)[0] for r1 in (0.3, 0.0))
    kernel, size = plain.score.weight.detach().numpy()[0], REAL.shape[-1]  # (3, 3, 3)
    slope = np.zeros((3, size, size))  # of the sum of all scores, for each number of the picture
    for row in range(3):
        for column in range(3):  # pixels that the kernel's number there meets
            rows, columns = (slice(max(0, k - 1), min(size, size + k - 1)) for k in (row, column))
            slope[:, rows, columns] += kernel[:, row, column, None, None]
    return with_penalty - without, 0.3 / 2 * (slope**2).sum() / size**2
