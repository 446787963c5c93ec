"""The `sdlora` command: arguments to calls, events to text. Nothing here imports torch before it must."""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from sdlora import __version__, config, events
from sdlora import run as runs
from sdlora.errors import ConfigError, DataError, SdloraError, WeightsError

OPTION_HELP = "Any option follows as --section.key VALUE, or --key VALUE where the key is unique: see `sdlora options`."


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0; 2 with one line on stderr for what the user can mend. Anything else is a bug and shows its traceback."""
    parser = argparse.ArgumentParser(prog="sdlora", description="Train Stable Diffusion LoRAs that do not break the model.")
    parser.add_argument("--version", action="version", version=f"sdlora {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("train", help="train a LoRA", description="Train a LoRA. " + OPTION_HELP, allow_abbrev=False)
    command.add_argument("config", nargs="*", type=Path, help="TOML files, later ones over earlier ones")
    command.set_defaults(call=train_command)

    command = commands.add_parser("resume", help="go on with a run that was stopped or killed")
    command.add_argument("run", type=Path, help="run folder")
    command.set_defaults(call=resume_command)

    command = commands.add_parser(
        "generate",
        help="make pictures, with or without a LoRA file",
        description="Make pictures. A prompt may end in --n negative --w width --h height --d seed --s steps --l guidance.",
    )
    command.add_argument("prompt", nargs="*", help="what to draw")
    command.add_argument("--prompts", type=Path, help="file with one prompt a line")
    command.add_argument("--base", default="mini", help="base model: a folder, or 'mini' (default)")
    command.add_argument("--lora", action="append", default=[], metavar="FILE[:STRENGTH]", help="LoRA file, as trained or from elsewhere")
    command.add_argument("--out", type=Path, default=Path("pictures"), help="folder for the pictures (default: pictures)")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    command.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    command.set_defaults(call=generate_command)

    command = commands.add_parser(
        "plan", help="show what a config would train, layer by layer", description="Train nothing. " + OPTION_HELP, allow_abbrev=False
    )
    command.add_argument("config", nargs="*", type=Path, help="TOML files, later ones over earlier ones")
    command.set_defaults(call=plan_command)

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

    command = commands.add_parser("alphas", help="show which layers a LoRA chose to change, by their learned alphas")
    command.add_argument("file", type=Path, help="LoRA file")
    command.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw them, a row for each block")
    command.set_defaults(call=alphas_command)

    command = commands.add_parser("cache", help="show or clear what was computed of pictures and captions")
    actions = command.add_subparsers(required=True, metavar="ACTION")
    info = actions.add_parser("info", help="show where it is, what it holds and how large it is")
    info.set_defaults(call=cache_info_command)
    prune = actions.add_parser("prune", help="delete what was not used for a while; training computes anew what it misses")
    prune.add_argument("--older-than", type=float, default=30.0, metavar="DAYS", help="days without use (default: 30); 0 for all")
    prune.set_defaults(call=cache_prune_command)
    default = config.OutputOptions().runs / runs.CACHE
    for action in (info, prune):
        action.add_argument("folder", nargs="?", type=Path, default=default, help=f"folder of the cache (default: {default})")

    command = commands.add_parser("options", help="list every training option with its meaning and default")
    command.set_defaults(call=options_command)

    words = list(sys.argv[1:] if arguments is None else arguments)
    # Options of a training run belong to config.py: argparse sees what stands before them.
    is_option = [word.startswith("--") and word not in ("--help", "--version") for word in words]
    takes_options = words[:1] in (["train"], ["plan"]) or words[:2] == ["data", "check"]
    split = is_option.index(True) if takes_options and True in is_option else len(words)
    parsed, rest = parser.parse_known_args(words[:split])
    rest += words[split:]
    try:
        if rest and not takes_options:
            raise ConfigError(f"{rest[0]} is not an option of this command; see `sdlora --help`.")
        parsed.flags = pairs(rest)
        return int(parsed.call(parsed))
    except SdloraError as error:
        print(f"sdlora: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `sdlora options | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def pairs(words: Sequence[str]) -> list[tuple[str, str]]:
    """`--a.b 1 --c=2` -> [("a.b", "1"), ("c", "2")]."""
    found, queue = [], list(words)
    while queue:
        word = queue.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"{word!r} stands where an option was expected; write --section.key {word}.")
        name, equals, value = word[2:].partition("=")
        if not equals:
            if not queue:
                raise ConfigError(f"--{name} needs a value.")
            value = queue.pop(0)
        found.append((name, value))
    return found


# ---------------------------------------------------------------- commands


def train_command(parsed: argparse.Namespace) -> int:
    run = runs.create(config.load(parsed.config, parsed.flags))
    return follow_training(run)


def resume_command(parsed: argparse.Namespace) -> int:
    run = runs.open_run(parsed.run)
    run.stop_file.unlink(missing_ok=True)
    return follow_training(run)


def follow_training(run: runs.Run) -> int:
    quiet_libraries()
    logging.basicConfig(filename=run.log, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    logging.captureWarnings(True)
    print(f"Run folder: {shown(run.folder)}", flush=True)
    print("Loading the model ...", flush=True)
    with stop_on_signals(run):
        from sdlora.train import train

        for line in render(events.record(train(run), run.events), run):
            print(line, flush=True)
    return 0


def generate_command(parsed: argparse.Namespace) -> int:
    quiet_libraries()
    lines = list(parsed.prompt)
    if parsed.prompts:
        try:
            lines += [line.strip() for line in parsed.prompts.read_text(encoding="utf-8-sig").splitlines()]
        except OSError as error:
            raise ConfigError(f"--prompts: cannot read {parsed.prompts}: {error.strerror}.") from None
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise ConfigError("There is no prompt: write one in quotes, or name a file with --prompts.")

    from sdlora import preview
    from sdlora.lora import formats
    from sdlora.models import families
    from sdlora.models.device import DTYPES, pick_device
    from sdlora.models.sampling import generate

    prompts = [preview.parse_prompt(line, steps=20, guidance=7.0) for line in lines]
    files = [split_strength(text) for text in parsed.lora]
    loaded = [(formats.load(path)[0], strength) for path, strength in files]
    family, model = families.load(parsed.base, DTYPES[parsed.precision], pick_device(parsed.device))
    for prompt in prompts:
        preview.check_size(prompt, model.size_multiple)
    for changes, strength in loaded:
        formats.merge(model.parts, changes, strength)
    parsed.out.mkdir(parents=True, exist_ok=True)
    used = "".join(f" <lora:{path.stem}:{strength:g}>" for path, strength in files)
    number = 1 + max((int(p.stem) for p in parsed.out.glob("*.png") if p.stem.isdigit()), default=-1)
    for offset, prompt in enumerate(prompts):
        path = parsed.out / f"{number + offset:05d}.png"
        (picture,) = generate(family, model, [prompt])
        preview.save_picture(picture, path, prompt, model=Path(parsed.base).name, lora=used)
        print(f"{path}  {prompt.text}", flush=True)
    return 0


def plan_command(parsed: argparse.Namespace) -> int:
    chosen = config.load(parsed.config, parsed.flags)
    quiet_libraries()
    from sdlora.plan import plan

    found = plan(chosen)
    width = max(len(layer.name) for layer in found.layers)
    print(f"{'layer':{width}}  {'shape':>16}  rank  scale     down rate  up rate   parameters")
    for layer in found.layers:
        shape = "x".join(map(str, layer.shape))
        rates = f"{layer.down_rate:<9.3g}  {layer.up_rate:<8.3g}"
        rank, scale = layer.rank or "full", "-" if layer.scale is None else f"{layer.scale:.4g}"
        print(f"{layer.name:{width}}  {shape:>16}  {rank:>4}  {scale:<8}  {rates}  {layer.parameters:>10,}")
    shares = ", ".join(f"{share:.1%} of {part.replace('_', ' ')}" for part, share in found.adapted_weights.items())
    print(f"\n{len(found.layers)} layers, {sum(layer.parameters for layer in found.layers):,} parameters, init {found.init}")
    print(f"Weights that adapters change: {shares}")
    print(f"Learned alphas: {f'rate {found.alpha_rate:g} of where they start' if found.alpha_rate else 'none'}")
    if found.unmatched:
        print(f"Without an alpha in lora.alpha_from, so at lora.alpha: {', '.join(found.unmatched)}")
    return 0


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
            print(f"Training would refuse: {refusal}")
            return 1
    places = [(item.example, item.placed) for item in items]
    seen = check.looks(list({example.path: None for example, _ in places}))
    tokenizer = Path(chosen.model.base) / "tokenizer"
    tokens = token_counter(tokenizer) if tokenizer.is_dir() else check.about_tokens
    report = check.check(places, skipped, tokens=tokens, max_tokens=chosen.data.max_tokens, seen=seen, refusal=refusal)
    for line in check.lines(report, about=not tokenizer.is_dir()):
        print(line)
    for path in sheets:
        from sdlora.data.sheet import draw_sheet

        path.parent.mkdir(parents=True, exist_ok=True)
        draw_sheet(places, colour(chosen.data.background)).save(path)
        print(f"Sheet: {shown(path)}")
    return 1 if refusal else 0


def token_counter(folder: Path) -> Callable[[str], int]:
    """Tokens of a text without the marks of start and end, by the tokenizer in `folder`."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder)
    return lambda text: len(tokenizer.tokenize(text))


