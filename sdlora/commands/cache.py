"""`sdlora cache`: what was computed of pictures and captions, shown and cleared."""

from __future__ import annotations

import argparse
from pathlib import Path

from sdlora import config
from sdlora import run as runs
from sdlora.commands import Commands
from sdlora.commands.terminal import say, size
from sdlora.errors import ConfigError


def add(commands: Commands) -> None:
    command = commands.add_parser("cache", help="show or clear what was computed of pictures and captions")
    actions = command.add_subparsers(required=True, metavar="ACTION")
    info = actions.add_parser("info", help="show where it is, what it holds and how large it is")
    info.set_defaults(call=cache_info_command)
    prune = actions.add_parser("prune", help="delete what was not used for a while; training computes anew what it misses")
    prune.add_argument("--older-than", type=float, default=30.0, metavar="DAYS", help="days without use (default: 30); 0 for all")
    prune.set_defaults(call=cache_prune_command)
    default = config.default("output.runs") / runs.CACHE
    for action in (info, prune):
        action.add_argument("folder", nargs="?", type=Path, default=default, help=f"folder of the cache (default: {default})")


def cache_info_command(parsed: argparse.Namespace) -> int:
    from datetime import date

    from sdlora.data import cache

    check_cache_folder(parsed.folder)
    found = cache.survey(parsed.folder)
    say(f"{parsed.folder.resolve()}: {size(sum(held.bytes for held in found))}")
    for held in found:
        used = f", last used {date.fromtimestamp(held.used)}" if held.used else ""
        say(f"  {held.folder.name}: {held.entries:,} entries, {size(held.bytes)}, of {', '.join(held.models) or 'nothing'}{used}")
        for path in held.damaged:
            say(f"    damaged: {path.name}")
    return 0


def cache_prune_command(parsed: argparse.Namespace) -> int:
    from sdlora.data import cache

    check_cache_folder(parsed.folder)
    files, freed = cache.prune(parsed.folder, parsed.older_than)
    say(f"{parsed.folder.resolve()}: {files} {'file' if files == 1 else 'files'} deleted, {size(freed)} freed")
    return 0


def check_cache_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ConfigError(f"There is no cache in {folder}: name its folder, `{runs.CACHE}` beside your runs or what data.cache says.")
