"""Folders of pictures as people have them: their captions are read, or it is said what was guessed."""

import json
import os
import warnings

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from reifusion.train.images import DataError, decoded, open_pictures
from reifusion.train.recipe import read

datasets.disable_progress_bars()


def folder_of(folder, files):
    """None is a picture; a text or bytes are a file."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            Image.new("RGB", (20, 20), (len(name) * 9 % 255, 90, 0)).save(path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def opened(folder, **options):
    """Returns name -> captions, and what was said."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = open_pictures(folder, cache=folder.parent / "cache", **options)
    return found, {item.name: item.captions for item in found.items}, " ".join(str(w.message) for w in said)


TEXT = "a zörk on a table"


@pytest.mark.parametrize(
    "raw",
    [
        TEXT.encode(),
        TEXT.encode("utf-8-sig"),
        TEXT.encode("utf-16"),
        b"\xfe\xff" + TEXT.encode("utf-16-be"),
        TEXT.encode("utf-16-le"),
        TEXT.encode("utf-16-be"),
        TEXT.encode("utf-32"),
        TEXT.replace(" on", "\r\non").encode("utf-16"),
    ],
)
def test_a_caption_is_read_as_notepad_saves_it(tmp_path, raw):
    _, captions, said = opened(folder_of(tmp_path / "d", {"a.png": None, "a.txt": raw}))
    assert " ".join(captions["a.png"]) == TEXT and not said


@pytest.mark.parametrize(
    "raw", [b"", b"\xff", b"\xff\xfe", b"\0", b"\xef\xbb\xbf", b"\x81\x8d", b"\xff\xfea"]
)
def test_no_bytes_break_it(raw):
    assert isinstance(decoded(raw)[0], str)


def test_a_guess_is_said(tmp_path):
    files = {"a.png": None, "a.txt": TEXT.encode("cp1252"), "b.png": None, "b.txt": "b"}
    _, captions, said = opened(folder_of(tmp_path / "d", files))
    assert captions["a.png"] == (TEXT,)
    assert "1 of 2 pictures have captions that are not UTF-8 and were read as Windows-1252: a.png" in said


def test_captions_lie_in_caption_files_as_well(tmp_path):
    files = {"a.png": None, "a.caption": "one", "b.png": None, "b.txt": "two", "b.caption": "three"}
    _, captions, said = opened(folder_of(tmp_path / "d", files))
    assert captions == {"a.png": ("one",), "b.png": ("two",)} and not said


def test_a_fallback_is_no_missing_caption(tmp_path):
    files = {"a.png": None, "b.png": None, "b.txt": "two"}
    _, captions, said = opened(folder_of(tmp_path / "d", files), caption="a zork")
    assert captions == {"a.png": ("a zork",), "b.png": ("two",)}
    assert "1 of 2 pictures have no caption of their own and get 'a zork': a.png" in said


def test_folders_of_kohya_give_repeats_and_captions(tmp_path):
    files = {
        "30_zork man/a.png": None,
        "30_zork man/b.png": None,
        "30_zork man/b.txt": "two",
        "10_man/c.png": None,
    }
    found, captions, said = opened(folder_of(tmp_path / "d", files))
    assert captions == {
        "30_zork man/a.png": ("zork man",),
        "30_zork man/b.png": ("two",),
        "10_man/c.png": ("man",),
    }
    assert {item.name[:2]: item.repeats for item in found.items} == {"30": 3, "10": 1}
    assert "get 'man', 'zork man'" in said
    seen = found.pixel_batch(torch.Generator().manual_seed(0), 700, 2)[:, 0, 0, 0]
    assert (seen == found.pixel_batch(torch.Generator().manual_seed(0), 700, 2)[:, 0, 0, 0]).all()
    assert len(seen.unique()) >= 2


def test_so_does_such_a_folder_by_itself(tmp_path):
    found, captions, _ = opened(folder_of(tmp_path / "10_zork", {"a.png": None}))
    assert captions == {"a.png": ("zork",)} and found.items[0].repeats == 1


def test_years_are_no_repeats(tmp_path):
    found, captions, _ = opened(folder_of(tmp_path / "d", {"2024_summer/a.png": None, "b.png": None}))
    assert set(captions.values()) == {("",)} and {item.repeats for item in found.items} == {1}


