"""How far a LoRA moves text embeddings: their lengths, which cross-attention knows in a narrow band, and their directions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sdlora.analysis.blocks import figure_of
from sdlora.lora.embedding_norm import cosine_drift, embedding_norms, norm_drift
from sdlora.models.family import Family, Model
from sdlora.models.text import token_masks

AT_ONCE = 32  # prompts that are encoded together

Said = tuple[Tensor, ...]
"""What each text encoder, and last a pooled embedding where there is one, says of a group of prompts: (N, D), a row for each token that is
no padding."""


@dataclass(frozen=True)
class Drift:
    """Of one group of prompts in one encoder."""

    base_norm: float  # mean over tokens
    norm: float
    off: float  # mean over tokens of |norm / base norm - 1|
    worst: float  # the largest of them
    turned: float  # mean over tokens of 1 - cosine


@torch.no_grad()
def say(family: Family, model: Model, prompts: Sequence[str]) -> Said:
    """By the model as it is now."""
    rows: list[list[Tensor]] = []
    for start in range(0, len(prompts), AT_ONCE):
        part = prompts[start : start + AT_ONCE]
        words = token_masks(model, part).to(model.device)
        vectors = family.encode_prompts(model, part).vectors  # (B, T, D) or (B, 1, D)
        rows.append([of[words] if of.shape[1] > 1 else of[:, 0] for of in vectors])
    return tuple(torch.cat(of).float().cpu() for of in zip(*rows, strict=True))


def drifts(before: Said, after: Said) -> Iterator[Drift]:
    """Of each encoder."""
    for was, now in zip(before, after, strict=True):
        base_norms, norms = embedding_norms(was), embedding_norms(now)
        off, worst = norm_drift(norms, base_norms)
        yield Drift(float(base_norms.mean()), float(norms.mean()), off, worst, cosine_drift(now, was))


def plot(before: Mapping[str, Said], after: Mapping[str, Said], path: Path, title: str) -> None:
    """Norms of all tokens, the base's and the LoRA's: a row for each encoder, a column for each group of prompts."""
    encoders = len(next(iter(before.values())))
    figure = figure_of(4 * len(before), 1 + 2.6 * encoders)
    axes = figure.subplots(encoders, len(before), squeeze=False)
    for column, group in enumerate(before):
        for row, (was, now) in enumerate(zip(before[group], after[group], strict=True)):
            norms = [embedding_norms(of).numpy() for of in (was, now)]
            low, high = min(of.min() for of in norms), max(of.max() for of in norms)
            of = axes[row, column]
            of.hist(norms[0], bins=40, range=(low, high), color="0.75", label="base")
            of.hist(norms[1], bins=40, range=(low, high), histtype="step", color="crimson", label="with the LoRA")
            of.set_title(group, fontsize="small")
            of.set_xlabel("norm of a token's embedding" if row == 0 else "of the second encoder" if row == 1 else "of the pooled one")
            of.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(frameon=False, fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
