"""Writing: a model is written whole or not at all, and nobody else's folder is replaced."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from reifusion.model.tensors import ModelError
from reifusion.weights import load, save, writing
from tests.tiny import SMALL, WORDS, assert_same_networks, random_networks


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
