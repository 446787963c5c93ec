"""The training loop, the same for every model family."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import psutil
import torch
from PIL import Image
from torch import Tensor

from sdlora import checkpoint, events, preview
from sdlora.config import Config, LossOptions
from sdlora.data import images
from sdlora.data.batches import BatchPlan, sample_seed
from sdlora.data.buckets import Placed, place
from sdlora.data.cache import TensorCache, fingerprint
from sdlora.data.captions import choose_caption
from sdlora.data.dataset import Example, find_examples
from sdlora.diffusion.losses import WEIGHTINGS, denoising_loss, huber_width
from sdlora.diffusion.noise import perturb, sample_noise
from sdlora.diffusion.schedule import NoiseSchedule
from sdlora.diffusion.timesteps import Distribution, stratified
from sdlora.errors import ConfigError, TrainingError
from sdlora.lora import formats
from sdlora.lora.embedding_norm import BaseNorms, embedding_norms, norm_drift, norm_loss, pinned_loss
from sdlora.lora.layers import LoraLayer, disabled
from sdlora.lora.metadata import kohya_metadata
from sdlora.lora.scaling import SCALINGS
from sdlora.lora.targets import find_targets, inject, seeded_generator
from sdlora.models import families, memory
from sdlora.models.family import Family, Model, PicturePrompt
from sdlora.optim import Average, by_layer, layer_rates, load_optimizer_tensors, make_optimizer, optimizer_tensors, rate_factor, set_rates
from sdlora.run import Run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Item:
    """What one place in an epoch shows: a picture, upright or mirrored, in its bucket."""

    example: Example
    placed: Placed
    mirrored: bool


def train(run: Run) -> Iterator[events.Event]:
    """Train, or go on from the newest checkpoint in the run folder. Raises SdloraError before the first step for what is wrong
    with options, data or weights, and TrainingError when the loss is not finite."""
    config = run.config
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    prompts = [
        preview.parse_prompt(p, steps=config.preview.sampling_steps, guidance=config.preview.guidance) for p in config.preview.prompts
    ]
    items, skipped = find_items(config)
    plan = BatchPlan([item.placed.bucket for item in items], config.data.repeats, config.train.batch_size, config.train.seed)

    family, model = families.load(config.model.base, DTYPES[config.train.precision], pick_device(config.train.device))
    for prompt in prompts:
        preview.check_size(prompt, model.size_multiple)
    check_step(config, model)
    schedule, distribution = noise_schedule_of(model, config), timesteps_of(config)
    layers, rates, unmatched = adapt(model, config)
    if config.optimizer.text_encoder_steps and not any(name.startswith("unet.") for name in layers):
        raise ConfigError("optimizer.text_encoder_steps would leave nothing to train: no UNet layer is adapted.")
    trained = list(layers.values())
    optimizer = make_optimizer(
        layers,
        rates,
        alpha_rate=config.optimizer.alpha_rate,
        up_ratio=config.optimizer.up_ratio,
        betas=config.optimizer.betas,
        weight_decay=config.optimizer.weight_decay,
    )
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    average = Average(parameters if config.optimizer.ema else [], config.optimizer.ema)  # of nothing where it is not asked for
    yield describe(config, model, items, plan, layers)
    for path, reason in skipped:
        yield events.Warned(f"Skipped {path.name}: {reason}")
    if unmatched:
        yield events.Warned(
            f"lora.alpha_from has no alpha for {len(unmatched)} of {len(layers)} layers, "
            f"which start at lora.alpha: {', '.join(unmatched[:3])}."
        )

    latents = cached_latents(run.cache, family, model, items)
    trains_text = any(name.startswith("text_encoder") for name in layers)
    base_norms = BaseNorms(lambda captions: base_embeds(family, model, trained, captions), config.loss.embedding_norm_order)
    frozen_embeds: dict[str, Tensor] = {}

    def of_base(prompts: Sequence[str]) -> Tensor:
        """Embeddings (B, T, D) of the untrained encoder, computed once a prompt."""
        missing = [c for c in dict.fromkeys(prompts) if c not in frozen_embeds]
        if missing:
            frozen_embeds.update(zip(missing, base_embeds(family, model, trained, missing), strict=True))
        return torch.stack([frozen_embeds[c] for c in prompts])

    step = restore(run, layers, optimizer, average)
    if step:
        yield events.Resumed(step)
    elif prompts:
        with disabled(trained):
            draw_previews(run, family, model, prompts, 0)
        yield events.Previewed(0, str(save_grid(run, prompts, [("base model", 0)], "step-00000000.png")))

    samples = config.train.batch_size * config.train.accumulation
    while step < config.train.steps and not run.asked_to_stop():
        began = time.perf_counter()
        rates_now = config.optimizer
        factor = rate_factor(
            rates_now.schedule, step, config.train.steps, rates_now.warmup_steps, cycles=rates_now.cycles, power=rates_now.power
        )
        text_rests = 0 < rates_now.text_encoder_steps <= step
        set_rates(optimizer, factor, resting="text_encoder" if text_rests else None)
        losses, drifts, first = [], [], 0
        for part in range(config.train.accumulation):
            batch = step * config.train.accumulation + part
            indices = plan.batch(batch)
            chosen = [items[index] for index in indices]
            seeds = [sample_seed(config.train.seed, step, first + k, "noise") for k in range(len(chosen))]
            captions = [
                caption_of(item, config, sample_seed(config.train.seed, step, first + k, "caption")) for k, item in enumerate(chosen)
            ]
            timesteps = stratified(
                [sample_seed(config.train.seed, step, first + k, "timestep") for k in range(len(chosen))], first, samples, distribution
            )
            timesteps = timesteps.to(model.device)
            clean, noise, seen_noise = latents_and_noise([latents[index] for index in indices], seeds, config.loss, model.device)

            if trains_text:
                with torch.set_grad_enabled(not text_rests):
                    prompt_embeds = family.encode_prompts(model, captions)
                norms, wanted = embedding_norms(prompt_embeds, config.loss.embedding_norm_order), base_norms(captions)
                drifts.append(float(norm_drift(norms.detach(), wanted)))
            else:
                prompt_embeds = of_base(captions)
                drifts.append(0.0)

            predicted = family.predict(model, schedule.add_noise(clean, seen_noise, timesteps), timesteps, prompt_embeds)
            weight, width = weight_and_width(schedule, timesteps, config)
            loss = denoising_loss(predicted, schedule.target(clean, noise, timesteps), weight, width)
            losses.append(float(loss.detach()))
            if trains_text and not text_rests and config.loss.embedding_norm:
                term = norm_loss(norms, wanted, config.loss.embedding_norm_distance, config.loss.embedding_norm_relative)
                loss = loss + config.loss.embedding_norm * term
            if trains_text and not text_rests and config.loss.pinned_embedding:
                pinned = pinned_prompts(config, batch, "pinned", PINNED_A_BATCH)
                term = pinned_loss(family.encode_prompts(model, pinned), of_base(pinned))
                loss = loss + config.loss.pinned_embedding * term
            if config.loss.prior:
                pinned = pinned_prompts(config, batch, "prior", config.loss.prior_samples)
                with torch.set_grad_enabled(not text_rests):
                    embeds = family.encode_prompts(model, pinned) if trains_text else of_base(pinned)
                shown = [latents[indices[k % len(indices)]] for k in range(len(pinned))]
                term = prior_loss(family, model, trained, config, schedule, shown, embeds, of_base(pinned), batch)
                loss = loss + config.loss.prior * term
            (loss / config.train.accumulation).backward()
            first += len(chosen)

        norm = torch.nn.utils.clip_grad_norm_(parameters, config.optimizer.max_grad_norm)
        if not norm.isfinite():
            raise TrainingError(
                f"The loss or its gradient is not finite at step {step + 1}: lower optimizer.rate; checkpoints before it are whole."
            )
        optimizer.step()
        optimizer.zero_grad()
        if config.lora.alpha_floor is not None:
            for layer in trained:
                layer.alpha.data.clamp_(min=config.lora.alpha_floor)
        step += 1
        average.update(step)
        yield events.Stepped(
            step,
            config.train.steps,
            sum(losses) / len(losses),
            optimizer.param_groups[0]["lr"],
            sum(drifts) / len(drifts),
            float(torch.stack([layer.alpha.detach() for layer in trained]).mean()),
            time.perf_counter() - began,
        )

        if config.train.checkpoint_every and step % config.train.checkpoint_every == 0 and step < config.train.steps:
            yield save(run, layers, optimizer, average, step)
        if prompts and config.preview.every and step % config.preview.every == 0 and step < config.train.steps:
            with average.in_place():
                draw_previews(run, family, model, prompts, step)
            yield events.Previewed(step, str(save_grid(run, prompts, [("LoRA", step)], f"step-{step:08d}.png")))

    yield save(run, layers, optimizer, average, step)
    with average.in_place():
        export(run, family, model, items, layers, step)
    yield events.Exported(step, str(run.export))
    if step < config.train.steps:
        yield events.Stopped(step)
        return
    if prompts:
        with average.in_place():
            draw_previews(run, family, model, prompts, step)
        yield events.Previewed(step, str(save_grid(run, prompts, [("base model", 0), ("with LoRA", step)], "before-after.png")))
    yield events.Finished(step, str(run.export))


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise ConfigError(f"train.device: {name!r} is not to be had here; use auto, or cpu.") from None
    return device


def check_step(config: Config, model: Model) -> None:
    if config.data.bucket_step % model.size_multiple:
        raise ConfigError(f"data.bucket_step = {config.data.bucket_step} must be a multiple of {model.size_multiple}, as this model needs.")


# ---------------------------------------------------------------- data


def find_items(config: Config) -> tuple[list[Item], Sequence[tuple[Path, str]]]:
    data = config.data
    found = find_examples(data.folder, missing_caption=data.missing_caption, trigger=data.trigger, on_bad_image=data.on_bad_image)
    sides = (False, True) if data.flip else (False,)
    items = [
        Item(example, place(example.size, resolution=data.resolution, step=data.bucket_step), mirrored)
        for example in found.examples
        for mirrored in sides
    ]
    return items, found.skipped


def key_of(item: Item, model: Model) -> str:
    """All that the cached latents depend on."""
    return fingerprint(images.PIXELS_VERSION, item.example.digest, item.placed.resized, item.placed.crop, item.mirrored, model.fingerprint)


def cached_latents(path: Path, family: Family, model: Model, items: Sequence[Item]) -> list[tuple[Tensor, Tensor]]:
    """Posterior mean and deviation (C, h, w) of each item, on the CPU; what is missing is encoded and written to `path`."""
    cache = TensorCache(path)
    latents = []
    for item in items:
        key = key_of(item, model)
        entry = cache.get(key)
        if entry is None:
            picture = images.crop_to(images.decode(item.example.path), item.placed.resized, item.placed.crop)
            if item.mirrored:
                picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            mean, std = family.encode_images(model, images.to_tensor(picture)[None])
            entry = {"mean": mean[0].cpu(), "std": std[0].cpu()}
            cache.put(key, entry)
        latents.append((entry["mean"], entry["std"]))
    cache.save()
    return latents


def caption_of(item: Item, config: Config, seed: int) -> str:
    data = config.data
    return choose_caption(
        item.example.caption, Random(seed), dropout=data.caption_dropout, shuffle=data.shuffle_tags, keep_tokens=data.keep_tags
    )


PINNED_A_BATCH = 2  # bounds what the term costs: two short runs of the text encoder


def pinned_prompts(config: Config, batch: int, purpose: str, count: int) -> list[str]:
    """Which pinned prompts batch number `batch` holds: drawn anew each time, a function of (seed, batch, purpose)."""
    return Random(sample_seed(config.train.seed, batch, 0, purpose)).choices(config.loss.pinned_prompts, k=count)


def noise_schedule_of(model: Model, config: Config) -> NoiseSchedule:
    if not config.loss.zero_terminal_snr:
        return model.noise_schedule
    if model.noise_schedule.prediction_type != "v_prediction":
        raise ConfigError("loss.zero_terminal_snr is for v-prediction models, and this one predicts epsilon: leave it false.")
    return model.noise_schedule.with_zero_terminal_snr()


def timesteps_of(config: Config) -> Distribution:
    loss = config.loss
    logit_normal = (loss.logit_mean, loss.logit_deviation) if loss.timesteps == "logit_normal" else None
    return Distribution(loss.first_timestep, loss.last_timestep, logit_normal)


def weight_and_width(schedule: NoiseSchedule, timesteps: Tensor, config: Config) -> tuple[Tensor, Tensor | None]:
    """How much each sample counts, and where its Huber loss turns straight; None for the squared error. (B,)."""
    snr = schedule.snr(timesteps)
    weight = WEIGHTINGS[config.loss.weighting](snr, config.loss.min_snr_gamma, schedule.prediction_type)
    if config.loss.distance == "squared":
        return weight, None
    return weight, huber_width(snr, config.loss.huber_width, config.loss.huber_schedule)


def prior_loss(
    family: Family,
    model: Model,
    layers: Sequence[LoraLayer],
    config: Config,
    schedule: NoiseSchedule,
    posteriors: Sequence[tuple[Tensor, Tensor]],
    prompt_embeds: Tensor,
    base_prompt_embeds: Tensor,
    batch: int,
) -> Tensor:
    """The base-model prior: what the model without adapters predicts for a prompt is the target of the model with them.

    As prior preservation (DreamBooth, Ruiz et al. 2023), with the base model's prediction in the place of pictures that it drew, so
    that nothing has to be drawn, or kept on disk. Noise is put on the training pictures' latents. Embeddings (B, T, D).
    """
    count = len(posteriors)
    noise_seeds, timestep_seeds = (
        [sample_seed(config.train.seed, batch, k, purpose) for k in range(count)] for purpose in ("prior noise", "prior timestep")
    )
    timesteps = stratified(timestep_seeds, 0, count, timesteps_of(config)).to(model.device)
    clean, _, seen_noise = latents_and_noise(posteriors, noise_seeds, config.loss, model.device)
    noisy = schedule.add_noise(clean, seen_noise, timesteps)
    with torch.no_grad(), disabled(layers):
        wanted = family.predict(model, noisy, timesteps, base_prompt_embeds)
    weight, width = weight_and_width(schedule, timesteps, config)
    return denoising_loss(family.predict(model, noisy, timesteps, prompt_embeds), wanted, weight, width)


def latents_and_noise(
    posteriors: Sequence[tuple[Tensor, Tensor]], seeds: Sequence[int], options: LossOptions, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents drawn from their posteriors, the noise to predict, and the noise that is added to them: all (B, C, h, w), each sample
    from its own seed."""
    latents, noises, seen = [], [], []
    for (mean, std), seed in zip(posteriors, seeds, strict=True):
        generator = torch.Generator().manual_seed(seed)
        latents.append(mean + std * torch.randn(mean.shape, generator=generator))
        noise = sample_noise(mean.shape, generator, offset=options.noise_offset, multires_discount=options.multires_discount)
        noises.append(noise)
        seen.append(perturb(noise, options.input_perturbation, generator) if options.input_perturbation else noise)
    return torch.stack(latents).to(device), torch.stack(noises).to(device), torch.stack(seen).to(device)


