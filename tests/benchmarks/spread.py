"""How benchmarks print ratios: two columns of their tables."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median, quantiles


def spread(ratios: Sequence[float]) -> str:
    """The median, and the quartiles."""
    low, _, high = quantiles(ratios, n=4)
    return f"{median(ratios):.2f} | {low:.2f} to {high:.2f}"
