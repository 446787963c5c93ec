"""Which layers a LoRA chose to change: learned alphas as numbers and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sdlora.lora.targets import block_of

KINDS = {
    "self-attention": ".attn1.",
    "cross-attention": ".attn2.",
    "feed-forward": ".ff.",
    "text attention": ".self_attn.",
    "text feed-forward": ".mlp.",
}
OTHER = "convolutions and projections"


def kind_of(name: str) -> str:
    return next((kind for kind, part in KINDS.items() if part in name), OTHER)


def histogram(alphas: Mapping[str, float], bins: int = 10) -> list[tuple[float, float, int]]:
    """Edges and counts of equal intervals from the smallest to the largest alpha."""
    low, high = min(alphas.values()), max(alphas.values())
    counts = [0] * bins
    for alpha in alphas.values():
        counts[min(bins - 1, int((alpha - low) / (high - low) * bins)) if high > low else 0] += 1
    return [(low + (high - low) * k / bins, low + (high - low) * (k + 1) / bins, count) for k, count in enumerate(counts)]


def plot(alphas: Mapping[str, float], path: Path, title: str) -> None:
    """A dot for each layer, a row for each block in the model's order, a colour for each kind of layer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    order = ["te", "te2", "unet", "down", "mid", "up"]
    blocks = sorted({block_of(name) for name in alphas}, key=lambda b: (order.index(b.partition(".")[0]), int(b.partition(".")[2] or 0)))
    figure = Figure(figsize=(8, 1.6 + 0.28 * len(blocks)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for kind in (*KINDS, OTHER):
        names = [name for name in alphas if kind_of(name) == kind]
        if names:
            # dots of one row are spread a little, so that equal alphas can be told apart
            rows = [blocks.index(block_of(name)) + 0.5 * ((number * 0.618) % 1 - 0.5) for number, name in enumerate(names)]
            axes.scatter([alphas[name] for name in names], rows, s=14, alpha=0.8, label=kind, linewidths=0)
    middle = sorted(alphas.values())[len(alphas) // 2]
    axes.axvline(middle, color="0.6", linewidth=0.8, zorder=0)
    axes.set_yticks(range(len(blocks)), blocks)
    axes.invert_yaxis()
    axes.set_xlabel("learned alpha (line: median)")
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    figure.savefig(path, dpi=120)
