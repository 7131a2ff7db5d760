"""The profile adds up, changes nothing, and leaves nothing behind."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from reifusion import cli, kernels
from reifusion.explain import profile
from reifusion.explain.profile import KINDS, REST, profiled
from reifusion.families import sdxl
from reifusion.model.pipeline import StableDiffusion
from tests import tiny_sdxl
from tests.tiny import TINY, WORDS, Bytes, networks, random_networks


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion:
    return StableDiffusion(TINY, Bytes(), networks(TINY, noise=0.1))


def draw(pipe: StableDiffusion, **settings) -> np.ndarray:
    return np.array(pipe.generate("a", seed=0, sampler="ddim", steps=3, progress=False, **settings))


def test_a_profile_adds_up(pipe):
    with profiled(pipe) as found:
        draw(pipe)
    parts = {part.name: part for part in found.parts}
    unet = parts["U-Net"]
    assert (parts["text encoder"].calls, unet.calls, parts["VAE decoder"].calls) == (1, 3, 1)
    assert "VAE encoder" not in parts
    kinds = [parts[name] for name in (*KINDS.values(), REST)]
    assert sum(part.seconds for part in kinds) == pytest.approx(unet.seconds)
    assert sum(part.gflop for part in kinds) == pytest.approx(unet.gflop)
    assert all(part.seconds > 0 and part.gflop >= 0 for part in kinds)
    assert found.limit > 0
    # A residual block's two convolutions at 8×8, both halves of the guidance, three steps: a lower bound.
    assert parts["residual blocks"].gflop > 3 * 2 * 2 * 2 * 9 * 16 * 16 * 64 / 1e9
    text = found.text()
    assert all(name in text for name in parts) and "GFLOP/s" in text


def test_networks_that_are_told_more_by_name_are_counted_too():
    config = tiny_sdxl.TINY
    pipe = sdxl.StableDiffusionXL(config, WORDS, random_networks(config))
    with profiled(pipe) as found:
        draw(pipe, size=(32, 32))
    (unet,) = (part for part in found.parts if part.name == "U-Net")
    assert unet.calls == 3 and unet.gflop > 0
    assert "the text encoders of this family are not in the table" in found.text()


def test_guidance_is_seen_in_the_arithmetic(pipe):
    counts = []
    for scale in 1.0, 7.5:
        with profiled(pipe) as found:
            draw(pipe, cfg=scale)
        counts.append(next(part.gflop for part in found.parts if part.name == "U-Net"))
    assert 1.5 * counts[0] < counts[1] < 2 * counts[0]  # both halves share the time embedding


def test_a_profile_changes_nothing_and_leaves_nothing_behind(pipe):
    before = draw(pipe)
    with profiled(pipe):
        assert np.array_equal(draw(pipe), before)
    with pytest.raises(ZeroDivisionError), profiled(pipe):
        raise ZeroDivisionError
    for module in (module for network in pipe.models.values() for module in network.modules()):
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_fast_forms_are_counted_and_do_not_step_aside(monkeypatch):
    fast = StableDiffusion(TINY, Bytes(), networks(TINY, noise=0.1))
    kernels.install(fast.models)
    with profiled(fast) as found:
        draw(fast)
    assert {*KINDS.values()} <= {part.name for part in found.parts}
    stepped_aside: list[type] = []
    for kind in set(kernels.FAST.values()):
        plain: Any = kind.__bases__[0]
        monkeypatch.setattr(plain, "forward", _noting(plain.forward, kind, stepped_aside))
    draw(fast)
    expected, stepped_aside[:] = list(stepped_aside), []
    with profiled(fast):
        draw(fast)
    assert stepped_aside == expected


def _noting(forward, kind, seen):
    def noting(self, *given, **named):
        seen.extend([kind] * (type(self) is kind))
        return forward(self, *given, **named)

    return noting


def test_the_trace_opens_in_a_viewer(pipe, tmp_path):
    with profiled(pipe) as found:
        draw(pipe)
    path = tmp_path / "trace.json"
    found.save(path)
    events = json.loads(path.read_text())["traceEvents"]
    assert [path] == list(tmp_path.iterdir())
    assert {"ph", "ts", "dur", "name", "pid", "tid"} <= set(events[0]) and min(e["ts"] for e in events) == 0
    steps = [e for e in events if e["name"] == "U-Net"]
    inside = [e for e in events if e["cat"] in KINDS.values()]
    assert len(steps) == 3 and len(inside) > 10
    for event in inside:  # each block lies in a step
        assert any(
            s["ts"] <= event["ts"] and event["ts"] + event["dur"] <= s["ts"] + s["dur"] + 1 for s in steps
        )


def test_the_limit_is_what_this_machine_reaches():
    limit = profile.measure_limit(torch.device("cpu"), torch.float32)
    assert 1 < limit < 1e5


def test_the_command_line_says_where_the_time_went_and_keeps_a_trace(tmp_path, capsys, monkeypatch, pipe):
    monkeypatch.setattr("reifusion.api.load", lambda *_, **more: pipe)
    assert (
        cli.main(["generate", "a", "--profile", "--steps", "2", "--seed", "3", "--out", str(tmp_path)]) == 0
    )
    printed = capsys.readouterr()
    assert printed.out.strip() == str(tmp_path / "a-3.png")
    assert "residual blocks" in printed.err and "of limit" in printed.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-3.png", "a-3.trace.json"]
