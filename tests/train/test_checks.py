"""The checks' promises: they find errors, and their figures are true."""

import re
import time

import pytest
import torch
from torch import nn

from reifusion.model.config import CLIPConfig, ModelConfig, ScheduleConfig, UNetConfig, VAEConfig
from reifusion.train import checks, recipe, vae
from reifusion.train.checkpoint import TrainingError
from reifusion.train.loop import LoopConfig
from reifusion.train.text2image import TextToImage

TINY = ModelConfig(
    name="tiny",
    size=16,
    clip=CLIPConfig(vocab_size=20, context_length=6, width=16, layers=1, heads=2),
    vae=VAEConfig(channels=(8, 16), layers=1, groups=4, scale_factor=1.0),
    unet=UNetConfig(channels=(16, 32), attention=(1, 1), layers=1, heads=(2, 2), context_width=16, groups=4),
    schedule=ScheduleConfig(prediction_type="v_prediction"),
)


@pytest.fixture
def tiny(monkeypatch):
    """Makes every recipe a recipe for a tiny model."""
    monkeypatch.setattr(checks, "model_config", lambda recipe: TINY)


def read(what: str, *overrides: str) -> recipe.Recipe:
    return recipe.read(what, None, overrides)


# Gradients


TERMS = {
    "vae": ("l1", "mse", "edges", "kl"),
    "sharpen": ("l1", "mse", "edges", "opinion", "matching", "critic"),
    "text2image": ("epsilon", "v_prediction", "flow"),
    "lora": ("epsilon", "v_prediction", "flow"),
}


@pytest.mark.parametrize("what", TERMS)
def test_gradients_of_every_term_are_those_of_finite_differences(what):
    said = checks.check_gradients(read(what)).splitlines()[1:]
    assert tuple(line.split()[0] for line in said) == TERMS[what]


