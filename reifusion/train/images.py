"""Pictures with captions from anywhere: a folder, parquet files, .tar shards, a data set of the hub.

The containers are read by Hugging Face's `datasets`. Pictures stay files until they are asked for: a data set
need not fit into memory, and a broken picture is counted and named instead of ending the run.
"""

from __future__ import annotations

import glob
import hashlib
import io
import os
import re
import tarfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache as once
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from ..model.pictures import to_tensor
from .data import DataError

# What a column, or the ending of a file in a .tar, may be called to be taken without asking.
IMAGE_COLUMNS = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp")
CAPTION_COLUMNS = ("text", "caption", "captions", "txt", "prompt", "description")
SPLITS = {"train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval"}
SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"}
UNSEEN = {".avif", ".heic", ".heif"}  # pictures, but `datasets` does not look for them in a folder
# Other formats that Pillow knows start other programs, or are no pictures.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")


@dataclass(frozen=True)
class Item:
    """What is known of one picture without decoding it."""

    row: int  # in its data set
    name: str  # for messages: the file's name in its folder, or the row's number
    width: int  # in pixels, as it is looked at (see `upright_size`)
    height: int
    captions: tuple[str, ...]  # any of them will do; none: ("",)


class Pictures:
    """Pictures and their captions: `pictures[i]` -> (RGB picture, its first caption).

    encoded: row -> the picture as a file's bytes, or where that file is. items: the pictures that there are.
    """

    def __init__(self, encoded: Callable[[int], bytes | Path], items: Sequence[Item]):
        self._encoded, self.items = encoded, items
        self._warned = False

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> tuple[Image.Image, str]:
        """Raises DataError for a picture that turns out to be broken: only its beginning was looked at."""
        item = self.items[i]
        try:
            with _open(self._encoded(item.row)) as picture:
                return to_rgb(picture), item.captions[0]
        except Exception as error:  # there is nothing that Pillow would not raise for a broken file
            raise DataError(f"the picture {item.name} cannot be read: {error}") from error

    def __iter__(self) -> Iterator[tuple[Image.Image, str]]:
        return (self[i] for i in range(len(self)))

    def fingerprint(self, i: int) -> str:
        """Changes when the picture does: a hash of its bytes, or of its file's name, size and time.

        Raises DataError when its file is gone.
        """
        item = self.items[i]
        try:
            encoded = self._encoded(item.row)
            if isinstance(encoded, Path):
                status = encoded.stat()
                encoded = f"{item.name}\n{status.st_size}\n{status.st_mtime_ns}".encode()
        except OSError as error:
            raise DataError(f"the picture {item.name} cannot be read: {error}") from error
        return hashlib.blake2b(encoded, digest_size=16).hexdigest()

    def pixel_batch(self, generator: torch.Generator, count: int, size: int, mirror: bool = False) -> Tensor:
        """Random squares of random pictures -> (count, 3, size, size) in [-1, 1]; mirror: half of them.

        A square is anything from the picture's short side down to `size` pixels. All that is random comes
        from `generator`. Raises DataError when no picture can be read.
        """
        chosen = torch.randint(len(self), (count,), generator=generator).tolist()
        numbers = torch.rand(count, 4, generator=generator).tolist()
        squares = []
        for i, (zoom, x, y, flip) in zip(chosen, numbers):
            picture = self._readable_from(i)
            width, height = picture.size
            short = min(width, height)
            side = round(short + zoom * (min(short, size) - short))
            left, top = round(x * (width - side)), round(y * (height - side))  # whole: pixels stay sharp
            box = (left, top, left + side, top + side)
            square = picture.resize((size, size), Image.Resampling.LANCZOS, box)
            squares.append(to_tensor(ImageOps.mirror(square) if mirror and flip < 0.5 else square))
        return torch.cat(squares)

    def _readable_from(self, i: int) -> Image.Image:
        """Picture i, or the next one that can be read."""
        for k in range(len(self)):
            try:
                return self[(i + k) % len(self)][0]
            except DataError as error:
                if not self._warned:
                    warnings.warn(f"{error}; such pictures are passed over", stacklevel=3)
                    self._warned = True
        raise DataError(f"none of the {len(self)} pictures can be read")


