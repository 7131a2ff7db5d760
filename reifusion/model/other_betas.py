"""Forward processes other than Stable Diffusion's, and those that cannot be."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor

from .config import ScheduleConfig


def other_betas(schedule: ScheduleConfig) -> Tensor:
    """The variances βₜ of a schedule that is not linear in √β: (num_training_steps,), float64."""
    start, end, count = schedule.beta_start, schedule.beta_end, schedule.num_training_steps
    if schedule.trained_betas is not None:
        own = torch.tensor(schedule.trained_betas, dtype=torch.float64)
        if own.shape != (count,) or not bool(((own > 0) & (own < 1)).all()):
            raise ValueError(f"trained_betas must be {count} numbers between 0 and 1")
        return own
    if schedule.beta_schedule == "linear":  # Ho et al. 2020, §4
        return torch.linspace(start, end, count, dtype=torch.float64)
    if schedule.beta_schedule == "squaredcos_cap_v2":
        # Eq. 17, Nichol & Dhariwal 2021: ᾱₜ = f(t) / f(0), f(t) = cos²((t/T + s) / (1 + s) · π/2), s = 0.008
        time = torch.linspace(0, 1, count + 1, dtype=torch.float64)
        f = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - f[1:] / f[:-1]).clamp(max=0.999)
    known = "'scaled_linear', 'linear' or 'squaredcos_cap_v2'"
    raise ValueError(f"beta_schedule must be {known}, not {schedule.beta_schedule!r}")


def check(schedule: ScheduleConfig, prediction_types: Collection[str]) -> None:
    """Raises ValueError for a schedule that cannot be undone by a sampler with these prediction types."""
    if schedule.prediction_type not in prediction_types:
        known = " or ".join(map(repr, prediction_types))
        raise ValueError(f"prediction_type must be {known}, not {schedule.prediction_type!r}")
    if schedule.timestep_spacing not in (None, "trailing"):
        spacing = schedule.timestep_spacing
        raise ValueError(f"timestep_spacing must be 'trailing' or None, not {spacing!r}")
    if schedule.zero_terminal_snr and schedule.prediction_type != "v_prediction":
        raise ValueError(
            "zero_terminal_snr is for prediction_type 'v_prediction': where all is noise, 'epsilon' says "
            "nothing of the picture, and 'flow' begins there anyway"
        )
