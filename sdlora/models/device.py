"""Where a model computes, how exactly, and which of its parts are there just now."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sdlora.errors import ConfigError, TrainingError, first_line
from sdlora.models.family import Model
from sdlora.models.memory import process_bytes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """'auto' is CUDA, Apple's MPS or the CPU, in this order. Raises ConfigError for what is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise ConfigError(f"train.device: {name!r} is not to be had here; use auto, or cpu.") from None
    return device


def arithmetic(model: Model) -> AbstractContextManager[Any]:
    """Mixed precision of the forward pass; a no-op in fp32, and on the meta device, where models/memory.py stands in for it."""
    if model.device.type == "meta":
        return nullcontext()
    return torch.autocast(model.device.type, model.dtype, enabled=model.dtype != torch.float32)


def checkpoint_activations(model: Model, **options: Any) -> None:
    """From now on compute the activations within a block twice instead of keeping them. `options`: torch.utils.checkpoint's."""
    if model.device.type == "cpu" and (libc := glibc()):
        returned = Returned(libc)
        options = {"context_fn": lambda: (returned, returned)} | options
    for module in model.parts.values():
        # transformers and diffusers checkpoint in training mode only; the models have no dropout that this would switch on
        part: Any = module.train()
        if hasattr(part, "enable_gradient_checkpointing"):  # diffusers
            part.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False, **options))
        else:
            part.gradient_checkpointing_enable({"use_reentrant": False, **options})


def compile_blocks(model: Model) -> None:
    """From now on the UNet's transformer blocks run as PyTorch compiles them, each size of them at its first use, which takes minutes; but
    for what is done `uncompiled`. They are alike, so that few are compiled for all (regional compilation)."""
    # Blocks share their code, and each width, number of pixels, and the base model beside the adapted one is compiled of its own.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    unet: Any = model.parts["unet"]
    unet.compile_repeated_blocks(backend=COMPILER)


COMPILER = "inductor"


@contextmanager
def compile_errors_explained() -> Iterator[None]:
    """Raises TrainingError where what is compiled inside cannot be."""
    try:
        yield
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = first_line(getattr(error, "inner_exception", error))  # a compiler's own
        raise TrainingError(
            f"train.compile: PyTorch cannot compile this model here: {reason}. It needs a C++ compiler, and Triton for a GPU; "
            "install them, or set train.compile = false."
        ) from error


def uncompiled() -> AbstractContextManager[Any]:
    """Blocks run as they are inside."""
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def return_freed_memory(thoroughly: bool) -> None:
    """From now on, of large tensors, where this process's memory is glibc's; up to 64 MiB of smaller ones are kept, which are so many that
    each would cost its pages anew. Left alone glibc raises what it takes for large by and by.

    Large are those of 32 MiB, or `thoroughly` of 2 MiB: with gradient checkpointing, where little is in use at a time, the gaps between
    tensors are as much again (SD 1.5, 512 px: 0.84 GiB held, 0.36 in use). Without it they come to 2 % of the peak, and taking 250,000
    pages anew to 8 % of a step in bf16 at 512 px."""
    if libc := glibc():
        libc.mallopt(M_MMAP_THRESHOLD, (2 if thoroughly else 32) * 2**20)
        libc.mallopt(M_TRIM_THRESHOLD, 64 * 2**20)


class Returned(AbstractContextManager[None]):
    """Where it is entered, what lies free between smaller tensors is returned, too, if this process holds more than it ever did where all
    was returned: SD 1.5 in bf16 at 512 px then takes 2.51 GiB at its peak, and not 2.65. To return it at every block makes that no less."""

    def __init__(self, libc: ctypes.CDLL):
        self.libc, self.most = libc, 0

    def __enter__(self) -> None:
        if process_bytes() > self.most:
            self.libc.malloc_trim(0)
            self.most = max(self.most, process_bytes())

    def __exit__(self, *_: object) -> None:
        pass


def glibc() -> ctypes.CDLL | None:
    """The library that this process's memory is from, where that is glibc."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def set_aside(model: Model, *names: str) -> None:
    """Move parts ("vae", "text_encoder" ...) out of the device's memory, until on_device() fetches them."""
    for name in names:
        _read(model, name).to("cpu")


def let_go(model: Model, *names: str) -> None:
    """Free parts: they are on the meta device from here on, until on_device() reads them anew."""
    for name in names:
        _part(model, name).to("meta")


def is_away(part: nn.Module) -> bool:
    """Whether it was let go, or not read so far."""
    return next(part.parameters()).device.type == "meta"


def memory_used(device: torch.device) -> int:
    """Bytes: of a GPU the most that tensors took at once so far, of a CPU what the process has of it now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.current_allocated_memory()
    return process_bytes()


@contextmanager
def on_device(model: Model, *names: str) -> Iterator[None]:
    """Parts are on the model's device inside, and then back where they were; those that had to be read stay."""
    before = {name: next(_part(model, name).parameters()).device for name in names if not is_away(_part(model, name))}
    for name in names:
        _read(model, name).to(model.device)
    try:
        yield
    finally:
        for name, device in before.items():
            _part(model, name).to(device)


def _read(model: Model, name: str) -> nn.Module:
    """The part with its weights. Raises WeightsError."""
    part = _part(model, name)
    if is_away(part):
        whole = model.loaders[name]().requires_grad_(False)
        for own, of_whole in zip(part.modules(), whole.modules(), strict=True):  # a state_dict lacks buffers that no file holds
            own._parameters, own._buffers = of_whole._parameters, of_whole._buffers
    return part


def _part(model: Model, name: str) -> nn.Module:
    module: nn.Module = model.vae if name == "vae" else model.parts[name]
    return module
