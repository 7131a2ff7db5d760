"""Files with random damage: read, or refused in one sentence, quickly and without running anything."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from reifusion.model.tensors import ModelError
from reifusion.train.images import DataError, open_pictures
from reifusion.train.keys import RecipeError
from reifusion.train.recipe import read
from reifusion.weights import load, save
from reifusion.weights.lora import load_lora
from tests.tiny import SMALL, WORDS, random_networks

MANY = int(os.environ.get("REIFUSION_MANY", "1"))
SEARCH = settings(
    max_examples=60 * MANY,
    deadline=10_000,  # milliseconds
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@st.composite
def damages(draw: st.DrawFn) -> list[tuple[str, float, bytes]]:
    """Changes of a file: where, as a share of its length, and the bytes that are put in or written over."""
    kind = st.sampled_from(["over", "into", "cut"])
    return draw(st.lists(st.tuples(kind, st.floats(0, 1), st.binary(max_size=9)), min_size=1, max_size=3))


def damaged(content: bytes, changes: list[tuple[str, float, bytes]]) -> bytes:
    for kind, share, new in changes:
        at = int(share * len(content))
        if kind == "cut":
            content = content[:at]
        else:
            content = content[:at] + new + content[at + len(new) * (kind == "over") :]
    return content


def sentence(error: BaseException) -> None:
    text = str(error)
    assert text and "\n" not in text and len(text) < 1000


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("files")
    save(SMALL, random_networks(SMALL), folder / "m.safetensors", "compvis", WORDS)
    tensors = {
        "lora_unet_x.lora_down.weight": torch.ones(2, 4),
        "lora_unet_x.lora_up.weight": torch.ones(4, 2),
    }
    save_file(tensors, folder / "l.safetensors")
    torch.save({"state_dict": tensors}, folder / "l.ckpt")
    torch.save({"state_dict": tensors}, folder / "old.ckpt", _use_new_zipfile_serialization=False)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@SEARCH
@given(changes=damages(), name=st.sampled_from(["l.safetensors", "l.ckpt", "old.ckpt"]))
def test_a_damaged_lora_is_read_or_refused(files, tmp_path, changes, name):
    path = tmp_path / name
    path.write_bytes(damaged(files[name], changes))
    try:
        load_lora(path)
    except ModelError as error:
        sentence(error)


@SEARCH
@given(changes=damages())
def test_a_damaged_checkpoint_is_read_or_refused(files, tmp_path, changes):
    path = tmp_path / "m.safetensors"
    path.write_bytes(damaged(files["m.safetensors"], changes))
    started = time.monotonic()
    try:
        load(path)
    except ModelError as error:
        sentence(error)
    assert time.monotonic() - started < 10


@SEARCH
@given(text=st.one_of(st.text(max_size=80), st.from_regex(r'\A[a-z_]{1,9} = [-"\[\]0-9a-z.,]{0,9}\Z')))
def test_any_text_is_a_recipe_or_refused(tmp_path, text):
    path = Path(tmp_path, "recipe.toml")
    path.write_text(text, "utf-8")
    try:
        read("vae", path)
    except (RecipeError, DataError) as error:
        sentence(error)


@pytest.mark.slow
@SEARCH
@given(content=st.binary(max_size=60))
def test_any_bytes_are_a_caption_or_refused(tmp_path, content):
    from PIL import Image

    folder = tmp_path / "pictures"
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    (folder / "a.txt").write_bytes(content)
    try:
        pictures = open_pictures(folder)
        assert all(isinstance(caption, str) for item in pictures.items for caption in item.captions)
    except DataError as error:
        sentence(error)
