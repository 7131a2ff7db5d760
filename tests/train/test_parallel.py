"""Two processes train like a single one. This file is also the program that they run: see `main`."""

import json
import os
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from reifusion.model.config import CLIPConfig, ModelConfig, ScheduleConfig, UNetConfig, VAEConfig
from reifusion.train.checkpoint import TrainingError
from reifusion.train.loop import LoopConfig, processes, train
from reifusion.train.progress import Seen
from reifusion.train.text2image import (
    Latents,
    TextToImage,
    TextToImageTraining,
    denoising_objective,
    forward_process,
    train_text2image,
)
from reifusion.train.vae import VAE, VAETraining, train_vae
from tests.sprites import random_sprites

pytestmark = pytest.mark.slow

TINY = ModelConfig(
    name="tiny",
    size=16,
    clip=CLIPConfig(vocab_size=20, context_length=6, width=16, layers=1, heads=2),
    vae=VAEConfig(channels=(8, 16), layers=1, groups=4, scale_factor=1.0),
    unet=UNetConfig(channels=(16, 32), attention=(1, 1), layers=1, heads=(2, 2), context_width=16, groups=4),
    schedule=ScheduleConfig(prediction_type="v_prediction"),
)
EMPTY = torch.tensor([18, 19, 19, 19, 19, 19])


def some_data() -> Latents:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.tensor([[18, subject, 19, 19, 19, 19] for subject in range(8)])
    return Latents(torch.randn(8, 4, 8, 8, generator=generator), tokens)


def loop(**more) -> LoopConfig:
    usual = {"warmup": 1, "log_every": 1, "ema": 0.5, "mixed_precision": "no", "checkpoint_minutes": 1e6}
    return LoopConfig(steps=5, **{**usual, **more})


def start(kind, config) -> dict[str, torch.Tensor]:
    """Returns weights without zeros: there, Muon and AdamW would blow up mere rounding errors."""
    torch.manual_seed(0)
    return {name: 0.1 * torch.randn_like(value) for name, value in kind(config).state_dict().items()}


def text2image(folder: Path, **more) -> None:
    training = TextToImageTraining(loop=loop(lr=1e-3, **more), batch=8)
    train_text2image(some_data(), EMPTY, TINY, training, folder, start(TextToImage, TINY), sheet)


def sheet(step: int, average: dict) -> Seen:
    with open(Path(sys.argv[-1]) / "sheets.txt", "a") as file:
        print(step, os.getpid(), file=file)
    return Seen(Image.new("RGB", (2, 2)))


def vae(folder: Path, **more) -> None:
    generator = torch.Generator().manual_seed(0)
    sprites = torch.randint(0, 256, (6, 4, 16, 16), generator=generator, dtype=torch.uint8)
    training = VAETraining(loop=loop(lr=1e-3, **more), batch=8, crop=8)
    train_vae(partial(random_sprites, sprites), 16, TINY.vae, training, folder, start(VAE, TINY.vae))


def outcome(folder: Path, trouble) -> str:
    """Returns how a run ends if at step 2 one of the processes is in trouble."""
    torch.manual_seed(0)
    inner = denoising_objective(
        some_data(), EMPTY, forward_process(TINY.schedule), TextToImageTraining(batch=8)
    )

    def objective(network, done, generator, part):
        value, figures = inner(network, done, generator, part)
        return trouble(value) if done == 2 / loop().steps and part.index == 1 else value, figures

    try:
        train(TextToImage(TINY), objective, loop(), folder)
    except (KeyboardInterrupt, TrainingError) as error:
        return f"{type(error).__name__} {error}"
    return "done"


def stopped(value: torch.Tensor) -> torch.Tensor:
    signal.raise_signal(signal.SIGTERM)
    return value


def main(folder: Path) -> None:
    """The program of each of the two processes."""
    text2image(folder / "two")
    text2image(folder / "muon-two-by-two", muon=True, accumulate=2)
    vae(folder / "vae-two")
    rank = processes().process_index
    report = {
        "stopped": outcome(folder / "stopped", stopped),
        "nan": outcome(folder / "nan", lambda value: value * float("nan")),
    }
    (folder / f"report-{rank}.json").write_text(json.dumps(report))


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """Trains with two processes; returns their folder."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--main_process_port", str(port), __file__, str(folder)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(launch, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]


def same_but_for_rounding(one: Path, other: Path, begin: dict, within: float) -> None:
    rows, more = log(one), log(other)
    assert [row["step"] for row in rows] == [row["step"] for row in more] == list(range(5))
    for row, likewise in zip(rows, more, strict=True):
        assert row["loss"] == pytest.approx(likewise["loss"], rel=1e-4)
        assert row["grad_norm"] == pytest.approx(likewise["grad_norm"], rel=1e-3)
        assert set(row) == set(likewise)
    ours, theirs = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (one, other))
    for part in ("model", "ema"):
        apart, moved = (
            torch.cat([(ours[part][name] - there[name]).flatten() for name in begin]).norm()
            for there in (theirs[part], begin)
        )
        assert apart < within * moved


def test_two_processes_train_as_one_with_the_whole_batch(two, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(tmp_path)])
    text2image(tmp_path / "one")
    same_but_for_rounding(tmp_path / "one", two / "two", start(TextToImage, TINY), within=1e-4)
    text2image(tmp_path / "muon", muon=True)
    # Muon computes in bf16, so the last bits differ by more.
    begin = start(TextToImage, TINY)
    same_but_for_rounding(tmp_path / "muon", two / "muon-two-by-two", begin, within=0.05)


def test_two_processes_train_a_vae_as_one(two, tmp_path):
    vae(tmp_path / "one")
    same_but_for_rounding(tmp_path / "one", two / "vae-two", start(VAE, TINY.vae), within=1e-4)


def test_only_one_process_draws_sheets(two):
    sheets = [line.split() for line in (two / "sheets.txt").read_text().splitlines()]
    assert [step for step, _ in sheets] == ["5", "5"]
    assert len({process for _, process in sheets}) == 1


def test_what_happens_to_one_process_ends_all(two):
    reports = [json.loads((two / f"report-{rank}.json").read_text()) for rank in (0, 1)]
    for report in reports:
        assert report["stopped"] == "KeyboardInterrupt "
        assert report["nan"].startswith(
            "TrainingError the loss is nan at step 2; the gradients' norms: clip "
        )
    assert torch.load(two / "stopped" / "checkpoint.pt", weights_only=True)["step"] == 2


if __name__ == "__main__":
    main(Path(sys.argv[1]))
