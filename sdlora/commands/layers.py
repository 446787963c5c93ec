"""What the tools that make a LoRA file have in common: how much they keep, what they say of each layer, and where they write."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sdlora.commands.terminal import positive, say, share, shown, size
from sdlora.errors import ConfigError

if TYPE_CHECKING:
    from sdlora.lora.change import Change
    from sdlora.lora.resize import Cut, Limit


def add_limit(command: argparse.ArgumentParser) -> None:
    command.add_argument("--rank", type=positive, metavar="N", help="at most this rank for each layer")
    kept = command.add_mutually_exclusive_group()
    kept.add_argument("--kept-energy", type=share, metavar="SHARE", help="as few ranks as keep this share of a layer's squared norm: 0.99")
    kept.add_argument("--max-error", type=share, metavar="SHARE", help="as few ranks as leave out no more than this of its norm: 0.05")


def add_out(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", type=Path, required=True, metavar="FILE", help="what to write; must not exist yet")


def add_target(command: argparse.ArgumentParser) -> None:
    add_out(command)
    command.add_argument("--dry-run", action="store_true", help="compute and report, and write nothing")


def limit_of(parsed: argparse.Namespace) -> Limit | None:
    """None where no limit was asked for."""
    from sdlora.lora.resize import Limit

    if parsed.rank is None and parsed.kept_energy is None and parsed.max_error is None:
        return None
    # what is left out is orthogonal to what is kept: squares of their norms add up
    kept = 1 - parsed.max_error**2 if parsed.max_error is not None else parsed.kept_energy or 1.0
    return Limit(parsed.rank, kept)


def limit_said(parsed: argparse.Namespace) -> dict[str, float]:
    """As metadata of the file."""
    asked = {"rank": parsed.rank, "kept_energy": parsed.kept_energy, "max_error": parsed.max_error}
    return {key: value for key, value in asked.items() if value is not None}


@contextmanager
def target_of(parsed: argparse.Namespace, suffix: str = ".safetensors") -> Iterator[Path | None]:
    """What to write, None in a dry run; refused at once where it cannot be written or exists. `suffix` of a folder is empty."""
    out: Path = parsed.out
    if out.exists():
        raise ConfigError(f"--out: {out} exists; name another, or delete it first.")
    if out.suffix != suffix and suffix:
        raise ConfigError(f"--out: {out} must end in {suffix}.")
    if not out.parent.is_dir():
        raise ConfigError(f"--out: there is no folder {out.parent}.")
    try:
        yield None if parsed.dry_run else out
    except BrokenPipeError:  # of the terminal's, not of the file
        raise
    except OSError as error:
        raise ConfigError(f"--out: cannot write {out}: {error.strerror or error}.") from None
    written = sum(path.stat().st_size for path in ([out] if out.is_file() else out.rglob("*")))
    say(f"Nothing written: {shown(out)} was a dry run" if parsed.dry_run else f"Written: {shown(out)}, {size(written)}")


def tell(layers: Iterable[tuple[str, Change, Cut | None]], cuts: list[Cut]) -> Iterator[tuple[str, Change]]:
    """Print what was cut of each layer as it passes by."""
    for name, change, cut in layers:
        if cut is not None:
            if not cuts:
                say("  rank    of    error   layer")
            say(f"{cut.rank:6}{cut.before:6}{cut.error:9.3%}   {name}")
            cuts.append(cut)
        yield name, change


def tell_total(cuts: list[Cut], kinds: Collection[str]) -> None:
    """`kinds` of change in the file: some are not read by every program."""
    from sdlora.lora.formats import READERS
    from sdlora.lora.resize import total_error

    if cuts:
        ranks = [cut.rank for cut in cuts]
        say(f"{len(cuts)} layers of rank {min(ranks)} to {max(ranks)}, {sum(ranks) / len(ranks):.1f} on average")
        say(f"Left out: {total_error(cuts):.3%} of the change (Frobenius norm)")
    for kind in sorted(READERS.keys() & set(kinds)):
        say(f"Note: {READERS[kind]}.")