# ---- from a source to Pictures ----------------------------------------------------------------------------


def open_pictures(
    source: str | Path,
    *,
    split: str = "train",
    image_column: str | None = None,
    caption_column: str | None = None,
    cache: Path | None = None,
) -> Pictures:
    """The pictures and captions that there are at `source`:

    - a folder of pictures. Captions: `metadata.jsonl` or `metadata.csv` with file_name and text, or `cat.txt`
      beside `cat.png`, a caption a line. Folders in it may be splits: train, test, …;
    - parquet files or .tar shards (webdataset): one, a folder of them, or a glob in quotes;
    - `owner/name` of the Hugging Face hub, or `owner/name:configuration`.

    Columns are found by their names and types, unless named. cache: where `datasets` keeps what it has read.
    One warning counts and names the pictures that cannot be read, which are left out, and those without a
    caption, which have "". Raises DataError when there are none, or where there is a choice.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            "reading pictures needs the package datasets: pip install 'reifusion[train]'"
        ) from error
    rows, root, files = _load(str(source), split, cache)
    image = _image_column(rows, image_column, source)
    caption = _caption_column(rows, caption_column, source)
    keep = [image, *(name for name in (caption, "__key__") if name in rows.column_names)]
    try:
        rows = rows.select_columns(keep).cast_column(image, datasets.Image(decode=False))
    except Exception as error:
        raise DataError(f"the column {image!r} of {source} holds no pictures: {_reason(error)}") from error

    def encoded(row: int) -> bytes | Path:
        return _encoded(rows[row][image])

    items, unreadable, listed = [], [], set()
    for number, row in enumerate(tqdm(rows, desc="looking at pictures", leave=False, delay=3)):
        where = row[image] or {}
        name = row.get("__key__") or where.get("path") or f"row {number}"
        beside: str | None = None
        if root is not None and where.get("path"):
            listed.add(file := Path(where["path"]))
            name = os.path.relpath(file, root)
            beside = _text_of(file.with_suffix(".txt"))
        captions = _captions(row.get(caption), caption == "txt") or _captions(beside, True)
        try:
            with _open(_encoded(row[image])) as picture:
                items.append(Item(number, name, *upright_size(picture), captions or ("",)))
        except Exception:
            unreadable.append(name)
    _report(source, items, unreadable, sorted(os.path.relpath(f, root) for f in files - listed if root))
    return Pictures(encoded, items)


def _load(source: str, split: str, cache: Path | None) -> tuple[Any, Path | None, set[Path]]:
    """The rows at `source`, and if they are files of pictures: their folder, and all pictures in it."""
    given = path = Path(os.path.abspath(Path(source).expanduser()))
    folder = path.is_dir()
    if folder:
        path = _split_folder(path, split, source)
        files = [file for file in path.rglob("*") if not _hidden(file.relative_to(path)) and file.is_file()]
    else:
        files = [path] if path.is_file() else [Path(f) for f in sorted(glob.glob(str(path), recursive=True))]
    if not files and not folder and re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", source):
        name, _, configuration = source.partition(":")
        hint = f"{source} is no file or folder here, and the hub could not give it"
        return _read(hint, cache, name, configuration or None, split=split), None, set()
    kinds = sorted({_kind(file) for file in files} - {""})
    if not kinds:
        found = (
            "holds no .jpg, .png or other pictures" if folder else "is no data" if files else "is not there"
        )
        raise DataError(f"{source} {found}; give a folder of pictures, .parquet or .tar files, or owner/name")
    if len(kinds) > 1:
        raise DataError(
            f"{source} holds both {' and '.join(kinds)} files; give one kind, such as '*.parquet'"
        )
    (kind,) = kinds
    hint, ours = f"{source} cannot be read", {file for file in files if _kind(file) == kind}
    # Names are escaped, because `datasets` takes them for patterns.
    options: dict[str, Any] = {"split": split}
    if folder:
        options["data_dir"] = glob.escape(str(path))
    if kind != "imagefolder":
        if not folder or path != given:  # otherwise the names of the files tell which split they belong to
            options["data_files"] = {split: sorted(glob.escape(str(file)) for file in ours)}
        try:
            return _read(hint, cache, kind, **options), None, set()
        except DataError as error:
            damaged = [file.name for file in sorted(ours) if not _whole(file)]
            raise DataError(f"{error} ({some(damaged)})" if damaged else str(error)) from error
    # One pattern for all: by their names, a picture called "a red train" would be all that there is to train.
    options["data_files"] = {split: ["**"] if folder else [glob.escape(str(file)) for file in files]}
    root = path if folder else Path(os.path.commonpath([file.parent for file in ours]))
    unseen = {file for file in files if file.suffix.lower() in UNSEEN}
    return _read(hint, cache, kind, **options), root, ours | unseen


def _read(hint: str, cache: Path | None, *arguments: Any, **options: Any) -> Any:
    import datasets

    try:
        return datasets.load_dataset(*arguments, cache_dir=str(cache) if cache else None, **options)
    except Exception as error:  # its own kinds of errors are many, and those that pass through it more
        raise DataError(f"{hint}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """What went wrong, in a line. `datasets` wraps errors, and says less than they do."""
    while type(error).__name__ == "DatasetGenerationError" and error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__


def _kind(file: Path) -> str:
    """The part of `datasets` that reads it."""
    if file.suffix.lower() in SUFFIXES:
        return "imagefolder"
    if file.name == "metadata.parquet":
        return ""
    return {".parquet": "parquet", ".tar": "webdataset"}.get(file.suffix.lower(), "")


def _whole(file: Path) -> bool:
    """Whether a shard can be read to its end. Of many, `datasets` does not say which one cannot."""
    import pyarrow.parquet as pq

    try:
        if file.suffix.lower() == ".parquet":
            pq.read_metadata(file)
        else:
            with tarfile.open(file) as archive:
                archive.getmembers()
    except (OSError, tarfile.TarError, ValueError):  # pyarrow's own are ValueErrors
        return False
    return True


def _hidden(path: Path) -> bool:
    return any(part.startswith((".", "__")) for part in path.parts)


def _split_folder(folder: Path, split: str, source: str) -> Path:
    """The folder of the split, if `folder` has nothing but splits in it."""
    inside = [path for path in folder.iterdir() if not _hidden(Path(path.name))]
    splits = {path.name for path in inside if path.is_dir()}
    loose = [path for path in inside if path.is_file() and (_kind(path) or path.stem == "metadata")]
    if not splits or not splits <= SPLITS or loose:
        return folder
    if split not in splits:
        raise DataError(f"{source} has no split {split!r}; it has {', '.join(sorted(splits))}")
    return folder / split


# ---- columns ----------------------------------------------------------------------------------------------


def _image_column(rows: Any, wanted: str | None, source: str | Path) -> str:
    import datasets
    import pyarrow as pa

    def may_be(name: str) -> bool:
        kind = rows.data.schema.field(name).type
        file = pa.types.is_struct(kind) and {field.name for field in kind} == {"bytes", "path"}
        binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
        return isinstance(rows.features[name], datasets.Image) or file or binary

    if wanted is not None:
        return _known(rows, wanted, source)
    found = [name for name in rows.column_names if may_be(name)]
    if len(found) > 1:  # an image and its mask: the one with a known name is meant
        found = [name for name in found if name.lower() in IMAGE_COLUMNS] or found
    if not found:
        raise DataError(f"{source} has no column of pictures; it has {', '.join(rows.column_names)}")
    if len(found) > 1:
        raise DataError(f"{source} has pictures in {' and '.join(found)}; choose with image_column")
    return found[0]


def _caption_column(rows: Any, wanted: str | None, source: str | Path) -> str | None:
    import pyarrow as pa

    def is_text(kind: pa.DataType) -> bool:
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            return is_text(kind.value_type)
        return pa.types.is_string(kind) or pa.types.is_large_string(kind)

    texts = [name for name in rows.column_names if is_text(rows.data.schema.field(name).type)]
    if wanted is not None:
        if _known(rows, wanted, source) not in texts:
            raise DataError(f"the column {wanted!r} of {source} holds no text")
        return wanted
    found = [name for name in texts if name.lower() in CAPTION_COLUMNS]
    if len(found) > 1:
        raise DataError(f"{source} has captions in {' and '.join(found)}; choose with caption_column")
    return found[0] if found else None


def _known(rows: Any, name: str, source: str | Path) -> str:
    if name not in rows.column_names:
        raise DataError(f"{source} has no column {name!r}; it has {', '.join(rows.column_names)}")
    return name


def _captions(value: Any, lines: bool) -> tuple[str, ...]:
    """A cell as captions: several in a list, or in the lines of a text file."""
    texts = value if isinstance(value, list) else [value]
    texts = [text for text in texts if isinstance(text, str)]
    if lines:
        texts = [line for text in texts for line in text.splitlines()]
    return tuple(text.strip() for text in texts if text.strip())


def _text_of(file: Path) -> str | None:
    return file.read_text("utf-8-sig", errors="replace") if file.is_file() else None


def _report(source: str | Path, items: list[Item], unreadable: list[str], unlisted: list[str]) -> None:
    """Says once what is wrong with a data set. Raises DataError when nothing of it is left."""
    total = len(items) + len(unreadable)
    if not items:
        why = f": {some(unreadable)} cannot be read" if unreadable else ""
        raise DataError(f"there are no pictures in {source}{why}")
    silent = [item.name for item in items if item.captions == ("",)]
    problems = [
        f"{len(names)} of {total} pictures {what}: {some(names)}"
        for names, what in (
            (unreadable, "cannot be read and are left out"),
            (silent, "have no caption"),
        )
        if names
    ]
    if unlisted:  # by the metadata, or because `datasets` has no use for their format
        problems.append(f"{len(unlisted)} other pictures there are not part of it: {some(unlisted)}")
    if problems:
        warnings.warn(f"{source}: {'; '.join(problems)}", stacklevel=3)


def some(names: Sequence[str], most: int = 3) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# ---- one picture ------------------------------------------------------------------------------------------


def to_rgb(picture: Image.Image) -> Image.Image:
    """Any picture as it is looked at: upright, in 8-bit RGB, on white where it was transparent."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):  # 16 bits, which Pillow's own conversion would cut off at 255
        levels = np.asarray(picture).astype(np.float32) / 257  # 65535 -> 255
        picture = Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


def upright_size(picture: Image.Image) -> tuple[int, int]:
    """Width and height as they will be, from the file's beginning alone."""
    # A PNG that has no orientation there would be decoded to its end to look for one.
    looked = picture.format != "PNG" or "exif" in picture.info
    sideways = looked and picture.getexif().get(0x0112, 1) >= 5  # EXIF's Orientation: 5 to 8 lie on a side
    return (picture.height, picture.width) if sideways else (picture.width, picture.height)


def _encoded(cell: Any) -> bytes | Path:
    """What `datasets` says of an undecoded picture -> its bytes, or its file."""
    if not cell or not (cell["bytes"] or cell["path"]):
        raise DataError("a row has no picture")
    return cell["bytes"] or Path(cell["path"])


def _open(encoded: bytes | Path) -> Image.Image:
    return Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded, formats=_formats())


@once
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)
