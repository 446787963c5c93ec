"""Training from the command line: what is refused, what is told, and a run that stops and resumes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from sdlora import config, run
from sdlora.cli import main

Told = subprocess.CompletedProcess[str]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stepz", "3"], "--stepz is not an option. Did you mean --steps?"),
        (["--steps"], "--steps needs a value"),
        (["--data.folder", "nowhere"], "there is no folder nowhere"),
        (["--base", "nowhere"], "there is no nowhere; give a model folder"),
        (["nowhere.toml"], "No config file"),
    ],
)
def test_bad_input_is_one_line_and_code_two(place: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(place / "tiny.toml"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("sdlora: ") and error.count("\n") == 1


@pytest.mark.parametrize("content", ["nothing", "no caption", "broken", "not pictures"])
def test_bad_folders_are_one_line_and_code_two(place: Path, tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    if content in ("no caption", "broken"):
        Image.effect_noise((32, 32), 50).save(tmp_path / "a.png")
    if content == "broken":
        (tmp_path / "a.txt").write_text("a cat")
        (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:300])
    if content == "not pictures":
        (tmp_path / "a.psd").write_bytes(b"x")
    assert main(["train", str(place / "tiny.toml"), "--data.folder", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    said = {"nothing": str(tmp_path), "not pictures": "1 .psd"}.get(content, "a.png")
    assert error.count("\n") == 1 and said in error


def test_train(place: Path, sdlora: Callable[..., Told]) -> None:
    cache = ("--data.cache", place / "empty cache")  # or other tests have encoded these pictures before
    told = sdlora("train", place / "tiny.toml", "--prompts", "a cat --s 2", "--output.name", "whole", *cache)
    assert told.returncode == 0, told.stderr
    lines = told.stdout.splitlines()
    assert any(line.startswith("Pictures     3 in buckets 32x32 (3)") for line in lines)
    assert any(line.startswith("Adapters     48 of unet, 12 of text encoder") for line in lines)
    assert "before-after.png" in lines[-1] and "whole.safetensors" in lines[-1] and "sdlora generate" in lines[-1]
    assert "8/8" in told.stderr and "loss" in told.stderr
    assert "Encoding pictures: 100%" in told.stderr and "Encoding captions: 100%" in told.stderr


def test_a_second_trainer_is_refused_in_one_line_and_touches_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    of = run.create(config.load([place / "tiny.toml"], [("output.name", "shared")]))
    of.events.write_text("first's\n")
    of.ask_to_stop()  # the first has been asked, and the second must not take that back
    with of.locked():
        assert main(["resume", str(of.folder)]) == 2
    error = capsys.readouterr().err
    assert "trained by another process" in error and error.count("\n") == 1
    assert of.asked_to_stop() and of.events.read_text() == "first's\n" and not of.log.exists()


@pytest.mark.skipif(os.name != "posix", reason="signals of this kind are POSIX's")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_exits_zero_and_resume_finishes(place: Path, number: signal.Signals, sdlora: Callable[..., Told]) -> None:
    name = f"stopped-{number.name}"
    command = [sys.executable, "-m", "sdlora", "train", str(place / "tiny.toml"), "--steps", "100000", "--output.name", name]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    folder = place / "runs" / name
    deadline = time.monotonic() + 120
    while '"Stepped"' not in (text := (folder / "events.jsonl").read_text() if (folder / "events.jsonl").exists() else ""):
        assert process.poll() is None and time.monotonic() < deadline, text
        time.sleep(0.05)
    process.send_signal(number)
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert told.splitlines()[-1].endswith(f"sdlora resume {folder}")
    done = int(next((folder / "checkpoints").iterdir()).name.removeprefix("step-"))
    text = (folder / "config.toml").read_text().replace("steps = 100000", f"steps = {done + 2}")
    (folder / "config.toml").write_text(text)
    resumed = sdlora("resume", folder)
    assert resumed.returncode == 0 and f"Going on after step {done}." in resumed.stdout
    assert (folder / f"{name}.safetensors").exists()
