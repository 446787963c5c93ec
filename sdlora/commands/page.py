"""`sdlora ui`: the page for the browser."""

from __future__ import annotations

import argparse
from pathlib import Path

from sdlora.commands import Commands

PORT = 7860


def add(commands: Commands) -> None:
    command = commands.add_parser("ui", help="open the page in the browser", description="Train, follow and try LoRAs in the browser.")
    command.add_argument("--host", default="127.0.0.1", help="address to listen on; others than this machine's own need --auth")
    command.add_argument("--port", type=int, default=PORT, help=f"0 for one that is free (default: {PORT})")
    command.add_argument("--runs", type=Path, default=Path("runs"), metavar="FOLDER", help="where run folders are (default: runs)")
    command.add_argument(
        "--roots", type=Path, nargs="+", metavar="FOLDER", help="what the page may use, beside runs (default: the working directory)"
    )
    command.add_argument("--auth", metavar="NAME:PASSWORD", help="ask for these")
    command.add_argument("--no-browser", dest="browser", action="store_false", help="print the address, open nothing")
    command.set_defaults(call=ui_command)


def ui_command(parsed: argparse.Namespace) -> int:
    from sdlora_ui import server
    from sdlora_ui.paths import Places

    roots = [Path.cwd()] if parsed.roots is None else parsed.roots
    server.serve(Places.at(parsed.runs, roots), host=parsed.host, port=parsed.port, auth=parsed.auth, browser=parsed.browser)
    return 0
