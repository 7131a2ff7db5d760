"""Exercises with answers that can be checked: `reifusion check exercise 3 mine.py` tells right from wrong.

You write a function, which is run beside ours on the same random numbers. If the result is wrong, it is
compared with common mistakes, so that you are told which of them you made.
"""

from __future__ import annotations

import inspect
import math
import runpy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class ExerciseError(ValueError):
    """The answer cannot be checked; the message says why, in one sentence."""


@dataclass(frozen=True)
class Exercise:
    task: str  # what the function has to return
    answer: Callable[..., Any]  # our function; yours must have the same name and arguments
    inputs: Callable[[torch.Generator], tuple]
    mistakes: dict[str, Callable[..., Any]] = field(default_factory=dict)  # message -> the wrong answer

    @property
    def signature(self) -> str:
        return f"{self.answer.__name__}({', '.join(inspect.signature(self.answer).parameters)})"


def check(number: int, file: Path) -> tuple[bool, str]:
    """Returns whether the function in the file is right, and a sentence for its author."""
    if number not in EXERCISES:
        raise ExerciseError(f"there is no exercise {number}; they are numbered 1 to {len(EXERCISES)}")
    exercise = EXERCISES[number]
    name = exercise.answer.__name__
    if not file.is_file():
        raise ExerciseError(f"there is no file {file}; write {exercise.signature} into one")
    try:
        written = runpy.run_path(str(file)).get(name)
    except (Exception, SystemExit) as error:
        return False, f"{file} does not run: {type(error).__name__}: {error}"
    if not callable(written):
        raise ExerciseError(f"{file} has no function {name}; exercise {number} asks for {exercise.signature}")
    for seed in range(5):
        inputs = exercise.inputs(torch.Generator().manual_seed(seed))
        expected = exercise.answer(*_copies(inputs))
        given = _copies(inputs)
        try:
            got = written(*given)
        except Exception as error:
            return False, f"{name} fails: {type(error).__name__}: {error}"
        if not all(_same(a, b) for a, b in zip(given, inputs)):
            return False, f"{name} changes the tensors that it was given; return new ones"
        if not _same(got, expected):
            for what, mistake in exercise.mistakes.items():
                if _same(got, mistake(*_copies(inputs))):
                    return False, f"not yet: {what}"
            return False, f"not yet: {_difference(got, expected)}"
    return True, f"right: {exercise.signature} agrees with reifusion's"


def _copies(inputs: tuple) -> tuple:
    return tuple(
        x.clone() if isinstance(x, Tensor) else list(x) if isinstance(x, list) else x for x in inputs
    )


def _same(got: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor):
        if not isinstance(got, Tensor) or got.shape != expected.shape:
            return False
        return torch.allclose(got.double(), expected.double(), rtol=1e-4, atol=1e-5)
    if isinstance(expected, float):
        if (isinstance(got, Tensor) and got.numel() != 1) or not isinstance(got, int | float | Tensor):
            return False
        return math.isclose(float(got), expected, rel_tol=1e-4)
    return bool(got == expected)


def _difference(got: Any, expected: Any) -> str:
    if isinstance(expected, float) and isinstance(got, Tensor) and got.numel() != 1:
        return f"it returns a tensor of shape {tuple(got.shape)}, but one number was expected"
    if not isinstance(expected, Tensor):
        return f"it returns {got!r}, but {expected!r} was expected"
    if not isinstance(got, Tensor):
        return (
            f"it returns a {type(got).__name__}, but a tensor of shape {tuple(expected.shape)} was expected"
        )
    if got.shape != expected.shape:
        return f"its shape is {tuple(got.shape)}, but should be {tuple(expected.shape)}"
    ratio = (got.double() / expected.double()).flatten()
    if ratio.std() < 1e-4:
        return f"it is {ratio.mean():.4g} times what it should be"
    return f"it is off by up to {(got.double() - expected.double()).abs().max():.3g}"


# ---- the exercises ----------------------------------------------------------------------------------------


def _normal(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=g)


