"""Captioned pictures from a folder, from parquet files, from .tar shards or from the Hugging Face hub.

Hugging Face's `datasets` reads the containers. A picture is decoded only when it is used, so a data set
need not fit into memory, and a broken picture is counted and named instead of ending the run.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import math
import os
import re
import tarfile
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache as once
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from ..model.pictures import to_tensor
from .captions import CaptionError, dressed
from .captions import listed as listed_captions

# Names of a column, or suffixes in a .tar, that are recognised without being named by the user.
IMAGE_COLUMNS = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp")
CAPTION_COLUMNS = ("text", "caption", "captions", "txt", "prompt", "description")
SPLITS = {"train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval"}
SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"}
UNSEEN = {".avif", ".heic", ".heif"}  # pictures that `datasets` does not look for in a folder
# Only these: some other formats of Pillow are not pictures, and some start another program.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")


ROOM = 2**30  # bytes of decoded pictures that are kept, as a large photograph takes long to decode


class DataError(RuntimeError):
    """The pictures cannot be read or fetched; the message says why in one sentence."""


@dataclass(frozen=True)
class Item:
    """One picture of a data set, not yet decoded."""

    row: int  # in its data set
    name: str  # for messages: the file's path within its folder, or the row's number
    width: int  # in pixels, of the upright picture (see `upright_size`)
    height: int
    captions: tuple[str, ...]  # alternatives, each of them true; ("",) for a picture without a caption
    repeats: int = 1  # a picture with 3 is shown three times as often as one with 1


class Pictures:
    """Pictures and their captions: `pictures[i]` -> (RGB picture, its first caption).

    encoded: row -> the bytes of the picture's file, or the path of that file. items: the pictures.
    """

    def __init__(self, encoded: Callable[[int], bytes | Path], items: Sequence[Item]):
        self._encoded, self.items = encoded, items
        self._warned = False
        # When the file was written, and the picture in it; the last to be used at the end.
        self._decoded: OrderedDict[int, tuple[int, Image.Image]] = OrderedDict()
        self._room = ROOM
        self._lock = threading.Lock()  # of these two

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> tuple[Image.Image, str]:
        """Raises DataError for a broken picture: `open_pictures` has read only the beginning of its file."""
        return self._picture(i).copy(), self.items[i].captions[0]

    def _picture(self, i: int) -> Image.Image:
        """Returns the picture that is kept, for those that leave it as it is."""
        item = self.items[i]
        try:
            encoded = self._encoded(item.row)
            stamp = encoded.stat().st_mtime_ns if isinstance(encoded, Path) else 0
            then, known = self._forget(i)
            if known is None or then != stamp:
                with _open(encoded) as picture:
                    known = to_rgb(picture)
        except Exception as error:  # for a broken file, Pillow raises errors of nearly any type
            raise DataError(f"the picture {item.name} cannot be read: {error}") from error
        self._keep(i, stamp, known)
        return known

    def _forget(self, i: int) -> tuple[int, Image.Image | None]:
        """Takes a picture out of those that are kept; returns when its file was written, and the picture."""
        with self._lock:
            stamp, known = self._decoded.pop(i, (0, None))
            self._room += 0 if known is None else _bytes(known)
        return stamp, known

    def _keep(self, i: int, stamp: int, picture: Image.Image) -> None:
        """Keeps a picture, and lets others go that were used longest ago."""
        self._forget(i)  # another thread may have kept it meanwhile
        with self._lock:
            self._room -= _bytes(picture)
            while self._room < 0 and self._decoded:
                self._room += _bytes(self._decoded.popitem(last=False)[1][1])
            self._decoded[i] = stamp, picture

    def __iter__(self) -> Iterator[tuple[Image.Image, str]]:
        return (self[i] for i in range(len(self)))

    def fingerprint(self, i: int) -> str:
        """Returns a hash of the picture's bytes, or of its file's name, size and time of modification.

        So it changes if the picture does. Raises DataError if the file has disappeared.
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

    def dressed(self, trigger: str = "", shuffle: bool = False, keep: int = 1, seed: int = 0) -> Pictures:
        """Returns the same pictures with other captions: see `captions.dressed`."""
        items = [
            replace(item, captions=dressed(item.captions, trigger, shuffle, keep, seed))
            for item in self.items
        ]
        return Pictures(self._encoded, items)

    def digest(self) -> str:
        """Returns a digest of the names, sizes and captions, which tells one set of pictures from another."""
        rows = [(i.name, i.width, i.height, i.captions, i.repeats) for i in self.items]
        return f"#{hashlib.blake2b(repr(rows).encode(), digest_size=8).hexdigest()}"

    def pixel_batch(self, generator: torch.Generator, count: int, size: int, mirror: bool = False) -> Tensor:
        """Crops random squares from random pictures -> (count, 3, size, size) in [-1, 1].

        The side of a square lies between `size` pixels and the picture's short side. mirror: mirrors half of
        the squares. `generator` alone decides the batch. Raises DataError if no picture can be read.
        """
        often = [i for i, item in enumerate(self.items) for _ in range(item.repeats)]
        chosen = [often[k] for k in torch.randint(len(often), (count,), generator=generator).tolist()]
        numbers = torch.rand(count, 4, generator=generator).tolist()
        squares = []
        for i, (zoom, x, y, flip) in zip(chosen, numbers):
            picture = self._readable_from(i)
            width, height = picture.size
            short = min(width, height)
            side = round(short + zoom * (min(short, size) - short))
            left, top = round(x * (width - side)), round(y * (height - side))  # integers keep pixels sharp
            box = (left, top, left + side, top + side)
            # A square of a photograph is halved a few times first, which is eight times as fast.
            square = picture.resize((size, size), Image.Resampling.LANCZOS, box, reducing_gap=3.0)
            squares.append(to_tensor(ImageOps.mirror(square) if mirror and flip < 0.5 else square))
        return torch.cat(squares)

    def _readable_from(self, i: int) -> Image.Image:
        """Returns picture i, or the next one that can be read."""
        for k in range(len(self)):
            try:
                return self._picture((i + k) % len(self))
            except DataError as error:
                if not self._warned:
                    warnings.warn(f"{error}; such pictures are skipped", stacklevel=3)
                    self._warned = True
        raise DataError(f"none of the {len(self)} pictures can be read")


