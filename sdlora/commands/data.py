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
        description="--sheet FILE.png also draws every picture in its bucket. " + OPTION_HELP,
        allow_abbrev=False,
    )
    command.add_argument("source", type=Path, help="folder of pictures, or TOML file")
    command.set_defaults(call=data_check_command)


def data_check_command(parsed: argparse.Namespace) -> int:
    """Where training would refuse, its reason comes behind all else that can be said of the folder."""
    sheets = [Path(value) for name, value in parsed.flags if name == "sheet"]
    flags = [(name, value) for name, value in parsed.flags if name != "sheet"]
    if parsed.source.suffix == ".toml":
        chosen = config.load([parsed.source], flags)
    else:
        chosen = config.load([], [("data.folder", str(parsed.source)), *flags])
    quiet_libraries()
    from sdlora.data import check
    from sdlora.data.images import colour
    from sdlora.items import find_items
    from sdlora.models.tokenizer import tokenizer_of

    refusal = None
    try:
        items, skipped = find_items(chosen)
    except DataError as error:
        refusal = str(error)
        sets = tuple(of.model_copy(update={"missing_caption": "empty"}) for of in chosen.data.sets)
        lenient = {"on_bad_image": "skip", "missing_caption": "empty", "upscale": True, "sets": sets}
        try:
            items, skipped = find_items(chosen.model_copy(update={"data": chosen.data.model_copy(update=lenient)}))
        except DataError:
            say(f"Training would refuse: {refusal}")
            return 1
    places = [(item.example, item.placed) for item in items]
    seen = check.looks(list({example.path: None for example, _ in places}))
    tokenizer = tokenizer_of(chosen.model.base)
    report = check.check(
        places, skipped, tokens=lambda text: len(tokenizer.tokenize(text)), max_tokens=chosen.data.max_tokens, seen=seen, refusal=refusal
    )
    for line in check.lines(report):
        say(line)
    for path in sheets:
        from sdlora.data.sheet import draw_sheet

        path.parent.mkdir(parents=True, exist_ok=True)
        draw_sheet(places, colour(chosen.data.background)).save(path)
        say(f"Sheet: {shown(path)}")
    return 1 if refusal else 0
