"""Events survive the file, a follower sees them as they come, and a dead process ends in Failed."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdlora import events

TOLD = [
    events.Planned(2, 1, {"64x64": 2}, 3, 2, 1.5, 1, {"unet": 4}, 10, 99, "cpu", "mini", ["v"]),
    events.Cached(1, 2),
    events.Stepped(1, 3, 0.5, 1e-4, 0.01, 4.0, 0.2),
    events.Saved(1, "x"),
    events.Finished(3, "y"),
]


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    assert list(events.record(iter(TOLD), path)) == TOLD
    assert events.read(path) == TOLD
    assert list(events.follow(path)) == TOLD


def test_an_error_is_recorded_and_raised(tmp_path: Path) -> None:
    def failing() -> Iterator[events.Event]:
        yield TOLD[0]
        raise ValueError("no such luck")

    with pytest.raises(ValueError, match="luck"):
        list(events.record(failing(), tmp_path / "e"))
    assert events.read(tmp_path / "e")[-1] == events.Failed("ValueError: no such luck")


def test_a_line_cut_by_a_kill_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "e"
    list(events.record(iter(TOLD[:2]), path))
    path.write_text(path.read_text() + '{"event": "Sav')
    assert events.read(path) == TOLD[:2]


def test_a_line_cut_by_a_kill_is_no_part_of_the_next(tmp_path: Path) -> None:
    path = tmp_path / "e"
    list(events.record(iter(TOLD[:2]), path))
    path.write_text(path.read_text() + '{"event": "Sav')
    list(events.record(iter(TOLD[2:]), path))
    assert events.read(path) == TOLD


def stepped(step: int, loss: float) -> events.Stepped:
    return events.Stepped(step, 9, loss, 0.1, 0.0, 0.0, 0.1)


def test_steps_are_those_that_the_weights_come_from() -> None:
    first, again = [stepped(n, 1.0) for n in (1, 2, 3, 4)], stepped(3, 2.0)
    assert events.steps_of(first) == first
    assert events.steps_of([*first, events.Resumed(2), again]) == [*first[:2], again]
    assert events.steps_of([*first, events.Resumed(2)]) == first[:2]
    assert events.steps_of([*first, stepped(1, 3.0)]) == [stepped(1, 3.0)]  # killed before its first checkpoint


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_events_outlive_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def told() -> Iterator[events.Event]:
        yield TOLD[0]
        os.dup2(full, descriptor)
        yield from TOLD[1:3]
        os.dup2(real, descriptor)
        yield from TOLD[3:]

    path = tmp_path / "e"
    stream = events.record(told(), path)
    assert next(stream) == TOLD[0]
    (descriptor,) = (int(p.name) for p in Path("/proc/self/fd").iterdir() if p.exists() and p.resolve() == path)
    real, full = os.dup(descriptor), os.open("/dev/full", os.O_WRONLY)
    assert list(stream) == TOLD[1:] and events.read(path) == TOLD
    os.close(real)
    os.close(full)


def test_a_follower_of_a_dead_process_hears_failed(tmp_path: Path) -> None:
    path = tmp_path / "e"
    list(events.record(iter(TOLD[:2]), path))
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    *first, last = events.follow(path, process.pid, poll_seconds=0.01)
    assert first == TOLD[:2] and isinstance(last, events.Failed)
