"""What one sees of a run: its own captions, and losses that can be compared between checkpoints."""

from __future__ import annotations

import json
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, cast

import pytest
import torch
from PIL import Image, ImageDraw

import reifusion
from reifusion.model.config import ScheduleConfig
from reifusion.model.encoder import Encoder
from reifusion.train import run, watch
from reifusion.train.__main__ import main
from reifusion.train.images import DataError, open_pictures
from reifusion.train.keys import RecipeError
from reifusion.train.latents import cache_latents
from reifusion.train.plot import losses, plot
from reifusion.train.sheet import contact_sheet
from reifusion.train.text2image import Latents, forward_process
from reifusion.train.watch import measured_loss, prompts_of_sheet
from reifusion.weights import save
from tests.tiny import SMALL, WORDS, networks

COLOURS = ("red", "green", "blue", "black", "white", "pink")


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, colour in enumerate(COLOURS):
        picture = Image.new("RGB", (32, 32), "grey")
        ImageDraw.Draw(picture).ellipse([4, 4, 28, 28], colour)
        picture.save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a {colour} ball")
    return folder


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.safetensors"
    save(SMALL, networks(SMALL, noise=0.02), path, tokenizer=WORDS)
    return path


# Prompts


def test_prompts_are_own_captions_and_the_seed_alone_decides_which():
    captions = [f"thing {i}" for i in range(100)] + ["", " "]
    few = prompts_of_sheet((), captions, 256, seed=3)
    assert len(few) == 12 and set(few) <= set(captions[:100]) and len(set(few)) == 12
    assert few == prompts_of_sheet((), captions[::-1], 256, seed=3) != prompts_of_sheet((), captions, 256, 4)
    assert (
        len(prompts_of_sheet((), captions, 128, 0)) == 24 and len(prompts_of_sheet((), captions, 512, 0)) == 4
    )
    assert prompts_of_sheet((), ["", ""], 64, 0) == [""]  # pictures without captions
    assert prompts_of_sheet((), None, 512, 0) == ["a red apple", "a cat", "a rocket", "an octopus"]


def test_prompts_that_are_given_are_all_drawn_from_files_too(tmp_path):
    (tmp_path / "mine.txt").write_text("a zork\n\n  two zorks \n", "utf-8-sig")
    given = ("a cat", f"{tmp_path}/mine.txt")
    assert prompts_of_sheet(given, ["a ball"], 512, 0) == ["a cat", "a zork", "two zorks"]
    with pytest.raises(RecipeError, match=r"the prompts in none\.txt cannot be read: No such file"):
        prompts_of_sheet(("none.txt",), None, 64, 0)
    (tmp_path / "mine.txt").write_text("\n \n")
    with pytest.raises(RecipeError, match=r"there are no prompts in .*mine\.txt"):
        prompts_of_sheet(given, None, 64, 0)


def test_words_below_small_pictures_fit(model):
    pipe = reifusion.load(model)
    sheet = contact_sheet(pipe, ["a cat", "a dog"], seeds=1, steps=1)
    assert sheet.size == (2 * 96, 96 + watch.contact_sheet.__globals__["LABEL"])


# The measured loss


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_the_measured_loss_is_the_mean_over_noise_timesteps_and_samples(kind):
    sampler = forward_process(ScheduleConfig(prediction_type=kind))
    data = Latents(torch.zeros(5, 4, 2, 2), torch.zeros(5, 3, dtype=torch.long))

    def offset(x_t, tokens, t):
        """Predicts a target that is off by 1 at high noise, and by 2 at low noise."""
        # Clean latents are zeros, so x_t tells the noise; its targets are then known in closed form.
        high = (t >= 500).float()[:, None, None, None]
        if kind == "flow":
            eps = x_t / (t / 1000)[:, None, None, None]
        else:
            signal, noise = sampler._signal_and_noise(t, x_t)
            eps = x_t / noise
            eps = signal * eps if kind == "v_prediction" else eps
        return eps + 2 - high

    found = measured_loss(offset, data, sampler, batch=16, seed=0)
    assert found["_low_noise"] == pytest.approx(4, rel=1e-3)
    assert found["_high_noise"] == pytest.approx(1, rel=1e-3)
    assert found[""] == pytest.approx(2.5, rel=0.05)
    again = measured_loss(lambda x, w, t: torch.zeros_like(x), data, sampler, 16, 0)
    assert again == measured_loss(lambda x, w, t: torch.zeros_like(x), data, sampler, 16, 0)
    assert again != measured_loss(lambda x, w, t: torch.zeros_like(x), data, sampler, 16, 1)


