"""Compiling ahead: in another process, the same step that the run will need, and no harm if it fails."""

import argparse
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch

from reifusion.train import __main__ as command
from reifusion.train import sizes, warm
from tests.tiny import SMALL

MINI = command.MINI


@pytest.fixture
def compiled(monkeypatch):
    """The shapes of the inputs of the network that was compiled; nothing is really compiled."""
    monkeypatch.setitem(sizes.SIZES, "mini", SMALL)
    seen = []

    def compiler(network, dynamic):
        def call(*inputs):
            seen.append([tuple(x.shape) for x in inputs])
            return network(*inputs)

        # With autocast inside of what is compiled, PyTorch would trace it anew each time.
        assert dynamic is False and isinstance(network, torch.nn.Module)
        return call

    monkeypatch.setattr(torch, "compile", compiler)
    return seen


def test_what_is_compiled_is_the_recipes_step(compiled):
    warm.warm(["batch=6", "vae=", "mixed_precision=no"], "mini")
    latents, words = (6, 4, 16, 16), (6, SMALL.clip.context_length)
    assert compiled == 2 * [[latents, words, (6,)]]


def test_it_runs_beside_and_is_waited_for(monkeypatch):
    events = []

    class Process:
        def __init__(self, command, **_):
            events.append(command)

        def wait(self, timeout=None):
            events.append("waited")

        def kill(self):
            events.append("killed")

    monkeypatch.setattr(subprocess, "Popen", Process)
    with warm.warming(["batch=6"], "mini"):
        events.append("trained")
    assert events[:3] == [
        [sys.executable, "-m", "reifusion.train.warm", "mini", "batch=6"],
        "trained",
        "waited",
    ]
    events.clear()
    with pytest.raises(KeyboardInterrupt), warm.warming([], "mini"):
        raise KeyboardInterrupt
    assert events[1:] == ["killed", "waited"]  # who stops the training does not wait for a compiler


def test_a_compiler_that_hangs_is_not_waited_for_for_ever(monkeypatch):
    class Process(subprocess.Popen):
        def __init__(self, command, **more):
            super().__init__([sys.executable, "-c", "import time; time.sleep(100)"], **more)
            started.append(self)

    started: list[Process] = []
    monkeypatch.setattr(subprocess, "Popen", Process)
    monkeypatch.setattr(warm, "PATIENCE", 0.1)
    with warm.warming([], "mini"):
        pass
    assert started[0].poll() not in (None, 0)  # it was killed


def test_a_process_that_fails_does_no_harm(capfd):
    with warm.warming(["quux=1"], "mini"):
        pass
    assert capfd.readouterr() == ("", "")


def given(*overrides, **more):
    flags = {"dry_run": False, "overfit_one": False, "check_gradients": False, "plot": False} | more
    return argparse.Namespace(overrides=list(overrides), **flags)


def test_only_a_gpu_compiles_and_only_for_a_run(monkeypatch):
    asked = []

    def warming(overrides, name):
        asked.append((name, overrides))
        return nullcontext()

    monkeypatch.setattr(warm, "warming", warming)
    for request, stages in (
        (given(), MINI["cpu"]),
        (given(dry_run=True), MINI["gpu"]),
        (given("compile=false"), MINI["gpu"]),
        (given(), (("vae", "mini-vae"),)),
    ):
        command._ahead(request, stages)
    assert asked == []
    command._ahead(given("batch=8", "crop=64", "folder=x", "out=y.safetensors"), MINI["gpu"])
    assert asked == [("mini", ["batch=8", "vae="])]
