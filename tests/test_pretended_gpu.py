"""Whole pictures, and steps of every training, on a pretended GPU: is everything where it is needed?"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from reifusion import families, kernels
from reifusion.model import finite
from reifusion.model.config import ModelConfig, ScheduleConfig
from reifusion.model.pipeline import StableDiffusion
from reifusion.model.samplers import SAMPLERS
from reifusion.shortcuts.deepcache import deepcached
from reifusion.train import faster, loop
from reifusion.train.loop import LoopConfig
from reifusion.train.lora import LoRATraining, train_lora
from reifusion.train.progress import Seen
from reifusion.train.sharpen import Sharpening, sharpen_decoder
from reifusion.train.text2image import (
    Latents,
    TextToImage,
    TextToImageTraining,
    forward_process,
    train_text2image,
)
from reifusion.train.vae import VAE, VAETraining, train_vae
from reifusion.train.watch import Watch
from tests.pretended import DEVICE, Card, Processes, gpu, possible
from tests.sprites import random_sprites
from tests.tiny import SMALL, TINY, WORDS, Bytes, networks

pytestmark = pytest.mark.slow
EMPTY = torch.tensor(WORDS.encode(""))


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    if not possible():
        pytest.skip("there is a GPU, or neither PyTorch with CUDA nor a compiler")
    with gpu(monkeypatch) as card:
        yield card


FLAT = replace(TINY, vae=replace(TINY.vae, channels=(8, 8)))  # fewer operations


def pipeline(config: ModelConfig = FLAT, dtype: torch.dtype = torch.float32) -> StableDiffusion:
    models = families.build(config) if config.unet.guidance_width else networks(config)
    for network in models.values():
        network.to_empty(device="cpu").to(dtype).requires_grad_(False).eval()
    return families.adapted(StableDiffusion(config, Bytes(), models, DEVICE))


PICTURE, MASK = Image.new("RGB", (64, 64)), Image.new("L", (64, 64), 255)
WISHES: dict[str, dict[str, Any]] = {
    "words": {},
    "no guidance": {"cfg": 1.0},
    "rescaled guidance": {"guidance_rescale": 0.7},
    "guidance in an interval": {"guidance_interval": (0.5, 5)},
    "two pictures": {"num": 2, "negative": "a dog"},
    "a picture": {"init_image": PICTURE, "strength": 0.7},
    "inpainting": {"init_image": PICTURE, "mask": MASK, "strength": 0.7},
}


def draw(pipe: StableDiffusion, **settings: Any) -> None:
    found = pipe.generate("a cat", seed=1, steps=2, progress=False, **settings)
    for picture in found if isinstance(found, list) else [found]:
        assert picture.size == (64, 64)


@pytest.mark.parametrize("wish", WISHES)
def test_pictures_are_drawn(card, wish):
    draw(pipeline(), **WISHES[wish])
    assert card.operations > 200


@pytest.mark.parametrize("wish", ["words", "two pictures", "inpainting"])
def test_pictures_are_drawn_by_kernels(card, wish):
    pipe = pipeline(dtype=torch.float16)
    kernels.install(pipe.models)
    draw(pipe, **WISHES[wish])


@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "dpmpp_sde", "lcm", "flow"])
def test_samplers_that_bring_noise_or_nothing_draw(card, sampler):
    schedule = ScheduleConfig(prediction_type=SAMPLERS[sampler].prediction_types[0])
    draw(pipeline(replace(FLAT, schedule=schedule)), sampler=sampler, cfg=1.0)


@pytest.mark.parametrize("unet", [{"guidance_width": 32}, {"in_channels": 8}, {"in_channels": 9}])
def test_relatives_draw(card, unet):
    wish = WISHES[{8: "a picture", 9: "inpainting"}.get(unet.get("in_channels"), "words")]
    draw(
        pipeline(replace(FLAT, unet=replace(TINY.unet, **unet))),
        **{k: wish[k] for k in wish if k != "strength"},
    )


def test_deepcache_draws(card):
    draw(deepcached(pipeline(), 2))


def test_a_fault_of_the_past_would_be_found(card, monkeypatch):
    """A GPU's answer has come to the CPU, and then the CPU was asked for its stream."""

    def fetched(answer: Tensor) -> Any:
        arrived, arrival = answer.to("cpu", non_blocking=True), torch.cuda.Event()
        arrival.record(torch.cuda.current_stream(arrived.device))
        return arrived, arrival

    monkeypatch.setattr(finite, "_fetched", fetched)
    with pytest.raises(ValueError, match="Expected a cuda device"):
        draw(pipeline())


