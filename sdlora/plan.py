"""What a config will train, layer by layer, and what a run will take and show: nothing is trained."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from sdlora import events
from sdlora.adapt import adapt
from sdlora.config import Config
from sdlora.data.batches import BatchPlan
from sdlora.items import Item
from sdlora.lora.layers import Adapter, LoraLayer
from sdlora.lora.matched import expected_rate
from sdlora.models import families, memory
from sdlora.models.device import DTYPES, pick_device
from sdlora.models.family import Model


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
    _, model = families.load(config.model.base, DTYPES[config.train.precision], pick_device(config.train.device))
    sizes = {part: sum(p.numel() for p in module.parameters()) for part, module in model.parts.items()}
    adapted = adapt(model, config)
    shares = {
        part: sum(layer.weight_shape.numel() for name, layer in adapted.layers.items() if name.startswith(f"{part}.")) / size
        for part, size in sizes.items()
    }
    options = config.optimizer
    rows = [_row(name, layer, adapted.rates[name], options.up_ratio, options.matched) for name, layer in adapted.layers.items()]
    learns_alpha = config.lora.learned_alpha and bool(adapted.alpha_rates)
    return Plan(rows, config.lora.init, config.optimizer.alpha_rate if learns_alpha else 0.0, shares, adapted.unmatched)


def _row(name: str, layer: Adapter, rate: float, up_ratio: float, matched: bool) -> LayerPlan:
    scale, down_rate, up_rate = None, rate, rate
    if isinstance(layer, LoraLayer):
        scale, trains_down = float(layer.scale.detach()), layer.down.requires_grad
        if matched:
            rate = float(expected_rate(rate, scale, layer.down.detach(), layer.up.detach(), up_ratio, trains_down))
        down_rate, up_rate = rate if trains_down else 0.0, rate * up_ratio
    return LayerPlan(name, tuple(layer.weight_shape), layer.rank, scale, down_rate, up_rate, layer.trained_numbers)


def describe(config: Config, model: Model, items: Sequence[Item], plan: BatchPlan, layers: Mapping[str, Adapter]) -> events.Planned:
    buckets: dict[str, int] = {}
    for item in items:
        width, height = item.placed.bucket
        buckets[f"{width}x{height}"] = buckets.get(f"{width}x{height}", 0) + 1
    trainable = sum(layer.trained_numbers for layer in layers.values())
    largest = max((item.placed.bucket for item in items), key=lambda bucket: bucket[0] * bucket[1])
    return events.Planned(
        images=len({item.example.path for item in items}),
        repeats=config.data.repeats,
        buckets=buckets,
        steps=config.train.steps,
        steps_per_epoch=-(-plan.steps_per_epoch // config.train.accumulation),
        epochs=round(config.train.steps * config.train.accumulation / plan.steps_per_epoch, 2),
        batch_size=config.train.batch_size * config.train.accumulation,
        layers={part: sum(name.startswith(f"{part}.") for name in layers) for part in model.parts},
        trainable_parameters=trainable,
        memory_bytes=estimate_memory(config, model, trainable, largest),
        device=str(model.device),
        base=config.model.base,
    )


def write_pictures(path: Path, items: Sequence[Item], repeats: int) -> None:
    """What an epoch shows, a row for each way in which it shows a picture, as JSON: sizes in pixels, width before height."""
    rows = [
        {
            "file": str(item.example.path),
            "size": item.example.size,
            "bucket": item.placed.bucket,
            "resized": item.placed.resized,
            "crop": item.placed.crop,  # left, top, right, bottom
            "mirrored": item.mirrored,
            "regularises": item.regularises,
            "repeats": count * repeats,
        }
        for item, count in Counter(items).items()
    ]
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n", encoding="utf-8")


def estimate_memory(config: Config, model: Model, trainable: int, bucket: tuple[int, int]) -> int:
    """Peak bytes of a step: weights, adapters with gradient and two Adam moments (fp32), saved activations; on a CPU also the
    process as it stands, which holds the weights already."""
    batch = config.train.batch_size
    unet: Any = model.parts["unet"]
    factor = 2 ** (len(model.vae.config.block_out_channels) - 1)
    latents = torch.empty(batch, unet.config.in_channels, bucket[1] // factor, bucket[0] // factor, device="meta")
    embeds = torch.empty(batch, model.tokenizer.model_max_length, unet.config.cross_attention_dim, device="meta", requires_grad=True)

    def step(shadow: Any) -> Tensor:
        with torch.autocast(model.device.type, model.dtype, enabled=model.dtype != torch.float32):
            return shadow(latents, torch.zeros(batch, dtype=torch.long, device="meta"), embeds).sample  # type: ignore[no-any-return]

    activations = memory.saved_bytes(unet, step)
    held = psutil.Process().memory_info().rss if model.device.type == "cpu" else memory.weight_bytes(*model.parts.values(), model.vae)
    return held + trainable * 4 * 3 + activations
