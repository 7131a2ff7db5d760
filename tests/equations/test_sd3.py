"""The chapter on Stable Diffusion 3: joint attention, modulation, T5, shifted flow."""

import math

import numpy as np
import torch

from reifusion.families.flow_solver import FlowDPMPP2MSampler
from reifusion.families.mmdit import JointAttention, MMDiTConfig, Queries, modulated
from reifusion.families.t5 import BiasedAttention, T5Config, bucket
from reifusion.families.unigram import Unigram
from reifusion.model.flow import shifted
from tests.equations.check import SINGLE, Pair, checks, normal
from tests.equations.test_attention import softmax

CONFIG = MMDiTConfig(heads=3, width=12, qk_norm=True)
T5 = T5Config(width=6, heads=2, head_width=5)


def own_norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight


@checks("rms-norm")
@torch.no_grad()
def divided_by_the_root_of_the_mean_square() -> Pair:
    queries, x, weight = Queries(CONFIG).double(), normal(2, 5, 12), normal(4, seed=1)
    queries.norm_q.weight.copy_(torch.tensor(weight))
    W, b = queries.qkv.weight[:12].numpy(), queries.qkv.bias[:12].numpy()
    q = (x @ W.T + b).reshape(2, 5, 3, 4)
    return queries(torch.tensor(x))[0], own_norm(q, weight).swapaxes(1, 2)


@checks("joint-attention", SINGLE)  # the kernel's softmax may be in float32
@torch.no_grad()
def one_attention_over_two_streams() -> Pair:
    streams = [Queries(CONFIG).double(), Queries(CONFIG).double()]
    inputs = [normal(2, 5, 12), normal(2, 3, 12, seed=1)]
    ours = JointAttention()(*((queries, torch.tensor(x)) for queries, x in zip(streams, inputs)))
    one = np.ones(4)
    parts = []
    for queries, x in zip(streams, inputs):
        qkv = x @ queries.qkv.weight.numpy().T + queries.qkv.bias.numpy()
        q, k, v = (part.reshape(2, -1, 3, 4) for part in np.split(qkv, 3, axis=-1))
        parts.append((own_norm(q, one), own_norm(k, one), v))
    q, k, v = (np.concatenate(each, axis=1).swapaxes(1, 2) for each in zip(*parts))
    seen = softmax(q @ k.swapaxes(-1, -2) / np.sqrt(4)) @ v  # (2, 3, 8, 4)
    seen = seen.swapaxes(1, 2).reshape(2, 8, 12)
    expected = [
        part @ queries.out.weight.numpy().T + queries.out.bias.numpy()
        for queries, part in zip(streams, np.split(seen, [5], axis=1))
    ]
    return torch.cat(ours, dim=1), np.concatenate(expected, axis=1)


@checks("adaln")
def shifted_and_scaled() -> Pair:
    x, shift, scale = normal(2, 5, 6), normal(2, 1, 6, seed=1), normal(2, 1, 6, seed=2)
    return modulated(*map(torch.tensor, (x, shift, scale))), (1 + scale) * x + shift


@checks("t5-buckets")
def classes_of_distances() -> Pair:
    expected = []
    for distance in range(-200, 201):
        steps = abs(distance)
        if steps >= 8:
            steps = min(15, 8 + math.floor(math.log(steps / 8) / math.log(128 / 8) * 8 + 1e-9))
        expected.append(steps + (16 if distance > 0 else 0))
    return bucket(torch.arange(-200, 201), T5), np.array(expected)


@checks("t5-attention")
@torch.no_grad()
def biased_and_not_scaled() -> Pair:
    layer, x, bias = BiasedAttention(T5).double(), normal(2, 4, 6), normal(2, 4, 4, seed=1)
    qkv = (x @ layer.qkv.weight.numpy().T).reshape(2, 4, 3, 2, 5)
    q, k, v = (qkv[:, :, i].swapaxes(1, 2) for i in range(3))  # (2, heads, 4, 5)
    seen = softmax(q @ k.swapaxes(-1, -2) + bias) @ v
    return layer(*map(torch.tensor, (x, bias))), seen.swapaxes(1, 2).reshape(
        2, 4, 10
    ) @ layer.out.weight.numpy().T


@checks("unigram")
def best_of_all_ways_to_cut() -> Pair:
    texts, generator = (
        ("▁", "a", "b", "ab", "ba", "▁a", "aab", "bab", "▁ab", "abba"),
        np.random.default_rng(0),
    )
    pieces = [("</s>", 0.0), ("<unk>", 0.0), *((text, -9 * generator.random()) for text in texts)]
    score, tokenizer = dict(pieces), Unigram(pieces)

    def ways(text: str) -> list[list[str]]:
        """All ways to cut a text into pieces."""
        heads = [i for i in range(1, len(text) + 1) if text[:i] in texts]
        return [[text[:i], *rest] for i in heads for rest in ways(text[i:])] if text else [[]]

    ours, expected = [], []
    for word in "abbab", "aabba", "bbb", "abababba":
        ids = tokenizer.encode(word)
        ours.append(sum(pieces[i][1] for i in ids[: ids.index(0)]))
        expected.append(max(sum(score[piece] for piece in way) for way in ways("▁" + word)))
    return np.array(ours), np.array(expected)


@checks("flow-shift")
def as_far_into_the_noise_as_with_more_pixels() -> Pair:
    # Esser et al. 2024, §5.3.2: of n equal pixels, the mean is known to within σ / (1 - σ) / √n. The shift
    # keeps that as it was, for m = s² n pixels.
    sigma, s = np.linspace(0.01, 0.99, 9), 3.0
    spread = s * sigma / (1 - sigma)
    return shifted(torch.tensor(sigma), s), spread / (1 + spread)


@checks("flow-dpmpp-2m")
def straight_line_in_lambda() -> Pair:
    sampler = FlowDPMPP2MSampler(shift=2.0)
    sampler.set_inference_timesteps(5)
    x0s = normal(5, 3)
    ours, expected = [x := torch.tensor(normal(3, seed=1))], [x.numpy()]
    sigmas = [*(sampler.timesteps.numpy() / 1000), 0.0]
    lambdas = [np.inf if s == 0 else -np.inf if s == 1 else np.log((1 - s) / s) for s in sigmas]
    for i, t in enumerate(sampler.timesteps):
        v = (expected[-1] - x0s[i]) / sigmas[i]  # of which the sampler makes this x₀ again
        ours.append(sampler.step(t, torch.tensor(expected[-1]), torch.tensor(v)))
        direction = x0s[i]
        if 1 < i < 4:  # the line through the last two, halfway through the step
            slope = (x0s[i] - x0s[i - 1]) / (lambdas[i] - lambdas[i - 1])
            direction = x0s[i] + slope * (lambdas[i + 1] - lambdas[i]) / 2
        ratio = sigmas[i + 1] / sigmas[i]
        keep = np.exp(lambdas[i] - lambdas[i + 1])  # e⁻ʰ
        expected.append(ratio * expected[-1] + (1 - sigmas[i + 1]) * (1 - keep) * direction)
    return torch.stack(ours), np.array(expected)
