"""Files that a power cut leaves whole: the old one or the new one, never a part; what a full disk says; and locks on files."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

DRAFT_PREFIX = ".tmp-"  # of the name of a file that is being written
FULL = (errno.ENOSPC, errno.EDQUOT)  # the disk, or the user's share of it


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
            _sync(file)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_synced(path: Path, data: bytes) -> None:
    """Put `data` on the disk at `path`, in a draft of a folder: that folder's own name comes when all are there."""
    with path.open("wb") as file:
        file.write(data)
        _sync(file)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


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


def remove_folder(path: Path) -> None:
    """Under a draft's name first: a kill midway leaves no part of it under its own."""
    doomed = path.with_name(f"{DRAFT_PREFIX}{os.getpid()}-old-{path.name}")
    os.replace(path, doomed)
    shutil.rmtree(doomed)


def sweep(folder: Path) -> None:
    """Delete the drafts that killed processes left below `folder`, in which nobody else may be writing."""
    for draft in list(folder.rglob(f"{DRAFT_PREFIX}*")):
        if draft.is_dir():
            shutil.rmtree(draft)
        else:
            draft.unlink(missing_ok=True)  # it may have lain in a folder that is gone by now


def check_room(folder: Path, size: int) -> None:
    """Raises the OSError of a full disk where `size` bytes do not fit on the one of `folder`."""
    if shutil.disk_usage(folder).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def try_lock(file: BinaryIO) -> bool:
    """Whether the lock on an open file is now ours. The system takes it back when the file is closed or the process ends, however it
    ends, so that it never goes stale. Raises OSError where the file system has no locks."""
    try:
        if sys.platform == "win32":
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # what POSIX says, and Windows
        return False
    return True


def sync_folder(folder: Path) -> None:
    """A new name, too, is only in memory until its folder is flushed."""
    if os.name == "posix":  # Windows can neither open nor flush a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