def alphas_command(parsed: argparse.Namespace) -> int:
    """A histogram over layers, then the layers that moved furthest from the median; a picture where one is asked for."""
    from statistics import median

    from sdlora.analysis import alphas as analysis
    from sdlora.lora import formats

    alphas = formats.read_alphas(parsed.file)
    if not alphas:
        raise WeightsError(f"{parsed.file} has no alphas: it holds no low-rank layers.")
    middle, low, high = median(alphas.values()), min(alphas.values()), max(alphas.values())
    print(f"{len(alphas)} layers: alpha {low:.4g} to {high:.4g}, median {middle:.4g}")
    if parsed.plot:
        try:
            analysis.plot(alphas, parsed.plot, f"{parsed.file.name}: what each layer learned")
        except (OSError, ValueError) as error:
            raise ConfigError(f"--plot: cannot draw {parsed.plot}: {error}.") from None
        print(f"Picture: {shown(parsed.plot)}")
    if low == high:
        print("All alike: this file's alphas were not learned.")
        return 0
    rows = analysis.histogram(alphas)
    most = max(count for *_, count in rows)
    for left, right, count in rows:
        print(f"{left:9.4g} .. {right:9.4g}  {'#' * round(40 * count / most):40}  {count}")
    ordered = sorted(alphas.items(), key=lambda item: item[1])
    for title, shown_rows in (("Changed most", ordered[::-1][:10]), ("Changed least", ordered[:10])):
        print(f"\n{title}:")
        for name, alpha in shown_rows:
            print(f"{alpha:9.4g}  {name}")
    return 0


