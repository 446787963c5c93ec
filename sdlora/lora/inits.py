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
    return _from_triplets(u[:, :rank], s[:rank], vh[:rank], rank, scale)


def milora(weight: Tensor, rank: int, scale: float, generator: torch.Generator) -> Start:
    """As `pissa`, from the R *smallest* singular triplets (Wang et al. 2024, MiLoRA): what the base model knows best lies in the
    others, and learning starts where it costs least."""
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    return _from_triplets(u[:, -rank:], s[-rank:], vh[-rank:], rank, scale)


def _from_triplets(u: Tensor, s: Tensor, vh: Tensor, rank: int, scale: float) -> Start:
    """Matrices with scale * up @ down = u diag(s) vh, the singular values shared out by their roots; surplus ranks stay zero.
    A negative scale, as a learned alpha may leave it, puts its sign into up."""
    kept = s.shape[0]
    root = (s / abs(scale)).sqrt()
    down, up = torch.zeros(rank, vh.shape[1]), torch.zeros(u.shape[0], rank)
    down[:kept] = (root[:, None] * vh).float()
    up[:, :kept] = (math.copysign(1, scale) * u * root).float()
    return Start(down, up, subtract=True)


def olora(weight: Tensor, rank: int, scale: float, generator: torch.Generator) -> Start:
    """Up from the first R columns of Q, down from the first R rows of R, where weight = Q R (Büyükakyüz 2024, OLoRA)."""
    q, r = torch.linalg.qr(weight.double())
    kept = min(rank, q.shape[1])
    down, up = torch.zeros(rank, weight.shape[1]), torch.zeros(weight.shape[0], rank)
    down[:kept], up[:, :kept] = r[:kept].float(), q[:, :kept].float()
    return Start(down, up, subtract=True)


def down_zero(weight: Tensor, rank: int, scale: float, generator: torch.Generator) -> Start:
    """Up uniform in +-1/sqrt(R), down zero: "Init[B]" of Hayou et al. 2024, "The Impact of Initialization on LoRA Finetuning Dynamics"."""
    bound = 1 / math.sqrt(rank)
    up = torch.empty(weight.shape[0], rank).uniform_(-bound, bound, generator=generator)
    return Start(torch.zeros(rank, weight.shape[1]), up)


def orthogonal(weight: Tensor, rank: int, scale: float, generator: torch.Generator) -> Start:
    """Both matrices random, and their product zero: down reaches one half of the R hidden directions, up reads the other half
    (as peft's `init_lora_weights="orthogonal"`). Nothing is subtracted. At rank 1 this is down random, up zero."""
    hidden = torch.linalg.qr(torch.empty(rank, rank, dtype=torch.float64).normal_(generator=generator)).Q
    written, read = hidden[0::2], hidden[1::2]
    down = written.T @ torch.empty(written.shape[0], weight.shape[1], dtype=torch.float64).normal_(generator=generator) / 10
    up = torch.empty(weight.shape[0], read.shape[0], dtype=torch.float64).normal_(generator=generator) @ read / 10
    return Start(down.float().contiguous(), up.float().contiguous())


INITS: dict[str, Callable[[Tensor, int, float, torch.Generator], Start]] = {
    "kaiming": kaiming,
    "gaussian": gaussian,
    "orthonormal": orthonormal,
    "orthogonal": orthogonal,
    "down_zero": down_zero,
    "pissa": pissa,
    "milora": milora,
    "olora": olora,
}
