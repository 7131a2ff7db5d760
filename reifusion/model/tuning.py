"""What a sampler can be told besides its steps: its schedule, and how much noise it adds."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from .config import ModelConfig
from .ddpm import Sampler
from .limits import number
from .samplers import SAMPLERS, samplers_for
from .sentences import shown
from .spacing import SCHEDULES

if TYPE_CHECKING:
    from .request import Request

# The options of samplers that have an attribute of that name, and the most that each can be.
MOST = {"eta": 1.0, "s_noise": 10.0, "churn": 1000.0}


def check(request: Request) -> None:
    """Raises ValueError for a sampler, a schedule or an option that does not exist, or not together."""
    name, schedule = request.sampler, request.schedule
    if name not in (None, *SAMPLERS):
        raise ValueError(f"there is no sampler {shown(name)}; there are {', '.join(SAMPLERS)}")
    if schedule not in (None, *SCHEDULES):
        raise ValueError(f"there is no schedule {shown(schedule)}; there are {', '.join(SCHEDULES)}")
    for option, value in options(request).items():
        if not 0 <= number(value, option) <= MOST[option]:
            raise ValueError(f"{option} must be between 0 and {MOST[option]:g}, not {shown(value)}")
    if name is None:
        return
    kind = SAMPLERS[name]
    if schedule is not None and kind.own_schedule:
        others = ", ".join(one for one, other in SAMPLERS.items() if not other.own_schedule)
        raise ValueError(f"the sampler {name} has a schedule of its own; those that take any are {others}")
    for option in options(request):
        if getattr(kind, option, None) is None:
            having = (one for one, other in SAMPLERS.items() if getattr(other, option, None) is not None)
            raise ValueError(f"the sampler {name} has no {option}; these have: {', '.join(having)}")


def options(request: Request) -> dict[str, Any]:
    """The options that a request sets, by name."""
    return {name: getattr(request, name) for name in MOST if getattr(request, name) is not None}


def warn_of_little_noise(sampler: Sampler, request: Request) -> None:
    """Warns if drawing would begin where pictures have little noise, as some samplers do in a single step."""
    first, given = sampler.timesteps[0].item(), request.latents is not None or request.init_image is not None
    if first < sampler.num_training_steps / 2 and not given:
        warnings.warn(
            f"with so few steps, {sampler.name} begins at timestep {first:g}, where there is little noise,"
            " and the noise it begins with remains; take more steps, or the schedule trailing",
            stacklevel=3,
        )


def sampler_of(request: Request, config: ModelConfig) -> str:
    """The name of the request's sampler, or else of the model's. Raises ValueError if it does not fit."""
    kind, schedule = config.schedule.prediction_type, request.schedule
    names = samplers_for(kind)
    name = request.sampler or (config.sampler if config.sampler in names or not names else names[0])
    if names and name not in names:
        fitting = ", ".join(names)
        raise ValueError(
            f"the sampler {name} does not fit {config.name}, trained for {kind!r}; what fits: {fitting}"
        )
    if kind == "flow" and schedule is not None and schedule.startswith("align_your_steps"):
        raise ValueError(f"the schedule {schedule} is for models like SD 1.5 and SDXL, not for flow")
    if request.sampler is None and schedule is not None and SAMPLERS[name].own_schedule:
        listed: dict[type, str] = {one: key for key, one in SAMPLERS.items()}
        return next(listed[base] for base in SAMPLERS[name].__mro__[1:] if base in listed)
    return name
