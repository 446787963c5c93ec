"""From a config to a model with adapters in it: which layers, of which kind, how they start and at which rates they learn."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sdlora.config import TOKENS_A_CHUNK, Config
from sdlora.data.cache import TensorCache
from sdlora.errors import ConfigError
from sdlora.lora import formats
from sdlora.lora.inits import CALIBRATED, INITS, Start
from sdlora.lora.layers import Adapter, DoraLayer, Dropouts, FullLayer, LoraLayer, MoraLayer, NormAdapter
from sdlora.lora.scaling import SCALINGS
from sdlora.lora.targets import by_layer, find_norms, find_targets, groups_of, inject, seeded_generator
from sdlora.models import families
from sdlora.models.device import DTYPES, checkpoint_activations, pick_device
from sdlora.models.family import Family, Model
from sdlora.models.sources import TEXT_ENCODERS

log = logging.getLogger(__name__)

Statistics = Callable[[Mapping[str, nn.Linear | nn.Conv2d], int], dict[str, Tensor]]
"""Modules by readable name, and the largest rank -> what a calibrated init wants to know of each."""


@dataclass(frozen=True)
class Adapted:
    layers: dict[str, Adapter]  # by readable name, norms last within a part
    rates: dict[str, float]  # peak, of each layer
    alpha_rates: dict[str, float]  # peak, in alpha's own unit a step
    unmatched: list[str]  # layers that `lora.alpha_from` has no alpha for


def load_model(config: Config, digests: TensorCache | None = None) -> tuple[Family, Model]:
    """The base model, set up to encode prompts as asked. Of parts that `digests` knows and that are not trained no weights are read so far:
    see families.load. Raises WeightsError."""
    device, chunks = pick_device(config.train.device), config.data.max_tokens // TOKENS_A_CHUNK
    options = config.model
    return families.load(
        options.base,
        DTYPES[config.train.precision],
        device,
        clip_skip=options.clip_skip,
        chunks=chunks,
        prompt_weights=config.data.prompt_weights,
        vae=options.vae,
        prediction_type=options.prediction_type,
        base_precision=options.base_precision,
        offload=options.offload,
        vae_tile=options.vae_tile,
        attention=options.attention,
        digests=digests,
        resting=("vae", *(() if config.lora.text_encoder else TEXT_ENCODERS)),
    )


def adapt(model: Model, config: Config, statistics: Statistics | None = None) -> Adapted:
    """Put adapters into the model; layers whose rate is 0 are left as they are.

    Without `statistics` inits that need a calibration pass start as Kaiming's: enough to plan, not to train.
    """
    options = config.lora
    wanted = {part: groups_of(options.text_encoder if part in model.text_encoders else options.unet) for part in model.parts}
    targets = {part: heard(find_targets(part, module, wanted[part]), model) for part, module in model.parts.items()}
    norms = {part: heard(find_norms(part, module), model) if options.norms and wanted[part] else {} for part, module in model.parts.items()}
    names = [name for part in model.parts for name in (*targets[part], *norms[part])]
    if not names:
        raise ConfigError("lora.unet and lora.text_encoder are both empty: there is nothing to train.")
    log.info("layers: %s", ", ".join(names))
    rates = layer_rates(names, config)
    if not rates:
        raise ConfigError("optimizer: every layer's rate is 0, so there is nothing to train.")
    adapted = [name for found in targets.values() for name in found if name in rates]
    modules: dict[str, Any] = {
        name: module.get_submodule(path) for part, module in model.parts.items() for name, path in targets[part].items() if name in rates
    }
    ranks = {name: min(rank, *modules[name].weight.flatten(1).shape) for name, rank in layer_ranks(adapted, config).items()}
    has_matrices = options.kind in ("lora", "dora")
    alphas, unmatched = starting_alphas(adapted, ranks, config) if has_matrices else ({}, [])
    if config.train.gradient_checkpointing:
        checkpoint_activations(model)
    calibrates = has_matrices and adapted and options.init in CALIBRATED
    known = statistics(modules, max(ranks.values())) if statistics is not None and calibrates else {}
    dropouts = Dropouts(options.dropout, options.rank_dropout, options.module_dropout)

    def make(name: str, base: Any) -> Adapter:
        if isinstance(base, nn.LayerNorm | nn.GroupNorm):
            return NormAdapter(base)
        if options.kind == "full":
            return FullLayer(base, options.biases)
        if options.kind == "mora":
            return MoraLayer(base, ranks[name], options.biases)
        scale_of_one = SCALINGS[options.scaling](ranks[name])
        start = start_of(name, base, ranks[name], alphas[name] * scale_of_one, config, known.get(name))
        return (DoraLayer if options.kind == "dora" else LoraLayer)(
            base,
            start,
            alphas[name],
            scale_of_one,
            learned_alpha=options.learned_alpha,
            dropouts=dropouts,
            train_bias=options.biases,
            folds=options.merge_every > 0,
        )

    layers: dict[str, Adapter] = {}
    for part, module in model.parts.items():
        layers |= inject(module, {n: path for n, path in (targets[part] | norms[part]).items() if n in rates}, make)
    return Adapted(layers, rates, {name: config.optimizer.alpha_rate * abs(alpha) for name, alpha in alphas.items()}, unmatched)


def heard(targets: Mapping[str, str], model: Model) -> dict[str, str]:
    """Those of the layers that predictions depend on."""
    return {name: path for name, path in targets.items() if not f"{name}.".startswith(model.idle)}


def start_of(
    name: str, base: nn.Linear | nn.Conv2d, rank: int, scale: float, config: Config, known: Tensor | None = None, round: int = 0
) -> Start:
    """The matrices that a layer starts from, a function of (seed, name, round); `round` counts the folds of ReLoRA."""
    weight = base.weight.detach().float().cpu().flatten(1)
    generator = seeded_generator(config.train.seed, name if not round else f"{name} round {round}")
    if config.lora.init not in CALIBRATED:
        return INITS[config.lora.init](weight, rank, scale, generator)
    if known is None:
        return INITS["kaiming"](weight, rank, scale, generator)
    return CALIBRATED[config.lora.init](weight, known, rank, scale, generator)


def text_encoder_rate(config: Config) -> float:
    rate = config.optimizer.text_encoder_rate
    return config.optimizer.rate / 2 if rate is None else rate


def part_rates(config: Config) -> dict[str, float]:
    """Peak rate of each part of a model."""
    first, second = text_encoder_rate(config), config.optimizer.text_encoder_2_rate
    return {"unet": config.optimizer.rate, "text_encoder": first, "text_encoder_2": first if second is None else second}


def layer_rates(names: list[str], config: Config) -> dict[str, float]:
    """Peak rate of each layer that learns."""
    of_parts = part_rates(config)
    rates = by_layer(
        "optimizer.layer_rates", names, {name: of_parts[name.partition(".")[0]] for name in names}, config.optimizer.layer_rates
    )
    return {name: rate for name, rate in rates.items() if rate > 0}


def layer_ranks(names: list[str], config: Config) -> dict[str, int]:
    return by_layer("lora.layer_ranks", names, dict.fromkeys(names, config.lora.rank), config.lora.layer_ranks)


def starting_alphas(names: list[str], ranks: Mapping[str, int], config: Config) -> tuple[dict[str, float], list[str]]:
    """The alpha that each layer starts from, and the layers that `lora.alpha_from` does not know."""
    options, unmatched = config.lora, []
    # lora.alpha is given for lora.rank: layers of another rank get that which keeps the scale.
    scale = SCALINGS[options.scaling]
    alphas = {name: options.alpha * scale(options.rank) / scale(ranks[name]) for name in names}
    if options.alpha_from is not None:
        known = formats.read_scales(options.alpha_from)
        # and so do those of an earlier run, whatever its rank and scaling were
        learned = {name: known[name] / scale(ranks[name]) for name in names if name in known}
        if not learned:
            raise ConfigError(f"lora.alpha_from: {options.alpha_from} has none of the layers that are adapted here.")
        dead = [name for name, alpha in learned.items() if alpha == 0]
        if dead:
            raise ConfigError(f"lora.alpha_from: {options.alpha_from} has alpha 0 for {dead[0]}, from which nothing can be learned.")
        alphas, unmatched = alphas | learned, [name for name in names if name not in learned]
    alphas = by_layer("lora.layer_alphas", names, alphas, options.layer_alphas)
    low = [name for name, alpha in alphas.items() if options.alpha_floor is not None and alpha < options.alpha_floor]
    if low:
        raise ConfigError(f"lora.alpha_floor = {options.alpha_floor} lies above the alpha of {alphas[low[0]]:g} that {low[0]} starts from.")
    return alphas, unmatched
