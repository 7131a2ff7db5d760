"""What the samplers and schedules are called in other programs, and what each costs.

Looked up in diffusers 0.42, A1111's web UI 1.10, ComfyUI and stable-diffusion.cpp in 2026; "" is: not there.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

from ..model.samplers import SAMPLERS
from ..model.sentences import shown
from ..model.spacing import SCHEDULES
from .schedules import TITLES


@dataclass(frozen=True)
class Elsewhere:
    """A sampler's order, the calls of the network in a step, and its names."""

    order: int  # how the error falls: with the step's length to that power
    calls: int  # in each step; where it is two, one in the last
    diffusers: str
    comfyui: str
    sdcpp: str
    a1111: str = ""  # where it is not our title


ELSEWHERE = {
    "ddpm": Elsewhere(1, 1, "DDPM", "ddpm", "", "-"),
    "ddim": Elsewhere(1, 1, "DDIM", "ddim", "ddim_trailing"),
    "pndm": Elsewhere(4, 1, "PNDM(skip_prk_steps=True)", "", ""),
    "lms": Elsewhere(4, 1, "LMSDiscrete", "lms", "lms"),
    "euler": Elsewhere(1, 1, "EulerDiscrete", "euler", "euler"),
    "euler_churn": Elsewhere(
        1, 1, "EulerDiscrete, step(s_churn=5)", "euler, s_churn", "", "Euler, Sigma churn"
    ),
    "euler_a": Elsewhere(1, 1, "EulerAncestralDiscrete", "euler_ancestral", "euler_a"),
    "heun": Elsewhere(2, 2, "HeunDiscrete", "heun", "heun"),
    "restart": Elsewhere(2, 2, "", "", ""),
    "dpm2": Elsewhere(2, 2, "KDPM2Discrete", "dpm_2", "dpm2"),
    "dpm2_a": Elsewhere(2, 2, "KDPM2AncestralDiscrete", "dpm_2_ancestral", ""),
    "dpmpp_2s_a": Elsewhere(2, 2, "", "dpmpp_2s_ancestral", "dpm++2s_a"),
    "dpmpp_2s_sde": Elsewhere(2, 2, "DPMSolverSDE", "dpmpp_sde", ""),
    "dpmpp_2m": Elsewhere(2, 1, "DPMSolverMultistep", "dpmpp_2m", "dpm++2m"),
    "dpmpp_2m_karras": Elsewhere(
        2, 1, "DPMSolverMultistep(use_karras_sigmas=True)", "dpmpp_2m, karras", "dpm++2m, karras",
        "DPM++ 2M, Karras",
    ),
    "dpmpp_sde": Elsewhere(
        2, 1, "DPMSolverMultistep(algorithm_type='sde-dpmsolver++')", "dpmpp_2m_sde", "dpm++2m_sde",
        "DPM++ 2M SDE",
    ),
    "dpmpp_2m_sde": Elsewhere(
        2, 1, "DPMSolverMultistep(algorithm_type='sde-dpmsolver++')", "dpmpp_2m_sde", "dpm++2m_sde"
    ),
    "dpmpp_2m_sde_heun": Elsewhere(
        2, 1, "DPMSolverMultistep(algorithm_type='sde-dpmsolver++', solver_type='heun')",
        "dpmpp_2m_sde_heun", "",
    ),
    "dpmpp_3m_sde": Elsewhere(3, 1, "", "dpmpp_3m_sde", ""),
    "unipc": Elsewhere(2, 1, "UniPCMultistep", "uni_pc_bh2", ""),
    "deis": Elsewhere(3, 1, "DEISMultistep(solver_order=3)", "", "", "-"),
    "ipndm": Elsewhere(4, 1, "", "ipndm", "ipndm", "-"),
    "er_sde": Elsewhere(3, 1, "", "er_sde", "er_sde", "-"),
    "lcm": Elsewhere(1, 1, "LCM", "lcm", "lcm"),
    "tcd": Elsewhere(1, 1, "TCD", "", "tcd", "-"),
    "flow": Elsewhere(1, 1, "FlowMatchEulerDiscrete", "euler", "euler", "-"),
    "flow_dpmpp_2m": Elsewhere(
        2, 1, "DPMSolverMultistep(use_flow_sigmas=True)", "dpmpp_2m", "dpm++2m", "-"
    ),
}  # fmt: skip