# Held out


def test_what_is_held_out_is_a_share_by_the_seed_and_in_no_batch(pictures, tmp_path):
    data = cache_latents(
        cast(Encoder, networks(SMALL)["encoder"]),
        open_pictures(pictures),
        32,
        tmp_path / "latents",
        tokenizer=WORDS,
    )
    kept, out = data.split(0.3, seed=1)
    assert len(kept) == 4 and len(out) == 2 and set(kept.captions).isdisjoint(out.captions)
    assert set(kept.captions) | set(out.captions) == set(data.captions)
    assert data.split(0.3, seed=1)[1].captions == out.captions
    assert any(data.split(0.3, seed)[1].captions != out.captions for seed in range(2, 6))
    drawn = kept.latent_batch(torch.Generator().manual_seed(0), 200)[1]
    held = {tuple(WORDS.encode(caption)) for caption in out.captions}
    assert held.isdisjoint(map(tuple, drawn.tolist()))
    assert len(data.split(0.001, 0)[1]) == 1 and len(data.split(0.999, 0)[0]) == 1
    with pytest.raises(DataError, match="there is only one picture, so none can be held out"):
        data.split(0.001, 0)[1].split(0.5, 0)


@pytest.mark.slow
def test_the_losses_of_a_run_are_those_of_the_model_that_it_writes(pictures, model, tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "contact_sheet", lambda *_, **__: Image.new("RGB", (8, 8)))
    others = tmp_path / "others"
    others.mkdir()
    for i in range(4):
        noise = torch.rand(32, 32, 3, generator=torch.Generator().manual_seed(i)).mul(255).byte()
        Image.fromarray(noise.numpy()).save(others / f"{i}.png")
        (others / f"{i}.txt").write_text("a dog")
    folder, out = tmp_path / "run", tmp_path / "out.safetensors"
    keys = [f"start={model}", f"data={pictures}", f"folder={folder}", f"out={out}", "batch=16", "lr=3e-3",
            "warmup=5", "mixed_precision=no", "checkpoint_minutes=0", "log_every=1"]  # fmt: skip
    assert main(["text2image", *keys, "steps=20", f"validation_data={others}"]) == 0
    held_out, seen = losses(folder, "held_out"), losses(folder, "seen")
    assert seen[20] < 0.7 * seen[1] and held_out.keys() == seen.keys()
    pipe = reifusion.load(out, dtype="fp32")

    def network(x, tokens, t):
        return pipe.models["diffusion"](x, pipe.models["clip"](tokens), t)

    for found, source in ((held_out, others), (seen, pictures)):
        latents = tmp_path / f"latents of {source.name}"
        data = cache_latents(
            cast(Encoder, pipe.models["encoder"]), open_pictures(source), 32, latents, tokenizer=WORDS
        )
        sampler = forward_process(pipe.config.schedule)
        assert found[20] == pytest.approx(measured_loss(network, data, sampler, 16, 0)[""], rel=1e-3)
    plot(folder, [], tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as curve:
        assert curve.width > 500


@pytest.mark.slow
def test_a_lora_shows_own_captions_and_what_it_does_not_learn_from(pictures, model, tmp_path, monkeypatch):
    drawn = []

    def sheet(pipe, prompts, **_):
        drawn.append(list(prompts))
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr(watch, "contact_sheet", sheet)
    folder = tmp_path / "run"
    keys = [f"start={model}", f"data={pictures}", f"folder={folder}", "batch=2", "mixed_precision=no"]
    assert main(["lora", *keys, "steps=3", "validation=0.3", "layout=peft", "keep_every=2", "rank=2"]) == 0
    assert len(drawn) == 1 and set(drawn[0]) == {f"a {colour} ball" for colour in COLOURS}
    text2image = [f"folder={tmp_path}/whole" if key.startswith("folder=") else key for key in keys]
    assert main(["text2image", *text2image, "steps=1", "validation=0.3"]) == 0
    assert set(drawn[1]) == set(drawn[0])  # those held out are drawn too
    (shown,) = [row for row in map(json.loads, (folder / "training.jsonl").open()) if "held_out" in row]
    assert shown["step"] == 3 and shown["held_out"] > 0 and shown["seen"] > 0
    assert (folder / "sheet-000003.png").exists()
    assert {p.name for p in folder.glob("*.safetensors")} == {"model.safetensors", "model-000002.safetensors"}
    # Another share would be another set to learn from.
    assert main(["lora", *keys, "steps=4", "validation=0.5", "layout=peft", "rank=2"]) == 1


def test_models_that_are_kept_can_be_drawn_with(pictures, model, tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "contact_sheet", lambda *_, **__: Image.new("RGB", (8, 8)))
    folder = tmp_path / "run"
    keys = [f"start={model}", f"data={pictures}", f"folder={folder}", "batch=2", "mixed_precision=no"]
    assert main(["text2image", *keys, "steps=3", "keep_every=2", "dtype=bf16"]) == 0
    pipe = reifusion.load(folder / "model-000002.safetensors")
    assert pipe.generate("a cat", steps=1, seed=1, progress=False).size == (32, 32)
    assert run.info(str(folder / "model-000002.safetensors")).dtype == "bfloat16"


def test_the_sheet_shows_what_the_file_holds(pictures, model, tmp_path, monkeypatch):
    shown = []

    def sheet(pipe, *_, **__):
        shown.append({name: x.clone() for name, x in pipe.models["diffusion"].state_dict().items()})
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr(watch, "contact_sheet", sheet)
    for dtype in ("bf16", "int8"):
        out = tmp_path / f"{dtype}.safetensors"
        keys = [f"start={model}", f"data={pictures}", f"folder={tmp_path}/{dtype}", "batch=2", "steps=2"]
        assert main(["text2image", *keys, "mixed_precision=no", f"dtype={dtype}", f"out={out}"]) == 0
        held = reifusion.load(out, dtype="fp32").models["diffusion"].state_dict()
        assert all(torch.equal(shown[-1][name], x) for name, x in held.items())


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (["validation=0.1"], "validation is set but would not be used: the mini's own pictures"),
        (["validation=0.1", "validation_data=x", "data=y"], "validation_data has the pictures"),
        (["validation=1"], "validation must be 0 or more and below 1"),
    ],
)
def test_what_could_not_be_held_out_is_refused(keys, says, model, tmp_path, capsys):
    assert main(["text2image", f"start={model}", f"folder={tmp_path}/run", *keys]) == 2
    assert says in capsys.readouterr().err