# ---------------------------------------------------------------- adapters


def adapt(model: Model, config: Config) -> tuple[dict[str, LoraLayer], dict[str, float], list[str]]:
    """Put adapters into the model; layers whose rate is 0 are left as they are.

    Returns layers and peak rates by name, and the names that `lora.alpha_from` has no alpha for.
    """
    targets = {part: find_targets(part, module, getattr(config.lora, part)) for part, module in model.parts.items()}
    names = [name for found in targets.values() for name in found]
    if not names:
        raise ConfigError("lora.unet and lora.text_encoder are both empty: there is nothing to train.")
    part_rates = {"unet": config.optimizer.rate, "text_encoder": text_encoder_rate(config)}
    log.info("layers: %s", ", ".join(names))
    rates = {name: r for name, r in layer_rates(names, part_rates, config.optimizer.layer_rates).items() if r > 0}
    if not rates:
        raise ConfigError("optimizer: every layer's rate is 0, so there is nothing to train.")
    known = formats.read_alphas(config.lora.alpha_from) if config.lora.alpha_from else {}
    alphas = {name: known[formats.webui_name(name)] for name in rates if formats.webui_name(name) in known}
    unmatched = [name for name in rates if name not in alphas] if known else []
    if known and not alphas:
        raise ConfigError(f"lora.alpha_from: {config.lora.alpha_from} has none of the layers that are adapted here.")
    dead = [name for name, alpha in alphas.items() if alpha == 0]
    if dead:
        raise ConfigError(f"lora.alpha_from: {config.lora.alpha_from} has alpha 0 for {dead[0]}, from which nothing can be learned.")

    ranks = by_layer("lora.layer_ranks", list(rates), dict.fromkeys(rates, config.lora.rank), config.lora.layer_ranks)

    def make(name: str, base: Any) -> LoraLayer:
        options, generator = config.lora, seeded_generator(config.train.seed, name)
        rank = min(ranks[name], *base.weight.flatten(1).shape)
        # lora.alpha is given for lora.rank: layers of another rank get that which keeps the scale.
        scale = SCALINGS[options.scaling]
        alpha = alphas.get(name, options.alpha * scale(options.rank) / scale(rank))
        return LoraLayer(base, rank, alpha, options.init, options.learned_alpha, generator, options.scaling)

    layers: dict[str, LoraLayer] = {}
    for part, module in model.parts.items():
        layers |= inject(module, {n: path for n, path in targets[part].items() if n in rates}, make)
    if config.train.gradient_checkpointing:
        for module in model.parts.values():
            # transformers and diffusers checkpoint in training mode only; the models have no dropout that this would switch on
            module.train()
            getattr(module, "enable_gradient_checkpointing", getattr(module, "gradient_checkpointing_enable", None))()  # type: ignore[misc]
    return layers, rates, unmatched


