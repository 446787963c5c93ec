"""The command line as a user meets it: one clear line and exit code 2, a run that stops and resumes, pictures from the file."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from tiny import build_model

from sdlora.cli import main, pairs, split_strength
from sdlora.errors import ConfigError


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    build_model(folder / "tiny")
    (folder / "pictures").mkdir()
    for number in range(3):
        Image.new("RGB", (32, 32), (80 * number, 90, 200)).save(folder / "pictures" / f"{number}.png")
        (folder / "pictures" / f"{number}.txt").write_text("a cat")
    (folder / "tiny.toml").write_text(
        f'[model]\nbase = "{(folder / "tiny").as_posix()}"\n[data]\nfolder = "{(folder / "pictures").as_posix()}"\nresolution = 32\n'
        f'bucket_step = 8\n[train]\nprecision = "fp32"\nsteps = 8\nthreads = 1\n[output]\nruns = "{(folder / "runs").as_posix()}"\n'
    )
    return folder


def sdlora(*arguments: object, **options: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", "sdlora", *map(str, arguments)], capture_output=True, text=True, check=False, **options)  # type: ignore


def test_help_needs_no_torch_and_half_a_second() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    told = sdlora("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert told.returncode == 0 and "train" in told.stdout
    # a bound on work, not a race: importing torch alone takes over a second of CPU
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.9
    code = "import sys; from sdlora.cli import main; main(['options']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_flags() -> None:
    assert pairs(["--a.b", "1", "--c=x=y"]) == [("a.b", "1"), ("c", "x=y")]
    with pytest.raises(ConfigError, match="needs a value"):
        pairs(["--steps"])
    assert split_strength("a.safetensors:0.5") == (Path("a.safetensors"), 0.5)
    assert split_strength("C:\\a.safetensors") == (Path("C:\\a.safetensors"), 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stepz", "3"], "--stepz is not an option. Did you mean --steps?"),
        (["--steps"], "--steps needs a value"),
        (["--data.folder", "nowhere"], "there is no folder nowhere"),
        (["--base", "nowhere"], "there is no folder nowhere"),
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


def test_train_then_generate(place: Path) -> None:
    told = sdlora("train", place / "tiny.toml", "--prompts", "a cat --s 2", "--output.name", "whole")
    assert told.returncode == 0, told.stderr
    lines = told.stdout.splitlines()
    assert any(line.startswith("Pictures     3 in buckets 32x32 (3)") for line in lines)
    assert any(line.startswith("Adapters     48 of unet, 12 of text encoder") for line in lines)
    assert "before-after.png" in lines[-1] and "whole.safetensors" in lines[-1] and "sdlora generate" in lines[-1]
    assert "8/8" in told.stderr and "loss" in told.stderr
    assert "Encoding pictures: 100%" in told.stderr and "Encoding captions: 100%" in told.stderr

    lora = place / "runs" / "whole" / "whole.safetensors"
    out = place / "out"
    told = sdlora("generate", "a cat --s 2", "--base", place / "tiny", "--lora", f"{lora}:0.5", "--out", out)
    assert told.returncode == 0, told.stderr
    with Image.open(out / "00000.png") as picture:
        assert "<lora:whole:0.5>" in picture.text["parameters"]  # type: ignore
    assert sdlora("generate", "--base", place / "tiny").returncode == 2
    assert sdlora("generate", "a", "--base", place / "tiny", "--lora", "nowhere.safetensors").returncode == 2


@pytest.mark.skipif(os.name != "posix", reason="signals of this kind are POSIX's")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_exits_zero_and_resume_finishes(place: Path, number: signal.Signals) -> None:
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


def test_cache_is_shown_and_cleared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    from sdlora.data.cache import TensorCache

    cache = TensorCache(tmp_path / "latents-1", "mini")
    cache.put("a", {"mean": torch.zeros(512, 1024)})
    cache.flush()
    assert main(["cache", "info", str(tmp_path)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"{tmp_path}: 2.0 MiB" and told[1].startswith("  latents-1: 1 entries, 2.0 MiB, of mini, last used 20")
    assert main(["cache", "prune", str(tmp_path)]) == 0 and "0 files deleted, 0.0 MiB" in capsys.readouterr().out
    assert main(["cache", "prune", str(tmp_path), "--older-than", "0"]) == 0 and "1 file deleted, 2.0 MiB" in capsys.readouterr().out
    assert main(["cache", "info", str(tmp_path)]) == 0 and capsys.readouterr().out == f"{tmp_path}: 0.0 MiB\n"
    assert main(["cache", "info", str(tmp_path / "nowhere")]) == 2
