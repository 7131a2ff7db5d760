"""Names the part of a model that made numbers which are not finite, and says why."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .step import Step


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


class Watch:
    """Looks at each step of a loop. Raises FloatingPointError, with the first part that failed.

    A GPU answers later, and the loop does not wait: a step is judged as soon as the answer is there, the last
    ones by `finish`.
    """

    def __init__(self, unet: nn.Module):
        self.unet = unet
        self._asked: deque[tuple[Step, Tensor, torch.cuda.Event | None]] = deque()

    def __call__(self, step: Step) -> Step:
        """Returns the step; judges this one or earlier ones."""
        self._asked.append((step, *_fetched(step.latents.isfinite().all())))
        self._judge(wait=False)
        return step

    def finish(self) -> None:
        """Judges all steps that are left."""
        self._judge(wait=True)

    def _judge(self, wait: bool) -> None:
        while self._asked:
            step, is_finite, arrival = self._asked[0]
            if arrival is not None and wait:
                arrival.synchronize()
            elif arrival is not None and not arrival.query():
                return
            self._asked.popleft()
            if not is_finite:
                when = f" in step {step.index + 1} of {step.total}"
                finite(step.cond, "the U-Net", self.unet, when)
                finite(step.output, "guidance", None, when)
                finite(step.latents, f"the sampler {step.sampler.name}", None, when)


def _fetched(answer: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Returns a tensor on the CPU that will hold the answer, and when: None is now."""
    if not answer.is_cuda:
        return answer, None
    arrived, arrival = answer.to("cpu", non_blocking=True), torch.cuda.Event()
    arrival.record(torch.cuda.current_stream(answer.device))
    return arrived, arrival
