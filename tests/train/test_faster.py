"""Recorded steps: what a GPU would play back, on a stand-in for it, beside the steps as they are written."""

from __future__ import annotations

import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from reifusion.model.config import ScheduleConfig
from reifusion.train import faster, loop
from reifusion.train.loop import LoopConfig, train
from reifusion.train.objective import BatchPart, Drawn, rng
from reifusion.train.sharpen import Sharpening, sharpen_decoder
from reifusion.train.text2image import TextToImageTraining, train_text2image
from reifusion.train.vae import VAE, VAETraining, train_vae
from tests.kernels.card import Card
from tests.sprites import random_sprites
from tests.train.test_loop import Net, checkpoint, log, pictures_objective, same
from tests.train.test_text2image import EMPTY, TINY, some_data

pytestmark = pytest.mark.filterwarnings("error:steps cannot be recorded")
CONFIG = LoopConfig(
    steps=12, lr=0.05, warmup=4, decay=0.5, ema=0.8, mixed_precision="no", compile=True, log_every=1
)


def drawn(draw: Any = None, loss: Any = None) -> Drawn:
    """Noisy pictures, whose noise is drawn; the loss is that of the test of the loop."""

    def pictures(done, generator, part):
        return (part.of(torch.randn(8, 1, 3, 3, generator=generator)),)

    def squares(network, x):
        return (network(x) - x[:, 0, 0, :2]).pow(2).mean(), {"samples": float(len(x)), "mean": x.mean()}

    return Drawn(draw or pictures, loss or squares)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    """A CPU is taken for a GPU; nothing is compiled."""
    card = Card()
    monkeypatch.setattr(torch, "compile", lambda network, dynamic: network)
    monkeypatch.setattr(faster, "can_be_recorded", lambda plain: isinstance(plain.objective, Drawn))
    monkeypatch.setattr(faster, "RecordedStep", partial(faster.RecordedStep, record=card.record))
    monkeypatch.setattr(loop, "waits", lambda device: True)
    return card


def played(card: Card) -> int:
    return len(card.played)


def compare(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=tolerance)


@pytest.mark.parametrize("muon", [False, True])
@pytest.mark.parametrize("norm", [None, 0.05])
def test_steps_played_back_are_the_steps_as_they_are_written(card, tmp_path, muon, norm):
    """The learning rate rises and falls meanwhile, and the share of the average changes."""
    config = replace(CONFIG, muon=muon, max_grad_norm=norm)
    fast = train(Net(), drawn(), config, tmp_path / "fast")
    # One step as it is written, two recordings that are checked, and eleven steps of two launches each.
    assert len(card.outputs) == 2 and played(card) == 2 + 2 * 11
    plain = train(Net(), drawn(), replace(config, compile=False), tmp_path / "plain")
    # Muon rounds to bfloat16.
    compare(fast, plain, 1e-3 if muon else 1e-6)
    moved = max(
        (plain[name] - p.detach()).abs().max() for name, p in Net().named_parameters() if name in plain
    )
    assert moved > 0.05
    for one, other in zip(log(tmp_path / "fast"), log(tmp_path / "plain"), strict=True):
        for figure in ("loss", "mean", "grad_norm", "smoothed", "lr"):
            assert one[figure] == pytest.approx(other[figure], abs=1e-3 if muon else 1e-5)
    for name in ("model", "ema"):
        compare(
            checkpoint(tmp_path / "fast")[name],
            checkpoint(tmp_path / "plain")[name],
            1e-3 if muon else 1e-6,
        )


def test_figures_of_steps_of_both_kinds_that_are_read_together_keep_their_names(card, tmp_path):
    config = replace(CONFIG, log_every=4)
    train(Net(), drawn(), config, tmp_path / "fast")
    train(Net(), drawn(), replace(config, compile=False), tmp_path / "plain")
    for one, other in zip(log(tmp_path / "fast"), log(tmp_path / "plain"), strict=True):
        for figure in ("loss", "mean", "grad_norm", "smoothed"):
            assert one[figure] == pytest.approx(other[figure], abs=1e-5)


