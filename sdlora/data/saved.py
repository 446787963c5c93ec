"""A dataset that Hugging Face's library saved (`Dataset.save_to_disk`): its rows are pictures with paths of their own, FOLDER/row 17.

Nothing is unpacked. Such a path is no file, but stands for one wherever pictures are read: its bytes come out of the mapped Arrow files
when they are asked for, and messages and plan.json name it as they name any picture.
"""

from __future__ import annotations

import io
import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from sdlora.data import metadata
from sdlora.data.metadata import Table
from sdlora.errors import DataError

STATE, SPLITS = "state.json", "dataset_dict.json"  # what save_to_disk leaves beside one dataset, and beside the folders of several
ROW = re.compile(r"row (\d+)")  # counted from 0, as the library counts


def is_saved(folder: Path) -> bool:
    """Raises DataError for a folder of several splits."""
    if (folder / SPLITS).is_file():
        splits = json.loads((folder / SPLITS).read_text(encoding="utf-8"))["splits"]
        named = ", ".join(str(folder / split) for split in splits)
        raise DataError(f"{folder} is a dataset of several splits; give the folder of one of them: {named}.")
    return (folder / STATE).is_file()


def is_row(path: Path) -> bool:
    return ROW.fullmatch(path.name) is not None and (path.parent / STATE).is_file()


def read_table(folder: Path, separator: str = " ", column: str = "") -> Table:
    """The captions of all rows, as `metadata.read_table` gives those of a folder's pictures. Raises DataError."""
    dataset, _ = _opened(folder)
    chosen, others = metadata.caption_column(dataset.column_names, column, folder)
    texts = dataset.select_columns([chosen])[:].column(chosen).to_pylist()
    captions = {
        folder / f"row {number}": metadata.as_caption(text, chosen, f"{folder}, row {number}", separator)
        for number, text in enumerate(texts)
    }
    return Table(folder / STATE, captions, others)


def open_row(path: Path) -> io.BytesIO:
    """The picture of a row, as a file. Raises ValueError where it has none."""
    dataset, column = _opened(path.parent)
    (content,) = dataset[int(path.name.removeprefix("row "))].column(column).to_pylist()
    if content is None:
        raise ValueError("the row has no picture")
    if content["bytes"] is None:
        raise ValueError(f"the row has only the name of a file, {content['path']}; save the dataset again where it can be read")
    return io.BytesIO(content["bytes"])


def _opened(folder: Path) -> tuple[Any, str]:
    """The dataset, whose rows come as Arrow tables, and the name of its column of pictures."""
    return _load(folder, (folder / STATE).read_bytes())


@lru_cache(maxsize=16)
def _load(folder: Path, state: bytes) -> tuple[Any, str]:
    """`state` is part of the key: it changes when the dataset is saved anew."""
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{folder} is a dataset of Hugging Face's library, which needs one more package: pip install 'sdlora[datasets]'."
        ) from None
    try:
        dataset = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"The dataset {folder} cannot be opened ({error}); save it again.") from error
    pictures = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    if not pictures:
        raise DataError(
            f"The dataset {folder} has no column of pictures among {', '.join(dataset.column_names)}; make one of the right column with"
            " dataset.cast_column(NAME, datasets.Image()), and save it again."
        )
    if len(pictures) > 1 and "image" not in pictures:
        raise DataError(f"The dataset {folder} has several columns of pictures, {', '.join(pictures)}; rename the right one to 'image'.")
    return dataset.with_format("arrow"), "image" if "image" in pictures else pictures[0]
