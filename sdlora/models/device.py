"""Where a model computes, and how exactly."""

from __future__ import annotations

import torch

from sdlora.errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


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
