"""Writing: a model is written whole or not at all, and nobody else's folder is replaced."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from reifusion.model.tensors import ModelError
from reifusion.weights import info, load, save, writing
from tests.tiny import SMALL, WORDS, assert_same_networks, native_state, networks, random_networks


def test_a_failed_save_leaves_the_old_file(tmp_path, models, monkeypatch):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old")

    def fail(tensors, to, metadata):
        Path(to).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(writing, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save(SMALL, models, path, tokenizer=WORDS)
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_a_failed_save_leaves_the_old_folder(tmp_path, folder, models, monkeypatch):
    path = shutil.copytree(folder, tmp_path / "x")
    monkeypatch.setattr(writing, "save_file", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save(SMALL, models, path, "diffusers", WORDS)
    monkeypatch.undo()
    assert_same_networks(load(path)[1], models)
    assert len(list(tmp_path.iterdir())) == 1


def test_saving_again_replaces(tmp_path, folder):
    path, other = shutil.copytree(folder, tmp_path / "x"), random_networks(SMALL, torch.float16)
    save(SMALL, other, path, "diffusers", WORDS)
    assert_same_networks(load(path)[1], other)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_of_something_else_is_not_replaced(tmp_path, models):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ModelError, match="is not a diffusers folder, so it was left as it is"):
        save(SMALL, models, tmp_path, to="diffusers")
    with pytest.raises(ModelError, match="is a folder, and the format native is one file"):
        save(SMALL, models, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_networks_that_do_not_fit_their_config_are_not_saved(tmp_path, models):
    wrong = replace(SMALL, clip=replace(SMALL.clip, vocab_size=0))  # as the mini's is before its training
    with pytest.raises(
        ModelError, match=r"not have the sizes of their config, at clip\.embedding\.token\.weight"
    ):
        save(wrong, models, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_saving_reordered_weights(tmp_path, models):
    """channels_last is a matter of speed; in a file there is one order."""
    fast = {name: copy.deepcopy(module) for name, module in models.items()}
    for module in fast.values():
        module.to(memory_format=torch.channels_last)
    save(SMALL, fast, tmp_path / "x.safetensors", tokenizer=WORDS)
    assert_same_networks(load(tmp_path / "x.safetensors")[1], models)


# Eight bits


def test_eight_bits_are_read_as_what_they_stand_for(tmp_path):
    before = networks(SMALL, noise=0.05)
    save(SMALL, before, tmp_path / "a.safetensors", tokenizer=WORDS, dtype=torch.int8)
    _, after, _ = load(tmp_path / "a.safetensors")
    for name, x in native_state(before).items():
        y = native_state(after)[name]
        if x.ndim > 1 and name.startswith(("clip.", "diffusion.")):
            # Half a step of its row, which has 127 of them on either side.
            step = x.flatten(1).abs().amax(1) / 127
            assert y.dtype == torch.float32 and ((x - y).flatten(1).abs().amax(1) <= 0.501 * step).all(), name
            assert not torch.equal(x, y)
        else:
            torch.testing.assert_close(y.float(), x, rtol=2**-8, atol=0)


def test_a_rounded_model_stays_what_it_is(tmp_path):
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save(SMALL, networks(SMALL), first, tokenizer=WORDS, dtype=torch.int8)
    config, models, tokenizer = load(first)
    save(config, models, second, tokenizer=tokenizer, dtype=torch.int8)
    assert_same_networks(models, load(second)[1])
    found = info(second)
    assert found.dtype == "int8" and sum(found.parameters.values()) == sum(
        x.numel() for x in native_state(models).values()
    )


def test_eight_bits_take_a_quarter_of_float32(tmp_path):
    wide = replace(SMALL, unet=replace(SMALL.unet, channels=(64, 128)))
    for dtype in torch.int8, torch.float32:
        save(wide, networks(wide), tmp_path / f"{dtype}.safetensors", tokenizer=WORDS, dtype=dtype)
    eight, whole = ((tmp_path / f"{d}.safetensors").stat().st_size for d in (torch.int8, torch.float32))
    assert eight < 0.32 * whole


def test_eight_bits_without_fitting_scales_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    save(SMALL, networks(SMALL), path, tokenizer=WORDS, dtype=torch.int8)
    with safe_open(path, "pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    scales = tensors["diffusion.conv_out.weight.scale"]
    for wrong in (None, scales[:-1], scales[:, None]):
        changed = {name: x for name, x in tensors.items() if x is not scales}
        if wrong is not None:
            changed["diffusion.conv_out.weight.scale"] = wrong.contiguous()
        save_file(changed, path, header)
        with pytest.raises(ModelError, match=r"conv_out.weight in .* holds no floating-point numbers"):
            info(path)


@pytest.mark.parametrize("to", ["compvis", "diffusers"])
def test_eight_bits_are_for_our_own_format(tmp_path, to):
    with pytest.raises(ModelError, match=f"the format {to} knows no numbers of 8 bits"):
        save(SMALL, networks(SMALL), tmp_path / "a.safetensors", to, WORDS, dtype=torch.int8)
    assert not list(tmp_path.iterdir())
