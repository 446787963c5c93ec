"""Runs that train one after another: a list in the folder of runs, and the one process that works it off.

Whoever wants may lengthen or shorten the list meanwhile, and the process may die: the next one goes on with what the list says.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO

from sdlora import events
from sdlora.errors import SdloraError
from sdlora.files import try_lock, write_durably
from sdlora.run import Run, folders, open_run

FOLDER = "_queue"  # in the folder of runs, none of which has such a name
POLL_SECONDS = 1.0
TURN_SECONDS = 0.01  # between two looks whether another has done with the list


@dataclass(frozen=True)
class Entry:
    run: str  # name of its folder
    begun: bool = False  # by a process that has not seen its end


def read(runs: Path) -> list[Entry]:
    """The list as it stands, the run in training first."""
    try:
        return [Entry(**one) for one in json.loads((runs / FOLDER / "queue.json").read_text(encoding="utf-8"))]
    except FileNotFoundError:
        return []


@contextmanager
def changed(runs: Path) -> Iterator[list[Entry]]:
    """The list, to be changed in place, by one process at a time."""
    with _open(runs, "changes") as lock:
        while not try_lock(lock):
            time.sleep(TURN_SECONDS)
        entries = read(runs)
        yield entries
        write_durably(runs / FOLDER / "queue.json", json.dumps([asdict(entry) for entry in entries]).encode())


def add(runs: Path, name: str) -> None:
    """Behind all others; a run is in the list once."""
    with changed(runs) as entries:
        if name not in (entry.run for entry in entries):
            entries.append(Entry(name))


def remove(runs: Path, name: str) -> None:
    with changed(runs) as entries:
        entries[:] = [entry for entry in entries if entry.run != name]


def move_up(runs: Path, name: str) -> None:
    """Before the one that is before it, unless that is in training."""
    with changed(runs) as entries:
        at = [entry.run for entry in entries].index(name) if name in (entry.run for entry in entries) else 0
        if at and not entries[at - 1].begun:
            entries.insert(at - 1, entries.pop(at))


def is_worked(runs: Path) -> bool:
    """Whether a process works the list off."""
    with _open(runs, "worker") as lock:
        return not try_lock(lock)


def work(runs: Path, poll_seconds: float = POLL_SECONDS) -> Iterator[str]:
    """Train what the list says until it is empty, and tell of it; nothing where another process does so. One run trains at a time: one
    that was started by hand is waited for, too."""
    with _open(runs, "worker") as lock:
        if not try_lock(lock):
            return
        while entries := read(runs):
            while any(run.trained_by() is not None for run in map(Run, folders(runs))):
                time.sleep(poll_seconds)
            if entries != read(runs):  # it was changed meanwhile
                continue
            name = entries[0].run
            if not (entries[0].begun and _has_ended(Run(runs / name))):
                yield from _train(runs, name)
            remove(runs, name)


def _train(runs: Path, name: str) -> Iterator[str]:
    with changed(runs) as entries:
        entries[:] = [replace(entry, begun=True) if entry.run == name else entry for entry in entries]
    yield f"{name}: training"
    try:
        code = open_run(runs / name).start().wait()
    except SdloraError as error:  # it was deleted, or somebody else was faster
        yield f"{name}: {error}"
    else:
        yield f"{name}: ended with exit code {code}"


def _has_ended(run: Run) -> bool:
    """With a last word, so that nothing is left to go on with."""
    told = events.read(run.events)
    return bool(told) and isinstance(told[-1], events.LAST)


def _open(runs: Path, name: str) -> BinaryIO:
    (runs / FOLDER).mkdir(parents=True, exist_ok=True)
    return (runs / FOLDER / name).open("ab")