def base_embeds(family: Family, model: Model, layers: Sequence[LoraLayer], captions: Sequence[str]) -> Tensor:
    with torch.no_grad(), disabled(layers):
        return family.encode_prompts(model, captions)


# ---------------------------------------------------------------- plan, checkpoints, previews, export


def describe(config: Config, model: Model, items: Sequence[Item], plan: BatchPlan, layers: dict[str, LoraLayer]) -> events.Planned:
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


def save(run: Run, layers: dict[str, LoraLayer], optimizer: torch.optim.Optimizer, average: Average, step: int) -> events.Saved:
    adapter = checkpoint.flatten({name: layer.state() for name, layer in layers.items()})
    state = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    written = checkpoint.save(
        run.checkpoints,
        checkpoint.Checkpoint(step, {"adapter": adapter, "optimizer": optimizer_tensors(optimizer), "average": average.tensors()}, state),
        run.config.train.keep_checkpoints,
    )
    return events.Saved(step, str(written))


def restore(run: Run, layers: dict[str, LoraLayer], optimizer: torch.optim.Optimizer, average: Average) -> int:
    """Take back the newest checkpoint's state; returns its step, 0 where there is none."""
    newest = checkpoint.load_newest(run.checkpoints)
    if newest is None:
        return 0
    saved = checkpoint.unflatten(newest.tensors["adapter"])
    if saved.keys() != layers.keys():
        raise TrainingError(f"{run.folder}: its checkpoint is of other layers than its config.toml names; start a new run.")
    for name, layer in layers.items():
        layer.load_state(saved[name])
    load_optimizer_tensors(optimizer, newest.tensors["optimizer"])
    average.load_tensors(newest.tensors["average"])
    return newest.step