# Weights & Biases


def test_a_run_is_told_to_weights_and_biases(pictures, tmp_path, monkeypatch):
    """Its own reader of TensorBoard's files does the rest; here it is a stand-in."""
    happened: list[Any] = []

    class Run:
        def __enter__(self):
            happened.append("begun")

        def __exit__(self, *error):
            happened.append(sorted(path.name for path in (tmp_path / "run").glob("sheet*")))

    module = ModuleType("wandb")
    module.__spec__ = ModuleSpec("wandb", None)

    def init(**given: Any) -> Run:
        happened.append(given)
        return Run()

    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    line = [
        "vae",
        f"data={pictures}",
        "size=32",
        "crop=32",
        "batch=2",
        "steps=2",
        "vae_channels=[8, 8]",
        "wandb=trials",
    ]
    for _ in range(2):
        assert main([*line, f"folder={tmp_path / 'run'}", "warmup=1"]) == 0
    first, begun, sheets, again, *_ = happened
    assert first["project"] == "trials" and first["sync_tensorboard"] and first["config"]["size"] == 32
    assert begun == "begun" and sheets == ["sheet-000002.png"]
    assert again["id"] == first["id"] and again["resume"] == "allow"


def test_missing_weights_and_biases_is_said_before_anything_begins(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("reifusion.train.ready.importlib.util.find_spec", lambda name: None)
    assert main(["vae", f"data={pictures}", f"folder={tmp_path / 'run'}", "wandb=trials"]) == 2
    assert "pip install wandb" in capsys.readouterr().err and not (tmp_path / "run").exists()
