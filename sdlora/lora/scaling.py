"""How alpha becomes the number that a layer's update is multiplied by."""

from __future__ import annotations

import math
from collections.abc import Callable


def standard(rank: int) -> float:
    """alpha / rank (Hu et al. 2021): what WebUIs compute from a file."""
    return 1 / rank


def rank_stabilised(rank: int) -> float:
    """alpha / sqrt(rank) (Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA"): the size of the
    update's output does not shrink as the rank grows."""
    return 1 / math.sqrt(rank)


# From the rank to the scale of alpha 1.
SCALINGS: dict[str, Callable[[int], float]] = {"standard": standard, "rank_stabilised": rank_stabilised}
