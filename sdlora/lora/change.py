"""What an adapter changes of one module, as files hold it: the meeting point of training, export, merge and analysis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """A low-rank update as WebUI files write it: delta = alpha / R * up.flatten(1) @ down.flatten(1), with R = down.shape[0]."""

    down: Tensor  # (R, I) or (R, I, kh, kw)
    up: Tensor  # (O, R) or (O, R, 1, 1)
    alpha: float

    def delta(self) -> Tensor:
        """(O, I) or (O, I, kh, kw), fp32."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return (self.alpha / self.down.shape[0] * product).view(self.up.shape[0], *self.down.shape[1:])

    def norm(self) -> float:
        """Frobenius norm of the delta."""
        return abs(self.alpha / self.down.shape[0]) * float(product_norm(self.up.double(), self.down.double()))


def product_norm(up: Tensor, down: Tensor) -> Tensor:
    """Frobenius norm of up @ down, of matrices (O, R) and (R, I) or convolutions of these: |up down|^2 = trace(up^T up down down^T), so
    that no (O, I) matrix is made."""
    up, down = up.flatten(1), down.flatten(1)
    return ((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt()


@dataclass(frozen=True)
class Change:
    """Exact change of a module's weight and bias; what is None is not changed."""

    factors: Factors | None = None
    dora_scale: Tensor | None = None  # (1, I) or (1, I, 1, 1): DoRA's magnitude of each input channel; (O, 1), (O, 1, 1, 1): of outputs
    weight: Tensor | None = None  # added to the weight: (O, I), (O, I, kh, kw), or (C,) of a norm
    bias: Tensor | None = None  # added to the bias: (O,) or (C,)

    @property
    def is_plain(self) -> bool:
        """A plain LoRA: the kind of change that every program applies rightly."""
        return self.factors is not None and self.dora_scale is None and self.weight is None and self.bias is None

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Of the weight that is changed, as far as the change can tell: a LoRA of a 1x1 convolution fits a linear layer, too."""
        if self.weight is not None:
            return tuple(self.weight.shape)
        return None if self.factors is None else (len(self.factors.up), *self.factors.down.shape[1:])

    def fits(self, weight: Sequence[int], bias: Sequence[int] | None) -> bool:
        """Whether a module with a weight and a bias of these shapes can be changed so. A kernel of 1x1 may be left out."""
        matrix, ones = (weight[0], math.prod(weight[1:])), [1] * (len(weight) - 2)
        if self.factors is not None:
            down, up, _ = self.factors
            if up.shape[1] != len(down) or (len(up), down[0].numel()) != matrix:
                return False
        if self.weight is not None and (len(self.weight), self.weight[0].numel()) != matrix:
            return False
        axes = ((1, weight[1], *ones), (weight[0], 1, *ones)) if len(weight) > 1 else ()
        if self.dora_scale is not None and tuple(self.dora_scale.shape) not in axes:
            return False
        return self.bias is None or (bias is not None and tuple(self.bias.shape) == tuple(bias))

    def delta(self, base: Tensor) -> Tensor:
        """Change of a weight `base`, fp32."""
        base = base.detach().float()
        total = torch.zeros_like(base)
        if self.factors is not None:
            total += self.factors.delta().view_as(base).to(base.device)
        if self.weight is not None:
            total += self.weight.float().view_as(base).to(base.device)
        if self.dora_scale is not None:
            adapted = base + total
            total = self.dora_scale.to(base.device) / channel_norms(adapted, self.dora_scale.shape) * adapted - base
        return total


def input_norms(weight: Tensor) -> Tensor:
    """L2 norm of each input channel's weights over all outputs (and kernel positions): (1, I) or (1, I, 1, 1), never quite zero.

    DoRA's column norm (Liu et al. 2024, eq. 2, with weights as (O, I)). A channel of zeros only has no direction: it stays zero whatever it
    is divided by.
    """
    return channel_norms(weight, (1, weight.shape[1], *[1] * (weight.dim() - 2)))


def channel_norms(weight: Tensor, shape: Sequence[int]) -> Tensor:
    """L2 norms over the axes that have one entry in `shape`, never quite zero: of outputs for (O, 1), as peft has it."""
    over = [axis for axis, entries in enumerate(shape) if entries == 1]
    return weight.float().square().sum(dim=over, keepdim=True).sqrt().clamp(min=torch.finfo(torch.float32).tiny)


class Triplets(NamedTuple):
    """Singular triplets of a change as a matrix, largest first."""

    u: Tensor  # (O, K)
    s: Tensor  # (K,)
    vh: Tensor  # (K, I)

    def energy(self) -> Tensor:
        """Squared singular values, in double precision: what they add up to is the squared norm."""
        return self.s.double().square()

    def rank_for(self, kept: float) -> int:
        """The fewest that hold the share `kept` of the squared norm; 1 at least."""
        # summed from the smallest: beside a large sum they would be lost
        left_out = self.energy().flip(0).cumsum(0).flip(0)[1:]
        return 1 + int((left_out > (1 - kept) * self.energy().sum()).sum())

    def factors(self, rank: int, shape: tuple[int, ...]) -> tuple[Factors, float]:
        """The nearest LoRA of this rank, or of all triplets where they are fewer, for a weight of this shape (Eckart & Young 1936), with
        alpha = rank, and its error: the norm of what is left out over the norm of the change."""
        energy = self.energy()
        rank = min(rank, len(energy))
        root = self.s[:rank].sqrt()
        down = (root[:, None] * self.vh[:rank]).float().view(rank, *shape[1:]).contiguous()
        up = (self.u[:, :rank] * root).float().view(-1, rank, *[1] * (len(shape) - 2)).contiguous()
        error = math.sqrt(float(energy[rank:].sum() / energy.sum())) if energy.any() else 0.0
        return Factors(down, up, float(rank)), error


def triplets_of_factors(factors: Factors) -> Triplets:
    """As many as the LoRA has ranks, in double precision. The small matrices of two QR decompositions have the product's singular values:
    no (O, I) matrix is made."""
    q_up, r_up = torch.linalg.qr(factors.up.double().flatten(1))
    q_down, r_down = torch.linalg.qr(factors.down.double().flatten(1).T)
    u, s, vh = torch.linalg.svd(factors.alpha / factors.down.shape[0] * r_up @ r_down.T)
    return Triplets(q_up @ u, s, vh @ q_down.T)


def triplets_of_matrix(delta: Tensor) -> Triplets:
    """Of (O, I) or (O, I, kh, kw), in fp32.

    From the eigenvectors of the smaller Gram matrix, onto which the matrix is projected: of any rank the result is as near as the best
    there is to seven digits, and all of them together give the matrix back. For 1280 x 11520 this takes a tenth of the time of a full
    SVD in double precision; a randomised SVD is hardly faster where the spectrum is as flat as a fine-tuned model's, and less near.
    """
    matrix = delta.float().flatten(1)
    wide = matrix.shape[0] <= matrix.shape[1]
    vectors = torch.linalg.eigh(matrix @ matrix.T if wide else matrix.T @ matrix).eigenvectors.flip(1)  # (K, K)
    projected = vectors.T @ matrix if wide else (matrix @ vectors).T  # (K, other side), rows of length s
    s = projected.double().norm(dim=1).float()
    # rounding may have left vectors of nearly equal values in another order
    order = s.argsort(descending=True, stable=True)
    vectors, s = vectors[:, order], s[order]
    others = projected[order] / s.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    return Triplets(vectors, s, others) if wide else Triplets(others.T, s, vectors.T)


def truncate(change: Change, base: Tensor, rank: int | None = None, kept: float = 0.9999) -> tuple[Factors, float]:
    """The nearest plain LoRA of at most `rank`, or of as many ranks as keep the share `kept` of the squared norm, and its error, see
    `Triplets.factors`. The bias is not looked at."""
    plain = change.is_plain and change.factors is not None
    triplets = triplets_of_factors(change.factors) if plain and change.factors else triplets_of_matrix(change.delta(base).cpu())
    return triplets.factors(triplets.rank_for(kept) if rank is None else rank, base.shape)