def test_columns_and_splits_can_be_chosen(tmp_path):
    rows = [{"file_name": "a.png", "text": "a cat", "caption": "a dog"}]
    folder = folder_of(tmp_path / "d", {"a.png": None, "metadata.jsonl": "\n".join(map(json.dumps, rows))})
    with pytest.raises(DataError, match="choose with caption_column"):
        opened(folder)
    assert opened(folder, caption_column="text")[1] == {"a.png": ("a cat",)}
    recipe = read("text2image", None, ["caption_column=text", "image_column=image", "split=test"])
    assert (recipe.caption_column, recipe.image_column, recipe.split) == ("text", "image", "test")


@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_name_is_not_the_current_folder(tmp_path, monkeypatch, name):
    monkeypatch.chdir(folder_of(tmp_path / "d", {"private.png": None}))
    with pytest.raises(DataError, match="is empty"):
        open_pictures(name)


def test_another_encoding_of_the_metadata_is_one_sentence(tmp_path):
    row = json.dumps({"file_name": "a.png", "text": "ö"}, ensure_ascii=False)
    for encoding in ("utf-16", "cp1252"):
        folder = folder_of(tmp_path / encoding, {"a.png": None, "metadata.jsonl": row.encode(encoding)})
        with pytest.raises(DataError, match=r"metadata\.jsonl is not UTF-8") as error:
            opened(folder)
        assert "\n" not in str(error.value)


def test_links_are_followed(tmp_path):
    row = '{"file_name": "a.png", "text": "t"}'
    real = folder_of(tmp_path / "real", {"a.png": None, "a.txt": "one", "metadata.jsonl": row})
    os.symlink(real, tmp_path / "link")
    assert opened(tmp_path / "link")[1:] == ({"a.png": ("t",)}, "")
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    os.symlink(real / "a.png", mixed / "b.png")
    (mixed / "b.txt").write_text("two")
    assert opened(mixed)[1:] == ({"b.png": ("two",)}, "")


def test_pictures_of_another_set_have_another_digest(tmp_path):
    one = folder_of(tmp_path / "one", {"a.png": None, "a.txt": "x"})
    two = folder_of(tmp_path / "two", {"a.png": None, "a.txt": "y"})
    digests = [opened(folder)[0].digest() for folder in (one, two, one)]
    assert digests[0] == digests[2] != digests[1]


def test_linked_folders_inside_are_named(tmp_path):
    real = folder_of(tmp_path / "real", {"a.png": None, "a.txt": "one"})
    mixed = folder_of(tmp_path / "mixed", {"b.png": None, "b.txt": "two"})
    os.symlink(real, mixed / "inside")
    _, captions, said = opened(mixed)
    assert captions == {"b.png": ("two",)} and "linked folders in it are not looked into: inside" in said


def test_reading_a_folder_is_no_download(tmp_path, capfd):
    folder = folder_of(tmp_path / "some", {f"{i}.png": None for i in range(30)})
    datasets.enable_progress_bars()
    try:
        opened(folder)
        assert capfd.readouterr().err == "" and not datasets.are_progress_bars_disabled()
    finally:
        datasets.disable_progress_bars()


def test_a_photograph_is_cut_quickly_and_as_finely(tmp_path):
    """Squares of a large picture are made smaller first, and neither decoded nor copied again."""
    waves = np.add.outer(np.arange(900) ** 2 / 900, np.arange(1200) * 3) % 256
    Image.fromarray(waves.astype(np.uint8)).convert("RGB").save(tmp_path / "photo.png")
    (tmp_path / "photo.txt").write_text("waves")
    pictures = opened(tmp_path)[0]
    assert pictures._picture(0) is pictures._picture(0)
    found = pictures.pixel_batch(torch.Generator().manual_seed(0), 8, 32)
    exact = Image.Image.resize
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "resize", lambda *given, reducing_gap: exact(*given))
        slowly = pictures.pixel_batch(torch.Generator().manual_seed(0), 8, 32)
    assert (found - slowly).abs().mean() < 2 / 127.5 and not torch.equal(found, slowly)
