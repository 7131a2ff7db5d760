"""Muon, an optimizer for weight matrices, beside AdamW for all that is not one.

A gradient's matrix has a few large singular values and many small ones; a step along it moves the weights
in the few directions only. Muon makes all singular values 1 first, so a step moves in every direction alike.
Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; the size of the step as
in Liu et al. 2025, "Muon is scalable for LLM training", Eq. 4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def orthogonalise(matrix: Tensor, iterations: int = 5) -> Tensor:
    """(M, N) = UΣVᵀ -> nearly UVᵀ: singular values between about 0.7 and 1.2. Computed in bf16.

    Newton–Schulz: x ← ax + b(xxᵀ)x + c(xxᵀ)²x keeps U and V and takes every singular value σ to
    aσ + bσ³ + cσ⁵, which these a, b, c bring near 1 in five rounds. Source: Jordan et al. 2024.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.mT if tall else matrix).bfloat16().contiguous()  # wide, so that xxᵀ is the smaller square
    x = x / (x.norm() + 1e-7)  # every σ ≤ 1, where the iteration converges
    for _ in range(iterations):
        square = x @ x.mT
        # Sums inside the products, β·y + α·(a @ b): fewer roundings, and a fifth faster.
        # [newton-schulz] Jordan et al. 2024: x ← ax + b(xxᵀ)x + c(xxᵀ)²x
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """One step: m ← μm + g;  W ← (1 − lr·decay)W − lr·0.2·√max(M, N)·orthogonalise(g + μm).

    The factor gives a step the size an AdamW step has, so both take the same learning rate. A convolution's
    kernel (out, in, h, w) counts as the matrix (out, in·h·w).
    """

    def __init__(self, parameters: Any, lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                mean = state["momentum"].mul_(group["momentum"]).add_(weight.grad)
                ahead = (weight.grad + group["momentum"] * mean).flatten(1)  # Nesterov's, (M, N)
                update = orthogonalise(ahead).view(weight.shape)
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.sub_(update, alpha=group["lr"] * 0.2 * max(ahead.shape) ** 0.5)


def optimizers(
    model: nn.Module, lr: float, weight_decay: float, betas: tuple[float, float]
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between hidden layers, AdamW for embeddings, biases, norms, first and last layer.

    Only for weights that require gradients; without the one or the other where it has nothing to do.
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
