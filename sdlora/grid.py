"""A grid of runs over values of options: which they are, where they lie, and how they compare. Nothing here imports torch."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdlora import config as configs
from sdlora import events
from sdlora import run as runs
from sdlora.config import Config
from sdlora.errors import ConfigError
from sdlora.run import Run

Flags = Sequence[tuple[str, str]]
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
    return name, values


def rows_of(files: Sequence[Path], flags: Flags, grid: Sequence[tuple[str, Sequence[str]]]) -> list[Row]:
    """Every combination, the last option's values changing fastest, each a run in the folder NAME-sweep beside where NAME would be.
    Raises ConfigError."""
    common = configs.load(files, flags)
    folder = common.output.runs / f"{common.output.name}-sweep"
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
    unseen = [event.loss for event in told if isinstance(event, events.Validated) and event.step]
    found = {"loss": loss, "norm drift": steps[-1].embedding_norm_drift if steps else None, "held out": min(unseen, default=None)}
    return {name: value for name, value in found.items() if value is not None}


def table(rows: Sequence[Row], found: Mapping[str, Mapping[str, float]]) -> str:
    """As Markdown; `found`: figures by a row's label. What a row lacks is left empty."""
    options = list(rows[0].values)
    names = list(dict.fromkeys(name for of in found.values() for name in of))
    lines = [f"| {' | '.join((*options, *names))} |", "|" + "---|" * (len(options) + len(names))]
    for row in rows:
        own = found.get(row.label, {})
        cells = [*row.values.values(), *(f"{own[name]:.4g}" if name in own else "" for name in names)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def pareto(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Names of the points that no other is at least as good as in both figures and better in one; larger is better. By the first figure."""

    def beaten(one: tuple[float, float], others: Iterable[tuple[float, float]]) -> bool:
        return any(other != one and other[0] >= one[0] and other[1] >= one[1] for other in others)

    return sorted((name for name, point in points.items() if not beaten(point, points.values())), key=lambda name: points[name])
