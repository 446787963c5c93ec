"""Child processes: a list of arguments, no shell, and nothing of theirs that ends with the page."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from sdlora import queue
from sdlora import run as runs
from sdlora.run import Run

WATCH_SECONDS = 10.0  # longer than a process takes to begin, so that not two of them do


def train(run: Run) -> None:
    """Start training, or go on with it. Raises TrainingError where a process does so already."""
    await_end(run.start())


def queue_up(run: Run) -> None:
    queue.add(run.folder.parent, run.folder.name)
    work_off(run.folder.parent)


def work_off(folder: Path) -> None:
    """Have the queue in a folder of runs worked off, if something waits there and nobody does so. Two that begin at once do no harm."""
    if queue.read(folder) and not queue.is_worked(folder):
        spawn(["queue", str(folder)], folder / queue.FOLDER / "log.txt")


def keep_working(folder: Path) -> None:
    """From now on, and in the place of a process that has died."""

    def watch() -> None:
        while True:
            work_off(folder)
            time.sleep(WATCH_SECONDS)

    threading.Thread(target=watch, daemon=True).start()


def spawn(arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """`python -m sdlora ARGUMENTS`; all that it says is added to `log`."""
    return await_end(runs.spawn(arguments, log))


def await_end(process: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
    """Without waiting for it here."""
    threading.Thread(target=process.wait, daemon=True).start()  # or it would stay in the process table when it has ended
    return process


def ask(arguments: Sequence[str]) -> str:
    """All that `python -m sdlora ARGUMENTS` says until it ends."""
    command = [sys.executable, "-m", "sdlora", *arguments]
    told = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    return told.stdout.decode(errors="replace").strip()
