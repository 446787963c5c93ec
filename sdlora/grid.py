"""A grid of runs over values of options: which they are, where they lie, and how they compare. Nothing here imports torch."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdlora import config as configs
from sdlora import events
from sdlora import run as runs
from sdlora.config import LARGEST, Config
from sdlora.errors import ConfigError
from sdlora.run import Run

Flags = Sequence[tuple[str, str]]
SUFFIX = "-sweep"  # of the name of a folder of rows, in the folder of runs
LONGEST = 60  # characters of a row's own part of a name


@dataclass(frozen=True)
class Row:
    """One combination of the values."""

    values: dict[str, str]  # option, as it was written -> value
    config: Config

    @property
    def label(self) -> str:
        return ", ".join(f"{option.rpartition('.')[2]} {value}" for option, value in self.values.items())

    @property
    def folder(self) -> Path:
        return self.config.output.runs / self.config.output.name

    def run(self) -> Run:
        """Made, or found where it was made before. Raises ConfigError where another is there."""
        if not self.folder.exists():
            return runs.create(self.config)
        found = runs.open_run(self.folder)
        if found.config != runs.with_absolute_paths(self.config):
            raise ConfigError(f"{self.folder} is a run with other options: choose another output.name, or delete that folder.")
        return found


def folder_of(runs: Path, name: str) -> Path:
    """Of the sweep of this name, in a folder of runs."""
    return runs / f"{name}{SUFFIX}"


def folders(within: Path) -> list[Path]:
    """Of all sweeps in a folder of runs, the newest first."""
    found = [path for path in within.glob(f"*{SUFFIX}") if path.is_dir() and not (path / "config.toml").exists()]
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def split(text: str) -> tuple[str, list[str]]:
    """`lora.rank=4,16` -> its name and values; commas inside brackets, braces and quotes belong to a value."""
    name, equals, rest = text.partition("=")
    values, depth, quote = [""], 0, ""
    for c in rest:
        quote = "" if c == quote else c if c in "\"'" and not quote else quote
        depth += 0 if quote else (c in "[{") - (c in "]}")
        if c == "," and not depth and not quote:
            values.append("")
        else:
            values[-1] += c
    values = [value.strip() for value in values]
    if not equals or not all(values) or len(set(values)) < len(values):
        raise ConfigError(f"--set {text}: write an option and its values, each once: --set lora.rank=4,16,64.")
    return name.strip(), values


def rows_of(files: Sequence[Path], flags: Flags, grid: Sequence[tuple[str, Sequence[str]]]) -> list[Row]:
    """Every combination, the last option's values changing fastest, each a run in the folder NAME-sweep beside where NAME would be.
    Raises ConfigError."""
    common = configs.load(files, flags)
    folder = folder_of(common.output.runs, common.output.name)
    cache = common.data.cache or common.output.runs / runs.CACHE
    if len({name for name, _ in grid}) < len(grid):
        raise ConfigError("--set names an option twice: give all its values at once.")
    rows = []
    for number, combination in enumerate(itertools.product(*(values for _, values in grid))):
        values = {name: value for (name, _), value in zip(grid, combination, strict=True)}
        readable = re.sub(r"[^A-Za-z0-9._-]+", "-", "_".join(f"{n.rpartition('.')[2]}-{v}" for n, v in values.items()))[:LONGEST]
        own = {"output.runs": str(folder), "output.name": f"{number:02d}-{readable}", "data.cache": str(cache)}
        rows.append(Row(values, configs.load(files, [*flags, *values.items(), *own.items()])))
    return rows


def figures(run: Run) -> dict[str, float]:
    """What a run told of itself, by name: the smoothed loss, how far norms have drifted, and the lowest loss on held-out pictures."""
    told, loss = events.read(run.events), None
    steps = events.steps_of(told)
    for step in steps:
        loss = events.smoothed(loss, step.loss)
    found = {"loss": loss, "norm drift": steps[-1].embedding_norm_drift if steps else None, "held out": held_out(told)}
    return {name: value for name, value in found.items() if value is not None}


def held_out(told: Iterable[events.Event], until: int = LARGEST) -> float | None:
    """The lowest loss on held-out pictures up to a step, but for that of the base model."""
    return min((event.loss for event in told if isinstance(event, events.Validated) and 0 < event.step <= until), default=None)


def measured(file: Path) -> dict[str, float]:
    """What the oracle said of a LoRA file for the embedded model: how often its concept is right, and what was known before; nothing
    before it did, or of a concept that it does not know."""
    try:
        found: dict[str, dict[str, float]] = json.loads(measured_in(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return {"concept": found["concept"]["kind"], "kept": found["base prompts"]["kind"]} if "concept" in found else {}


def measured_in(file: Path) -> Path:
    """Where that stands."""
    return file.with_suffix(".json")


def table(rows: Sequence[Row], found: Mapping[str, Mapping[str, float]]) -> str:
    """As Markdown; `found`: figures by a row's label. What a row lacks is left empty."""
    options = list(rows[0].values)
    names = list(dict.fromkeys(name for of in found.values() for name in of))
    lines = [f"| {' | '.join((*options, *names))} |", "|" + "---|" * (len(options) + len(names))]
    for row in rows:
        own = found.get(row.label, {})
        cells = [*row.values.values(), *(cell(own[name]) if name in own else "" for name in names)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cell(figure: float) -> str:
    return str(figure) if isinstance(figure, int) else f"{figure:.4g}"


def pareto(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Names of the points that no other is at least as good as in both figures and better in one; larger is better. By the first figure."""

    def beaten(one: tuple[float, float], others: Iterable[tuple[float, float]]) -> bool:
        return any(other != one and other[0] >= one[0] and other[1] >= one[1] for other in others)

    return sorted((name for name, point in points.items() if not beaten(point, points.values())), key=lambda name: points[name])


# ---------------------------------------------------------------- successive halving (Jamieson & Talwalkar 2016)


def halvings(share: str) -> list[float]:
    """Shares of the steps after each of which half of the rows go: this one, and its doublings below all of them. Raises ConfigError."""
    try:
        found = [float(share)]
    except ValueError:
        found = [0.0]
    if not 0 < found[0] < 1:
        raise ConfigError(
            f"--halve: {share!r} is not a number between 0 and 1, the share of the steps after which the worse half is dropped first."
        )
    while 2 * found[-1] < 1:
        found.append(2 * found[-1])
    return found


def step_at(config: Config, share: float) -> int:
    return max(1, round(share * config.train.steps))


def came_to(run: Run, step: int) -> int | None:
    """Where the run stopped or ended when it had taken so many steps; None where it has not come so far."""
    ends = [event.step for event in events.read(run.events) if isinstance(event, events.Stopped | events.Finished)]
    return min((end for end in ends if end >= step), default=None)


def better_half(scores: Mapping[str, float]) -> list[str]:
    """The names with the largest scores, one more of an odd number; of equal ones those that stand first."""
    return sorted(scores, key=lambda name: -scores[name])[: (len(scores) + 1) // 2]


def yardstick(config: Config) -> object:
    """What the loss on held-out pictures depends on beside the LoRA: where this differs, losses cannot be compared."""
    apart = ("prior", "embedding_norm", "pinned", "regularisation")  # terms that are no part of it
    loss = {key: value for key, value in config.loss if not key.startswith(apart)}
    train = config.train
    return config.model, config.data, loss, train.seed, train.batch_size, train.accumulation, train.precision


def require_judge(configs: Sequence[Config], share: float) -> None:
    """Raises ConfigError where nothing could say, from this share of the steps on, which rows are the better ones."""
    if not any(config.data.holdout for config in configs):
        if any(config.model.base != "mini" for config in configs):
            raise ConfigError("--halve judges rows by the loss on pictures that are held out: hold some out, as with --data.holdout 3.")
        return
    if any(yardstick(config) != yardstick(configs[0]) for config in configs):
        raise ConfigError(
            "--halve compares losses on held-out pictures, and rows differ in what these depend on: vary [lora], [optimizer], loss.prior, "
            "loss.embedding_norm and the like alone."
        )
    for config in configs:
        if config.train.validate_every > (step := step_at(config, share)):
            raise ConfigError(f"--halve {share:g} first compares rows after step {step}: set train.validate_every to {step} or less.")
