"""Chapter 5: attention."""

import numpy as np
import torch

from reifusion.explain.words import Attention, Word
from reifusion.model.attention import CrossAttention, softmax_attention
from reifusion.model.request import Request
from tests.equations.check import SINGLE, Pair, checks, normal

Q, K, V = normal(1, 2, 6, 4), normal(1, 2, 6, 4, seed=1), normal(1, 2, 6, 4, seed=2)  # (B, heads, L, d)


def softmax(scores: np.ndarray) -> np.ndarray:
    return np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)


@checks("attention", SINGLE)  # the softmax is in float32
def weighted_mean_of_values() -> Pair:
    ours, _ = softmax_attention(torch.tensor(Q), torch.tensor(K), torch.tensor(V))
    return ours, softmax(Q @ K.swapaxes(-1, -2) / np.sqrt(4)) @ V


@checks("multi-head")
@torch.no_grad()
def heads_side_by_side() -> Pair:
    heads, width = 3, 12
    layer = CrossAttention(heads, width, context_width=5).double()
    x, y = normal(2, 7, width), normal(2, 4, 5, seed=1)
    W_q, W_kv, W_o, b = (
        w.numpy() for w in (layer.q.weight, layer.kv.weight, layer.out.weight, layer.out.bias)
    )
    W_k, W_v = np.split(W_kv, 2)
    each = []
    for i in range(heads):
        own = slice(i * width // heads, (i + 1) * width // heads)
        q, k, v = x @ W_q[own].T, y @ W_k[own].T, y @ W_v[own].T
        each.append(softmax(q @ k.swapaxes(-1, -2) / np.sqrt(width // heads)) @ v)
    return layer(torch.tensor(x), torch.tensor(y)), np.concatenate(each, axis=-1) @ W_o.T + b


@checks("causal-mask", SINGLE)  # the softmax is in float32
def no_weight_on_later_tokens() -> Pair:
    _, ours = softmax_attention(torch.tensor(Q), torch.tensor(K), torch.tensor(V), causal=True)
    scores = Q @ K.swapaxes(-1, -2) / np.sqrt(4)
    for i in range(6):
        scores[..., i, i + 1 :] = -np.inf
    return ours, softmax(scores)


def bicubic(size: int, to: int) -> np.ndarray:
    """(to, size): the weights of Keys's cubic with a = -¾, pixels being squares and the border repeated."""
    a, weights = -0.75, np.zeros((to, size))
    for i in range(to):
        at = (i + 0.5) * size / to - 0.5
        for k in range(int(np.floor(at)) - 1, int(np.floor(at)) + 3):
            d = abs(at - k)
            near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * (d**3 - 5 * d**2 + 8 * d - 4)
            weights[i, min(max(k, 0), size - 1)] += near if d <= 1 else far
    return weights


@checks("daam", SINGLE)  # maps are float16, and their mean is float32
def heat_of_a_word() -> Pair:
    grids, tokens, steps, heads = ((2, 3), (4, 6), (4, 6)), 4, 2, 3
    generator = np.random.default_rng(0)
    # Cubed: a few high values among low ones, where a bicubic curve undershoots 0.
    maps = [generator.random((steps, heads, tokens, *grid)).astype(np.float16) ** 3 for grid in grids]
    attention = Attention(
        request=Request("a b"),
        size=(24, 16),
        tokens=["start", "a", "b", "end"],
        words=[Word("a", (1,)), Word("b", (2,))],
        special=[],
        maps={f"layer {i}": torch.tensor(layer) for i, layer in enumerate(maps)},
    )
    total, count = np.zeros((16, 24)), 0
    for layer in maps:
        for one in layer[:, :, 2].astype(np.float64).reshape(steps * heads, *layer.shape[-2:]):
            total += bicubic(one.shape[0], 16) @ one @ bicubic(one.shape[1], 24).T
            count += 1
    return attention.heat(attention.words[1]), np.maximum(0, total / count)
