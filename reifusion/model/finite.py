"""Names the part of a model that made numbers which are not finite, and says why."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from .pipeline import Step


def finite(x: Tensor, part: str, network: nn.Module | None = None, when: str = "") -> Tensor:
    """Returns x. Raises FloatingPointError, naming the part that made x, unless x is finite everywhere."""
    if x.isfinite().all():
        return x
    weights = () if network is None else network.named_parameters()
    broken = [name for name, weight in weights if not weight.isfinite().all()]
    why = "try less guidance" if network is None else "try float32"
    if broken:
        why = f"{len(broken)} of its weights are not finite, first {broken[0]}"
    raise FloatingPointError(f"{part} made numbers that are not finite{when}: {why}")


def check(step: Step, unet: nn.Module) -> Step:
    """Returns the step. Raises FloatingPointError, with the first part that failed, unless it is finite."""
    if not step.latents.isfinite().all():
        when = f" in step {step.index + 1} of {step.total}"
        finite(step.cond, "the U-Net", unet, when)
        finite(step.output, "guidance", None, when)
        finite(step.latents, f"the sampler {step.sampler.name}", None, when)
    return step
