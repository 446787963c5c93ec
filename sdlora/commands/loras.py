"""`sdlora alphas` and `resize`: what a LoRA file holds, and less of it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sdlora.commands import Commands
from sdlora.commands.layers import add_limit, add_target, limit_of, limit_said, target_of, tell, tell_total
from sdlora.commands.terminal import say, shown
from sdlora.errors import ConfigError, WeightsError


def add(commands: Commands) -> None:
    command = commands.add_parser("alphas", help="show which layers a LoRA chose to change, by their learned alphas")
    command.add_argument("file", type=Path, help="LoRA file")
    command.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw them, a row for each block")
    command.set_defaults(call=alphas_command)

    command = commands.add_parser("resize", help="cut a LoRA to a lower rank, of each layer or of what it needs")
    command.add_argument("file", type=Path, help="LoRA file")
    add_limit(command)
    add_target(command)
    command.set_defaults(call=resize_command)


def alphas_command(parsed: argparse.Namespace) -> int:
    """A histogram over layers, then the layers that moved furthest from the median; a picture where one is asked for."""
    from statistics import median

    from sdlora.analysis import alphas as analysis
    from sdlora.lora import formats

    alphas = formats.read_alphas(parsed.file)
    if not alphas:
        raise WeightsError(f"{parsed.file} has no alphas: it holds no low-rank layers.")
    middle, low, high = median(alphas.values()), min(alphas.values()), max(alphas.values())
    say(f"{len(alphas)} layers: alpha {low:.4g} to {high:.4g}, median {middle:.4g}")
    if parsed.plot:
        try:
            analysis.plot(alphas, parsed.plot, f"{parsed.file.name}: what each layer learned")
        except (OSError, ValueError) as error:
            raise ConfigError(f"--plot: cannot draw {parsed.plot}: {error}.") from None
        say(f"Picture: {shown(parsed.plot)}")
    if low == high:
        say("All alike: this file's alphas were not learned.")
        return 0
    rows = analysis.histogram(alphas)
    most = max(count for *_, count in rows)
    for left, right, count in rows:
        say(f"{left:9.4g} .. {right:9.4g}  {'#' * round(40 * count / most):40}  {count}")
    ordered = sorted(alphas.items(), key=lambda item: item[1])
    for title, shown_rows in (("Changed most", ordered[::-1][:10]), ("Changed least", ordered[:10])):
        say()
        say(f"{title}:")
        for name, alpha in shown_rows:
            say(f"{alpha:9.4g}  {name}")
    return 0


def resize_command(parsed: argparse.Namespace) -> int:
    limit = limit_of(parsed)
    if limit is None:
        raise ConfigError("Say how much to keep of the file: --rank 16, --kept-energy 0.99 or --max-error 0.05.")
    with target_of(parsed) as target:
        from sdlora.lora import lorafile
        from sdlora.lora.metadata import file_metadata
        from sdlora.lora.resize import Cut, resize

        file = lorafile.read(parsed.file, folded=True)
        alpha = float(min(parsed.rank or file.rank(), file.rank()) or 1)
        cuts: list[Cut] = []

        def metadata(rank: int) -> dict[str, Any]:
            about = lorafile.shared_metadata([file]) | file_metadata(parsed.out.stem, rank, alpha)
            return about | {"sdlora_resized": {"from": parsed.file.name, **limit_said(parsed)}}

        layers = ((name, *resize(name, change, limit)) for name, change in file.changes.items())
        lorafile.write(target, tell(layers, file.stems.__getitem__, cuts), alpha, metadata)
        tell_total(cuts)
    return 0
