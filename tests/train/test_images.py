"""Pictures with captions, from small files of every kind."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
import tarfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from reifusion.train.images import DataError, Item, Pictures, open_pictures, some, to_rgb

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


@pytest.fixture(autouse=True)
def quiet_and_apart(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    datasets.disable_progress_bars()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # good data causes no warning
        yield


def png(colour: tuple[int, ...] = RED, size: tuple[int, int] = (20, 10)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB" if len(colour) == 3 else "RGBA", size, colour).save(file, "PNG")
    return file.getvalue()


def folder_of(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def parquet(path: Path, columns: dict[str, list]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def tar(path: Path, files: dict[str, bytes | str]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def captions(pictures: Pictures) -> dict[str, tuple[str, ...]]:
    return {item.name: item.captions for item in pictures.items}


# ---- sources ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_folder_with_metadata(tmp_path: Path, kind: str) -> None:
    rows = [("a.png", "a red thing"), ("deep/b.png", "a blue, wide thing")]
    folder_of(tmp_path, {"a.png": png(RED), "deep/b.png": png(BLUE, (30, 10))})
    with open(tmp_path / f"metadata.{kind}", "w", newline="") as file:
        if kind == "csv":
            csv.writer(file).writerows([("file_name", "text"), *rows])
        else:
            file.writelines(json.dumps({"file_name": name, "text": text}) + "\n" for name, text in rows)
    pictures = open_pictures(tmp_path)
    assert captions(pictures) == {name: (text,) for name, text in rows}
    assert len(pictures) == 2 and [(i.width, i.height) for i in pictures.items] == [(20, 10), (30, 10)]
    picture, caption = pictures[1]
    assert picture.mode == "RGB" and picture.getpixel((0, 0)) == BLUE and caption == "a blue, wide thing"


def test_a_folder_with_a_text_beside_each_picture(tmp_path: Path) -> None:
    texts = {"a.txt": "\ufeffone\r\n\n two \n", "b.txt": "drei für dich"}
    pictures = open_pictures(folder_of(tmp_path, {"a.png": png(), "b.jpg": png(), **texts}))
    assert captions(pictures) == {"a.png": ("one", "two"), "b.jpg": ("drei für dich",)}
    assert pictures[0][1] == "one"


def test_names_mean_nothing_but_themselves(tmp_path: Path) -> None:
    """`datasets` would take the first for the whole training split, and the others for patterns."""
    names = ["a red train", "test-1", "cat [1]", "what?", "sub [x]/*"]
    files: dict[str, bytes | str] = {f"{name}.png": png() for name in names}
    folder = folder_of(tmp_path / "we[2]ird *", files | {f"{name}.txt": name for name in names})
    assert captions(open_pictures(folder)) == {f"{name}.png": (name,) for name in names}
    assert captions(open_pictures(folder / "cat [1].png")) == {"cat [1].png": ("cat [1]",)}


def test_splits_are_folders_if_there_is_nothing_else(tmp_path: Path) -> None:
    folder_of(tmp_path, {"train/a.png": png(), "train/a.txt": "a", "test/b.png": png(), "test/b.txt": "b"})
    assert captions(open_pictures(tmp_path)) == {"a.png": ("a",)}
    assert captions(open_pictures(tmp_path, split="test")) == {"b.png": ("b",)}
    with pytest.raises(DataError, match="no split 'val'; it has test, train"):
        open_pictures(tmp_path, split="val")
    folder_of(tmp_path, {"c.png": png(), "c.txt": "c"})
    assert set(captions(open_pictures(tmp_path))) == {"c.png", "train/a.png", "test/b.png"}


def test_a_split_that_does_not_exist_is_no_other_one(tmp_path: Path) -> None:
    plain = folder_of(tmp_path / "plain", {"a.png": png(RED), "a.txt": "a"})
    with pytest.raises(DataError, match="has no split 'test'"):
        open_pictures(plain, split="test")
    saved = datasets.Dataset.from_dict(
        {"image": [{"bytes": png(), "path": None}], "text": ["a"]},
        datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")}),
    )
    saved.save_to_disk(str(tmp_path / "saved"))
    assert len(open_pictures(tmp_path / "saved")) == 1
    for source in plain, tmp_path / "saved":  # beside the data that the split is of
        assert len(open_pictures(source, split="test", must_split=False)) == 1
    with pytest.raises(DataError, match="has no split 'test'"):
        open_pictures(tmp_path / "saved", split="test")


def test_floats_are_not_guessed(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"a.png": png(RED), "a.txt": "a"})
    Image.fromarray(np.full((16, 16), 0.5, np.float32)).save(folder / "b.tiff")
    with pytest.warns(UserWarning, match="1 of 2 pictures cannot be read and are left out: b.tiff"):
        assert len(open_pictures(folder)) == 1


def test_other_folders_mean_nothing(tmp_path: Path) -> None:
    """Here "train" is a vehicle, and a folder's name is not a caption."""
    with pytest.warns(UserWarning, match="2 of 2 pictures have no caption: plane/b.png, train/a.png"):
        pictures = open_pictures(folder_of(tmp_path, {"train/a.png": png(), "plane/b.png": png()}))
    assert set(captions(pictures).values()) == {("",)}


