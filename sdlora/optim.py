"""Rates of layers, parameter groups, and how rates move over a run."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from sdlora.errors import ConfigError
from sdlora.lora.layers import LoraLayer


def layer_rates(names: list[str], part_rates: Mapping[str, float], own: Mapping[str, float]) -> dict[str, float]:
    """Peak rate of each layer: its part's, or that of the last glob in `own` which matches its name.

    Raises ConfigError for a glob that matches nothing: a rate that a user set and nobody uses is a mistake.
    """
    rates = {name: part_rates[name.partition(".")[0]] for name in names}
    for glob, rate in own.items():
        globs = block_globs(glob)
        matched = [name for name in names if any(fnmatchcase(name, g) for g in globs)]
        if not matched:
            raise ConfigError(f"optimizer.layer_rates: {glob!r} matches no adapted layer; names look like {names[0]} (see run.log).")
        rates |= dict.fromkeys(matched, rate)
    return rates


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
