"""LoRAs of lower rank: each layer's change cut to the ranks that a limit leaves it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from sdlora.lora.change import Change, Factors, Triplets, triplets_of_factors, triplets_of_matrix


@dataclass(frozen=True)
class Limit:
    """What is kept of each layer's change. A largest error of e is a share of 1 - e^2."""

    rank: int | None = None  # at most
    kept: float = 1.0  # share of the squared norm, which as few ranks as can hold


@dataclass(frozen=True)
class Cut:
    """What became of a layer."""

    name: str
    before: int  # rank; the weight's smaller side where it was a full delta
    rank: int
    norm: float  # of the whole change (Frobenius)
    error: float  # the norm of what was left out, over `norm`


def total_error(cuts: Iterable[Cut]) -> float:
    """The norm of all that was left out over the norm of the change of all layers."""
    squares = [(cut.norm**2, (cut.error * cut.norm) ** 2) for cut in cuts]
    whole = math.fsum(norm for norm, _ in squares)
    return math.sqrt(math.fsum(lost for _, lost in squares) / whole) if whole else 0.0


def resize(name: str, change: Change, limit: Limit) -> tuple[Change, Cut | None]:
    """A layer's change within the limit; None where it has no matrix to cut, as a norm's. DoRA's delta is not known without the base
    weight: it must have been folded."""
    shape = change.shape
    if shape is None or len(shape) == 1:
        return change, None
    if change.weight is None and change.factors is not None:
        triplets, before = triplets_of_factors(change.factors), change.factors.down.shape[0]
    else:
        triplets, before = triplets_of_matrix(change.delta(torch.zeros(shape))), min(shape[0], math.prod(shape[1:]))
    factors, cut = cut_triplets(name, triplets, before, shape, limit)
    return replace(change, factors=factors, weight=None), cut


def cut_triplets(name: str, triplets: Triplets, before: int, shape: tuple[int, ...], limit: Limit) -> tuple[Factors, Cut]:
    """The LoRA, for a weight of this shape, that the limit leaves of a change of rank `before`."""
    rank = triplets.rank_for(limit.kept)
    factors, error = triplets.factors(rank if limit.rank is None else min(rank, limit.rank), shape)
    return factors, Cut(name, before, factors.down.shape[0], math.sqrt(float(triplets.energy().sum())), error)
