"""Chapter 10: training."""

import tempfile
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import nn

from reifusion.model.ddpm import DDPMSampler
from reifusion.train.loop import LoopConfig, train
from reifusion.train.lora import lora_beside
from reifusion.train.muon import orthogonalise
from reifusion.train.text2image import add_offset, denoising_loss, loss_weights
from reifusion.weights.lora import Place
from tests.equations.check import ALPHA_BAR, SINGLE, Pair, checks, normal


@checks("ema")
def moving_average_of_the_weights() -> Pair:
    steps, decay = 6, 0.3  # low enough to be reached
    model, history = nn.Linear(3, 1, bias=False).double(), []

    def objective(network, step, generator, part):
        history.append(model.weight.detach().numpy().copy())
        return network(torch.ones(1, 3, dtype=torch.float64)).square().sum(), {"samples": 1.0}

    config = LoopConfig(steps=steps, lr=0.1, warmup=0, ema=decay, mixed_precision="no")
    with tempfile.TemporaryDirectory() as folder:
        ours = train(model, objective, config, Path(folder))["weight"]
    history.append(model.weight.detach().numpy())
    average = history[0]
    for n in range(steps):
        gamma = min(decay, (1 + n) / (10 + n))
        average = gamma * average + (1 - gamma) * history[n + 1]
    return ours, average


@checks("ddpm-loss")
def weighted_squared_error() -> Pair:
    x0, noise, t, w = (
        normal(3, 4, 2, 2),
        normal(3, 4, 2, 2, seed=1),
        np.array([10, 400, 990]),
        np.array([0.2, 1.0, 0.5]),
    )
    sampler = DDPMSampler(prediction_type="v_prediction")
    inputs = (torch.tensor(x) for x in (x0, np.zeros((3, 8), int), t, noise, w))
    ours, _ = denoising_loss(lambda x_t, tokens, t: x_t.sin(), sampler, *inputs)
    alpha, sigma = (np.sqrt(x[t]).reshape(3, 1, 1, 1) for x in (ALPHA_BAR, 1 - ALPHA_BAR))
    error = np.sin(alpha * x0 + sigma * noise) - (alpha * noise - sigma * x0)
    return ours, np.mean([w[i] * (error[i] ** 2).sum() / error[i].size for i in range(3)])


@checks("min-snr", SINGLE)  # the weights are float32
def capped_weights() -> Pair:
    gamma, t = 5.0, torch.arange(1000)
    ours = [loss_weights(DDPMSampler(prediction_type=p), t, gamma) for p in ("epsilon", "v_prediction")]
    # How much an error of 1 in x₀ counts in each loss: the square of what it changes in ε and in v, for the
    # same x_t = a x₀ + s ε. With the weights, no timestep may count for more than γ, and no other is changed.
    a, s = np.sqrt(ALPHA_BAR), np.sqrt(1 - ALPHA_BAR)
    by_eps = a / s
    by_v = a * by_eps + s  # v = a ε - s x₀
    counts = [np.minimum(natural, gamma) for natural in (by_eps**2, by_v**2)]
    return torch.cat(ours), np.concatenate([counts[0] / by_eps**2, counts[1] / by_v**2])


@checks("offset-noise", SINGLE)  # the noise is float32
def noise_that_is_the_same_at_every_pixel() -> Pair:
    noise, weight = normal(2, 4, 3, 3).astype(np.float32), 0.1
    ours = add_offset(torch.tensor(noise), weight, torch.Generator().manual_seed(0))
    n = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)).double().numpy()
    return ours, noise + weight * n[:, :, None, None]


@checks("zero-snr")
def nothing_is_left_at_the_end() -> Pair:
    ours = DDPMSampler(prediction_type="v_prediction", zero_terminal_snr=True).alphas_cumprod.sqrt()
    root = np.sqrt(ALPHA_BAR)
    return ours, (root - root[-1]) * root[0] / (root[0] - root[-1])


@checks("newton-schulz")
def singular_values_near_one() -> Pair:
    a, b, c = 3.4445, -4.7750, 2.0315
    matrix = normal(5, 3)
    with patch.object(torch.Tensor, "bfloat16", torch.Tensor.double):  # the same line without its rounding
        ours = orthogonalise(torch.tensor(matrix))
    x = matrix.T / (np.linalg.norm(matrix) + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = a * x + b * square @ x + c * square @ square @ x
    return ours, x.T


@checks("lora")
def layer_with_a_thin_difference() -> Pair:
    base, rank, alpha = nn.Linear(6, 4, bias=False), 2, 3.0
    place = Place("diffusion", "layer", part=0, parts=1, diffusers="", compvis="")
    layer = lora_beside(base, [place], rank, alpha, dropout=0.0).double()
    A, B, x = normal(rank, 6), normal(4, rank, seed=1), normal(2, 5, 6, seed=2)
    layer.down[0].data, layer.up[0].data = torch.tensor(A), torch.tensor(B)
    W = layer.weight.detach().numpy()
    return layer(torch.tensor(x)), x @ W.T + alpha / rank * x @ A.T @ B.T
