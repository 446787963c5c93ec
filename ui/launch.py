"""Child processes: a list of arguments, no shell, and nothing of theirs that ends with the page."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from sdlora.errors import TrainingError
from sdlora.run import Run

# A new group: Ctrl-C in the terminal of the page must not reach its children.
NEW_GROUP = 0x200  # Windows' CREATE_NEW_PROCESS_GROUP, which other systems' subprocess lacks


def train(run: Run) -> None:
    """Start training, or go on with it. Raises TrainingError where a process does so already."""
    if (pid := run.trained_by()) is not None:
        raise TrainingError(f"{run.folder.name} is being trained already, by process {pid}.")
    run.forget_requests()  # of the last time: until the process has done so the page would show it as stopping
    process = spawn(["resume", str(run.folder)], run.log)
    run.claim(process.pid)


def spawn(arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """`python -m sdlora ARGUMENTS`; all that it says is added to `log`."""
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "sdlora", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            creationflags=NEW_GROUP if sys.platform == "win32" else 0,
        )
    threading.Thread(target=process.wait, daemon=True).start()  # or it would stay in the process table when it has ended
    return process


def ask(arguments: Sequence[str]) -> str:
    """All that `python -m sdlora ARGUMENTS` says until it ends."""
    command = [sys.executable, "-m", "sdlora", *arguments]
    told = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    return told.stdout.decode(errors="replace").strip()
