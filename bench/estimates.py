"""Statistics of sets of pictures: shares, means, the distance between two sets, copies."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def wilson(right: int, of: int, z: float = 1.96) -> tuple[float, float]:
    """Returns the 95 % interval of a share. Unlike p ± 2σ it holds for few pictures and near 0 and 1."""
    if of == 0:
        return 0.0, 1.0
    p = right / of
    # Wilson 1927: (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n)
    middle, reach = p + z**2 / (2 * of), z * (p * (1 - p) / of + z**2 / (4 * of**2)) ** 0.5
    return max(0.0, (middle - reach) / (1 + z**2 / of)), min(1.0, (middle + reach) / (1 + z**2 / of))


def mean(values: Tensor) -> tuple[float, float, float]:
    """Returns the mean of N values and its 95 % interval, by the central limit theorem for large N."""
    middle, reach = values.mean().item(), 1.96 * (values.std() / len(values) ** 0.5).item()
    return middle, middle - reach, middle + reach


def kid(x: Tensor, y: Tensor) -> float:
    """Returns the kernel distance of two sets of features, (M, d) and (N, d): 0 on average if they are alike.

    Source: Bińkowski et al. 2018, "Demystifying MMD GANs", §4; Gretton et al. 2012, Lemma 6.
    """
    x, y = x.double(), y.double()
    m, n, d = len(x), len(y), x.shape[1]
    # §4, Bińkowski et al. 2018: k(x, y) = (xᵀy / d + 1)³
    xx, yy, xy = ((a @ b.T / d + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    # Eq. 3, Gretton et al. 2012: Σᵢ≠ⱼ k(xᵢ, xⱼ) / m(m − 1) + Σᵢ≠ⱼ k(yᵢ, yⱼ) / n(n − 1) − 2 Σᵢⱼ k(xᵢ, yⱼ) / mn
    # No picture is compared with itself, so the estimate is unbiased, and sometimes negative.
    within_x = (xx.sum() - xx.trace()) / (m * (m - 1))
    within_y = (yy.sum() - yy.trace()) / (n * (n - 1))
    return (within_x + within_y - 2 * xy.mean()).item()


def kid_interval(x: Tensor, y: Tensor, rounds: int = 200) -> tuple[float, float]:
    """Returns the 95 % interval of `kid`, whose spread on random halves equals that of all with new pictures.

    Source: Shao & Wu 1989, "A general theory for jackknife variance estimation", leaving out d = n / 2.
    """
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor(
        [
            kid(*(a[torch.randperm(len(a), generator=generator)[: len(a) // 2]] for a in (x, y)))
            for _ in range(rounds)
        ]
    ).std()
    value = kid(x, y)
    return value - 1.96 * spread.item(), value + 1.96 * spread.item()


def nearest(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """Points (N, d), (T, d) -> for each of ours, the distance to the nearest of theirs and its index (N,)."""
    away = torch.cdist(ours, theirs, compute_mode="donot_use_mm_for_euclid_dist")  # exact, so a copy is at 0
    return away.min(1).values, away.argmin(1)


def too_near(
    ours: Tensor, subjects: Sequence[str], training: Tensor, training_subjects: Sequence[str]
) -> int:
    """Counts the pictures that look memorised, from points (N, d) for ours and (T, d) for the training's.

    A picture looks memorised if its nearest training picture is nearer than the two most similar training
    pictures of its subject, in different styles, are to each other.
    """
    of: dict[str, list[int]] = {}
    for i, subject in enumerate(training_subjects):
        of.setdefault(subject, []).append(i)
    alike = [torch.pdist(training[of[subject]]) for subject in subjects]  # (K (K − 1) / 2) for K pictures
    allowed = [pairs.min().item() if len(pairs) else float("inf") for pairs in alike]
    return sum(away < limit for away, limit in zip(nearest(ours, training)[0].tolist(), allowed))
