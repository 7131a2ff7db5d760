"""Drawing for several pages: the right steps are kept, the picture is the same, and it stops when told to."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
import torch

from reifusion.explain.trajectory import decode_noisy
from reifusion.explain.words import watch
from reifusion.in_memory import Models
from reifusion.model.attention import CrossAttention, SelfAttention
from reifusion.settings import Settings
from reifusion.studio import drawing as drawing_module
from reifusion.studio.drawing import Drawing, draw


def same(one, other) -> bool:
    return np.array_equal(np.asarray(one), np.asarray(other))


def drawn(pipe, settings: Settings):
    return settings.draw(pipe, settings.request())


def test_watching_changes_nothing_and_every_step_is_kept(pipe, wanted, finish):
    drawing = finish(wanted())
    assert same(drawing.picture, drawn(pipe, wanted())) and same(drawing.look(5, "seen"), drawing.picture)
    noise, *steps, end = drawing.frames
    assert (noise.step, end.step) == (None, None) and [frame.step for frame in steps] == [0, 1, 2, 3]
    for place, (frame, step) in enumerate(zip(steps, pipe.denoise(wanted().request())), 1):
        assert frame.t == step.t and torch.equal(frame.x_t, step.x_t) and torch.equal(frame.x0, step.x0)
        assert torch.equal(frame.cond, step.eps_cond) and torch.equal(frame.uncond, step.eps_uncond)
        assert same(drawing.look(place, "seen"), pipe.decode(step.x0)[0])
        assert same(drawing.look(place, "given"), decode_noisy(pipe, step.x_t))
    assert torch.equal(noise.x_t, steps[0].x_t) and same(pipe.decode(end.x_t)[0], drawing.picture)
    assert [word.text for word in drawing.attention.words] == ["a", "cat", "on", "a", "dog"]


def test_without_guidance_there_is_no_second_look(wanted, finish):
    assert finish(wanted(cfg=1.0)).frames[1].uncond is None


def test_the_drawing_grows_while_it_is_watched_and_shows_some_of_its_steps(wanted, tmp_path):
    seen = [
        (len(drawing.frames), drawing.done, drawing.newest)
        for drawing in draw(Drawing(wanted(steps=20)), tmp_path)
    ]
    places = [places for places, *_ in seen]
    assert places == sorted(places) and seen[-1][:2] == (22, True) and len(set(places)) > 3
    assert {newest for *_, newest in seen} > {None}


def test_pictures_of_steps_take_no_more_than_their_share_of_the_time(pipe, wanted, finish, monkeypatch):
    decode = type(pipe).decode

    def slow(self, latents):
        time.sleep(0.1)
        return decode(self, latents)

    monkeypatch.setattr(type(pipe), "decode", slow)
    drawing = finish(wanted(steps=30))
    during = {place for place, _ in drawing.decoded}
    assert 1 <= len(during) < 8 and drawing.newest == max(during)


def test_stopping_keeps_what_is_there_and_writes_nothing(wanted, tmp_path):
    for drawing in draw(Drawing(wanted(steps=1000)), tmp_path / "out"):
        if len(drawing.frames) > 2:
            drawing.stop.set()
    assert drawing.note.startswith("Stopped after step ") and drawing.note.endswith(" of 1000.")
    assert drawing.path is None and not (tmp_path / "out").exists() and len(drawing.frames) > 3
    last = len(drawing.frames) - 1
    assert same(drawing.look(last, "seen"), drawing.look(last - 1, "seen"))


def test_who_leaves_does_not_keep_the_model(wanted, tmp_path, finish):
    watching: Any = draw(Drawing(wanted(steps=1000)), tmp_path)
    next(watching)
    next(watching)
    watching.close()
    started = time.monotonic()
    finish(wanted())
    assert time.monotonic() - started < 5


def test_a_failure_is_one_sentence_and_the_next_picture_is_drawn(wanted, tmp_path, finish):
    *_, failed = draw(Drawing(wanted(model=str(tmp_path / "nothing.safetensors"))), tmp_path)
    assert failed.failed and "nothing.safetensors" in failed.note and "\n" not in failed.note
    assert finish(wanted()).path is not None


def test_loading_is_told_can_be_stopped_and_keeps_nobody_else(wanted, finish, tmp_path, monkeypatch):
    go, loaded = threading.Event(), Settings.loaded

    def slow(self, *given):
        return loaded(self, *given) if self.model != "a/b" else go.wait(30)

    monkeypatch.setattr(Settings, "loaded", slow)
    finish(wanted())
    notes = []
    for drawing in draw(Drawing(wanted(model="a/b")), tmp_path):
        notes.append(drawing.said)
        if len(notes) == 4:
            assert finish(wanted()).path is not None  # with the model that is there
            drawing.stop.set()
    go.set()
    assert notes[0] == "Loading a/b: 0 s." and notes[-1] == "Stopped." and len(notes) <= 6
    assert "Loading a/b: 1 s." in notes


def test_models_are_kept_by_what_was_put_into_them(wanted, monkeypatch):
    monkeypatch.setattr(drawing_module, "_MODELS", Models(keep=2))
    one = drawing_module.model(wanted("a cat", steps=9, hires=2.0, variation=0.5))
    assert drawing_module.model(wanted("a dog")) is one
    deep = drawing_module.model(wanted(deepcache=2))
    assert deep is not one and deep.models["diffusion"] is one.models["diffusion"]  # loaded once
    other = drawing_module.model(wanted("a dog", int8=True))
    assert other is not one and drawing_module.model(wanted(int8=True)) is other
    assert drawing_module.model(wanted()) is one
    drawing_module.model(wanted(prediction_type="v_prediction"))  # makes room of what was used longest ago
    assert drawing_module.model(wanted()) is one and drawing_module.model(wanted(int8=True)) is not other


def test_two_pages_at_once_do_not_mix(pipe, wanted, tmp_path):
    prompts = ["a cat", "a dog", "a rocket"]
    found: dict[str, Any] = {}

    def watch(prompt: str) -> None:
        *_, found[prompt] = draw(Drawing(wanted(prompt, steps=6, sampler="ddpm")), tmp_path)

    pages = [threading.Thread(target=watch, args=[prompt]) for prompt in prompts]
    for page in pages:
        page.start()
    for page in pages:
        page.join()
    for prompt in prompts:
        one = found[prompt]
        assert same(one.picture, drawn(pipe, wanted(prompt, steps=6, sampler="ddpm")))
        assert [word.text for word in one.attention.words] == prompt.split()
        assert all(len(maps) == 6 for maps in one.attention.maps.values())
    hooks = [layer.hook for layer in pipe.models["diffusion"].modules() if hasattr(layer, "hook")]
    assert hooks and not any(hooks)


@pytest.mark.parametrize(
    "more",
    [
        {"hires": 1.5}, {"emphasis": "a1111", "prompt": "a (cat:1.3)"}, {"variation": 0.5},
        {"manner": "a1111", "sampler": "euler"}, {"eta": 0.5}, {"deepcache": 2},
    ],
    ids=lambda more: next(iter(more)),
)  # fmt: skip
def test_what_the_command_line_can_draw_the_studio_can(more, wanted, finish):
    settings = wanted(**more)
    drawing = finish(settings)
    alone = settings.draw(settings.pipe(), settings.request())
    assert same(drawing.picture, alone)
    assert bool(drawing.attention) == (not {"hires", "emphasis", "manner", "deepcache"} & more.keys())
    assert len(drawing.frames) > 5 and drawing.look(3, "seen").size[0] >= 64


@pytest.mark.parametrize("name", ["ddim", "euler_a"])  # one in ᾱ, one in σ
def test_the_curves_are_those_of_the_schedule(wanted, finish, name):
    drawing = finish(wanted(sampler=name))
    signal, noise = torch.tensor(drawing.signal), torch.tensor(drawing.noise)
    assert len(signal) == 1000 and torch.allclose(signal**2 + noise**2, torch.ones(1000))
    assert [frame.t for frame in drawing.frames[1:-1]] == drawing.sampler.timesteps.tolist()


def test_a_tiny_vae_shows_the_steps_and_the_picture_is_the_model_s_own(pipe, wanted, finish, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderTiny().eval()
    theirs.save_pretrained(tmp_path / "tiny")
    drawing = finish(wanted(), str(tmp_path / "tiny"))
    assert same(drawing.picture, drawn(pipe, wanted()))
    for place, step in enumerate(pipe.denoise(wanted().request()), 1):
        with torch.inference_mode():
            expected = theirs.decode(step.x0.float()).sample[0].clamp(-1, 1).permute(1, 2, 0)
        shown = torch.tensor(np.asarray(drawing.look(place, "seen"))) / 127.5 - 1
        assert (shown - expected).abs().max() < 3 / 127.5  # the model may work in bfloat16
        assert not same(drawing.look(place, "seen"), pipe.decode(step.x0)[0])
    diffusers.AutoencoderTiny(latent_channels=16).save_pretrained(tmp_path / "other")
    again = finish(wanted(), str(tmp_path / "other"))  # does not fit: the model's own
    assert same(again.look(2, "seen"), finish(wanted()).look(2, "seen"))


def test_only_attention_to_words_is_recorded(pipe, wanted):
    request = wanted().request()
    with watch(pipe, request):
        hooked = {type(layer) for layer in pipe.models["diffusion"].modules() if getattr(layer, "hook", None)}
    assert hooked == {CrossAttention}
    with watch(pipe, request, (3, 3)):  # a place that looks at other places is asked for
        hooked = {type(layer) for layer in pipe.models["diffusion"].modules() if getattr(layer, "hook", None)}
    assert hooked == {CrossAttention, SelfAttention}
