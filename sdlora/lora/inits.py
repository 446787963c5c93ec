"""How a LoRA's matrices start. Every init leaves the model's output as it was."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Start:
    """Starting matrices of one layer. The adapter's update is scale * up @ down, less scale * up @ down at the start where `subtract`."""

    down: Tensor  # (R, I)
    up: Tensor  # (O, R)
    train_down: bool = True
    subtract: bool = False


def kaiming(weight: Tensor, rank: int, scale: float, generator: torch.Generator) -> Start:
    """Down uniform in +-1/sqrt(I), up zero: He et al. 2015 with a = sqrt(5), as in loralib and kohya's trainer."""
    bound = 1 / math.sqrt(weight.shape[1])
    down = torch.empty(rank, weight.shape[1]).uniform_(-bound, bound, generator=generator)
    return Start(down, torch.zeros(weight.shape[0], rank))


def gaussian(weight: Tensor, rank: int, scale: float, generator: torch.Generator) -> Start:
    """Down normal with deviation 1/R, up zero, as in diffusers' training scripts."""
    down = torch.empty(rank, weight.shape[1]).normal_(0, 1 / rank, generator=generator)
    return Start(down, torch.zeros(weight.shape[0], rank))


def orthonormal(weight: Tensor, rank: int, scale: float, generator: torch.Generator) -> Start:
    """Down frozen with orthonormal rows (all singular values 1), up zero and alone trained: LoRA-FA (Zhang et al. 2023)
    with the orthonormal projection that Zhu et al. 2024, "Asymmetry in Low-Rank Adapters", advise."""
    inputs = weight.shape[1]
    square = torch.linalg.qr(torch.empty(inputs, min(rank, inputs)).normal_(generator=generator)).Q
    down = torch.zeros(rank, inputs)  # a rank above the inputs' number leaves the surplus rows at zero
    down[: square.shape[1]] = square.T
    return Start(down, torch.zeros(weight.shape[0], rank), train_down=False)


def pissa(weight: Tensor, rank: int, scale: float, generator: torch.Generator) -> Start:
    """Both matrices from the R largest singular triplets of the weight, whose product is taken off again (Meng et al. 2024).

    scale * up @ down equals the principal part of the weight, so training starts with it and not with noise.
    """
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    kept = min(rank, s.shape[0])
    root = (s[:kept] / scale).sqrt()
    down, up = torch.zeros(rank, weight.shape[1]), torch.zeros(weight.shape[0], rank)
    down[:kept] = (root[:, None] * vh[:kept]).float()
    up[:, :kept] = (u[:, :kept] * root).float()
    return Start(down, up, subtract=True)


INITS: dict[str, Callable[[Tensor, int, float, torch.Generator], Start]] = {
    "kaiming": kaiming,
    "gaussian": gaussian,
    "orthonormal": orthonormal,
    "pissa": pissa,
}
