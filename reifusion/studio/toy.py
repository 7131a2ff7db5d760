"""The toy world of the book's first chapter, to be played with: points in a plane instead of pictures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..explain.toy import WORLDS, Best, draw, sampler_of, some_noise
from ..model.sentences import shown

SAMPLERS = ("ddpm", "ddim", "euler", "euler_a", "heun", "dpmpp_2m_karras", "flow")
POINTS, GRID, REACH = 300, 13, 2.6  # drawn points, arrows along a side, how far the plane is shown
STEPS, GUIDANCE = 100, 20.0  # the most


def journey(world: str, sampler: str, steps: int, guidance: float, seed: int) -> dict[str, Any]:
    """Draws points from noise with the best possible network; returns all that the page shows of it.

    guidance: 0 is without the word, 1 with it alone; the word means the first half of the data. Raises
    ValueError for what is not there, and for too much.
    """
    if world not in WORLDS or sampler not in SAMPLERS:
        raise ValueError(f"there is no {shown(world if world not in WORLDS else sampler)} in the toy world")
    if not 1 <= steps <= STEPS or not 0 <= guidance <= GUIDANCE or not 0 <= seed < 2**32:
        raise ValueError(f"steps are 1 to {STEPS}, guidance 0 to {GUIDANCE:g}, and a seed is 0 to 2³² - 1")
    points, labels = WORLDS[world]()
    solver = sampler_of(sampler, steps, seed=seed)
    with_word, without = Best(points[labels == 0], solver), Best(points, solver)

    def network(x: Tensor, t: float) -> Tensor:
        # Eq. 6, Ho & Salimans 2022, s = 1 + w: ε = ε_uncond + s (ε_cond - ε_uncond)
        return without(x, t) + guidance * (with_word(x, t) - without(x, t))

    frames = draw(solver, network, some_noise(POINTS, seed))
    side = torch.linspace(-REACH, REACH, GRID, dtype=torch.float64)
    grid = torch.cartesian_prod(side, side)  # (GRID², 2)
    arrows = []
    for t in solver.timesteps.tolist():
        guided = without.x0(grid, t) + guidance * (with_word.x0(grid, t) - without.x0(grid, t))
        arrows.append(guided - grid)  # towards what the network takes for the data
    return {
        "data": _rounded(points[::4]),
        "labels": labels[::4].tolist(),
        "frames": [_rounded(frame) for frame in frames],
        "grid": _rounded(grid),
        "arrows": [_rounded(arrow) for arrow in arrows],
        "times": [round(t) for t in solver.timesteps.tolist()],
        "reach": REACH,
    }


def _rounded(x: Tensor) -> list[list[float]]:
    return [[round(value, 3) for value in row] for row in x.tolist()]