def draw_previews(run: Run, family: Family, model: Model, prompts: Sequence[PicturePrompt], step: int) -> None:
    for number, prompt in enumerate(prompts):
        preview.save_picture(family.generate(model, prompt), picture_path(run, step, number), prompt, model=run.config.model.base)


def picture_path(run: Run, step: int, number: int) -> Path:
    return run.previews / f"{step:08d}-{number:02d}.png"


def save_grid(run: Run, prompts: Sequence[PicturePrompt], rows: Sequence[tuple[str, int]], name: str) -> Path:
    """Labelled grid of previews that are on disk: a row for each (label, step)."""
    pictures = []
    for label, step in rows:
        row = []
        for number in range(len(prompts)):
            with Image.open(picture_path(run, step, number)) as picture:
                row.append(picture.convert("RGB"))
        pictures.append((label, row))
    path = run.previews / name
    preview.grid(pictures, [prompt.text for prompt in prompts]).save(path)
    return path


def export(run: Run, family: Family, model: Model, items: Sequence[Item], layers: dict[str, LoraLayer], step: int) -> None:
    config, options = run.config, run.config.optimizer
    learned = {formats.webui_name(name): round(layer.alpha.item(), 6) for name, layer in layers.items()}
    metadata = (
        family.metadata(model)
        | {formats.LEARNED_ALPHAS: json.dumps(learned)}
        | kohya_metadata(
            name=config.output.name,
            rank=config.lora.rank,
            alpha=config.lora.alpha,
            network_args=config.lora.model_dump(mode="json") | {"up_ratio": options.up_ratio, "layer_rates": options.layer_rates},
            training={
                "learning_rate": options.rate,
                "unet_lr": options.rate,
                "text_encoder_lr": text_encoder_rate(config),
                "lr_scheduler": options.schedule,
                "optimizer": "torch.optim.AdamW",
                "steps": step,
                "seed": config.train.seed,
                "mixed_precision": "no" if config.train.precision == "fp32" else config.train.precision,
                "batch_size_per_device": config.train.batch_size,
                "gradient_accumulation_steps": config.train.accumulation,
                "num_train_images": len(items) * config.data.repeats,
                "min_snr_gamma": config.loss.min_snr_gamma or None,
                "noise_offset": config.loss.noise_offset or None,
                "sd_model_name": Path(config.model.base).name,
            },
            captions=[item.example.caption for item in items],
            buckets=[item.placed.bucket for item in items],
            folder=config.data.folder.name,
            repeats=config.data.repeats,
            trigger=config.data.trigger,
            resolution=config.data.resolution,
        )
    )
    formats.save(run.export, {name: layer.factors() for name, layer in layers.items()}, config.lora.alpha, metadata)


def text_encoder_rate(config: Config) -> float:
    rate = config.optimizer.text_encoder_rate
    return config.optimizer.rate / 2 if rate is None else rate
