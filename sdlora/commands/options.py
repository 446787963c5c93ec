"""`sdlora options`: every training option with its meaning and default."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from pathlib import Path

from sdlora import config
from sdlora.commands import Commands
from sdlora.commands.terminal import say


def add(commands: Commands) -> None:
    command = commands.add_parser("options", help="list every training option with its meaning and default")
    command.set_defaults(call=options_command)


def options_command(parsed: argparse.Namespace) -> int:
    import tomlkit

    width = min(shutil.get_terminal_size((140, 24)).columns, 140)
    section = ""
    for option in config.options():
        head, key = option.name.split(".")
        if head != section:
            if section:
                say()
            say(f"[{head}]")
            section = head
        default = option.default
        value = str(default) if isinstance(default, Path) else list(default) if isinstance(default, tuple) else default
        written = "unset" if value is None else "{}" if value == {} else tomlkit.item(value).as_string()
        say(f"  {key} = {written}   ({option.type})")
        for line in textwrap.wrap(str(option.field.description), width, initial_indent=" " * 6, subsequent_indent=" " * 6):
            say(line)
    return 0
