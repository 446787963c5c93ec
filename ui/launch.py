"""Child processes: a list of arguments, no shell, and nothing of theirs that ends with the page. What the machine has to do besides, the
page's answers above all, goes before them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from sdlora import queue
from sdlora import run as runs
from sdlora.run import Run

# How far a child gives way. Where no other process wants its processor it loses nothing; where one does, Linux leaves it a third of what
# the other gets. (Where Linux shares by sessions, a child has one of its own, and the page its half.) What it starts inherits it.
NICE = 5
WATCH_SECONDS = 10.0  # longer than a process takes to begin, so that not two of them do


def train(run: Run) -> None:
    """Start training, or go on with it. Raises TrainingError where a process does so already."""
    in_background(run.start())


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
    return in_background(runs.spawn(arguments, log))


def in_background(process: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
    """It gives way to others, and its end is not waited for here."""
    if sys.platform == "win32":
        psutil.Process(process.pid).nice(psutil.BELOW_NORMAL_PRIORITY_CLASS)
    else:
        os.setpriority(os.PRIO_PROCESS, process.pid, os.getpriority(os.PRIO_PROCESS, process.pid) + NICE)
    threading.Thread(target=process.wait, daemon=True).start()  # or it would stay in the process table when it has ended
    return process


def ask(arguments: Sequence[str]) -> str:
    """All that `python -m sdlora ARGUMENTS` says until it ends."""
    command = [sys.executable, "-m", "sdlora", *arguments]
    told = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    return told.stdout.decode(errors="replace").strip()
