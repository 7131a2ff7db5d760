"""Chapter 4: the network that predicts noise."""

import math

import numpy as np
import torch
from torch import nn

from reifusion.model.diffusion import GEGLU, Given, ResidualBlock, sinusoids
from tests.equations.check import Pair, checks, normal


def parameters(network: nn.Module) -> dict[str, np.ndarray]:
    """Gives a network random weights in float64, and returns them."""
    network.double()
    for seed, parameter in enumerate(network.parameters()):
        parameter.data = torch.tensor(normal(*parameter.shape, seed=seed))
    return {name: parameter.detach().numpy() for name, parameter in network.named_parameters()}


def conv(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """(B, in, H, W) and (out, in, k, k) -> (B, out, H, W), zeros around"""
    side, (height, width) = weight.shape[-1], x.shape[-2:]
    around = side // 2
    x = np.pad(x, ((0, 0), (0, 0), (around, around), (around, around)))
    y = np.zeros((len(x), len(weight), height, width)) + bias[:, None, None]
    for i in range(side):
        for j in range(side):
            y += np.einsum("oi,bihw->bohw", weight[:, :, i, j], x[:, :, i : i + height, j : j + width])
    return y


def norm(x: np.ndarray, groups: int, weight: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    """γ (x - E[x]) / √(Var[x] + ε) + β: (B, C, H, W), mean and variance over a group of channels"""
    grouped = x.reshape(len(x), groups, -1)
    grouped = grouped - grouped.mean(-1, keepdims=True)
    grouped = grouped / np.sqrt((grouped**2).mean(-1, keepdims=True) + eps)
    return weight[:, None, None] * grouped.reshape(x.shape) + bias[:, None, None]


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def given(time: torch.Tensor) -> Given:
    return Given(time, context=torch.empty(0))


@checks("time-embedding", within=1e-4)  # float32: an angle of 999 has an error of 3e-5
def waves_of_the_time() -> Pair:
    t, half = np.arange(1000), 160
    angles = t[:, None] * 10000.0 ** (-np.arange(half) / half)
    return sinusoids(torch.tensor(t), 2 * half), np.concatenate([np.cos(angles), np.sin(angles)], axis=1)


@checks("residual-block")
def residual_block() -> Pair:
    block = ResidualBlock(4, 8, time_width=6, groups=2)
    x, time, p = normal(2, 4, 5, 3), normal(2, 6, seed=1), parameters(block)
    h = norm(x, 2, p["norm_1.weight"], p["norm_1.bias"], eps=1e-5)
    h = conv(h * sigmoid(h), p["conv_1.weight"], p["conv_1.bias"])
    h = h + ((time * sigmoid(time)) @ p["time.weight"].T + p["time.bias"])[:, :, None, None]
    h = norm(h, 2, p["norm_2.weight"], p["norm_2.bias"], eps=1e-5)
    h = conv(h * sigmoid(h), p["conv_2.weight"], p["conv_2.bias"])
    return block(torch.tensor(x), given(torch.tensor(time))), conv(x, p["skip.weight"], p["skip.bias"]) + h


@checks("silu")
def silu_before_the_convolution() -> Pair:
    block = ResidualBlock(4, 4, time_width=6, groups=2).double()
    block.norm_1 = nn.Identity()  # type: ignore[assignment]
    seen = []
    block.conv_1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = 4 * normal(2, 4, 5, 3)
    block(torch.tensor(x), given(torch.zeros(2, 6, dtype=torch.float64)))
    return seen[0], x / (1 + np.exp(-x))


@checks("geglu")
def gated_feed_forward() -> Pair:
    layer, x = GEGLU(4), normal(2, 3, 4)
    layer.linear_2 = nn.Identity()  # type: ignore[assignment]
    p = parameters(layer)
    (W, V), (b, c) = np.split(p["linear_1.weight"].T, 2, axis=1), np.split(p["linear_1.bias"], 2)
    gate = x @ V + c
    gelu = gate * (1 + np.vectorize(math.erf)(gate / math.sqrt(2))) / 2
    return layer(torch.tensor(x)), (x @ W + b) * gelu