@pytest.mark.parametrize("form", ["struct", "binary", "declared", "in a split's folder", "a glob"])
def test_parquet(tmp_path: Path, form: str) -> None:
    files = [png(RED), png(GREEN)]
    images = (
        files if form == "binary" else [{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(files)]
    )
    columns: dict[str, list] = {"image": images, "id": [1, 2], "text": ["red", "green"]}
    if form == "declared":
        features = datasets.Features(
            {"image": datasets.Image(), "id": datasets.Value("int64"), "text": datasets.Value("string")}
        )
        datasets.Dataset.from_dict(columns, features).to_parquet(tmp_path / "one.parquet")
        pictures = open_pictures(tmp_path / "one.parquet")
    elif form == "in a split's folder":
        parquet(tmp_path / "test" / "x.parquet", columns)
        pictures = open_pictures(tmp_path, split="test")
    elif form == "a glob":
        for i in range(2):
            parquet(tmp_path / f"{i}.parquet", {name: column[i : i + 1] for name, column in columns.items()})
        pictures = open_pictures(str(tmp_path / "*.parquet"))
    else:
        parquet(tmp_path / "train-00000-of-00001.parquet", columns)
        parquet(
            tmp_path / "test-00000-of-00001.parquet", {name: column[:1] for name, column in columns.items()}
        )
        pictures = open_pictures(tmp_path)
        assert len(open_pictures(tmp_path, split="test")) == 1
    assert [(p.getpixel((0, 0)), c) for p, c in pictures] == [(RED, "red"), (GREEN, "green")]


def test_several_captions_in_a_list(tmp_path: Path) -> None:
    columns: dict[str, list] = {"image": [png()] * 2, "captions": [["a", " b "], ["line one\nline two"]]}
    pictures = open_pictures(parquet(tmp_path / "x.parquet", columns))
    assert [item.captions for item in pictures.items] == [("a", "b"), ("line one\nline two",)]


def test_webdataset_shards(tmp_path: Path) -> None:
    for shard in range(2):
        files = {f"{shard}{i}.{end}": png((40 * i, 90 * shard, 0)) for i in range(3) for end in ["png"]}
        texts = {f"{shard}{i}.txt": f"no. {shard}{i}\nthe same" for i in range(3)}
        tar(tmp_path / f"{shard}.tar", dict(sorted((files | texts).items())))
    for source in (tmp_path, str(tmp_path / "*.tar")):
        pictures = open_pictures(source)
        assert captions(pictures) == {
            f"{shard}{i}": (f"no. {shard}{i}", "the same") for shard in range(2) for i in range(3)
        }
        assert pictures[5][0].getpixel((0, 0)) == (80, 90, 0)


def test_a_hub_id_goes_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list = []

    def load_dataset(*arguments: object, **options: object) -> datasets.Dataset:
        asked.append((arguments, options))
        columns = {"image": [{"bytes": png(), "path": None}], "text": ["red"]}
        return datasets.Dataset.from_dict(
            columns, datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert captions(open_pictures("owner/name", split="test")) == {"row 0": ("red",)}
    open_pictures("owner/na.me-1:small", cache=tmp_path)
    assert asked == [
        (("owner/name", None), {"split": "test", "cache_dir": None}),
        (("owner/na.me-1", "small"), {"split": "train", "cache_dir": str(tmp_path)}),
    ]


def test_without_a_network_a_hub_id_is_one_clear_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        DataError, match="owner/name is not a file or folder here, and the hub could not provide it"
    ) as error:
        open_pictures("owner/name")
    assert "\n" not in str(error.value)


# ---- errors -----------------------------------------------------------------------------------------------


def test_broken_pictures_and_missing_captions_are_counted_and_named_once(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {f"bad{i}.png": b"this is no picture" for i in range(5)}
    files |= {"empty.png": b"", "good.png": png(), "good.txt": "good", "mute.png": png(), "vain.png": png()}
    with pytest.warns(UserWarning) as caught:
        pictures = open_pictures(folder_of(tmp_path, files | {"vain.txt": " \n"}))
    (message,) = [str(warning.message) for warning in caught]
    assert (
        "6 of 9 pictures cannot be read and are left out: bad0.png, bad1.png, bad2.png and 3 more" in message
    )
    assert "2 of 9 pictures have no caption: mute.png, vain.png" in message
    assert captions(pictures) == {"good.png": ("good",), "mute.png": ("",), "vain.png": ("",)}


def test_pictures_missing_from_the_metadata_are_named(tmp_path: Path) -> None:
    rows = [
        {"file_name": "a.png", "text": "a"},
        {"file_name": "gone.png", "text": "b"},
        {"file_name": "c.png"},
    ]
    files: dict[str, bytes | str] = {"a.png": png(), "c.png": png(), "new.png": png(), "phone.heic": b"?"}
    files["metadata.jsonl"] = "\n".join(json.dumps({"text": None} | row) for row in rows)
    with pytest.warns(UserWarning) as caught:
        pictures = open_pictures(folder_of(tmp_path, files))
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "1 of 3 pictures cannot be read and are left out: " in message and "gone.png" in message
    assert "1 of 3 pictures have no caption: c.png" in message
    assert "2 other pictures there are not used: new.png, phone.heic" in message
    assert captions(pictures) == {"a.png": ("a",), "c.png": ("",)}


def test_rows_without_a_picture_or_caption(tmp_path: Path) -> None:
    columns: dict[str, list] = {"image": [png(), None, b"no"], "text": [None, "b", "c"]}
    with pytest.warns(UserWarning, match="2 of 3 .*: row 1, row 2; 1 of 3 .*no caption: row 0"):
        assert len(open_pictures(parquet(tmp_path / "x.parquet", columns))) == 1


@pytest.mark.parametrize("end", ["png", "jpg"])
def test_a_picture_that_breaks_off_is_named_where_it_is_used(tmp_path: Path, end: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    noise.save(tmp_path / f"b.{end}")
    whole = (tmp_path / f"b.{end}").read_bytes()
    folder_of(tmp_path, {f"b.{end}": whole[: len(whole) // 2], "b.txt": "b", "a.png": png(), "a.txt": "a"})
    pictures = open_pictures(tmp_path)
    with pytest.raises(DataError, match=f"the picture b.{end} cannot be read: "):
        pictures[1]
    with pytest.warns(UserWarning, match="such pictures are skipped") as caught:
        batch = pictures.pixel_batch(torch.Generator().manual_seed(0), 50, 8)
    assert len(caught) == 1 and torch.equal(
        batch, torch.tensor(RED).view(1, 3, 1, 1).expand(50, 3, 8, 8) / 127.5 - 1
    )


@pytest.mark.parametrize(
    "files, options, message",
    [
        (None, {}, "does not exist"),
        ({"notes.md": "x"}, {}, "holds no .* pictures"),
        ({"a.png": b"x", "b.png": b""}, {}, "no pictures in .*: a.png, b.png cannot be read"),
        ({"a.png": png(), "b.tar": b"x"}, {}, "both imagefolder and webdataset"),
        ({"b.tar": b"x" * 2000}, {}, "cannot be read: "),
        ({"b.parquet": b"x" * 2000}, {}, "cannot be read: "),
        ({"a.png": png(), "metadata.jsonl": '{"text": "no name"}'}, {}, "cannot be read: .*file_name"),
        ({"a.png": png(), "metadata.jsonl": '{"text": '}, {}, "cannot be read: "),
        ({"a.png": png(), "metadata.jsonl": '{"file_name": "../a.png"}'}, {}, r"read: .*\.\./a.png"),
        ({"a.png": png()}, {"caption_column": "words"}, "no column 'words'; it has image"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_one_clear_sentence(
    tmp_path: Path, files: dict | None, options: dict, message: str
) -> None:
    source = tmp_path / "data" if files is None else folder_of(tmp_path / "data", files)
    with pytest.raises(DataError, match=message) as error:
        open_pictures(source, **options)
    assert "\n" not in str(error.value) and str(source) in str(error.value)


@pytest.mark.parametrize("end", ["tar", "parquet"])
def test_the_damaged_one_of_many_shards_is_named(tmp_path: Path, end: str) -> None:
    for i in range(3):
        if end == "tar":
            tar(tmp_path / f"{i}.tar", {"a.png": png(), "a.txt": "a"})
        else:
            parquet(tmp_path / f"{i}.parquet", {"image": [png()], "text": ["a"]})
    damaged = tmp_path / f"1.{end}"
    damaged.write_bytes(damaged.read_bytes()[:580])
    for source in (tmp_path, f"{tmp_path}/*.{end}"):
        with pytest.raises(DataError, match=rf"cannot be read: .* \(1\.{end}\)$"):
            open_pictures(source)


def test_a_choice_of_columns_is_the_users(tmp_path: Path) -> None:
    left, right = [png(RED)], [png(BLUE)]
    both = parquet(tmp_path / "a.parquet", {"left": left, "right": right, "n": [1]})
    with pytest.raises(DataError, match="pictures in left and right; choose with image_column"):
        open_pictures(both)
    with pytest.warns(UserWarning, match="no caption"):
        assert open_pictures(both, image_column="right")[0][0].getpixel((0, 0)) == BLUE
    with pytest.raises(DataError, match=r"the column 'n' of .* holds no pictures"):
        open_pictures(both, image_column="n")
    with pytest.raises(DataError, match="no column 'middle'; it has left, right, n"):
        open_pictures(both, image_column="middle")
    with pytest.raises(DataError, match=r"the column 'n' of .* holds no text"):
        open_pictures(both, image_column="left", caption_column="n")

    words = parquet(tmp_path / "b.parquet", {"image": left, "mask": right, "text": ["a"], "prompt": ["b"]})
    with pytest.raises(DataError, match="captions in text and prompt; choose with caption_column"):
        open_pictures(words)
    picture, caption = open_pictures(words, caption_column="prompt")[
        0
    ]  # "mask" does not compete with "image"
    assert picture.getpixel((0, 0)) == RED and caption == "b"

    with pytest.raises(DataError, match="no column of pictures; it has text"):
        open_pictures(parquet(tmp_path / "c.parquet", {"text": ["a"]}))


def test_a_changed_caption_is_seen(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"a.png": png(), "metadata.csv": "file_name,text\na.png,old"})
    assert open_pictures(folder)[0][1] == "old"
    folder_of(tmp_path, {"metadata.csv": "file_name,text\na.png,new"})
    os.utime(folder / "metadata.csv", (1e9, 1e9))
    assert open_pictures(folder)[0][1] == "new"


def test_names_are_cut_short() -> None:
    assert some(["a", "b", "c"]) == "a, b, c" and some(["a", "b", "c", "d"]) == "a, b, c and 1 more"


def test_importing_is_cheap() -> None:
    code = "import sys, reifusion.train.images, reifusion.train.latents; assert 'datasets' not in sys.modules"
    subprocess.run([sys.executable, "-c", code + "; assert 'pyarrow' not in sys.modules"], check=True)


# ---- one picture ------------------------------------------------------------------------------------------


def drawn(picture: Image.Image, kind: str, **options: object) -> np.ndarray:
    """Sends a picture through a file and `Pictures` -> (H, W, 3)."""
    file = io.BytesIO()
    picture.save(file, kind, **options)
    rgb = Pictures(lambda row: file.getvalue(), [Item(0, "x", 1, 1, ("",))])[0][0]
    assert rgb.mode == "RGB"
    return np.asarray(rgb).astype(int)


def test_transparent_parts_become_white() -> None:
    for mode, clear, half in (("RGBA", (255, 0, 0, 0), (255, 0, 0, 128)), ("LA", (0, 0), (0, 127))):
        picture = Image.new(mode, (2, 1), clear)
        picture.putpixel((1, 0), half)
        pixels = drawn(picture, "PNG")
        assert (pixels[0, 0] == 255).all()
        assert abs(pixels[0, 1] - ([255, 127, 127] if mode == "RGBA" else [128] * 3)).max() <= 1


def test_palettes_with_and_without_a_transparent_colour() -> None:
    picture = Image.new("P", (2, 1))
    picture.putpalette([*GREEN, *BLUE])
    picture.putpixel((1, 0), 1)
    for kind in ("PNG", "GIF"):
        assert (drawn(picture, kind)[0] == [GREEN, BLUE]).all()
        assert (drawn(picture, kind, transparency=1)[0] == [GREEN, WHITE]).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_keep_their_greys(kind: str) -> None:
    levels = np.array([[0, 257, 128 * 257, 255 * 257]], np.uint16)
    assert (drawn(Image.fromarray(levels), kind)[0] == np.array([[0], [1], [128], [255]])).all()


def test_cmyk_and_grey() -> None:
    assert abs(drawn(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100)[4, 4] - RED).max() <= 3
    assert (drawn(Image.new("L", (1, 1), 77), "PNG") == 77).all()
    assert (drawn(Image.new("1", (1, 1), 1), "PNG") == 255).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright(tmp_path: Path, kind: str, orientation: int) -> None:
    """A camera that is held another way writes the same view with its pixels turned."""
    upright = Image.new("RGB", (32, 16), WHITE)
    upright.paste(RED, (0, 0, 16, 8))
    turned = {
        1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright if turned is None else upright.transpose(turned)
    stored.save(tmp_path / f"a.{kind.lower()}", kind, exif=exif, quality=95)
    (tmp_path / "a.txt").write_text("a")
    pictures = open_pictures(tmp_path)
    assert (pictures.items[0].width, pictures.items[0].height) == (32, 16)
    pixels = np.asarray(pictures[0][0]).astype(int)
    assert pixels.shape == (16, 32, 3) and abs(pixels - np.asarray(upright)).mean() < 3


@given(st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16"]))
def test_every_mode_becomes_rgb(mode: str) -> None:
    picture = to_rgb(Image.new(mode, (3, 2)))
    assert picture.mode == "RGB" and picture.size == (3, 2)


@settings(max_examples=60)
@given(st.data())
def test_no_damage_ends_in_anything_but_a_sentence(data: st.DataObject) -> None:
    content = bytearray(png((10, 200, 30, 90), (40, 30)))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    try:
        assert Pictures(lambda row: bytes(content), [Item(0, "x", 1, 1, ("",))])[0][0].mode == "RGB"
    except DataError as error:
        assert "the picture x cannot be read" in str(error)


def test_only_pictures_are_opened(tmp_path: Path) -> None:
    """Pillow would hand an EPS to another program."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"
    assert Image.open(io.BytesIO(eps)).format == "EPS"
    with pytest.raises(DataError, match="row 0 cannot be read"):
        open_pictures(parquet(tmp_path / "x.parquet", {"image": [eps], "text": ["a"]}))


# ---- squares to train a VAE on ----------------------------------------------------------------------------


def slope(width: int, height: int) -> Pictures:
    """A picture whose red is x and whose green is y."""
    y, x = np.mgrid[:height, :width].astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(np.stack([x, y, 0 * x], -1)).save(file, "PNG")
    return Pictures(lambda row: file.getvalue(), [Item(0, "x", width, height, ("",))])


def test_the_same_generator_gives_the_same_squares() -> None:
    pictures = slope(100, 70)
    one, two = (pictures.pixel_batch(torch.Generator().manual_seed(5), 4, 16, mirror=True) for _ in range(2))
    other = pictures.pixel_batch(torch.Generator().manual_seed(6), 4, 16, mirror=True)
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert one.shape == (4, 3, 16, 16) and one.dtype == torch.float32 and one.min() >= -1 and one.max() <= 1


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 120), st.integers(1, 120), st.integers(1, 40), st.integers(0, 2**32))
def test_squares_are_squares_of_the_picture(width: int, height: int, size: int, seed: int) -> None:
    pixels = slope(width, height).pixel_batch(torch.Generator().manual_seed(seed), 3, size)
    red, green = ((pixels + 1) * 127.5)[:, :2].unbind(1)  # (3, size, size): the origin of each pixel
    side = torch.stack(
        [red[:, 0, -1] - red[:, 0, 0], green[:, -1, 0] - green[:, 0, 0]]
    )  # nearly the side of the square
    assert red.max() <= width - 1 and green.max() <= height - 1
    assert (side[0] - side[1]).abs().max() <= 4  # so few pixels, each rounded
    if min(width, height) >= size:
        assert (side >= size - 1 - 3).all() and (side <= min(width, height)).all()


def test_full_resolution_stays_sharp_and_sizes_vary() -> None:
    """The side of a square lies between `size` and the short side, and comes near to both."""
    pixels = slope(200, 60).pixel_batch(torch.Generator().manual_seed(0), 200, 50)
    red = (pixels[:, 0] + 1) * 127.5
    sides = red[:, 0, -1] - red[:, 0, 0] + 1
    assert sides.min() < 50.5 and sides.max() > 58
    assert red[:, 0, 0].min() < 5 and red[:, 0, -1].max() > 194
    unscaled = red[(sides - 50).abs() < 0.01]
    assert len(unscaled) and torch.equal(unscaled.round(), unscaled.round()[:, :1, :].expand_as(unscaled))


def test_half_are_mirrored_if_asked() -> None:
    pictures, generator = slope(64, 64), torch.Generator()
    left = [
        p[0, 0, 0] > p[0, 0, -1] for p in pictures.pixel_batch(generator.manual_seed(0), 200, 8, mirror=True)
    ]
    assert 70 < sum(left) < 130
    plain = pictures.pixel_batch(generator.manual_seed(0), 200, 8)
    assert all(p[0, 0, 0] < p[0, 0, -1] for p in plain)
