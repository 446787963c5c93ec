"""`sdlora sweep`: a grid of runs, one after the other, with a table, a plot and a grid of pictures at the end."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from sdlora import events, grid
from sdlora.commands import OPTION_HELP, Commands
from sdlora.commands.terminal import quiet_libraries, say, shown
from sdlora.commands.training import follow_training
from sdlora.errors import ConfigError, TrainingError
from sdlora.files import write_durably
from sdlora.run import Run


def add(commands: Commands) -> None:
    command = commands.add_parser(
        "sweep",
        help="train a grid of options, and compare",
        description="Train every combination of --set lora.rank=4,16,64 --set loss.embedding_norm=0,0.1 one after the other, each in a run "
        "folder of its own. Stopped or killed, the same command goes on. With --halve 0.25 all train for a quarter of their steps, then "
        "the worse half is dropped, and again at a half: by the loss on held-out pictures, or on the embedded model by fish drawn right "
        "times known things kept. " + OPTION_HELP,
        allow_abbrev=False,
    )
    command.add_argument("config", nargs="*", type=Path, help="TOML files, later ones over earlier ones")
    command.set_defaults(call=sweep_command)


def sweep_command(parsed: argparse.Namespace) -> int:
    chosen = [grid.split(value) for name, value in parsed.flags if name == "set"]
    if not chosen:
        raise ConfigError("--set: say which options vary, as --set lora.rank=4,16,64.")
    halvings = next((grid.halvings(value) for name, value in reversed(parsed.flags) if name == "halve"), [])
    rows = grid.rows_of(parsed.config, [flag for flag in parsed.flags if flag[0] not in ("set", "halve")], chosen)
    if halvings:
        grid.require_judge([row.config for row in rows], halvings[0])
    folder, made = rows[0].folder.parent, {row.label: row.run() for row in rows}
    quiet_libraries()
    trained = train_all(made, halvings)
    if trained is None:
        say("Stopped. The same command goes on.")
        return 0
    finished, dropped = trained
    found = {label: grid.figures(run) | measured(run, run.export) for label, run in finished.items()}
    compared = found | {label: grid.figures(made[label]) | {"dropped at step": step} for label, step in dropped.items()}
    text = grid.table(rows, compared)
    write_durably(folder / "table.md", text.encode())
    for line in text.splitlines():
        say(line)
    say(f"Table: {shown(folder / 'table.md')}")
    write_plot(folder, found)
    write_pictures(folder, finished)
    return 0


def train_all(made: Mapping[str, Run], halvings: Sequence[float]) -> tuple[dict[str, Run], dict[str, int]] | None:
    """The rows that came to their end, and the step after which each of the others was dropped, as half of the rows are after each share
    of the steps in `halvings`; a row whose training fails is neither. None where the user stopped it."""
    going, dropped, numbers = dict(made), dict[str, int](), {label: number for number, label in enumerate(made, 1)}
    for part in (*halvings, 1.0):
        for label, run in list(going.items()):
            step = grid.step_at(run.config, part)
            if has_come(run, step):
                continue
            say(f"Row {numbers[label]} of {len(made)}: {label}{f', to step {step}' if part < 1 else ''}")
            try:
                follow_training(run, pause=step if part < 1 else None)
            except TrainingError as error:  # as of a rate that is too high: of this row, and a result
                del going[label]
                say(f"Row {numbers[label]} failed: {error}")
                continue
            if not has_come(run, step):
                return None
        if part < 1:
            for label, step in worse_half(going, part).items():
                del going[label]
                dropped[label] = step
                say(f"Dropped after step {step}: {label}")
    return going, dropped


def has_come(run: Run, step: int) -> bool:
    """So far, and what was learned until then is written."""
    return run.export.exists() or (step < run.config.train.steps and grid.came_to(run, step) is not None)


def worse_half(going: Mapping[str, Run], part: float) -> dict[str, int]:
    """The rows that go after this share of their steps, and the step of each."""
    if len(going) < 2:
        return {}
    steps = {label: grid.step_at(run.config, part) for label, run in going.items()}
    kept = grid.better_half({label: score(run, steps[label]) for label, run in going.items()})
    return {label: step for label, step in steps.items() if label not in kept}


def score(run: Run, step: int) -> float:
    """How good a row is that has come to this step; more is better."""
    if run.config.data.holdout:
        loss = grid.held_out(events.read(run.events), step)
        assert loss is not None  # as `require_judge` saw to
        return -loss
    stopped = grid.came_to(run, step)
    assert stopped is not None
    found = measured(run, run.export if stopped == run.config.train.steps else run.export_of(stopped))
    return found["concept"] * found["kept"]


def measured(run: Run, file: Path) -> dict[str, float]:
    """What the oracle says of a run's LoRA file, where it can: of the embedded model, and of the concept that it knows. Once for a file."""
    if run.config.model.base != "mini":
        return {}
    if not grid.measured_in(file).exists():
        program = [sys.executable, "-m", "sdlora.mini.measure", "--lora", str(file), "--json", str(grid.measured_in(file))]
        subprocess.run(program, check=True, stdout=subprocess.DEVNULL)
    return grid.measured(file)


def write_plot(folder: Path, found: Mapping[str, Mapping[str, float]]) -> None:
    """Concept against what was kept, where both are known."""
    points = {label: (of["concept"], of["kept"]) for label, of in found.items() if "concept" in of}
    if not points:
        return
    from sdlora.analysis.blocks import front

    path = folder / "plot.png"
    front(points, grid.pareto(points), path, "concept right", "known things kept")
    say(f"Plot: {shown(path)}; on the Pareto front: {'; '.join(grid.pareto(points))}")


def write_pictures(folder: Path, finished: Mapping[str, Run]) -> None:
    """The last previews of each run, a row for each."""
    from PIL import Image

    from sdlora import preview

    rows: list[tuple[str, Sequence[Image.Image]]] = []
    captions: list[str] = []
    for label, run in finished.items():
        options = run.config
        prompts = [preview.parse_prompt(line, steps=1, guidance=0).text for line in options.preview.prompts]
        paths = [preview.picture_path(run, options.train.steps, number) for number in range(len(prompts))]
        if paths and all(path.exists() for path in paths):
            rows.append((label, [Image.open(path).convert("RGB") for path in paths]))
            captions = prompts
    if rows:
        preview.grid(rows, captions).save(folder / "pictures.png")
        say(f"Pictures: {shown(folder / 'pictures.png')}")