def test_for_a_run_that_is_over_nothing_is_compiled(card, tmp_path, monkeypatch):
    train(Net(), drawn(), CONFIG, tmp_path)
    monkeypatch.delattr(torch, "compile")
    with pytest.warns(UserWarning, match="nothing is left to train"):
        train(Net(), drawn(), CONFIG, tmp_path)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("muon", [False, True])
@pytest.mark.parametrize("at", [1, 2, 5])
def test_a_run_that_is_stopped_and_resumed_ends_in_the_same_state_bit_for_bit(
    card, tmp_path, muon, at, precision
):
    config = replace(CONFIG, muon=muon, mixed_precision=precision)

    def stopping(done, generator, part):
        if round(12 * done) == at and not (tmp_path / "stopped").exists():
            (tmp_path / "stopped").touch()
            signal.raise_signal(signal.SIGINT)
        return drawn().draw(done, generator, part)

    whole = train(Net(), drawn(), config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(Net(), drawn(stopping), config, tmp_path / "cut")
    assert checkpoint(tmp_path / "cut")["step"] == at
    assert same(whole, train(Net(), drawn(stopping), config, tmp_path / "cut"))
    assert same(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "cut"))


def test_a_checkpoint_of_either_way_is_one_of_the_other(card, tmp_path):
    half = replace(CONFIG, steps=6, decay=0.0)
    train(Net(), drawn(), half, tmp_path / "fast")
    train(Net(), drawn(), replace(half, compile=False), tmp_path / "plain")
    ends = []
    for folder, compile in (("fast", False), ("plain", True), ("fast", True)):
        where = tmp_path / f"{folder}-{compile}"
        where.mkdir()
        (where / "checkpoint.pt").write_bytes((tmp_path / folder / "checkpoint.pt").read_bytes())
        ends.append(train(Net(), drawn(), replace(CONFIG, decay=0.0, compile=compile), where))
    compare(ends[0], ends[1], 1e-6)
    compare(ends[0], ends[2], 1e-6)


def test_each_kind_of_batch_has_a_recording_of_its_own(card, tmp_path):
    """First crops, then crops with another loss, then larger ones: as when a VAE is trained."""

    def draw(done, generator, part):
        x = torch.randn(8 if done < 2 / 3 else 4, 1, 3, 3, generator=generator)
        return part.of(x), done >= 1 / 3

    def loss(network, x, twice):
        value, figures = drawn().loss(network, x)
        return value * (2 if twice else 1), figures

    fast = train(Net(), drawn(draw, loss), CONFIG, tmp_path / "fast")
    assert len(card.outputs) == 4  # three kinds, and the update
    assert played(card) == 4 + 2 * 9
    compare(fast, train(Net(), drawn(draw, loss), replace(CONFIG, compile=False), tmp_path / "plain"), 1e-6)


def test_batches_of_ever_new_kinds_are_not_all_recorded(card, tmp_path, monkeypatch):
    monkeypatch.setattr(faster, "MOST_KINDS", 2)

    def draw(done, generator, part):
        return (torch.randn(1 + round(12 * done) % 4, 1, 3, 3, generator=generator),)

    fast = train(Net(), drawn(draw), CONFIG, tmp_path / "fast")
    assert len(card.outputs) == 3
    compare(fast, train(Net(), drawn(draw), replace(CONFIG, compile=False), tmp_path / "plain"), 1e-6)


def test_what_is_random_in_layers_is_seeded_before_it_is_played(card, tmp_path):
    """A layer that draws from torch's own generator: on a GPU, a graph asks it for its seed."""

    class Dropping(Net):
        def forward(self, x):
            return super().forward(nn.functional.dropout(x, 0.5, self.training))

    fast = train(Dropping(), drawn(), CONFIG, tmp_path / "fast")
    compare(fast, train(Dropping(), drawn(), replace(CONFIG, compile=False), tmp_path / "plain"), 1e-6)


def test_weights_without_a_gradient_stay(card, tmp_path):
    class Unused(Net):
        def __init__(self):
            super().__init__()
            self.unused = nn.Linear(3, 3)

    model = Unused()
    before = {name: p.detach().clone() for name, p in model.unused.named_parameters()}
    train(model, drawn(), replace(CONFIG, weight_decay=0.5), tmp_path)
    assert same(before, dict(model.unused.named_parameters()))


