"""What an adapter changes of one module, as files hold it: the meeting point of training, export, merge and analysis."""

from __future__ import annotations

import math
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
    dora_scale: Tensor | None = None  # (1, I) or (1, I, 1, 1): DoRA's magnitude of each input channel
    weight: Tensor | None = None  # added to the weight: (O, I), (O, I, kh, kw), or (C,) of a norm
    bias: Tensor | None = None  # added to the bias: (O,) or (C,)

    @property
    def is_plain(self) -> bool:
        """A plain LoRA: the kind of change that every program applies rightly."""
        return self.factors is not None and self.dora_scale is None and self.weight is None and self.bias is None

    def delta(self, base: Tensor) -> Tensor:
        """Change of a weight `base`, fp32."""
        base = base.detach().float()
        total = torch.zeros_like(base)
        if self.factors is not None:
            total += self.factors.delta().view_as(base).to(base.device)
        if self.weight is not None:
            total += self.weight.float().to(base.device)
        if self.dora_scale is not None:
            adapted = base + total
            total = self.dora_scale.to(base.device) / input_norms(adapted) * adapted - base
        return total


def input_norms(weight: Tensor) -> Tensor:
    """L2 norm of each input channel's weights over all outputs (and kernel positions): (1, I) or (1, I, 1, 1), never quite zero.

    DoRA's column norm (Liu et al. 2024, eq. 2, with weights as (O, I)). A channel of zeros only has no direction: it stays zero whatever it
    is divided by.
    """
    squares = weight.float().square().sum(dim=(0, *range(2, weight.dim())), keepdim=True)
    return squares.sqrt().clamp(min=torch.finfo(torch.float32).tiny)


def truncate(change: Change, base: Tensor, rank: int | None = None, kept: float = 0.9999) -> tuple[Factors, float]:
    """The nearest plain LoRA of at most `rank`, or of as many ranks as keep the share `kept` of the squared norm, and its error:
    the norm of what is left out over the norm of the change. Eckart & Young 1936; the bias is not looked at.
    """
    if change.is_plain and change.factors is not None:
        # The small matrices of two QR decompositions have the product's singular values: no (O, I) matrix is made.
        q_up, r_up = torch.linalg.qr(change.factors.up.double().flatten(1))
        q_down, r_down = torch.linalg.qr(change.factors.down.double().flatten(1).T)
        u, s, vh = torch.linalg.svd(change.factors.alpha / change.factors.down.shape[0] * r_up @ r_down.T)
        u, vh = q_up @ u, vh @ q_down.T
    else:
        u, s, vh = torch.linalg.svd(change.delta(base).cpu().double().flatten(1), full_matrices=False)
    energy = s.square()
    if rank is None:
        # What rounding left behind does not count as a rank.
        missing = energy.sum() - energy.cumsum(0)
        rank = 1 + int((missing > (1 - kept) * energy.sum()).sum())
    rank = min(rank, len(s))
    root = s[:rank].sqrt()
    down, up = (root[:, None] * vh[:rank]).float(), (u[:, :rank] * root).float()
    total = float(energy.sum())
    error = math.sqrt(float(energy[rank:].sum()) / total) if total else 0.0
    down = down.view(rank, *base.shape[1:]).contiguous()
    up = up[:, :, None, None].contiguous() if base.dim() == 4 else up.contiguous()
    return Factors(down, up, float(rank)), error
