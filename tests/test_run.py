"""The run folder: made with its config, never shared, reopened from anywhere."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from sdlora import config, run
from sdlora.errors import ConfigError, TrainingError


def test_create_and_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    of = config.load([], [("data.folder", "pictures"), ("output.name", "cat")])
    first, second = run.create(of), run.create(of)
    assert (first.folder.name, second.folder.name) == ("cat", "cat-2")
    assert first.previews.is_dir() and first.checkpoints.is_dir()
    monkeypatch.chdir("/")
    opened = run.open_run(second.folder)
    assert opened.config.data.folder == tmp_path / "pictures"  # absolute: resume works from any folder
    assert opened.export == second.folder / "cat.safetensors"
    assert first.cache == second.cache == tmp_path / "runs" / "_cache"


def test_stop_file(tmp_path: Path) -> None:
    of = run.Run(tmp_path)
    assert not of.asked_to_stop()
    of.ask_to_stop()
    assert of.asked_to_stop()


def test_a_request_is_taken_once(tmp_path: Path) -> None:
    of = run.Run(tmp_path)
    assert not of.take_request("save")
    of.ask_for("save")
    of.ask_for("save")
    assert of.asked_for("save") and not of.asked_for("sample")
    assert of.take_request("save") and not of.take_request("save")
    of.ask_for("sample")
    of.ask_to_stop()
    of.forget_requests()
    assert not of.asked_for("sample") and not of.asked_to_stop()


TRAINER = """
import sys, time
from pathlib import Path
from sdlora.run import Run
with Run(Path(sys.argv[1])).locked():
    print("mine", flush=True)
    time.sleep(60)
"""


def test_a_second_trainer_is_refused_until_the_first_is_gone_however_it_went(tmp_path: Path) -> None:
    of = run.Run(tmp_path)
    first = subprocess.Popen([sys.executable, "-c", TRAINER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None and first.stdout.readline() == "mine\n"
    draft = tmp_path / "checkpoints" / ".tmp-1-step-00000002"
    draft.mkdir(parents=True)
    with pytest.raises(TrainingError, match="trained by another process") as refused, of.locked():
        pass
    assert "\n" not in str(refused.value) and draft.exists()  # which the first may be writing
    first.kill()
    first.communicate()
    with of.locked():
        assert not draft.exists()
    with of.locked():  # given back
        pass


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="not a run folder"):
        run.open_run(tmp_path)
    with pytest.raises(ConfigError, match="no folder"):
        run.create(config.load([], [("data.folder", str(tmp_path / "nope"))]))
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(ConfigError, match="cannot make"):
        run.create(config.load([], [("data.folder", str(tmp_path)), ("runs", str(tmp_path / "runs"))]))


def test_every_path_in_the_run_folder_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("pictures", "others"):
        (tmp_path / name).mkdir()
    (tmp_path / "earlier.safetensors").touch()
    options = {"data.folder": "pictures", "regularisation_folder": "others", "data.cache": "kept", "runs": "runs"}
    options["alpha_from"] = "earlier.safetensors"
    created = run.create(config.load([], list(options.items())))
    made = created.config
    assert created.cache == tmp_path / "kept"
    assert made.data.folder == tmp_path / "pictures" and made.data.regularisation_folder == tmp_path / "others"
    assert made.lora.alpha_from == tmp_path / "earlier.safetensors" and made.model.base == "mini"


def test_the_folders_of_sets_are_absolute_and_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one").mkdir()
    (tmp_path / "a.toml").write_text('[[data.sets]]\nfolder = "one"\n[[data.sets]]\nfolder = "two"\nrepeats = 3')
    of = config.load([tmp_path / "a.toml"])
    with pytest.raises(ConfigError, match="there is no folder two"):
        run.create(of)
    (tmp_path / "two").mkdir()
    made = run.create(of).config.data.sets
    assert [(of.folder, of.repeats) for of in made] == [(tmp_path / "one", 1), (tmp_path / "two", 3)]


def test_a_run_knows_the_process_that_trains_it(tmp_path: Path) -> None:
    one = run.Run(tmp_path)
    assert one.trained_by() is None
    one.claim(os.getpid())
    assert one.trained_by() == os.getpid()

    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    one.claim(child.pid)
    assert one.trained_by() == child.pid
    child.stdin.close()  # type: ignore[union-attr]
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert one.trained_by() is None, "it has ended, though nobody has asked how"
    child.wait()

    one.pid_file.write_text(f"{os.getpid()} 12345.0")
    assert one.trained_by() is None, "the id of an ended process, given away again"