# ---- from a source to Pictures ----------------------------------------------------------------------------


def open_pictures(
    source: str | Path,
    *,
    split: str = "train",
    image_column: str | None = None,
    caption_column: str | None = None,
    caption: str = "",
    cache: Path | None = None,
    must_split: bool = True,
) -> Pictures:
    """Finds the pictures and captions of a source, which may be

    - a folder of pictures. The captions are in `metadata.jsonl` or `metadata.csv` with columns file_name and
      text, in `captions.jsonl`, .json, .csv or .tsv, or in `cat.txt` or `cat.caption` beside `cat.png`, one
      per line. Its subfolders may be splits: train, test, …; or, as kohya's trainer has them, repeats and a
      caption: `10_zork`;
    - a folder that `datasets` has saved (`save_to_disk`);
    - parquet files or .tar shards (webdataset): one of them, a folder of them, or a glob in quotes;
    - `owner/name` of the Hugging Face hub, or `owner/name:configuration`;
    - `shapes`: things drawn by code (`shapes.py`). A folder of that name is given as `./shapes`.

    Columns are recognised by name and type unless they are given. caption: of pictures without one of their
    own; without that either, it is the prompt that a picture was drawn by here. cache: the folder in which
    `datasets` keeps the data that it has read. must_split: False where a source without splits is all taken.
    One warning counts and names the pictures that cannot be read, which are left out, those without a
    caption, and captions that are not UTF-8. Raises DataError if there are no pictures, or if there are
    several candidates for a column.
    """
    if str(source) == "shapes":
        from .shapes import shapes

        return shapes()
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            "reading pictures needs the package datasets: pip install 'reifusion[train]'"
        ) from error
    if not str(source).strip():
        raise DataError("the name of the pictures is empty; give a folder, files, or owner/name")
    rows, root, files = _load(str(source), split, cache, must_split)
    image = _image_column(rows, image_column, source)
    texts = _caption_column(rows, caption_column, source)
    keep = [image, *(name for name in (texts, "__key__") if name in rows.column_names)]
    try:
        rows = rows.select_columns(keep).cast_column(image, datasets.Image(decode=False))
    except Exception as error:
        raise DataError(f"the column {image!r} of {source} holds no pictures: {_reason(error)}") from error

    def encoded(row: int) -> bytes | Path:
        return _encoded(rows[row][image])

    real = {file.resolve(): file for file in files}
    try:
        known = listed_captions(root) if root is not None else {}
    except CaptionError as error:
        raise DataError(str(error)) from None
    items: list[Item] = []
    unreadable: list[str] = []
    listed: set[Path] = set()
    strange: list[str] = []  # names of those whose captions are in an encoding that was guessed
    silent: list[Item] = []
    from_prompts: list[str] = []
    for number, row in enumerate(tqdm(rows, desc="looking at pictures", leave=False, delay=3)):
        where = row[image] or {}
        name = row.get("__key__") or where.get("path") or f"row {number}"
        beside: str | None = None
        others: tuple[str, ...] = ()
        repeats, instead = 1, caption
        if root is not None and where.get("path"):
            file = Path(where["path"])  # `datasets` may have followed a link
            listed.add(file := file if file in files else real.get(file.resolve(), file))
            name = os.path.relpath(file, root)
            beside, guessed = _beside(file)
            others = known.get(file.resolve(), ())
            strange += [name] * guessed
            repeats, word = _kohya(file.parent, root)
            instead = word or caption
        captions = _captions(row.get(texts), texts == "txt") or others or _captions(beside, True)
        try:
            with _open(_encoded(row[image])) as picture:
                if picture.mode == "F":  # its range is anybody's guess
                    raise ValueError("numbers of 32 bits")
                drawn = () if captions or instead else _prompt(picture)
                itself = captions or drawn or (instead,)
                items.append(Item(number, name, *upright_size(picture), itself, repeats))
                from_prompts += [name] * len(drawn)
        except Exception:
            unreadable.append(name)
        else:
            if not (captions or drawn):
                silent.append(items[-1])
    divisor = math.gcd(*(item.repeats for item in items))  # only their ratios count
    items = [replace(item, repeats=item.repeats // divisor) for item in items]
    given = sorted({repr(item.captions[0]) for item in silent} - {"''"})
    wrong = {
        "cannot be read and are left out": unreadable,
        "have no caption": [item.name for item in silent if item.captions == ("",)],
        f"have no caption of their own and get {some(given)}": [
            i.name for i in silent if i.captions != ("",)
        ],
        "have no caption and get the prompt that they were drawn by": from_prompts,
        "have captions that are not UTF-8 and were read as Windows-1252": strange,
    }
    unlisted = sorted(os.path.relpath(f, root) for f in files - listed if root)
    unknown = [os.path.relpath(f, root) for f in known if not f.exists() and root]
    _report(source, items, wrong, unlisted, unknown)
    return Pictures(encoded, items)


def _prompt(picture: Image.Image) -> tuple[str, ...]:
    """Returns the prompt of a picture that was drawn here, or nothing."""
    try:
        found = json.loads(picture.info["reifusion"])["prompt"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return ()
    return (found,) if isinstance(found, str) and found.strip() else ()


def _load(
    source: str, split: str, cache: Path | None, must_split: bool
) -> tuple[Any, Path | None, set[Path]]:
    """Returns the rows of a source and, if each picture is a file, their folder and all pictures in it."""
    given = path = Path(source).expanduser().resolve()
    folder = path.is_dir()
    if folder and any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return _saved(path, split, source, must_split), None, set()
    if folder:
        path = _split_folder(path, split, source)
        inside = [file for file in path.rglob("*") if not _hidden(file.relative_to(path))]
        files = [file for file in inside if file.is_file()]
        links = [os.path.relpath(file, path) for file in inside if file.is_symlink() and file.is_dir()]
        if links:
            warnings.warn(f"{source}: linked folders in it are not looked into: {some(links)}", stacklevel=3)
    else:
        files = [path] if path.is_file() else [Path(f) for f in sorted(glob.glob(str(path), recursive=True))]
    if not files and not folder and re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", source):
        name, _, configuration = source.partition(":")
        hint = f"{source} is not a file or folder here, and the hub could not provide it"
        found = _load_dataset(hint, cache, name, configuration or None, split=split, here=False)
        return found, None, set()
    kinds = sorted({_kind(file) for file in files} - {""})
    if not kinds:
        found = (
            "holds no .jpg, .png or other pictures"
            if folder
            else "holds no pictures"
            if files
            else "does not exist"
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
            return _load_dataset(hint, cache, kind, **options), None, set()
        except DataError as error:
            damaged = [file.name for file in sorted(ours) if not _whole(file)]
            raise DataError(f"{error} ({some(damaged)})" if damaged else str(error)) from error
    if must_split and split != "train" and path == given:
        raise DataError(f"{source} has no split {split!r}, as it is one folder of pictures; leave split out")
    _check_metadata(files)
    # One pattern for all files: by names, `datasets` would take "a red train.png" for the split to train on.
    options["data_files"] = {split: ["**"] if folder else [glob.escape(str(file)) for file in files]}
    root = path if folder else Path(os.path.commonpath([file.parent for file in ours]))
    unseen = {file for file in files if file.suffix.lower() in UNSEEN}
    return _load_dataset(hint, cache, kind, **options), root, ours | unseen


def _saved(folder: Path, split: str, source: str, must_split: bool) -> Any:
    """Reads what `save_to_disk` of `datasets` wrote."""
    import datasets

    try:
        rows = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise DataError(f"{source} cannot be read: {_reason(error)}") from error
    if not isinstance(rows, datasets.DatasetDict):
        if must_split and split != "train" and str(rows.split) != split:
            raise DataError(f"{source} has no split {split!r}, but {rows.split or 'none'}; leave split out")
        return rows
    if split not in rows:
        raise DataError(f"{source} has no split {split!r}; it has {', '.join(sorted(rows))}")
    return rows[split]


def _check_metadata(files: Sequence[Path]) -> None:
    """Raises DataError for a file of captions that is not UTF-8, which `datasets` would call invalid JSON."""
    for file in files:
        if file.name in ("metadata.jsonl", "metadata.csv"):
            try:
                file.read_text("utf-8")
            except UnicodeDecodeError:
                raise DataError(f"{file} is not UTF-8; save it in that encoding") from None


def _load_dataset(hint: str, cache: Path | None, *arguments: Any, here: bool = True, **options: Any) -> Any:
    """here: True for files of this machine, whose reading `datasets` would show as a download."""
    import datasets

    shown = not datasets.utils.are_progress_bars_disabled()
    if here and shown:
        datasets.utils.disable_progress_bars()
    try:
        return datasets.load_dataset(*arguments, cache_dir=str(cache) if cache else None, **options)
    except Exception as error:  # it has many types of error, and passes on those of other packages
        raise DataError(f"{hint}: {_reason(error)}") from error
    finally:
        if here and shown:
            datasets.utils.enable_progress_bars()


def _reason(error: BaseException) -> str:
    """Says what went wrong, in one line: the error that `datasets` has wrapped says more than its own."""
    while type(error).__name__ == "DatasetGenerationError" and error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__


def _kind(file: Path) -> str:
    """Returns the name of the `datasets` loader that reads the file, or "" if none does."""
    if file.suffix.lower() in SUFFIXES:
        return "imagefolder"
    if file.name in ("metadata.parquet", "manifest.parquet"):  # the second is that of `reifusion batch`
        return ""
    return {".parquet": "parquet", ".tar": "webdataset"}.get(file.suffix.lower(), "")


def _whole(file: Path) -> bool:
    """True if a shard can be read to its end. For several shards, `datasets` does not say which is broken."""
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
    """Returns the folder of the split if `folder` contains nothing but splits, and otherwise `folder`."""
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
    if len(found) > 1:  # such as an image and its mask: the one with a known name is meant
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
    """Returns the captions in a cell: one, several in a list, or one per line of a text file."""
    texts = value if isinstance(value, list) else [value]
    texts = [text for text in texts if isinstance(text, str)]
    if lines:
        texts = [line for text in texts for line in text.splitlines()]
    return tuple(text.strip() for text in texts if text.strip())


def _beside(file: Path) -> tuple[str | None, bool]:
    """Returns the text of `cat.txt` or `cat.caption` beside `cat.png`; True if its encoding was guessed."""
    for suffix in (".txt", ".caption"):
        if (beside := file.with_suffix(suffix)).is_file():
            return decoded(beside.read_bytes())
    return None, False


def decoded(raw: bytes) -> tuple[str, bool]:
    """Returns the text in a file of UTF-8 or UTF-16, or of Windows-1252, which is a guess: then, True."""
    if raw.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return raw.decode("utf-32", "replace"), False
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return raw.decode("utf-16", "replace"), False
    # UTF-16 without a mark: in the letters of European languages, every second byte is 0.
    for encoding, zeros in (("utf-16-le", raw[1::2]), ("utf-16-be", raw[::2])):
        if len(raw) % 2 == 0 and zeros.count(0) > len(zeros) / 2:
            return raw.decode(encoding, "replace"), False
    try:
        return raw.decode("utf-8-sig"), False
    except UnicodeDecodeError:
        return raw.decode("cp1252", "replace"), True


def _kohya(folder: Path, root: Path) -> tuple[int, str]:
    """10_zork -> 10, "zork": the repeats and the caption that a folder's name gives to its pictures."""
    inside = folder.relative_to(root.parent) if folder.is_relative_to(root.parent) else Path()
    for part in reversed(inside.parts):
        if found := re.fullmatch(r"(\d{1,3})_(.*\S.*)", part):
            return max(1, int(found[1])), found[2].strip()
    return 1, ""


def _report(
    source: str | Path,
    items: list[Item],
    wrong: dict[str, list[str]],
    unlisted: list[str],
    unknown: list[str],
) -> None:
    """Warns once of everything that is wrong with a data set. Raises DataError if no picture is left."""
    unreadable, *_ = wrong.values()
    total = len(items) + len(unreadable)
    if not items:
        why = f": {some(unreadable)} cannot be read" if unreadable else ""
        raise DataError(f"there are no pictures in {source}{why}")
    problems = [
        f"{len(names)} of {total} pictures {what}: {some(names)}" for what, names in wrong.items() if names
    ]
    if unlisted:  # by the metadata, or because `datasets` does not read their format
        problems.append(f"{len(unlisted)} other pictures there are not used: {some(unlisted)}")
    if unknown:
        problems.append(f"there are captions for {len(unknown)} files that are missing: {some(unknown)}")
    if problems:
        warnings.warn(f"{source}: {'; '.join(problems)}", stacklevel=3)


def some(names: Sequence[str], most: int = 3) -> str:
    """Lists the first few names, and says how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# ---- one picture ------------------------------------------------------------------------------------------


def to_rgb(picture: Image.Image) -> Image.Image:
    """Converts any picture to 8-bit RGB, upright, with white where it was transparent."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):  # 16 bits, which Pillow's own conversion would cut off at 255
        levels = np.asarray(picture).astype(np.float32) / 257  # 65535 -> 255
        picture = Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


def upright_size(picture: Image.Image) -> tuple[int, int]:
    """Returns width and height after `to_rgb`; reads only the beginning of the file."""
    # For a PNG without EXIF in its header, Pillow would decode the whole file to look for it.
    looked = picture.format != "PNG" or "exif" in picture.info
    sideways = looked and picture.getexif().get(0x0112, 1) >= 5  # EXIF's Orientation: 5 to 8 lie on a side
    return (picture.height, picture.width) if sideways else (picture.width, picture.height)


def _encoded(cell: Any) -> bytes | Path:
    """An undecoded picture in a row of `datasets` -> its bytes, or its file."""
    if not cell or not (cell["bytes"] or cell["path"]):
        raise DataError("a row has no picture")
    return cell["bytes"] or Path(cell["path"])


def _bytes(picture: Image.Image) -> int:
    return 3 * picture.width * picture.height


def _open(encoded: bytes | Path) -> Image.Image:
    return Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded, formats=_formats())


@once
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)