def reads(network, x):
    """A loss that depends on a number, which Python reads."""
    value, figures = drawn().loss(network, x)
    return value * (2.0 if value.item() > 1e9 else 1.0), figures


def stale(network, x):
    """A loss with a number of Python's that changes from step to step, though it must not."""
    value, figures = drawn().loss(network, x)
    stale.calls += 1  # type: ignore[attr-defined]
    return value * 2.0 ** (stale.calls == 5), figures  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "loss, said",
    [
        (reads, "steps cannot be recorded here, so they are slower: .* is not permitted"),
        (stale, r"so they are slower: played back, a step has other gradients \(100% off\)"),
    ],
)
@pytest.mark.parametrize("muon", [False, True])
def test_steps_that_cannot_be_recorded_are_done_as_they_are_written(card, tmp_path, loss, said, muon):
    stale.calls = 0  # type: ignore[attr-defined]
    config = replace(CONFIG, muon=muon)
    with pytest.warns(UserWarning, match=said):
        slow = train(Net(), drawn(loss=loss), config, tmp_path / "slow")
    stale.calls = 9  # type: ignore[attr-defined]
    plain = train(Net(), drawn(loss=loss), replace(config, compile=False), tmp_path / "plain")
    compare(slow, plain, 1e-3 if muon else 1e-6)


def test_the_warning_has_the_error_that_came_first(card, tmp_path, monkeypatch):
    """PyTorch ends a recording that was broken off with an error of its own."""

    def broken(work):
        try:
            raise RuntimeError("a number was read")
        finally:
            raise RuntimeError("an earlier error")

    plain: Any = faster.RecordedStep  # with the card's recording, by the fixture
    monkeypatch.setattr(faster, "RecordedStep", partial(plain.func, record=broken))
    with pytest.warns(UserWarning, match="so they are slower: a number was read"):
        train(Net(), drawn(), CONFIG, tmp_path)


def test_an_update_that_goes_elsewhere_is_not_used(card, tmp_path, monkeypatch):
    def wrong(average, weights, share):
        follow(average, weights, share * 1.2 if isinstance(share, torch.Tensor) and card.outputs else share)

    follow = loop.follow
    monkeypatch.setattr(loop, "follow", wrong)
    with pytest.warns(UserWarning, match="played back, a step moves the weights to other places"):
        train(Net(), drawn(), CONFIG, tmp_path)


def test_steps_without_any_slope_are_no_reason_to_fail(card, tmp_path):
    def flat(network, x):
        value, figures = drawn().loss(network, x)
        return 0 * value, figures

    train(Net(), drawn(loss=flat), CONFIG, tmp_path)
    assert len(card.outputs) == 2


def test_an_average_follows_alike_by_a_number_and_by_a_tensor():
    torch.manual_seed(0)
    average, weights = ([torch.randn(5, 3), torch.randn(7)] for _ in range(2))
    for share in (0.9, 0.5, 0.001, 1.0):
        one, other = ([x.clone() for x in average] for _ in range(2))
        loop.follow(one, weights, share)
        loop.follow(other, weights, torch.tensor(share))
        for a, b, old, new in zip(one, other, average, weights, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(a, (1 - share) * old + share * new, rtol=1e-5, atol=1e-6)


def test_an_objective_that_is_drawn_first_is_an_objective():
    x = rng(3, 1)
    value, figures = drawn()(Net(), 0.0, x, BatchPart())
    expected, _ = pictures_objective(Net(), 0.0, rng(3, 1), BatchPart())
    assert torch.equal(value, expected) and figures["samples"] == 8.0


def step(**changes: Any) -> Any:
    """A step that can be recorded, but for what is changed."""
    parts: dict[str, Any] = {
        "accelerator": SimpleNamespace(device=torch.device("cuda"), num_processes=1),
        "config": CONFIG,
        "scaler": torch.amp.GradScaler("cpu", enabled=False),
        "objective": drawn(),
        "wrapped": nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0)),
    }
    return SimpleNamespace(**(parts | changes))


