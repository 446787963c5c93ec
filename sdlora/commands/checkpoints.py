"""`sdlora merge` and `extract`: LoRAs into a checkpoint or into one file, and out of the difference of two checkpoints."""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdlora.commands import Commands, strengths
from sdlora.commands.layers import add_limit, add_target, limit_of, limit_said, target_of, tell, tell_total
from sdlora.commands.terminal import say, share
from sdlora.errors import ConfigError

if TYPE_CHECKING:
    from sdlora.lora.formats import LoraFile


def add(commands: Commands) -> None:
    command = commands.add_parser(
        "merge",
        help="fold LoRAs into a checkpoint, or join several in one file",
        description="With --base, fold LoRAs into a checkpoint. Without, join them in one file: exactly, their ranks adding up, or cut to "
        "--rank, --kept-energy or --max-error.",
    )
    command.add_argument("--lora", action="append", required=True, metavar=strengths.METAVAR, help=strengths.HELP)
    command.add_argument("--base", type=Path, metavar="CHECKPOINT", help=".safetensors file, or folder in diffusers' layout")
    add_limit(command)
    command.add_argument("--dare", type=share, metavar="SHARE", help="drop this share of each LoRA's numbers at random, rescale the rest")
    command.add_argument("--ties", type=kept_share, metavar="SHARE", help="keep this share of each LoRA's numbers, and elect signs")
    command.add_argument("--seed", type=int, default=0, help="of --dare (default: 0)")
    add_target(command)
    command.set_defaults(call=merge_command)

    command = commands.add_parser("extract", help="make a LoRA of the difference of two checkpoints")
    command.add_argument("--base", type=Path, required=True, metavar="CHECKPOINT", help=".safetensors file, or folder in diffusers' layout")
    command.add_argument("--tuned", type=Path, required=True, metavar="CHECKPOINT", help="what was made of it")
    add_limit(command)
    command.add_argument(
        "--layers", nargs="+", default=["attention+ff"], metavar="LAYERS", help="groups, sets, blocks or globs (default: attention+ff)"
    )
    command.add_argument(
        "--min-change", type=float, metavar="SHARE", help="leave out layers that changed by less (default: by what rounding alone can do)"
    )
    add_target(command)
    command.set_defaults(call=extract_command)


def kept_share(text: str) -> float:
    return 1.0 if text in ("1", "1.0") else share(text)


def merge_command(parsed: argparse.Namespace) -> int:
    wanted = [strengths.parse(text) for text in parsed.lora]
    for_one = [name for name in ("rank", "kept_energy", "max_error", "dare", "ties") if getattr(parsed, name) is not None]
    if parsed.base is None:
        return join(parsed, wanted)
    if for_one:
        raise ConfigError(f"--{for_one[0].replace('_', '-')} is for LoRAs that become one file: leave it out, or leave out --base.")
    return fold(parsed, wanted)


def fold(parsed: argparse.Namespace, wanted: list[strengths.Wanted]) -> int:
    """LoRAs into a checkpoint."""
    from sdlora.lora import lorafile
    from sdlora.lora.checkpoints import open_checkpoint
    from sdlora.lora.merge import Source, changed_parameters, merge

    paths, suffix = [of.path for of in wanted], "" if parsed.base.is_dir() else ".safetensors"
    with target_of(parsed, suffix) as target, lorafile.opened(paths, folded=False) as files:
        checkpoint = open_checkpoint(parsed.base)
        say(f"Checkpoint: {checkpoint.path}, {checkpoint.family}")
        own = strengths_of(wanted, files)
        sources = [Source(str(file.path), lorafile.Changes(file), of) for file, of in zip(files, own, strict=True)]
        notes = [note(of, file.metadata) for of, file in zip(wanted, files, strict=True)]
        parameters = changed_parameters(checkpoint, sources)
        total = sum(len(header.entries) for header in checkpoint.headers.values())
        say(f"Changed: {len({checkpoint.places[name][:2] for name in parameters})} of {total} tensors")
        if target is not None:
            for part, size in merge(checkpoint, sources, target, notes).items():
                say(f"{part.replace('_', ' ')}: its changed weights moved by {size.share():.3%} of their norm")
    return 0


