"""Which timesteps a batch trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Distribution:
    """Which timesteps are trained how often: from first to last (both included), evenly, or by a logit-normal density."""

    first: int = 0
    last: int = 999
    logit_normal: tuple[float, float] | None = None  # mean and deviation; more mass in the middle (Esser et al. 2024, eq. 19)

    def at(self, quantile: Tensor) -> Tensor:
        """The timestep below which this share of all draws falls: (B,) in 0..1 -> (B,) int64."""
        if self.logit_normal is not None:
            mean, deviation = self.logit_normal
            quantile = torch.sigmoid(mean + deviation * torch.special.ndtri(quantile))
        count = self.last - self.first + 1
        return self.first + (quantile * count).long().clamp(max=count - 1)


EVEN = Distribution()


def stratified(seeds: Sequence[int], first: int, total: int, distribution: Distribution = EVEN) -> Tensor:
    """One timestep a sample: sample k of a step of `total` samples draws from the k-th of `total`
    equally likely intervals, so that a step never trains high noise alone. Less variance, same mean (Kingma et al. 2021, appendix I.1).

    `seeds` are those of the batch's samples, the first of which is number `first` of the step. (B,) int64.
    """
    shares = torch.tensor([torch.rand((), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds])
    strata = torch.arange(first, first + len(seeds))
    return distribution.at((strata + shares) / total)
