"""`sdlora sweep`: a grid of runs, one after the other, with a table, a plot and a grid of pictures at the end."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from sdlora import grid
from sdlora.commands import OPTION_HELP, Commands
from sdlora.commands.terminal import quiet_libraries, say, shown
from sdlora.commands.training import follow_training
from sdlora.errors import ConfigError, TrainingError
from sdlora.files import write_durably
from sdlora.run import Run

MEASURED = "measured.json"  # in a run's folder


def add(commands: Commands) -> None:
    command = commands.add_parser(
        "sweep",
        help="train a grid of options, and compare",
        description="Train every combination of --set lora.rank=4,16,64 --set loss.embedding_norm=0,0.1 one after the other, each in a run "
        "folder of its own. Stopped or killed, the same command goes on. " + OPTION_HELP,
        allow_abbrev=False,
    )
    command.add_argument("config", nargs="*", type=Path, help="TOML files, later ones over earlier ones")
    command.set_defaults(call=sweep_command)


def sweep_command(parsed: argparse.Namespace) -> int:
    chosen = [grid.split(value) for name, value in parsed.flags if name == "set"]
    if not chosen:
        raise ConfigError("--set: say which options vary, as --set lora.rank=4,16,64.")
    rows = grid.rows_of(parsed.config, [flag for flag in parsed.flags if flag[0] != "set"], chosen)
    folder, made = rows[0].folder.parent, {row.label: row.run() for row in rows}
    quiet_libraries()
    failed: dict[str, str] = {}
    for number, (label, run) in enumerate(made.items()):
        if not run.export.exists():
            say(f"Row {number + 1} of {len(rows)}: {label}")
            try:
                follow_training(run)
            except TrainingError as error:  # as of a rate that is too high: of this row, and a result
                failed[label] = str(error)
                say(f"Row {number + 1} failed: {error}")
                continue
            if not run.export.exists():
                say("Stopped. The same command goes on.")
                return 0
    finished = {label: run for label, run in made.items() if label not in failed}
    found = {label: grid.figures(run) | measured(run) for label, run in finished.items()}
    text = grid.table(rows, found)
    write_durably(folder / "table.md", text.encode())
    for line in text.splitlines():
        say(line)
    say(f"Table: {shown(folder / 'table.md')}")
    write_plot(folder, found)
    write_pictures(folder, finished)
    return 0


def measured(run: Run) -> dict[str, float]:
    """What the oracle says, where it can: of the embedded model, and of the concept that it knows. Once for a run."""
    path = run.folder / MEASURED
    if run.config.model.base != "mini":
        return {}
    if not path.exists():
        program = [sys.executable, "-m", "sdlora.mini.measure", "--lora", str(run.export), "--json", str(path)]
        subprocess.run(program, check=True, stdout=subprocess.DEVNULL)
    found: dict[str, dict[str, float]] = json.loads(path.read_text(encoding="utf-8"))
    return {"concept": found["concept"]["kind"], "kept": found["base prompts"]["kind"]} if "concept" in found else {}


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
