"""Captions of a whole folder in one table, metadata.jsonl or metadata.csv, as Hugging Face's image folders have them."""

import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from sdlora.data.captions import read_text, tidy
from sdlora.errors import DataError

NAMES = ("metadata.jsonl", "metadata.csv")
CAPTION_COLUMNS = ("text", "caption", "prompt")  # the first of these that a table has, unless another is asked for


@dataclass(frozen=True)
class Table:
    path: Path
    captions: dict[Path, str]  # by picture, "" where the row has none
    skipped: tuple[tuple[Path, str], ...]  # each with the reason


def read_table(folder: Path, separator: str = " ", column: str = "") -> Table | None:
    """The folder's table, None where it has none; captions are those in `column`, their lines with `separator` between them.

    Every `file_name` stays inside the folder, subfolders included. Raises DataError for names that lead out, for a picture that is
    named twice, and for rows that cannot be read.
    """
    found = [folder / name for name in NAMES if (folder / name).is_file()]
    if not found:
        if column:
            raise DataError(f"{folder} has no {' or '.join(NAMES)} with the column of data.caption_column = '{column}'; leave it out.")
        return None
    if len(found) > 1:
        raise DataError(f"{folder} holds both {' and '.join(NAMES)}; remove one of them.")
    (path,) = found
    if leads_out(path, folder):
        raise DataError(f"{path} is a link that leads out of the folder; put a copy of the file there.")
    rows = [_row(line, row, path) for line, row in _READERS[path.name](path)]
    if not rows:
        raise DataError(f"{path} has no rows; write one for each picture, or remove the file.")
    columns = list(dict.fromkeys(name for _, row in rows for name in row if name is not None))  # None: more cells than the CSV's head
    chosen, others = caption_column(columns, column, path)
    skipped = list(others)

    captions: dict[Path, str] = {}
    for line, row in rows:
        picture = _inside(folder, row["file_name"], f"{path}, line {line}")
        if picture in captions:
            raise DataError(f"{path}, line {line}: {row['file_name']} has a row already; remove one of them.")
        if not os.path.isfile(picture):  # Path.is_file raises for names that are too long
            skipped.append((picture, f"{path.name} names it, but there is no such file"))
            continue
        captions[picture] = as_caption(row.get(chosen), chosen, f"{path}, line {line}", separator)
    return Table(path, captions, tuple(skipped))


def caption_column(columns: Sequence[str], asked: str, table: Path) -> tuple[str, tuple[tuple[Path, str], ...]]:
    """The column of captions, and others that could have been meant, as what is left out. Raises DataError."""
    if asked:
        if asked not in columns:
            raise DataError(f"{table} has no column called {asked}, as data.caption_column says; it has {', '.join(columns)}.")
        return asked, ()
    usual = [column for column in CAPTION_COLUMNS if column in columns]
    if not usual:
        raise DataError(
            f"{table} has no captions: it needs a column called {', '.join(CAPTION_COLUMNS[:-1])} or {CAPTION_COLUMNS[-1]}, or set"
            f" data.caption_column to one of {', '.join(columns)}."
        )
    return usual[0], tuple((table, f"its column '{column}' is not used: captions are taken from '{usual[0]}'") for column in usual[1:])


def as_caption(value: Any, column: str, place: str, separator: str) -> str:
    """What stands in a cell, "" where it is empty. Raises DataError for what is no text."""
    if value is not None and not isinstance(value, str):
        raise DataError(f"{place}: {column} is {json.dumps(value, default=str)}, which is no text.")
    return tidy(value or "", separator)


def leads_out(path: Path, root: Path) -> bool:
    """Whether a path below `root` is a link, or lies behind one, that leaves it."""
    return not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))  # Path.resolve raises for a circle of links


def _row(line: int, row: Any, path: Path) -> tuple[int, dict[str, Any]]:
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str) or not row["file_name"].strip():
        raise DataError(f"{path}, line {line}: every row needs a file_name, the name of a picture in the folder.")
    return line, row


def _inside(folder: Path, name: str, place: str) -> Path:
    """The picture that a row names."""
    as_windows = PureWindowsPath(name)  # which takes both kinds of slash
    if as_windows.anchor or ".." in as_windows.parts or "\0" in name:
        raise DataError(f"{place}: file_name {name!r} leads out of the folder; name pictures inside it, without '..'.")
    path = folder.joinpath(*as_windows.parts)  # so that a table made on Windows reads the same everywhere
    if leads_out(path, folder):
        raise DataError(f"{place}: file_name {name!r} is a link that leads out of the folder; put a copy of the picture there.")
    return path


def _jsonl_rows(path: Path) -> Iterator[tuple[int, Any]]:
    for line, text in enumerate(read_text(path).split("\n"), 1):  # not splitlines: JSON may hold other line ends in its strings
        if text.strip():
            try:
                yield line, json.loads(text)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}, line {line} is not JSON ({error}).") from None


def _csv_rows(path: Path) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    try:
        names = reader.fieldnames
        if names is not None and "file_name" not in names:  # as where semicolons stand between them
            raise DataError(
                f"{path} has no column called file_name: write the names of its columns into its first line, with commas between."
            )
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num} is not CSV ({error}).") from None


_READERS = dict(zip(NAMES, (_jsonl_rows, _csv_rows), strict=True))
