"""What the page may touch: every path that it is told goes through `Places.resolve`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

from sdlora import grid
from sdlora.config import Config
from sdlora.errors import ConfigError
from sdlora.run import Run, folders, open_run

HERE = Path(__file__).resolve().parent
BUILT_IN = "mini"


def shipped(installed: str, in_checkout: str) -> Path:
    """A folder that comes with the page: inside the package once it is installed, beside it in a checkout."""
    inside = HERE / installed
    return inside if inside.is_dir() else HERE.parent / in_checkout


PRESETS = shipped("configs", "configs")
FISH = shipped("fish", "datasets/fish")


@dataclass(frozen=True)
class Places:
    """Folders below which the page reads and writes, all without links in them."""

    runs: Path
    roots: tuple[Path, ...]

    @classmethod
    def at(cls, runs: Path, roots: Iterable[Path]) -> Places:
        """Raises ConfigError for a root that is no folder; the folder of runs may be yet to be made."""
        roots = tuple(roots)
        for root in roots:
            if not root.is_dir():
                raise ConfigError(f"--roots: there is no folder {root}.")
        runs = runs.resolve()
        return cls(runs, tuple(dict.fromkeys([*(root.resolve() for root in roots), runs, FISH])))

    def resolve(self, text: str, field: str) -> Path:
        """The absolute path, without links in it, that text in `field` means, whether or not it exists. Raises ConfigError where it is
        none, leads out of the roots, or is hidden below them.

        Text is judged before the file system is asked: on Windows the mere look at a share sends the user's credentials to its host.
        """
        text = text.strip()
        if not text:
            raise ConfigError(f"{field} is empty: name a path.")
        if not text.isprintable():
            raise ConfigError(f"{field} has characters in it that cannot be seen: write the path anew.")
        # Judged as Windows would: it takes both slashes, drives, and streams behind a colon.
        as_windows = PureWindowsPath(text)
        if ".." in as_windows.parts:
            raise ConfigError(f"{field}: write {text} without '..'.")
        if text.startswith("~") or as_windows.drive.startswith("\\\\") or (os.name == "posix" and "\\" in text):
            raise ConfigError(f"{field}: {text} is no path of this machine; write it from / or from where the page was started.")
        if ":" in text[len(as_windows.drive) :] or (os.name == "posix" and as_windows.drive):
            raise ConfigError(f"{field}: {text} has a colon in it.")
        path = Path(os.path.realpath(text))
        below = [path.relative_to(root).parts for root in self.roots if path.is_relative_to(root)]
        if not below:
            raise ConfigError(f"{field}: {text} lies outside of what this page may use; start it again with --roots {path.parent}.")
        if all(any(part.startswith(".") for part in parts) for parts in below):
            raise ConfigError(f"{field}: {text} is hidden, and what is hidden is left alone.")
        return path

    def folder(self, text: str, field: str) -> Path:
        """As `resolve`, of a folder that exists."""
        path = self.resolve(text, field)
        if not path.is_dir():
            raise ConfigError(f"{field}: there is no folder {text}.")
        return path

    def run(self, name: str) -> Run:
        """The run of this name; `SWEEP/ROW` of one that belongs to a sweep. Raises ConfigError for what is no name of a folder in the
        folder of runs."""
        sweep, slash, row = name.rpartition("/")
        if not is_name(row) or (slash and not (is_name(sweep) and sweep.endswith(grid.SUFFIX))):
            raise ConfigError(f"{name!r} is not the name of a run.")
        return open_run(self.resolve(str(self.runs / name), "run"))

    def every_run(self) -> dict[str, Run]:
        """All runs by the names that `run` takes."""
        found = [path for folder in (self.runs, *grid.folders(self.runs)) for path in folders(folder)]
        return {path.relative_to(self.runs).as_posix(): Run(path) for path in found}

    def sweep(self, name: str) -> Path:
        """Folder of the sweep of this name. Raises ConfigError where there is none."""
        if not is_name(name) or self.runs / name not in grid.folders(self.runs):
            raise ConfigError(f"{name!r} is not the name of a sweep.")
        return self.resolve(str(self.runs / name), "sweep")

    def check(self, config: Config) -> None:
        """Every path in a config. Raises ConfigError."""
        if config.model.base != BUILT_IN:
            self.resolve(config.model.base, "model.base")
        if config.model.vae is not None:
            self.resolve(config.model.vae, "model.vae")
        for name, section in config:
            for key, value in section:
                if isinstance(value, Path):
                    self.resolve(str(value), f"{name}.{key}")
        for of in config.data.sets:
            self.resolve(str(of.folder), "data.sets: folder")


def is_name(text: str) -> bool:
    """Whether a folder of runs may hold a folder of this name that is not the page's own."""
    return bool(text) and not text.startswith((".", "_")) and text.isprintable() and not any(sign in text for sign in "/\\:")


def shown(path: Path) -> str:
    """Relative to where the page was started, where that is shorter."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
