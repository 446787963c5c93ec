"""What a config will train, layer by layer: nothing is trained, nothing is written."""

from __future__ import annotations

from dataclasses import dataclass

from sdlora.config import Config
from sdlora.lora.layers import LoraLayer
from sdlora.models import families
from sdlora.train import DTYPES, adapt, pick_device


@dataclass(frozen=True)
class LayerPlan:
    name: str
    shape: tuple[int, ...]  # of the base weight
    rank: int
    scale: float  # that the update starts with
    down_rate: float  # peak; 0 where the init freezes down
    up_rate: float
    parameters: int  # that are trained


@dataclass(frozen=True)
class Plan:
    layers: list[LayerPlan]
    init: str
    alpha_rate: float  # peak, of every learned alpha; 0 where alpha is not learned
    adapted_weights: dict[str, float]  # "unet" -> share of the part's weights that adapters change
    unmatched: list[str]  # layers that lora.alpha_from has no alpha for


def plan(config: Config) -> Plan:
    """Load the base model and adapt it as training would. Raises what `train` would raise of options and weights."""
    _, model = families.load(config.model.base, DTYPES[config.train.precision], pick_device(config.train.device))
    sizes = {part: sum(p.numel() for p in module.parameters()) for part, module in model.parts.items()}
    layers, rates, unmatched = adapt(model, config)
    adapted = {
        part: sum(layer.base.weight.numel() for name, layer in layers.items() if name.startswith(f"{part}.")) / size
        for part, size in sizes.items()
    }
    rows = [_row(name, layer, rates[name], config.optimizer.up_ratio) for name, layer in layers.items()]
    return Plan(rows, config.lora.init, config.optimizer.alpha_rate if config.lora.learned_alpha else 0.0, adapted, unmatched)


def _row(name: str, layer: LoraLayer, rate: float, up_ratio: float) -> LayerPlan:
    return LayerPlan(
        name=name,
        shape=tuple(layer.base.weight.shape),
        rank=layer.rank,
        scale=float(layer.scale.detach()),
        down_rate=rate if layer.down.requires_grad else 0.0,
        up_rate=rate * up_ratio,
        parameters=layer.trained_numbers,
    )
