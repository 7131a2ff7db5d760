"""Chapter 6: words."""

import numpy as np
import torch

from bench import judge
from reifusion.model.clip import CLIPEmbedding, quick_gelu
from reifusion.model.config import CLIPConfig
from tests.equations.check import Pair, checks, normal


@checks("token-embedding")
def what_and_where() -> Pair:
    embedding = CLIPEmbedding(CLIPConfig(vocab_size=20, context_length=8, width=6)).double()
    E, P, tokens = normal(20, 6), normal(8, 6, seed=1), np.array([[3, 3, 19, 0, 7]])
    embedding.token.weight.data, embedding.position.data = torch.tensor(E), torch.tensor(P)
    return embedding(torch.tensor(tokens)), E[tokens] + P[:5]


@checks("quick-gelu")
def approximated_gelu() -> Pair:
    x = np.linspace(-8, 8, 101)
    return quick_gelu(torch.tensor(x)), x / (1 + np.exp(-1.702 * x))


@checks("infonce")
def pictures_and_captions() -> Pair:
    n, temperature = 5, 0.2
    u, w = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (normal(n, 8), normal(n, 8, seed=1)))
    value, _ = judge.contrastive_loss(torch.tensor(u / temperature), torch.tensor(w))
    e = np.exp(u @ w.T / temperature)  # e[i, j]: picture i, caption j
    terms = [np.log(e[i, i] / e[i].sum()) + np.log(e[i, i] / e[:, i].sum()) for i in range(n)]
    return value, -sum(terms) / (2 * n)
