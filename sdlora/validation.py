"""The loss on pictures that training never shows, with noise and timesteps that stay: when it rises, a run learns pictures by heart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random

import torch

from sdlora.config import Config
from sdlora.data.batches import BatchPlan, sample_seed
from sdlora.errors import ConfigError
from sdlora.items import Item
from sdlora.objective import Objective

LOOKS = 4  # at each picture, each with noise and a timestep of its own


def hold_out(items: Sequence[Item], config: Config) -> tuple[list[Item], list[Item]]:
    """What is trained, and what is not: data.holdout pictures of the subject, a function of the seed, each as it is first shown, with its
    caption as it stands. No other showing of them is trained either."""
    count = config.data.holdout
    subject = sorted({item.example.path for item in items if not item.regularises})
    if count and count >= len(subject):
        raise ConfigError(f"data.holdout = {count} would leave nothing to train: there are {len(subject)} pictures of your subject.")
    chosen = set(Random(sample_seed(config.train.seed, 0, 0, "holdout")).sample(subject, count))
    first = {item.example.path: item for item in reversed(items) if item.example.path in chosen}
    still = {path: replace(item.rules, dropout=0.0, tag_dropout=0.0, shuffle=False) for path, item in first.items()}
    held_out = [replace(first[path], repeats=1, rules=still[path]) for path in sorted(chosen)]
    return [item for item in items if item.example.path not in chosen], held_out


def plan_of(held_out: Sequence[Item], config: Config) -> BatchPlan:
    return BatchPlan([item.placed.bucket for item in held_out], [1] * len(held_out), config.train.batch_size, config.train.seed)


@torch.no_grad()
def validation_loss(objective: Objective) -> float:
    """Mean over all looks of the denoising loss of an objective of the held-out items, whose plan is `plan_of`'s."""
    total, looks = 0.0, 0
    for batch in range(LOOKS * objective.plan.steps_per_epoch):
        size = len(objective.plan.batch(batch))
        step, part = divmod(batch, objective.config.train.accumulation)
        total += size * float(objective.denoising(step, part, through_text=objective.trains_text))
        looks += size
    return total / looks
