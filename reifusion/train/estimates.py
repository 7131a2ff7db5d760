"""Statistics of sets of pictures: shares, means, how much pictures differ, copies."""

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


def nearest(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """Points (N, d), (T, d) -> for each of ours, the distance to the nearest of theirs and its index (N,)."""
    away = torch.cdist(ours, theirs, compute_mode="donot_use_mm_for_euclid_dist")  # exact, so a copy is at 0
    return away.min(1).values, away.argmin(1)


def too_near(
    ours: Tensor, subjects: Sequence[str], training: Tensor, training_subjects: Sequence[str]
) -> list[bool]:
    """True for pictures that look memorised, from points (N, d) for ours and (T, d) for the training's.

    A picture looks memorised if its nearest training picture is nearer than the two most similar training
    pictures of its subject are to each other. A subject with a single picture allows no judgement: False.
    """
    of: dict[str, list[int]] = {}
    for i, subject in enumerate(training_subjects):
        of.setdefault(subject, []).append(i)
    alike = [torch.pdist(training[of[subject]]) for subject in subjects]  # (K (K − 1) / 2) for K pictures
    allowed = [pairs.min().item() if len(pairs) else 0.0 for pairs in alike]
    return [away < limit for away, limit in zip(nearest(ours, training)[0].tolist(), allowed, strict=True)]


def spread(features: Tensor) -> float:
    """Returns the mean distance between any two of N points (N, d): how much N pictures differ."""
    return torch.pdist(features).mean().item()


def kid(ours: Tensor, theirs: Tensor) -> tuple[float, float, float]:
    """Returns the kernel inception distance of points (N, d), (M, d), each at least 2, and its 95 % interval.

    It is 0 on average where both are drawn alike, however few they are, and so can be below 0. The interval
    is the jackknife's: from how much the distance changes when any one point is left out.

    Source: Bińkowski et al. 2018, "Demystifying MMD GANs", §3.1 (here with any features).
    """
    x, y = ours.double(), theirs.double()
    n, m = len(x), len(y)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        # §3.1, Bińkowski et al. 2018: k(x, y) = (xᵀy / d + 1)³
        return (a @ b.T / a.shape[1] + 1) ** 3

    xx, yy, xy = (kernel(*pair) for pair in ((x, x), (y, y), (x, y)))
    xx, yy = xx - xx.diag().diag(), yy - yy.diag().diag()  # no point is compared with itself

    # Eq. 4: mean k(x, x′) + mean k(y, y′) − 2 mean k(x, y), over pairs of different points
    def distance(within_x: Tensor, within_y: Tensor, between: Tensor, n: int, m: int) -> Tensor:
        return within_x / (n * (n - 1)) + within_y / (m * (m - 1)) - 2 * between / (n * m)

    found = distance(xx.sum(), yy.sum(), xy.sum(), n, m).item()
    if min(n, m) < 3:
        return found, -float("inf"), float("inf")
    without_x = distance(xx.sum() - 2 * xx.sum(1), yy.sum(), xy.sum() - xy.sum(1), n - 1, m)  # (N,)
    without_y = distance(xx.sum(), yy.sum() - 2 * yy.sum(1), xy.sum() - xy.sum(0), n, m - 1)  # (M,)
    # Efron & Stein 1981: the variance of a statistic, (n − 1) / n · Σ (θ₋ᵢ − θ̄)², for each of the two samples
    variance = sum(w.var(correction=0) * (len(w) - 1) for w in (without_x, without_y))
    reach = 1.96 * float(variance) ** 0.5
    return found, found - reach, found + reach
