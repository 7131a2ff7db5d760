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
