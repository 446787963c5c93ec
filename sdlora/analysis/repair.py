"""LoRAs with less of what harms: intruder dimensions scaled down, or what may be noise taken out."""

from __future__ import annotations

import math

import torch

from sdlora.analysis.intruders import Layer
from sdlora.lora.change import Change, Factors, Triplets, triplets_of_factors, triplets_of_matrix
from sdlora.lora.combine import concatenate


def scale_intruders(layer: Layer, threshold: float, scale: float) -> tuple[Change, int]:
    """The change with which each intruder's singular value is `scale` times what it was, and how many intruders there are: a LoRA of rank R
    becomes one of rank R + intruders, exactly, and all other changes a delta beside one (Shuttleworth et al. 2024, section 5: W plus
    (scale - 1) sigma u v^T for each intruder). sigma v^T is u^T W, so that no right singular vector is asked for."""
    u = layer.directions.u[:, layer.intruders(threshold)].float()  # (O, J)
    change = layer.change
    if change.dora_scale is not None:  # whose factors alone are no delta
        change = Change(weight=change.delta(layer.base), bias=change.bias)
    if not u.shape[1]:
        return change, 0
    rows = u.T @ layer.base.float().flatten(1)  # (J, I), of u^T W
    if change.factors is not None:
        down, up, alpha = change.factors
        rows += (u.T @ up.float().flatten(1)) @ down.float().flatten(1) * (alpha / len(down))
    if change.weight is not None:
        rows += u.T @ change.weight.float().flatten(1)
    down = rows.view(-1, *layer.base.shape[1:])
    up = u.reshape(*u.shape, *[1] * (layer.base.dim() - 2))
    return concatenate([(change, 1.0), (Change(Factors(down, up, float(len(down)))), scale - 1)]), u.shape[1]


def hard_threshold(change: Change) -> tuple[Change | None, Triplets, int]:
    """The change without the singular values that noise alone could make, None where that is all; all of its triplets, and how many stay.

    Gavish & Donoho 2014, "The Optimal Hard Threshold for Singular Values is 4/sqrt(3)": of a matrix with noise of unknown level, values
    up to omega(beta) times their median go, beta being the smaller side over the larger. A delta of rank R has only R values that are not
    zero, and as much noise as a matrix of R rows: that is taken for its smaller side. DoRA's delta is not known without the base: it must
    be folded.
    """
    shape = change.shape
    assert shape is not None
    plain = change.factors is not None and change.weight is None
    triplets = triplets_of_factors(change.factors) if plain and change.factors else triplets_of_matrix(change.delta(torch.zeros(shape)))
    beta = len(triplets.s) / max(shape[0], math.prod(shape[1:]))
    kept = int((triplets.s > threshold_over_median(min(beta, 1.0)) * triplets.s.median()).sum())
    if not kept:
        return None, triplets, 0
    factors, _ = triplets.factors(kept, shape)
    return Change(factors, bias=change.bias), triplets, kept


def threshold_over_median(beta: float) -> float:
    """omega(beta): Gavish & Donoho's threshold for known noise (their eq. 11) over the root of the Marchenko-Pastur law's median."""
    known = math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta**2 + 14 * beta + 1)))
    return known / math.sqrt(_marchenko_pastur_median(beta))


def _marchenko_pastur_median(beta: float, pieces: int = 20_000) -> float:
    """Of the law's density sqrt((b - t)(t - a)) / (2 pi beta t) between a and b = (1 -+ sqrt(beta))^2, by the midpoint rule over the angle
    of t, in which the density is smooth."""
    angles = (torch.arange(pieces, dtype=torch.float64) + 0.5) * math.pi / pieces
    t = 1 + beta - 2 * math.sqrt(beta) * angles.cos()  # rising from a to b
    mass = (angles.sin().square() / t).cumsum(0)
    return float(t[torch.searchsorted(mass, mass[-1] / 2)])
