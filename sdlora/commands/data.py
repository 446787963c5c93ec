"""`sdlora data check`: pictures and captions, as training would see them."""

from __future__ import annotations

import argparse
from pathlib import Path

from sdlora import config
from sdlora.commands import OPTION_HELP, Commands
from sdlora.commands.terminal import quiet_libraries, say, shown
from sdlora.errors import DataError


def add(commands: Commands) -> None:
    command = commands.add_parser("data", help="look at pictures and captions before training")
    parts = command.add_subparsers(required=True, metavar="COMMAND")
    command = parts.add_parser(
        "check",
        help="show what training would see of a folder; exit code 1 if it would refuse",
        description="--sheet FILE.png also draws every picture in its bucket; --places FILE.json says how each is cut, as the plan.json of "
        "a run does. " + OPTION_HELP,
        allow_abbrev=False,
    )
    command.add_argument("source", type=Path, help="folder of pictures, or TOML file")
    command.set_defaults(call=data_check_command)


def data_check_command(parsed: argparse.Namespace) -> int:
    """Where training would refuse, its reason comes behind all else that can be said of the folder."""
    sheets, plans = ([Path(value) for name, value in parsed.flags if name == wanted] for wanted in ("sheet", "places"))
    flags = [(name, value) for name, value in parsed.flags if name not in ("sheet", "places")]
    if parsed.source.suffix == ".toml":
        chosen = config.load([parsed.source], flags)
    else:
        chosen = config.load([], [("data.folder", str(parsed.source)), *flags])
    quiet_libraries()
    from sdlora.data import check
    from sdlora.data.images import colour
    from sdlora.items import find_items, write_pictures
    from sdlora.models.tokenizer import tokenizer_of

    refusals: list[str] = []
    try:
        items, skipped = find_items(chosen, refusals.append)
    except DataError as error:
        for line in ["Training would refuse:", *(f"  {sentence}" for sentence in (*refusals, error))]:
            say(line)
        return 1
    places = [(item.example, item.placed) for item in items]
    seen = check.looks(list({example.path: None for example, _ in places}))
    tokenizer = tokenizer_of(chosen.model.base)
    report = check.check(
        places, skipped, tokens=lambda text: len(tokenizer.tokenize(text)), max_tokens=chosen.data.max_tokens, seen=seen, refusals=refusals
    )
    for line in check.lines(report):
        say(line)
    for path in plans:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_pictures(path, items)
    for path in sheets:
        from sdlora.data.sheet import draw_sheet

        path.parent.mkdir(parents=True, exist_ok=True)
        draw_sheet(places, colour(chosen.data.background)).save(path)
        say(f"Sheet: {shown(path)}")
    return 1 if refusals else 0
