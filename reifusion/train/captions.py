"""Captions as trainers of LoRAs want them: files of many, tags in any order, a word before each."""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# Names that people give to such files and to their columns; `datasets` reads metadata.jsonl and metadata.csv.
FILES = ("captions.jsonl", "captions.json", "captions.csv", "captions.tsv")
FILE_COLUMNS = ("file_name", "filename", "file", "image", "path", "name", "key")
TEXT_COLUMNS = ("text", "caption", "captions", "prompt", "description")
SHUFFLES = 16  # orders of its tags that a caption has


class CaptionError(ValueError):
    """Says what is wrong with a file of captions, in one sentence."""


def listed(folder: Path) -> dict[Path, tuple[str, ...]]:
    """Reads captions.jsonl, .json, .csv or .tsv in a folder: a picture's file -> its captions.

    Raises CaptionError for a file that cannot be understood.
    """
    found: dict[Path, tuple[str, ...]] = {}
    for file in (folder / name for name in FILES):
        if file.is_file():
            of_file: dict[Path, tuple[str, ...]] = {}  # some files have a row for each caption of a picture
            for row in _rows(file):
                name, texts = _cell(row, FILE_COLUMNS), _cell(row, TEXT_COLUMNS)
                if None in row:  # otherwise all after a comma would be lost
                    raise CaptionError(
                        f"{file} has more cells in the row of {name} than columns: a caption with a comma in"
                        " it needs quotation marks around it"
                    )
                if texts is None and any(row.get(column, "") is None for column in TEXT_COLUMNS):
                    texts = []  # a row that ends before its caption, or null
                if not isinstance(name, str) or texts is None:
                    raise CaptionError(
                        f"{file} needs a file_name and a text in each row, and has {row!r:.100}"
                    )
                path, texts = (folder / name).resolve(), texts if isinstance(texts, list) else [texts]
                own = [" ".join(text.split()) for text in texts if isinstance(text, str)]
                of_file[path] = of_file.get(path, ()) + tuple(filter(None, own))
            found |= of_file
    return found


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    try:
        text = file.read_text("utf-8-sig")
        if file.suffix in (".csv", ".tsv"):
            yield from csv.DictReader(
                io.StringIO(text, newline=""), delimiter="\t" if file.suffix == ".tsv" else ","
            )
            return
        lines = text.split("\n") if file.suffix == ".jsonl" else [text]
        for line in filter(str.strip, lines):
            found = json.loads(line)
            if file.suffix == ".json" and isinstance(found, dict):  # {"a.png": "a cat"}
                found = [{"file_name": name, "text": caption} for name, caption in found.items()]
            yield from found if isinstance(found, list) else [found]
    except (UnicodeDecodeError, ValueError, csv.Error, TypeError) as error:
        raise CaptionError(f"{file} cannot be read: {str(error).splitlines()[0]}") from None


def _cell(row: Any, names: Sequence[str]) -> Any:
    if not isinstance(row, dict):
        raise CaptionError(f"a row of captions must have names for its columns, not be {row!r:.60}")
    return next((row[name] for name in names if isinstance(row.get(name), str | list)), None)


def dressed(
    captions: Sequence[str], trigger: str = "", shuffle: bool = False, keep: int = 1, seed: int = 0
) -> tuple[str, ...]:
    """Returns captions with words before them, and their tags in other orders.

    trigger: the words; "" for none. shuffle: each caption becomes several, whose tags, which commas
    separate, are in random order, except for the first `keep`. seed: decides the orders, with the caption.
    """
    found: list[str] = []
    for caption in captions:
        words = f"{trigger} {caption}".strip() if trigger else caption
        tags = [tag.strip() for tag in words.split(",") if tag.strip()]
        first, rest = tags[:keep], tags[keep:]
        if not shuffle or len(rest) < 2:
            found.append(words)
            continue
        number = random.Random(f"{seed} {words}")
        found += [", ".join(first + number.sample(rest, len(rest))) for _ in range(SHUFFLES)]
    return tuple(dict.fromkeys(found))
