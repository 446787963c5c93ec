"""What a run tells: small typed events, recorded one JSON line each in events.jsonl, and followed from any process.

A run that was killed takes the steps behind its last checkpoint again, so that its file tells of them twice: `steps_of` has each once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdlora.files import FULL


@dataclass(frozen=True)
class Planned:
    """Before training: what is going to happen."""

    images: int
    repeats: int  # of each training picture an epoch; 1 where sets differ
    buckets: dict[str, int]  # "512x768" -> pictures
    steps: int
    steps_per_epoch: int
    epochs: float
    batch_size: int
    layers: dict[str, int]  # "unet" -> adapted layers
    trainable_parameters: int
    memory_bytes: int  # estimated peak
    device: str
    base: str
    assumed: list[str]  # of the base model, in sentences


@dataclass(frozen=True)
class Warned:
    message: str


@dataclass(frozen=True)
class Cached:
    """What the frozen parts of the model say of pictures or captions is being computed, once for all runs."""

    done: int
    total: int
    of: str = "pictures"  # or "captions"


@dataclass(frozen=True)
class Resumed:
    """Training goes on after this many steps; later steps recorded before this line were lost and are taken again."""

    step: int


@dataclass(frozen=True)
class Stepped:
    step: int  # steps taken so far
    steps: int
    loss: float
    rate: float  # of the UNet's adapters, or of the text encoder's where the UNet has none
    embedding_norm_drift: float  # mean over tokens of | norm / base norm - 1 |
    embedding_norm_drift_worst: float  # the largest of them
    seconds: float  # this step took


@dataclass(frozen=True)
class Measured:
    """Now and then: how far the adapter has gone."""

    step: int
    alphas: list[float]  # smallest, quartiles and largest over layers; empty where the kind of adapter has none
    pinned_drift: float | None  # mean over tokens of 1 - cosine between pinned prompts' embeddings and the base's; None: text untrained
    memory_bytes: int = 0  # see models.device.memory_used; 0 of runs that did not tell


@dataclass(frozen=True)
class Validated:
    """The loss on held-out pictures, always with the same noise and timesteps."""

    step: int
    loss: float
    path: str  # of the LoRA as it was then, where no step before had a lower loss; else empty


@dataclass(frozen=True)
class Previewed:
    step: int
    path: str


@dataclass(frozen=True)
class Saved:
    step: int
    path: str


@dataclass(frozen=True)
class Exported:
    step: int
    path: str
    lost: float = 0.0  # share of the change (Frobenius norm) that a file of lower rank leaves out, over all layers
    worst: str = ""  # the layer that lost the largest share


@dataclass(frozen=True)
class Stopped:
    """Asked to stop: state is saved, `sdlora resume` goes on."""

    step: int


@dataclass(frozen=True)
class Finished:
    step: int
    path: str


@dataclass(frozen=True)
class Failed:
    message: str


Event = Planned | Warned | Cached | Resumed | Stepped | Measured | Validated | Previewed | Saved | Exported | Stopped | Finished | Failed
KINDS: dict[str, type[Any]] = {
    kind.__name__: kind
    for kind in (Planned, Warned, Cached, Resumed, Stepped, Measured, Validated, Previewed, Saved, Exported, Stopped, Finished, Failed)
}
LAST = (Stopped, Finished, Failed)
SMOOTHING = 0.95  # share of the mean so far in the loss that is shown


def record(events: Iterable[Event], path: Path) -> Iterator[Event]:
    """Pass events on, each appended to `path` first, or as soon as a full disk has room again. An error is recorded as Failed, then
    raised on."""
    with path.open("ab", buffering=0) as file:
        file.truncate(whole_lines(path))
        waiting = b""

        def write(event: Event) -> None:
            nonlocal waiting
            line = json.dumps({"event": type(event).__name__, "time": round(time.time(), 3)} | asdict(event))
            waiting += f"{line}\n".encode()
            try:
                while waiting:
                    waiting = waiting[file.write(waiting) :]
            except OSError as error:
                if error.errno not in FULL:
                    raise

        try:
            for event in events:
                write(event)
                yield event
        except Exception as error:
            write(Failed(f"{type(error).__name__}: {error}"))
            raise


def whole_lines(path: Path) -> int:
    """Bytes up to the last line's end: behind them stands what a killed process left unfinished."""
    return path.read_bytes().rfind(b"\n") + 1


def parse(line: str) -> Event:
    values = json.loads(line)
    kind = KINDS[values.pop("event")]
    values.pop("time")
    return kind(**values)  # type: ignore[no-any-return]


def read(path: Path) -> list[Event]:
    """All whole events so far; a line that a killed process left unfinished is dropped."""
    if not path.exists():
        return []
    return [parse(line) for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]


def steps_of(events: Iterable[Event]) -> list[Stepped]:
    """The steps that the run's weights come from, in order: of one that was taken again the last, and none that was lost."""
    taken: list[Stepped] = []
    for event in events:
        if isinstance(event, Stepped | Resumed):
            last = event.step if isinstance(event, Resumed) else event.step - 1
            while taken and taken[-1].step > last:
                taken.pop()
        if isinstance(event, Stepped):
            taken.append(event)
    return taken


def smoothed(before: float | None, loss: float) -> float:
    """A running mean of the loss as it is shown; `before` is None at the first step."""
    return loss if before is None else SMOOTHING * before + (1 - SMOOTHING) * loss


def follow(path: Path, pid: int | None = None, poll_seconds: float = 0.5) -> Iterator[Event]:
    """Events as they come, until the run ends; where process `pid` dies without a last word, the last event is Failed."""
    import psutil  # late: a tenth of what a command takes to start

    seen = 0
    while True:
        alive = pid is None or psutil.pid_exists(pid)
        events = read(path)
        for event in events[seen:]:
            yield event
            if isinstance(event, LAST):
                return
        seen = len(events)
        if not alive:
            yield Failed(f"Process {pid} ended without a last word: it was killed, or the machine ran out of memory.")
            return
        time.sleep(poll_seconds)
