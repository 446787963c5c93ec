"""What all commands tell a user alike: lines, paths, sizes, how to call the program again."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sdlora.errors import ConfigError


def say(line: str = "") -> None:
    print(printable(line), flush=True)


def printable(line: str) -> str:
    """One line, whatever captions, names and other people's files have put into it: what would steer a terminal, or turn text round, is
    written as Python writes it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def program() -> str:
    """How this user can call us again: by name where a shell would find it."""
    if shutil.which("sdlora"):
        return "sdlora"
    called = Path(sys.argv[0])
    return f"{shown(Path(sys.executable))} -m sdlora" if called.suffix == ".py" else str(shown(called.absolute()))


def shown(path: Path) -> Path:
    """Relative to where the user stands, where that is shorter."""
    try:
        return path.relative_to(Path.cwd())
    except ValueError:
        return path


def size(of: int) -> str:
    """Bytes, for people."""
    return f"{of / 2**30:.2f} GiB" if of >= 2**30 else f"{of / 2**20:.1f} MiB"


@contextmanager
def drawn(path: Path) -> Iterator[None]:
    """Around what draws the picture of --plot there."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot: cannot draw {path}: {error}.") from None
    say(f"Picture: {shown(path)}")


def lines_of(option: str, path: Path) -> list[str]:
    """Of a file that `option` names: those with text that is no comment."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except OSError as error:
        raise ConfigError(f"{option}: cannot read {path}: {error.strerror}.") from None
    return [line for line in lines if line and not line.startswith("#")]


def quiet_libraries() -> None:
    """Progress bars and notices of libraries would tear our own bar; what matters comes as an error or an event."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def positive(text: str) -> int:
    """A type of arguments: whole numbers from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def share(text: str) -> float:
    """A type of arguments: numbers between 0 and 1, both excluded."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and 1")
    return value
