"""Rates of layers, parameter groups, and how rates move over a run."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import TypeVar

import torch
from torch import Tensor, nn

from sdlora.errors import ConfigError
from sdlora.lora.layers import LoraLayer

Value = TypeVar("Value")


def layer_rates(names: list[str], part_rates: Mapping[str, float], own: Mapping[str, float]) -> dict[str, float]:
    """Peak rate of each layer: its part's, or that of the last glob in `own` which matches its name.

    Raises ConfigError for a glob that matches nothing: a rate that a user set and nobody uses is a mistake.
    """
    return by_layer("optimizer.layer_rates", names, {name: part_rates[name.partition(".")[0]] for name in names}, own)


def by_layer(option: str, names: list[str], values: Mapping[str, Value], own: Mapping[str, Value]) -> dict[str, Value]:
    """`values`, overruled by the last glob or block in `own` that matches a layer's name. Raises ConfigError for one that matches none."""
    found = dict(values)
    for glob, value in own.items():
        globs = block_globs(glob)
        matched = [name for name in names if any(fnmatchcase(name, g) for g in globs)]
        if not matched:
            raise ConfigError(f"{option}: {glob!r} matches no adapted layer; names look like {names[0]} (see run.log).")
        found |= dict.fromkeys(matched, value)
    return found


class Average:
    """A running average of parameters. Its decay starts low, min(decay, (1 + n) / (10 + n)) after n updates, so that the start is
    forgotten soon (as in TensorFlow's ExponentialMovingAverage)."""

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float):
        self.parameters, self.decay = list(parameters), decay
        self.values = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """After update number `updates`, which counts from 1."""
        decay = min(self.decay, (1 + updates) / (10 + updates))
        for value, parameter in zip(self.values, self.parameters, strict=True):
            value.lerp_(parameter, 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The parameters hold the average; afterwards they are what they were."""
        kept = [p.detach().clone() for p in self.parameters]
        self._fill(self.values)
        try:
            yield
        finally:
            self._fill(kept)

    def tensors(self) -> dict[str, Tensor]:
        return {str(number): value for number, value in enumerate(self.values)}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        for number, value in enumerate(self.values):
            value.copy_(tensors[str(number)])

    @torch.no_grad()
    def _fill(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)


def block_globs(text: str) -> list[str]:
    """Shorthand for a block as globs: `down.0`, `mid`, `up.1-3`, `te.0-5`; anything else is a glob already."""
    found = re.fullmatch(r"(?:(mid)|(down|up|te)\.(\d+)(?:-(\d+))?)", text)
    if not found:
        return [text]
    mid, block, first, last = found.groups()
    if mid:
        return ["unet.mid_block.*"]
    path = "text_encoder.text_model.encoder.layers" if block == "te" else f"unet.{block}_blocks"
    return [f"{path}.{number}.*" for number in range(int(first), int(last or first) + 1)]


def make_optimizer(
    layers: Mapping[str, LoraLayer],
    rates: Mapping[str, float],
    *,
    alpha_rate: float,
    up_ratio: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> torch.optim.AdamW:
    """AdamW. Up matrices learn `up_ratio` times as fast as down (LoRA+, Hayou et al. 2024); alphas have their own rate and no decay."""
    groups: dict[tuple[str, float, float], list[nn.Parameter]] = defaultdict(list)
    for name, layer in layers.items():
        for parameter, rate, decay in (
            (layer.down, rates[name], weight_decay),
            (layer.up, rates[name] * up_ratio, weight_decay),
            (layer.alpha, alpha_rate, 0.0),
        ):
            if parameter.requires_grad:
                groups[name.partition(".")[0], rate, decay].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr": rate, "peak_lr": rate, "weight_decay": decay, "part": part}
            for (part, rate, decay), parameters in groups.items()
        ],
        betas=betas,
        fused=True,
    )


def set_rates(optimizer: torch.optim.Optimizer, factor: float, resting: str | None = None) -> None:
    """Rates of this step; the part of the model that is `resting` learns no more."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0 if group["part"] == resting else group["peak_lr"] * factor


def rate_factor(schedule: str, step: int, steps: int, warmup_steps: int, *, cycles: int = 1, power: float = 1.0) -> float:
    """Share of the peak rate at `step` of `steps`: a rise from zero, then the schedule over what is left."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return SCHEDULES[schedule]((step - warmup_steps) / max(1, steps - warmup_steps), cycles, power)


# From the share of the run that is done, 0..1, the number of restarts and the exponent to the share of the peak rate.
SCHEDULES: dict[str, Callable[[float, int, float], float]] = {
    "constant": lambda done, cycles, power: 1.0,
    "linear": lambda done, cycles, power: 1 - done,
    "cosine": lambda done, cycles, power: 0.5 * (1 + math.cos(math.pi * done)),
    "cosine_restarts": lambda done, cycles, power: 0.5 * (1 + math.cos(math.pi * (done * cycles % 1.0))),
    "polynomial": lambda done, cycles, power: (1 - done) ** power,
}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state, flat: "<parameter number>/<name>" -> tensor."""
    return {f"{index}/{name}": value for index, state in optimizer.state_dict()["state"].items() for name, value in state.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for key, value in tensors.items():
        index, _, name = key.partition("/")
        state[int(index)][name] = value
    optimizer.load_state_dict({"state": dict(state), "param_groups": optimizer.state_dict()["param_groups"]})
