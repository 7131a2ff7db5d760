"""The checks' promises: they find errors, and their figures are true."""

import re
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

from reifusion.model.attention import SelfAttention
from reifusion.model.config import CLIPConfig, ModelConfig, ScheduleConfig, UNetConfig, VAEConfig
from reifusion.model.tensors import ModelError
from reifusion.train import checks, price, recipe, vae
from reifusion.train.checkpoint import TrainingError
from reifusion.train.images import DataError
from reifusion.train.keys import RecipeError
from reifusion.train.loop import LoopConfig
from reifusion.train.text2image import TextToImage
from reifusion.train.vae_file import save_vae

TINY = ModelConfig(
    name="tiny",
    size=16,
    clip=CLIPConfig(vocab_size=20, context_length=6, width=16, layers=1, heads=2),
    vae=VAEConfig(channels=(8, 16), layers=1, groups=4, scale_factor=1.0),
    unet=UNetConfig(channels=(16, 32), attention=(1, 1), layers=1, heads=(2, 2), context_width=16, groups=4),
    schedule=ScheduleConfig(prediction_type="v_prediction"),
)


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Makes every recipe a recipe for a tiny model; returns the file of its VAE."""
    for module in (checks, price):
        monkeypatch.setattr(module, "model_config", lambda recipe: TINY)
    save_vae(vae.VAE(TINY.vae), tmp_path / "vae.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "vae.safetensors"


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


def test_attention_costs_what_it_costs_in_training_without_a_weight_for_each_pair_of_tokens():
    model, length = SelfAttention(2, 8), 600

    def objective(network, done, generator, part):
        return network(part.of(torch.ones(1, length, 8))).square().mean(), {"samples": 1.0}

    found = checks.cost(model, objective, LoopConfig(steps=10, mixed_precision="no"))
    assert found.memory["activations"] < 4 * length * length  # a single head's weights


def test_cost_of_a_run_against_the_clock_is_what_it_can_do_in_that_time():
    def rows(minutes: float | None, **more: float) -> str:
        return str(checks.Cost(10, 10, {}, 0.5, 1000, 32.0, minutes, **more))

    assert rows(2.0).endswith("2 minutes      240 steps, 7,680 samples")
    assert rows(60.0).endswith("1,000 steps    0.14 hours")  # its steps end it before its time
    # 20 of 120 seconds are gone before; of the others, half are for sheets, one for each minute of steps.
    slow = {"before": 20.0, "sheet": 60.0, "checkpoint_minutes": 1.0}
    assert rows(2.0, **slow).endswith("2 minutes      100 steps, 3,200 samples")
    # 20 s, 500 s of steps, and sheets after 12, 72, … 492 s of them and at the end
    assert rows(None, **slow).endswith(f"1,000 steps    {(20 + 500 + 10 * 60) / 3600:.2f} hours")
    # A run that is over before its first checkpoint has one sheet.
    soon = slow | {"checkpoint_minutes": 100.0}
    assert rows(None, **soon).endswith(f"1,000 steps    {(20 + 500 + 60) / 3600:.2f} hours")


def test_a_training_that_changes_on_the_way_costs_what_its_parts_do(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(checks, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def objective(network, done, generator, part):
        count = 4 if done < 0.5 else 1
        now[0] += 0.02 if done < 0.5 else 0.1
        return network(part.of(torch.ones(count, 64))).pow(2).mean(), {"samples": float(count)}

    model, moments = nn.Linear(64, 64), ((0.2, 0.75), (1.0, 0.25))
    config = LoopConfig(steps=100, mixed_precision="no")
    by_steps = checks.cost(model, objective, config, moments=moments)
    assert by_steps.seconds == pytest.approx(0.75 * 0.02 + 0.25 * 0.1)
    assert by_steps.samples == pytest.approx(0.75 * 4 + 0.25)
    by_clock = checks.cost(model, objective, replace(config, minutes=1.0), moments=moments)
    assert by_clock.seconds == pytest.approx(80 / 3200)  # in 80 s, 3000 + 200 steps
    assert by_clock.samples == pytest.approx((3000 * 4 + 200) / 3200)
    # The larger of the two moments' needs.
    assert by_steps.memory["activations"] == 4 * 4 * 64 + 4 * 4 * 64


def test_gradient_checkpointing_counts_all_inputs_and_one_row(tiny):
    def activations(said: str) -> float:
        (line,) = [line for line in said.splitlines() if line.startswith("activations")]
        return float(line.split()[1].replace(",", ""))

    usual, saving = (
        activations(
            price.dry_run(read("text2image", f"vae={tiny}", "batch=4", f"gradient_checkpointing={flag}"))
        )
        for flag in ("false", "true")
    )
    assert 0.1 * usual < saving < 0.5 * usual


@pytest.mark.parametrize("what", TERMS)
def test_dry_run_of_a_recipe_is_a_table(what, tiny, monkeypatch):
    keys = ["steps=7200", "batch=2"]
    if what == "lora":
        networks = {name: network for name, network in TextToImage(TINY).named_children()}
        monkeypatch.setattr(checks, "load", lambda *_, **__: (TINY, networks, None))
        monkeypatch.setattr(price, "load_vae", lambda *_: vae.VAE(TINY.vae))
        own_pictures(tiny.parent / "own", 3)
        keys += ["data=own"]
    keys += {"text2image": [f"vae={tiny}"], "sharpen": [f"start={tiny}"]}.get(what, [])
    said = price.dry_run(read(what, *keys)).splitlines()
    names = ["parameters", "weights", "gradients", "optimizer", "average", "activations"]
    names += ["for sheets"] * (what == "text2image") + ["in all", "a step"]
    names = ["pictures"] * (what == "lora") + names + ["encoding"] * (what == "lora")
    names += ["a sheet"] * (what in ("text2image", "lora"))
    assert [line[:14].strip() for line in said] == [*names, "7,200 steps"]
    words = next(line for line in said if line.startswith("parameters")).split()
    total, trained = (int(words[i].replace(",", "")) for i in (1, 4))
    assert (trained < total / 2) == (what == "lora")
    assert (trained == total) == (what in ("vae", "text2image"))


def test_the_minutes_of_the_mini_s_own_scenes_are_not_all_for_steps(tiny, monkeypatch):
    def row(*keys: str) -> str:
        said = price.dry_run(read("text2image", "batch=2", "minutes=200", f"vae={tiny}", *keys))
        return next((line for line in said.splitlines() if line.startswith("encoding")), "")

    assert row("data=emoji").split()[1:3] == ["1.8e+03", "s,"]  # 15 % of the time
    own_pictures(tiny.parent / "own", 3)
    assert float(row(f"data={tiny.parent / 'own'}").split()[1]) < 60


def own_pictures(folder, count: int) -> None:
    folder.mkdir()
    for i in range(count):
        Image.new("RGB", (16, 16), (50 * i, 0, 0)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"red {i}")


@pytest.mark.parametrize(
    ("what", "keys", "error", "says"),
    [
        ("text2image", ["data=nowhere/at/all"], DataError, "nowhere/at/all does not exist"),
        ("text2image", ["data=empty"], DataError, "holds no .jpg"),
        ("text2image", ["data=one", "validation=0.1"], RecipeError, "only one picture"),
        (
            "text2image",
            ["data=one", "validation_data=./none"],
            DataError,
            "none is not a file or folder here",
        ),
        ("text2image", ["data=one", "regularisation=empty"], DataError, "empty holds no"),
        ("text2image", ["data=one", "caption_column=words"], DataError, "has no column 'words'"),
        ("text2image", ["data=one", "prompts=['none.txt']"], RecipeError, "none.txt cannot be read"),
        ("text2image", ["data=one", "vae=none.safetensors"], ModelError, "none.safetensors"),
        ("text2image", ["data=one", "vae=mini"], ModelError, "other sizes than the VAE of tiny"),
        ("text2image", ["data=one", "vae="], RecipeError, "text2image needs a VAE"),
        ("vae", ["data=empty"], DataError, "holds no .jpg"),
        ("vae", ["data=one", "channels=[64]"], RecipeError, "a VAE has neither a U-Net"),
        ("sharpen", ["data=one"], RecipeError, "sharpening needs a trained VAE"),
        ("lora", [], RecipeError, "a LoRA learns from your own pictures"),
        ("inversion", ["data=one", "word=cat"], RecipeError, "'cat' is a word that the model knows already"),
    ],
)
def test_a_dry_run_finds_what_would_fail_later(what, keys, error, says, tiny):
    own_pictures(tiny.parent / "one", 1)
    (tiny.parent / "empty").mkdir()
    vae = [f"vae={tiny}"] if what == "text2image" else []
    with pytest.raises(error, match=re.escape(says)):
        price.dry_run(read(what, *vae, *keys))
    assert not list(tiny.parent.glob("runs/*/*"))  # and leaves nothing behind


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
