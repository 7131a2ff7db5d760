"""The training loop's promises, on models small enough to train in a second."""

import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from reifusion.train import loop
from reifusion.train.checkpoint import TrainingError, save_atomically
from reifusion.train.keys import RecipeError
from reifusion.train.loop import BatchPart, Clock, LoopConfig, learning_rate, rng, train
from reifusion.train.progress import Seen

EXACT = LoopConfig(steps=9, checkpoint_minutes=0.0, mixed_precision="no")


class Net(nn.Module):
    """A net with weights of every kind: a convolution, a matrix, biases, and a frozen weight."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv2d(1, 4, 2)
        self.linear = nn.Linear(16, 2)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, x):
        """(B, 1, 3, 3) -> (B, 2)"""
        return self.frozen * self.linear(self.conv(x).relu().flatten(1))


def pictures_objective(network, done, generator, part):
    x = torch.randn(8, 1, 3, 3, generator=generator)
    x = part.of(x)
    return (network(x) - x[:, 0, 0, :2]).pow(2).mean(), {"samples": float(len(x))}


def checkpoint(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def same(one, other) -> bool:
    """True if all tensors in nested dicts and lists are equal bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


# Stopping and resuming


@pytest.mark.parametrize("muon", [False, True])
def test_stopped_and_resumed_run_ends_in_the_same_state_bit_for_bit(tmp_path, muon):
    config = LoopConfig(steps=9, muon=muon)

    def stopping(network, done, generator, part):
        step = round(9 * done)
        if step in (2, 5) and not (tmp_path / f"stopped-{step}").exists():
            (tmp_path / f"stopped-{step}").touch()
            signal.raise_signal(signal.SIGTERM)
        return pictures_objective(network, done, generator, part)

    whole = train(Net(), pictures_objective, config, tmp_path / "whole")
    for step in (2, 5):
        with pytest.raises(KeyboardInterrupt):
            train(Net(), stopping, config, tmp_path / "cut")
        assert checkpoint(tmp_path / "cut")["step"] == step
    resumed = train(Net(), stopping, config, tmp_path / "cut")
    assert same(whole, resumed)
    assert same(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "cut"))


KILLED = """
import os, random, signal, sys, time
from dataclasses import replace
from pathlib import Path
import accelerate, torch, torch.utils.tensorboard
sys.path.insert(0, {here!r})
from test_loop import EXACT, Net, pictures_objective, train

folder, config = Path(sys.argv[1]), replace(EXACT, steps=30, muon=True)
kills = 0

def start(where):
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)  # a fork has none of the parent's other threads
        train(Net(), pictures_objective, config, where)
        os._exit(0)
    return pid

def written(path):
    return path.stat().st_mtime_ns if path.exists() else 0

os.waitpid(start(folder / "whole"), 0)
path, ended = folder / "cut" / "checkpoint.pt", 0
while not ended:
    pid, before, writes = start(folder / "cut"), written(path), random.randint(1, 12)
    while writes and not ended:
        ended, _ = os.waitpid(pid, os.WNOHANG)
        if written(path) != before:
            before, writes = written(path), writes - 1
        time.sleep(0.0005)
    time.sleep(random.uniform(0, 0.02))
    if not ended:
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        ended, kills = not os.WIFSIGNALED(status), kills + 1
print(kills)
"""


