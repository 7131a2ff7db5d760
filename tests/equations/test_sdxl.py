"""The chapter on SDXL: the whole text's vector, sizes as waves, and how both reach the U-Net."""

import numpy as np
import torch

from reifusion.families.pooled_text import TextEncoder
from reifusion.families.sdxl_unet import ToldTimeEmbedding, tell
from reifusion.model.config import CLIPConfig
from tests.equations.check import SINGLE, Pair, checks, normal


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def waves(numbers: np.ndarray, width: int) -> np.ndarray:
    half = width // 2
    angles = numbers[..., None] * 10_000.0 ** (-np.arange(half) / half)
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)


@checks("pooled-text")
@torch.no_grad()
def the_end_of_the_text_has_seen_all_of_it() -> Pair:
    torch.manual_seed(0)
    clip = TextEncoder(CLIPConfig(20, 6, 8, layers=2, heads=2, activation="gelu"), pooled=5).double()
    clip.norm.weight.uniform_(0.5, 1.5)
    tokens, ends = torch.tensor([[1, 5, 6, 19, 0, 0], [1, 7, 19, 0, 0, 0]]), torch.tensor([3, 2])
    h = clip.embedding(tokens)
    for layer in clip.layers:
        h = layer(h)
    end = np.stack([h[0, 3].numpy(), h[1, 2].numpy()])
    mean, variance = end.mean(-1, keepdims=True), end.var(-1, keepdims=True)
    normed = (end - mean) / np.sqrt(variance + 1e-5) * clip.norm.weight.numpy() + clip.norm.bias.numpy()
    assert clip.projection is not None
    return clip.both(tokens, ends)[1], normed @ clip.projection.weight.numpy().T


@checks("size-waves", SINGLE)
def each_number_becomes_waves() -> Pair:
    pooled, numbers = normal(2, 5), np.array([[1024.0, 768, 0, 64, 512, 640], [96, 1000, 8, 0, 88, 2056]])
    expected = np.concatenate([pooled, *(waves(numbers[:, i], 8) for i in range(6))], axis=-1)
    return tell(torch.tensor(pooled), torch.tensor(numbers), 8), expected


@checks("told")
@torch.no_grad()
def what_is_told_is_added_to_the_time() -> Pair:
    network, told, t = ToldTimeEmbedding(8, 5).double(), normal(2, 5), np.array([7.0, 801.0])

    def two(first: torch.nn.Linear, second: torch.nn.Linear, x: np.ndarray) -> np.ndarray:
        h = silu(x @ first.weight.numpy().T + first.bias.numpy())
        return h @ second.weight.numpy().T + second.bias.numpy()

    expected = two(network.linear_1, network.linear_2, waves(t, 8))
    expected = expected + two(network.label_1, network.label_2, told)
    return network(torch.tensor(t), torch.tensor(told)), expected