def test_tensors_of_two_devices_do_not_meet(card):
    here, there = torch.ones(3), torch.ones(3, device=DEVICE)
    assert (there + 1).device == DEVICE and (there * torch.tensor(2.0)).device == DEVICE
    assert there.cpu().tolist() == [0, 0, 0] and there.isfinite().all()
    with pytest.raises(RuntimeError, match="two devices, cpu and cuda"):
        here + there
    with pytest.raises(AssertionError, match="a CPU's generator"):
        torch.rand(3, device=DEVICE, generator=torch.Generator())


# ---- training: all but the derivatives ---------------------------------------------------------------------

LOOP = LoopConfig(steps=1, mixed_precision="no")


@pytest.fixture
def trains(card: Card, monkeypatch: pytest.MonkeyPatch) -> Card:
    """Gradients are there when they are asked for; checkpoints, which hold numbers, are not written."""
    one = Processes()
    monkeypatch.setattr(loop, "processes", lambda: one)
    monkeypatch.setattr(Tensor, "backward", one.gradients)
    monkeypatch.setattr(torch.autograd, "grad", lambda y, x, **_: (torch.empty_like(x),))
    monkeypatch.setattr(loop, "save_checkpoint", lambda *_: None)
    return card


def latents(device: Any) -> Latents:
    means = torch.ones(8, 4, 16, 16).to(device)
    return Latents(means, EMPTY.repeat(8, 1).to(device), means)


def test_text2image_trains_and_shows_a_sheet(trains, tmp_path):
    """Latents lie on the GPU, as the mini's do. What a checkpoint shows is drawn there."""
    data, seen = latents(DEVICE), []
    training = TextToImageTraining(replace(LOOP, muon=True), batch=4, offset_noise=0.1)
    watch = Watch(forward_process(SMALL.schedule), 64, 0, ["a cat"], {"seen": data})
    shown = TextToImage(SMALL).to(DEVICE)
    vae = VAE(SMALL.vae)

    def look(step: int, average: dict[str, Tensor]) -> Seen:
        assert all(x.device == DEVICE for x in average.values())
        shown.load_state_dict(average)
        networks = {"encoder": vae.encoder, "decoder": vae.decoder}
        networks |= {"clip": shown.clip, "diffusion": shown.diffusion}
        found = watch.look(shown, StableDiffusion(replace(SMALL, steps=2), WORDS, networks, DEVICE))
        seen.append(found.picture)
        return found

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_text2image(data, EMPTY, SMALL, training, tmp_path, every_checkpoint=look)
    assert len(seen) == 1


@pytest.mark.parametrize("draws_on", ["cpu", DEVICE])
def test_a_vae_trains_and_its_decoder_is_sharpened(trains, tmp_path, monkeypatch, draws_on):
    """As the mini's does, on pictures of the GPU: recorded, which is here to be done again."""
    recorded: list[Any] = []

    def record(work: Callable[[], Any]) -> tuple[Any, Callable[[], Any]]:
        recorded.append(work)
        return work(), work

    monkeypatch.setattr(torch, "compile", lambda network, dynamic: network)
    monkeypatch.setattr(faster, "RecordedStep", partial(faster.RecordedStep, record=record))
    steps = replace(LOOP, steps=3, compile=True) if draws_on == DEVICE else LOOP
    sprites = torch.zeros(6, 4, 16, 16, dtype=torch.uint8, device=draws_on)
    drawn = partial(random_sprites, sprites)
    training = VAETraining(steps, batch=4, crop=8, whole_from=1.0, edges_from=0.0)
    train_vae(drawn, 16, SMALL.vae, training, tmp_path / "vae", draws_on=draws_on)
    assert len(recorded) == (2 if draws_on == DEVICE else 0)
    sharpening, folder = Sharpening(LOOP, batch=4), tmp_path / "sharp"
    sharpen_decoder(VAE(SMALL.vae), drawn, 16, sharpening, folder, draws_on=draws_on)


def test_a_lora_trains(trains, tmp_path):
    pipe = StableDiffusion(SMALL, WORDS, networks(SMALL), DEVICE)
    training = LoRATraining(LOOP, batch=4, dropout=0.1, train_text_encoder=True)
    train_lora(pipe, latents("cpu"), training, tmp_path)
