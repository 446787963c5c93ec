"""A full disk is waited for and told of once; anything else that a disk refuses ends the run with a sentence."""

import errno
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sdlora import config, events, saving
from sdlora.checkpoint import Checkpoint, save
from sdlora.errors import TrainingError
from sdlora.lora.inits import Start
from sdlora.lora.layers import LoraLayer
from sdlora.optim import Average
from sdlora.run import Run, create
from sdlora.saving import check_disk, reservations, when_there_is_room

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


@pytest.mark.parametrize(("algorithm", "moments"), [("adamw", 8000), ("lion", 4000), ("prodigy", 16000), ("adafactor", 0)])
def test_what_an_optimizer_keeps_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str, moments: int) -> None:
    """600 + 400 numbers of 4 bytes are learned, and alpha stands beside them: a checkpoint of these and the moments, and two LoRA files."""
    of = create(config.load([], [("data.folder", str(tmp_path)), ("output.runs", str(tmp_path)), ("algorithm", algorithm), ("steps", "1")]))
    start = Start(torch.zeros(1, 600), torch.zeros(400, 1))
    layer = LoraLayer(torch.nn.Linear(600, 400), start, alpha=1.0, scale_of_one=1.0, learned_alpha=False)
    needed = 4004 + moments + 2 * 4000 - (of.folder / "config.toml").stat().st_size
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    check_disk(of, {"unet.a": layer}, Average([], 0.0))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    with pytest.raises(TrainingError, match="1 checkpoints of"):
        check_disk(of, {"unet.a": layer}, Average([], 0.0))
