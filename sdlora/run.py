"""The run folder: all that one run reads and writes, and the interface between processes."""

from __future__ import annotations

import subprocess
import sys
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from sdlora import config as configs
from sdlora.config import Config, Section
from sdlora.errors import ConfigError, TrainingError
from sdlora.files import sweep, try_lock, write_durably

NEW_GROUP = 0x200  # Windows' CREATE_NEW_PROCESS_GROUP, which other systems' subprocess lacks
CACHE = "_cache"
Request = Literal["sample", "save"]  # pictures, or a checkpoint and a LoRA file, at the end of the step that is being taken
CLOCKS_DIFFER = 2.0  # seconds between two readings of when a process began, which follow the system's clock


@dataclass(frozen=True)
class Run:
    """A folder with config.toml, plan.json, events.jsonl, run.log, previews/, checkpoints/, lock, pid, and `stop`, `sample` or `save`
    once it is asked to."""

    folder: Path

    @cached_property
    def config(self) -> Config:
        return configs.load([self.folder / "config.toml"])

    @property
    def events(self) -> Path:
        return self.folder / "events.jsonl"

    @property
    def plan(self) -> Path:
        return self.folder / "plan.json"

    @property
    def log(self) -> Path:
        return self.folder / "run.log"

    @property
    def previews(self) -> Path:
        return self.folder / "previews"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def cache(self) -> Path:
        """Beside the runs, which share it: no run's name begins with a line."""
        return self.config.data.cache or self.folder.parent / CACHE

    @property
    def export(self) -> Path:
        """Of the finished run."""
        return self.folder / f"{self.config.output.name}.safetensors"

    @property
    def best(self) -> Path:
        """As it was where held-out pictures had the lowest loss."""
        return self.folder / f"{self.config.output.name}-best.safetensors"

    def export_of(self, step: int) -> Path:
        """Of a run that was stopped: a file of its own, so that none of more steps is overwritten."""
        return self.folder / f"{self.config.output.name}-step{step:08d}.safetensors"

    @property
    def stop_file(self) -> Path:
        return self.folder / "stop"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """To be held by the process that trains here. It is alone then, so what a killed one left half written goes. Raises
        TrainingError where another holds it; the lock of a dead one is free."""
        try:
            file = (self.folder / "lock").open("ab")
            ours = try_lock(file)
        except OSError as error:
            raise TrainingError(f"{self.folder} cannot be locked ({error.strerror}): move it to another disk.") from error
        with file:
            if not ours:
                raise TrainingError(f"{self.folder} is being trained by another process: stop that one first, or wait for its end.")
            sweep(self.folder)
            yield

    @property
    def pid_file(self) -> Path:
        return self.folder / "pid"

    def claim(self, pid: int) -> None:
        """Write down for others which process trains here; the lock, not this, keeps a second one out."""
        import psutil  # late, as in events.py

        self.pid_file.write_text(f"{pid} {psutil.Process(pid).create_time()}\n")

    def trained_by(self) -> int | None:
        """Id of the process that trains here now, None where none does."""
        import psutil

        try:
            pid, began = self.pid_file.read_text().split()
            process = psutil.Process(int(pid))
            # A system gives the ids of ended processes away again, and their parents may be slow to clear them up.
            lives = process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - float(began)) < CLOCKS_DIFFER
        except (FileNotFoundError, ValueError, psutil.NoSuchProcess):
            return None
        return process.pid if lives else None

    def start(self) -> subprocess.Popen[bytes]:
        """A process that trains here, or goes on with it, whatever becomes of this one. Raises TrainingError where one does already."""
        if (pid := self.trained_by()) is not None:
            raise TrainingError(f"{self.folder.name} is being trained already, by process {pid}.")
        self.forget_requests()  # of the last time: until the process has done so it would seem to stop
        process = spawn(["resume", str(self.folder)], self.log)
        self.claim(process.pid)
        return process

    def ask_to_stop(self) -> None:
        self.stop_file.touch()

    def asked_to_stop(self) -> bool:
        return self.stop_file.exists()

    def forget_requests(self) -> None:
        for what in ("stop", *typing.get_args(Request)):
            (self.folder / what).unlink(missing_ok=True)

    def ask_for(self, what: Request) -> None:
        (self.folder / what).touch()

    def asked_for(self, what: Request) -> bool:
        return (self.folder / what).exists()

    def take_request(self, what: Request) -> bool:
        """Whether somebody has asked for it; once for however many."""
        try:
            (self.folder / what).unlink()
        except FileNotFoundError:
            return False
        return True


def spawn(arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """`python -m sdlora ARGUMENTS`, which outlives this process; all that it says is added to `log`."""
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "sdlora", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in our terminal is not for it
            creationflags=NEW_GROUP if sys.platform == "win32" else 0,
        )


def folders(runs: Path) -> list[Path]:
    """Of all runs in a folder of runs."""
    if not runs.is_dir():
        return []
    return [path for path in runs.iterdir() if not path.name.startswith((".", "_")) and (path / "config.toml").is_file()]


def create(config: Config) -> Run:
    """Make a new run folder `<output.runs>/<output.name>`, or `<name>-2` and so on where that is taken."""
    for of in config.data.every_set():
        if not of.folder.exists():
            raise ConfigError(f"data: there is no folder {of.folder}.")
    config = with_absolute_paths(config)
    for number in range(1, 10_000):
        folder = config.output.runs / (config.output.name if number == 1 else f"{config.output.name}-{number}")
        try:
            folder.mkdir(parents=True)
            run = Run(folder.resolve())
            run.previews.mkdir()
            run.checkpoints.mkdir()
            write_durably(folder / "config.toml", configs.dump(config).encode())
            return run
        except FileExistsError:
            continue
        except OSError as error:
            raise ConfigError(f"output.runs: cannot make {folder}: {error.strerror}.") from None
    raise ConfigError(f"output.name: too many runs are called {config.output.name}; choose another name.")


def with_absolute_paths(config: Config) -> Config:
    """So that resume works from any folder; a relative base or VAE stays a name unless it exists."""

    def resolved(section: Section) -> Section:
        return section.model_copy(update={key: value.resolve() for key, value in section if isinstance(value, Path)})

    named = {key: value for key in ("base", "vae") if (value := getattr(config.model, key)) is not None}
    here = {key: str(Path(value).resolve()) for key, value in named.items() if value != "mini" and Path(value).exists()}
    model = config.model.model_copy(update=here)
    data = resolved(config.data).model_copy(update={"sets": tuple(resolved(of) for of in config.data.sets)})
    return config.model_copy(update={"data": data, "lora": resolved(config.lora), "model": model})


def open_run(folder: Path) -> Run:
    if not (folder / "config.toml").is_file():
        raise TrainingError(f"{folder} is not a run folder: it has no config.toml; runs are made by `sdlora train`.")
    return Run(folder.resolve())
