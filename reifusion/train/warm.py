"""Compiles a U-Net's training step ahead, in a process of its own, while the VAE is being trained.

PyTorch's compiler keeps its results on disk, so the run that needs them finds them there: what it has traced
and what it has compiled, for the forward and the backward pass. That saves a minute of ten.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import torch

from . import recipe as recipes
from .checks import subject
from .loop import accumulate_gradients, in_mixed_precision, processes

PATIENCE = 120.0  # seconds


def warm(overrides: Sequence[str], name: str) -> None:
    """Does two compiled steps of a text2image recipe, on made-up latents; nothing is kept of the model."""
    recipe = recipes.read("text2image", recipes.find(name), overrides)
    accelerator, config = processes(), recipe.training.loop
    model, objective = subject(recipe)
    wrapped = accelerator.prepare_model(model)
    network = in_mixed_precision(torch.compile(wrapped, dynamic=False), config, accelerator.device)
    scaler = torch.amp.GradScaler(accelerator.device.type, enabled=False)
    for step in range(2):
        accumulate_gradients(network, wrapped, objective, step, 0.0, config, accelerator, scaler)


@contextmanager
def warming(overrides: Sequence[str], name: str) -> Iterator[None]:
    """Compiles the step of a recipe in another process while the `with` lasts; then waits until it is done.

    But no longer than PATIENCE. What goes wrong there is of no consequence: the run compiles for itself, or
    goes on without.
    """
    command = [sys.executable, "-m", "reifusion.train.warm", name, *overrides]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
        with suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    warm(sys.argv[2:], sys.argv[1])