def cache_info_command(parsed: argparse.Namespace) -> int:
    from datetime import date

    from sdlora.data import cache

    check_cache_folder(parsed.folder)
    found = cache.survey(parsed.folder)
    print(f"{parsed.folder.resolve()}: {size(sum(held.bytes for held in found))}")
    for held in found:
        used = f", last used {date.fromtimestamp(held.used)}" if held.used else ""
        print(f"  {held.folder.name}: {held.entries:,} entries, {size(held.bytes)}, of {', '.join(held.models) or 'nothing'}{used}")
        for path in held.damaged:
            print(f"    damaged: {path.name}")
    return 0


def cache_prune_command(parsed: argparse.Namespace) -> int:
    from sdlora.data import cache

    check_cache_folder(parsed.folder)
    files, freed = cache.prune(parsed.folder, parsed.older_than)
    print(f"{parsed.folder.resolve()}: {files} {'file' if files == 1 else 'files'} deleted, {size(freed)} freed")
    return 0


def check_cache_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ConfigError(f"There is no cache in {folder}: name its folder, `{runs.CACHE}` beside your runs or what data.cache says.")


def size(of: int) -> str:
    """Bytes, for people."""
    return f"{of / 2**30:.2f} GiB" if of >= 2**30 else f"{of / 2**20:.1f} MiB"


def options_command(parsed: argparse.Namespace) -> int:
    import textwrap

    import tomlkit

    width = min(shutil.get_terminal_size((140, 24)).columns, 140)
    section = ""
    for option in config.options():
        head, key = option.name.split(".")
        if head != section:
            print(f"\n[{head}]" if section else f"[{head}]")
            section = head
        default = option.default
        value = str(default) if isinstance(default, Path) else list(default) if isinstance(default, tuple) else default
        written = "unset" if value is None else "{}" if value == {} else tomlkit.item(value).as_string()
        print(f"  {key} = {written}   ({option.type})")
        print(textwrap.fill(str(option.field.description), width, initial_indent=" " * 6, subsequent_indent=" " * 6))
    return 0


def split_strength(text: str) -> tuple[Path, float]:
    """`file.safetensors:0.8` -> file and strength; a Windows drive's colon is left alone."""
    head, colon, tail = text.rpartition(":")
    if colon and not Path(text).exists():
        try:
            return Path(head), float(tail)
        except ValueError:
            pass
    return Path(text), 1.0


