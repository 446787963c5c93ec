"""The loss that keeps text-embedding norms near those of the base model.

A text encoder that is trained on a few captions drifts: its embeddings grow or shrink, and cross-attention, which has seen
norms in a narrow band only, answers with burnt pictures. The term pulls each token's norm towards what the base encoder gives
for the same caption; directions stay free, so the meaning can still be learned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

HUBER_DELTA = 0.1  # of the base norm


def embedding_norms(prompt_embeds: Tensor, order: int = 2) -> Tensor:
    """L1 or L2 norm of each token's embedding: (B, T, D) -> (B, T), in fp32."""
    if order == 1:
        return prompt_embeds.float().abs().sum(dim=-1)
    return prompt_embeds.float().square().sum(dim=-1).sqrt()


def norm_loss(norms: Tensor, base_norms: Tensor, distance: str = "squared", relative: bool = True) -> Tensor:
    """Mean over tokens of the distance between norms (B, T) and those of the base encoder, by default squared and relative."""
    unit = base_norms if relative else torch.ones_like(base_norms)
    return DISTANCES[distance]((norms - base_norms) / unit, HUBER_DELTA * base_norms / unit).mean()


def huber(deviation: Tensor, delta: Tensor) -> Tensor:
    """Huber 1964, scaled to x squared within delta: beyond it 2 delta |x| - delta squared."""
    size = deviation.abs()
    return torch.where(size <= delta, size.square(), 2 * delta * size - delta.square())


# (deviation, where 'huber' turns straight) -> distance
DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "squared": lambda deviation, delta: deviation.square(),
    "absolute": lambda deviation, delta: deviation.abs(),
    "huber": huber,
}


def pinned_loss(prompt_embeds: Tensor, base_embeds: Tensor) -> Tensor:
    """How far whole embeddings (B, T, D) are from the base encoder's: squared distance of each token as a share of its base's
    squared norm, averaged. Unlike the norm term it holds directions too, so it is for prompts that should not change at all."""
    difference = (prompt_embeds.float() - base_embeds.float()).square().sum(dim=-1)
    return (difference / base_embeds.float().square().sum(dim=-1)).mean()


def norm_drift(norms: Tensor, base_norms: Tensor) -> Tensor:
    """Mean absolute relative deviation, for the log: 0.05 means that norms are off by 5 % on average."""
    return (norms / base_norms - 1).abs().mean()


class BaseNorms:
    """Norms that the base encoder gives, computed once a caption and remembered."""

    def __init__(self, encode_with_base: Callable[[list[str]], Tensor], order: int = 2):
        """`encode_with_base`: captions -> (B, T, D), without adapters and without gradients."""
        self._encode = encode_with_base
        self._order = order
        self._norms: dict[str, Tensor] = {}

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """(B, T) of these captions."""
        missing = list(dict.fromkeys(c for c in captions if c not in self._norms))
        for start in range(0, len(missing), 32):
            part = missing[start : start + 32]
            self._norms.update(zip(part, embedding_norms(self._encode(part), self._order).detach(), strict=True))
        return torch.stack([self._norms[c] for c in captions])
