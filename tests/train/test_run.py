"""Every built-in recipe, followed for a few steps from its command to the trained file."""

import json
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

import reifusion
from reifusion.model.config import MINI, CLIPConfig, ModelConfig, UNetConfig, VAEConfig
from reifusion.model.model_loader import ModelError, build
from reifusion.train import recipe as recipes
from reifusion.train import sizes, watch
from reifusion.train.__main__ import main
from reifusion.train.material import captioned_latents
from reifusion.train.mini import material
from reifusion.train.vae_file import load_vae, save_vae
from reifusion.weights import info, save
from reifusion.weights import vae as weights_vae
from tests.sprites import prepared_library
from tests.tiny import WORDS

# It has SD 1.5's vocabulary and VAE factor, which its recipes rely on, and is small otherwise.
SMALL_SD = ModelConfig(
    name="small-sd",
    size=64,
    clip=CLIPConfig(width=16, layers=1, heads=2),
    vae=VAEConfig(channels=(8, 8, 8, 8), layers=1, groups=4),
    unet=UNetConfig(channels=(8, 16), attention=(1, 0), layers=1, heads=(2, 2), context_width=16, groups=4),
)

SMALL_MINI = replace(
    MINI,
    clip=replace(MINI.clip, width=32, layers=1, heads=2),
    vae=replace(MINI.vae, channels=(8, 8, 16, 16), groups=4),
    unet=replace(MINI.unet, channels=(64, 64), attention=(1, 1), heads=(1, 1), context_width=32),
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(6):
        picture = Image.new("RGB", (160, 128 + 16 * (i % 2)), "white")
        ImageDraw.Draw(picture).ellipse([20 + 5 * i, 20, 100, 110], ("red", "green", "blue")[i % 3])
        picture.save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a {('red', 'green', 'blue')[i % 3]} ball")
    return folder


@pytest.fixture(scope="module")
def small_sd(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "small.safetensors"
    save(SMALL_SD, build_random(SMALL_SD), path)
    return path


def build_random(config):
    models = build(config)
    for network in models.values():
        network.to_empty(device="cpu")
        for p in network.parameters():
            torch.nn.init.normal_(p, std=0.1)
    return models


def draw(pipe, prompt):
    picture = pipe.generate(prompt, seed=1, steps=2, progress=False)
    assert isinstance(picture, Image.Image)
    return picture


@pytest.mark.slow
def test_mini_from_the_vae_to_a_picture(tmp_path, pictures, monkeypatch):
    # A narrow mini and sheets of two prompts: only the steps from recipe to file are tested here.
    monkeypatch.setitem(sizes.SIZES, "mini", SMALL_MINI)
    monkeypatch.setattr(watch, "MANY", {float("inf"): 2})
    vae, model = tmp_path / "vae.safetensors", tmp_path / "model.safetensors"
    few = [f"data={pictures}", "steps=2", "batch=2", "log_every=1"]
    few += ["compile=false"]
    code = main(["vae", "--config", "mini-vae", *few, "crop=32", f"folder={tmp_path}/v", f"out={vae}"])
    assert code == 0
    sharp = tmp_path / "sharp.safetensors"
    code = main(
        ["sharpen", "--config", "mini-sharpen", *few, f"start={vae}", f"folder={tmp_path}/s", f"out={sharp}"]
    )
    assert code == 0 and halves_that_differ(load_file(vae), load_file(sharp)) == {"decoder"}
    code = main(
        ["text2image", "--config", "mini", *few, f"vae={sharp}", f"folder={tmp_path}/t", f"out={model}"]
    )
    assert code == 0
    assert draw(reifusion.load(model), "a red ball").size == (256, 256)
    rows = [json.loads(line) for line in (tmp_path / "t" / "training.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1] and all(row["loss"] > 0 for row in rows)
    assert list((tmp_path / "t").glob("sheet-*.png"))
    # Then it is trained further, by rectified flow.
    flow = tmp_path / "flow.safetensors"
    more = [*few, f"vae={model}", f"folder={tmp_path}/f", f"out={flow}"]
    assert main(["text2image", "--config", "mini-flow", *more]) == 0
    assert info(flow).config.schedule.prediction_type == "flow"
    assert draw(reifusion.load(flow), "a ball").size == (256, 256)


@pytest.mark.slow
def test_train_mini_from_the_drawings_in_the_minutes_that_it_is_given(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sizes.SIZES, "mini", SMALL_MINI)
    monkeypatch.setattr(watch, "MANY", {float("inf"): 2})
    monkeypatch.setattr(material, "FOR_THE_VAE", 20)
    monkeypatch.setattr(material, "SHARD", 4)
    monkeypatch.setenv("REIFUSION_CACHE", str(tmp_path))
    prepared_library(tmp_path / "mini")
    command = ["mini", "--minutes", "0.2", "batch=2", "scenes=12", f"folder={tmp_path}/runs"]
    begun = time.monotonic()
    assert main([*command, "crop=32", f"out={tmp_path}/my.safetensors"]) == 0
    assert time.monotonic() - begun < 120  # 12 seconds of it are training
    for stage in ("mini-laptop-vae", "mini-laptop"):
        rows = [json.loads(row) for row in (tmp_path / "runs" / stage / "training.jsonl").open()]
        assert rows and all(0 < row["loss"] < 10 for row in rows)
    found = info(tmp_path / "my.safetensors")
    assert found.dtype == "int8" and found.config.unet.patch == 2
    assert draw(reifusion.load(tmp_path / "my.safetensors"), "a cat").size == (256, 256)
    # The same command has nothing left to do.
    capsys.readouterr()
    assert main([*command, "crop=32", f"out={tmp_path}/my.safetensors"]) == 0
    said = capsys.readouterr()
    assert f"the VAE is already in {tmp_path}/runs/mini-laptop-vae/vae.safetensors" in said.out
    assert "nothing is left to train" in said.err and "minutes are over" in said.err
    # Trained further from its file, it keeps its VAE.
    more = [*command, f"start={tmp_path}/my.safetensors", f"out={tmp_path}/more.safetensors"]
    assert main([*more, f"folder={tmp_path}/more", "steps=2"]) == 0
    assert f"the VAE is that of {tmp_path}/my.safetensors" in capsys.readouterr().out
    one, other = load_file(tmp_path / "my.safetensors"), load_file(tmp_path / "more.safetensors")
    assert halves_that_differ(one, other) == {"clip", "diffusion"}


def test_a_run_that_resumes_has_the_scenes_of_before(tmp_path, monkeypatch):
    """However many there would be time for now."""
    time_for = [7]

    def encode(encoder, scenes, folder, device, seconds):
        return torch.zeros(min(len(scenes), 99 if seconds is None else time_for.pop()), 4, 2, 2)

    monkeypatch.setattr(material, "encode", encode)
    captions: Any = [f"a cat {i}" for i in range(30)]
    library: Any = None
    scenes = material.Bank(library, captions, captions)
    vae: Any = SimpleNamespace(encoder=None)
    recipe = recipes.read("text2image", None, ["vae=mini", "minutes=3", f"folder={tmp_path}"])

    def count() -> int:
        found, _ = captioned_latents(recipe, scenes, SMALL_MINI, vae, WORDS)
        return len(found)

    assert count() == 7
    (tmp_path / "checkpoint.pt").touch()
    time_for.append(20)
    assert count() == 7
    (tmp_path / "checkpoint.pt").unlink()  # to train anew
    assert count() == 20
    (tmp_path / "checkpoint.pt").touch()
    given = ["vae=mini", "minutes=3", f"folder={tmp_path}", "allow_changes=true"]
    recipe = recipes.read("text2image", None, given)
    time_for.append(9)
    assert count() == 9


@pytest.mark.parametrize("minutes", ["0", "-3", "nan", "inf"])
def test_minutes_that_nothing_can_be_done_in_are_refused(minutes, capsys):
    assert main(["mini", f"--minutes={minutes}"]) == 2
    assert "--minutes must be above 0" in capsys.readouterr().err


def halves_that_differ(one, other):
    return {name.split(".")[0] for name in one if not torch.equal(one[name], other[name])}


def test_a_whole_model_is_sharpened_and_is_whole_again(tmp_path, pictures, small_sd):
    out = tmp_path / "sharp.safetensors"
    few = [f"data={pictures}", f"start={small_sd}", "steps=2", "batch=2", "size=64"]
    assert main(["sharpen", *few, f"folder={tmp_path}/r", f"out={out}"]) == 0
    assert halves_that_differ(load_file(small_sd), load_file(out)) == {"decoder"}
    assert reifusion.load(out).config == SMALL_SD


def test_a_recipe_of_sd_on_a_model_with_its_vocabulary(tmp_path, pictures, small_sd):
    out = tmp_path / "tuned.safetensors"
    few = [f"data={pictures}", f"start={small_sd}", "size=64", "steps=2", "batch=4", "accumulate=2"]
    assert main(["text2image", "--config", "sd15-finetune", *few, f"folder={tmp_path}/r", f"out={out}"]) == 0
    before, after = (reifusion.load(path, dtype="fp32") for path in (small_sd, out))
    assert after.config == SMALL_SD
    same = [
        torch.equal(p.bfloat16(), q.bfloat16())
        for p, q in zip(before.models["clip"].parameters(), after.models["clip"].parameters(), strict=True)
    ]
    assert all(same)  # the recipe leaves the text encoder as it is


@pytest.mark.parametrize("recipe", ["mini-lora", "sd15-lora"])
def test_a_lora_changes_the_picture(tmp_path, pictures, small_sd, recipe):
    out = tmp_path / "lora.safetensors"
    few = [f"data={pictures}", f"start={small_sd}", "size=64", "steps=3", "batch=2", "lr=0.05", "warmup=1"]
    assert main(["lora", "--config", recipe, *few, f"folder={tmp_path}/r", f"out={out}"]) == 0
    from reifusion.weights.lora import apply, load_lora

    pipe = reifusion.load(small_sd, dtype="fp32")
    before = draw(pipe, "a ball").tobytes()
    apply(pipe, load_lora(out))
    assert draw(pipe, "a ball").tobytes() != before


def test_what_cannot_be_done_is_one_sentence(tmp_path, pictures, capsys):
    for arguments, code, says in (
        (["text2image", "--config", "mini", "vae="], 2, "needs a VAE"),
        (["text2image", "--config", "mini", "model=maxi"], 2, "no model 'maxi'"),
        (["text2image", "--config", "mini", f"vae={tmp_path}/none.safetensors"], 2, "none.safetensors"),
        (["sharpen"], 2, "needs a trained VAE"),
        (["sharpen", f"start={tmp_path}/none.safetensors"], 2, "none.safetensors"),
        (["lora", "data=emoji"], 2, "your own pictures"),
        (["lora", f"data={tmp_path}/nothing"], 1, "does not exist"),
        (["lora", f"data={pictures}", "targets=['nowhere']"], 2, "no layer matches 'nowhere'"),
    ):
        assert main([*arguments, f"folder={tmp_path}/run"]) == code, arguments
        error = capsys.readouterr().err.strip().splitlines()
        assert len([line for line in error if line.startswith("reifusion: ")]) >= 1 and says in error[-1]


def test_a_vae_is_read_from_its_own_file_and_out_of_a_model(tmp_path):
    vae = load_vae("mini", reifusion.load().config)
    save_vae(vae, tmp_path / "vae.safetensors")
    again = load_vae(str(tmp_path / "vae.safetensors"), reifusion.load().config)
    assert all(torch.equal(a, b) for a, b in zip(vae.parameters(), again.parameters(), strict=True))
    weights_vae.save_vae(weights_vae.load_vae("mini"), tmp_path / "folder", "diffusers")
    theirs = load_vae(str(tmp_path / "folder"), reifusion.load().config)
    assert all(torch.equal(a, b) for a, b in zip(vae.parameters(), theirs.parameters(), strict=True))
    with pytest.raises(ModelError, match="other sizes"):
        load_vae(str(tmp_path / "vae.safetensors"), SMALL_MINI)