def _between(g: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * torch.rand((), generator=g).item()


def _bars(g: torch.Generator) -> tuple[float, float]:
    """Draws ᾱ at a step and the larger ᾱ at the step before."""
    alpha_bar = _between(g, 0.05, 0.6)
    return alpha_bar, _between(g, alpha_bar + 0.05, 0.98)


def add_noise(x0: Tensor, alpha_bar: float, noise: Tensor) -> Tensor:
    return math.sqrt(alpha_bar) * x0 + math.sqrt(1 - alpha_bar) * noise


def predict_x0(x_t: Tensor, eps: Tensor, alpha_bar: float) -> Tensor:
    return (x_t - math.sqrt(1 - alpha_bar) * eps) / math.sqrt(alpha_bar)


def posterior_mean(x0: Tensor, x_t: Tensor, alpha_bar: float, alpha_bar_prev: float) -> Tensor:
    alpha = alpha_bar / alpha_bar_prev
    to_x0 = math.sqrt(alpha_bar_prev) * (1 - alpha) / (1 - alpha_bar)
    return to_x0 * x0 + math.sqrt(alpha) * (1 - alpha_bar_prev) / (1 - alpha_bar) * x_t


def velocity(x0: Tensor, noise: Tensor, alpha_bar: float) -> Tensor:
    return math.sqrt(alpha_bar) * noise - math.sqrt(1 - alpha_bar) * x0


def ddim_step(x_t: Tensor, eps: Tensor, alpha_bar: float, alpha_bar_prev: float) -> Tensor:
    x0 = predict_x0(x_t, eps, alpha_bar)
    return math.sqrt(alpha_bar_prev) * x0 + math.sqrt(1 - alpha_bar_prev) * eps


def guidance(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    return uncond + scale * (cond - uncond)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), dim=-1)
    return weights @ v


