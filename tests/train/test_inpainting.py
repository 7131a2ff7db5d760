"""Models that inpaint are trained on pictures of which a part is hidden, as they are shown when they draw."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors import safe_open
from torch import Tensor

from reifusion.api import load
from reifusion.model.encoder import scale_latents
from reifusion.model.inpaint import begin
from reifusion.model.pictures import to_picture
from reifusion.model.pipeline import StableDiffusion
from reifusion.model.request import Request
from reifusion.train.__main__ import main
from reifusion.train.images import open_pictures
from reifusion.train.latents import HOLE, LatentData, cache_latents, hole
from reifusion.train.text2image import denoising_loss, forward_process
from reifusion.train.watch import measured_loss
from reifusion.weights import save
from tests.tiny import SMALL, WORDS, networks

INPAINTING = replace(SMALL, name="inpainting", unet=replace(SMALL.unet, in_channels=9))


@pytest.fixture
def pipe() -> StableDiffusion:
    return StableDiffusion(INPAINTING, WORDS, networks(INPAINTING, noise=0.02))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "pictures"
    path.mkdir()
    for i in range(3):
        picture = Image.new("RGB", (32, 32), "white")
        ImageDraw.Draw(picture).ellipse([4 + 3 * i, 4, 20 + 3 * i, 28], ("red", "green", "blue")[i])
        picture.save(path / f"{i}.png")
        (path / f"{i}.txt").write_text("a cat")
    return path


def cached(pipe: StableDiffusion, folder: Path, holes: int = 3) -> LatentData:
    pictures, encoder = open_pictures(folder), pipe.models["encoder"]
    return cache_latents(encoder, pictures, 32, folder.parent / "latents", tokenizer=WORDS, holes=holes)  # type: ignore[arg-type]


def test_training_shows_what_drawing_shows(pipe, folder):
    """For the same picture and the same mask, the channels beside the latents are the same."""
    data = cached(pipe, folder)
    (entries,) = data._buckets
    for stored, i in entries:
        assert len(stored.hidden) == 3
        picture = Image.open(folder / f"{i}.png")
        for k, (left, mask) in enumerate(stored.hidden):
            shape = picture.size
            key = next(name for name in keys(left.file) if keys(left.file).index(name) == left.number)
            assert key.endswith(f"{HOLE}{k}")
            redraw = to_picture((hole(key, shape)[0] * 2 - 1).expand(3, -1, -1)).convert("L")
            request = Request("a cat", init_image=picture, mask=redraw, size=shape, strength=1.0)
            sampler = pipe.sampler(request.for_model(INPAINTING))
            noise = torch.zeros(1, 4, 16, 16)
            _, _, extra = begin(INPAINTING, request, sampler, noise, pipe.encode_image)
            assert extra is not None
            own = torch.cat([mask, scale_latents(left.mean[left.number].float(), INPAINTING.vae)])
            assert torch.equal(extra[0, 0], own[0])
            assert torch.allclose(extra[0], own, atol=2e-3)


def keys(file: Path) -> list[str]:
    with safe_open(file, "pt") as opened:
        return json.loads(opened.metadata()["fingerprints"])


def test_a_batch_has_nine_channels_and_the_first_four_are_those_of_before(pipe, folder):
    plain, data = cached(pipe, folder, holes=0), cached(pipe, folder)
    (x, tokens), (y, same) = (
        each.latent_batch(torch.Generator().manual_seed(5), 6) for each in (plain, data)
    )
    assert x.shape == (6, 4, 16, 16) and y.shape == (6, 9, 16, 16)
    assert torch.equal(x, y[:, :4]) and torch.equal(tokens, same)
    assert plain.beside == 0 and data.beside == 5
    assert set(y[:, 4].unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(y, data.latent_batch(torch.Generator().manual_seed(5), 6)[0])


def test_only_the_latents_get_noise():
    seen: list[Tensor] = []

    def network(x: Tensor, tokens: Tensor, t: Tensor) -> Tensor:
        seen.append(x)
        return torch.zeros_like(x[:, :4])

    latents, noise = torch.randn(2, 9, 4, 4), torch.randn(2, 4, 4, 4)
    sampler, t = forward_process(SMALL.schedule), torch.tensor([10, 700])
    loss, _ = denoising_loss(network, sampler, latents, torch.zeros(2, 3), t, noise, torch.ones(2))
    assert torch.equal(seen[0][:, 4:], latents[:, 4:])
    assert torch.equal(seen[0][:, :4], sampler.add_noise(latents[:, :4], t, noise))
    assert loss.item() == pytest.approx(noise.pow(2).mean().item())
    data = SimpleNamespace(device="cpu", beside=5, latent_batch=lambda *_: (latents, torch.zeros(2, 3)))
    assert measured_loss(network, data, sampler, 2, 0)[""] == pytest.approx(1, abs=0.2)


def test_holes_are_of_every_kind_and_always_the_same():
    shares = torch.tensor([hole(f"{k}", (40, 24)).mean() for k in range(300)])
    whole = (shares == 1).float().mean()
    assert 0.18 < whole < 0.35
    assert (shares > 0).all() and shares[shares < 1].quantile(0.1) < 0.15 < 0.4 < shares[shares < 1].quantile(
        0.9
    )
    assert torch.equal(hole("a", (40, 24)), hole("a", (40, 24)))
    assert hole("a", (40, 24)).shape == (1, 1, 24, 40) and not torch.equal(
        hole("a", (40, 24)), hole("b", (40, 24))
    )


@pytest.mark.parametrize("what", ["text2image", "lora", "inversion"])
def test_a_model_that_inpaints_is_trained_and_inpaints(what, pipe, folder, tmp_path):
    save(INPAINTING, pipe.models, tmp_path / "model.safetensors", tokenizer=WORDS)
    out = tmp_path / "out.safetensors"
    line = [
        what,
        f"start={tmp_path / 'model.safetensors'}",
        f"data={folder}",
        "steps=3",
        "batch=2",
        f"out={out}",
    ]
    line += ["warmup=1", f"folder={tmp_path / 'run'}", *(["word=zork"] if what == "inversion" else [])]
    assert main(line) == 0
    assert (tmp_path / "run" / "sheet-000003.png").exists()
    if what == "text2image":
        trained = load(out, "cpu", "fp32")
        assert trained.config.inpaints
        before, after = (
            each.generate("a cat", init_image=Image.open(folder / "0.png"), steps=2, seed=1, progress=False)
            for each in (pipe, trained)
        )
        assert before.size == after.size == (32, 32) and before.tobytes() != after.tobytes()


def test_a_model_that_edits_and_the_minis_own_pictures_are_refused(pipe, folder, tmp_path, capsys):
    edits = replace(SMALL, unet=replace(SMALL.unet, in_channels=8))
    save(edits, networks(edits), tmp_path / "edits.safetensors", tokenizer=WORDS)
    save(INPAINTING, pipe.models, tmp_path / "inpaints.safetensors", tokenizer=WORDS)
    for name, data in ("edits", folder), ("inpaints", "emoji"):
        assert main(["text2image", f"start={tmp_path / name}.safetensors", f"data={data}", "steps=1"]) == 2
        assert "those for inpainting can be trained, on your own pictures" in capsys.readouterr().err
