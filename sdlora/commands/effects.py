"""What a LoRA does to a base model, and less of it: `sdlora inspect FILE --base MODEL` and `sdlora repair`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdlora import config
from sdlora import run as runs
from sdlora.analysis import THRESHOLD, TOP
from sdlora.commands import Commands
from sdlora.commands.layers import add_limit, add_target, limit_of, limit_said, target_of, tell_total
from sdlora.commands.layers import tell as tell_cuts
from sdlora.commands.pictures import as_trained
from sdlora.commands.terminal import drawn, lines_of, positive, quiet_libraries, say, share
from sdlora.errors import ConfigError

if TYPE_CHECKING:
    from sdlora.analysis.drift import Said
    from sdlora.analysis.intruders import Layer
    from sdlora.analysis.spectrum import Spectra
    from sdlora.lora.change import Change
    from sdlora.lora.formats import LoraFile
    from sdlora.lora.resize import Cut, Limit

Repaired = tuple[str, "Change", "Cut | None"]
"""A layer's name, its change, and what was cut off it."""
MOST_CAPTIONS = 8  # of a file's training captions, the most frequent
SPECTRA = "spectra"  # folder in the cache
SHOWN_DIRECTIONS = 64  # of each side in a picture of one layer


def add(commands: Commands) -> None:
    command = commands.add_parser(
        "repair",
        help="scale down what a LoRA brings in that the base does not know",
        description="Write a plain LoRA whose intruder dimensions are scaled down, exactly at the rank plus their number, or cut to "
        "--rank, --kept-energy or --max-error; or one without the singular values that may be noise.",
    )
    command.add_argument("file", type=Path, help="LoRA file")
    command.add_argument(
        "--method",
        choices=("intruders", "threshold"),
        default="intruders",
        help="scale intruder dimensions, or take out what may be noise (Gavish & Donoho's hard threshold); default: intruders",
    )
    add_base(command)
    command.add_argument("--scale", type=float, default=0.5, metavar="FACTOR", help="of an intruder's singular value (default: 0.5)")
    add_limit(command)
    add_target(command)
    command.set_defaults(call=repair_command)


def add_to_inspect(command: argparse.ArgumentParser) -> None:
    add_base(command)
    command.add_argument("--drift", action="store_true", help="show instead how far it moves text embeddings")
    command.add_argument("--leakage", action="store_true", help="show instead how far it changes predictions for prompts it is not for")
    command.add_argument(
        "--trigger", action="append", metavar="PROMPT", help="what it was trained for (default: its trigger word, or its training captions)"
    )
    command.add_argument("--class-noun", metavar="PROMPT", help="what its subject is, without the trigger: measured on its own")
    command.add_argument("--prompts", type=Path, metavar="FILE", help="what it should leave alone, one a line (default: a dozen things)")
    command.add_argument("--device", default="auto", help="of --drift and --leakage: auto, cpu, cuda, mps")
    command.add_argument("--layer", metavar="NAME", help="with --plot: draw this layer's singular vectors against the base's")
    command.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw it, a row for each block")


def add_base(command: argparse.ArgumentParser) -> None:
    """The options of whatever looks at intruder dimensions."""
    command.add_argument("--base", metavar="MODEL", help="find what it does to this: a .safetensors checkpoint, a folder, or 'mini'")
    command.add_argument(
        "--top", type=positive, default=TOP, metavar="K", help=f"largest singular vectors that are looked at (default: {TOP})"
    )
    command.add_argument(
        "--threshold",
        type=share,
        default=THRESHOLD,
        metavar="COSINE",
        help=f"an intruder is less like any of the base's (default: {THRESHOLD})",
    )
    cache = config.default("output.runs") / runs.CACHE
    command.add_argument(
        "--cache", type=Path, default=cache, metavar="FOLDER", help=f"where what is computed of the base is kept (default: {cache})"
    )


def check(parsed: argparse.Namespace) -> None:
    """Before anything is read: what needs a base, or something else that is not there."""
    asked = [name for name in ("plot", "layer", "drift", "leakage") if getattr(parsed, name) not in (None, False)]
    if asked and parsed.base is None:
        raise ConfigError(f"--{asked[0]} shows what a LoRA does to a base model: name one with --base.")
    if parsed.layer is not None and parsed.plot is None:
        raise ConfigError("--layer is the one to draw: say where, with --plot FILE.png.")
    if parsed.layer is not None and (parsed.drift or parsed.leakage):
        raise ConfigError("--layer is for intruder dimensions: leave it out, or leave out --drift and --leakage.")
    if parsed.drift and parsed.leakage and parsed.plot is not None:
        raise ConfigError("--plot makes one picture: ask for --drift or --leakage.")


