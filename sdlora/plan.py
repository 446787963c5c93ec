"""What a config will train, layer by layer, and what a run will take and show: nothing is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sdlora import events, optim
from sdlora.adapt import adapt, load_model
from sdlora.config import Config
from sdlora.data.batches import BatchPlan
from sdlora.items import Item
from sdlora.lora.layers import Adapter, LoraLayer
from sdlora.lora.matched import expected_rate
from sdlora.models.family import Model
from sdlora.models.packed import numbers_in


@dataclass(frozen=True)
class LayerPlan:
    name: str
    shape: tuple[int, ...]  # of the base weight
    rank: int | None  # None: every weight is trained
    scale: float | None  # that the update starts with; None where the kind has none
    down_rate: float  # peak, and of kinds without matrices their only one; 0 where the init freezes down; as expected where it is matched
    up_rate: float
    parameters: int  # that are trained


@dataclass(frozen=True)
class Plan:
    layers: list[LayerPlan]
    init: str
    alpha_rate: float  # peak, of every learned alpha, as a share of where it starts; 0 where alpha is not learned
    adapted_weights: dict[str, float]  # "unet" -> share of the part's weights that adapters change
    unmatched: list[str]  # layers that lora.alpha_from has no alpha for


def plan(config: Config) -> Plan:
    """Load the base model and adapt it as training would. Raises what `train` would raise of options and weights."""
    options = config.optimizer
    optim.check(options.algorithm, options.schedule, options.ema, matched=options.matched)
    optim.class_arguments(options.algorithm, options.arguments)
    _, model = load_model(config)
    sizes = {part: numbers_in(module) for part, module in model.parts.items()}
    adapted = adapt(model, config)
    shares = {
        part: sum(layer.weight_shape.numel() for name, layer in adapted.layers.items() if name.startswith(f"{part}.")) / size
        for part, size in sizes.items()
    }
    rows = [_row(name, layer, adapted.rates[name], options.up_ratio, options.matched) for name, layer in adapted.layers.items()]
    has_matrices = bool(adapted.alpha_rates)
    init = config.lora.init if has_matrices else "zero"
    alpha_rate = options.alpha_rate if has_matrices and config.lora.learned_alpha else 0.0
    return Plan(rows, init, alpha_rate, shares, adapted.unmatched)


def _row(name: str, layer: Adapter, rate: float, up_ratio: float, matched: bool) -> LayerPlan:
    scale, down_rate, up_rate = None, rate, rate
    if isinstance(layer, LoraLayer):
        scale, trains_down = float(layer.scale.detach()), layer.down.requires_grad
        if matched:
            rate = float(expected_rate(rate, scale, layer.down.detach(), layer.up.detach(), up_ratio, trains_down))
        down_rate, up_rate = rate if trains_down else 0.0, rate * up_ratio
    return LayerPlan(name, tuple(layer.weight_shape), layer.rank, scale, down_rate, up_rate, layer.trained_numbers)


def describe(
    config: Config, model: Model, items: Sequence[Item], plan: BatchPlan, layers: Mapping[str, Adapter], memory_bytes: int
) -> events.Planned:
    buckets: dict[str, int] = {}
    for item in items:
        width, height = item.placed.bucket
        buckets[f"{width}x{height}"] = buckets.get(f"{width}x{height}", 0) + 1
    repeats = {item.repeats for item in items if not item.regularises}
    trainable = sum(layer.trained_numbers for layer in layers.values())
    return events.Planned(
        images=len({item.example.path for item in items}),
        repeats=repeats.pop() if len(repeats) == 1 else 1,
        buckets=buckets,
        steps=config.train.steps,
        steps_per_epoch=-(-plan.steps_per_epoch // config.train.accumulation),
        epochs=round(config.train.steps * config.train.accumulation / plan.steps_per_epoch, 2),
        batch_size=plan.batch_size * config.train.accumulation,
        layers={part: sum(name.startswith(f"{part}.") for name in layers) for part in model.parts},
        trainable_parameters=trainable,
        memory_bytes=memory_bytes,
        device=str(model.device),
        base=config.model.base,
        assumed=list(model.notes),
    )


