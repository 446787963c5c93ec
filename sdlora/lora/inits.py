"""How a LoRA's matrices start. Every init leaves the model's output as it was."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Share of a weight's squared singular values that `svd_energy` starts from: half, so that what it takes outweighs all that it leaves.
# Weights differ widely in how many triplets that is (1 to 37 of at most 128 in the miniature's UNet), which a fixed rank cannot follow.
ENERGY = 0.5
# Wang et al. 2024, LoRA-GA, as in their published code: what is subtracted at the start has deviation alpha / GAMMA for inputs of
# variance 1 and rank-stabilised scaling.
GAMMA = 16
NOISE = 1e-6  # of the largest singular value: what is below it in a matrix that was summed in fp32 is rounding, not direction


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


def svd_energy(weight: Tensor, rank: int, scale: float, generator: torch.Generator) -> Start:
    """As `pissa`, from as few of the largest triplets as hold the share ENERGY of the weight's squared singular values, R at most; the
    other ranks start as `kaiming` does, free for what the weight does not have."""
    u, s, vh = singular_triplets(weight)
    shares = s.square().cumsum(0) / s.square().sum()
    kept = min(rank, int((shares < ENERGY).sum()) + 1)
    principal = _from_triplets(u[:, :kept], s[:kept], vh[:kept], rank, scale)
    return _beside_kaiming(weight, rank, scale, generator, principal.down[:kept], principal.up[:, :kept])


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


def gradient(weight: Tensor, statistic: Tensor, rank: int, scale: float, generator: torch.Generator) -> Start:
    """Down from the first R right singular vectors of the weight's gradient, `statistic` (O, I), up from the next R left ones, both
    times O^(1/4) / sqrt(GAMMA): LoRA-GA (Wang et al. 2024), meant for rank-stabilised scaling. The first step of plain gradient
    descent then goes along the best approximation of rank 2R to the full gradient. Where the gradient has fewer vectors, what is left
    of down and up starts as `kaiming` does.

    peft 0.21 departs from the paper: it leaves down at unit length and multiplies up by the gradient's singular values, so that the
    step is no longer that approximation, and its start depends on the unit of the loss.
    """
    u, _, vh = singular_triplets(statistic)
    size = weight.shape[0] ** 0.25 / math.sqrt(GAMMA)
    return _beside_kaiming(weight, rank, scale, generator, size * vh[:rank], size * u[:, rank : 2 * rank])


def activation(weight: Tensor, statistic: Tensor, rank: int, scale: float, generator: torch.Generator) -> Start:
    """Down from the first R right singular vectors of the layer's inputs, `statistic` (K, I), up zero: EVA (Paischer et al. 2024),
    without its moving of ranks between layers. Rows stay at unit length; the authors' code can also divide them by the roots of
    their singular values ("whiten"), which it does not by default. Ranks beyond K start as `kaiming` does."""
    return _beside_kaiming(weight, rank, scale, generator, statistic[:rank], weight.new_zeros(weight.shape[0], 0))


def contrast(weight: Tensor, statistic: Tensor, rank: int, scale: float, generator: torch.Generator) -> Start:
    """Down frozen at `statistic` (K, I), the directions that training captions use most for what pinned prompts use of them; up zero and
    alone trained. So prompts like the pinned ones hardly reach up, whatever it learns. Ranks beyond K start as `kaiming` does.

    LoRA-Null (Tang et al. 2025, arXiv 2503.02659) freezes down in the null space of the inputs that must not change, and InfLoRA (Liang
    and Li 2024, arXiv 2404.00228) where also the new task has inputs; few inputs of a UNet have a null space, so it is a ratio here.
    """
    return replace(activation(weight, statistic, rank, scale, generator), train_down=False)


def singular_triplets(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u (O, K), s (K), vh (K, I) of a matrix (O, I), largest first, in double precision, without those below NOISE.

    From the eigenvectors of the smaller Gram matrix: several times faster than a full SVD, and what squaring costs in precision
    lies below NOISE. Signs, which are arbitrary, are chosen so that the largest entry of each right vector is positive.
    """
    matrix = matrix.double()
    wide = matrix.shape[0] <= matrix.shape[1]
    squares, vectors = torch.linalg.eigh(matrix @ matrix.T if wide else matrix.T @ matrix)  # smallest first
    s = squares.flip(0).clamp(min=0).sqrt()
    kept = int((s > NOISE * s[0]).sum())
    s, vectors = s[:kept], vectors.flip(1)[:, :kept]
    u, vh = (vectors, (vectors / s).T @ matrix) if wide else (matrix @ (vectors / s), vectors.T)
    signs = vh.gather(1, vh.abs().argmax(dim=1, keepdim=True)).sign()  # (K, 1)
    return u * signs.T, s, vh * signs


def _beside_kaiming(weight: Tensor, rank: int, scale: float, generator: torch.Generator, rows: Tensor, columns: Tensor) -> Start:
    """Down begins with `rows` (k, I), up with `columns` (O, l), k >= l; what is left of them starts as `kaiming` does, so that every
    rank can learn."""
    start = kaiming(weight, rank, scale, generator)
    start.down[: rows.shape[0]] = rows.float()
    start.up[:, : columns.shape[1]] = columns.float()
    return replace(start, subtract=columns.shape[1] > 0)


INITS: dict[str, Callable[[Tensor, int, float, torch.Generator], Start]] = {
    "kaiming": kaiming,
    "gaussian": gaussian,
    "orthonormal": orthonormal,
    "orthogonal": orthogonal,
    "down_zero": down_zero,
    "pissa": pissa,
    "milora": milora,
    "svd_energy": svd_energy,
    "olora": olora,
}

# (weight (O, I), statistic, rank, scale, generator) -> start; `sdlora.lora.calibrate` collects the statistics
CALIBRATED: dict[str, Callable[[Tensor, Tensor, int, float, torch.Generator], Start]] = {
    "gradient": gradient,
    "activation": activation,
    "contrast": contrast,
}