def time_embedding(t: Tensor, width: int) -> Tensor:
    half = width // 2
    angles = t[:, None] * 10_000 ** (-torch.arange(half) / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def geglu(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


def kl(mean: Tensor, log_variance: Tensor) -> float:
    return (-0.5 * (1 + log_variance - mean**2 - log_variance.exp())).mean().item()


def karras_sigmas(n: int, sigma_min: float, sigma_max: float) -> Tensor:
    ramp = torch.linspace(0, 1, n)
    return (sigma_max ** (1 / 7) + ramp * (sigma_min ** (1 / 7) - sigma_max ** (1 / 7))) ** 7


def apply_merges(pieces: list[str], merges: list[tuple[str, str]]) -> list[str]:
    for first, second in merges:  # in the order in which they were learned
        merged: list[str] = []
        for piece in pieces:
            if merged and (merged[-1], piece) == (first, second):
                merged[-1] += piece
            else:
                merged.append(piece)
        pieces = merged
    return pieces


def lora(weight: Tensor, down: Tensor, up: Tensor, alpha: float) -> Tensor:
    return weight + alpha / len(down) * up @ down


def flow_step(x: Tensor, v: Tensor, sigma: float, sigma_next: float) -> Tensor:
    return x + (sigma_next - sigma) * v


_letters = "abab"

EXERCISES: dict[int, Exercise] = {
    1: Exercise(
        "x_t, the clean latents x0 with noise added, for a given ᾱ",
        add_noise,
        lambda g: (_normal(g, 2, 4, 3, 3), _between(g, 0.1, 0.9), _normal(g, 2, 4, 3, 3)),
        {
            "ᾱ multiplies variances; the tensors are multiplied by its square root": lambda x, a, n: (
                a * x + (1 - a) * n
            ),
            "the noise's factor is √(1 − ᾱ), not 1 − √ᾱ": lambda x, a, n: a**0.5 * x + (1 - a**0.5) * n,
        },
    ),
    2: Exercise(
        "the clean latents that follow from x_t and the predicted noise",
        predict_x0,
        lambda g: (_normal(g, 2, 4, 3, 3), _normal(g, 2, 4, 3, 3), _between(g, 0.1, 0.9)),
        {
            "the division by √ᾱ is missing": lambda x, e, a: x - (1 - a) ** 0.5 * e,
            "divide by √ᾱ, not by ᾱ": lambda x, e, a: (x - (1 - a) ** 0.5 * e) / a,
        },
    ),
    3: Exercise(
        "μ̃, the mean of q(x_{t−1} | x_t, x0), for ᾱ at t and at the step before, whatever the stride",
        posterior_mean,
        lambda g: (_normal(g, 2, 4, 3, 3), _normal(g, 2, 4, 3, 3), *_bars(g)),
        {
            "the weights of x0 and x_t are swapped": lambda x0, x, a, b: posterior_mean(x, x0, a, b),
            "α is ᾱ_t / ᾱ_{t−1}, not ᾱ_t": lambda x0, x, a, b: (
                b**0.5 * (1 - a) / (1 - a) * x0 + a**0.5 * (1 - b) / (1 - a) * x
            ),
        },
    ),
    4: Exercise(
        "the velocity v that a v-prediction network learns",
        velocity,
        lambda g: (_normal(g, 2, 4, 3, 3), _normal(g, 2, 4, 3, 3), _between(g, 0.1, 0.9)),
        {
            "the sign is reversed: v = √ᾱ ε − √(1 − ᾱ) x0": lambda x, n, a: -velocity(x, n, a),
            "x0 and the noise are swapped": lambda x, n, a: velocity(n, x, a),
        },
    ),
    5: Exercise(
        "x at the step before, by DDIM without noise",
        ddim_step,
        lambda g: (_normal(g, 2, 4, 3, 3), _normal(g, 2, 4, 3, 3), *_bars(g)),
        {
            "the noise's factor must be that of the step before": lambda x, e, a, b: (
                b**0.5 * predict_x0(x, e, a) + (1 - a) ** 0.5 * e
            ),
            "this is the predicted x0; it has to be mixed with noise again": lambda x, e, a, b: predict_x0(
                x, e, a
            ),
        },
    ),
    6: Exercise(
        "the guided prediction",
        guidance,
        lambda g: (_normal(g, 2, 4, 3, 3), _normal(g, 2, 4, 3, 3), _between(g, 2, 9)),
        {
            "the two halves are swapped": lambda c, u, s: guidance(u, c, s),
            "start from uncond, not from cond: this is scale + 1": lambda c, u, s: c + s * (c - u),
        },
    ),
    7: Exercise(
        "softmax(q kᵀ / √d) v, for q (B, h, L, d) and k, v (B, h, S, d)",
        attention,
        lambda g: (_normal(g, 2, 3, 5, 8), _normal(g, 2, 3, 7, 8), _normal(g, 2, 3, 7, 8)),
        {
            "the scores are not divided by √d": lambda q, k, v: (q @ k.mT).softmax(-1) @ v,
            "divide by √d, not by d": lambda q, k, v: (q @ k.mT / q.shape[-1]).softmax(-1) @ v,
            "the softmax is over the keys, the last dimension": lambda q, k, v: (
                (q @ k.mT / q.shape[-1] ** 0.5).softmax(-2) @ v
            ),
        },
    ),
    8: Exercise(
        "the sinusoids of times t (B,), (B, width): cosines first",
        time_embedding,
        lambda g: (torch.randint(0, 1000, (4,), generator=g), 32),
        {"sines and cosines are swapped": lambda t, w: time_embedding(t, w).roll(w // 2, dims=-1)},
    ),
    9: Exercise(
        "GEGLU's product, for x (…, 2·width) that holds the value and then the gate",
        geglu,
        lambda g: (_normal(g, 2, 5, 16),),
        {
            "value and gate are swapped": lambda x: x.chunk(2, -1)[1] * F.gelu(x.chunk(2, -1)[0]),
            "this is the tanh approximation; Stable Diffusion has the exact GELU": lambda x: (
                x.chunk(2, -1)[0] * F.gelu(x.chunk(2, -1)[1], approximate="tanh")
            ),
            "this is a GLU with the sigmoid": lambda x: F.glu(x),
        },
    ),
    10: Exercise(
        "KL(N(mean, variance) ‖ N(0, 1)), averaged over all numbers",
        kl,
        lambda g: (_normal(g, 3, 4), _normal(g, 3, 4)),
        {
            "the sign is reversed; a divergence is never negative": lambda m, v: -kl(m, v),
            "the factor ½ is missing": lambda m, v: 2 * kl(m, v),
            "this is the sum; the average was asked for": lambda m, v: kl(m, v) * m.numel(),
        },
    ),
    11: Exercise(
        "n values of σ after Karras et al. with ρ = 7, from sigma_max down to sigma_min",
        karras_sigmas,
        lambda g: (int(_between(g, 5, 12)), _between(g, 0.02, 0.1), _between(g, 10, 20)),
        {
            "they go up, but the noisiest comes first": lambda n, a, b: karras_sigmas(n, a, b).flip(0),
            "this is a straight line in σ": lambda n, a, b: torch.linspace(b, a, n),
        },
    ),
    12: Exercise(
        "the pieces after all merges (a list of pairs), each of which is applied everywhere, in their order",
        apply_merges,
        lambda g: (
            [_letters[i] for i in torch.randint(0, 4, (12,), generator=g).tolist()],
            [("a", "b"), ("ab", "ab"), ("b", "b")],
        ),
        {"only the first merge was applied": lambda p, m: apply_merges(p, m[:1])},
    ),
    13: Exercise(
        "the weight (out, in) with a LoRA merged into it: down (rank, in), up (out, rank)",
        lora,
        lambda g: (_normal(g, 6, 5), _normal(g, 2, 5), _normal(g, 6, 2), _between(g, 3, 9)),
        {
            "the factor is alpha / rank, not alpha": lambda w, d, u, a: w + a * u @ d,
            "the weight itself is missing": lambda w, d, u, a: a / len(d) * u @ d,
        },
    ),
    14: Exercise(
        "one Euler step of rectified flow, from sigma to sigma_next",
        flow_step,
        lambda g: (_normal(g, 2, 4, 3, 3), _normal(g, 2, 4, 3, 3), 0.8, _between(g, 0.1, 0.7)),
        {"this step goes towards the noise, but sigma falls": lambda x, v, s, n: x + (s - n) * v},
    ),
}
