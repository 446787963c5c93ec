"""Child processes: a list of arguments, no shell, and nothing of theirs that ends with the page. What the machine has to do besides, the
page's answers above all, goes before them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import psutil

from sdlora import config as configs
from sdlora import grid, queue
from sdlora import run as runs
from sdlora.config import Config
from sdlora.errors import ConfigError, SdloraError
from sdlora.files import write_durably
from sdlora.run import Run

from .paths import Places

# How far a child gives way. Where no other process wants its processor it loses nothing; where one does, Linux leaves it a third of what
# the other gets. (Where Linux shares by sessions, a child has one of its own, and the page its half.) What it starts inherits it.
NICE = 5
# In a sweep's folder: what all rows share, the values of a sweep that the page has begun, and what is said of it.
SWEEP_CONFIG, SWEEP_VALUES, SWEEP_LOG = "sweep.toml", "sweep.txt", "log.txt"
HALVE = "halve"  # among options and values: the share that --halve takes
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


def begin_sweep(places: Places, config: Config, lines: str) -> str:
    """Start a sweep in a new folder, whose name is returned. `lines`: options and their values, and perhaps halve=0.25. Raises ConfigError,
    and leaves nothing, where one of its rows would be refused."""
    chosen, halvings = asked_of(lines)
    if not chosen:
        raise ConfigError("Sweep is empty: write an option and its values, a line each, as lora.rank=4,16,64.")
    named = (config.output.name if number == 1 else f"{config.output.name}-{number}" for number in count(1))
    name = next(name for name in named if not grid.folder_of(places.runs, name).exists())
    config = runs.with_absolute_paths(config.model_copy(update={"output": config.output.model_copy(update={"name": name})}))
    folder = grid.folder_of(places.runs, name)
    folder.mkdir(parents=True)
    try:
        write_durably(folder / SWEEP_CONFIG, configs.dump(config).encode())
        write_durably(folder / SWEEP_VALUES, lines.encode())
        rows = [row.config for row in grid.rows_of([folder / SWEEP_CONFIG], [], [grid.split(line) for line in chosen])]
        for row in rows:
            places.check(row)
        if halvings:
            grid.require_judge(rows, grid.halvings(halvings[-1])[0])
        sweep(folder)
    except SdloraError:
        shutil.rmtree(folder)
        raise
    return folder.name


def sweep(folder: Path) -> None:
    """Begin a sweep, or go on with it. Raises ConfigError where a process does so, or where the page has not begun it."""
    if not (folder / SWEEP_VALUES).is_file():
        raise ConfigError(f"{folder.name} was begun by a command: the same command goes on with it.")
    if in_training(folder):
        raise ConfigError(f"{folder.name} is in training already.")
    chosen, halvings = asked_of((folder / SWEEP_VALUES).read_text(encoding="utf-8"))
    flags = [*(f"--set={line}" for line in chosen), *(f"--halve={share}" for share in halvings)]
    process = spawn(["sweep", str(folder / SWEEP_CONFIG), *flags], folder / SWEEP_LOG)
    Run(folder).claim(process.pid)


def in_training(sweep: Path) -> bool:
    return any(run.trained_by() is not None for run in (Run(sweep), *rows_of(sweep)))


def asked_of(lines: str) -> tuple[list[str], list[str]]:
    """Of a sweep: options with their values, and shares of the steps after which its worse half goes."""
    asked = [line.strip() for line in lines.splitlines() if line.strip()]
    halvings = [line for line in asked if line.partition("=")[0].strip() == HALVE]
    return [line for line in asked if line not in halvings], [line.partition("=")[2].strip() for line in halvings]


def rows_of(sweep: Path) -> list[Run]:
    """In their order."""
    return [Run(path) for path in sorted(runs.folders(sweep))]


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
