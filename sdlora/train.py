"""The training loop, the same for every model family."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from sdlora import checkpoint, events, footprint, preview
from sdlora import optim as optimizers
from sdlora.adapt import adapt, load_model, start_of, text_encoder_rate
from sdlora.config import Config
from sdlora.data.batches import BatchPlan
from sdlora.data.cache import TensorCache
from sdlora.data.check import check, short
from sdlora.errors import ConfigError, TrainingError
from sdlora.export import alpha_quantiles, export
from sdlora.items import find_items, write_pictures
from sdlora.latents import Latents
from sdlora.lora import calibrate, formats
from sdlora.lora.layers import Adapter, LoraLayer, disabled, stop_dropping
from sdlora.loss_scale import LossScale
from sdlora.models.device import (
    compile_blocks,
    compile_errors_explained,
    let_go,
    memory_used,
    on_device,
    return_freed_memory,
    set_aside,
    uncompiled,
)
from sdlora.models.family import Model
from sdlora.objective import Objective, noise_schedule_of, prompts_of, trains_text
from sdlora.optim import Average, Optimizer, make_optimizer, match_rates, rate_factor
from sdlora.plan import describe
from sdlora.processes import ALONE, Processes
from sdlora.prompts import BasePrompts
from sdlora.run import Run
from sdlora.saving import check_disk, circumstances, last_good, reservations, restore, save, when_there_is_room
from sdlora.validation import hold_out, plan_of, validation_loss

log = logging.getLogger(__name__)

MATCH_EVERY = 10  # steps between two looks at matched rates, which move by a percent meanwhile; the first ten are all looked at
MEASURE_EVERY = 25  # steps between two looks at alphas and pinned prompts


def train(run: Run, processes: Processes = ALONE) -> Iterator[events.Event]:
    """Train, or go on from the newest checkpoint in the run folder, whose lock the caller holds. Raises SdloraError before the first
    step for what is wrong with options, data or weights, and TrainingError where the numbers do not stay finite or nothing can be
    written. Of several processes, all of which must call it, the first alone draws and writes; what the others tell is of no interest."""
    config = run.config
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    return_freed_memory(thoroughly=config.train.gradient_checkpointing)
    prompts = [
        preview.parse_prompt(p, steps=config.preview.sampling_steps, guidance=config.preview.guidance) for p in config.preview.prompts
    ]
    options = config.optimizer
    optimizers.check(options.algorithm, schedule=options.schedule, ema=options.ema, matched=options.matched)
    items, skipped = find_items(config)
    items, held_out = hold_out(items, config)
    buckets, repeats, batch_size = [item.placed.bucket for item in items], [item.repeats for item in items], config.train.batch_size
    plan = BatchPlan(buckets, repeats, batch_size * processes.count, config.train.seed)

    family, model = load_model(config, TensorCache(run.cache / "digests", config.model.base))
    for prompt in prompts:
        preview.check_size(prompt, model.size_multiple)
    if not processes.is_first:
        prompts = []
    check_step(config, model)
    noise_schedule_of(model, config)  # refuses here what does not fit the model

    of_pictures = run.cache / f"latents-{model.vae_fingerprint[:16]}"
    latents, unseen = (Latents(TensorCache(of_pictures, config.model.base), model, shown) for shown in (items, held_out))
    of_prompts = TensorCache(run.cache / f"prompts-{model.text_fingerprint[:16]}", config.model.base)

    def statistics(modules: Mapping[str, nn.Linear | nn.Conv2d], rank: int) -> dict[str, Tensor]:
        """Of the model before it is adapted, over the run's first batches."""
        base = Objective(config, family, model, items, plan, latents, BasePrompts(of_prompts, family, model, []), {})
        numbers = range(config.lora.calibration_batches)
        for _ in latents.fill([index for number in numbers for index in plan.batch(number)]):
            pass  # few, and `adapt` could not pass events on
        losses = [partial(base.denoising, *divmod(number, config.train.accumulation), through_text=True) for number in numbers]
        with on_device(model, *model.text_encoders):
            if config.lora.init == "gradient":
                return calibrate.gradients(modules, losses)
            if config.lora.init == "contrast":
                held = [partial(base.ask_what_is_pinned, number) for number in numbers]
                return calibrate.contrasts(modules, losses, held, rank, config.train.seed)
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
        checkpoint.prune(run.checkpoints, config.train.keep_checkpoints)  # a kill may have come between a save and its pruning
        check_disk(run, layers, average)
        write_pictures(run.plan, items)
    work = footprint.work_of(config, model, [*items, *held_out], layers)
    planned = describe(config, model, items, plan, layers, footprint.estimate(work))
    yield planned
    yield from footprint.warnings(work, planned.memory_bytes)
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
        yield from until_stopped(run, unseen.fill())
        yield from until_stopped(run, of_base.fill(prompts_of(config, [*items, *held_out], trains_text(layers))))
    processes.wait()
    (set_aside if prompts else let_go)(model, *footprint.idle_parts(work))

    def draw(rows: Sequence[tuple[str, int]], name: str) -> events.Event:
        """Pictures of the last row's step, and a grid of all rows. A run goes on without those that cannot be written."""
        _, step = rows[-1]
        try:
            with as_exported(layers.values(), optimizer, average) if step else disabled(layers.values()):
                preview.draw(run, family, model, prompts, step)
            return events.Previewed(step, str(preview.save_grid(run, prompts, rows, name)))
        except OSError as error:
            return events.Warned(f"There is no preview of step {step}: {error}.")

    def exported() -> events.Event:
        with as_exported(layers.values(), optimizer, average):
            return export(run, family, model, items, layers, step)

    def saved() -> events.Event:
        more = {"bad_steps": bad_steps, "lowest": lowest, "loss_scale": loss_scale.state(), "circumstances": here}
        return save(run, layers, optimizer, average, step, more)

    lowest: float | None = None  # loss on what is held out

    def validated() -> events.Event:
        nonlocal lowest
        with as_exported(layers.values(), optimizer, average):
            loss = validation_loss(validation)
            if not step or (lowest is not None and loss >= lowest):
                return events.Validated(step, loss, "")
            path = export(run, family, model, items, layers, step, run.best).path
        lowest = loss
        return events.Validated(step, loss, path)

    objective = Objective(config, family, model, items, plan, latents, of_base, layers, processes)
    validation = Objective(config, family, model, held_out, plan_of(held_out, config), unseen, of_base, layers)
    here, newest = circumstances(config, model, processes), restore(run, layers, optimizer, average)
    step, bad_steps, loss_scale = 0, 0, LossScale(config.train.precision == "fp16")
    if newest:
        step, bad_steps, lowest = newest.step, newest.state["bad_steps"], newest.state.get("lowest")
        loss_scale.load_state(newest.state.get("loss_scale", loss_scale.state()))
    on_disk = step
    if newest:
        yield from reservations(newest, here)
        yield events.Resumed(step)
    elif prompts:
        yield draw([("base model", 0)], "step-00000000.png")
    validates = processes.is_first and bool(held_out)
    if validates and not newest:
        yield validated()
    if config.train.compile:
        compile_blocks(model)

    while step < config.train.steps and not processes.any(run.asked_to_stop()):
        began = time.perf_counter()
        text_rests = 0 < options.text_encoder_steps <= step
        losses = []
        for part in range(config.train.accumulation):
            with footprint.memory_errors_explained(work), compile_errors_explained():
                loss = objective(step, part, text_rests)
                loss_scale.up(loss.total / config.train.accumulation).backward()
            losses.append(loss)
        processes.average(optimizer.parameters)
        loss_scale.down(optimizer.parameters)
        norm = torch.nn.utils.clip_grad_norm_(optimizer.parameters, options.max_grad_norm)
        finite = not processes.any(not all(value.isfinite() for value in (norm, *(loss.total for loss in losses))))
        too_large = loss_scale.lowered(finite)
        bad_steps = 0 if finite else bad_steps + (not too_large)
        if finite:
            since = step % config.lora.merge_every if config.lora.merge_every else step
            if options.matched and (since < MATCH_EVERY or since % MATCH_EVERY == 0):
                match_rates(optimizer, layers, adapted.rates, options.up_ratio)
            optimizer.set_rates(share_of_peak(config, step), resting="text_encoder" if text_rests else None)
            with footprint.memory_errors_explained(work):
                optimizer.step()
            hold(layers.values(), config)
            check_weights(run, optimizer, step + 1)
        elif too_large:
            log.info(
                "step %d is skipped, as fp16 cannot hold its gradients: losses are scaled by %g from here on", step + 1, loss_scale.value
            )
        else:
            yield skip(run, step + 1, bad_steps, [items[index].example.path for index in objective.shown(step)])
        optimizer.zero_grad()
        step += 1
        average.update(step)
        if config.lora.merge_every and step % config.lora.merge_every == 0 and step < config.train.steps:
            fold(layers, config, step // config.lora.merge_every)
            optimizer.reset()
        if finite:
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
            yield events.Measured(step, alpha_quantiles(layers), objective.pinned_drift(), memory_used(model.device))

        if validates and (step % config.train.validate_every == 0 or step == config.train.steps):
            yield from when_there_is_room(run, step, validated)
        if not processes.is_first or step == config.train.steps:
            continue
        wanted = run.take_request("save")
        if wanted or is_due(step, config.train.checkpoint_every):
            yield from when_there_is_room(run, step, saved)
            on_disk = step
        if wanted:
            yield from when_there_is_room(run, step, exported)
        if prompts and (run.take_request("sample") or is_due(step, config.preview.every)):
            yield draw([("LoRA", step)], f"step-{step:08d}.png")

    if not processes.is_first:
        return
    if step > on_disk:
        yield from when_there_is_room(run, step, saved)
    if step:
        yield from when_there_is_room(run, step, exported)
    if step < config.train.steps:
        yield events.Stopped(step)
        return
    if prompts:
        yield draw([("base model", 0), ("with LoRA", step)], "before-after.png")
    yield events.Finished(step, str(run.export))


def until_stopped(run: Run, stream: Generator[events.Cached, None, None]) -> Generator[events.Cached, None, None]:
    """The stream, cut off and closed where the run is asked to stop."""
    for event in stream:
        yield event
        if run.asked_to_stop():
            stream.close()
            return


def is_due(step: int, every: int) -> bool:
    """Never where `every` is 0."""
    return every > 0 and step % every == 0


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
    """The layers as a file will hold them: without dropout, averaged where an average was asked for. Blocks run uncompiled: it does not pay
    for what looks at them now and then."""
    stop_dropping(layers)
    with optimizer.evaluating(), average.in_place(), uncompiled():
        yield


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


# ---------------------------------------------------------------- what is not finite


def skip(run: Run, step: int, in_a_row: int, pictures: Iterable[Path]) -> events.Warned:
    """The warning of a step that changed nothing. Raises TrainingError where too many come in a row."""
    seen = f"step {step}, whose pictures were {', '.join(dict.fromkeys(path.name for path in pictures))}"
    if in_a_row > run.config.train.max_bad_steps:
        raise TrainingError(
            f"The loss or its gradient was not finite in {in_a_row} steps in a row, the last of them {seen}: "
            f"look at these, or lower optimizer.rate; {last_good(run)}."
        )
    return events.Warned(f"The loss or its gradient is not finite in {seen}: the step is skipped.")


def check_weights(run: Run, optimizer: Optimizer, step: int) -> None:
    if not torch.nn.utils.get_total_norm([parameter.detach() for parameter in optimizer.parameters]).isfinite():
        raise TrainingError(f"The adapter's weights are not finite after step {step}: lower optimizer.rate; {last_good(run)}.")
