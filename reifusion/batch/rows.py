"""A table of pictures becomes settings: a prompt a line (.txt), or a column for each setting.

The columns of a .csv, .jsonl or .parquet are called like the options of `reifusion generate`. What a row
leaves open, the command line decides. A seed that is left open is the row's number, so that the same table
draws the same pictures.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..album import slug
from ..errors import cut
from ..model.sentences import shown
from ..settings import ABOUT, Settings, named_here

KINDS = (".txt", ".csv", ".jsonl", ".parquet")
YES, NO = ("true", "yes", "1"), ("false", "no", "0")


@dataclass(frozen=True)
class Row:
    """One picture to draw."""

    number: int  # in the table, from 0
    settings: Settings  # with a prompt and a seed

    @property
    def file(self) -> str:
        """The picture's name. It has a hash of all settings, so a row that was changed is drawn anew."""
        said = json.dumps([self.number, self.settings.carried()], sort_keys=True)
        digest = hashlib.sha256(said.encode("utf-8", "replace")).hexdigest()[:8]
        return f"{self.number:06}-{slug(self.settings.prompt or '')}-{self.settings.seed}-{digest}.png"


def read_rows(path: Path, usual: Settings) -> list[Row]:
    """Reads a table. usual: the settings where a row has none of its own.

    Raises ValueError, with the row's number, for a table that cannot be read or a setting that is wrong.
    """
    rows = []
    for number, values in enumerate(_records(path)):
        where = f"row {number + 1} of {path}"
        try:
            own = {name: _value(name, x) for name, x in _known(values)}
            settings = replace(usual, **named_here(own, usual.manner))
            if settings.prompt is None:
                raise ValueError("there is no prompt")
            if settings.seed is None:
                settings = replace(settings, seed=number)
            settings.request()
        except ValueError as error:
            raise ValueError(f"{where}: {cut(str(error))}") from None
        rows.append(Row(number, settings))
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def _records(path: Path) -> Iterator[Mapping[str, Any]]:
    """Yields the rows as they are in the file, by column; empty lines are left out."""
    if path.suffix.lower() not in KINDS:
        raise ValueError(f"a table of pictures is {', '.join(KINDS[:-1])} or {KINDS[-1]}, not {path}")
    if path.suffix.lower() == ".parquet":
        yield from _parquet(path)
        return
    try:
        text = path.read_text("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8") from None
    if path.suffix.lower() == ".csv":
        yield from _csv(path, text)
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        if path.suffix.lower() == ".txt":
            yield {"prompt": line.strip()}
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise ValueError(f"line {number} of {path} is not an object in JSON: {shown(line)}")
        yield record


def _csv(path: Path, text: str) -> Iterator[Mapping[str, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows: list[dict[str, Any]] = []
    try:
        rows += reader
    except csv.Error as error:
        raise ValueError(f"{path} is not a table in CSV, behind row {len(rows)}: {error}") from None
    _check_columns(path, reader.fieldnames or ())
    for values in rows:
        if None in values:
            wrong = "has a row with more cells than the first line has columns"
            raise ValueError(f"{path} {wrong}: {shown(values)}")
        yield {name: x for name, x in values.items() if x not in (None, "")}


def _check_columns(path: Path, columns: Iterable[str]) -> None:
    """Raises ValueError for a setting that has two columns."""
    names = [name for column in columns if (name := _name(column))]
    if twice := [name for name in ABOUT if names.count(name) > 1]:
        raise ValueError(f"{path} has two columns for {twice[0]}")


def _parquet(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError("reading .parquet needs the package pyarrow: pip install pyarrow") from None
    try:
        table = pyarrow.parquet.read_table(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    except Exception as error:  # pyarrow's own, for a file that is no parquet
        raise ValueError(f"{path} is not a table in parquet: {error}") from None
    _check_columns(path, table.column_names)
    yield from table.to_pylist()


def _name(column: object) -> str:
    return str(column).strip().lower().replace("-", "_").replace(" ", "_")


def _known(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields the settings of a row, without those that it leaves open."""
    for column, value in values.items():
        name = _name(column)
        if name == "code":
            raise ValueError("a table cannot name code to run; give it with --code")
        if name not in ABOUT:
            raise ValueError(f"the column {shown(column)} is no setting; there are {', '.join(ABOUT)}")
        if value is not None and value != "" and not (isinstance(value, float) and math.isnan(value)):
            yield name, value


def _value(name: str, value: Any) -> Any:
    """Reads a setting: a text as on the command line, anything else as a picture carries it."""
    about = ABOUT[name]
    try:
        if not isinstance(value, str):
            if about.kind is int and isinstance(value, float) and value.is_integer():
                value = int(value)  # as tables have it in a column with gaps
            return about.carried(value)
        if about.kind is list:
            return about.parse([part.strip() for part in value.split(";") if part.strip()])
        if about.kind is bool:
            if value.strip().lower() not in YES + NO:
                raise ValueError
            return value.strip().lower() in YES
        return about.parse(about.kind(value) if about.kind in (int, float) else value)
    except ValueError as error:
        said = str(error)
        if not said or "literal" in said or "could not convert" in said:
            raise ValueError(f"its {name} is {shown(value)}") from None
        raise