def spectra_of(parsed: argparse.Namespace) -> Spectra:
    from sdlora.analysis.spectrum import Spectra
    from sdlora.data.cache import TensorCache

    return Spectra(TensorCache(parsed.cache / SPECTRA, Path(parsed.base).name))


def tell(parsed: argparse.Namespace) -> None:
    """What was asked for: intruder dimensions, or drift, or leakage."""
    if parsed.drift or parsed.leakage:
        tell_of_prompts(parsed)
    else:
        tell_intruders(parsed)


def tell_intruders(parsed: argparse.Namespace) -> None:
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


# ---------------------------------------------------------------- what it does to prompts


def prompts_of(parsed: argparse.Namespace, metadata: Mapping[str, str]) -> dict[str, list[str]]:
    """By group: what the LoRA is for, its class noun, and what it should leave alone."""
    from sdlora.lora.report import tags_of
    from sdlora.objective import GENERIC_PROMPTS

    said = metadata.get("modelspec.trigger_phrase", "")
    trained = parsed.trigger or ([said] if said else [tag for tag, _ in tags_of(metadata)[:MOST_CAPTIONS]])
    if not trained:
        raise ConfigError("--trigger: say a prompt that the LoRA is for; the file does not.")
    others = list(GENERIC_PROMPTS) if parsed.prompts is None else lines_of("--prompts", parsed.prompts)
    noun = {"class noun": [parsed.class_noun]} if parsed.class_noun else {}
    return {"trained for": trained, **noun, "to be left alone": others}


def tell_of_prompts(parsed: argparse.Namespace) -> None:
    """The base model answers first, then the LoRA is merged into its weights and it answers again."""
    quiet_libraries()
    import torch

    from sdlora.analysis import drift, leakage
    from sdlora.lora import formats, lorafile
    from sdlora.models import families
    from sdlora.models.device import pick_device

    with lorafile.opened([parsed.file], folded=False) as (file,):
        groups = prompts_of(parsed, file.metadata)
        clip_skip, max_tokens = as_trained(file.metadata)
        family, model = families.load(
            parsed.base, torch.float32, pick_device(parsed.device), clip_skip=clip_skip, chunks=max_tokens // config.TOKENS_A_CHUNK
        )
        said = {group: drift.say(family, model, of) for group, of in groups.items()} if parsed.drift else {}
        asked = {group: leakage.ask(family, model, of) for group, of in groups.items()} if parsed.leakage else {}
        before = {group: leakage.answers(family, model, of) for group, of in asked.items()}
        formats.merge(model.parts, {name: file.change(name) for name in file.layers})
    if parsed.drift:
        tell_drift(parsed, said, {group: drift.say(family, model, of) for group, of in groups.items()})
    if parsed.leakage:
        after = {group: leakage.answers(family, model, of) for group, of in asked.items()}
        tell_leakage(parsed, groups, {group: leakage.changes(before[group], after[group]) for group in groups})


def tell_drift(parsed: argparse.Namespace, before: Mapping[str, Said], after: Mapping[str, Said]) -> None:
    from sdlora.analysis import drift

    say("Text embeddings of tokens, padding left out:")
    say("  base norm      norm   off by   at most   turned (1 - cosine)")
    for group in before:
        for number, of in enumerate(drift.drifts(before[group], after[group])):
            encoder = f", text encoder {number + 1} or pooled" if number else ""
            say(f"{of.base_norm:11.2f}{of.norm:10.2f}{of.off:9.2%}{of.worst:10.2%}{of.turned:11.3%}   {group}{encoder}")
    if parsed.plot is not None:
        with drawn(parsed.plot):
            drift.plot(before, after, parsed.plot, f"{parsed.file.name}: norms of text embeddings")