@pytest.mark.slow
def test_killed_again_and_again_a_run_ends_in_the_same_state_bit_for_bit(tmp_path):
    """A real process is killed with SIGKILL at random moments, some of them during a write."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED.format(here=str(Path(__file__).parent)), str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) >= 2
    assert same(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "cut"))


def test_being_asked_to_stop_shows_nothing_and_a_second_time_stops_at_once(tmp_path, capsys):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a program of its own
    shown: list[int] = []
    kept: list[int] = []

    def look(step, _):
        shown.append(step)
        return Seen()

    def objective(network, done, generator, part):
        if done >= 4 / 9:
            signal.raise_signal(signal.SIGINT)
        return pictures_objective(network, done, generator, part)

    with pytest.raises(KeyboardInterrupt):
        train(
            Net(),
            objective,
            LoopConfig(steps=9),
            tmp_path,
            look,
            keep=lambda step, _: kept.append(step),
        )
    assert checkpoint(tmp_path)["step"] == 4 and shown == [] and kept == [4]
    assert "stopping, and writing the checkpoint" in capsys.readouterr().err

    def twice(network, done, generator, part):
        for _ in range(2):
            signal.raise_signal(
                signal.SIGINT
            )  # the second is Python's own KeyboardInterrupt, within the step
        raise AssertionError("the second time came to nothing")

    try:
        with pytest.raises(KeyboardInterrupt):
            train(Net(), twice, LoopConfig(steps=9), tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    assert checkpoint(tmp_path)["step"] == 4


def first_moment(folder: Path, **more) -> float:
    """The norm of AdamW's first moment after one step: (1 - β₁) times the gradient's."""
    config = LoopConfig(steps=1, warmup=0, decay=0, mixed_precision="no", **more)
    train(Net(), pictures_objective, config, folder)
    (optimizer,) = checkpoint(folder)["optimizers"]
    return torch.cat([s["exp_avg"].flatten() for s in optimizer["state"].values()]).norm().item()


def test_a_long_gradient_is_shortened_and_a_short_one_is_not(tmp_path):
    whole = first_moment(tmp_path / "whole", max_grad_norm=None)
    assert whole > 0.1 * 0.02
    assert first_moment(tmp_path / "short", max_grad_norm=0.01) == pytest.approx(0.1 * 0.01, rel=1e-4)
    assert first_moment(tmp_path / "long", max_grad_norm=1e3) == pytest.approx(whole)
    other = first_moment(tmp_path / "betas", max_grad_norm=None, betas=(0.5, 0.9))
    assert other == pytest.approx(5 * whole)


def test_another_seed_is_another_run(tmp_path):
    one, again, other = (
        train(Net(), pictures_objective, replace(EXACT, steps=2, seed=seed), tmp_path / str(i))
        for i, seed in enumerate((0, 0, 1))
    )
    assert same(one, again) and not same(one, other)


def test_where_figures_are_rarely_read_a_stop_is_heard_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "waits", lambda device: True)  # as on a GPU

    def objective(network, done, generator, part):
        if done == 3 / 90:
            signal.raise_signal(signal.SIGINT)
        return pictures_objective(network, done, generator, part)

    with pytest.raises(KeyboardInterrupt):
        train(Net(), objective, LoopConfig(steps=90, log_every=50), tmp_path)
    assert checkpoint(tmp_path)["step"] == 3


def test_the_first_checkpoint_comes_soon_and_the_others_in_their_time(tmp_path, monkeypatch):
    now = [0.0]

    def second(network, done, generator, part):
        now[0] += 1
        return pictures_objective(network, done, generator, part)

    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: now[0]))
    shown: list[int] = []
    config = LoopConfig(steps=100, mixed_precision="no", checkpoint_minutes=0.5)

    def look(step: int, average: object) -> Seen:
        shown.append(step)
        return Seen()

    train(Net(), second, config, tmp_path, look)
    assert shown == [6, 37, 68, 99, 100]  # each after more than 30 seconds


def test_models_are_kept_every_few_steps(tmp_path):
    kept = {}
    config = LoopConfig(steps=7, keep_every=3, mixed_precision="no")
    keep = lambda step, average: kept.update({step: {k: x.clone() for k, x in average.items()}})  # noqa: E731
    average = train(Net(), pictures_objective, config, tmp_path / "all", keep=keep)
    assert list(kept) == [3, 6, 7] and same(kept[7], average)
    # What is kept after three steps is what a run of three steps ends with, at a steady rate.
    short = LoopConfig(steps=3, mixed_precision="no", decay=0.0)
    long = LoopConfig(steps=7, keep_every=3, mixed_precision="no", decay=0.0)
    train(Net(), pictures_objective, long, tmp_path / "long", keep=keep)
    assert same(kept[3], train(Net(), pictures_objective, short, tmp_path / "short"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_being_asked_to_stop_saves_the_state_and_gives_the_signal_back(tmp_path, number):
    def objective(network, done, generator, part):
        if done == 4 / 9:
            os.kill(os.getpid(), number)
        return pictures_objective(network, done, generator, part)

    handler = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        train(Net(), objective, LoopConfig(steps=9), tmp_path)
    assert checkpoint(tmp_path)["step"] == 4
    assert signal.getsignal(number) == handler


# Parts


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4))
def test_parts_are_a_batch_cut_without_remainder(size, count):
    batch = torch.arange(size * count)
    parts = [BatchPart(i, count).of(batch) for i in range(count)]
    assert all(len(part) == size for part in parts)
    assert torch.equal(torch.cat(parts).sort().values, batch)


def test_batch_that_cannot_be_cut_equally_is_refused(tmp_path):
    with pytest.raises(TrainingError, match="batch of 8 cannot be cut into 3"):
        train(Net(), pictures_objective, LoopConfig(steps=2, accumulate=3), tmp_path)


@pytest.mark.parametrize("accumulate", [2, 8])
def test_accumulated_parts_train_as_the_whole_batch(tmp_path, accumulate):
    def run(folder, **more):
        config = LoopConfig(steps=6, mixed_precision="no", log_every=1, lr=1e-2, warmup=1, **more)
        return train(Net(), pictures_objective, config, folder), log(folder)

    (whole, rows), (parts, more) = run(tmp_path / "1"), run(tmp_path / "n", accumulate=accumulate)
    for one, other in zip(rows, more, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=2e-6)
    assert all(torch.allclose(whole[name], parts[name], atol=1e-5) for name in whole)


# Half precision


def test_half_precision_is_that_of_the_networks_products_only(tmp_path):
    seen = {}

    def objective(network, done, generator, part):
        value, figures = pictures_objective(network, done, generator, part)
        seen["outside"] = torch.is_autocast_enabled("cpu")
        return value, figures

    class Spy(Net):
        def forward(self, x):
            y = super().forward(x)
            seen["inside"] = self.conv(x).dtype
            return y.float()

    for precision, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("no", torch.float32)):
        seen.clear()
        average = train(
            Spy(), objective, LoopConfig(steps=2, mixed_precision=precision), tmp_path / precision
        )
        assert seen == {"inside": dtype, "outside": False}
        assert all(weight.dtype == torch.float32 for weight in average.values())
    with pytest.raises(RecipeError, match="bf16, fp16 or no, not 'half'"):
        train(Net(), pictures_objective, LoopConfig(steps=2, mixed_precision="half"), tmp_path / "other")


@pytest.mark.parametrize("muon", [False, True])
def test_fp16_skips_a_step_that_overflows_and_resumes_exactly(tmp_path, muon):
    def objective(network, done, generator, part):
        value, figures = pictures_objective(network, done, generator, part)
        return value * (1e35 if done == 1 / 6 else 1.0), figures  # infinite once it is scaled by 65536

    config = LoopConfig(steps=6, mixed_precision="fp16", muon=muon, explode=float("inf"))
    whole = train(Net(), objective, config, tmp_path / "whole")

    def stopping(network, done, generator, part):
        if done == 3 / 6:
            signal.raise_signal(signal.SIGINT)
        return objective(network, done, generator, part)

    with pytest.raises(KeyboardInterrupt):
        train(Net(), stopping, config, tmp_path / "cut")
    assert checkpoint(tmp_path / "cut")["scaler"]["scale"] == 32768.0
    assert same(whole, train(Net(), objective, config, tmp_path / "cut"))


# Errors


def broken(at: float, factor: float):
    """An objective that goes wrong when this share of the training is done."""

    def objective(network, done, generator, part):
        value, figures = pictures_objective(network, done, generator, part)
        return value * (factor if done >= at else 1.0), figures

    return objective


@pytest.mark.parametrize("bad, said", [(float("nan"), "the loss is nan"), (float("inf"), "the loss is inf")])
def test_loss_that_is_not_finite_stops_with_step_batch_and_norms(tmp_path, bad, said):
    with pytest.raises(TrainingError) as caught:
        train(Net(), broken(3 / EXACT.steps, bad), EXACT, tmp_path, describe=lambda step: f"batch {step}")
    message = str(caught.value)
    assert message.startswith(f"{said} at step 3 (batch 3); the gradients' norms: conv ")
    assert "linear " in message and message.endswith(f"the last good state is {tmp_path / 'checkpoint.pt'}")
    assert checkpoint(tmp_path)["step"] == 2
    assert not list(tmp_path.glob(".checkpoint*"))


def test_gradient_that_is_not_finite_stops_though_the_loss_is(tmp_path):
    def objective(network, done, generator, part):
        x = torch.zeros(4, 1, 3, 3)
        return (network(x) - network(x)).abs().sum().sqrt() + 1.0, {}  # the root's slope at 0 is infinite

    with pytest.raises(
        TrainingError, match=r"the gradient's norm is nan at step 0; .* nothing has been saved"
    ):
        train(Net(), objective, EXACT, tmp_path)


def test_exploding_loss_stops_at_the_third_and_keeps_the_state_from_before(tmp_path):
    config = LoopConfig(steps=60, checkpoint_minutes=0.0)
    with pytest.raises(
        TrainingError, match=r"more than 10 times the usual .* for the third time in a row, at step 32"
    ):
        train(Net(), broken(30 / 60, 1000.0), config, tmp_path)
    assert checkpoint(tmp_path)["step"] == 29


def test_a_single_high_loss_stops_nothing(tmp_path):
    def objective(network, done, generator, part):
        value, figures = pictures_objective(network, done, generator, part)
        return value * (1000.0 if round(70 * done) % 30 in (28, 29) else 1.0), figures

    train(Net(), objective, LoopConfig(steps=70), tmp_path)
    assert checkpoint(tmp_path)["step"] == 70


def test_weights_that_are_not_finite_in_the_end_are_not_saved(tmp_path):
    with pytest.raises(TrainingError, match="weights that are not finite"):
        train(Net(), pictures_objective, LoopConfig(steps=1, lr=1e39, warmup=1), tmp_path)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_picture_that_cannot_be_drawn_does_not_end_the_run(tmp_path):
    def fails(step, average):
        raise RuntimeError("out of memory\nmore about it")

    with pytest.warns(UserWarning, match=r"at step \d+ cannot be shown: RuntimeError: out of memory$"):
        trained = train(Net(), pictures_objective, EXACT, tmp_path / "one", fails)
    assert same(trained, train(Net(), pictures_objective, EXACT, tmp_path / "other"))


def test_full_disk_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    train(Net(), pictures_objective, LoopConfig(steps=4), tmp_path)
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def half(value, file):
        file.write(before[: len(before) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(TrainingError, match=r"could not be written \(No space left on device\)"):
        train(Net(), pictures_objective, LoopConfig(steps=9), tmp_path)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert not list(tmp_path.glob(".checkpoint*"))


def test_a_real_limit_on_file_sizes_keeps_the_last_good_file(tmp_path):
    """The kernel refuses the write halfway through the file, as on a full disk."""
    path = tmp_path / "checkpoint.pt"
    save_atomically({"x": torch.zeros(10)}, path)
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)  # a fork has none of the parent's other threads
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        try:
            save_atomically({"x": torch.ones(1_000_000)}, path)
        except TrainingError as error:
            os._exit(0 if str(error).startswith(f"{path} could not be written (") else 2)
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert torch.equal(torch.load(path, weights_only=True)["x"], torch.zeros(10))
    assert list(tmp_path.iterdir()) == [path]


class Other(nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.linear = nn.Linear(16, width)
        self.conv = nn.Conv2d(1, 4, 2)

    forward = Net.forward


def test_checkpoint_of_something_else_is_refused_in_a_sentence(tmp_path):
    train(Net(), pictures_objective, LoopConfig(steps=2), tmp_path)
    other = Net()
    other.linear = nn.Linear(16, 3)
    with pytest.raises(
        TrainingError, match=r"belongs to another model \(linear.bias is \[2\] there and \[3\] here\)"
    ):
        train(other, pictures_objective, LoopConfig(steps=4), tmp_path)
    other = Net()
    other.frozen.requires_grad_(True)
    with pytest.raises(TrainingError, match=r"\(frozen is missing there and \[2\] here\)"):
        train(other, pictures_objective, LoopConfig(steps=4), tmp_path)
    with pytest.raises(TrainingError, match="trained with AdamW, but the optimizer here is Muon and AdamW"):
        train(Net(), pictures_objective, LoopConfig(steps=4, muon=True), tmp_path)


@settings(max_examples=20, deadline=None)
@given(st.randoms(use_true_random=False))
def test_damaged_checkpoint_is_refused_in_a_sentence(tmp_path_factory, chance: random.Random):
    folder = tmp_path_factory.mktemp("run")
    path = folder / "checkpoint.pt"
    save_atomically({"model": {}, "step": 3}, path)
    whole = path.read_bytes()
    damage = chance.choice(["cut", "noise", "other"])
    if damage == "cut":
        path.write_bytes(whole[: chance.randrange(len(whole))])
    elif damage == "noise":
        path.write_bytes(chance.randbytes(chance.randrange(200)))
    with pytest.raises(
        TrainingError,
        match="is not a complete checkpoint of a training run; to start again, choose another folder",
    ):
        train(Net(), pictures_objective, LoopConfig(steps=4), folder)


# Progress


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]


def test_log_and_tensorboard_show_loss_speed_rate_and_pictures(tmp_path):
    def sheet(step, average):
        assert set(average) == {"conv.weight", "conv.bias", "linear.weight", "linear.bias"}
        return Seen(Image.new("RGB", (4, 2), (255, 0, 0)), {"held_out": 0.25 * step})

    config = LoopConfig(steps=10, log_every=3, accumulate=2, lr=0.5, warmup=4)
    train(Net(), pictures_objective, config, tmp_path, sheet)
    *rows, last = log(tmp_path)
    assert last.pop("time") > 0 and last == {"step": 10, "held_out": 2.5}
    with Image.open(tmp_path / "sheet-000010.png") as picture:
        assert picture.size == (4, 2)
    assert [row["step"] for row in rows] == [0, 3, 6, 9]
    rates = [learning_rate(step, step / config.steps, config) for step in (0, 3, 6, 9)]
    assert [row["lr"] for row in rows] == pytest.approx(rates)
    assert all(row["samples_per_second"] > 0 and row["grad_norm"] > 0 for row in rows)
    assert rows[0]["smoothed"] == rows[0]["loss"]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"loss", "smoothed", "lr", "grad_norm", "samples_per_second"} <= set(board.Tags()["scalars"])
    assert [event.step for event in board.Scalars("loss")] == [0, 3, 6, 9]
    losses = [event.value for event in board.Scalars("loss")]
    assert losses == pytest.approx([row["loss"] for row in rows], abs=1e-5)
    assert [(image.step, image.width, image.height) for image in board.Images("samples")] == [(10, 4, 2)]


def test_figures_of_parts_are_averaged_where_they_are_known(tmp_path):
    def objective(network, done, generator, part):
        value, _ = pictures_objective(network, done, generator, part)
        nan = float("nan")
        return value, {"known": 1.0 + 2 * part.index, "once": nan if part.index else 5.0, "never": nan}

    train(Net(), objective, LoopConfig(steps=1, accumulate=2, log_every=1), tmp_path)
    (row,) = log(tmp_path)
    assert row["known"] == 2.0 and row["once"] == 5.0 and "never" not in row


def test_layers_that_draw_from_torchs_own_generator_resume_exactly(tmp_path):
    class Dropping(Net):
        def forward(self, x):
            return super().forward(nn.functional.dropout(x, 0.5, self.training))

    whole = train(Dropping(), pictures_objective, EXACT, tmp_path / "whole")

    def stopping(network, done, generator, part):
        if done == 5 / EXACT.steps:
            signal.raise_signal(signal.SIGINT)
        return pictures_objective(network, done, generator, part)

    with pytest.raises(KeyboardInterrupt):
        train(Dropping(), stopping, EXACT, tmp_path / "cut")
    torch.rand(7)
    assert same(whole, train(Dropping(), pictures_objective, EXACT, tmp_path / "cut"))


# Small things


def test_learning_rate_rises_stays_and_falls():
    config = LoopConfig(steps=1000, lr=1.0, warmup=100, decay=0.2)
    assert learning_rate(0, 0 / config.steps, config) == pytest.approx(0.01)
    assert (
        learning_rate(99, 99 / config.steps, config)
        == learning_rate(500, 500 / config.steps, config)
        == learning_rate(799, 799 / config.steps, config)
        == 1.0
    )
    assert learning_rate(900, 900 / config.steps, config) == pytest.approx(0.5)
    assert 0 < learning_rate(999, 999 / config.steps, config) < 0.01


def test_randomness_is_decided_by_seed_and_step():
    draws = {torch.rand(1, generator=rng(seed, step)).item() for seed in range(3) for step in range(3)}
    assert len(draws) == 9
    assert torch.equal(torch.rand(3, generator=rng(1, 2)), torch.rand(3, generator=rng(1, 2)))


# Against the clock


class Time:
    """A clock that the test turns."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(loop.time, "monotonic", lambda: self.now)

    def slowly(self, seconds: float):
        """An objective that takes this long."""

        def objective(network, done, generator, part):
            self.now += seconds
            self.seen.append(done)
            return pictures_objective(network, done, generator, part)

        self.seen: list[float] = []
        return objective


