"""What one sees of a run at each checkpoint: pictures, and the loss on pictures that are held out."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..model.ddpm import Sampler
from ..model.pipeline import StableDiffusion
from .keys import RecipeError
from .loop import normal, rng
from .progress import Seen
from .sheet import PROMPTS, contact_sheet
from .text2image import Data, spread_timesteps

# Prompts of a sheet, for pictures up to this side: a large picture takes its time.
MANY = {128: 24, 256: 12, math.inf: 4}
ENOUGH = 64  # samples, or a few more, on which a loss is measured


def prompts_of_sheet(given: Sequence[str], captions: Sequence[str] | None, size: int, seed: int) -> list[str]:
    """Returns the prompts of a run's sheets.

    given: prompts, or the names of .txt files with one in each line; (): some captions of the data, chosen by
    the seed. captions: those of the data, or None for the mini's own pictures, which have prompts of their
    own. size: side of a picture in pixels. Raises RecipeError for a file that cannot be read.
    """
    most = next(count for side, count in MANY.items() if size <= side)
    if given:
        return [prompt for each in given for prompt in _lines(each)]
    if captions is None:
        return list(PROMPTS[:most])
    distinct = sorted({caption for caption in captions if caption.strip()})
    return random.Random(seed).sample(distinct, min(most, len(distinct))) or [""]


def _lines(given: str) -> list[str]:
    if not given.endswith(".txt"):
        return [given]
    try:
        lines = [line.strip() for line in Path(given).read_text("utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise RecipeError(f"the prompts in {given} cannot be read: {why}") from None
    if not any(lines):
        raise RecipeError(f"there are no prompts in {given}")
    return [line for line in lines if line]


@torch.no_grad()
def measured_loss(
    network: Callable[..., Any], data: Data, sampler: Sampler, batch: int, seed: int
) -> dict[str, float]:
    """Returns the mean squared error of what the network predicts, at low and at high noise, and of both.

    Samples, timesteps and noise are the same each time, whatever the training does: all timesteps are
    equally frequent, none has a weight, and no caption is dropped. So two such losses can be compared.
    """
    sums = torch.zeros(2, 2, dtype=torch.float64)
    for i in range(-(-ENOUGH // batch)):
        generator = rng(seed, i, data.device)
        latents, tokens = data.latent_batch(generator, batch)
        t = spread_timesteps(batch, sampler, generator)
        x0, beside = latents.tensor_split([latents.shape[1] - getattr(data, "beside", 0)], dim=1)
        noise = normal(x0.shape, generator)
        output = network(torch.cat([sampler.add_noise(x0, t, noise), beside], dim=1), tokens, t)
        error = (output - sampler.target(x0, t, noise)).pow(2).mean(dim=(1, 2, 3)).double().cpu()
        early = (t < sampler.num_training_steps / 2).cpu()
        for k, half in enumerate((early, ~early)):
            sums[k] += torch.stack([error[half].sum(), half.sum().double()])
    low, high = (sums[:, 0] / sums[:, 1]).tolist()
    return {"": (sums[:, 0].sum() / sums[:, 1].sum()).item(), "_low_noise": low, "_high_noise": high}


@dataclass
class Watch:
    """Looks at a run: what its model draws, and its loss on data that it has seen and on data held out."""

    sampler: Sampler  # adds the noise
    batch: int
    seed: int
    prompts: Sequence[str] = ()  # (): no sheet
    data: Mapping[str, Data] = field(default_factory=dict)  # "held_out" and "seen"

    def look(self, model: nn.Module, pipe: StableDiffusion) -> Seen:
        """Returns a sheet of pictures of the pipeline, and the model's losses by name."""
        figures = {}
        for name, data in self.data.items():
            device = next(model.parameters()).device

            def network(*inputs: Tensor, device: torch.device = device) -> Tensor:
                output = model(*(x.to(device) for x in inputs))
                return output.to(inputs[0].device)

            for part, value in measured_loss(network, data, self.sampler, self.batch, self.seed).items():
                figures[name + part] = value
        sheet = contact_sheet(pipe, self.prompts, seeds=1) if self.prompts else None
        return Seen(sheet, {name: value for name, value in figures.items() if math.isfinite(value)})