def tell_leakage(parsed: argparse.Namespace, groups: Mapping[str, list[str]], changes: Mapping[str, list[float]]) -> None:
    from sdlora.analysis.leakage import leakage

    trained, *others = groups
    say("Change of the noise prediction, as a share of it:")
    for group, prompts in groups.items():
        for prompt, change in zip(prompts, changes[group], strict=True):
            say(f"{change:9.2%}   {group}: {prompt}")
    for group in others:
        name = "Leakage" if group == others[-1] else f"Of the {group}"
        say(f"{name}: {leakage(changes[group], changes[trained]):.3f} of what changes where it was trained")
    if parsed.plot is not None:
        from sdlora.analysis.blocks import bars

        rows = [(group, prompt, change) for group in groups for prompt, change in zip(groups[group], changes[group], strict=True)]
        with drawn(parsed.plot):
            bars(rows, parsed.plot, f"{parsed.file.name}: change of the noise prediction, as a share of it")


# ---------------------------------------------------------------- repair


def repair_command(parsed: argparse.Namespace) -> int:
    if parsed.method == "intruders" and parsed.base is None:
        raise ConfigError("--base: name the model that the LoRA is for; what is an intruder depends on it.")
    if not 0 <= parsed.scale <= 1:
        raise ConfigError(f"--scale {parsed.scale:g}: give a number from 0, which takes intruders out, to 1, which changes nothing.")
    if parsed.method == "threshold" and limit_of(parsed) is not None:
        raise ConfigError("--method threshold finds each layer's rank itself: leave out --rank, --kept-energy and --max-error.")
    from sdlora.lora import lorafile
    from sdlora.lora.metadata import of_file

    with ExitStack() as stack:
        target = stack.enter_context(target_of(parsed))
        (file,) = stack.enter_context(lorafile.opened([parsed.file], folded=parsed.method == "threshold"))
        alpha = float(max(1, lorafile.largest_rank(file)))
        said = {"scale": parsed.scale, "top": parsed.top, "threshold": parsed.threshold} if parsed.method == "intruders" else {}

        def metadata(rank: int) -> dict[str, Any]:
            about = lorafile.shared_metadata([file]) | of_file(parsed.out.stem, rank, alpha)
            return about | {"sdlora_repaired": {"from": parsed.file.name, "method": parsed.method, **said, **limit_said(parsed)}}

        repaired = without_noise(file) if parsed.method == "threshold" else with_intruders_scaled(parsed, file, limit_of(parsed))
        cuts: list[Cut] = []
        kinds = lorafile.write(target, tell_cuts(repaired, cuts), file.family or "sd1", alpha, metadata)
        tell_total(cuts, kinds)
    return 0


def with_intruders_scaled(parsed: argparse.Namespace, file: LoraFile, limit: Limit | None) -> Iterator[Repaired]:
    """Within the limit, or exactly where there is none; what is not of low rank at the rank that keeps 99.99 % of it, as in an export."""
    from sdlora.analysis.intruders import has_matrix, layers
    from sdlora.analysis.repair import scale_intruders
    from sdlora.lora.checkpoints import open_checkpoint
    from sdlora.lora.resize import Limit, resize
    from sdlora.models.local import local_path

    found = []
    for layer in layers(file, open_checkpoint(local_path(parsed.base)), spectra_of(parsed), parsed.top):
        change, intruders = scale_intruders(layer, parsed.threshold, parsed.scale)
        found.append(intruders)
        exact = limit is None and change.is_plain
        yield layer.name, *((change, None) if exact else resize(layer.name, change, limit or Limit(kept=0.9999)))
    for name in file.layers:
        if not has_matrix(change := file.change(name)):
            yield name, change, None
    say(f"{sum(found)} intruder dimensions in {sum(map(bool, found))} of {len(found)} layers, each scaled by {parsed.scale:g}")


def without_noise(file: LoraFile) -> Iterator[Repaired]:
    """Layers of which nothing is left are left out."""
    from sdlora.analysis.intruders import has_matrix
    from sdlora.analysis.repair import hard_threshold
    from sdlora.lora.resize import Cut

    left_out = []
    for name in file.layers:
        change = file.change(name)
        if not has_matrix(change):
            yield name, change, None
            continue
        kept, triplets, rank = hard_threshold(change)
        if kept is None:
            left_out.append(name)
            continue
        energy = triplets.energy()
        norm, lost = (float(of.sum()) ** 0.5 for of in (energy, energy[rank:]))
        yield name, kept, Cut(name, len(triplets.s), rank, norm, lost / norm)
    if left_out:
        say(f"Left out, as noise could make all of it: {', '.join(left_out[:5])}{' ...' if len(left_out) > 5 else ''} ({len(left_out)})")