def test_a_run_ends_with_its_time_and_its_learning_rate_with_it(tmp_path, monkeypatch):
    time = Time(monkeypatch)
    config = LoopConfig(steps=10**6, minutes=1.0, lr=1.0, warmup=1, decay=0.5, log_every=1)
    train(Net(), time.slowly(6.0), config, tmp_path)
    assert time.seen == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
    assert checkpoint(tmp_path)["step"] == 10 and checkpoint(tmp_path)["seconds"] == pytest.approx(60)
    rates = [row["lr"] for row in log(tmp_path)]
    assert rates == pytest.approx([1.0] * 6 + [0.8, 0.6, 0.4, 0.2])


def test_a_run_that_was_stopped_goes_on_with_the_time_that_is_left(tmp_path, monkeypatch):
    time = Time(monkeypatch)
    slow, config = time.slowly(10.0), LoopConfig(steps=10**6, minutes=1.0)

    def stopping(network, done, generator, part):
        if done > 0.3:
            signal.raise_signal(signal.SIGINT)
        return slow(network, done, generator, part)

    with pytest.raises(KeyboardInterrupt):
        train(Net(), stopping, config, tmp_path)
    time.now += 3600  # meanwhile
    before = len(time.seen)
    train(Net(), slow, config, tmp_path)
    # The third step, after which it was stopped, is done again, and has cost its time.
    assert time.seen[before:] == pytest.approx([3 / 6, 4 / 6, 5 / 6])
    with pytest.warns(UserWarning, match="nothing is left to train: the run's 1 minutes are over"):
        train(Net(), slow, config, tmp_path)


