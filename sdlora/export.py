"""From trained layers to the file that a WebUI loads."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sdlora import events, preview
from sdlora.adapt import text_encoder_rate
from sdlora.config import TOKENS_A_CHUNK, OutputOptions
from sdlora.items import Item
from sdlora.lora import formats
from sdlora.lora.change import Change, truncate
from sdlora.lora.layers import Adapter, LoraLayer
from sdlora.lora.metadata import at_level, kohya_metadata, model_hashes, of_base, thumbnail
from sdlora.lora.names import WEBUI
from sdlora.models.family import Family, Model
from sdlora.run import Run


def export(
    run: Run, family: Family, model: Model, items: Sequence[Item], layers: Mapping[str, Adapter], step: int, path: Path | None = None
) -> events.Exported:
    """Write the run's LoRA file, or that of a run stopped after `step`, or one at `path`. Raises TrainingError rather than export a
    number that is not finite, and OSError."""
    config = run.config
    path = path or (run.export if step == config.train.steps else run.export_of(step))
    changes, lost, worst = as_asked(layers, config.output)
    ranks = [change.factors.down.shape[0] for change in changes.values() if change.factors is not None]
    about = metadata(run, family, model, items, layers, step, max(ranks, default=config.lora.rank))
    about = at_level(about, config.output.metadata)
    formats.save(path, changes, config.lora.alpha, about, family=family.name, precision=config.output.save_precision)
    return events.Exported(step, str(path), lost, worst)


def as_asked(layers: Mapping[str, Adapter], options: OutputOptions) -> tuple[dict[str, Change], float, str]:
    """Changes by layer, plain where the file is to be plain; the share of all changes (Frobenius norm) that truncating left out, and
    the layer that lost the largest share of its own."""
    changes = {name: layer.change() for name, layer in layers.items()}
    if options.format == "exact":
        return changes, 0.0, ""
    lost, total, worst = 0.0, 0.0, (0.0, "")
    for name, change in changes.items():
        base = layers[name].base.weight
        assert isinstance(base, Tensor)
        short = options.largest_rank is not None and change.factors is not None and change.factors.down.shape[0] > options.largest_rank
        if not change.is_plain or short:
            factors, error = truncate(change, base.detach(), options.largest_rank)
            changes[name], worst = Change(factors), max(worst, (error, name))
            # orthogonal parts of one matrix: squares of their norms add up
            whole = factors.norm() ** 2 / max(1 - error**2, 1e-30)
            lost += whole * error**2
        else:
            assert change.factors is not None
            whole = change.factors.norm() ** 2
        total += whole
    return changes, math.sqrt(lost / total) if total else 0.0, worst[1]


def learned_alphas(layers: Mapping[str, Adapter]) -> dict[str, float]:
    return {name: layer.alpha.item() for name, layer in layers.items() if isinstance(layer, LoraLayer)}


def alpha_quantiles(layers: Mapping[str, Adapter]) -> list[float]:
    """Smallest, quartiles and largest of the layers' alphas; empty where the kind has none."""
    alphas = list(learned_alphas(layers).values())
    if not alphas:
        return []
    quantiles: list[float] = torch.quantile(torch.tensor(alphas), torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])).tolist()
    return quantiles


def metadata(
    run: Run, family: Family, model: Model, items: Sequence[Item], layers: Mapping[str, Adapter], step: int, rank: int
) -> dict[str, str]:
    """All that a file may say. `rank`: the largest in the file."""
    config, stem = run.config, WEBUI[family.name]
    options, base = config.optimizer, Path(config.model.base)
    learned = {stem(name): round(alpha, 6) for name, alpha in learned_alphas(layers).items()}
    scales = {stem(name): layer.scale.item() for name, layer in layers.items() if isinstance(layer, LoraLayer)}
    arguments = config.lora.model_dump(mode="json") | {"up_ratio": options.up_ratio, "layer_rates": options.layer_rates}
    trained = [item for item in items if not item.regularises]
    by_folder: dict[str, list[Item]] = {}
    for item in trained:
        by_folder.setdefault(item.example.path.parent.name, []).append(item)
    shown = sum(item.repeats for item in items)  # an epoch
    return (
        of_base(family.name, model.noise_schedule.prediction_type)
        | ({formats.LEARNED_ALPHAS: json.dumps(learned), formats.LEARNED_SCALES: json.dumps(scales)} if learned else {})
        | kohya_metadata(
            name=config.output.name,
            rank=rank,
            alpha=config.lora.alpha,
            network_args=arguments,
            training={
                "learning_rate": options.rate,
                "unet_lr": options.rate,
                "text_encoder_lr": text_encoder_rate(config),
                "lr_scheduler": options.schedule,
                "optimizer": options.algorithm,
                "steps": step,
                "num_epochs": math.ceil(step * config.train.batch_size * config.train.accumulation / shown),
                "training_started_at": (run.folder / "config.toml").stat().st_mtime,
                "seed": config.train.seed,
                "mixed_precision": "no" if config.train.precision == "fp32" else config.train.precision,
                "batch_size_per_device": config.train.batch_size,
                "gradient_accumulation_steps": config.train.accumulation,
                "num_train_images": sum(item.repeats for item in trained),
                "num_reg_images": sum(item.repeats for item in items if item.regularises),
                "min_snr_gamma": config.loss.min_snr_gamma or None,
                "clip_skip": config.model.clip_skip if config.model.clip_skip > 1 else None,
                "max_token_length": config.data.max_tokens if config.data.max_tokens > TOKENS_A_CHUNK else None,
                "noise_offset": config.loss.noise_offset or None,
                "sd_model_name": base.name,
            }
            | (model_hashes(base) if base.is_file() else {}),
            captions={folder: [item.example.caption for item in of] for folder, of in by_folder.items()},
            repeats={folder: of[0].repeats for folder, of in by_folder.items()},
            buckets=[item.placed.bucket for item in trained],
            trigger=", ".join(dict.fromkeys(of.trigger for of in config.data.every_set() if of.trigger)),
            resolution=max(config.data.resolutions, default=config.data.resolution),
            author=config.output.author,
            licence=config.output.licence,
            thumbnail=newest_preview(run),
        )
    )


def newest_preview(run: Run) -> str:
    """The first prompt's last picture with the LoRA, as a data URI; empty where none was drawn yet."""
    drawn = [path for path in sorted(run.previews.glob("[0-9]*-00.png")) if path != preview.picture_path(run, 0, 0)]
    return thumbnail(drawn[-1]) if drawn else ""
