"""The `sdlora` command: which command is meant, and its errors as one line. Nothing here imports torch before it must."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from sdlora import __version__
from sdlora.commands import cache, checkpoints, data, effects, loras, options, page, pictures, sweeps, training
from sdlora.commands.terminal import printable
from sdlora.errors import ConfigError, SdloraError

NOUNS = (training, sweeps, page, pictures, data, loras, effects, checkpoints, cache, options)  # as `--help` lists them
TAKE_OPTIONS = (["train"], ["sweep"], ["plan"], ["data", "check"])  # commands that options of a training run may follow


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0; 2 with one line on stderr for what the user can mend. Anything else is a bug and shows its traceback."""
    parser = argparse.ArgumentParser(prog="sdlora", description="Train Stable Diffusion LoRAs that do not break the model.")
    parser.add_argument("--version", action="version", version=f"sdlora {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for noun in NOUNS:
        noun.add(commands)

    words = list(sys.argv[1:] if arguments is None else arguments)
    # Options of a training run belong to config.py: argparse sees what stands before them.
    is_option = [word.startswith("--") and word not in ("--help", "--version") for word in words]
    takes_options = any(words[: len(command)] == command for command in TAKE_OPTIONS)
    split = is_option.index(True) if takes_options and True in is_option else len(words)
    parsed, rest = parser.parse_known_args(words[:split])
    rest += words[split:]
    try:
        if rest and not takes_options:
            raise ConfigError(f"{rest[0]} is not an option of this command; see `sdlora --help`.")
        parsed.flags = pairs(rest)
        return int(parsed.call(parsed))
    except SdloraError as error:
        print(printable(f"sdlora: {error}"), file=sys.stderr)
        return 2
    except BrokenPipeError:  # `sdlora options | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def pairs(words: Sequence[str]) -> list[tuple[str, str]]:
    """`--a.b 1 --c=2` -> [("a.b", "1"), ("c", "2")]."""
    found, queue = [], list(words)
    while queue:
        word = queue.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"{word!r} stands where an option was expected; write --section.key {word}.")
        name, equals, value = word[2:].partition("=")
        if not equals:
            if not queue:
                raise ConfigError(f"--{name} needs a value.")
            value = queue.pop(0)
        found.append((name, value))
    return found


if __name__ == "__main__":
    sys.exit(main())
