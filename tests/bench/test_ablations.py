"""The ablations: each row is one switch, and the measure tells good pictures from bad ones."""

import random

import pytest
import torch

from bench import ablations
from reifusion.train import shapes
from reifusion.train.sizes import TINY
from reifusion.train.vae import VAE
from reifusion.train.vae_file import save_vae

pytestmark = pytest.mark.slow


def test_every_row_is_a_recipe_that_differs_in_its_own_keys_only(tmp_path):
    for name, changes in ablations.ROWS.items():
        one, base = (ablations.of_row(row, 1, tmp_path / "vae", tmp_path) for row in (name, ""))
        settings = [
            {**vars(r), **vars(r.training), **vars(r.training.loop), "training": 0, "loop": 0}
            for r in (one, base)
        ]
        differ = {key for key in settings[0] if settings[0][key] != settings[1][key]}
        assert differ - {"folder", "out"} == {change.partition("=")[0] for change in changes}
        assert one.training.loop.minutes is None and one.training.loop.seed == 1


def test_a_row_with_a_vae_of_its_own_changes_one_key_of_it(tmp_path, monkeypatch):
    asked: list = []
    monkeypatch.setattr(ablations, "run", asked.append)
    files = [ablations.trained_vae(row, tmp_path) for row in ("", "AdamW", *ablations.VAES)]
    assert files[0] == files[1] and len(set(files)) == 1 + len(ablations.VAES)
    usual = asked[0].training
    assert usual.loop.steps == ablations.VAE_STEPS and usual.loop.minutes is None
    for row, recipe in zip(ablations.VAES, asked[2:]):
        assert not ablations.ROWS[row]
        differ = {key for key, value in vars(usual).items() if vars(recipe.training)[key] != value}
        assert differ == {ablations.VAES[row][0].partition("=")[0]}


def test_the_prompts_ask_for_everything_once_on_each_side():
    questions = ablations.asked()
    assert len({q.prompt for q in questions}) == len(questions) == 128
    assert sum(not q.known for q in questions) == 16
    assert {q.prompt for q in questions} >= {"a red star on the left", "an orange fish on the right"}


def test_the_judge_learns_from_true_drawings(monkeypatch):
    judge = ablations.trained_judge(steps=150)
    pictures, answers = ablations.true_drawings(random.Random(5), 100)
    assert ablations.right(judge, pictures, answers).mean() > 0.3  # by chance: 1 in 128
    assert ablations.right(judge, pictures, answers.flip(0)).mean() < 0.2


def test_the_distance_is_that_of_two_normal_distributions():
    class Seen(torch.nn.Module):
        def forward(self, x):
            return x, []

    draw = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, 4, generator=draw, dtype=torch.float64)
    assert ablations.distance(Seen(), x, x) < 1e-3
    # Of N(0, 1) and N(2, 3²), in each of 4 dimensions: √(4 · ((2 − 0)² + (3 − 1)²))
    assert ablations.distance(Seen(), x, 3 * x.flip(0) + 2) == pytest.approx(32**0.5, rel=0.02)


def test_a_difference_counts_if_it_is_larger_than_that_of_seeds():
    def runs(*distances):
        return {str(k): {"distance": value} for k, value in enumerate(distances)}

    base = runs(10.0, 11.0, 12.0)
    assert ablations.verdict(runs(5.0, 6.0, 7.0), base, "distance") == "lower"
    assert ablations.verdict(runs(15.0, 16.0, 17.0), base, "distance") == "higher"
    assert ablations.verdict(runs(10.5, 11.5, 12.5), base, "distance") == "not to be told apart"
    assert ablations.verdict(runs(5.0), base, "distance") == "1 of 3 seeds"


def test_a_run_is_trained_and_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "COUNT", 80)
    monkeypatch.setattr(
        ablations, "SMALL", ("channels=[32]", "steps=2", "minutes=none", "batch=4", "validation=0")
    )
    monkeypatch.setattr(ablations, "DRAWING", {"steps": 1, "cfg": 2.0, "progress": False})
    vae, work = tmp_path / "vae.safetensors", tmp_path / "work"
    save_vae(VAE(TINY.vae), vae)
    real = ablations.true_drawings(random.Random(0), 80)[0]
    for row in ("", "flow"):
        found = ablations.measured(row, 0, vae, work, ablations.Judge(), real)
        assert 0 <= found["right"] <= 1 and found["distance"] > 0 and found["cpu_seconds"] > 0
    assert not list(work.rglob("checkpoint.pt"))
