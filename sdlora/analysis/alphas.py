"""Which layers a LoRA chose to change: learned alphas as numbers."""

from __future__ import annotations

from collections.abc import Mapping


def histogram(alphas: Mapping[str, float], bins: int = 10) -> list[tuple[float, float, int]]:
    """Edges and counts of equal intervals from the smallest to the largest alpha."""
    low, high = min(alphas.values()), max(alphas.values())
    counts = [0] * bins
    for alpha in alphas.values():
        counts[min(bins - 1, int((alpha - low) / (high - low) * bins)) if high > low else 0] += 1
    return [(low + (high - low) * k / bins, low + (high - low) * (k + 1) / bins, count) for k, count in enumerate(counts)]
