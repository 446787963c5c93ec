"""Files that a power cut leaves whole: the old one or the new one, never a part."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

DRAFT_PREFIX = ".tmp-"  # of the name of a file that is being written


def write_durably(path: Path, data: bytes) -> None:
    """Put `data` at `path`: in one step for whoever reads it, and on the disk itself when this returns. Raises OSError, and leaves
    nothing behind then."""
    with durable(path) as file:
        file.write(data)


@contextmanager
def durable(path: Path) -> Iterator[BinaryIO]:
    """The same for what is written piece by piece: it is at `path` once the block ends, and nowhere if the block raises."""
    draft = path.with_name(f"{DRAFT_PREFIX}{os.getpid()}-{path.name}")
    try:
        with draft.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    sync_folder(path.parent)


@contextmanager
def durable_folder(path: Path) -> Iterator[Path]:
    """A folder to fill with durable files that becomes `path` when the block ends, and vanishes if it fails."""
    draft = path.with_name(f"{DRAFT_PREFIX}{os.getpid()}-{path.name}")
    draft.mkdir()
    try:
        yield draft
        sync_folder(draft)
        os.replace(draft, path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    sync_folder(path.parent)


def copy_durably(source: str | Path, target: str | Path) -> None:
    with open(source, "rb") as file, durable(Path(target)) as out:
        shutil.copyfileobj(file, out)


def sync_folder(folder: Path) -> None:
    """A new name, too, is only in memory until its folder is flushed."""
    if os.name == "posix":  # Windows can neither open nor flush a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