class Halved(torch.autograd.Function):
    """x², with half its gradient."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.pow(2)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0]


def test_wrong_gradients_are_found():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    x = torch.randn(5, 3, dtype=torch.float64)
    before = [p.clone() for p in model.parameters()]
    errors = checks.compare_gradients(
        model,
        {
            "right": lambda net: net(x).pow(2).mean(),
            "halved": lambda net: Halved.apply(net(x)).mean(),
            "forgotten": lambda net: net.get_submodule("1")(net.get_submodule("0")(x).detach()).pow(2).mean(),
        },
    )
    assert errors["right"] < 1e-7
    assert errors["halved"] == pytest.approx(0.5, abs=1e-3)
    assert errors["forgotten"] > 0.01
    assert all(map(torch.equal, before, model.parameters()))


def test_wrong_gradient_of_a_recipe_is_an_error_that_names_the_term(monkeypatch, tiny):
    right = vae.terms

    def wrong(x, y, mean, log_variance):
        return right(x, y, mean, log_variance) | {"mse": Halved.apply(y - x).mean()}

    monkeypatch.setattr(vae, "terms", wrong)
    with pytest.raises(TrainingError, match="gradients of mse are not those of finite differences"):
        checks.check_gradients(read("vae"))


@pytest.mark.parametrize("size", ["mini", "sd15"])
def test_narrow_model_has_the_plan_of_the_wide_one(size):
    from reifusion.model.diffusion import plan
    from reifusion.train.sizes import SIZES

    wide = SIZES[size]
    slim = checks.narrow(wide)
    for rows, others in zip(plan(wide.unet), plan(slim.unet), strict=True):
        assert re.findall("[a-z]+", str(rows)) == re.findall("[a-z]+", str(others))
    assert slim.unet.linear_projection == wide.unet.linear_projection
    assert slim.clip.activation == wide.clip.activation
    assert sum(p.numel() for p in TextToImage(slim).parameters()) < 2e6


# Learning


@pytest.mark.parametrize("what", ["vae", "text2image"])
def test_one_batch_can_be_learned(tiny, what):
    assert checks.overfit_one(read(what, "crop=8" if what == "vae" else "size=16")).endswith("it can learn")


def test_sharpening_cannot_be_overfitted():
    with pytest.raises(recipe.RecipeError, match="against each other"):
        checks.overfit_one(read("sharpen"))


def test_model_that_cannot_learn_is_an_error(tiny, monkeypatch):
    monkeypatch.setattr(
        TextToImage, "forward", lambda self, x, tokens, t: x * self.diffusion.conv_out.bias[0]
    )
    with pytest.raises(TrainingError, match=r"from .* to .* in 500 steps, not to nearly 0"):
        checks.overfit_one(read("text2image"))


def test_overfitting_sees_the_same_batch_and_noise_at_every_step():
    seen = []

    def objective(network, done, generator, part):
        seen.append((done, torch.rand(1, generator=generator).item(), part.count))
        return network(torch.ones(1, 1)).pow(2).sum(), {}

    torch.manual_seed(0)
    curve = checks.overfit(nn.Linear(1, 1), objective, lr=0.1)
    assert len(set(seen)) == 1 and len(curve) == len(seen) < 500
    assert curve[-1] <= curve[0] / 20 and min(curve[:-1]) > curve[0] / 20


# Cost


def test_cost_is_counted_and_measured_and_changes_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    model[0].bias.requires_grad_(False)
    before = [p.clone() for p in model.parameters()]

    def objective(network, done, generator, part):
        time.sleep(0.05)
        x = part.of(torch.randn(32, 64, generator=generator))
        return network(x).pow(2).mean(), {"samples": float(len(x))}

    for muon, states in ((False, 2), (True, 1)):
        config = LoopConfig(steps=1000, muon=muon, mixed_precision="no")
        found = checks.cost(model, objective, config)
        weights, biases = 2 * 64 * 128, 64
        assert found.parameters == weights + biases + 128 and found.trained == weights + biases
        assert found.memory["weights"] == 4 * found.parameters
        assert found.memory["gradients"] == found.memory["average"] == 4 * found.trained
        # Muon keeps one number per weight of a matrix; AdamW keeps two per weight, and counts of steps.
        expected = 4 * (states * weights + 2 * biases)
        assert expected <= found.memory["optimizer"] <= expected + 64
        # The backward pass needs the input and both layers' outputs (the output of ReLU, not its input).
        assert found.memory["activations"] == 4 * 32 * (64 + 128 + 64)
        assert 0.05 <= found.seconds < 10 and found.samples == 32 and found.steps == 1000
        assert "16,576, of which 16,448 are trained" in str(found) and "1,000 steps" in str(found)
    assert all(map(torch.equal, before, model.parameters()))
    assert all(p.grad is None for p in model.parameters())


def test_cost_of_a_run_against_the_clock_is_what_it_can_do_in_that_time():
    def rows(minutes: float) -> str:
        return str(checks.Cost(10, 10, {}, 0.5, 1000, 32.0, minutes))

    assert rows(2.0).endswith("2 minutes      240 steps, 7,680 samples")
    assert rows(60.0).endswith("1,000 steps    0.14 hours")  # its steps end it before its time


def test_gradient_checkpointing_counts_all_inputs_and_one_row(tiny):
    def activations(said: str) -> float:
        (line,) = [line for line in said.splitlines() if line.startswith("activations")]
        return float(line.split()[1].replace(",", ""))

    usual, saving = (
        activations(checks.dry_run(read("text2image", "batch=4", f"gradient_checkpointing={flag}")))
        for flag in ("false", "true")
    )
    assert 0.1 * usual < saving < 0.5 * usual


@pytest.mark.parametrize("what", TERMS)
def test_dry_run_of_a_recipe_is_a_table(what, tiny, monkeypatch):
    if what == "lora":
        tiny = TextToImage(TINY)
        networks = {"clip": tiny.clip, "diffusion": tiny.diffusion}
        monkeypatch.setattr(checks, "load", lambda *_, **__: (TINY, networks, None))
    said = checks.dry_run(read(what, "steps=7200", "batch=2")).splitlines()
    names = ["parameters", "weights", "gradients", "optimizer", "average", "activations", "in all", "a step"]
    assert [line[:14].strip() for line in said] == [*names, "7,200 steps"]
    total, trained = (int(word.strip(",").replace(",", "")) for word in (said[0].split()[i] for i in (1, 4)))
    assert (trained < total / 2) == (what == "lora")
    assert (trained == total) == (what in ("vae", "text2image"))


def test_kept_counts_each_storage_once_and_only_the_largest_row():
    wide, narrow = nn.Linear(8, 32, bias=False), nn.Linear(32, 8, bias=False)
    x = torch.randn(4, 8)
    model = nn.ModuleList([wide, narrow])
    assert checks.kept(model, lambda: (wide(x) + wide(x)).sum()) == 4 * (4 * 8)

    def both():
        return narrow(wide(x).exp()).exp().sum()  # keeps x, exp(…) and exp(…)

    assert checks.kept(model, both) == 4 * (4 * 8 + 4 * 32 + 4 * 8)
    # The input of `narrow` counts in any case, and `narrow` itself keeps nothing else.
    assert checks.kept(model, both, [wide, narrow]) == 4 * (4 * 8 + 4 * 32 + 4 * 8) + 4 * 4 * 32
    assert "forward" not in vars(wide)