# ---------------------------------------------------------------- events to text


def render(stream: Iterator[events.Event], run: runs.Run) -> Iterator[str]:
    """Lines to print; progress bars draw themselves on stderr."""
    bar = filling = None
    started, smooth, finished, grid, lost, alphas = 0, None, None, "", "", ""
    for event in stream:
        match event:
            case events.Planned():
                yield from plan_lines(event)
            case events.Warned(message=message):
                yield f"Warning: {message}"
            case events.Cached():
                if filling is None:
                    filling = progress(event.total, event.done, event.of.rstrip("s"), f"Encoding {event.of}")
                filling.update(event.done - filling.n)
                if event.done == event.total:
                    filling.close()
                    filling = None
            case events.Resumed(step=step):
                started = step
                yield f"Going on after step {step}."
            case events.Stepped():
                if bar is None:
                    bar = progress(event.steps, started, "step", "Training")
                smooth = event.loss if smooth is None else 0.95 * smooth + 0.05 * event.loss
                figures = f"loss {smooth:.4f}, rate {event.rate:.1e}, norm drift {event.embedding_norm_drift:.1%}{alphas}"
                bar.set_postfix_str(figures, refresh=False)
                bar.update()
            case events.Measured(alphas=found) if found:
                alphas = f", alpha {found[2]:.3g} ({found[0]:.3g} to {found[-1]:.3g})"
            case events.Previewed(path=path):
                grid = path
            case events.Exported() if event.lost:
                lost = f"The file is the nearest of its rank: it leaves out {event.lost:.2%} of the change, most of {event.worst}."
            case events.Stopped(step=step):
                finished = f"Stopped after step {step}; all is saved. Go on with: {program()} resume {shown(run.folder)}"
            case events.Finished(path=path):
                prompt = run.config.preview.prompts[0].split(" --")[0] if run.config.preview.prompts else "your prompt"
                pictures = f"Before and after: {shown(Path(grid))}   " if grid else ""
                again = f'{program()} generate "{prompt}" --base {run.config.model.base} --lora {shown(Path(path))}'
                finished = f"{pictures}LoRA: {shown(Path(path))}   Next: {again}"
    for shown_bar in (filling, bar):
        if shown_bar is not None:
            shown_bar.close()
    if lost:
        yield lost
    if finished:
        yield finished


def progress(total: int, initial: int, unit: str, title: str) -> Any:
    from tqdm import tqdm

    interval = 0.2 if sys.stderr.isatty() else 30.0
    return tqdm(total=total, initial=initial, unit=unit, mininterval=interval, dynamic_ncols=True, desc=title)


def plan_lines(plan: events.Planned) -> Iterator[str]:
    repeats = f" x {plan.repeats} repeats" if plan.repeats > 1 else ""
    yield f"Base model   {plan.base} on {plan.device}"
    yield f"Pictures     {plan.images}{repeats} in buckets {', '.join(f'{size} ({n})' for size, n in sorted(plan.buckets.items()))}"
    yield f"Steps        {plan.steps} of {plan.batch_size} pictures; {plan.steps_per_epoch} an epoch, {plan.epochs:g} epochs"
    layers = ", ".join(f"{n} of {part.replace('_', ' ')}" for part, n in plan.layers.items())
    yield f"Adapters     {layers}; {plan.trainable_parameters:,} parameters"
    yield f"Memory       about {plan.memory_bytes / 2**30:.1f} GiB at the peak"


def program() -> str:
    """How this user can call us again: by name where a shell would find it."""
    if shutil.which("sdlora"):
        return "sdlora"
    called = Path(sys.argv[0])
    return f"{shown(Path(sys.executable))} -m sdlora" if called.suffix == ".py" else str(shown(called.absolute()))


def shown(path: Path) -> Path:
    """Relative to where the user stands, where that is shorter."""
    try:
        return path.relative_to(Path.cwd())
    except ValueError:
        return path


# ---------------------------------------------------------------- processes


@contextmanager
def stop_on_signals(run: runs.Run) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM asks the run to stop after its step; the second ends the process at once."""

    def ask(number: int, frame: FrameType | None) -> None:
        if run.asked_to_stop():
            os._exit(128 + number)
        run.ask_to_stop()
        print("\nStopping after this step; once more to quit at once.", file=sys.stderr, flush=True)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def quiet_libraries() -> None:
    """Progress bars and notices of libraries would tear our own bar; what matters comes as an error or an event."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


if __name__ == "__main__":
    sys.exit(main())
