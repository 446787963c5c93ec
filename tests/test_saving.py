"""A full disk is waited for and told of once; anything else that a disk refuses ends the run with a sentence."""

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from sdlora import events, saving
from sdlora.checkpoint import Checkpoint, save
from sdlora.errors import TrainingError
from sdlora.run import Run
from sdlora.saving import reservations, when_there_is_room

SAVED = events.Saved(4, "x")


def refusing(times: int, number: int = errno.ENOSPC) -> Callable[[], events.Event]:
    left = [times]

    def write() -> events.Event:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(number, "refused")
        return SAVED

    return write


def test_a_full_disk_is_told_of_once_and_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(saving.time, "sleep", slept.append)
    assert list(when_there_is_room(Run(tmp_path), 4, refusing(0))) == [SAVED] and not slept
    warned, saved = when_there_is_room(Run(tmp_path), 4, refusing(3))
    assert isinstance(warned, events.Warned) and "is full: the run waits at step 4" in warned.message
    assert saved == SAVED and len(slept) == 3
    assert list(when_there_is_room(Run(tmp_path), 4, refusing(1, errno.EDQUOT)))[-1] == SAVED


def test_whoever_asks_a_waiting_run_to_stop_hears_what_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = Run(tmp_path)
    save(of.checkpoints, Checkpoint(2, {}, {}), keep=2)
    monkeypatch.setattr(saving.time, "sleep", lambda seconds: of.ask_to_stop())
    stream = when_there_is_room(of, 4, refusing(100))
    assert isinstance(next(stream), events.Warned)
    with pytest.raises(TrainingError, match=r"Step 4 cannot be written .*refused.*step-00000002"):
        next(stream)


def test_what_a_disk_refuses_for_another_reason_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"Step 4 cannot be written .*refused.*no checkpoint yet"):
        list(when_there_is_room(Run(tmp_path), 4, refusing(1, errno.EROFS)))


def test_what_has_changed_is_named(tmp_path: Path) -> None:
    of = Checkpoint(4, {}, {"circumstances": {"torch": "1", "train.steps": 6, "loss.prior": 0.0}}, ("step-00000006 (cut)",))
    damaged, changed = reservations(of, {"torch": "2", "train.steps": 7, "loss.prior": 0.0, "new.option": 3})
    assert "step-00000006 (cut) is damaged" in damaged.message
    assert changed.message.endswith(": torch 1 -> 2, train.steps 6 -> 7.")
    assert not list(reservations(Checkpoint(4, {}, {"circumstances": {"torch": "1"}}), {"torch": "1"}))
