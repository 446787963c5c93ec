"""The training loop, the same for every model family."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from sdlora import checkpoint, events, preview
from sdlora import optim as optimizers
from sdlora.adapt import adapt, load_model, start_of, text_encoder_rate
from sdlora.config import Config
from sdlora.data.batches import BatchPlan
from sdlora.data.cache import TensorCache
from sdlora.data.captions import fixed_caption
from sdlora.data.check import check, short
from sdlora.errors import ConfigError, TrainingError
from sdlora.export import alpha_quantiles, export
from sdlora.items import find_items
from sdlora.latents import Latents
from sdlora.lora import calibrate, formats
from sdlora.lora.layers import Adapter, LoraLayer, disabled, stop_dropping
from sdlora.models.device import set_aside
from sdlora.models.family import Model
from sdlora.objective import Objective, noise_schedule_of, prompts_of, trains_text
from sdlora.optim import Average, Optimizer, make_optimizer, match_rates, rate_factor
from sdlora.plan import describe, write_pictures
from sdlora.processes import ALONE, Processes
from sdlora.prompts import BasePrompts
from sdlora.run import Run

MATCH_EVERY = 10  # steps between two looks at matched rates, which move by a percent meanwhile; the first ten are all looked at
MEASURE_EVERY = 25  # steps between two looks at alphas and pinned prompts


def train(run: Run, processes: Processes = ALONE) -> Iterator[events.Event]:
    """Train, or go on from the newest checkpoint in the run folder. Raises SdloraError before the first step for what is wrong
    with options, data or weights, and TrainingError when the loss is not finite. Of several processes, all of which must call it, the
    first alone draws and writes; what the others tell is of no interest."""
    config = run.config
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    prompts = [
        preview.parse_prompt(p, steps=config.preview.sampling_steps, guidance=config.preview.guidance) for p in config.preview.prompts
    ]
    options = config.optimizer
    optimizers.check(options.algorithm, schedule=options.schedule, ema=options.ema, matched=options.matched)
    items, skipped = find_items(config)
    buckets, repeats, batch_size = [item.placed.bucket for item in items], [item.repeats for item in items], config.train.batch_size
    plan = BatchPlan(buckets, repeats, batch_size * processes.count, config.train.seed)

    family, model = load_model(config)
    for prompt in prompts:
        preview.check_size(prompt, model.size_multiple)
    if not processes.is_first:
        prompts = []
    check_step(config, model)
    noise_schedule_of(model, config)  # refuses here what does not fit the model

    latents = Latents(TensorCache(run.cache / f"latents-{model.vae_fingerprint[:16]}", config.model.base), model, items)
    of_prompts = TensorCache(run.cache / f"prompts-{model.text_fingerprint[:16]}", config.model.base)

    def statistics(modules: Mapping[str, nn.Linear | nn.Conv2d], rank: int) -> dict[str, Tensor]:
        """Of the model before it is adapted, over the run's first batches."""
        base = Objective(config, family, model, items, plan, latents, BasePrompts(of_prompts, family, model, []), {})
        numbers = range(config.lora.calibration_batches)
        for _ in latents.fill([index for number in numbers for index in plan.batch(number)]):
            pass  # few, and `adapt` could not pass events on
        losses = [partial(base.denoising, *divmod(number, config.train.accumulation), through_text=True) for number in numbers]
        if config.lora.init == "gradient":
            return calibrate.gradients(modules, losses)
        return calibrate.activations(modules, losses, rank, config.train.seed)

    adapted = adapt(model, config, statistics)
    layers = adapted.layers
    if options.text_encoder_steps and not any(name.startswith("unet.") for name in layers):
        raise ConfigError("optimizer.text_encoder_steps would leave nothing to train: no UNet layer is adapted.")
    optimizer = make_optimizer(
        layers,
        adapted.rates,
        name=options.algorithm,
        alpha_rates=adapted.alpha_rates,
        up_ratio=options.up_ratio,
        betas=options.betas,
        weight_decay=options.weight_decay,
        arguments=options.arguments,
        per_layer=options.matched,
    )
    average = Average(optimizer.parameters if options.ema else [], options.ema)  # of nothing where it is not asked for
    if processes.is_first:
        write_pictures(run.plan, items)
    yield describe(config, model, items, plan, layers)
    found = check(
        [(item.example, item.placed) for item in items],
        skipped,
        tokens=lambda text: len(model.tokenizer.tokenize(text)),
        max_tokens=config.data.max_tokens,
    )
    yield from warnings(config, skipped, short(found), adapted.unmatched, layers)

    of_base = BasePrompts(of_prompts, family, model, layers.values())
    if processes.is_first:
        yield from until_stopped(run, latents.fill())
        yield from until_stopped(run, of_base.fill(prompts_of(config, items, trains_text(layers))))
    processes.wait()
    set_aside(model, "vae")
    if not trains_text(layers) and all(fixed_caption(item.example.caption, item.rules) is not None for item in items):
        set_aside(model, *model.text_encoders)

    objective = Objective(config, family, model, items, plan, latents, of_base, layers, processes)
    step = restore(run, layers, optimizer, average)
    if step:
        yield events.Resumed(step)
    elif prompts:
        with disabled(layers.values()):
            preview.draw(run, family, model, prompts, 0)
        yield events.Previewed(0, str(preview.save_grid(run, prompts, [("base model", 0)], "step-00000000.png")))

    while step < config.train.steps and not processes.any(run.asked_to_stop()):
        began = time.perf_counter()
        text_rests = 0 < options.text_encoder_steps <= step
        losses = []
        for part in range(config.train.accumulation):
            loss = objective(step, part, text_rests)
            (loss.total / config.train.accumulation).backward()
            losses.append(loss)
        processes.average(optimizer.parameters)
        norm = torch.nn.utils.clip_grad_norm_(optimizer.parameters, options.max_grad_norm)
        if not norm.isfinite():
            raise TrainingError(
                f"The loss or its gradient is not finite at step {step + 1}: lower optimizer.rate; checkpoints before it are whole."
            )
        since = step % config.lora.merge_every if config.lora.merge_every else step
        if options.matched and (since < MATCH_EVERY or since % MATCH_EVERY == 0):
            match_rates(optimizer, layers, adapted.rates, options.up_ratio)
        optimizer.set_rates(share_of_peak(config, step), resting="text_encoder" if text_rests else None)
        optimizer.step()
        optimizer.zero_grad()
        hold(layers.values(), config)
        step += 1
        average.update(step)
        if config.lora.merge_every and step % config.lora.merge_every == 0 and step < config.train.steps:
            fold(layers, config, step // config.lora.merge_every)
            optimizer.reset()
        denoising, drift = processes.mean([mean(loss.denoising for loss in losses), mean(loss.drift for loss in losses)])
        yield events.Stepped(
            step,
            config.train.steps,
            denoising,
            optimizer.groups[0]["lr"],
            drift,
            processes.most(max(loss.worst_drift for loss in losses)),
            time.perf_counter() - began,
        )
        if step % MEASURE_EVERY == 0 or step == config.train.steps:
            yield events.Measured(step, alpha_quantiles(layers), objective.pinned_drift())

        if processes.is_first and config.train.checkpoint_every and step % config.train.checkpoint_every == 0 and step < config.train.steps:
            yield save(run, layers, optimizer, average, step)
        if prompts and config.preview.every and step % config.preview.every == 0 and step < config.train.steps:
            with as_exported(layers.values(), optimizer, average):
                preview.draw(run, family, model, prompts, step)
            yield events.Previewed(step, str(preview.save_grid(run, prompts, [("LoRA", step)], f"step-{step:08d}.png")))

    if not processes.is_first:
        return
    yield save(run, layers, optimizer, average, step)
    with as_exported(layers.values(), optimizer, average):
        exported = export(run, family, model, items, layers, step)
    yield exported
    if step < config.train.steps:
        yield events.Stopped(step)
        return
    if prompts:
        with as_exported(layers.values(), optimizer, average):
            preview.draw(run, family, model, prompts, step)
        yield events.Previewed(step, str(preview.save_grid(run, prompts, [("base model", 0), ("with LoRA", step)], "before-after.png")))
    yield events.Finished(step, str(run.export))


def until_stopped(run: Run, stream: Generator[events.Cached, None, None]) -> Generator[events.Cached, None, None]:
    """The stream, cut off and closed where the run is asked to stop."""
    for event in stream:
        yield event
        if run.asked_to_stop():
            stream.close()
            return


def check_step(config: Config, model: Model) -> None:
    if config.data.bucket_step % model.size_multiple:
        raise ConfigError(f"data.bucket_step = {config.data.bucket_step} must be a multiple of {model.size_multiple}, as this model needs.")


def warnings(
    config: Config,
    skipped: Sequence[tuple[Path, str]],
    of_data: Iterable[str],
    unmatched: Sequence[str],
    layers: Mapping[str, Adapter],
) -> Iterator[events.Warned]:
    for path, reason in skipped:
        yield events.Warned(f"Skipped {path.name}: {reason}")
    yield from map(events.Warned, of_data)
    if unmatched:
        yield events.Warned(
            f"lora.alpha_from has no alpha for {len(unmatched)} of {len(layers)} layers, "
            f"which start at lora.alpha: {', '.join(unmatched[:3])}."
        )
    if config.output.format == "exact":
        for line in formats.who_reads(layer.change() for layer in layers.values()):
            yield events.Warned(f"Not every program will read this file rightly: {line}.")
    if config.optimizer.algorithm == "prodigy" and max(config.optimizer.rate, text_encoder_rate(config)) < 0.01:
        yield events.Warned("Prodigy's rates are multiples of what it finds, and the rates set hardly move anything: 1 is usual.")


# ---------------------------------------------------------------- a step


def share_of_peak(config: Config, step: int) -> float:
    """Share of the peak rate at this step: the schedule, and after each fold a rise over a tenth of the interval."""
    options, every = config.optimizer, config.lora.merge_every
    factor = rate_factor(options.schedule, step, config.train.steps, options.warmup_steps, cycles=options.cycles, power=options.power)
    if every and step >= every:
        factor *= min(1.0, (step % every + 1) / max(1, every // 10))
    return factor


def hold(layers: Iterable[Adapter], config: Config) -> None:
    """Put back what a step took beyond its bounds."""
    for layer in layers:
        if isinstance(layer, LoraLayer):
            if config.lora.alpha_floor is not None:
                layer.alpha.data.clamp_(min=config.lora.alpha_floor)
            if config.lora.max_norm is not None:
                layer.limit_norm(config.lora.max_norm)


def fold(layers: Mapping[str, Adapter], config: Config, round: int) -> None:
    """ReLoRA's merge: what was learned goes into each layer's full delta, and the matrices start anew."""
    for name, layer in layers.items():
        if isinstance(layer, LoraLayer):
            layer.fold(start_of(name, layer.base, layer.rank, float(layer.scale.detach()), config, round=round))


@contextmanager
def as_exported(layers: Iterable[Adapter], optimizer: Optimizer, average: Average) -> Iterator[None]:
    """The layers as a file will hold them: without dropout, averaged where an average was asked for."""
    stop_dropping(layers)
    with optimizer.evaluating(), average.in_place():
        yield


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


# ---------------------------------------------------------------- checkpoints


def save(run: Run, layers: Mapping[str, Adapter], optimizer: Optimizer, average: Average, step: int) -> events.Saved:
    adapter = checkpoint.flatten({name: layer.state() for name, layer in layers.items()})
    moments, scalars = optimizer.state()
    tensors = {"adapter": adapter, "optimizer": moments, "average": average.tensors()}
    state = {"threads": torch.get_num_threads(), "torch": torch.__version__, "optimizer": scalars}
    written = checkpoint.save(run.checkpoints, checkpoint.Checkpoint(step, tensors, state), run.config.train.keep_checkpoints)
    return events.Saved(step, str(written))


def restore(run: Run, layers: Mapping[str, Adapter], optimizer: Optimizer, average: Average) -> int:
    """Take back the newest checkpoint's state; returns its step, 0 where there is none."""
    newest = checkpoint.load_newest(run.checkpoints)
    if newest is None:
        return 0
    saved = checkpoint.unflatten(newest.tensors["adapter"])
    if saved.keys() != layers.keys():
        raise TrainingError(f"{run.folder}: its checkpoint is of other layers than its config.toml names; start a new run.")
    for name, layer in layers.items():
        if {key: t.shape for key, t in layer.state().items()} != {key: t.shape for key, t in saved[name].items()}:
            raise TrainingError(f"{run.folder}: its checkpoint has another kind or rank of {name} than its config.toml; start a new run.")
        layer.load_state(saved[name])
    if len(newest.tensors["average"]) != len(average.values):
        raise TrainingError(f"{run.folder}: its config.toml has another optimizer.ema than its checkpoint; start a new run.")
    optimizer.load_state(newest.tensors["optimizer"], newest.state["optimizer"])
    average.load_tensors(newest.tensors["average"])
    return newest.step
