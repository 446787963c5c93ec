"""Which timesteps a batch trains."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def stratified(seeds: Sequence[int], first: int, total: int, count: int = 1000) -> Tensor:
    """One timestep a sample, uniform over `count` as a whole: sample k of a step of `total` samples draws from the k-th of `total`
    equal intervals, so that a step never trains high noise alone. Less variance, same mean (Kingma et al. 2021, appendix I.1).

    `seeds` are those of the batch's samples, the first of which is number `first` of the step. (B,) int64.
    """
    shares = torch.tensor([torch.rand((), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds])
    strata = torch.arange(first, first + len(seeds))
    return ((strata + shares) / total * count).long().clamp(max=count - 1)
