"""`sdlora train`, `resume` and `plan`: a run followed on the terminal, and what it would train."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from sdlora import config, events, queue
from sdlora import run as runs
from sdlora.commands import OPTION_HELP, Commands
from sdlora.commands.terminal import program, quiet_libraries, say, shown

if TYPE_CHECKING:
    from sdlora.processes import Processes


def add(commands: Commands) -> None:
    command = commands.add_parser("train", help="train a LoRA", description="Train a LoRA. " + OPTION_HELP, allow_abbrev=False)
    command.add_argument("config", nargs="*", type=Path, help="TOML files, later ones over earlier ones")
    command.set_defaults(call=train_command)

    command = commands.add_parser("resume", help="go on with a run that was stopped or killed")
    command.add_argument("run", type=Path, help="run folder")
    command.set_defaults(call=resume_command)

    runs_folder = config.default("output.runs")
    command = commands.add_parser("queue", help="train what the page has queued, one run after another, until nothing waits")
    command.add_argument("runs", nargs="?", type=Path, default=runs_folder, help=f"folder of runs (default: {runs_folder})")
    command.set_defaults(call=queue_command)

    command = commands.add_parser(
        "plan", help="show what a config would train, layer by layer", description="Train nothing. " + OPTION_HELP, allow_abbrev=False
    )
    command.add_argument("config", nargs="*", type=Path, help="TOML files, later ones over earlier ones")
    command.set_defaults(call=plan_command)


def train_command(parsed: argparse.Namespace) -> int:
    chosen = config.load(parsed.config, parsed.flags)
    return with_others(lambda: runs.create(chosen))


def resume_command(parsed: argparse.Namespace) -> int:
    return with_others(lambda: runs.open_run(parsed.run))


def with_others(find: Callable[[], runs.Run]) -> int:
    """Train in the run that `find` makes or opens: alone, or with the other processes that torchrun has started."""
    quiet_libraries()
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return follow_training(find())
    from sdlora.processes import joined
    from sdlora.train import train

    with joined() as processes:
        run = runs.Run(Path(processes.tell(str(find().folder) if processes.is_first else "")))
        if processes.is_first:
            return follow_training(run, processes)
        for number in (signal.SIGINT, signal.SIGTERM):  # which the first process gets, too, and tells the others by and by
            signal.signal(number, signal.SIG_IGN)
        for _ in train(run, processes):
            pass
    return 0


def follow_training(run: runs.Run, processes: Processes | None = None, pause: int | None = None) -> int:
    """`pause`: the run stops after this many steps, as if it had been asked to."""
    with run.locked():
        run.claim(os.getpid())
        run.forget_requests()  # of the last time
        logging.basicConfig(filename=run.log, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
        logging.captureWarnings(True)
        say(f"Run folder: {shown(run.folder)}")
        say("Loading the model ...")
        with stop_on_signals(run, at_once=processes is None):
            from sdlora.processes import ALONE
            from sdlora.train import train

            stream = train(run, processes or ALONE)
            if pause is not None:
                stream = paused(stream, run, pause)
            for line in render(events.record(stream, run.events), run):
                say(line)
    return 0


def paused(stream: Iterator[events.Event], run: runs.Run, step: int) -> Iterator[events.Event]:
    """The stream of a run that is asked to stop when it has taken so many steps."""
    for event in stream:
        if isinstance(event, events.Stepped) and event.step >= step:
            run.ask_to_stop()
        yield event


def queue_command(parsed: argparse.Namespace) -> int:
    """Ctrl-C ends this; the run in training goes on, and the next such process waits for its end."""
    for line in queue.work(parsed.runs):
        say(line)
    return 0


def plan_command(parsed: argparse.Namespace) -> int:
    chosen = config.load(parsed.config, parsed.flags)
    quiet_libraries()
    from sdlora.plan import plan

    found = plan(chosen)
    width = max(len(layer.name) for layer in found.layers)
    say(f"{'layer':{width}}  {'shape':>16}  rank  scale     down rate  up rate   parameters")
    for layer in found.layers:
        shape = "x".join(map(str, layer.shape))
        rates = f"{layer.down_rate:<9.3g}  {layer.up_rate:<8.3g}"
        rank, scale = layer.rank or "full", "-" if layer.scale is None else f"{layer.scale:.4g}"
        say(f"{layer.name:{width}}  {shape:>16}  {rank:>4}  {scale:<8}  {rates}  {layer.parameters:>10,}")
    shares = ", ".join(f"{share:.1%} of {part.replace('_', ' ')}" for part, share in found.adapted_weights.items())
    say()
    say(f"{len(found.layers)} layers, {sum(layer.parameters for layer in found.layers):,} parameters, init {found.init}")
    say(f"Weights that adapters change: {shares}")
    say(f"Learned alphas: {f'rate {found.alpha_rate:g} of where they start' if found.alpha_rate else 'none'}")
    if found.unmatched:
        say(f"Without an alpha in lora.alpha_from, so at lora.alpha: {', '.join(found.unmatched)}")
    return 0


# ---------------------------------------------------------------- events to text


def render(stream: Iterator[events.Event], run: runs.Run) -> Iterator[str]:
    """Lines to print; progress bars draw themselves on stderr."""
    bar = filling = None
    started, smooth, finished, grid, lost, alphas, so_far, unseen, best = 0, None, None, "", "", "", "", "", ""
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
                smooth = events.smoothed(smooth, event.loss)
                figures = f"loss {smooth:.4f}, rate {event.rate:.1e}, norm drift {event.embedding_norm_drift:.1%}{alphas}{unseen}"
                bar.set_postfix_str(figures, refresh=False)
                bar.update(event.step - bar.n)  # steps that were skipped told nothing
            case events.Measured(alphas=found) if found:
                alphas = f", alpha {found[2]:.3g} ({found[0]:.3g} to {found[-1]:.3g})"
            case events.Validated(step=step, loss=loss, path=path):
                unseen = f", held out {loss:.4f}"
                if path:
                    best = f"Lowest loss on held-out pictures: {loss:.4f} after step {step}. LoRA as it was then: {shown(Path(path))}"
            case events.Previewed(path=path):
                grid = path
            case events.Exported():
                so_far = f" LoRA so far: {shown(Path(event.path))}"
                if event.lost:
                    lost = f"The file is the nearest of its rank: it leaves out {event.lost:.2%} of the change, most of {event.worst}."
            case events.Stopped(step=step):
                finished = f"Stopped after step {step}; all is saved.{so_far} Go on with: {program()} resume {shown(run.folder)}"
            case events.Finished(path=path):
                prompt = run.config.preview.prompts[0].split(" --")[0] if run.config.preview.prompts else "your prompt"
                pictures = f"Before and after: {shown(Path(grid))}   " if grid else ""
                again = f'{program()} generate "{prompt}" --base {run.config.model.base} --lora {shown(Path(path))}'
                finished = f"{pictures}LoRA: {shown(Path(path))}   Next: {again}"
    for shown_bar in (filling, bar):
        if shown_bar is not None:
            shown_bar.close()
    yield from filter(None, (lost, best))
    if finished:
        yield finished


def progress(total: int, initial: int, unit: str, title: str) -> Any:
    from tqdm import tqdm

    interval = 0.2 if sys.stderr.isatty() else 30.0
    return tqdm(total=total, initial=initial, unit=unit, mininterval=interval, dynamic_ncols=True, desc=title)


def plan_lines(plan: events.Planned) -> Iterator[str]:
    repeats = f" x {plan.repeats} repeats" if plan.repeats > 1 else ""
    yield f"Base model   {plan.base} on {plan.device}"
    yield from (f"Assumed      {note}" for note in plan.assumed)
    yield f"Pictures     {plan.images}{repeats} in buckets {', '.join(f'{size} ({n})' for size, n in sorted(plan.buckets.items()))}"
    yield f"Steps        {plan.steps} of {plan.batch_size} pictures; {plan.steps_per_epoch} an epoch, {plan.epochs:g} epochs"
    layers = ", ".join(f"{n} of {part.replace('_', ' ')}" for part, n in plan.layers.items())
    yield f"Adapters     {layers}; {plan.trainable_parameters:,} parameters"
    yield f"Memory       about {plan.memory_bytes / 2**30:.1f} GiB at the peak"


# ---------------------------------------------------------------- processes


@contextmanager
def stop_on_signals(run: runs.Run, at_once: bool) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM asks the run to stop after its step; the second ends the process `at_once`, but under torchrun, which
    passes a signal on that the process has got already, and kills after half a minute anyway."""

    def ask(number: int, frame: FrameType | None) -> None:
        if run.asked_to_stop():
            if at_once:
                os._exit(128 + number)
            return
        run.ask_to_stop()
        print("\nStopping after this step; once more to quit at once.", file=sys.stderr, flush=True)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