def join(parsed: argparse.Namespace, wanted: list[strengths.Wanted]) -> int:
    """LoRAs into one."""
    from sdlora.lora import lorafile
    from sdlora.lora.combine import Thinning, combine
    from sdlora.lora.metadata import of_file
    from sdlora.lora.resize import Cut

    thins = parsed.dare is not None or parsed.ties is not None
    if thins and limit_of(parsed) is None:
        raise ConfigError("--dare and --ties leave a change of full rank: say what to keep of it, with --rank 64 or --max-error 0.1.")
    with target_of(parsed) as target, lorafile.opened([of.path for of in wanted], folded=True) as files:
        own = strengths_of(wanted, files)
        thinning = Thinning(parsed.dare or 0.0, parsed.ties, parsed.seed) if thins else None
        alpha = float(parsed.rank or max(1, sum(map(lorafile.largest_rank, files))))
        made = {
            "loras": [note(of, file.metadata) for of, file in zip(wanted, files, strict=True)],
            **limit_said(parsed),
            **({"dare": parsed.dare, "ties": parsed.ties, "seed": parsed.seed} if thins else {}),
        }
        cuts: list[Cut] = []

        def metadata(rank: int) -> dict[str, Any]:
            return lorafile.shared_metadata(files) | of_file(parsed.out.stem, rank, alpha) | {"sdlora_joined": made}

        layers = combine(files, own, thinning, limit_of(parsed))
        family = next((file.family for file in files if file.family), "sd1")
        tell_total(cuts, lorafile.write(target, tell(layers, cuts), family, alpha, metadata))
    return 0


def strengths_of(wanted: list[strengths.Wanted], files: list[LoraFile]) -> list[dict[str, float]]:
    """Of each file's layers; told as well."""
    found = []
    for of, file in zip(wanted, files, strict=True):
        own = of.strengths(file.layers)
        counts = ", ".join(f"{number} layers at {strength:g}" for strength, number in Counter(own.values()).items())
        say(f"LoRA: {file.path}, {counts}")
        found.append(own)
    return found


def extract_command(parsed: argparse.Namespace) -> int:
    from sdlora.lora import lorafile
    from sdlora.lora.checkpoints import open_checkpoint
    from sdlora.lora.extract import Remainder, extract
    from sdlora.lora.metadata import of_base, of_file
    from sdlora.lora.resize import Cut

    limit = limit_of(parsed)
    if limit is None:
        raise ConfigError("Say how much of the difference to keep: --rank 64, --kept-energy 0.9 or --max-error 0.3.")
    with target_of(parsed) as target:
        base, tuned = open_checkpoint(parsed.base), open_checkpoint(parsed.tuned)
        say(f"{base.family}: {tuned.path} - {base.path}")
        remainder, cuts = Remainder(), list[Cut]()
        alpha = float(parsed.rank or 1)
        made = {"base": base.path.name, "tuned": tuned.path.name, "layers": parsed.layers, **limit_said(parsed)}

        def metadata(rank: int) -> dict[str, Any]:
            about = of_base(base.family, tuned.prediction_type()) | of_file(parsed.out.stem, rank, alpha)
            return about | {"ss_sd_model_name": base.path.name, "sdlora_extracted": made}

        layers = extract(base, tuned, parsed.layers, limit, parsed.min_change, remainder)
        tell_total(cuts, lorafile.write(target, tell(layers, cuts), base.family, alpha, metadata))
        squares = math.fsum(cut.norm**2 for cut in cuts)
        if remainder.squares:
            say(
                f"Not in these layers: {len(remainder.same)} that hardly differ and {len(remainder.others)} other parameters, with "
                f"{math.sqrt(remainder.squares / (squares + remainder.squares)):.3%} of the whole difference"
            )
    return 0


def note(of: strengths.Wanted, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What the made file says of a LoRA in it."""
    found = {"lora": of.path.name, "strength": of.strength, "strengths": of.own, "hash": metadata.get("sshs_model_hash")}
    return {key: value for key, value in found.items() if value not in (None, {})}
