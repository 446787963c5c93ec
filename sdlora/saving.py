"""What a run keeps on disk and goes on from: its state, room for it, and what has changed when it is taken back."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from sdlora import __version__, checkpoint, events
from sdlora.checkpoint import Checkpoint
from sdlora.config import Config
from sdlora.errors import TrainingError
from sdlora.files import FULL
from sdlora.lora.layers import Adapter
from sdlora.models.family import Model
from sdlora.optim import OPTIMIZERS, Average, Optimizer
from sdlora.processes import Processes
from sdlora.run import Run

ROOM_EVERY = 2.0  # s between two tries to write to a full disk


def circumstances(config: Config, model: Model, processes: Processes) -> dict[str, Any]:
    """What a run's bits depend on beside its state."""
    options = {f"{section}.{key}": value for section, of in config.model_dump(mode="json").items() for key, value in of.items()}
    about = {"sdlora": __version__, "torch": torch.__version__, "threads": torch.get_num_threads(), "device": str(model.device)}
    processor = torch.backends.cpu.get_cpu_capability()  # the widest instructions that PyTorch's own kernels take
    return about | {"processes": processes.count, "processor": processor} | options


def reservations(newest: Checkpoint, here: Mapping[str, Any]) -> Iterator[events.Warned]:
    """What the user should know of the checkpoint that a run goes on from."""
    for damaged in newest.damaged:
        yield events.Warned(f"The checkpoint {damaged} is damaged: the run goes on from step {newest.step} instead.")
    changed = [f"{name} {was} -> {here.get(name)}" for name, was in newest.state["circumstances"].items() if was != here.get(name)]
    if changed:
        yield events.Warned(f"Since step {newest.step} these have changed, so the run may end in other bits: {', '.join(changed)}.")


def save(
    run: Run, layers: Mapping[str, Adapter], optimizer: Optimizer, average: Average, step: int, more: Mapping[str, Any]
) -> events.Saved:
    adapter = checkpoint.flatten({name: layer.state() for name, layer in layers.items()})
    moments, scalars = optimizer.state()
    tensors = {"adapter": adapter, "optimizer": moments, "average": average.tensors()}
    whole = Checkpoint(step, tensors, {"optimizer": scalars, **more})
    return events.Saved(step, str(checkpoint.save(run.checkpoints, whole, run.config.train.keep_checkpoints)))


def restore(run: Run, layers: Mapping[str, Adapter], optimizer: Optimizer, average: Average) -> Checkpoint | None:
    """Take back the newest checkpoint's state, where there is one."""
    newest = checkpoint.load_newest(run.checkpoints)
    if newest is None:
        return None
    if newest.tensors.keys() != {"adapter", "optimizer", "average"} or not newest.state.keys() >= {
        "optimizer",
        "circumstances",
        "bad_steps",
    }:
        raise TrainingError(f"{run.checkpoints}: step {newest.step} is not of a training run of this version; start a new run.")
    saved = checkpoint.unflatten(newest.tensors["adapter"])
    if saved.keys() != layers.keys():
        raise TrainingError(f"{run.folder}: its checkpoint is of other layers than its config.toml names; start a new run.")
    for name, layer in layers.items():
        if {key: t.shape for key, t in layer.state().items()} != {key: t.shape for key, t in saved[name].items()}:
            raise TrainingError(f"{run.folder}: its checkpoint has another kind or rank of {name} than its config.toml; start a new run.")
        layer.load_state(saved[name])
    if len(newest.tensors["average"]) != len(average.values):
        raise TrainingError(f"{run.folder}: its config.toml has another optimizer.ema than its checkpoint; start a new run.")
    try:
        optimizer.load_state(newest.tensors["optimizer"], newest.state["optimizer"])
        average.load_tensors(newest.tensors["average"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise TrainingError(f"{run.folder}: its checkpoint does not fit its config.toml ({error}); start a new run.") from error
    return newest


def last_good(run: Run) -> str:
    newest = checkpoint.newest_whole(run.checkpoints)
    return f"the last good checkpoint is {newest.name}" if newest else "there is no checkpoint yet"


# ---------------------------------------------------------------- the disk


def check_disk(run: Run, layers: Mapping[str, Adapter], average: Average) -> None:
    """Raises TrainingError where the disk has no room for what a run holds on it at once: the checkpoints that stay and the one that
    is being written, and a LoRA file beside its draft."""
    options = run.config.train
    learned = 4 * sum(layer.trained_numbers for layer in layers.values())  # bytes, fp32
    adapter = sum(tensor.nbytes for layer in layers.values() for tensor in layer.state().values())
    moments = round(OPTIMIZERS[run.config.optimizer.algorithm].kept * learned)
    one = adapter + moments + sum(value.nbytes for value in average.values)
    made = -(-options.steps // options.checkpoint_every) if options.checkpoint_every else 1
    count = min(options.keep_checkpoints + 1, made)
    there = sum(path.stat().st_size for path in run.folder.rglob("*") if path.is_file())
    needed, free = count * one + 2 * learned - there, shutil.disk_usage(run.folder).free
    if needed > free:
        raise TrainingError(
            f"The disk of {run.folder} has {free / 2**20:,.0f} MiB free, and the run needs {needed / 2**20:,.0f} ({count} checkpoints of "
            f"{one / 2**20:,.0f} each, and its LoRA file): make room, or set output.runs to another disk."
        )


def when_there_is_room(run: Run, step: int, write: Callable[[], events.Event]) -> Iterator[events.Event]:
    """The event that `write` returns. While the disk is full the run waits for room, and says so. Raises TrainingError where it is
    asked to stop meanwhile, and where the disk refuses for another reason."""
    waits = False
    while True:
        try:
            written = write()
            break
        except OSError as error:
            if error.errno not in FULL or run.asked_to_stop():
                raise TrainingError(f"Step {step} cannot be written to {run.folder} ({error.strerror}); {last_good(run)}.") from error
        if not waits:
            yield events.Warned(f"The disk of {run.folder} is full: the run waits at step {step}, and goes on when there is room.")
        waits = True
        time.sleep(ROOM_EVERY)
    yield written
