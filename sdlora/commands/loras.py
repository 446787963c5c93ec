"""`sdlora inspect`, `alphas`, `convert` and `resize`: what a LoRA file holds, the same in other words, and less of it."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdlora.commands import Commands, effects
from sdlora.commands.layers import add_limit, add_target, limit_of, limit_said, target_of, tell, tell_total
from sdlora.commands.terminal import drawn, say, size
from sdlora.errors import ConfigError, WeightsError

if TYPE_CHECKING:
    from sdlora.lora.report import Report


def add(commands: Commands) -> None:
    command = commands.add_parser("inspect", help="show what a LoRA file holds, and who reads it")
    command.add_argument("file", type=Path, help="LoRA file")
    command.add_argument("--layers", action="store_true", help="also show each layer")
    command.add_argument("--metadata", action="store_true", help="also show all metadata")
    effects.add_to_inspect(command)
    command.add_argument("--json", action="store_true", help="all of it, for programs")
    command.set_defaults(call=inspect_command)

    command = commands.add_parser("alphas", help="show which layers a LoRA chose to change, by their learned alphas")
    command.add_argument("file", type=Path, help="LoRA file")
    command.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw them, a row for each block")
    command.set_defaults(call=alphas_command)

    command = commands.add_parser("convert", help="write a LoRA file anew, as WebUIs or diffusers name it")
    command.add_argument("file", type=Path, help="LoRA file, of any trainer")
    command.add_argument("--to", choices=("webui", "diffusers"), default="webui", help="whose names (default: webui)")
    command.add_argument("--precision", choices=("fp32", "fp16", "bf16"), help="of its numbers (default: the file's own)")
    command.add_argument("--family", choices=("sd1", "sd2", "sdxl"), help="where the file does not show it")
    add_target(command)
    command.set_defaults(call=convert_command)

    command = commands.add_parser("resize", help="cut a LoRA to a lower rank, of each layer or of what it needs")
    command.add_argument("file", type=Path, help="LoRA file")
    add_limit(command)
    add_target(command)
    command.set_defaults(call=resize_command)


def inspect_command(parsed: argparse.Namespace) -> int:
    effects.check(parsed)
    from sdlora.lora.report import inspect

    report = inspect(parsed.file)
    if parsed.json:
        say(json.dumps(for_programs(report), default=str))
        return 0
    say(f"{report.path}: {size(report.size)}, {report.precision}, {report.family or 'family not shown'}, {report.naming} names")
    for what, said in report.about.items():
        say(f"  {what}: {said}")
    if report.tags:
        say(f"  tags: {', '.join(f'{tag} ({count})' for tag, count in report.tags[:20])}")
    say(f"{len(report.layers)} layers: {', '.join(f'{number} {kind}' for kind, number in report.kinds.items())}")
    for title, counted in (("ranks", report.ranks), ("alphas", report.alphas)):
        if counted:
            say(f"  {title}: {', '.join(f'{value:g} ({number})' for value, number in sorted(counted.items())[:20])}")
    if parsed.layers:
        say("  rank    alpha       norm   layer")
        for layer in report.layers:
            rank, alpha = layer.rank or "-", "-" if layer.alpha is None else f"{layer.alpha:.4g}"
            say(f"{rank:>6} {alpha:>8} {layer.norm:10.4g}   {layer.name}")
    if parsed.metadata:
        for key, value in sorted(report.metadata.items()):
            say(f"  {key} = {value}")
    for line in report.readers:
        say(f"Note: {line}.")
    if report.unread:
        say(f"Not understood: {', '.join(report.unread[:5])}{' ...' if len(report.unread) > 5 else ''}")
    if parsed.base is not None:
        effects.tell(parsed)
    return 0


def for_programs(report: Report) -> dict[str, Any]:
    """All of a report, the alphas that its layers learned, and the names of their layers by block, as a model runs through them."""
    from sdlora.analysis.blocks import in_order
    from sdlora.lora.formats import learned_alphas
    from sdlora.lora.targets import block_of

    names = [layer.name for layer in report.layers]
    blocks = {block: [name for name in names if block_of(name) == block] for block in in_order([block_of(name) for name in names])}
    return asdict(report) | {"learned_alphas": learned_alphas(report.path, report.metadata, names), "blocks": blocks}


def convert_command(parsed: argparse.Namespace) -> int:
    from sdlora.lora import formats

    with target_of(parsed) as target:
        found = formats.convert(parsed.file, target, to=parsed.to, precision=parsed.precision, family=parsed.family)
        scale = f"alpha {found.alpha:g}" if parsed.to == "webui" else "the scale in the matrices"
        say(f"{found.layers} layers of {found.family} as {parsed.to} names them, {found.precision}, {scale}")
    return 0


def alphas_command(parsed: argparse.Namespace) -> int:
    """A histogram over layers, then the layers that moved furthest from the median; a picture where one is asked for."""
    from statistics import median

    from sdlora.analysis import alphas as analysis
    from sdlora.analysis.blocks import plot
    from sdlora.lora import formats

    alphas = formats.read_alphas(parsed.file)
    if not alphas:
        raise WeightsError(f"{parsed.file} has no alphas: it holds no low-rank layers.")
    middle, low, high = median(alphas.values()), min(alphas.values()), max(alphas.values())
    say(f"{len(alphas)} layers: alpha {low:.4g} to {high:.4g}, median {middle:.4g}")
    if parsed.plot:
        with drawn(parsed.plot):
            plot(alphas, parsed.plot, f"{parsed.file.name}: what each layer learned", "learned alpha")
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
    from sdlora.lora import lorafile
    from sdlora.lora.metadata import of_file
    from sdlora.lora.resize import Cut, resize

    with target_of(parsed) as target, lorafile.opened([parsed.file], folded=True) as (file,):
        before = lorafile.largest_rank(file)
        alpha = float(min(parsed.rank or before, before) or 1)
        cuts: list[Cut] = []

        def metadata(rank: int) -> dict[str, Any]:
            about = lorafile.shared_metadata([file]) | of_file(parsed.out.stem, rank, alpha)
            return about | {"sdlora_resized": {"from": parsed.file.name, **limit_said(parsed)}}

        layers = ((name, *resize(name, file.change(name), limit)) for name in file.layers)
        kinds = lorafile.write(target, tell(layers, cuts), file.family or "sd1", alpha, metadata)
        tell_total(cuts, kinds)
    return 0
