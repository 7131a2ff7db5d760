"""Captions from files of many, with words before them, and with their tags in any order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import datasets
import pytest
import torch
from PIL import Image

from reifusion.model.encoder import Encoder
from reifusion.train import images
from reifusion.train.captions import CaptionError, dressed, listed
from reifusion.train.images import DataError, open_pictures
from reifusion.train.latents import Mixed, cache_latents
from tests.tiny import SMALL, WORDS, networks

ROWS = {"a.png": "a red, round, small ball", "b.png": "a cube"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "pictures"
    place.mkdir()
    for i, name in enumerate(ROWS):
        Image.new("RGB", (64, 32), (200 * (1 - i), 0, 200 * i)).save(place / name)
    return place


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("captions.jsonl", "\n".join(json.dumps({"file_name": n, "text": t}) for n, t in ROWS.items())),
        ("captions.jsonl", "\n".join(json.dumps({"image": n, "caption": [t]}) for n, t in ROWS.items())),
        ("captions.json", json.dumps(ROWS)),
        ("captions.json", json.dumps([{"path": n, "prompt": t} for n, t in ROWS.items()])),
        ("captions.csv", "file,caption\n" + "\n".join(f'{n},"{t}"' for n, t in ROWS.items())),
        ("captions.tsv", "\ufefffilename\ttext\n" + "\n".join(f"{n}\t{t}" for n, t in ROWS.items())),
    ],
)
def test_captions_of_many_pictures_in_one_file(folder, name, text):
    (folder / name).write_text(text, "utf-8")
    assert {item.name: item.captions for item in open_pictures(folder).items} == {
        file: (caption,) for file, caption in ROWS.items()
    }


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        (
            "captions.jsonl",
            '{"file_name": "a.png"}',
            "needs a file_name and a text in each row, and has {'file_name': 'a.png'}",
        ),
        (
            "captions.json",
            '{"a.png": {"caption": "a ball"}}',
            "needs a file_name and a text .*'text': {'caption'",
        ),
        ("captions.csv", "file,text\na.png,a red, round ball\n", "row of a.png than columns: a caption with"),
        ("captions.jsonl", "{broken", "cannot be read"),
        ("captions.json", '["a.png"]', "must have names for its columns"),
        ("captions.csv", "a.png,red\nb.png,blue\n", "needs a file_name and a text in each row"),
    ],
)
def test_a_file_of_captions_that_is_not_understood_is_named(folder, name, text, says):
    (folder / name).write_text(text)
    with pytest.raises(DataError, match=says) as error:
        open_pictures(folder)
    assert name in str(error.value) or "row of captions" in str(error.value)
    assert "\n" not in str(error.value)


def test_rows_with_other_captions_of_a_picture_add_to_it(tmp_path):
    (tmp_path / "captions.csv").write_text('file,caption\na.png,a ball\na.png,"a red\nball"\n')
    (tmp_path / "captions.jsonl").write_text('{"file": "b.png", "text": ["a\u2028cube", null]}\n', "utf-8")
    assert listed(tmp_path) == {
        (tmp_path / "a.png").resolve(): ("a ball", "a red ball"),
        (tmp_path / "b.png").resolve(): ("a cube",),
    }


def test_a_row_without_a_caption_is_a_picture_without_one(tmp_path):
    (tmp_path / "captions.csv").write_text("file,caption\na.png\nb.png,\n")
    (tmp_path / "captions.jsonl").write_text('{"file": "c.png", "text": null}\n')
    assert listed(tmp_path) == {(tmp_path / name).resolve(): () for name in ("a.png", "b.png", "c.png")}


def test_of_two_files_of_captions_the_later_kind_counts(tmp_path):
    (tmp_path / "captions.json").write_text('{"a.png": "as exported"}')
    (tmp_path / "captions.csv").write_text("file,caption\na.png,as corrected\n")
    assert listed(tmp_path) == {(tmp_path / "a.png").resolve(): ("as corrected",)}


def test_captions_of_files_that_are_missing_are_named(folder):
    (folder / "captions.json").write_text(json.dumps(ROWS | {"c": "a cone"}))
    with pytest.warns(UserWarning, match="captions for 1 files that are missing: c"):
        open_pictures(folder)


def test_listed_captions_are_of_files_in_that_folder(tmp_path):
    (tmp_path / "captions.json").write_text(json.dumps({"sub/a.png": "a", "b.png": ["one", " two "]}))
    assert listed(tmp_path) == {
        (tmp_path / "sub/a.png").resolve(): ("a",),
        (tmp_path / "b.png").resolve(): ("one", "two"),
    }
    (tmp_path / "captions.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CaptionError, match="cannot be read"):
        listed(tmp_path)


def test_what_datasets_has_saved_is_read(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = {"image": [Image.new("RGB", (9, 5), "red")], "text": ["a red thing"]}
    saved = datasets.Dataset.from_dict(rows, features)
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(test=saved, train=saved).save_to_disk(tmp_path / "two")
    for source, split in (("one", "train"), ("two", "train"), ("two", "test")):
        pictures = open_pictures(tmp_path / source, split=split)
        assert [(x.getpixel((0, 0)), caption) for x, caption in pictures] == [((255, 0, 0), "a red thing")]
    with pytest.raises(DataError, match="has no split 'validation'; it has test, train"):
        open_pictures(tmp_path / "two", split="validation")


# Tags


def test_tags_come_in_any_order_after_those_that_stay():
    orders = dressed(["a cat, red, small, sitting"], shuffle=True, keep=1)
    assert len(orders) == 6  # of three tags
    assert all(order.startswith("a cat, ") and set(order.split(", ")) == {"a cat", "red", "small", "sitting"}
               for order in orders)  # fmt: skip
    assert dressed(["a cat, red, small"], shuffle=True, keep=2) == ("a cat, red, small",)
    assert dressed(["a, b, c, d, e, f, g"], shuffle=True, seed=1) != dressed(
        ["a, b, c, d, e, f, g"], shuffle=True
    )
    assert 8 < len(dressed(["a, b, c, d, e, f, g"], shuffle=True)) <= 16


def test_words_before_a_caption_stay_before_it():
    assert dressed(["a cat", ""], trigger="a zork,") == ("a zork, a cat", "a zork,")
    assert all(x.startswith("zork, ") for x in dressed(["cat, red, small"], "zork,", True, keep=1))


# What is learned from


def test_several_parts_of_a_long_picture_are_learned(folder, tmp_path):
    torch.manual_seed(0)
    encoder = cast(Encoder, networks(SMALL)["encoder"])
    steps = Image.new("RGB", (256, 64))
    for x in range(256):
        steps.paste((x, x, x), (x, 0, x + 1, 64))
    steps.save(folder / "a.png")
    pictures = open_pictures(folder)

    def latents(name: str, crops: int) -> torch.Tensor:
        data = cache_latents(encoder, pictures, 32, tmp_path / name, tokenizer=WORDS, step=16, crops=crops)
        assert len(data) == 2
        found = [latents for entries in data._buckets for latents, i in entries if i == 0]
        return torch.stack([one.mean[one.number] for one in found]).float()

    middle, parts = latents("middle", 1), latents("parts", 5)
    assert len(middle) == 1 and len(parts) == 5
    assert len({tuple(part.flatten().tolist()) for part in parts}) >= 3  # by chance two may begin alike
    assert torch.equal(parts, latents("parts", 5))  # from the same files
    assert torch.equal(parts, latents("again", 5))  # and the same parts in new ones


def test_pictures_of_what_must_not_change_have_every_other_turn(folder, tmp_path):
    encoder = cast(Encoder, networks(SMALL)["encoder"])
    others = tmp_path / "others"
    others.mkdir()
    Image.new("RGB", (32, 32)).save(others / "dog.png")
    (others / "dog.txt").write_text("a dog")
    own, other = (
        cache_latents(encoder, open_pictures(x), 32, tmp_path / "l", tokenizer=WORDS)
        for x in (folder, others)
    )
    both = Mixed(own, other)
    generator = torch.Generator().manual_seed(0)
    dog = WORDS.encode("a dog")
    turns = [both.latent_batch(generator, 2)[1].tolist() for _ in range(300)]
    whole = [rows for rows in turns if rows == [dog, dog]]
    assert 120 < len(whole) < 180 and all(dog not in rows for rows in turns if rows not in whole)
    for seed in range(6):
        named = both.describe(torch.Generator().manual_seed(seed), 1)
        dogs = both.latent_batch(torch.Generator().manual_seed(seed), 1)[1].tolist() == [dog]
        assert ("dog.png" in named) == dogs


def test_large_photographs_are_decoded_once_while_there_is_room(folder, monkeypatch):
    decoded = []
    real = images.to_rgb

    def counting(picture):
        decoded.append(picture.size)
        return real(picture)

    monkeypatch.setattr(images, "to_rgb", counting)
    pictures = open_pictures(folder)
    for _ in range(3):
        for i in range(2):
            pictures[i][0].putpixel((0, 0), (9, 9, 9))  # whoever gets a picture may change it
            assert pictures[i][0].getpixel((0, 0)) != (9, 9, 9)
    assert len(decoded) == 2
    monkeypatch.setattr(images, "ROOM", 3 * 64 * 32)  # for one
    pictures = open_pictures(folder)
    decoded.clear()
    for i in (0, 0, 1, 1, 0):
        assert pictures[i][0].size == (64, 32)
    assert len(decoded) == 3