# Our schedules -> diffusers, A1111, ComfyUI, stable-diffusion.cpp
SCHEDULES_ELSEWHERE = {
    "leading": ("timestep_spacing='leading'", "", "", ""),
    "linspace": ("timestep_spacing='linspace'", "", "", ""),
    "trailing": ("timestep_spacing='trailing'", "", "", ""),
    "normal": ("", "Normal, Uniform", "normal", "discrete"),
    "sgm_uniform": ("", "SGM Uniform", "sgm_uniform", "sgm_uniform"),
    "simple": ("", "Simple", "simple", "simple"),
    "ddim_uniform": ("", "DDIM", "ddim_uniform", ""),
    "beta": ("use_beta_sigmas=True (over σ there)", "Beta (over σ there)", "beta", "beta"),
    "karras": ("use_karras_sigmas=True", "Karras", "karras", "karras"),
    "exponential": ("use_exponential_sigmas=True", "Exponential", "exponential", "exponential"),
    "polyexponential": ("", "Polyexponential (ρ 1 there)", "", ""),
    "kl_optimal": ("", "KL Optimal (ends at the least σ there)", "kl_optimal", "kl_optimal"),
    "align_your_steps": ("AysSchedules", "Align Your Steps", "AlignYourStepsScheduler", "ays"),
    "align_your_steps_xl": ("AysSchedules", "Align Your Steps", "AlignYourStepsScheduler", "ays"),
}


# What A1111 takes for "Automatic", where it is not "Normal"
AUTOMATIC = {
    **dict.fromkeys(("dpmpp_2s_sde", "dpmpp_2s_a", "dpm2", "dpm2_a", "dpmpp_2m"), "karras"),
    **dict.fromkeys(("dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde"), "exponential"),
}


def sampler_of(facts: Mapping[str, str], churned: bool = False) -> tuple[str | None, str | None]:
    """Returns our names of A1111's sampler and schedule; None where none is said, or none built in.

    facts: "Sampler" and "Schedule type". churned: Euler is with churn. Warns of what is not built in.
    """
    asked, label = facts.get("Sampler"), facts.get("Schedule type", "")
    if asked is None:
        return None, None
    names = {sampler.title.lower(): name for name, sampler in SAMPLERS.items()}
    schedules = {title.lower(): name for name, title in TITLES.items()} | {"uniform": "normal"}
    schedules |= {name: name for name in SCHEDULES}
    if asked.lower() not in names:  # before version 1.9 the schedule was a part of the sampler's name
        for title in ("Karras", "Exponential"):
            if asked.endswith(f" {title}") and asked.removesuffix(f" {title}").lower() in names:
                asked, label = asked.removesuffix(f" {title}"), title
    # DPM++ 2M is with Karras's schedule a sampler of its own here, and there what is automatic.
    karras = f"{asked} Karras" if label in ("Automatic", "Karras") else asked
    name = names.get(karras.lower()) or names.get(asked.lower())
    if name is None:
        warnings.warn(f"the sampler {shown(asked)} is not built in; the model's own is used", stacklevel=2)
        return None, None
    if name == "euler" and churned:
        name = "euler_churn"
    if SAMPLERS[name].own_schedule:
        return name, None
    if label == "Automatic":
        return name, AUTOMATIC.get(name)
    schedule = schedules.get(label.lower())
    if label and schedule is None:
        warnings.warn(
            f"{asked} is used without the schedule {shown(label)}, which is not built in", stacklevel=2
        )
    return name, schedule


def samplers_table() -> list[tuple[str, ...]]:
    """Returns a head and a row for each sampler, as text."""
    rows: list[tuple[str, ...]] = [
        ("sampler", "order", "calls", "noise", "suits", "A1111", "ComfyUI", "sd.cpp", "diffusers")
    ]
    for name, kind in SAMPLERS.items():
        noise = "-" if kind.s_noise is None else "fresh" if kind.eta is None else f"eta {kind.eta:g}"
        suits = ", ".join(one.removesuffix("_prediction") for one in kind.prediction_types)
        found = ELSEWHERE.get(name)  # a sampler of one's own has none
        if found is None:
            rows.append((name, "", "", noise, suits, "", "", "", ""))
            continue
        theirs = (found.a1111 or kind.title, found.comfyui, found.sdcpp, found.diffusers)
        names = (one if one not in ("", "-") else "-" for one in theirs)
        rows.append((name, str(found.order), str(found.calls), noise, suits, *names))
    return rows


def schedules_table() -> list[tuple[str, ...]]:
    """Returns a head and a row for each schedule, as text."""
    head = ("schedule", "A1111", "ComfyUI", "sd.cpp", "diffusers")
    rows = ((name, a1111, comfyui, sdcpp, diffusers) for name, (diffusers, a1111, comfyui, sdcpp)
            in SCHEDULES_ELSEWHERE.items())  # fmt: skip
    return [head, *(tuple(cell or "-" for cell in row) for row in rows)]