def test_steps_end_a_run_before_its_time():
    clock = Clock(LoopConfig(steps=4, minutes=60.0))
    assert clock.done(2) == 0.5 and clock.done(4) == 1.0


# Looking at figures only now and then, as on a GPU


def test_what_nobody_looked_at_is_logged_and_checked_later(tmp_path, monkeypatch):
    def run(folder, objective=pictures_objective):
        config = LoopConfig(steps=10, log_every=3, mixed_precision="no", checkpoint_minutes=0.0)
        return train(Net(), objective, config, folder), log(folder)

    (average, rows), whole = run(tmp_path / "often"), tmp_path / "seldom"
    monkeypatch.setattr(loop, "waits", lambda device: True)
    later, more = run(whole)
    assert same(average, later)
    hidden = ("time", "samples_per_second")
    assert [{k: v for k, v in row.items() if k not in hidden} for row in rows] == [
        {k: v for k, v in row.items() if k not in hidden} for row in more
    ]
    with pytest.raises(TrainingError, match="the loss is nan at step 4"):
        run(tmp_path / "broken", broken(0.4, float("nan")))
    assert checkpoint(tmp_path / "broken")["step"] == 2  # the last that was seen to be good


# Compiling


def test_compiled_networks_train_as_before_and_others_are_left_as_they_are(tmp_path, monkeypatch):
    plain = train(Net(), pictures_objective, EXACT, tmp_path / "plain")
    calls = []

    def compiler(network, dynamic):
        calls.append(dynamic)
        return lambda *x: network(*x)

    monkeypatch.setattr(torch, "compile", compiler)
    config = LoopConfig(steps=9, checkpoint_minutes=0.0, mixed_precision="no", compile=True)
    assert same(plain, train(Net(), pictures_objective, config, tmp_path / "compiled"))
    assert calls == [False]
    monkeypatch.setattr(torch, "compile", lambda network, dynamic: lambda *x: 1.1 * network(*x))
    with pytest.warns(UserWarning, match="compiled, the networks give other gradients"):
        assert same(plain, train(Net(), pictures_objective, config, tmp_path / "wrong"))

    def none(*x):
        raise RuntimeError("no compiler here\nand a long story")

    monkeypatch.setattr(torch, "compile", lambda network, dynamic: none)
    with pytest.warns(UserWarning, match="cannot be compiled here, so steps are slower: no compiler here$"):
        assert same(plain, train(Net(), pictures_objective, config, tmp_path / "none"))
