"""Runs one after another, whoever lengthens the list and whatever process dies."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sdlora import config, events, queue, run
from sdlora.errors import TrainingError
from sdlora.queue import Entry


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """With four runs, a to d."""
    for name in "abcd":
        run.create(config.load([], [("data.folder", str(tmp_path)), ("output.runs", str(tmp_path / "runs")), ("output.name", name)]))
    return tmp_path / "runs"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of runs in the order in which their processes began; each ends at once."""
    names: list[str] = []

    def start(of: run.Run) -> subprocess.Popen[bytes]:
        assert of.trained_by() is None and not any(other.trained_by() for other in map(run.Run, run.folders(of.folder.parent)))
        names.append(of.folder.name)
        return subprocess.Popen([sys.executable, "-c", ""])

    monkeypatch.setattr(run.Run, "start", start)
    return names


def test_the_list_keeps_its_order_and_each_run_once(runs: Path) -> None:
    assert queue.read(runs) == []
    for name in "abcb":
        queue.add(runs, name)
    queue.move_up(runs, "c")
    queue.move_up(runs, "d")
    assert queue.read(runs) == [Entry("a"), Entry("c"), Entry("b")]
    queue.remove(runs, "c")
    queue.remove(runs, "d")
    assert queue.read(runs) == [Entry("a"), Entry("b")]


def test_many_can_lengthen_it_at_once(runs: Path) -> None:
    adders = [threading.Thread(target=queue.add, args=(runs, f"run-{number}")) for number in range(20)]
    for adder in adders:
        adder.start()
    for adder in adders:
        adder.join()
    assert sorted(entry.run for entry in queue.read(runs)) == sorted(f"run-{number}" for number in range(20))


def test_runs_train_one_after_another_also_those_that_come_meanwhile(runs: Path, started: list[str]) -> None:
    queue.add(runs, "b")
    queue.add(runs, "a")
    for line in queue.work(runs, 0.01):
        if line == "b: training":
            assert queue.is_worked(runs) and list(queue.work(runs, 0.01)) == [], "one process alone works it off"
            assert queue.read(runs)[0] == Entry("b", begun=True)
            queue.add(runs, "c")
            queue.move_up(runs, "a")
    assert started == ["b", "a", "c"] and queue.read(runs) == [] and not queue.is_worked(runs)


def test_the_next_process_goes_on_where_one_died(runs: Path, started: list[str]) -> None:
    """`a` came to its end, though nobody saw it; `b` was killed."""
    for name in "abc":
        queue.add(runs, name)
    for name, told in (("a", [events.Finished(1, "x")]), ("b", [events.Resumed(1)])):
        list(events.record(told, runs / name / "events.jsonl"))
    with queue.changed(runs) as entries:
        entries[:] = [Entry("a", begun=True), Entry("b", begun=True), Entry("c")]
    list(queue.work(runs, 0.01))
    assert started == ["b", "c"]


def test_a_run_that_was_started_by_hand_is_waited_for(runs: Path, started: list[str]) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    run.Run(runs / "d").claim(child.pid)
    queue.add(runs, "a")
    worker = threading.Thread(target=lambda: list(queue.work(runs, 0.01)))
    worker.start()
    worker.join(0.2)
    assert started == [] and worker.is_alive()
    child.communicate(b"\n")
    worker.join(10)
    assert started == ["a"]


def test_a_run_that_cannot_be_trained_holds_up_no_other(runs: Path, started: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    start = run.Run.start

    def refused(of: run.Run) -> subprocess.Popen[bytes]:
        if of.folder.name == "a":
            raise TrainingError("a is being trained already.")
        return start(of)

    monkeypatch.setattr(run.Run, "start", refused)
    for name in ("gone", "a", "b"):
        queue.add(runs, name)
    told = list(queue.work(runs, 0.01))
    assert started == ["b"] and any("not a run folder" in line for line in told) and "a: a is being trained already." in told
