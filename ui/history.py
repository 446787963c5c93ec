"""What a run's events say so far, read on from where the last look ended: a look costs what is new, not what the run is long."""

from __future__ import annotations

import threading
from bisect import bisect_right
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from statistics import fmean

from sdlora import events
from sdlora.run import Run

RECENT = 50  # steps whose mean time foretells the rest


@dataclass
class Series:
    """A number over steps."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, step: int, value: float) -> None:
        self.steps.append(step)
        self.values.append(value)

    def cut(self, step: int) -> None:
        """Forget what came after this step."""
        keep = bisect_right(self.steps, step)
        del self.steps[keep:], self.values[keep:]

    def thinned(self, points: int) -> Series:
        """Every so manieth, and the last, so that no more than `points` are left."""
        every = -(-len(self.steps) // max(points - 1, 1)) or 1
        kept = [*range(0, len(self.steps) - 1, every), len(self.steps) - 1] if self.steps else []
        return Series([self.steps[i] for i in kept], [self.values[i] for i in kept])


def _series(*names: str) -> dict[str, Series]:
    return {name: Series() for name in names}


STEPPED = ("loss", "smooth", "rate", "drift", "worst", "seconds")
ALPHAS = ("alpha_0", "alpha_25", "alpha_50", "alpha_75", "alpha_100")  # smallest, quartiles, largest


class History:
    """Of one run. Threads take turns at `look`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = threading.Lock()
        self.forget()

    def forget(self) -> None:
        self.offset = 0
        self.count = 0  # of events
        self.drawn = 0  # of them, pictures
        self.series = _series(*STEPPED, *ALPHAS, "pinned", "memory")
        self.plan: events.Planned | None = None
        self.warnings: list[str] = []
        self.unknown = 0  # events that this version cannot read
        self.cached: events.Cached | None = None
        self.steps = 0  # that it is to take
        self.exported: events.Exported | None = None
        self.last: events.Event | None = None

    def look(self) -> History:
        """Read what is new; a file that became shorter is another run's, and read afresh."""
        with self.lock:
            try:
                with self.path.open("rb") as file:
                    if self.path.stat().st_size < self.offset:
                        self.forget()
                    file.seek(self.offset)
                    new = file.read()
            except FileNotFoundError:
                self.forget()
                return self
            whole = new[: new.rfind(b"\n") + 1]
            self.offset += len(whole)
            for line in whole.splitlines():
                try:
                    event = events.parse(line.decode())
                except (ValueError, KeyError, TypeError):  # of another version, whose other events still tell of the run
                    self.unknown += 1
                else:
                    self.add(event)
            return self

    def add(self, event: events.Event) -> None:
        self.count += 1
        self.last = event
        match event:
            case events.Planned():
                self.plan, self.steps, self.warnings, self.cached = event, event.steps, [*event.assumed], None
            case events.Warned(message=message):
                self.warnings.append(message)
            case events.Cached():
                self.cached = event
            case events.Resumed(step=step):
                self.cut(step)
            case events.Stepped():
                if event.step <= self.step:  # it was killed before its first checkpoint, and starts anew
                    self.cut(event.step - 1)
                before = self.series["smooth"].values
                smooth = events.smoothed(before[-1] if before else None, event.loss)
                drift, worst = event.embedding_norm_drift, event.embedding_norm_drift_worst
                for name, value in zip(STEPPED, (event.loss, smooth, event.rate, drift, worst, event.seconds), strict=True):
                    self.series[name].add(event.step, value)
                self.steps = event.steps
            case events.Measured():
                for name, value in zip(ALPHAS, event.alphas, strict=False):  # none where the adapter has no alphas
                    self.series[name].add(event.step, value)
                if event.pinned_drift is not None:
                    self.series["pinned"].add(event.step, event.pinned_drift)
                if event.memory_bytes:
                    self.series["memory"].add(event.step, event.memory_bytes / 2**30)
            case events.Previewed():
                self.drawn += 1
            case events.Exported():
                self.exported = event

    def cut(self, step: int) -> None:
        """Steps behind this one were lost."""
        for series in self.series.values():
            series.cut(step)

    @property
    def step(self) -> int:
        return self.series["loss"].steps[-1] if self.series["loss"].steps else 0

    def seconds_left(self) -> float | None:
        """At the pace of the last steps; None before the first."""
        recent = self.series["seconds"].values[-RECENT:]
        return fmean(recent) * (self.steps - self.step) if recent else None


@lru_cache(maxsize=64)
def of(path: Path) -> History:
    return History(path)


def status(run: Run, seen: History) -> str:
    """A word of live.WORDS. A process that lives decides; then the last word of the one that does not; none ever lived where none left
    its number."""
    if run.trained_by() is not None:
        return "stopping" if run.asked_to_stop() else "running"
    match seen.last:
        case events.Finished():
            return "finished"
        case events.Stopped():
            return "stopped"
    return "failed" if run.pid_file.exists() or seen.count else "waiting"


KILLED = "It ended without a last word: it was killed, or the machine ran out of memory. The log may say more; Resume goes on."


def reason(seen: History) -> str:
    """Why a failed run did."""
    return seen.last.message if isinstance(seen.last, events.Failed) else KILLED
