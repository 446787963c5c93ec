"""The loss that keeps text-embedding norms near those of the base model.

A text encoder that is trained on a few captions drifts: its embeddings grow or shrink, and cross-attention, which has seen
norms in a narrow band only, answers with burnt pictures. The term pulls each token's norm towards what the base encoder gives
for the same caption; directions stay free, so the meaning can still be learned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def embedding_norms(prompt_embeds: Tensor) -> Tensor:
    """L2 norm of each token's embedding: (B, T, D) -> (B, T), in fp32."""
    return prompt_embeds.float().square().sum(dim=-1).sqrt()


def norm_loss(norms: Tensor, base_norms: Tensor) -> Tensor:
    """Mean squared relative deviation of norms (B, T) from those of the base encoder."""
    return (norms / base_norms - 1).square().mean()


def norm_drift(norms: Tensor, base_norms: Tensor) -> Tensor:
    """Mean absolute relative deviation, for the log: 0.05 means that norms are off by 5 % on average."""
    return (norms / base_norms - 1).abs().mean()


class BaseNorms:
    """Norms that the base encoder gives, computed once a caption and remembered."""

    def __init__(self, encode_with_base: Callable[[list[str]], Tensor]):
        """`encode_with_base`: captions -> (B, T, D), without adapters and without gradients."""
        self._encode = encode_with_base
        self._norms: dict[str, Tensor] = {}

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """(B, T) of these captions."""
        missing = list(dict.fromkeys(c for c in captions if c not in self._norms))
        for start in range(0, len(missing), 32):
            part = missing[start : start + 32]
            self._norms.update(zip(part, embedding_norms(self._encode(part)).detach(), strict=True))
        return torch.stack([self._norms[c] for c in captions])
