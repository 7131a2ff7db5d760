"""A small Stable Diffusion 3 is trained through the mini's loop, and drawn with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import reifusion
from reifusion.families.mini_mm import MINI_MM, MiniMMConfig
from reifusion.model.config import CLIPConfig, VAEConfig
from reifusion.model.tensors import ModelError
from reifusion.train import sizes, watch
from reifusion.train.__main__ import main
from reifusion.train.loop import LoopConfig
from reifusion.train.text2image import Latents, TextToImage, TextToImageTraining, recomputed, train_text2image
from reifusion.train.vae import VAE
from reifusion.train.vae_file import save_vae
from reifusion.weights import info, save
from tests.tiny import assert_same_networks

SMALL = replace(
    MINI_MM,
    size=32,
    clip=CLIPConfig(vocab_size=600, context_length=8, width=16, layers=2, heads=2),
    vae=VAEConfig(channels=(8, 8), layers=1, groups=4),
    unet=replace(
        MINI_MM.unet, layers=2, heads=2, width=32, context_width=16, pooled_width=16, positions=8
    ),
)  # fmt: skip


def test_the_whole_model_has_at_most_thirty_million_parameters():
    networks = reifusion.api.families.build(MINI_MM)
    assert 15e6 < sum(p.numel() for network in networks.values() for p in network.parameters()) < 30e6


def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 6, generator=generator)
    return x, torch.randint(600, (2, 8), generator=generator), torch.tensor([100.0, 700.0])


def test_training_begins_with_a_network_that_says_nothing_and_whose_places_differ():
    model = TextToImage(SMALL)
    assert model(*batch()).eq(0).all()
    places = model.diffusion.get_parameter("position")[0]
    assert torch.unique(places, dim=0).shape == places.shape
    near, far = (places[27] @ places[k] for k in (28, 31))  # of one row
    assert near > far


def test_a_few_steps_learn_a_few_pictures(tmp_path):
    generator = torch.Generator().manual_seed(0)
    data = Latents(
        torch.randn(4, 4, 1, 1, generator=generator).expand(-1, -1, 8, 8).contiguous(),
        torch.randint(600, (4, 8), generator=generator),
    )
    loop = LoopConfig(steps=60, lr=5e-3, warmup=5, ema=0.9, log_every=1)
    training = TextToImageTraining(loop=loop, batch=8, caption_dropout=0.0)
    train_text2image(data, data.tokens[0], SMALL, training, tmp_path)
    losses = [json.loads(row)["loss"] for row in (tmp_path / "training.jsonl").read_text().splitlines()]
    # The noise has variance 1, the pictures as well: to say nothing costs 2.
    assert np.mean(losses[:3]) > 1.5 and np.mean(losses[-10:]) < 0.8 * np.mean(losses[:3])


def test_recomputing_changes_no_gradient():
    gradients = []
    for again in (False, True):
        torch.manual_seed(0)
        model = TextToImage(SMALL)
        for p in model.parameters():
            p.data += 0.1 * torch.randn_like(p)
        if again:
            with recomputed(model.diffusion):
                model(*batch()).pow(2).mean().backward()
        else:
            model(*batch()).pow(2).mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) > 40
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_from_recipe_to_picture(tmp_path, monkeypatch):
    monkeypatch.setitem(sizes.SIZES, "mini-mm", SMALL)
    monkeypatch.setattr(watch, "MANY", {float("inf"): 2})
    (tmp_path / "pictures").mkdir()
    for name, colour in ("a red picture", "red"), ("a blue picture", "blue"):
        Image.new("RGB", (48, 48), colour).save(tmp_path / "pictures" / f"{name}.png")
        (tmp_path / "pictures" / f"{name}.txt").write_text(name)
    save_vae(VAE(SMALL.vae), tmp_path / "vae.safetensors")
    model = tmp_path / "model.safetensors"
    code = main(
        ["text2image", "--config", "mini-mm", f"data={tmp_path}/pictures", "steps=2", "batch=2",
         "log_every=1", f"vae={tmp_path}/vae.safetensors", f"folder={tmp_path}/run", f"out={model}"]
    )  # fmt: skip
    assert code == 0 and list((tmp_path / "run").glob("sheet-*.png"))
    facts = info(model)
    assert isinstance(facts.config, MiniMMConfig) and facts.dtype == "int8"
    pipe = reifusion.load(model, "cpu", "fp32")
    picture = pipe.generate("a red picture", seed=1, steps=2, progress=False)
    assert picture.size == (32, 32) and pipe.config.sampler == "flow"
    save(pipe.config, pipe.models, tmp_path / "again.safetensors", tokenizer=pipe.tokenizer)
    assert_same_networks(pipe.models, reifusion.load(tmp_path / "again.safetensors", "cpu", "fp32").models)
    with pytest.raises(ModelError, match="has no other format"):
        save(pipe.config, pipe.models, tmp_path / "folder", "diffusers", pipe.tokenizer)
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("flag", ["--dry-run", "--check-gradients"])
def test_what_is_asked_before_a_run_is_answered(flag, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sizes.SIZES, "mini-mm", SMALL)
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (48, 48), "red").save(tmp_path / "pictures" / "red.png")
    (tmp_path / "pictures" / "red.txt").write_text("a red picture")
    save_vae(VAE(SMALL.vae), tmp_path / "vae.safetensors")
    code = main(
        ["text2image", "--config", "mini-mm", flag, f"data={tmp_path}/pictures", "steps=40", "batch=2",
         f"vae={tmp_path}/vae.safetensors", f"folder={tmp_path}/run", f"out={tmp_path}/m.safetensors"]
    )  # fmt: skip
    said = capsys.readouterr()
    assert code == 0, said.err
    assert flag != "--dry-run" or said.out.startswith(f"training       text2image, into {tmp_path}/run\n")


def test_sizes_of_its_own_are_refused_in_one_sentence(capsys, tmp_path: Path):
    assert main(["text2image", "model=mini-mm", "channels=[64]", f"folder={tmp_path}"]) == 2
    assert "mini-mm has sizes that a recipe cannot change" in capsys.readouterr().err
