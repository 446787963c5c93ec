"""The losses that keep text embeddings near those of the base model: their norms, or all of them.

A text encoder that is trained on a few captions drifts: its embeddings grow or shrink, and cross-attention, which has seen
norms in a narrow band only, answers with burnt pictures. The term pulls each token's norm towards what the base encoder gives
for the same caption; directions stay free, so the meaning can still be learned.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

HUBER_DELTA = 0.1  # of the base norm
AT_ONCE = 32  # prompts that are encoded together


def embedding_norms(prompt_embeds: Tensor, order: int = 2) -> Tensor:
    """L1 or L2 norm of each token's embedding: (B, T, D) -> (B, T), in fp32."""
    if order == 1:
        return prompt_embeds.float().abs().sum(dim=-1)
    return prompt_embeds.float().square().sum(dim=-1).sqrt()


def norm_loss(
    norms: Tensor,
    base_norms: Tensor,
    distance: str = "squared",
    *,
    relative: bool = True,
    counted: Tensor | None = None,
    per_prompt: bool = False,
) -> Tensor:
    """Mean over tokens of the distance between norms (B, T) and those of the base encoder, by default squared and relative.

    counted (B, T) bool: the tokens that take part; None: all. per_prompt: the distance of a prompt's mean norm in the place of each
    token's own, averaged over prompts.
    """
    if counted is None:
        counted = torch.ones_like(norms, dtype=torch.bool)
    if per_prompt:
        norms, base_norms = ((n * counted).sum(dim=1, keepdim=True) / counted.sum(dim=1, keepdim=True) for n in (norms, base_norms))
        counted = counted[:, :1]  # the start token, which every prompt has
    unit = base_norms if relative else torch.ones_like(base_norms)
    distances = DISTANCES[distance]((norms - base_norms) / unit, HUBER_DELTA * base_norms / unit)
    return (distances * counted).sum() / counted.sum()


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


def pinned_loss(prompt_embeds: Tensor, base_embeds: Tensor, distance: str = "squared") -> Tensor:
    """How far whole embeddings (B, T, D) are from the base encoder's, averaged over tokens. 'squared': squared distance as a share of
    the base's squared norm. 'cosine': 1 - cosine, which leaves lengths to the norm term.

    Unlike the norm term it holds directions too, so it is for prompts that should not change at all.
    """
    if distance == "cosine":
        return (1 - F.cosine_similarity(prompt_embeds.float(), base_embeds.float(), dim=-1)).mean()
    difference = (prompt_embeds.float() - base_embeds.float()).square().sum(dim=-1)
    return (difference / base_embeds.float().square().sum(dim=-1)).mean()


def norm_drift(norms: Tensor, base_norms: Tensor) -> tuple[float, float]:
    """Mean and largest relative deviation of norms of any shape, for the log: 0.05 means that they are off by 5 %."""
    deviation = (norms / base_norms - 1).abs()
    return float(deviation.mean()), float(deviation.max())


def cosine_drift(prompt_embeds: Tensor, base_embeds: Tensor) -> float:
    """Mean over tokens of 1 - cosine, for the log."""
    return float(pinned_loss(prompt_embeds, base_embeds, "cosine"))


class Remembered:
    """What a prompt comes to, computed once and kept for the `most` prompts that were asked for last."""

    def __init__(self, compute: Callable[[list[str]], tuple[Tensor, ...]], most: int):
        """`compute`: prompts -> one or more (B, ...), without gradients."""
        self._compute = compute
        self._most = most
        self._known: OrderedDict[str, tuple[Tensor, ...]] = OrderedDict()

    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """(B, ...) of these prompts, of each thing that is computed."""
        missing = list(dict.fromkeys(p for p in prompts if p not in self._known))
        found = {p: self._known[p] for p in prompts if p in self._known}
        for start in range(0, len(missing), AT_ONCE):
            part = missing[start : start + AT_ONCE]
            for prompt, *rows in zip(part, *self._compute(part), strict=True):
                found[prompt] = tuple(row.clone() for row in rows)  # a view would keep the batch
        for prompt, value in found.items():
            self._known[prompt] = value
            self._known.move_to_end(prompt)
        while len(self._known) > self._most:
            self._known.popitem(last=False)
        return tuple(torch.stack(rows) for rows in zip(*(found[p] for p in prompts), strict=True))
