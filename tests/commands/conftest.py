"""The program as a process, and a place for it to work: a tiny model, three pictures, a config."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from tiny import build_model

Told = subprocess.CompletedProcess[str]


@pytest.fixture(scope="session")
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


@pytest.fixture
def sdlora() -> Callable[..., Told]:
    def call(*arguments: object) -> Told:
        return subprocess.run([sys.executable, "-m", "sdlora", *map(str, arguments)], capture_output=True, text=True, check=False)

    return call
