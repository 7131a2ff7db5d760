"""The toy world: what is drawn in it is right, and what is said of it is measured."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reifusion import cli
from reifusion.explain import toy
from reifusion.model.ddpm import DDPMSampler, Sampler
from reifusion.model.flow import FlowSampler


@pytest.mark.parametrize("world", toy.WORLDS)
def test_the_data_are_centred_and_of_variance_one(world):
    points, labels = toy.WORLDS[world]()
    assert points.mean(0).abs().max() < 1e-12 and points.square().mean() == pytest.approx(1)
    assert labels.bincount().tolist() == [200, 200]


@pytest.mark.parametrize("sampler", [DDPMSampler(), FlowSampler()])
@pytest.mark.parametrize("t", [30, 400, 900])
def test_the_best_network_says_the_mean_of_what_training_would_ask_for(sampler: Sampler, t):
    """Against a plain average over drawn data near a place, without any formula."""
    points, _ = toy.moons()
    generator = torch.Generator().manual_seed(3)
    x0 = points.repeat(5000, 1)
    x0 = x0 + toy.SPREAD * torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    eps = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    x = sampler.add_noise(x0, t, eps)
    target = sampler.target(x0, t, eps)
    best = toy.Best(points, sampler)
    for place in ([0.3, 0.4], [-0.8, 0.1]):
        here = torch.tensor([place], dtype=torch.float64)
        near = (x - here).norm(dim=1) < 0.06
        assert near.sum() > 500
        mean, spread = target[near].mean(0), target[near].std(0) / near.sum().sqrt()
        assert ((best(here, t)[0] - mean).abs() < 5 * spread + 0.05).all()


def test_what_follows_the_best_network_lands_on_the_data():
    points, _ = toy.moons()
    noise = toy.some_noise(300, 0)
    for sampler in (toy.sampler_of("ddim", 100), toy.sampler_of("ddpm", 200), FlowSampler()):
        if sampler.name == "flow":
            sampler.set_inference_timesteps(100)
        drawn = toy.draw(sampler, toy.Best(points, sampler), noise)[-1]
        distances = toy.away(drawn, points)
        assert distances.mean() < 2 * toy.SPREAD and (distances < 4 * toy.SPREAD).double().mean() > 0.97
        # … and on all of them: each fifth of the curve has its share
        nearest = (drawn[:, None] - points).norm(dim=-1).argmin(1)
        shares = torch.histc(nearest.double(), 5, 0, 400) / len(drawn)
        assert ((shares - 0.2).abs() < 0.09).all()


@pytest.mark.slow
def test_solvers_have_the_orders_that_they_are_known_for():
    slopes = toy.orders(steps=(9, 19, 40, 60)).numbers["slopes"]
    assert slopes["euler"] == pytest.approx(-1, abs=0.25)
    assert slopes["heun"] == pytest.approx(-2, abs=0.35)
    assert slopes["dpmpp_2m"] == pytest.approx(-2, abs=0.35)


@pytest.mark.slow
def test_training_comes_near_the_least_loss_and_draws_the_curve():
    exhibit = toy.learning(steps=600)
    numbers = exhibit.numbers
    assert numbers["least"] < numbers["loss"] < 1.25 * numbers["least"]
    first, *_, last = numbers["distance"].values()
    assert last < 0.3 < first
    assert f"{numbers['least']:.2f}" in exhibit.alt


def test_no_network_is_better_than_the_best():
    points, _ = toy.spiral()
    best = toy.Best(points, DDPMSampler())
    least = toy.loss_of(best, points)

    def changed(factor: float, shift: float) -> toy.Network:
        return lambda x, t: factor * best(x, t) + shift

    for factor, shift in ((1, 0.05), (1, -0.05), (0.95, 0), (1.05, 0)):
        assert toy.loss_of(changed(factor, shift), points) > least


def test_paths_bend_and_guidance_pushes_as_the_captions_say():
    bends = toy.paths().numbers["bend"]
    assert bends["DDPM"] > 3 > bends["DDIM"] > 1 and 1 < bends["rectified flow"] < 3
    scales = toy.guidance(scales=(0, 1, 8)).numbers["scales"]
    assert 0.35 < scales[0]["right"] < 0.65 and scales[1]["right"] > 0.95
    assert scales[8]["from_others"] > scales[1]["from_others"]


@pytest.mark.parametrize("world", toy.WORLDS)
def test_noise_hides_the_data_and_lengthens_the_arrows(world):
    arrows = list(toy.noising(world).numbers["arrow"].values())
    assert arrows == sorted(arrows)


def test_the_command_draws_and_refuses(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["explain", "toy", "--show", "noising", "--world", "spiral", "--seed", "2"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("explain/toy-noising-spiral-2.png\n") and "arrows" in said
    with Image.open("explain/toy-noising-spiral-2.png") as picture:
        assert json.loads(picture.info["reifusion-explain"]) and picture.info["Description"]
        assert np.asarray(picture).std() > 10
    for wrong in (["--world", "mars"], ["--show", "nothing"], ["--seed", "-1"]):
        assert cli.main(["explain", "toy", *wrong]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert [path.name for path in Path("explain").iterdir()] == ["toy-noising-spiral-2.png"]
