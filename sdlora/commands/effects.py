"""What a LoRA does to a base model: `sdlora inspect FILE --base MODEL`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from sdlora import config
from sdlora import run as runs
from sdlora.commands.terminal import drawn, positive, say, share
from sdlora.errors import ConfigError

if TYPE_CHECKING:
    from sdlora.analysis.intruders import Layer
    from sdlora.analysis.spectrum import Spectra

SPECTRA = "spectra"  # folder in the cache
SHOWN_DIRECTIONS = 64  # of each side in a picture of one layer


def add_to_inspect(command: argparse.ArgumentParser) -> None:
    add_base(command, required=False)
    command.add_argument("--layer", metavar="NAME", help="with --plot: draw this layer's singular vectors against the base's")
    command.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw it, a row for each block")


def add_base(command: argparse.ArgumentParser, required: bool) -> None:
    """The options of whatever looks at intruder dimensions."""
    command.add_argument(
        "--base", required=required, metavar="MODEL", help="find what it does to this: a .safetensors checkpoint, a folder, or 'mini'"
    )
    command.add_argument("--top", type=positive, default=10, metavar="K", help="largest singular vectors that are looked at (default: 10)")
    command.add_argument(
        "--threshold", type=share, default=0.5, metavar="COSINE", help="an intruder is less like any of the base's (default: 0.5)"
    )
    cache = config.OutputOptions().runs / runs.CACHE
    command.add_argument(
        "--cache", type=Path, default=cache, metavar="FOLDER", help=f"where what is computed of the base is kept (default: {cache})"
    )


def check(parsed: argparse.Namespace) -> None:
    """Before anything is read: what needs a base, or something else that is not there."""
    asked = [name for name in ("plot", "layer") if getattr(parsed, name) is not None]
    if asked and parsed.base is None:
        raise ConfigError(f"--{asked[0]} shows what a LoRA does to a base model: name one with --base.")
    if parsed.layer is not None and parsed.plot is None:
        raise ConfigError("--layer is the one to draw: say where, with --plot FILE.png.")


def spectra_of(parsed: argparse.Namespace) -> Spectra:
    from sdlora.analysis.spectrum import Spectra
    from sdlora.data.cache import TensorCache

    return Spectra(TensorCache(parsed.cache / SPECTRA, Path(parsed.base).name))


def tell(parsed: argparse.Namespace) -> None:
    """Intruder dimensions by block, and the layers that have most."""
    from sdlora.analysis import blocks, intruders
    from sdlora.lora import lorafile
    from sdlora.lora.checkpoints import open_checkpoint
    from sdlora.lora.targets import block_of
    from sdlora.models.local import local_path

    counts: dict[str, int] = {}
    layer: Layer | None = None
    top = max(parsed.top, SHOWN_DIRECTIONS) if parsed.layer is not None else parsed.top
    with lorafile.opened([parsed.file], folded=False) as (file,):
        if parsed.layer is not None and parsed.layer not in file.layers:
            raise ConfigError(f"--layer: the file has no {parsed.layer}; its names look like {next(iter(file.layers))} (see --layers).")
        for found in intruders.layers(file, open_checkpoint(local_path(parsed.base)), spectra_of(parsed), top):
            counts[found.name] = int(found.intruders(parsed.threshold)[: parsed.top].sum())
            layer = found if found.name == parsed.layer else layer
    if not counts:
        say("It changes no matrices, so that it has no intruder dimensions.")
        return
    of = f"the {parsed.top} largest singular vectors of a layer that are less than {parsed.threshold:g} like any of the base's"
    say(f"Intruder dimensions ({of}): {sum(counts.values())} in {len(counts)} layers, {sum(counts.values()) / len(counts):.2f} a layer")
    by_block: dict[str, list[int]] = {}
    for name, count in counts.items():
        by_block.setdefault(block_of(name), []).append(count)
    for block in blocks.in_order(list(by_block)):
        total, number = sum(by_block[block]), len(by_block[block])
        say(f"  {block:8} {total:5} in {number:3} layers  {'#' * round(4 * total / number)}".rstrip())
    for name, count in counts.items() if parsed.layers else sorted(counts.items(), key=lambda item: -item[1])[:10]:
        if count or parsed.layers:
            say(f"{count:7}  {name}")
    if parsed.plot is not None:
        with drawn(parsed.plot):
            if layer is not None:
                intruders.plot_similarities(layer, parsed.plot, SHOWN_DIRECTIONS, parsed.threshold)
            else:
                title = f"{parsed.file.name}: intruder dimensions"
                blocks.plot(counts, parsed.plot, title, f"intruders among the {parsed.top} largest singular vectors of each layer")
