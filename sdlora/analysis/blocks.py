"""Numbers of layers by block and kind, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdlora.lora.targets import block_of

KINDS = {
    "self-attention": ".attn1.",
    "cross-attention": ".attn2.",
    "feed-forward": ".ff.",
    "text attention": ".self_attn.",
    "text feed-forward": ".mlp.",
}
OTHER = "convolutions and projections"
ORDER = ("te", "te2", "unet", "down", "mid", "up")  # of blocks


def in_order(blocks: Sequence[str]) -> list[str]:
    """Each once, as a model runs through them."""
    return sorted(set(blocks), key=lambda block: (ORDER.index(block.partition(".")[0]), int(block.partition(".")[2] or 0)))


def kind_of(name: str) -> str:
    return next((kind for kind, part in KINDS.items() if part in name), OTHER)


def figure_of(width: float, height: float) -> Any:
    """An empty figure that is drawn to a file, inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plot(values: Mapping[str, float], path: Path, title: str, what: str) -> None:
    """A dot for each layer, by its readable name: a row for each block in the model's order, a colour for each kind of layer. `what` the
    values are stands below."""
    blocks = in_order([block_of(name) for name in values])
    figure = figure_of(8, 1.6 + 0.28 * len(blocks))
    axes = figure.subplots()
    for kind in (*KINDS, OTHER):
        names = [name for name in values if kind_of(name) == kind]
        if names:
            # dots of one row are spread a little, so that equal values can be told apart
            rows = [blocks.index(block_of(name)) + 0.5 * ((number * 0.618) % 1 - 0.5) for number, name in enumerate(names)]
            axes.scatter([values[name] for name in names], rows, s=14, alpha=0.8, label=kind, linewidths=0)
    middle = sorted(values.values())[len(values) // 2]
    axes.axvline(middle, color="0.6", linewidth=0.8, zorder=0)
    axes.set_yticks(range(len(blocks)), blocks)
    axes.invert_yaxis()
    axes.set_xlabel(f"{what} (line: median)")
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    figure.savefig(path, dpi=120)


def bars(rows: Sequence[tuple[str, str, float]], path: Path, title: str) -> None:
    """A bar for each (group, label, value), from top to bottom, a colour for each group."""
    figure = figure_of(8, 1 + 0.26 * len(rows))
    axes = figure.subplots()
    groups = list(dict.fromkeys(group for group, _, _ in rows))
    for number, group in enumerate(groups):
        places = [place for place, row in enumerate(rows) if row[0] == group]
        axes.barh(places, [rows[place][2] for place in places], color=f"C{number}", label=group)
    axes.set_yticks(range(len(rows)), [label for _, label, _ in rows], fontsize="small")
    axes.invert_yaxis()
    axes.set_title(title, fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    figure.savefig(path, dpi=120)


def front(points: Mapping[str, tuple[float, float]], best: Sequence[str], path: Path, across: str, up: str) -> None:
    """A labelled dot for each point, in shares, and a line through the `best`."""
    figure = figure_of(8, 6)
    axes = figure.subplots()
    axes.plot(*zip(*(points[name] for name in best), strict=True), color="0.7", zorder=0, label="Pareto front")
    for name, (x, y) in points.items():
        axes.scatter([x], [y], color="crimson" if name in best else "0.5", linewidths=0)
        axes.annotate(name, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
