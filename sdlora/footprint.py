"""What a training step takes of memory, found before it is taken, and which options would make that less."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdlora import events
from sdlora.config import Config
from sdlora.data.captions import fixed_caption
from sdlora.errors import TrainingError
from sdlora.items import Item
from sdlora.models import families, memory
from sdlora.models.device import DTYPES, checkpoint_activations
from sdlora.models.family import Family, Model, PromptEmbeds
from sdlora.models.packed import Packed, bytes_elsewhere, pack
from sdlora.objective import PINNED_A_BATCH, trains_text
from sdlora.optim import OPTIMIZERS

GIB = 2**30
WORTH_TELLING = 0.02  # share of the peak


@dataclass(frozen=True)
class Work:
    """What a step has to do. The model may be loaded otherwise than the config says: the config counts."""

    config: Config
    model: Model  # with its adapters
    layers: Collection[str]  # that are trained, by readable name
    bucket: tuple[int, int]  # width, height in px of the largest pictures
    reads_prompts: bool  # new ones as it goes, so that text encoders stay on the device although they are not trained


def work_of(config: Config, model: Model, items: Sequence[Item], layers: Collection[str]) -> Work:
    bucket = max((item.placed.bucket for item in items), key=lambda sides: sides[0] * sides[1])
    return Work(config, model, layers, bucket, any(fixed_caption(item.example.caption, item.rules) is None for item in items))


def idle_parts(work: Work) -> tuple[str, ...]:
    """What steps do not need once pictures and prompts are encoded; previews do."""
    text = work.reads_prompts or trains_text(work.layers)
    return ("vae", *(() if text else work.model.text_encoders))


def estimate(work: Work) -> int:
    """Peak bytes of a step, but for what a device's driver and other programs take; on a CPU those of the whole process."""
    device_type, options = work.model.device.type, work.config.optimizer
    shadow = shadow_of(work)
    parts = {name.partition(".")[0] for name in work.layers}
    trained = [p for part in shadow.parts if part in parts for p in shadow.parts[part].parameters() if p.requires_grad]
    at_work = memory.peak_bytes(lambda: step(work, shadow, trained), device_type, shadow.dtype)
    kept = OPTIMIZERS[options.algorithm].kept + (1 if options.ema else 0)
    return held_bytes(work, shadow) + round(4 * kept * sum(p.numel() for p in trained)) + at_work


def shadow_of(work: Work) -> Model:
    """The model without its numbers, in the precision that the config says, with activations computed twice where it says so."""
    model, options = work.model, work.config.train
    dtype = DTYPES[options.precision]
    parts = {part: memory.on_meta(module, dtype) for part, module in model.parts.items()}
    kept, is_packed = work.config.model, any(isinstance(module, Packed) for module in parts["unet"].modules())
    if (kept.base_precision != "same" or kept.offload) and not is_packed:
        pack(parts["unet"], kept.base_precision, kept.offload)
    shadow = replace(model, parts=parts, dtype=dtype, device=torch.device("meta"))
    if options.gradient_checkpointing:
        checkpoint_activations(shadow, context_fn=lambda: (nullcontext(), memory.Autocast(model.device.type, dtype)))
    return shadow


def held_bytes(work: Work, shadow: Model) -> int:
    """What is there before a step: of what rests while there are steps nothing, but on a CPU it is there for previews. A CPU holds the
    program, too."""
    on_cpu = work.model.device.type == "cpu"
    idle = () if on_cpu and work.config.preview.prompts else idle_parts(work)
    there = {"vae": work.model.vae, **shadow.parts}
    held = memory.weight_bytes(*(module for name, module in there.items() if name not in idle))
    return held + work.model.program_bytes if on_cpu else held - bytes_elsewhere(shadow.parts["unet"])


def step(work: Work, shadow: Model, trained: list[nn.Parameter]) -> None:
    """What the loop and the objective do, as far as memory notices."""
    family, loss, size = families.FAMILIES[shadow.family], work.config.loss, work.config.train.batch_size
    if work.config.train.accumulation > 1:
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)  # of the batches before

    def prompts(count: int) -> PromptEmbeds:
        with torch.set_grad_enabled(trains_text(work.layers)):
            return family.encode_prompts(shadow, [""] * count)

    total = error(family, shadow, prompts(size), size, work.bucket)
    if loss.pinned_embedding and trains_text(work.layers):
        total = total + torch.stack([states.square().mean() for states in prompts(PINNED_A_BATCH).vectors]).sum()
    if loss.prior:
        embeds = prompts(loss.prior_samples)
        with torch.no_grad():
            error(family, shadow, embeds, loss.prior_samples, work.bucket)
        total = total + error(family, shadow, embeds, loss.prior_samples, work.bucket)
    total.backward()


