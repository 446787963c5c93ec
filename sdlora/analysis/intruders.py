"""Intruder dimensions: large singular directions of an adapted weight that the base weight does not have.

Shuttleworth et al. 2024, "LoRA vs Full Fine-tuning: An Illusion of Equivalence" (arXiv 2410.21228): they come with LoRA, hardly with
full fine-tuning, and go together with forgetting.
"""

from __future__ import annotations

import torch
from torch import Tensor

TOP = 10  # of the adapted weight's left singular vectors are looked at, as in the paper's figures
THRESHOLD = 0.5  # an intruder's |cosine| with every left singular vector of the base lies below this


def similarities(base: Tensor, adapted: Tensor, top: int = TOP) -> Tensor:
    """For each of the `top` largest left singular vectors of `adapted`, its largest |cosine| with any of the base's: (top,) in 0..1.

    Weights (O, ...), flattened to (O, I). In fp64: vectors of nearly equal singular values mix in fp32.
    """
    of_base = torch.linalg.svd(base.double().flatten(1), full_matrices=False).U
    of_adapted = torch.linalg.svd(adapted.double().flatten(1), full_matrices=False).U
    cosines: Tensor = of_adapted[:, :top].T @ of_base
    return cosines.abs().amax(dim=1)


def count_intruders(base: Tensor, adapted: Tensor, top: int = TOP, threshold: float = THRESHOLD) -> int:
    """How many of the `top` largest left singular vectors of `adapted` are intruders."""
    return int((similarities(base, adapted, top) < threshold).sum())
