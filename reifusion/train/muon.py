"""Muon, an optimizer for weight matrices, to be used beside AdamW for all other weights.

A gradient's matrix has a few large singular values and many small ones, so a step along it moves the weights
in only a few directions. Muon first makes all singular values 1: a step then moves equally in all directions.
Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; for the size of a step,
Liu et al. 2025, "Muon is scalable for LLM training", Eq. 4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def orthogonalise(matrices: Tensor, iterations: int = 5) -> Tensor:
    """(…, M, N), each UΣVᵀ -> nearly UVᵀ: singular values between about 0.7 and 1.2. Computed in bf16.

    Newton–Schulz: x ← ax + b(xxᵀ)x + c(xxᵀ)²x keeps U and V and takes every singular value σ to
    aσ + bσ³ + cσ⁵; with these a, b, c, five rounds bring it near 1. Source: Jordan et al. 2024.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x.reshape(-1, *x.shape[-2:])  # wide, so that xxᵀ is the smaller square
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # every σ ≤ 1, where the iteration converges
    for _ in range(iterations):
        square = x @ x.mT
        # baddbmm(y, a, b) is β·y + α·(a @ b) in one call: it rounds less often and is a fifth faster.
        # [newton-schulz] Jordan et al. 2024: x ← ax + b(xxᵀ)x + c(xxᵀ)²x
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(matrices.shape).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """One step: m ← μm + g;  W ← (1 − lr·decay)W − lr·0.2·√max(M, N)·orthogonalise(g + μm).

    The factor 0.2·√max(M, N) makes a step as large as one of AdamW, so both use the same learning rate. The
    kernel (out, in, h, w) of a convolution is treated as the matrix (out, in·h·w). Matrices of the same shape
    are orthogonalised together. lr: a number, or a tensor of one.
    """

    def __init__(self, parameters: Any, lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            grads = [weight.grad for weight in weights]
            for weight in weights:
                if not self.state[weight]:
                    self.state[weight]["momentum"] = torch.zeros_like(weight)
            means = [self.state[weight]["momentum"] for weight in weights]
            torch._foreach_mul_(means, group["momentum"])
            torch._foreach_add_(means, grads)
            ahead = torch._foreach_add(grads, means, alpha=group["momentum"])  # Nesterov's
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            alike: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
            for weight, gradient in zip(weights, ahead, strict=True):
                matrix = gradient.flatten(1)  # (M, N)
                alike.setdefault((matrix.shape[0], matrix.shape[1]), []).append((weight, matrix))
            for shape, pairs in alike.items():
                updates = orthogonalise(torch.stack([matrix for _, matrix in pairs]))  # (B, M, N)
                size = group["lr"] * 0.2 * max(shape) ** 0.5
                if isinstance(size, Tensor):  # on a GPU, where it is not read
                    updates, size = updates * size, 1.0
                for (weight, _), update in zip(pairs, updates, strict=True):
                    weight.sub_(update.view(weight.shape), alpha=size)


def optimizers(
    model: nn.Module, lr: float, weight_decay: float, betas: tuple[float, float]
) -> list[torch.optim.Optimizer]:
    """Returns Muon for the matrices of hidden layers, and AdamW for all other weights.

    The others are biases, norms, the first layer and the last, the first row of a VAE's encoder, and what has
    `embedding` in its name, such as the layers of the time embedding. Only weights that require
    gradients count; an optimizer without any weights is left out.
    """
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, weight in model.named_parameters():
        outer = any(part in name for part in ("embedding", "conv_in", "conv_out", "down.0."))
        if weight.requires_grad:
            (others if weight.ndim < 2 or outer else matrices).append(weight)
    found: list[torch.optim.Optimizer] = []
    if matrices:
        found.append(Muon(matrices, lr, weight_decay=weight_decay))
    if others:
        found.append(torch.optim.AdamW(others, lr, betas, weight_decay=weight_decay, fused=True))
    return found