def error(family: Family, shadow: Model, embeds: PromptEmbeds, size: int, bucket: tuple[int, int]) -> Tensor:
    """Of the predictions for a batch."""
    unet: Any = shadow.parts["unet"]
    shape = (size, unet.config.in_channels, bucket[1] // shadow.latent_factor, bucket[0] // shadow.latent_factor)
    noisy, wanted, time_ids = (torch.empty(of, device=shadow.device) for of in (shape, shape, (size, 6)))
    timesteps = torch.empty(size, dtype=torch.long, device=shadow.device)
    return F.mse_loss(family.predict(shadow, noisy, timesteps, embeds, time_ids).float(), wanted)


# ---------------------------------------------------------------- when it is too much


def available_bytes(device: torch.device) -> int | None:
    """What a step may take, of what `estimate` counts; None where the device does not say it."""
    if device.type == "cpu":
        return int(psutil.virtual_memory().available) + memory.process_bytes()
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return None


def savings(work: Work) -> list[tuple[int, str]]:
    """Bytes that an option would take off the peak, and how it is written: the most first, and none that is not worth telling."""
    peak = estimate(work)
    found = [(peak - estimate(changed), text) for text, changed in alternatives(work)]
    return sorted([(saved, text) for saved, text in found if saved > WORTH_TELLING * peak], reverse=True)


def alternatives(work: Work) -> Iterator[tuple[str, Work]]:
    """Each with one option changed to what takes less."""
    config, (width, height) = work.config, work.bucket

    def change(section: str, **changes: object) -> Work:
        return replace(work, config=config.model_copy(update={section: getattr(config, section).model_copy(update=changes)}))

    if config.train.batch_size > 1:
        batches = config.train.batch_size * config.train.accumulation
        yield f"train.batch_size = 1 with train.accumulation = {batches}", change("train", batch_size=1, accumulation=batches)
    if not config.train.gradient_checkpointing:
        yield "train.gradient_checkpointing = true", change("train", gradient_checkpointing=True)
    if config.train.precision == "fp32" and (work.model.device.type != "cpu" or memory.in_onednn(torch.bfloat16)):  # else slow beyond use
        yield "train.precision = 'bf16'", change("train", precision="bf16")
    if config.model.base_precision == "same" and not config.model.offload:
        yield "model.base_precision = 'fp8'", change("model", base_precision="fp8")
        if work.model.device.type != "cpu":
            yield "model.offload = true", change("model", offload=True)
    if config.loss.prior:
        yield "loss.prior = 0", change("loss", prior=0.0)
    if trains_text(work.layers) and any(name.startswith("unet.") for name in work.layers):
        yield "lora.text_encoder = []", replace(work, layers=[name for name in work.layers if name.startswith("unet.")])
    multiple = work.model.size_multiple
    smaller = (max(multiple, width * 3 // 4 // multiple * multiple), max(multiple, height * 3 // 4 // multiple * multiple))
    resolution = max(config.data.resolutions, default=config.data.resolution) * 3 // 4
    yield f"data.resolution = {resolution}", replace(work, bucket=smaller)


def advice(work: Work) -> str:
    """The options that would help most, in a part of a sentence."""
    found = [f"{text} (about {saved / GIB:.1f} GiB less)" for saved, text in savings(work)[:3]]
    return f"what would help most: {', '.join(found)}" if found else "no option would make that much less; a smaller base model would"


def warnings(work: Work, peak: int) -> Iterator[events.Warned]:
    """Where a step is not likely to fit."""
    available = available_bytes(work.model.device)
    if available is not None and peak > available:
        needs = f"A step takes about {peak / GIB:.1f} GiB at its peak and {work.model.device} has {available / GIB:.1f} GiB free"
        yield events.Warned(f"{needs}; {advice(work)}.")


@contextmanager
def memory_errors_explained(work: Work) -> Iterator[None]:
    """Raises TrainingError, which names the options that would help most, where a computation inside runs out of memory."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        reason = f"{work.model.device} has no memory left for a step, which takes about {estimate(work) / GIB:.1f} GiB at its peak"
        raise TrainingError(f"{reason}; {advice(work)}.") from error