def test_only_what_happens_on_one_gpu_in_one_go_is_recorded():
    assert faster.can_be_recorded(step())
    for device, count in (("cpu", 1), ("mps", 1), ("cuda", 2)):
        machine = SimpleNamespace(device=torch.device(device), num_processes=count)
        assert not faster.can_be_recorded(step(accelerator=machine))
    assert not faster.can_be_recorded(step(config=replace(CONFIG, accumulate=2)))
    assert not faster.can_be_recorded(step(scaler=torch.amp.GradScaler("cpu", enabled=True)))
    assert not faster.can_be_recorded(step(objective=pictures_objective))
    assert not faster.can_be_recorded(step(wrapped=nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1))))


# ---- the trainings themselves -----------------------------------------------------------------------------


def text2image(folder: Path, loop: LoopConfig, prediction: str = "epsilon", **more: Any) -> nn.Module:
    training = TextToImageTraining(loop, batch=4, offset_noise=0.1, even_from=0.5, **more)
    config = replace(TINY, schedule=ScheduleConfig(prediction_type=prediction))
    return train_text2image(some_data(), EMPTY, config, training, folder)


def sprites() -> Any:
    generator = torch.Generator().manual_seed(0)
    return partial(
        random_sprites, torch.randint(0, 256, (6, 4, 16, 16), generator=generator, dtype=torch.uint8)
    )


def vae(folder: Path, loop: LoopConfig) -> nn.Module:
    """First without edges, then with them, then whole pictures."""
    training = VAETraining(loop, batch=4, crop=8, edges_from=0.3, whole_from=0.7, normalise=False)
    return train_vae(sprites(), 16, TINY.vae, training, folder)


def sharpen(folder: Path, loop: LoopConfig) -> nn.Module:
    torch.manual_seed(0)
    training = Sharpening(loop, batch=4, critic_by=0.5)
    return sharpen_decoder(VAE(TINY.vae), sprites(), 16, training, folder)


@pytest.mark.parametrize(
    "training, recordings",
    [
        (text2image, 2),
        (partial(text2image, prediction="flow", gradient_checkpointing=True), 2),
        (partial(text2image, prediction="v_prediction", train_text_encoder=False), 2),
        (vae, 4),
        (sharpen, 2),
    ],
)
def test_a_whole_training_can_be_recorded(card, tmp_path, training, recordings):
    steps = 10 if training is vae else 5
    loop = replace(CONFIG, steps=steps, lr=1e-3, warmup=3)
    fast = training(tmp_path / "fast", loop).state_dict()
    assert len(card.outputs) == recordings and played(card) == recordings + 2 * (steps + 1 - recordings)
    compare(fast, training(tmp_path / "plain", replace(loop, compile=False)).state_dict(), 1e-4)
    assert [row["loss"] for row in log(tmp_path / "fast")] == pytest.approx(
        [row["loss"] for row in log(tmp_path / "plain")], rel=1e-4
    )


@pytest.mark.gpu
@pytest.mark.parametrize("muon", [False, True])
def test_on_a_gpu_a_recorded_run_is_one_as_it_is_written(tmp_path: Path, monkeypatch, muon):
    monkeypatch.setattr(torch, "compile", lambda network, dynamic: network)
    config = replace(CONFIG, muon=muon)
    fast = train(Net(), drawn(), config, tmp_path / "fast")
    plain = train(Net(), drawn(), replace(config, compile=False), tmp_path / "plain")
    compare(fast, plain, 1e-3 if muon else 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("training", [text2image, vae, sharpen])
def test_on_a_gpu_a_training_that_is_compiled_and_recorded_learns_the_same(tmp_path, training):
    loop = replace(CONFIG, steps=10, lr=1e-3, warmup=3)
    training(tmp_path / "fast", loop)
    training(tmp_path / "plain", replace(loop, compile=False))
    assert [row["loss"] for row in log(tmp_path / "fast")] == pytest.approx(
        [row["loss"] for row in log(tmp_path / "plain")], rel=1e-2
    )
