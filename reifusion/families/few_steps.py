"""Models and LoRAs that were distilled to a few steps without guidance: Turbo, Lightning, Hyper.

Their timesteps begin at the last one ("trailing"), and only the name of a file says so.
Sauer et al. 2023, "Adversarial Diffusion Distillation", arXiv:2311.17042; Lin, Wang & Yang 2024,
"SDXL-Lightning", arXiv:2402.13929; Ren et al. 2024, "Hyper-SD", arXiv:2404.13686.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TypeVar

from ..model.config import ModelConfig

Config = TypeVar("Config", bound=ModelConfig)

# The sampler that each was published with.
SAMPLERS = {"turbo": "euler_a", "lightning": "euler", "hyper": "ddim"}
# The kind stands beside the model's name, its version or the number of steps: "Hyper-SD15", "sd_xl_turbo",
# "v21TurboDPMSDE", "photo2Lightning"; not in "hyperrealism" or "blue_lightning".
NAMED = re.compile(
    r"hyper[ _-]?sd|(?:sd|xl|large|medium|1b|\d)[ _.-]*(?:turbo|lightning)"
    r"|(?:xl|\d)[ _.-]*hyper(?![a-z])|\dhypervae|[ _.-]hyper(?:\.\w+)?$"
    r"|(?:turbo|lightning|hyper)[ _.-]*\d+[ _-]?step|\d+[ _-]?steps?[ _.-]*(?:turbo|lightning|hyper)",
    re.IGNORECASE,
)


def by_name(config: Config, name: str) -> Config:
    """Returns the config as a model, or a LoRA on it, of that file name is to be drawn with.

    It is the same unless the name says that it was distilled, as "sdxl_lightning_4step_lora" does (see
    `NAMED`). A name with "cfg" in it leaves guidance on.
    """
    found = NAMED.search(name)
    schedule = config.schedule
    if found is None or schedule.timestep_spacing is not None or schedule.prediction_type == "v_prediction":
        return config
    steps = re.search(r"(\d+)[ _-]?step", name, re.IGNORECASE)
    config = replace(
        config,
        steps=int(steps[1]) if steps else 4,
        cfg=config.cfg if re.search("cfg", name, re.IGNORECASE) else 1.0,
    )
    if schedule.prediction_type == "flow":  # which begins at all noise anyway
        return config
    sampler = next(its for kind, its in SAMPLERS.items() if kind in found[0].lower())
    return replace(config, schedule=replace(schedule, timestep_spacing="trailing"), sampler=sampler)
