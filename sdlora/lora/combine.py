"""Several LoRAs as one: what they change of a layer, each times its strength, added up exactly or thinned out first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdlora.lora.change import Change, Factors
from sdlora.lora.formats import LoraFile
from sdlora.lora.lorafile import check_alike
from sdlora.lora.resize import Cut, Limit, resize
from sdlora.lora.targets import seeded_generator

Weighted = tuple[Change, float]
"""A change and its strength. DoRA's delta is not known without the base weight: it must have been folded."""


@dataclass(frozen=True)
class Thinning:
    """What is taken off the deltas before they are added up, so that they get less into each other's way."""

    drop: float = 0.0  # share of each delta's numbers that DARE drops
    trim: float | None = None  # share that TIES keeps, the largest; None for a plain sum
    seed: int = 0


def combine(
    files: Sequence[LoraFile], strengths: Sequence[Mapping[str, float]], thinning: Thinning | None, limit: Limit | None
) -> Iterator[tuple[str, Change, Cut | None]]:
    """Every layer of any of the files with the sum of their changes, each times its strength, exactly where there is neither thinning
    nor limit; with what the limit cut off. Raises WeightsError where the files are for different models."""
    check_alike(files)
    for name in dict.fromkeys(name for file in files for name in file.layers):
        changes = [(file.change(name), own[name]) for file, own in zip(files, strengths, strict=True) if name in file.layers]
        change = concatenate(changes) if thinning is None else thin_out(name, changes, thinning)
        yield name, *((change, None) if limit is None else resize(name, change, limit))


def concatenate(changes: Sequence[Weighted]) -> Change:
    """The sum of strength * change, exactly: the matrices stand side by side, and their ranks add up."""
    changes = [(change, strength) for change, strength in changes if strength]
    factors = [(change.factors, strength) for change, strength in changes if change.factors is not None]
    joined = None
    if factors:
        rank = sum(of.down.shape[0] for of, _ in factors)
        down = torch.cat([of.down.float() for of, _ in factors])
        up = torch.cat([of.up.float() * (strength * of.alpha / of.down.shape[0]) for of, strength in factors], dim=1)
        joined = Factors(down, up, float(rank))
    weights = [strength * change.weight.float() for change, strength in changes if change.weight is not None]
    biases = [strength * change.bias.float() for change, strength in changes if change.bias is not None]
    return Change(joined, weight=_sum(weights), bias=_sum(biases))


def thin_out(name: str, changes: Sequence[Weighted], thinning: Thinning) -> Change:
    """As `concatenate`, with the deltas of a layer's matrix thinned out: a full delta, no longer of low rank."""
    whole = concatenate(changes)
    if whole.shape is None or len(whole.shape) == 1:
        return whole
    deltas = []
    for number, (change, strength) in enumerate(changes):
        if strength and change.shape is not None:
            delta = strength * change.delta(torch.zeros(whole.shape))
            delta = drop(delta, thinning.drop, seeded_generator(thinning.seed, f"drop {number} {name}"))
            deltas.append(delta if thinning.trim is None else trim(delta, thinning.trim))
    total = torch.stack(deltas).sum(dim=0) if thinning.trim is None else elect(deltas)
    return Change(weight=total, bias=whole.bias)


def drop(delta: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Zero for a random share (0..1) of the numbers, and 1 / (1 - share) times the rest, which keeps the mean: DARE (Yu et al. 2024,
    "Language Models are Super Mario", eq. 3)."""
    return delta * (torch.rand(delta.shape, generator=generator) >= share) / (1 - share)


def trim(delta: Tensor, kept: float) -> Tensor:
    """Zero for all but the share `kept` of the numbers, the largest by magnitude. First step of TIES (Yadav et al. 2023, "TIES-Merging"),
    here of each layer by itself and not of all together."""
    flat = delta.flatten()
    largest = flat.abs().topk(max(1, round(kept * len(flat)))).indices
    return torch.zeros_like(flat).index_copy(0, largest, flat[largest]).view_as(delta)


def elect(deltas: Sequence[Tensor]) -> Tensor:
    """For each number the mean of the deltas that have the sign which outweighs the other; zeros have none. Second and third step of
    TIES: elect sign, disjoint mean."""
    stacked = torch.stack(list(deltas))  # (N, ...)
    agrees = (stacked.sign() == stacked.sum(dim=0).sign()) & (stacked != 0)
    return (stacked * agrees).sum(dim=0) / agrees.sum(dim=0).clamp(min=1)


def _sum(tensors: Sequence[Tensor]) -> Tensor | None:
    return torch.stack(list(tensors)).sum(dim=0) if tensors else None
