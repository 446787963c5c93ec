"""Work of seconds to minutes in a child process: one at a time of a kind, which any page starts, follows and cancels."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from sdlora.errors import ConfigError

from . import launch, live, markup
from .markup import duration, text


class Job:
    def __init__(self, log: Path, what: str) -> None:
        self.log, self.what = log, what
        self.process: subprocess.Popen[bytes] | None = None
        self.began = 0.0
        self.is_cancelled = False

    def start(self, arguments: Sequence[str]) -> None:
        """`sdlora ARGUMENTS`. Raises ConfigError while the last one goes on."""
        if self.is_busy:
            raise ConfigError(f"{self.what} is still going on: wait for it, or cancel it.")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.unlink(missing_ok=True)
        self.began, self.is_cancelled = time.monotonic(), False
        self.process = launch.spawn(arguments, self.log)

    def cancel(self) -> None:
        """As Ctrl-C would: what it has half written goes away."""
        if self.process is not None and self.is_busy:
            self.is_cancelled = True
            if sys.platform == "win32":  # where a group of its own hears no Ctrl-C
                self.process.terminate()
            else:
                self.process.send_signal(signal.SIGINT)

    @property
    def is_busy(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def is_done(self) -> bool:
        """It ended, and well."""
        return self.process is not None and self.process.poll() == 0

    def status(self) -> str:
        """What it does, or how it ended, as HTML; "" before the first."""
        if self.process is None:
            return ""
        said = live.last_said(self.log)
        if self.is_busy:
            passed, last = duration(time.monotonic() - self.began), text(said or "Loading ...")
            return f'<div class="sd-job" role="status"><i></i><b>{text(self.what)}</b><span>{passed}</span><code>{last}</code></div>'
        if self.is_cancelled:
            return markup.note(f"{self.what} was cancelled.")
        return markup.note(said) if self.is_done else markup.error(said or "It ended without a word.")
